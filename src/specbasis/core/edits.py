"""Interventions on one matrix: singular triplets replaced, masked or rescaled, as corrections of the stored matrix.

Every function takes the stored matrix W, its full SVD, and ranks I, and returns a new float64 matrix; W is not
touched. With primes for what is put in,

    W' = W + Σ_{i ∈ I} (σ'_i u'_i v'_iᵀ − σ_i u_i v_iᵀ)
       = W + (U'S' − U S) V'ᵀ + U S (V' − V)ᵀ,

and the second form is what is computed: a triplet that is replaced by itself adds exact zeros, so an edit that
changes nothing returns W bit for bit, in whatever format it is stored. (Where most ranks really change, the
triplets that stay and those that come in are fewer columns, and are multiplied out instead.)

Which ranks an edit takes is said as in `specbasis.core.ranks`.

Source: Yu et al. 2026, §4.1, App. G (replacement) and App. I (masking); the complement-preserving random vectors,
the groups and the noise of equal norm are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specbasis.core.blocks import norm
from specbasis.core.columns import columns, generator_of, random_complement, random_orthonormal
from specbasis.core.errors import InputError
from specbasis.core.groups import chains
from specbasis.core.options import check_choice
from specbasis.core.ranks import Ranks, parsed, rank_set
from specbasis.core.svd import SVD, decompose

SIDES: Mapping[str, tuple[bool, bool]] = {"both": (True, True), "left": (True, False), "right": (False, True)}
"""Name → whether the left and the right singular vectors are replaced."""


# --- the edits ----------------------------------------------------------------------------------------------------


def replace(
    W: Float[Tensor, "out in"], svd: SVD, other: SVD, ranks: Ranks, *, sides: str = "both", groups: float = 0.0
) -> Float[Tensor, "out in"]:
    """W with the singular vectors of some ranks taken from another matrix; singular values stay.

    W' = W + Σ_{i ∈ I} σ_i (u'_i v'_iᵀ − u_i v_iᵀ), with (u', v') of ``other``, or one of them.

    A joint sign of (u', v') changes nothing in u' v'ᵀ, but a sign of one of them alone does. So the pair is given
    the sign that agrees with what it replaces: that of ⟨u', u⟩ + ⟨v', v⟩ where both are replaced, and of the one
    product where one is. Costs 4·out·in·r flops; half of that for one side.

    Args:
        W: the stored matrix, any floating dtype.
        svd: its full decomposition.
        other: that of a matrix of the same shape: the pretrained one, or another finetune.
        ranks: which.
        sides: "both", "left" or "right".
        groups: where positive, ranks whose relative distance (σ_i − σ_{i+1}) / σ_i is below it, in either matrix,
            move together: single vectors are arbitrary there. The inserted group is rotated on to the replaced one
            (orthogonal Procrustes), which for a group of one is its sign.

    Raises:
        InputError: shapes differ, or sides or ranks are not as above.

    Source: Yu et al. 2026, §4.1, App. G.
    """
    _same_shape(svd, other)
    chosen = rank_set(ranks, len(svd.S))
    if groups > 0:
        chosen = whole_groups(chosen, groups, svd.S, other.S)
    left, right = _sides(sides)
    U, Vh = columns(other.U, chosen), columns(other.Vh.mT, chosen).mT
    if not (left and right and groups <= 0 and _most_move(svd, chosen, U, Vh)):  # there signs cancel
        U, Vh = _aligned(svd, other, chosen, left, right, groups)
    return _corrected(W, svd, chosen, U=U if left else None, Vh=Vh if right else None)


def randomise(
    W: Float[Tensor, "out in"],
    svd: SVD,
    ranks: Ranks,
    *,
    seed: int | str = 0,
    complement: bool = False,
    sides: str = "both",
) -> Float[Tensor, "out in"]:
    """W with the singular vectors of some ranks replaced by random orthonormal ones; singular values stay.

    Uniformly distributed orthonormal sets, left and right independent. Plain ones are drawn without regard to the
    ranks that stay, so that W' has other singular values than W. With ``complement`` they are drawn from the
    orthogonal complement of the vectors that stay, so that what was an SVD is one. On a short side that complement
    is the span of the vectors that are replaced: there single vectors become a random rotation among themselves,
    and one vector alone can at most change its sign.

    Costs as `replace`, and 8·(out + in)·r·(ranks that stay) for the complement.

    Args:
        W: the stored matrix.
        svd: its full decomposition.
        ranks: which.
        seed: of the random numbers; text is hashed.
        complement: keep W' orthonormal.
        sides: "both", "left" or "right".
    """
    chosen = rank_set(ranks, len(svd.S))
    left, right = _sides(sides)
    generator = generator_of(seed)
    U, V = (
        random_complement(basis, chosen, generator)
        if complement
        else random_orthonormal(len(basis), len(chosen), generator).to(basis.device)
        for basis in (svd.U, svd.Vh.mT)
    )
    return _corrected(W, svd, chosen, U=U if left else None, Vh=V.mT if right else None)


def mask(W: Float[Tensor, "out in"], svd: SVD, ranks: Ranks) -> Float[Tensor, "out in"]:
    """W without some of its triplets: σ_i := 0 for i ∈ I, which is also what replacing their vectors by zero gives.

    W' = W − P_I, P_I = Σ_{i ∈ I} σ_i u_i v_iᵀ.

    Of I and its complement the smaller set is multiplied out (of equals the one without rank 0), and its P is
    rounded so that W − P is exact; one of the two masks is W − P, the other P. So mask(I) + mask(complement) = W
    bit for bit in float64, for W stored in 32 bits or fewer, except where an entry of P is more than 2²⁸ times that
    of W. Costs 2·out·in·min(r, k − r) flops.

    Source: Yu et al. 2026, App. I.
    """
    chosen = rank_set(ranks, len(svd.S))
    drop = torch.zeros(len(svd.S), dtype=torch.bool)
    drop[chosen] = True
    is_whole = len(svd.S) == min(svd.shape)
    smaller = 2 * len(chosen) < len(drop) or (2 * len(chosen) == len(drop) and not bool(drop[0]))
    direct = smaller or not is_whole
    part = (drop if direct else ~drop).nonzero().flatten()
    exact = W.to(torch.float64, copy=True)
    if not len(part):
        return exact if direct else torch.zeros_like(exact)
    rest = exact.addmm(columns(svd.U, part) * svd.S[part], columns(svd.Vh.mT, part).mT, alpha=-1)
    taken = torch.sub(exact, rest, out=rest)
    return exact.sub_(taken) if direct else taken


def keep(W: Float[Tensor, "out in"], svd: SVD, ranks: Ranks) -> Float[Tensor, "out in"]:
    """W with these triplets alone: `mask` of all others."""
    chosen = rank_set(ranks, len(svd.S))
    others = torch.ones(len(svd.S), dtype=torch.bool)
    others[chosen] = False
    return mask(W, svd, others.nonzero().flatten().tolist())


def truncate(W: Float[Tensor, "out in"], svd: SVD, k: int) -> Float[Tensor, "out in"]:
    """The best approximation of W of rank k (Eckart–Young): the leading k triplets alone."""
    if not 0 <= k <= len(svd.S):
        raise InputError(f"got k = {k}; want 0 … {len(svd.S)}")
    return keep(W, svd, range(k))


def rescale(W: Float[Tensor, "out in"], svd: SVD, ranks: Ranks, factor: float) -> Float[Tensor, "out in"]:
    """W with some singular values multiplied; a factor of 1 returns W bit for bit.

    W' = W + (factor − 1) Σ_{i ∈ I} σ_i u_i v_iᵀ.
    """
    chosen = rank_set(ranks, len(svd.S))
    return _corrected(W, svd, chosen, S=svd.S[chosen] * factor)


def replace_values(W: Float[Tensor, "out in"], svd: SVD, other: SVD, ranks: Ranks) -> Float[Tensor, "out in"]:
    """W with some singular values taken from another matrix; vectors stay: W' = W + Σ (σ'_i − σ_i) u_i v_iᵀ."""
    _same_shape(svd, other)
    chosen = rank_set(ranks, len(svd.S))
    return _corrected(W, svd, chosen, S=other.S[chosen])


def noise_like(
    W: Float[Tensor, "out in"], edited: Float[Tensor, "out in"], *, seed: int | str = 0
) -> Float[Tensor, "out in"]:
    """W plus Gaussian noise as large as an edit of it: ‖W' − W‖_F = ‖edited − W‖_F.

    The control that tells whether an edit is harmless for what it puts in, or only for being small.
    """
    exact = W.to(torch.float64, copy=True)
    size = norm(edited - exact)
    if size == 0:
        return exact
    G = torch.randn(exact.shape, generator=generator_of(seed)).to(exact.device)
    return exact.add_(G, alpha=float(size / norm(G)))


# --- an edit as data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One intervention, the same for every matrix it is applied to: what a grid lists and a file records.

    Attributes:
        kind: a name in `KINDS`.
        ranks: which ranks; see `specbasis.core.ranks`.
        sides: "both", "left" or "right", for replacements.
        seed: of the random kinds; each matrix draws its own numbers from it.
        factor: of the kind "rescale".
        groups: of the kind "swap": see `replace`.
    """

    kind: str
    ranks: int | str = "all"
    sides: str = "both"
    seed: int = 0
    factor: float = 1.0
    groups: float = 0.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        _sides(self.sides)
        if isinstance(self.ranks, str):
            parsed(self.ranks)

    @property
    def needs_other(self) -> bool:
        """Whether it takes something from another model."""
        return KINDS[self.kind].needs_other

    @property
    def is_random(self) -> bool:
        """Whether it depends on the seed."""
        return KINDS[self.kind].is_random

    def apply(self, W: Tensor, svd: SVD, other: SVD | None = None, *, name: str = "") -> Tensor:
        """The edited matrix, float64.

        Args:
            W: the stored matrix.
            svd: its full decomposition.
            other: that of the matrix at the same place in another model, for the kinds that need one.
            name: the matrix's, so that equally shaped matrices draw different random numbers.

        Raises:
            InputError: ``other`` is missing, or has another shape.
        """
        if self.needs_other and other is None:
            raise InputError(f"kind {self.kind!r} takes from another model; name one")
        return KINDS[self.kind].apply(self, W, svd, other, f"{self.seed} {name}")


@dataclass(frozen=True)
class Kind:
    """What an edit's name means: the function, what it needs, and a line for a person."""

    apply: Callable[[Edit, Tensor, SVD, SVD | None, str], Tensor]
    about: str
    needs_other: bool = False
    is_random: bool = False


def _swap(e: Edit, W: Tensor, svd: SVD, other: SVD | None, _: str) -> Tensor:
    assert other is not None
    return replace(W, svd, other, e.ranks, sides=e.sides, groups=e.groups)


def _noise(e: Edit, W: Tensor, svd: SVD, other: SVD | None, seed: str) -> Tensor:
    return noise_like(W, _swap(e, W, svd, other, seed), seed=seed)


def _values(e: Edit, W: Tensor, svd: SVD, other: SVD | None, _: str) -> Tensor:
    assert other is not None
    return replace_values(W, svd, other, e.ranks)


def _random(complement: bool) -> Callable[[Edit, Tensor, SVD, SVD | None, str], Tensor]:
    return lambda e, W, svd, _, seed: randomise(W, svd, e.ranks, seed=seed, complement=complement, sides=e.sides)


KINDS: Mapping[str, Kind] = {
    "swap": Kind(_swap, "singular vectors of another model, singular values kept", needs_other=True),
    "random": Kind(_random(False), "random orthonormal vectors, whatever stays", is_random=True),
    "random_complement": Kind(_random(True), "random vectors orthogonal to those that stay", is_random=True),
    "zero": Kind(lambda e, W, svd, *_: mask(W, svd, e.ranks), "nothing: these ranks are masked"),
    "keep": Kind(lambda e, W, svd, *_: keep(W, svd, e.ranks), "nothing in place of all other ranks"),
    "rescale": Kind(lambda e, W, svd, *_: rescale(W, svd, e.ranks, e.factor), "singular values times a factor"),
    "values": Kind(_values, "singular values of another model, vectors kept", needs_other=True),
    "noise": Kind(_noise, "Gaussian noise as large as the swap", needs_other=True, is_random=True),
}
"""Every kind of edit by its name; "bottom-up masking" is the kind zero with negative ranks."""


# --- the parts ----------------------------------------------------------------------------------------------------


def _corrected(
    W: Tensor,
    svd: SVD,
    ranks: Tensor,
    *,
    U: Tensor | None = None,
    S: Tensor | None = None,
    Vh: Tensor | None = None,
) -> Tensor:
    """W with the triplets of some ranks replaced; what is not given stays."""
    U_old, Vh_old, S_old = columns(svd.U, ranks), columns(svd.Vh.mT, ranks).mT, svd.S[ranks]
    if S is None and _most_move(svd, ranks, U, Vh):
        stay = torch.ones(len(svd.S), dtype=torch.bool).index_fill_(0, ranks, False).nonzero().flatten()
        entering = (U_old if U is None else U, S_old, Vh_old if Vh is None else Vh)
        return _multiplied(entering, (columns(svd.U, stay), svd.S[stay], columns(svd.Vh.mT, stay).mT))
    out = W.to(torch.float64, copy=True)
    old = U_old * S_old
    new = (U_old if U is None else U) * (S_old if S is None else S)
    Vh_new = Vh_old if Vh is None else Vh
    for B, A in ((new - old, Vh_new), (old, Vh_new - Vh_old)):
        some = (B.any(dim=0) & A.any(dim=1)).nonzero().flatten()
        if len(some):
            out.addmm_(B[:, some], A[some])
    return out


def _most_move(svd: SVD, ranks: Tensor, U: Tensor | None, Vh: Tensor | None) -> bool:
    """Whether more than half of a whole matrix's triplets get vectors that are other ones, whatever their sign.

    A vector whose first entry has another magnitude is another one. To look no further may miss some, which are
    then edited by the corrections: right as well, but dearer.
    """
    if 2 * len(ranks) <= len(svd.S) or len(svd.S) < min(svd.shape):
        return False
    moved = torch.zeros(len(ranks), dtype=torch.bool, device=svd.S.device)
    if U is not None:
        moved |= U[0].abs() != svd.U[0, ranks].abs()
    if Vh is not None:
        moved |= Vh[:, 0].abs() != svd.Vh[ranks, 0].abs()
    return 2 * int(moved.sum()) > len(svd.S)


def _multiplied(*triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Σ U diag(S) Vh of some sets of triplets; S goes to the side with fewer numbers."""
    first, *others = (
        (U, S[:, None] * Vh) if len(U) > Vh.shape[1] else (U * S, Vh) for U, S, Vh in triplets if len(S)
    )
    out: Tensor = first[0] @ first[1]
    for B, A in others:
        out.addmm_(B, A)
    return out


def whole_groups(ranks: Int[Tensor, " r"], gap: float, *spectra: Float[Tensor, " k"]) -> Int[Tensor, " s"]:
    """These ranks and those joined to them: i and i + 1 are where (σ_i − σ_{i+1}) / σ_i < gap in any spectrum."""
    group = _groups(gap, *spectra)
    return torch.isin(group, group[ranks]).nonzero().flatten()


def _groups(gap: float, *spectra: Tensor) -> Int[Tensor, " k"]:
    """The first rank of the group of each rank."""
    return chains(torch.stack([(S[:-1] - S[1:]) >= gap * S[:-1] for S in spectra]).all(dim=0))


def _aligned(svd: SVD, other: SVD, ranks: Tensor, left: bool, right: bool, groups: float) -> tuple[Tensor, Tensor]:
    """The vectors of ``other`` with the signs, or inside groups the rotation, that agree with those they replace.

    The only place where signs are decided.
    """
    U, Vh = columns(other.U, ranks), columns(other.Vh.mT, ranks).mT
    agreement = left * (U * columns(svd.U, ranks)).sum(0) + right * (Vh.mT * columns(svd.Vh.mT, ranks)).sum(0)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(U.dtype)
    U, Vh = U * sign, Vh * sign[:, None]
    if groups <= 0 or not len(ranks):
        return U, Vh
    numbers = _groups(groups, svd.S, other.S)[ranks]
    bounds = [0, *((numbers[1:] != numbers[:-1]).nonzero().flatten() + 1).tolist(), len(ranks)]
    for k, m in pairwise(bounds):
        new_U, new_Vh, old_U, old_Vh = U[:, k:m], Vh[k:m], svd.U[:, ranks[k:m]], svd.Vh[ranks[k:m]]
        if m - k > 1 and not (torch.equal(new_U, old_U) and torch.equal(new_Vh, old_Vh)):
            core = decompose(left * (new_U.mT @ old_U) + right * (new_Vh @ old_Vh.mT), name="group")
            R = core.U @ core.Vh
            U[:, k:m], Vh[k:m] = new_U @ R, R.mT @ new_Vh
    return U, Vh


def _sides(name: str) -> tuple[bool, bool]:
    check_choice("sides", name, SIDES)
    return SIDES[name]


def _same_shape(svd: SVD, other: SVD) -> None:
    if svd.shape != other.shape or len(svd.S) != len(other.S):
        raise InputError(
            f"got decompositions of {svd.shape} ({len(svd.S)} ranks) and {other.shape} ({len(other.S)} ranks); "
            "want equal shapes and all ranks of both"
        )
