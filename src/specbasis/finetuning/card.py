"""The model card of a finetune: what it is, what it scores, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from specbasis.core.text import printable, shareable
from specbasis.finetuning.methods import METHODS
from specbasis.finetuning.metrics import METRICS
from specbasis.finetuning.tasks import Task


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any], task: Task) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        config: the run, as its manifest has it.
        metrics: what came out, as `metrics.json` has it.
        task: what is predicted.
    """
    method = METHODS[config["method"]]
    parameters, protocol = metrics["parameters"], config["protocol"]
    share = 100 * parameters["adapter"] / parameters["total"]
    base, title = (" ".join(shareable(printable(name)).split()) for name in (config["base"], task.title))
    lines = [
        "---",
        f"base_model: {_yaml(base)}",
        "library_name: specbasis",
        f"tags: {_yaml(['specbasis', method.name])}",
        f"metrics: {_yaml(list(task.metrics))}",
        "---",
        "",
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
        f"{protocol['weight_decay']:g}, {protocol['precision']}. The dev set chose nothing.",
        "",
        forgetting(metrics),
        "",
        "## Use",
        "",
        "```python",
        "from specbasis.finetuning import load",
        "",
        'model, processor = load("FOLDER")',
        "```",
        "",
    ]
    if metrics["notes"]:
        lines += ["## Notes", "", *(f"- {' '.join(shareable(note).split())}" for note in metrics["notes"]), ""]
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """A value of the front matter: what JSON writes is YAML, whatever colons and line ends are in it."""
    return json.dumps(value)


def forgetting(metrics: Mapping[str, Any]) -> str:
    """What training did to the loss of pretraining, in a sentence."""
    loss = metrics["forgetting"]
    if not loss["definition"]:
        return f"Forgetting is not measured: {loss['reason']}."
    before, after = ("not finite" if loss[at] is None else f"{loss[at]:.4f}" for at in ("before", "after"))
    return f"Loss on held-back text ({loss['definition']}, {loss['text']}): {before} before, {after} after."
