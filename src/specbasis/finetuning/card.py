"""The model card of a finetune: what it is, what it scores, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specbasis.adapter.card import OWN_LOADING, loading
from specbasis.checkpoint.adapter_file import CONFIG
from specbasis.checkpoint.card import front_matter, hub_name
from specbasis.checkpoint.regular import read_json
from specbasis.core.text import markdown
from specbasis.finetuning.methods import METHODS
from specbasis.finetuning.metrics import METRICS
from specbasis.finetuning.tasks import Task


def model_card(
    config: Mapping[str, Any], metrics: Mapping[str, Any], task: Task, folder: Path | None = None
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        config: the run, as its manifest has it.
        metrics: what came out, as `metrics.json` has it.
        task: what is predicted.
        folder: what was written; where that is an adapter of PEFT's, the card says how it loads it.
    """
    adapter = read_json(folder / CONFIG) if folder and (folder / CONFIG).is_file() else None
    method = METHODS[config["method"]]
    parameters, protocol = metrics["parameters"], config["protocol"]
    share = 100 * parameters["adapter"] / parameters["total"]
    base, title = markdown(config["base"]), markdown(task.title)
    known = hub_name(config["base"])
    # transformers has no class with such a head, so PEFT alone would lose it.
    under = ", a head on the mean of the last states" if protocol.get("head") == "mean" else ""
    fields = {
        "base_model": known,
        "base_model_relation": known and ("adapter" if adapter else "finetune"),
        "library_name": "peft" if adapter else "specbasis",
        "tags": ["specbasis", method.name],
        "metrics": list(task.metrics),
    }
    lines = [
        front_matter(fields),
        f"# {title}: {base} finetuned by {method.title}",
        "",
        f"Trained: {method.trains} ({method.source}).",
        f"{parameters['adapter']:,} parameters of the method ({share:.2g} % of {parameters['total']:,}), and "
        f"{parameters['head']:,} of head and pooler.",
        "",
        "| set | " + " | ".join(METRICS[name].title for name in task.metrics) + " |",
        "|---" * (1 + len(task.metrics)) + "|",
    ]
    for name, values in metrics.items():
        if isinstance(values, Mapping) and set(values) == set(task.metrics):
            lines.append(f"| {name} | " + " | ".join(f"{values[key]:.4f}" for key in task.metrics) + " |")
    lines += [
        "",
        f"Seed {config['seed']}, {protocol['epochs']:g} epochs of {metrics['train_examples']:,} examples, AdamW, "
        f"learning rate {protocol['learning_rate']:g} (linear, {protocol['warmup']:.0%} warm-up), batch "
        f"{protocol['batch_size']}, texts cut at {protocol['max_length']} tokens, weight decay "
        f"{protocol['weight_decay']:g}, {protocol['precision']}{under}. The dev set chose nothing.",
        "",
        forgetting(metrics),
        "",
        "## Use",
        "",
        OWN_LOADING,
        *(["or with PEFT:", "", loading(adapter, len(task.labels) or 1)] if adapter and not under else []),
    ]
    if metrics["notes"]:
        lines += ["## Notes", "", *(f"- {markdown(note)}" for note in metrics["notes"]), ""]
    return "\n".join(lines)


def forgetting(metrics: Mapping[str, Any]) -> str:
    """What training did to the loss of pretraining, in a sentence."""
    loss = metrics["forgetting"]
    if not loss["definition"]:
        return f"Forgetting is not measured: {loss['reason']}."
    before, after = ("not finite" if loss[at] is None else f"{loss[at]:.4f}" for at in ("before", "after"))
    return f"Loss on held-back text ({loss['definition']}, {loss['text']}): {before} before, {after} after."
