"""What an adapter file carries to prove that its coefficients meet the basis they were trained in.

Singular vectors are defined up to a joint sign, and inside a group of equal values up to a rotation; another
rounding of W, another revision, or another driver can return others. Coefficients M in other vectors are another
model. So the file holds a sketch of every vector, Uᵀ G and Vh G, with a fixed Gaussian G of few columns: a
recomputed basis gets its signs from the sketch, and every vector is then compared with it.

For a vector that is off by ε, the sketch is off by about ε on each of 2·COLUMNS independent directions, so a vector
off by more than 100 times the tolerance passes with probability below 10⁻¹³.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from specbasis.core.dtypes import FORMATS, UNSCALED, name_of, roundoff
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD

COLUMNS = 4
"""Columns of the sketch: 8·COLUMNS bytes for each pair of vectors."""

TOLERANCE = 32 * torch.finfo(torch.float32).eps
"""Largest distance of two unit vectors that count as equal: float32 rounding of factors and sketch."""

SEED = 20260507
"""Seed of the sketching matrix; a file made with another seed is another format."""

_DTYPES = ("float64", "float32", "float16", "bfloat16")
_FIELDS = 6  # interval, shape, dtype, seed: the head of the origin; the digest follows


@dataclass(frozen=True, eq=False)
class Proof:
    """The basis of one adapted matrix, as far as the adapter file tells it.

    Attributes:
        origin: int64, (k, m, out, in, dtype, seed, four words of the weight's SHA-256).
        S: singular values on the interval, (r,), float32, in the units of W.
        sketch_U: Uᵀ G_out, (r, COLUMNS), float32.
        sketch_V: Vh G_in, (r, COLUMNS), float32.
    """

    origin: Int[Tensor, " ten"]
    S: Float[Tensor, " r"]
    sketch_U: Float[Tensor, "r s"]
    sketch_V: Float[Tensor, "r s"]

    @property
    def interval(self) -> tuple[int, int]:
        """Ranks [k, m), 0-based."""
        return int(self.origin[0]), int(self.origin[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return int(self.origin[2]), int(self.origin[3])

    @property
    def dtype(self) -> str:
        """Name of the dtype in which the weight was stored."""
        code = int(self.origin[4])
        return _DTYPES[code] if 0 <= code < len(_DTYPES) else f"unknown ({code})"

    @property
    def digest(self) -> tuple[int, ...]:
        """SHA-256 of the weight's values, as four signed 64-bit words."""
        return tuple(int(word) for word in self.origin[_FIELDS:])


def empty_proof(r: int) -> Proof:
    """A proof of the right shapes that proves nothing: to be filled from a file."""
    return Proof(
        torch.zeros(_FIELDS + 4, dtype=torch.int64),
        torch.zeros(r),
        torch.zeros(r, COLUMNS),
        torch.zeros(r, COLUMNS),
    )


def prove(basis: SVD, interval: tuple[int, int], W: Float[Tensor, "out in"]) -> Proof:
    """The proof of a basis that was chosen for W: its origin, values and sketch. Costs COLUMNS·(out + in)·r
    flops.
    """
    dtype = name_of(W.dtype)
    head = [*interval, *W.shape, _DTYPES.index(dtype) if dtype in _DTYPES else 1, SEED]
    return Proof(
        torch.tensor([*head, *weight_digest(W)], dtype=torch.int64),
        basis.S.to("cpu", torch.float32),
        sketch(basis.U).float(),
        sketch(basis.Vh.mT).float(),
    )


def sketch(vectors: Float[Tensor, "d r"]) -> Float[Tensor, "r s"]:
    """Inner products of each column with COLUMNS fixed Gaussian directions, in float64 on the CPU."""
    return vectors.detach().to("cpu", torch.float64).mT @ _directions(vectors.shape[0])


@functools.lru_cache(maxsize=16)
def _directions(d: int) -> Tensor:
    """(d, COLUMNS) standard normal numbers from raw generator bits: the same on every platform and version."""
    raw = np.random.PCG64([SEED, d]).random_raw(2 * d * COLUMNS)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * math.pi * uniform[1::2]
    return torch.from_numpy((radius * np.cos(angle)).reshape(d, COLUMNS))


def weight_digest(W: Float[Tensor, "out in"]) -> tuple[int, int, int, int]:
    """SHA-256 of a matrix's values in row order: equal for equal values, whatever floating dtype holds them."""
    W = W.detach().cpu()
    narrow = W.to(torch.float32)
    values = W if W.dtype == torch.float64 and not torch.equal(narrow.double(), W) else narrow
    values = values.contiguous() + 0.0  # minus zero is zero
    words = np.frombuffer(hashlib.sha256(values.numpy().tobytes()).digest(), dtype="<i8")
    return tuple(int(word) for word in words)  # type: ignore[return-value]


def settled_basis(
    proof: Proof,
    W: Float[Tensor, "out in"],
    stored: tuple[Tensor, Tensor] | None,
    compute: Callable[[], SVD],
    name: str,
    *,
    singular: bool,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"], bool]:
    """The basis that coefficients were trained in, proven: the stored one, or else a recomputed one with its signs.

    Args:
        proof: what came with the coefficients.
        W: the weight matrix of this base.
        stored: U and Vh that came with the coefficients; None where they did not.
        compute: decomposes this base; called where nothing is stored.
        name: what messages call the matrix.
        singular: whether the basis is that of singular vectors of W.

    Returns:
        U, Vh, and whether they are those of this very weight, not of one that it was rounded from.

    Raises:
        InputError: the basis is not the trained one, with the reason.
    """
    if stored is not None:
        return *stored, check_stored(proof, *stored, W, name, singular=singular)
    check_format(proof, W, name)
    basis = align(proof, compute(), W, name)
    return basis.U, basis.Vh, True


def align(proof: Proof, basis: SVD, W: Float[Tensor, "out in"], name: str) -> SVD:
    """A recomputed basis with its signs set by the sketch, or a refusal.

    Raises:
        InputError: W has another shape, or a vector or value differs from the trained one by more than TOLERANCE;
            the
            message says why (rounded base, other revision, near-equal singular values).
    """
    check_format(proof, W, name)
    here = (sketch(basis.U), sketch(basis.Vh.mT))
    there = (proof.sketch_U.cpu().double(), proof.sketch_V.cpu().double())
    agreement = torch.stack([(a * b).sum(1) for a, b in zip(here, there, strict=True)]).sum(0)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(torch.float64)
    off = _distance(sign, here, there)
    change = ((basis.S.cpu().double() - proof.S.cpu().double()).abs() / basis.spectrum[0].cpu()).max().item()
    if not bool((off <= TOLERANCE).all()) or not change <= TOLERANCE:
        raise InputError(_reason(proof, basis, W, off, change, name))
    if weight_digest(W) != proof.digest:
        warnings.warn(
            "base weights are not those that the adapter was trained on, but their singular vectors on its "
            "interval are; the update is the same, the frozen rest of the model may not be",
            stacklevel=2,
        )
    sign = sign.to(basis.U.device, basis.U.dtype)
    return dataclasses.replace(basis, U=basis.U * sign, Vh=basis.Vh * sign[:, None])


def check_stored(
    proof: Proof,
    U: Float[Tensor, "out r"],
    Vh: Float[Tensor, "r in"],
    W: Float[Tensor, "out in"],
    name: str,
    *,
    singular: bool,
) -> bool:
    """Compare a basis that came with the adapter with its sketch and with the base weight.

    A basis of singular vectors (``singular``) must still nearly satisfy W v = σ u and Wᵀ u = σ v: within twice the
    root-mean-square effect of rounding W to the coarser of its own and the trained dtype. Such a base is accepted
    with a warning, as the update itself is unchanged. Costs 8·out·in·r flops when the base is not bit-equal, else a
    hash.

    Returns:
        Whether the base weight holds the very values that the adapter was trained on.

    Raises:
        InputError: the basis is damaged, or the base is not the one that the adapter was trained on.
    """
    check_format(proof, W, name)
    signs = torch.ones(U.shape[1], dtype=torch.float64)
    there = (proof.sketch_U.cpu().double(), proof.sketch_V.cpu().double())
    off = _distance(signs, (sketch(U), sketch(Vh.mT)), there)
    if not bool((off <= TOLERANCE).all()):
        raise InputError(
            f"{name}: {int((~(off <= TOLERANCE)).sum())} of {len(off)} stored singular vectors differ from their "
            "sketch in the same file; the adapter file is damaged: fetch or save it again"
        )
    if weight_digest(W) == proof.digest:
        if singular:
            _check_values(proof, U, Vh, W, name)
        return True
    if not singular:  # a random basis or one of another model has no relation to W to be checked
        raise InputError(
            f"{name}: the base weight is not the one that the adapter was trained on; load the base of the same "
            f"revision in {proof.dtype}"
        )
    A = W.detach().to(U.device, torch.float64)
    u, vh, S = U.double(), Vh.double(), proof.S.to(U.device).double()
    residual = torch.maximum((A @ vh.mT - u * S).norm(dim=0), (A.mT @ u - vh.mT * S).norm(dim=0))
    spread = torch.maximum((A**2 @ (vh**2).mT).sum(0), ((A**2).mT @ u**2).sum(0)).sqrt()
    grid = max((_grid(W), proof.dtype), key=roundoff)
    allowed = 2 / math.sqrt(3) * roundoff(grid) * spread + 8 * TOLERANCE * S
    if not bool((residual <= allowed).all()):
        worst = int((residual / allowed).argmax())
        raise InputError(
            f"{name}: the stored singular vectors are not those of this base (rank "
            f"{proof.interval[0] + worst + 1}: ‖W v − σ u‖ = {residual[worst]:.2g}, rounding to {grid} explains "
            f"{allowed[worst]:.2g}); it is another model or revision: load the base that the adapter was trained on"
        )
    warnings.warn(
        f"base weights are a {grid} rounding of those that the adapter was trained on ({proof.dtype}); the update "
        "is the trained one, the frozen weights are rounded",  # the same for every layer: one line
        stacklevel=2,
    )
    return False


def _check_values(proof: Proof, U: Tensor, Vh: Tensor, W: Tensor, name: str) -> None:
    """Refuse singular values that are not those of the vectors, by Uᵀ W V z = diag(S) z for one z of signs.

    Costs 2·out·in flops. Float32 rounding of the vectors leaves an error of about eps · S_1 in each row.
    """
    A, S = W.detach().to(U.device, torch.float64), proof.S.to(U.device).double()
    z = torch.where(_directions(len(S))[:, 0] < 0, -1.0, 1.0).to(U.device, torch.float64)
    off = (U.double().mT @ (A @ (Vh.double().mT @ z)) - S * z).abs()
    wrong = int((~(off <= TOLERANCE * S.max())).sum())
    if wrong:
        raise InputError(
            f"{name}: {wrong} of {len(S)} stored singular values are not those of this weight; the adapter file is "
            "damaged: fetch or save it again"
        )


def check_format(proof: Proof, W: Float[Tensor, "out in"], name: str) -> None:
    """Refuse a proof that is missing, of another format, or of a matrix of another shape."""
    seed = int(proof.origin[5])
    if not bool(proof.origin.any()):
        raise InputError(
            f"{name}: the adapter file does not say which basis its coefficients belong to; it is not a complete "
            "spectral adapter: save it again with save_pretrained"
        )
    if seed != SEED:
        raise InputError(
            f"{name}: the sketch in the adapter file was made with seed {seed}, this version knows {SEED}; use the "
            "version of specbasis that saved it"
        )
    if proof.shape != tuple(W.shape):
        raise InputError(
            f"{name}: the adapter was trained on a {proof.shape[0]} × {proof.shape[1]} weight, this base has "
            f"{W.shape[0]} × {W.shape[1]}; load the base that the adapter was trained on"
        )


def _distance(sign: Tensor, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> Tensor:
    """Estimated distance of each pair (u, v) from the trained one, as root mean square over the directions."""
    squares = [(sign[:, None] * a - b).square().sum(1) for a, b in zip(here, there, strict=True)]
    return (torch.stack(squares).sum(0) / (2 * COLUMNS)).sqrt()


def _reason(proof: Proof, basis: SVD, W: Tensor, off: Tensor, change: float, name: str) -> str:
    """Why a recomputed basis is not the trained one, in one line."""
    bad = ~(off <= TOLERANCE)
    worst = int(off.argmax())
    text = (
        f"{name}: {int(bad.sum())} of {len(off)} singular vectors are not those that the adapter was trained in "
        f"(rank {proof.interval[0] + worst + 1} is off by {off[worst]:.2g}, allowed {TOLERANCE:.1g}): "
    )
    grid = _grid(W)
    if weight_digest(W) == proof.digest:
        gap = float(basis.relative_gap[worst])
        return (
            f"{text}the weight is the same, but its singular values are too close to fix single vectors "
            f"(relative gap {gap:.1g}); load an adapter that was saved with save_basis=True"
        )
    if roundoff(grid) > roundoff(proof.dtype):
        return (
            f"{text}this base is rounded to {grid}, the adapter was trained on {proof.dtype}; load the base in "
            f"{proof.dtype}, or an adapter that was saved with save_basis=True"
        )
    return (
        f"{text}the base weight is another one (singular values changed by up to {change:.2g} of the largest); "
        "load the base that the adapter was trained on"
    )


def _grid(W: Tensor) -> str:
    """The coarsest dtype that holds every value of W: a base may be rounded and then cast back."""
    return next((name for name in UNSCALED if torch.equal(W.to(FORMATS[name].torch).to(W.dtype), W)), "float64")
