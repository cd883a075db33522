"""Attention heads: what finetuning changed in each head's slice of query, key, value and output matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.low_rank import stacked_svd

RANKS = 10
"""Leading ranks of a head over which its alignment is averaged; a head has 32 … 128 of them."""

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "nhead", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "hidden_dim")


@dataclass(frozen=True, eq=False)
class HeadFigures:
    """One figure for each head of a matrix, (heads,); see `compare_heads`."""

    alignment_left: Float[Tensor, " heads"]
    alignment_right: Float[Tensor, " heads"]
    update_share: Float[Tensor, " heads"]
    relative_update: Float[Tensor, " heads"]
    rotation: Float[Tensor, " heads"]


def head_count(
    config: Mapping[str, Any], role: str, stack: str, shape: tuple[int, int], given: int | None = None
) -> int:
    """How many heads a matrix (out, in) of an attention layer is cut into; 0 where it is not known, or does not
    fit.

    Keys and values of grouped-query attention have fewer heads than queries. In a config with several towers
    that one counts that is named like the stack, else the one whose width is the matrix's.

    Args:
        config: config.json of the model, or nothing.
        role: the matrix's role; 0 for all but the four of attention.
        stack: the stack that it is in: encoder, decoder, text, vision, …
        shape: (out, in).
        given: the number of heads that a person said, which counts before the config; it is that of the queries,
            and the keys' where the config does not say otherwise.
    """
    kind, _, part = role.partition(".")
    if kind not in ("attention", "cross_attention") or part not in ("query", "key", "value", "output"):
        return 0
    cut, other = shape if part != "output" else shape[::-1]
    tower = _tower(config, stack, other)
    own = [f"{stack}_attention_heads", f"{stack}_num_heads", f"{stack}_layers_num_heads"] if stack else []
    heads = given or _first(tower, (*own, *_HEADS))
    if part in ("key", "value"):
        heads = _first(tower, _KEY_VALUE_HEADS) or heads
    return heads if heads and cut % heads == 0 and cut > heads else 0


def _tower(config: Mapping[str, Any], stack: str, width: int) -> Mapping[str, Any]:
    """The part of a config that describes a stack."""
    towers = {name: part for name, part in config.items() if isinstance(part, Mapping) and _first(part, _HEADS)}
    named = [part for name, part in towers.items() if stack and name.startswith(stack)]
    wide = [part for part in towers.values() if _first(part, _WIDTHS) == width]
    if _first(config, _HEADS) and not named:
        return config
    return next(iter([*named, *wide, *(towers.values() if len(towers) == 1 else ())]), config)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((config[name] for name in names if type(config.get(name)) is int and config[name] > 0), 0)


def compare_heads(W: Float[Tensor, "out in"], T: Float[Tensor, "out in"], heads: int, output: bool) -> HeadFigures:
    """What changed in each head's slice of a base matrix W and its finetune T.

    The slice of head h is head_dim rows of a query, key or value matrix, head_dim columns of an output matrix.
    For each:

    - alignment: mean |⟨x_i, x̃_i⟩| over the leading `RANKS` singular vectors of the slice, left and right;
    - update_share: ‖Δ_h‖_F²/‖Δ‖_F², sums to 1; NaN where Δ = 0;
    - relative_update: ‖Δ_h‖_F/‖W_h‖_F;
    - rotation: √(1 − ‖Q̃ᵀQ‖_F²/head_dim), 0 … 1, the root mean square sine between the subspaces that the slices of
      base and tuned read from (write to, for output) the residual stream. Invariant to rotations inside of the
      head, which attention does not see: its alignment on the head's side is not.

    A slice that is equal bit for bit has alignment exactly 1 and rotation exactly 0. Costs 8·head_dim·out·in flops.
    """
    base, tuned = (_slices(X, heads, output) for X in (W, T))
    equal = torch.tensor([torch.equal(b, t) for b, t in zip(base, tuned, strict=True)])
    (Xb, Sb, Yb), (Xt, _, Yt) = (stacked_svd(X) for X in (base, tuned))
    k = min(RANKS, Sb.shape[1])
    inner, outer = (
        (A[..., :k] * B[..., :k]).sum(dim=1).abs().clamp(max=1.0).mean(dim=1) for A, B in ((Xb, Xt), (Yb, Yt))
    )
    overlap = (Yb.mT @ Yt).square().sum(dim=(1, 2)) / Sb.shape[1]
    rotation = (1 - overlap).clamp(min=0).sqrt()
    inner, outer, rotation = (torch.where(equal, x, y) for x, y in ((1.0, inner), (1.0, outer), (0.0, rotation)))
    update, size = ((X.square().sum(dim=(1, 2))) for X in (tuned - base, base))
    left, right = (outer, inner) if output else (inner, outer)
    return HeadFigures(left, right, update / update.sum(), (update / size).sqrt(), rotation)


def _slices(W: Tensor, heads: int, output: bool) -> Tensor:
    """(heads, head_dim, width of the residual stream), float64."""
    X = W.detach().cpu().double()
    X = X.mT if output else X
    return X.reshape(heads, -1, X.shape[1])
