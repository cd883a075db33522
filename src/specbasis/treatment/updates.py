"""What a finetune is against its base: every parameter beside its counterpart, read when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.architecture.cut import unusable
from specbasis.architecture.key import MatrixRef
from specbasis.architecture.pair import aligned
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, refuse_other_weights
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.names import stripped
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.low_rank import low_rank_svd
from specbasis.core.svd import SVD, decompose, half_svd
from specbasis.jobs.cache import Cache
from specbasis.jobs.progress import Progress, Report, silent


@dataclass(frozen=True, eq=False)
class Update:
    """One parameter of a finetune, its counterpart in the base, and how a matrix is read from either.

    Attributes:
        name: of the finetune.
        counterpart: the base's name of it; empty where the base has none of this shape.
        shorter: the base's name of it where only the number of rows is another, as of a vocabulary that grew.
        base: the pretrained checkpoint.
        tuned: the finetuned one.
        refs: the matrices that architecture finds in it; of a fused parameter several.
        reason: why its numbers cannot be used; empty where they can.
    """

    name: str
    counterpart: str
    base: Checkpoint
    tuned: Checkpoint
    refs: tuple[MatrixRef, ...] = ()
    reason: str = ""
    shorter: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.tuned.entries[self.name].shape

    @property
    def role(self) -> str:
        """The role of its matrix; of a fused parameter those of its matrices, joined."""
        return "+".join(dict.fromkeys(ref.key.role for ref in self.refs))

    @property
    def block(self) -> int | None:
        """The block that it stands in."""
        return self.refs[0].key.block if self.refs else None

    @property
    def is_transposed(self) -> bool:
        """Whether its matrix is stored (in, out)."""
        return bool(self.refs) and self.refs[0].transposed

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix, or several one above the other, in both checkpoints: a low-rank update fits."""
        return (
            bool(self.refs and self.counterpart)
            and not any(ref.kernel or ref.expert is not None for ref in self.refs)
            and min(self.matrix_shape) > 1
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the whole parameter as one matrix; kernels are flattened."""
        out, width = self.shape[0], prod(self.shape[1:])
        return (width, out) if self.is_transposed else (out, width)

    @cached_property
    def squares(self) -> tuple[float, float]:
        """‖tuned − base‖² and ‖tuned‖²; rows that the base has not are counted from zero.

        NaN where the numbers are not finite. Reads both, unless one is the other's, or that and a product; then the
        second is infinite.

        Raises:
            InputError: they are finite, and their squares are beyond float64.
        """
        theirs = self.base.entries.get(self.counterpart)
        if theirs is self.tuned.entries[self.name]:
            return 0.0, math.inf
        if (factors := self.factors()) is not None:
            return square_of(*factors), math.inf
        T = self.tuned[self.name].double()
        size = float(T.square().sum())
        largest = float(T.abs().max()) if T.numel() else 0.0
        if name := self.in_base:
            W = self.base[name].double()
            T = T - W if self.counterpart else torch.cat([T[: len(W)] - W[: len(T)], T[len(W) :]])
        difference = float(T.square().sum())
        if math.isfinite(largest) and (math.isinf(size) or (difference == 0 and bool(T.any()))):
            raise InputError(
                f"{self.name}: its numbers, up to {largest:.0e}, have no squares in float64; multiply base and "
                "finetune by one power of two"
            )
        return difference, size

    @property
    def in_base(self) -> str:
        """The base's name of it, if only with another number of rows; empty where the base has none."""
        return self.counterpart or self.shorter

    def as_base(self, made: Callable[[], Tensor] | None = None) -> Tensor:
        """The finetune's numbers, or others of its shape, in the base's shape and format; see `laid_over`."""
        return laid_over(made() if made else self.tuned[self.name], self.base[self.in_base])

    def as_tuned(self) -> Tensor:
        """The base's numbers in the finetune's shape and format; see `laid_over`."""
        return laid_over(self.base[self.in_base], self.tuned[self.name])

    @property
    def is_changed(self) -> bool:
        """Whether any number differs from the base's, or the base has none."""
        return self.squares[0] != 0.0 or not self.counterpart

    def read(self, checkpoint: Checkpoint, name: str) -> Float[Tensor, "out in"]:
        """The parameter as one matrix (out, in)."""
        W = checkpoint[name].flatten(1)
        return W.mT if self.is_transposed else W

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The difference tuned − base, (out, in) of a matrix and as stored otherwise, subtracted in float64.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        if self.is_matrix:
            pair = self.read(self.tuned, self.name), self.base_matrix()
        else:
            pair = self.tuned[self.name], self.base[self.counterpart]
        delta = (pair[0].double() - pair[1].double()).to(dtype)
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(f"{self.name}: the finetune or its base holds NaN or Inf here")
        return delta

    def factors(self) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]] | None:
        """(B, A) of an update that is stored as a product; None of any other."""
        factors = self.tuned.delta_factors(self.name)
        return (factors[1].mT, factors[0].mT) if factors and self.is_transposed else factors

    def decompose(self, ranks: int, cache: Cache | None = None) -> SVD:
        """The leading triplets of the update, at most as many as there are, and all of its singular values.

        An update that is stored as a product is not formed.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        factors = self.factors()
        ranks = min(ranks, *self.matrix_shape)
        if factors is not None:
            svd = low_rank_svd(*factors, name=self.name)
            return svd.truncate(min(ranks, len(svd.S)))
        if cache is not None:
            return leading(self.delta(), ranks, cache, self.name)
        return decompose(self.read(self.tuned, self.name), ranks, minus=self.base_matrix(), name=self.name)

    def spectrum(self, cache: Cache | None = None) -> Float[Tensor, " short"]:
        """All singular values of the update; without a cache at half of the price of the vectors."""
        if cache is not None or self.factors() is not None:
            return self.decompose(min(self.matrix_shape), cache).spectrum
        T = self.read(self.tuned, self.name)
        return half_svd(T, 0, minus=self.base_matrix(), name=self.name).spectrum

    def held(self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> float:
        """The share of ‖delta‖² that a product holds: 1 − ‖delta − B A‖² / ‖delta‖²."""
        B, A, factors = B.double(), A.double(), self.factors()
        if factors is None:
            lost = float((self.delta() - B @ A).square().sum())
        else:
            lost = square_of(torch.cat([factors[0].double(), B], 1), torch.cat([factors[1].double(), -A]))
        return max(0.0, 1 - lost / self.squares[0])

    def base_matrix(self) -> Float[Tensor, "out in"]:
        """The base's matrix."""
        return self.read(self.base, self.counterpart)


def base_entries(
    base: Checkpoint, changes: Iterable[Update], made: Mapping[str, Callable[[], Tensor]] | None = None
) -> dict[str, Entry]:
    """The base's entries with the finetune's numbers, or others by its names, in every parameter that both have."""
    return {
        c.in_base: replace(
            base.entries[c.in_base], load=partial(c.as_base, (made or {}).get(c.name)), factors=None, part=None
        )
        for c in changes
        if c.in_base
    }


def laid_over(X: Tensor, under: Tensor) -> Tensor:
    """X in the shape and format of another tensor, which gives the rows that X lacks."""
    if X.shape == under.shape:
        return X.to(under.dtype)
    return torch.cat([X[: len(under)].to(under.dtype), under[len(X) :]])


def updates(base: Checkpoint, tuned: Checkpoint) -> list[Update]:
    """Every parameter of a finetune beside its counterpart in the base, in the order of the file.

    Names are aligned as in `specbasis.compare`.

    Raises:
        InputError: the two have nothing in common.
    """
    drop, names, _ = aligned(base, tuned)
    ours = {names[stripped(name, drop)]: name for name in base if stripped(name, drop) in names}
    refs: dict[str, list[MatrixRef]] = {}
    for ref in model_map(base).matrices:
        refs.setdefault(ref.parameter, []).append(ref)
    return list(_updates(base, tuned, ours, refs))


def refuse_another_base(base: Checkpoint, tuned: Checkpoint, changes: Iterable[Update]) -> None:
    """Refuse a finetune of other weights: an independent model, or an adapter that names another base's digest.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetuned one.
        changes: its updates.

    Raises:
        InputError: it is one.
    """
    refuse_other_weights(tuned)
    changes = list(changes)
    lacking = [c for c in changes if len(c.shape) > 1 and not c.in_base]
    if 2 * sum(prod(c.shape) for c in lacking) > sum(prod(c.shape) for c in changes):
        raise InputError(
            f"{tuned.source}: {base.source} has less than half of it in these shapes, and no {lacking[0].name} "
            f"{lacking[0].shape}; want the base that it was trained from"
        )
    usable = [c for c in changes if c.is_matrix and not c.reason and not math.isnan(c.squares[0])]
    far, near = (sum(c.squares[i] for c in usable) for i in (0, 1))
    if far > near:
        raise InputError(
            f"{tuned.source}: lies further from {base.source} than from zero (‖delta‖² = {far / near:.2f} "
            "‖tuned‖²), as an independent model does; want the base that it was trained from: "
            "`specbasis which-base` looks for it"
        )


def _updates(
    base: Checkpoint, tuned: Checkpoint, ours: dict[str, str], refs: dict[str, list[MatrixRef]]
) -> Iterator[Update]:
    for name, entry in tuned.entries.items():
        own, shorter = ours.get(name, ""), ""
        if own and base.entries[own].shape != entry.shape:
            is_longer = base.entries[own].shape[1:] == entry.shape[1:] and base.entries[own].is_float
            own, shorter = "", own if is_longer and entry.shape else ""
        if entry.is_float or not own or _is_other(entry, base.entries[own]):
            reason = _unusable(name, tuned) or (own and _unusable(own, base)) or ""
            yield Update(name, own, base, tuned, tuple(refs.get(own, ())), reason, shorter)


def _is_other(entry: Entry, theirs: Entry) -> bool:
    """Whether a matrix of no floating-point numbers is not the base's; vectors and scalars are counters."""
    return len(entry.shape) > 1 and (entry.dtype != theirs.dtype or not torch.equal(entry.load(), theirs.load()))


def _unusable(name: str, checkpoint: Checkpoint) -> str:
    """Why the numbers of a parameter are not those of the model, or an empty string."""
    entry = checkpoint.entries[name]
    is_vector = entry.is_float and (len(entry.shape) < 2 or sum(size > 1 for size in entry.shape) < 2)
    return "" if is_vector else unusable(name, checkpoint.entries)


def differing(base: Checkpoint, tuned: Checkpoint, report: Report = silent) -> list[Update]:
    """What `updates` gives, with the size of each read, of a finetune that differs from its base and is one of it.

    Raises:
        InputError: nothing differs, or as `refuse_another_base`.
    """
    changes = updates(base, tuned)
    for done, change in enumerate(changes):
        report(Progress(done, len(changes), f"reading {change.name}"))
        _ = change.reason or change.squares
    if not any(change.reason or change.is_changed for change in changes):
        raise InputError(f"{tuned.source}: every number is the base's; nothing differs from {base.source}")
    refuse_another_base(base, tuned, changes)
    return changes


def leading(X: Float[Tensor, "out in"], ranks: int, cache: Cache | None, name: str) -> SVD:
    """The leading triplets of a matrix, from the cache where there is one."""
    if cache is None:
        return decompose(X, ranks, name=name)
    return cache.decompose(X, name=name).truncate(ranks)


def spectrum_of(X: Float[Tensor, "out in"], cache: Cache | None, name: str) -> Float[Tensor, " short"]:
    """All singular values of a matrix; without a cache at half of the price of the vectors."""
    return (half_svd(X, 0, name=name) if cache is None else cache.decompose(X, name=name)).spectrum


def square_of(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> float:
    """‖B A‖² of a product that is not formed."""
    B, A = B.double(), A.double()
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0))


def share(part: float, total: float) -> float:
    """A part of a square as a share of the whole, at most 1; 1 of nothing."""
    return min(1.0, part / total) if total else 1.0
