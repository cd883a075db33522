"""Bases on disk: one file for a base model that many adapters share, and the basis of another checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from specbasis.adapter.layer import SpectralLinear, check_interval
from specbasis.adapter.proof import weight_digest
from specbasis.checkpoint import Checkpoint, open_checkpoint
from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, decompose
from specbasis.jobs.cache import Cache


def save_bases(path: str | Path, layers: Mapping[str, SpectralLinear], adapter_name: str) -> None:
    """Write the bases of an adapter's layers to a base-level basis file, which other adapters of the base then
    share.

    For each layer: U, S, Vh of its interval in float32, and the origin that names the weight. The file is written
    beside its final place and moved there, so that a reader never sees half of it.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if adapter_name in layer.settings and layer.settings[adapter_name].basis == "pretrained":
            layer._settle(adapter_name)
            frozen = (layer.spectral_U, layer.spectral_S, layer.spectral_Vh, layer.spectral_origin)
            for key, held in zip(("U", "S", "Vh", "origin"), frozen, strict=True):
                tensors[f"{name}.{key}"] = held[adapter_name].detach().cpu().contiguous()
    write_whole(Path(path), lambda temporary: save_file(tensors, temporary))


def load_basis(path: str | Path, W: Float[Tensor, "out in"], interval: tuple[int, int], name: str) -> SVD:
    """The basis of a weight from a base-level basis file; the weight is decomposed if the file has not got it.

    An entry is used only where its recorded digest is that of W and its interval covers the wanted one. A folder is
    a cache of decompositions, of any weights, that fills itself.
    """
    if Path(path).is_dir():
        return Cache(Path(path)).decompose(W, interval[1], name=name).interval(*interval)
    held = open_checkpoint(path)
    if f"{name}.origin" in held:
        origin = held[f"{name}.origin"]
        k, m = int(origin[0]), int(origin[1])
        if tuple(int(word) for word in origin[6:]) == weight_digest(W) and k <= interval[0] and interval[1] <= m:
            start, stop = interval[0] - k, interval[1] - k
            S = held[f"{name}.S"][start:stop].to(W.device)
            unknown = torch.full_like(S, torch.nan)
            return SVD(
                held[f"{name}.U"][:, start:stop].to(W.device),
                S,
                held[f"{name}.Vh"][start:stop].to(W.device),
                spectrum=held[f"{name}.S"].to(W.device),
                spectrum_error=torch.full_like(held[f"{name}.S"], torch.nan).to(W.device),
                residual=unknown,
                gap=unknown,
            )
    return decompose(W, ranks=interval[1], name=name).interval(*interval)


def foreign_basis(path: str, layer: SpectralLinear, name: str, interval: tuple[int, int]) -> SVD:
    """Singular vectors of the same matrix in another checkpoint, such as a model trained from scratch.

    Raises:
        InputError: the checkpoint has no such matrix, or one of another shape.
    """
    checkpoint = open_checkpoint(path)
    key = parameter_named(checkpoint, f"{name}.weight", where=path, want="a checkpoint of the same architecture")
    W = layer.kind.matrix(checkpoint[key])
    shape = tuple(layer.weight_matrix().shape)
    if tuple(W.shape) != shape:
        raise InputError(
            f"{path}: {key} is {W.shape[0]} × {W.shape[1]}, the base has {shape[0]} × {shape[1]}; want equal shapes"
        )
    check_interval(interval, (W.shape[0], W.shape[1]), key)
    return decompose(W, ranks=interval[1], name=f"{path}: {key}").interval(*interval)


def parameter_named(checkpoint: Checkpoint, name: str, *, where: str, want: str) -> str:
    """The parameter of this name, with or without leading components (``bert.``, ``model.``) on either side.

    Raises:
        InputError: none or several have it; says ``where`` and what to ``want`` instead.
    """
    if name in checkpoint:
        return name
    found = [key for key in checkpoint if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(found) != 1:
        raise InputError(f"{where}: {len(found)} parameters match {name}; want {want}")
    return found[0]
