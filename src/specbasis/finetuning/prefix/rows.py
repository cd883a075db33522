"""The examples of a batch: the keys by which they are found, their values, and whether these are theirs alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specbasis.core.errors import InputError
from specbasis.finetuning.prefix.cut import Cut
from specbasis.finetuning.prefix.plan import Kept, capture
from specbasis.finetuning.prefix.probe import agree, outputs
from specbasis.finetuning.prefix.standin import keyed

Collator = Callable[[list[Any]], Mapping[str, Any]]


class NoPrefixError(InputError):
    """Nothing can be kept of these examples, though the model has a frozen prefix: train without the cache."""


def row_keys(batch: Mapping[str, Any], inputs: frozenset[str]) -> tuple[list[bytes], Tensor | None]:
    """The key of each example of a batch, and the mask of its tokens; None where it is not made of tokens.

    A key is half of SHA-256 of those of the example's tensors that are inputs, by name, without padding.
    """
    tensors = {
        name: value.cpu() for name, value in sorted(batch.items()) if isinstance(value, Tensor) and name in inputs
    }
    mask = tensors.pop("attention_mask", None)
    if mask is not None and mask.dim() != 2:
        raise NoPrefixError(
            f"got an attention mask of {mask.dim()} axes; the prefix cache wants one of (examples, tokens)"
        )
    if mask is None and "input_ids" in tensors:
        mask = torch.ones_like(tensors["input_ids"])
    mask = None if mask is None else mask.bool()
    count = len(mask if mask is not None else next(iter(tensors.values())))
    digests = [hashlib.sha256() for _ in range(count)]
    for i, digest in enumerate(digests):
        for name, value in tensors.items():
            by_token = mask is not None and value.shape[:2] == mask.shape
            part = value[i][mask[i]] if by_token and mask is not None else value[i]
            digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
            plain = part.contiguous().view(torch.uint8).numpy().tobytes() if part.dim() else str(part).encode()
            digest.update(plain)
        inner = torch.empty(0) if mask is None else mask[i].nonzero().flatten()
        if len(inner) and int(inner[-1] - inner[0]) + 1 != len(inner):  # holes: which positions counts
            digest.update(str((inner - inner[0]).tolist()).encode())
    return [digest.digest()[:16] for digest in digests], mask


def parts_of(model: nn.Module, cut: Cut, batch: Mapping[str, Any]) -> list[list[Tensor]]:
    """For each example of a batch the values to keep, without padding: (tokens, …) or (…)."""
    mask = row_keys(batch, cut.inputs)[1]
    values = [value.cpu() for value in capture(model, on_device(model, batch, cut.inputs), cut.kept)]
    chosen = [kept.chosen(mask) for kept in cut.kept]
    return [
        [value[i] if keep is None else value[i][keep[i]] for value, keep in zip(values, chosen, strict=True)]
        for i in range(len(values[0]))
    ]


def values_of(cut: Cut, parts: Sequence[Sequence[Tensor]], mask: Tensor | None) -> dict[str, Tensor]:
    """The values of a batch, padded as its mask is, from the parts of its examples."""
    return keyed(_padded(kept, [row[n] for row in parts], mask) for n, kept in enumerate(cut.kept))


def _padded(kept: Kept, parts: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    chosen = kept.chosen(mask)
    if chosen is None or mask is None:
        return torch.stack([part.view(kept.dims) for part in parts])
    value = torch.zeros(*mask.shape, *kept.dims, dtype=parts[0].dtype)
    for row, keep, part in zip(value, chosen.cpu(), parts, strict=True):
        row[keep] = part.view(-1, *kept.dims)
    return value


def on_device(model: nn.Module, batch: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """Some of a batch, on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in names}


def check_stable(
    dataset: Any, begin: int, items: Sequence[Any], collator: Collator, inputs: frozenset[str]
) -> None:
    """Refuse a dataset that does not give the same example twice."""
    for i, item in enumerate(items[:4]):
        first, again = (row_keys(collator([reading]), inputs)[0] for reading in (item, dataset[begin + i]))
        if first != again:
            raise NoPrefixError(
                "the dataset does not give the same example twice (random augmentation?): want fixed examples, or "
                "training without the prefix cache"
            )


def check_apart(model: nn.Module, cut: Cut, items: Sequence[Any], collator: Collator) -> None:
    """Refuse activations that depend on the rest of the batch: padding that moves positions, sums over examples.

    The first and the last example run alone up to the cut and together from there on; the outputs must be those of
    the two in the whole model.
    """
    pair = [items[-1], items[0]]
    together = on_device(model, collator(pair), cut.inputs)
    mask = row_keys(together, cut.inputs)[1]
    values = values_of(cut, [parts_of(model, cut, collator([item]))[0] for item in pair], mask)
    real = None if mask is None else mask.to(next(model.parameters()).device)
    want = outputs(model(**together), real)
    with cut.suffix(model):
        got = outputs(model(**together, **on_device(model, values, values)), real)
    if not agree(got, want, relative=1e-3):
        raise NoPrefixError(
            "the model's output for an example depends on the rest of its batch (padding on the left with learned "
            "positions?), so nothing can be kept: want padding on the right, or training without the prefix cache"
        )
