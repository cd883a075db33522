"""Linear updates in the singular basis of a frozen weight, for methods that PEFT lacks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.adapter.layouts import CONV1D, LINEAR, layout_of
from specbasis.adapter.state import Frozen
from specbasis.checkpoint.proof import Proof, empty_proof, prove, settled_basis
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, decompose
from specbasis.finetuning.methods.kit import CHILD, Added, additions, joined


class Update(Added):
    """A linear update of a frozen weight: W' = W + D, applied as y + D x without forming D.

    The frozen singular vectors are not saved: they are computed from the base weight again, and a sketch in the
    saved tensors proves that they are the trained ones (`specbasis.checkpoint.proof`).
    """

    def __init__(self, layer: nn.Module, ranks: int, name: str) -> None:
        super().__init__()
        self.name = name
        W = weight_matrix(layer, name)
        self.frozen, self.proof = Frozen(), Frozen()
        if W.is_meta:
            proof = empty_proof(ranks)
            self._keep(W.new_empty(W.shape[0], ranks), W.new_empty(ranks), W.new_empty(ranks, W.shape[1]))
        else:
            basis = decompose(W, ranks=ranks, name=name)
            proof = prove(basis, (0, ranks), W)
            self._keep(basis.U, basis.S, basis.Vh)
        for key, tensor in (("origin", proof.origin), ("S", proof.S), ("U", proof.sketch_U), ("V", proof.sketch_V)):
            self.proof.put(key, tensor.to(W.device))

    def _keep(self, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        for key, tensor in (("U", U), ("S", S), ("Vh", Vh)):
            self.frozen.put(key, tensor.float().contiguous(), persistent=False)

    def settle(self, layer: nn.Module) -> None:
        """After loading: give the singular vectors the signs that the coefficients were trained with.

        Raises:
            InputError: the base has other singular vectors.
        """
        proof = Proof(*(self.proof[key] for key in ("origin", "S", "U", "V")))
        U, S, Vh = (self.frozen[key] for key in ("U", "S", "Vh"))
        unknown = torch.full_like(S, torch.nan)
        basis = SVD(U, S, Vh, S, unknown, unknown, unknown)
        W = weight_matrix(layer, self.name)
        U, Vh, _ = settled_basis(proof, W, None, lambda: basis, self.name, singular=True)
        self._keep(U, S, Vh)

    def join(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output y + D x."""
        update: Tensor = self(x)
        return output + update.to(output.dtype)

    def project(self, x: Tensor, factor: Tensor) -> Tensor:
        """The product x Fᵀ, in float32 unless autocast says otherwise."""
        return F.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype), factor)

    def delta(self) -> Float[Tensor, "out in"]:
        """The update D as a matrix, in float64."""
        raise NotImplementedError


def merge_updates(model: nn.Module) -> None:
    """Put W + D in place of each adapted weight, summed in float64 and rounded once, and take the updates off.

    Raises:
        InputError: the method is not a linear update of the weights.
    """
    updates = additions(model)
    if not all(isinstance(update, Update) for update in updates.values()):
        raise InputError("a bottleneck adapter is no linear update of the weights: it cannot be merged into them")
    for name, update in updates.items():
        assert isinstance(update, Update)
        layer = model.get_submodule(name)
        W = weight_matrix(layer, name)
        W.copy_(update.delta() + W.double())
        delattr(layer, CHILD)
        for key, hook in list(layer._forward_hooks.items()):
            if hook is joined:
                del layer._forward_hooks[key]


def weight_matrix(layer: nn.Module, name: str) -> Float[Tensor, "out in"]:
    """The weight of a linear layer, or of transformers' Conv1D, as a matrix (out, in).

    Raises:
        InputError: the layer is another one.
    """
    layout = layout_of(layer, name)
    if layout not in (LINEAR, CONV1D):
        raise InputError(
            f"{name}: got a {type(layer).__name__}; this method adapts linear layers: choose other modules"
        )
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return layout.matrix(weight.detach())
