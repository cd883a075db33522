"""Forgetting: what finetuning does to the loss that the base was pretrained for, on held-back text.

Three definitions, by what the base is; the first that applies is used and named beside the number.

- ``masked-lm``: cross entropy at 15 % of the tokens, masked, for a base whose checkpoint holds a masked-LM head.
- ``next-token``: cross entropy of the next token, for a base whose checkpoint holds a language-model head.
- ``contrastive-halves``: for a sentence encoder (its folder says so, ``modules.json``), which has no head left.
Each
  held-back text is cut into its two halves; embeddings are mean-pooled and normalised; the symmetric cross entropy
  of telling which second half belongs to which first one, among 32, at temperature 0.05: the kind of objective that
  sentence encoders are trained with. Chance level is log 32 = 3.47.

The head is always the base's own: what changes is the backbone under it. Bases of no such kind have no value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specbasis.finetuning.base import Base, encoder_of

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
    if base.task.images:
        return _none("images: no pretraining loss is defined for them")
    if len(texts) < 2:
        return _none("fewer than two held-back texts")
    for definition, head, loss in (("masked-lm", "MaskedLM", _masked), ("next-token", "CausalLM", _next_token)):
        model = _with_head(base, head)
        if model is not None:
            return Pretraining(definition, "", lambda tuned, m=model, f=loss: _under_head(m, tuned, f, base, texts))
    if _is_sentence_encoder(base):
        return Pretraining(
            "contrastive-halves", "", lambda tuned: _contrastive(encoder_of(tuned), base.processor, texts)
        )
    return _none("the base has neither a language-model head nor the marks of a sentence encoder (modules.json)")


def _none(reason: str) -> Pretraining:
    return Pretraining("", reason, lambda tuned: None)


def _with_head(base: Base, head: str) -> Any:
    """The base under its own pretraining head; None where the checkpoint holds none."""
    import transformers

    architectures = getattr(base.model.config, "architectures", None) or []
    config = _stored_architectures(base) or architectures
    causal = head == "CausalLM"
    marks = ("ForCausalLM", "LMHeadModel") if causal else ("ForMaskedLM", "ForPreTraining")
    if not any(name.endswith(marks) for name in config):
        return None
    try:
        model, about = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            **base.address, output_loading_info=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError):
        return None
    return None if about["missing_keys"] or about["mismatched_keys"] else model.eval()


def _stored_architectures(base: Base) -> list[str]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(**base.address, trust_remote_code=False)
    return list(getattr(config, "architectures", None) or [])


def _under_head(
    model: Any, tuned: nn.Module, loss: Callable[[Any, Any, Sequence[str]], float], base: Base, texts: Sequence[str]
) -> float:
    """The loss with the tuned backbone below the base's head, which is left as it was."""
    prefix, own = model.base_model_prefix, getattr(model, model.base_model_prefix)
    backbone, was_training = encoder_of(tuned), tuned.training
    setattr(model, prefix, backbone.eval())
    try:
        return loss(model, base.processor, texts)
    finally:
        setattr(model, prefix, own)
        tuned.train(was_training)


def _masked(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean cross entropy at masked tokens; the mask is the same whatever the model."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    total, count = 0.0, 0
    for start in range(0, len(texts), GROUP):
        batch = _tokens(tokenizer, texts[start : start + GROUP])
        special = torch.tensor(
            [
                tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in batch["input_ids"].tolist()
            ]
        ).bool()
        chosen = (torch.rand(batch["input_ids"].shape, generator=generator) < MASKED) & ~special
        if not chosen.any():
            continue
        targets = batch["input_ids"][chosen].to(device)
        batch["input_ids"] = batch["input_ids"].masked_fill(chosen, tokenizer.mask_token_id)
        with torch.inference_mode():
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits[chosen.to(device)]
            total += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
        count += len(targets)
    return total / count if count else math.nan


def _next_token(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(texts), GROUP):
        batch = {name: value.to(device) for name, value in _tokens(tokenizer, texts[start : start + GROUP]).items()}
        with torch.inference_mode():
            logits = model(**batch).logits[:, :-1].float()
        kept = batch["attention_mask"][:, 1:].bool()
        total += float(F.cross_entropy(logits[kept], batch["input_ids"][:, 1:][kept], reduction="sum"))
        count += int(kept.sum())
    return total / count if count else math.nan


def _contrastive(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    was_training = encoder.training
    encoder.eval()
    halves = [_halves(text) for text in texts]
    losses = [
        _group_loss(
            _embeddings(encoder, tokenizer, [first for first, _ in halves[start : start + GROUP]]),
            _embeddings(encoder, tokenizer, [second for _, second in halves[start : start + GROUP]]),
        )
        for start in range(0, len(halves) - GROUP + 1 if len(halves) >= GROUP else 1, GROUP)
    ]
    encoder.train(was_training)
    return sum(losses) / len(losses)


def _halves(text: str) -> tuple[str, str]:
    words = text.split()
    middle = max(1, len(words) // 2)
    return " ".join(words[:middle]), " ".join(words[middle:]) or text


def _group_loss(first: Tensor, second: Tensor) -> float:
    similarity = first @ second.T / TEMPERATURE
    own = torch.arange(len(first), device=first.device)
    return float((F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2)


def _embeddings(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    device = next(encoder.parameters()).device
    batch = {name: value.to(device) for name, value in _tokens(tokenizer, texts).items()}
    with torch.inference_mode():
        states = encoder(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))


def _is_sentence_encoder(base: Base) -> bool:
    """Whether the folder says that it is a mean-pooled sentence encoder."""
    place = base.address["pretrained_model_name_or_path"]
    try:
        if Path(place).is_dir():
            text = (Path(place) / "modules.json").read_text(encoding="utf-8")
        else:
            from huggingface_hub import hf_hub_download

            text = Path(hf_hub_download(place, "modules.json", revision=base.address.get("revision"))).read_text(
                encoding="utf-8"
            )
        return any("Pooling" in str(module.get("type")) for module in json.loads(text))
    except Exception:  # no such file, no network: then the folder does not say so
        return False
