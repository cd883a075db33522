"""Bases: frozen singular vectors of an interval of ranks, computed, read from a file, or of another checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from specbasis.adapter.layouts import LINEAR, Layout
from specbasis.checkpoint import Checkpoint, open_checkpoint
from specbasis.checkpoint.adapter_file import FROM_DATA
from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.digest import digest
from specbasis.checkpoint.names import namesakes
from specbasis.checkpoint.proof import weight_digest
from specbasis.core.errors import InputError
from specbasis.core.svd import FLOOR, SVD, decompose, half_svd
from specbasis.jobs.cache import Cache


def check_interval(interval: tuple[int, int], shape: tuple[int, int], name: str) -> tuple[int, int]:
    """The interval as two integers, if 0 ≤ k < m ≤ min(out, in).

    Raises:
        InputError: it is not.
    """
    try:
        k, m = (int(bound) for bound in interval)
    except (TypeError, ValueError):
        raise InputError(f"{name}: got interval = {interval!r}; want two ranks (k, m)") from None
    if not 0 <= k < m <= min(shape):
        raise InputError(
            f"{name}: got interval [{k}, {m}) for a weight of {shape[0]} × {shape[1]}, which has {min(shape)} "
            f"singular values; want 0 <= k < m <= {min(shape)}: lower the rank, or give this layer its own interval"
        )
    return k, m


def basis_of(
    W: Float[Tensor, "out in"],
    interval: tuple[int, int],
    basis: str = "pretrained",
    name: str = "matrix",
    *,
    file: str | None = None,
    layout: Layout = LINEAR,
) -> SVD:
    """Frozen vectors for ranks [k, m) of a weight: its own singular vectors, or those of another basis.

    Args:
        W: the weight matrix.
        interval: ranks [k, m), 0-based.
        basis: "pretrained"; "from:PATH", the same matrix of another checkpoint; or a control, see `control_basis`.
        name: the module's name in the model.
        file: where "pretrained" ones may be stored; see `load_basis`. Ignored where there is no such file.
        layout: how the checkpoint of "from:PATH" stores the matrix.

    Raises:
        InputError: there is no such basis, or the other checkpoint does not fit.
    """
    if basis.startswith("from:"):
        return _foreign_basis(basis.removeprefix("from:"), W, interval, name, layout)
    if basis in FROM_DATA:
        raise InputError(
            f"{name}: its basis = {basis!r} is made from examples, and has not been yet: call "
            "specbasis.adapter.initialize_gradient_basis(model, dataloader) before the adapter is used"
        )
    if basis != "pretrained":
        return control_basis(W, interval, basis, name)
    if file and Path(file).exists():
        return load_basis(file, W, interval, name)
    # Vectors of the long side are right to 1e-12 this way, beyond what float32 factors hold.
    return half_svd(W, interval[1], name=name, implied=True).interval(*interval)


def control_basis(W: Float[Tensor, "out in"], interval: tuple[int, int], basis: str, name: str) -> SVD:
    """Vectors of a control, with the singular values of W on the interval as their scale.

    "random" or "random:SEED": orthonormal vectors, uniform, the same for every weight of one shape (SEED is 0 when
    it is left out). "shuffled" or "shuffled:SEED": the right vectors v_k … v_{m−1} of W, paired with the left
    vectors u_π(k) … u_π(m−1) of a random permutation π of all ranks; the left vectors so come from the whole
    spectrum. (A permutation inside the interval would change nothing: M takes it up.)

    Raises:
        InputError: the basis is neither of these.
    """
    k, m = interval
    kind, _, seed = basis.partition(":")
    if kind not in ("random", "shuffled") or not (seed or "0").isdecimal():
        raise InputError(
            f"{name}: got basis = {basis!r}; want 'pretrained', 'gradient', 'random', 'shuffled' (the last two "
            "also with ':SEED') or 'from:PATH'"
        )
    half = half_svd(W, min(W.shape) if kind == "shuffled" else m, name=name, implied=True)
    svd = half.interval(k, m)
    generator = torch.Generator().manual_seed(int(seed or 0))
    if kind == "shuffled":
        order = torch.randperm(len(half.S), generator=generator).to(W.device)
        U, Vh = half.vectors("left")[:, order[k:m]].contiguous(), svd.Vh
    else:
        U, V = (
            torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64))[0][:, k:m].to(W.device)
            for d in W.shape
        )
        Vh = V.mT.contiguous()
    return dataclasses.replace(svd, U=U, Vh=Vh)


def gradient_basis(
    G: Float[Tensor, "out in"],
    W: Float[Tensor, "out in"],
    interval: tuple[int, int],
    name: str,
    *,
    fewer: bool = False,
) -> SVD:
    """Singular vectors of a loss gradient G on ranks [k, m), with the singular values of W there as their scale.

    With ``fewer`` on as many of these ranks as G has directions.

    Raises:
        InputError: the gradient is zero or not finite, or has fewer than m directions: the vectors are anything.
    """
    k, m = interval
    of_gradient = decompose(G, ranks=m, name=f"the gradient of {name}")
    rank = int((of_gradient.S > FLOOR * of_gradient.S[0]).sum())
    if rank == 0:
        raise InputError(
            f"{name}: its gradient over these examples is zero, so it has no directions; leave this module out of "
            "target_modules, or give examples whose loss depends on it"
        )
    m = min(m, max(rank, k + 1)) if fewer else m
    if rank < m:
        raise InputError(
            f"{name}: its gradient over these examples has {rank} directions, and interval [{k}, {m}) wants {m}; "
            "give more examples, or lower the rank"
        )
    own = half_svd(W, m, name=name, implied=True).interval(k, m)
    return dataclasses.replace(own, U=of_gradient.U[:, k:m], Vh=of_gradient.Vh[k:m])


def _foreign_basis(path: str, W: Tensor, interval: tuple[int, int], name: str, layout: Layout) -> SVD:
    """Singular vectors of the same matrix in another checkpoint, such as a model trained from scratch."""
    checkpoint = open_checkpoint(path)
    key = parameter_named(checkpoint, f"{name}.weight", where=path, want="a checkpoint of the same architecture")
    other = layout.matrix(checkpoint[key])
    if other.shape != W.shape:
        raise InputError(
            f"{path}: {key} is {other.shape[0]} × {other.shape[1]}, the base has {W.shape[0]} × {W.shape[1]}; want "
            "equal shapes"
        )
    return decompose(other, ranks=interval[1], name=f"{path}: {key}").interval(*interval)


def save_bases(path: str | Path, bases: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a base-level basis file, which many adapters of one base share.

    It is written beside its final place and moved there, so that a reader never sees half of it. Each basis carries
    a seal over its module's name, its weight's origin and its vectors (`checkpoint.digest`).

    Args:
        path: the file.
        bases: module name → U, S, Vh of its interval in float32, and the origin that names the weight.
    """
    tensors = {
        f"{name}.{part}": tensor.detach().cpu().contiguous()
        for name, basis in bases.items()
        for part, tensor in {**basis, "seal": _seal(name, basis)}.items()
    }
    write_whole(Path(path), lambda draft: save_file(tensors, draft))


def load_basis(path: str | Path, W: Float[Tensor, "out in"], interval: tuple[int, int], name: str) -> SVD:
    """The basis of a weight from a base-level basis file; the weight is decomposed if the file has not got it.

    An entry is used only where its recorded digest is that of W, its interval covers the wanted one, and its seal
    proves its vectors; files of versions before seals have none. A folder is a cache of decompositions, of any
    weights, that fills itself.
    """
    if Path(path).is_dir():
        return Cache(Path(path)).decompose(W, interval[1], name=name).interval(*interval)
    stored = open_checkpoint(path)
    if all(f"{name}.{part}" in stored for part in (*_PARTS, "seal")):
        parts = {part: stored[f"{name}.{part}"] for part in _PARTS}
        origin = parts["origin"]
        k, m = int(origin[0]), int(origin[1])
        is_whole = torch.equal(stored[f"{name}.seal"], _seal(name, parts))
        is_of_weight = tuple(int(word) for word in origin[6:]) == weight_digest(W)
        if is_whole and is_of_weight and k <= interval[0] and interval[1] <= m:
            U, S, Vh = (parts[part].to(W.device) for part in ("U", "S", "Vh"))
            ranks = slice(interval[0] - k, interval[1] - k)
            unknown = torch.full_like(S, torch.nan)
            return SVD(U[:, ranks], S[ranks], Vh[ranks], S, unknown, unknown[ranks], unknown[ranks])
    return decompose(W, ranks=interval[1], name=name).interval(*interval)


_PARTS = ("U", "S", "Vh", "origin")


def _seal(name: str, basis: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest(name, *(basis[part] for part in _PARTS)))), dtype=torch.uint8)


def parameter_named(checkpoint: Checkpoint, name: str, *, where: str, want: str) -> str:
    """The parameter of this name, with or without leading components (``bert.``, ``model.``) on either side.

    Raises:
        InputError: none or several have it; says ``where`` and what to ``want`` instead.
    """
    alike = namesakes(name, checkpoint)
    if len(alike) != 1:
        raise InputError(f"{where}: {len(alike)} parameters match {name}; want {want}")
    return alike[0]
