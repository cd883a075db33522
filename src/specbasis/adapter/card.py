"""The card of an adapter: what it is, of which base, and how PEFT loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specbasis.checkpoint.adapter_file import CONFIG, adapter_folder, named_base
from specbasis.checkpoint.card import digest_line, front_matter, hub_name, marked, write_section
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.formats import endings
from specbasis.checkpoint.formats.safetensors import base_sha256
from specbasis.core.errors import InputError
from specbasis.core.text import markdown, number_of

MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""What PEFT calls a task → the class of transformers that loads a model for it."""

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The same in the Hub's words."""

OWN_LOADING = '```python\nfrom specbasis.finetuning import load\n\nmodel, processor = load("FOLDER")\n```\n'
"""The code by which a finetune is loaded, whatever its method and head."""

METHODS = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "SPECTRAL": "Spectral adapter"}


def adapter_card(config: Mapping[str, Any], digest: str, tensors: Mapping[str, Tensor | Entry]) -> str:
    """The whole card of a new adapter.

    Args:
        config: PEFT's configuration.
        digest: SHA-256 of the base's weights; empty where it is not known.
        tensors: the model's, or those that the adapter holds whole.
    """
    labels = label_count(config, tensors)
    section = marked("adapter", _section(config, digest, labels))
    return f"{front_matter(_fields(config))}\n# {_title(config)}\n\n{section}\n"


def label_count(config: Mapping[str, Any], tensors: Mapping[str, Tensor | Entry]) -> int | None:
    """How many labels a classifier of sequences has, by the shape of its head's last matrix; None of others."""
    sizes = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith("weight") and name.split(".")[0] in ("classifier", "score")
    ]
    return sizes[-1] if sizes and config.get("task_type") == "SEQ_CLS" else None


def write_card(folder: Path, readme: Path, **fields: str) -> list[str]:
    """Write the section on an adapter into a card; see `checkpoint.card.write_section`.

    Args:
        folder: the adapter's.
        readme: the card.
        **fields: of the front matter, in the place of what follows from the adapter.

    Raises:
        InputError: the folder holds no adapter, or the card cannot be written.
    """
    file = adapter_folder(folder)
    digest = next((base_sha256(path) for path in file.files if path.suffix == ".safetensors"), "")
    held = {
        "target_modules": [*file.modules],
        "modules_to_save": sorted(
            {n.rpartition(".")[0].removesuffix(".base_layer") for n in file.saved} - {*file.modules}
        ),
    }
    config = {**file.config, **held}  # which may name more than the file holds
    return write_section(
        readme,
        "adapter",
        _section(config, digest, label_count(config, file.saved)),
        _fields(config) | fields,
        _title(config),
    )


def loading(config: Mapping[str, Any], labels: int | None) -> str:
    """The code by which an adapter is loaded on its base: PEFT's, or that of a finetune whose head PEFT has not."""
    if "mean_head" in (config.get("modules_to_save") or ()):
        return OWN_LOADING
    model_class = MODEL_CLASSES.get(str(config.get("task_type")), "AutoModel")
    given = f", num_labels={labels}" if labels else ""
    name = _base(config)
    source = "" if name else "  # BASE: where the base above is"
    own = [f"from transformers import {model_class}"]
    base = f'base = {model_class}.from_pretrained("{name or "BASE"}"{given}){source}'
    if not name and Path(str(config.get("base_model_name_or_path"))).suffix in endings():
        own, base = [], "base = ...  # the module that the base's file, named above, holds the weights of"
    method = ["import specbasis.adapter  # the method"] if _kind(config) == "SPECTRAL" else []
    last = 'model = PeftModel.from_pretrained(base, "FOLDER")  # FOLDER: that of this adapter'
    lines = ["from peft import PeftModel", *own, *method, "", base, last]
    return "\n".join(["```python", *lines, "```", ""])


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base_model": _base(config),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": PIPELINES.get(str(config.get("task_type")), ""),
        "tags": ["specbasis", _kind(config).lower()],
    }


def _section(config: Mapping[str, Any], digest: str, labels: int | None) -> str:
    modules, whole = config.get("target_modules"), config.get("modules_to_save")
    interval, rank = config.get("interval"), config.get("rank") or config.get("r")
    size = f"singular directions {interval[0] + 1} … {interval[1]}" if interval else f"rank {markdown(rank)}"
    size = f"coefficients at the positions of `pattern` in {CONFIG}" if config.get("pattern") else size
    held = number_of(len(modules), "module") if isinstance(modules, list) else f"modules {markdown(modules)}"
    lines = [f"{METHODS.get(_kind(config), markdown(_kind(config)))}: {size}, on {held} of {_named(config)}."]
    if config.get("rank_pattern"):
        lines.append(f"Other ranks are in `rank_pattern` of {CONFIG}.")
    if isinstance(whole, list) and whole:
        lines.append(f"Stored whole: {', '.join(map(markdown, whole))}.")
    if digest:
        lines += ["", digest_line(f"base: {_named(config)}", digest)]
    return "\n".join([*lines, "", loading(config, labels)])


def _title(config: Mapping[str, Any]) -> str:
    return f"{METHODS.get(_kind(config), markdown(_kind(config)))} of {_named(config)}"


def _named(config: Mapping[str, Any]) -> str:
    return _base(config) or markdown(config.get("base_model_name_or_path") or "a base that it does not name")


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type", "")).upper().partition(":")[0]


def _base(config: Mapping[str, Any]) -> str:
    """The base on the Hub; empty where it is elsewhere."""
    try:
        return hub_name(named_base(config, ""))
    except InputError:
        return ""
