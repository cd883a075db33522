"""An extracted LoRA, trained on for some steps from where it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbasis.checkpoint.adapter_file import WEIGHTS
from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.entry import shown
from specbasis.checkpoint.formats.safetensors import base_sha256
from specbasis.core.errors import InputError
from specbasis.core.extras import quiet
from specbasis.core.text import number_of
from specbasis.finetuning.options import require_libraries
from specbasis.finetuning.tasks import TaskData
from specbasis.treatment.options import ExtractOptions

if TYPE_CHECKING:
    from specbasis.finetuning.base import Base

BATCH = 16


def heal(folder: Path, base: str | Path, data: TaskData, options: ExtractOptions) -> dict[str, Any]:
    """Finetune the LoRA of a folder on a task, and put what came of it in its place.

    Trained are its factors and whatever the folder carries beside them (a head, biases), by AdamW with a rate that
    falls to zero linearly, in batches of `BATCH`. Memory: the model, and the training of what the folder holds.

    Args:
        folder: PEFT's, as `LowRank.write` leaves it.
        base: the pretrained model, as transformers can load it.
        data: the task; its training examples are used alone.
        options: ``steps`` of the optimiser, ``learning_rate`` of the first, ``seed`` of the order of the examples
            and of dropout.

    Returns:
        task, steps, learning_rate, seed, examples, parameters, and loss: of the first and of the last tenth of the
        steps.

    Raises:
        InputError: transformers does not know the base, or the adapter is of no model with a head for this task.
    """
    require_libraries()
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import set_seed

    from specbasis.finetuning.base import load_base

    with quiet():
        set_seed(options.seed)
        loaded = load_base(base, data.task)
        try:
            model = PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=True)
        except (RuntimeError, ValueError) as error:
            outputs, detail = max(1, len(data.task.labels)), str(error).strip().splitlines()[-1].strip()
            raise InputError(
                f"the finetune has no head for {data.task.title}, which has {number_of(outputs, 'output')} "
                f"({shown(detail[:200])}); want the task that it was finetuned on"
            ) from error
        losses = _trained(model, loaded, data, folder, options)
        trained = get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in trained.items()}
    head = {"format": "pt", "base_sha256": base_sha256(folder / WEIGHTS)}
    write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=head))
    part = max(1, len(losses) // 10)
    return {
        "task": data.task.title,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "examples": len(data.train),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": [sum(some) / part for some in (losses[:part], losses[-part:])],
    }


def _trained(model: Any, loaded: Base, data: TaskData, folder: Path, options: ExtractOptions) -> list[float]:
    """The loss of each step."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    arguments = TrainingArguments(
        output_dir=str(folder),  # nothing is saved there
        seed=options.seed,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_steps=1,
        report_to=["none"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=loaded.encode(data.train), data_collator=loaded.collator()
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
