"""A spectral adapter as low-rank factors, with the basis of its file or that of the base, decomposed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.checkpoint.adapter_file import PROOF, AdapterFile
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.proof import Proof, align, weight_digest
from specbasis.core.errors import InputError
from specbasis.core.svd import half_svd

Parts = Mapping[str, Entry]


def spectral_factors(file: AdapterFile, weight: Callable[[str], Tensor]) -> dict[str, dict[str, Entry]]:
    """A spectral adapter as LoRA factors of scale 1: W + U C Vh = W + B A with B = U C, A = Vh.

    C is the core M, or diag(S) M where the adapter counts in units of the singular values. A basis that the file
    does not hold is that of the base, proven by the file's sketch when it is read.

    Args:
        file: the adapter.
        weight: from a module to its weight in the base.

    Raises:
        InputError: there is no basis, and it is not the base's.
    """
    again = lru_cache(maxsize=1)(partial(_decomposed, file, weight))  # A and B are read one after the other
    factors = {}
    for module, parts in file.modules.items():
        r = parts["M"].shape[0]
        if {"U", "Vh"} <= parts.keys():
            read = partial(_stored, parts)
            sizes = (parts["U"].shape[0], parts["Vh"].shape[1])
        elif str(file.config.get("basis", "pretrained")) != "pretrained":
            raise InputError(
                f"{file.source}: a spectral adapter saved without its basis, which is not the base's own; save it "
                "again with save_basis=True"
            )
        else:
            file.require(PROOF)
            read = partial(again, module)
            sizes = _proof(parts).shape
        C = partial(_core, parts, is_scaled=str(file.config.get("scale")) == "sigma")
        factors[module] = {
            "A": Entry((r, sizes[1]), "float32", partial(_factor, read, C, 1)),
            "B": Entry((sizes[0], r), "float32", partial(_factor, read, C, 0)),
        }
    return factors


def oriented(W: Float[Tensor, "a b"], proof: Proof) -> tuple[Float[Tensor, "out in"], bool]:
    """The matrix (out, in) of a weight, and whether it is stored (in, out): of a square one the digest tells."""
    square = W.shape[0] == W.shape[1]
    turned = tuple(W.shape) == proof.shape[::-1] and (not square or weight_digest(W.mT) == proof.digest)
    return (W.mT, True) if turned else (W, False)


def _proof(parts: Parts) -> Proof:
    return Proof(*(parts[part].load() for part in PROOF))


def _stored(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts["U"].load(), parts["Vh"].load()


def _decomposed(file: AdapterFile, weight: Callable[[str], Tensor], module: str) -> tuple[Tensor, Tensor]:
    proof, name = _proof(file.modules[module]), f"{file.source}: {module}"
    W, _ = oriented(weight(module).flatten(1), proof)
    if tuple(W.shape) != proof.shape:
        raise InputError(f"{name}: was trained on a weight of {proof.shape}, the base's is {tuple(W.shape)}")
    k, m = proof.interval
    basis = align(proof, half_svd(W, m, name=name, implied=True).interval(k, m), W, name)
    return basis.U, basis.Vh


def _core(parts: Parts, *, is_scaled: bool) -> Tensor:
    M: Tensor = parts["M"].load().double()
    return parts["S"].load().double()[:, None] * M if is_scaled else M


def _factor(read: Callable[[], tuple[Tensor, Tensor]], core: Callable[[], Tensor], which: int) -> Tensor:
    """B = U C, or A = Vh."""
    U, Vh = read()
    return Vh.double() if which else torch.matmul(U.double(), core())
