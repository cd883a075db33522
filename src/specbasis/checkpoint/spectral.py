"""A spectral adapter as low-rank factors, with the basis of its file or that of the base, decomposed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

from jaxtyping import Float
from torch import Tensor

from specbasis.checkpoint.adapter_file import BASIS, POSITIONS, PROOF, AdapterFile
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.pattern import square_of
from specbasis.checkpoint.proof import Proof, settled_basis, weight_digest
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, half_svd


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
    basis = lru_cache(maxsize=1)(partial(_basis, file, weight))  # A and B are read one after the other
    factors = {}
    for module, parts in file.modules.items():
        if set(BASIS) <= parts.keys():
            out, width = parts["U"].shape[0], parts["Vh"].shape[1]
        elif str(file.config.get("basis", "pretrained")) != "pretrained":
            raise InputError(
                f"{file.source}: a spectral adapter saved without its basis, which is not the base's own; save it "
                "again with save_basis=True"
            )
        else:
            file.require(PROOF)
            out, width = _proof(parts).shape
        r = (parts["S"] if POSITIONS in parts else parts["M"]).shape[0]
        left = partial(_left, parts, partial(basis, module), is_scaled=str(file.config.get("scale")) == "sigma")
        factors[module] = {
            "A": Entry((r, width), "float32", lambda module=module: basis(module)[1]),
            "B": Entry((out, r), "float32", left),
        }
    return factors


def oriented(W: Float[Tensor, "a b"], proof: Proof) -> tuple[Float[Tensor, "out in"], bool]:
    """The matrix (out, in) of a weight, and whether it is stored (in, out): of a square one the digest tells."""
    square = W.shape[0] == W.shape[1]
    turned = tuple(W.shape) == proof.shape[::-1] and (not square or weight_digest(W.mT) == proof.digest)
    return (W.mT, True) if turned else (W, False)


def _proof(parts: Mapping[str, Entry]) -> Proof:
    return Proof(*(parts[part].load() for part in PROOF))


def _basis(file: AdapterFile, weight: Callable[[str], Tensor], module: str) -> tuple[Tensor, Tensor]:
    """U and Vh of one matrix, stored or decomposed again, and proven to be those of this base."""
    parts, name = file.modules[module], f"{file.source}: {module}"
    stored = (parts["U"].load(), parts["Vh"].load()) if set(BASIS) <= parts.keys() else None
    if stored and not set(PROOF) <= parts.keys():
        return stored
    proof = _proof(parts)
    W, _ = oriented(weight(module).flatten(1), proof)
    k, m = proof.interval

    def compute() -> SVD:
        return half_svd(W, m, name=name, implied=True).interval(k, min(m, *W.shape))

    singular = str(file.config.get("basis", "pretrained")) == "pretrained"
    U, Vh, _ = settled_basis(proof, W, stored, compute, name, singular=singular)
    return U, Vh


def stored_core(parts: Mapping[str, Entry]) -> Float[Tensor, "r r"]:
    """The coefficients of one matrix as a square, float64."""
    M: Tensor = parts["M"].load().double()
    if POSITIONS not in parts:
        return M
    k, m = parts["origin"].load()[:2].tolist()
    return square_of(M, parts[POSITIONS].load(), (k, m))


def _left(parts: Mapping[str, Entry], basis: Callable[[], tuple[Tensor, Tensor]], *, is_scaled: bool) -> Tensor:
    C = stored_core(parts)
    return basis()[0].double() @ (parts["S"].load().double()[:, None] * C if is_scaled else C)
