"""Forgetting: what finetuning does to the loss that the base was pretrained for, on held-back text.

Three definitions, by what the base is; the first that applies is used and named beside the number.

- ``masked-lm``: cross entropy at 15 % of the tokens, masked, for a base whose checkpoint holds a masked-LM head.
- ``next-token``: cross entropy of the next token, for a base whose checkpoint holds a language-model head.
- ``contrastive-halves``: for a sentence encoder (its folder says so, ``modules.json``), which has no head left.
  Each held-back text is cut into its two halves; embeddings are mean-pooled and normalised; the symmetric cross
  entropy of telling which second half belongs to which first one, among 32, at temperature 0.05: the kind of
  objective that sentence encoders are trained with. Chance level is log 32 = 3.47.

The head is always the base's own: what changes is the backbone under it. Bases of no such kind have no value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specbasis.checkpoint.regular import read_json
from specbasis.core.pooling import mean_state
from specbasis.finetuning.base import Base, encoder_of, longest_input
from specbasis.finetuning.prefix.probe import evaluating

GROUP = 32
TEMPERATURE = 0.05
MASKED = 0.15
MAX_LENGTH = 128


@dataclass(frozen=True, eq=False)
class Pretraining:
    """The pretraining loss of a base, as a function of its backbone.

    Attributes:
        definition: ``masked-lm``, ``next-token``, ``contrastive-halves``, or empty where there is none.
        reason: why there is none.
        loss: from a model with a task head, whatever method is on it, to the mean loss in nats.
    """

    definition: str
    reason: str
    loss: Callable[[nn.Module], float | None]


def pretraining_loss(base: Base, texts: Sequence[str]) -> Pretraining:
    """The loss that the base was pretrained for, on these texts; see the module for the definitions.

    Args:
        base: the base, without a method on it yet.
        texts: held-back texts, of more than a few words each.
    """
    tokenizer = base.processor
    reason = "the base has neither a language-model head nor the marks of a sentence encoder (modules.json)"
    if base.task.images:
        reason = "images: no pretraining loss is defined for them"
    elif len(texts) < 2:
        reason = "fewer than two held-back texts"
    else:
        for definition, head, marks in _HEADS:
            model = _with_head(base, head, marks)
            if model is not None:
                loss = partial(_under_head, model, head, tokenizer=tokenizer, texts=texts)
                return Pretraining(definition, "", loss)
        if _is_sentence_encoder(base):
            halves = "contrastive-halves"
            return Pretraining(halves, "", lambda tuned: _contrastive(encoder_of(tuned), tokenizer, texts))
    return Pretraining("", reason, lambda tuned: None)


_HEADS = (
    ("masked-lm", "MaskedLM", ("ForMaskedLM", "ForPreTraining")),
    ("next-token", "CausalLM", ("ForCausalLM", "LMHeadModel")),
)
"""Definition, head, and the ends of the names of classes that have it."""


def _with_head(base: Base, head: str, marks: tuple[str, ...]) -> Any:
    """The base under its own pretraining head; None where the checkpoint holds none."""
    import transformers

    stored = transformers.AutoConfig.from_pretrained(**base.address, trust_remote_code=False)
    names = getattr(stored, "architectures", None) or getattr(base.model.config, "architectures", None) or ()
    if not any(name.endswith(marks) for name in names):
        return None
    try:
        model, about = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            **base.address, output_loading_info=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError):
        return None
    return None if about["missing_keys"] or about["mismatched_keys"] else model.eval()


def _under_head(model: Any, head: str, tuned: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """The loss with the tuned backbone below the base's head, which is left as it was."""
    prefix, own = model.base_model_prefix, getattr(model, model.base_model_prefix)
    with evaluating(tuned):
        setattr(model, prefix, encoder_of(tuned))
        try:
            return _token_loss(model, tokenizer, texts, masked=head == "MaskedLM")
        finally:
            setattr(model, prefix, own)


def _token_loss(model: Any, tokenizer: Any, texts: Sequence[str], *, masked: bool) -> float:
    """Mean cross entropy at masked tokens, or of the next token; the mask is the same whatever the model."""
    generator = torch.Generator().manual_seed(0)
    total, count = 0.0, 0
    for start in range(0, len(texts), GROUP):
        batch = _tokens(model, tokenizer, texts[start : start + GROUP])
        ids = batch["input_ids"]
        if masked:
            special = [
                tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in ids.tolist()
            ]
            chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & ~torch.tensor(special).bool()
            batch["input_ids"] = ids.masked_fill(chosen, tokenizer.mask_token_id)
        else:
            ids, chosen = ids[:, 1:], batch["attention_mask"][:, 1:].bool()
        with torch.inference_mode():
            logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
            picked = logits[:, : ids.shape[1]][chosen.to(model.device)].float()
            total += float(F.cross_entropy(picked, ids[chosen].to(model.device), reduction="sum"))
        count += int(chosen.sum())
    return total / count if count else math.nan


def _contrastive(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean over whole groups of the cross entropy of telling which halves belong together."""
    with evaluating(encoder):
        losses = losses_of_halves(encoder, tokenizer, texts, min(MAX_LENGTH, longest_input(encoder, tokenizer)))
    return float(losses.double().mean())


def losses_of_halves(encoder: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """Nats, float32: of each text in whole groups, or of all where these are fewer than one, the cross entropy of
    telling its second half by its first one, and the other way round, averaged. A half is cut at `max_length`.
    """
    device = next(encoder.parameters()).device

    def embedded(texts: Sequence[str]) -> Tensor:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            states = encoder(**{name: value.to(device) for name, value in batch.items()}).last_hidden_state
        return F.normalize(mean_state(states.float().cpu(), batch["attention_mask"]), dim=-1)

    words = [text.split() for text in texts]
    losses = []
    for start in range(0, max(1, len(words) - GROUP + 1), GROUP):
        group = words[start : start + GROUP]
        first = embedded([" ".join(split[: max(1, len(split) // 2)]) for split in group])
        second = embedded([" ".join(split[len(split) // 2 :]) for split in group])
        similarity = first @ second.T / TEMPERATURE
        own = torch.arange(len(first))
        there, back = (F.cross_entropy(side, own, reduction="none") for side in (similarity, similarity.T))
        losses.append((there + back) / 2)
    return torch.cat(losses)


def _tokens(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    longest = min(MAX_LENGTH, longest_input(model, tokenizer))
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"))


def _is_sentence_encoder(base: Base) -> bool:
    """Whether the folder, or the repository, says that it is a mean-pooled sentence encoder."""
    from transformers.utils import cached_file

    address = dict(base.address)
    try:
        path = cached_file(address.pop("pretrained_model_name_or_path"), "modules.json", **address)
        modules = read_json(Path(path))
        return any("Pooling" in str(module.get("type")) for module in modules)
    except Exception:  # no such file, no network: then the folder does not say so
        return False
