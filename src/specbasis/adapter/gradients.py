"""A frozen basis from the task: the singular vectors of each matrix's loss gradient over some batches.

    model = get_peft_model(base, SpectralConfig(rank=4, basis="gradient", …))
    initialize_gradient_basis(model, dataloader)

The first step of full finetuning is along the gradient G; its leading vectors on both sides are where a K × K core
can follow it furthest (Eckart & Young). A head that is still random would send back noise, and one that has not
converged mostly what it will learn itself; so the head's last layer is fitted to the frozen features first, and
what is left is what the features lack.

Source: the gradient's vectors as the frozen factors of an adapter: Wang et al. 2024 (LoRA-GA, arXiv 2407.05000),
Ponkshe et al. 2024 (LoRA-SB, arXiv 2411.19557). Deviations: converged head; the basis is stored and proven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import find_batch_size, send_to_device
from jaxtyping import Float
from torch import Tensor, nn

from specbasis.adapter.adapted import AdaptedLayer
from specbasis.adapter.bases import gradient_basis
from specbasis.adapter.layouts import innermost
from specbasis.adapter.rest import is_dense
from specbasis.checkpoint.adapter_file import FROM_DATA
from specbasis.core.errors import InputError
from specbasis.core.extras import require


def initialize_gradient_basis(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(**batch).loss,
    adapter_name: str = "default",
    fit_head: bool = True,
) -> nn.Module:
    """Give an adapter with ``basis="gradient"`` its basis, before it is trained; as PEFT's EVA is given its own.

    U and V are the leading singular vectors of G = Σ ∂loss/∂W over all examples, in evaluation mode, at the base
    without any spectral adapter. Costs a forward and a backward pass of every batch, and a forward pass for the
    head; memory of 4 bytes for each number of the adapted matrices, where their gradients are summed one after the
    other, and one matrix at a time in float64.

    Args:
        model: with the adapter in it.
        dataloader: batches, kept as a list; of mappings to tensors if ``forward_fn`` is the default.
        forward_fn: the mean loss of a batch's examples; by default that of transformers' models.
        adapter_name: which adapter.
        fit_head: where a batch has one label an example and the model one output a class, converge the last linear
            layer of the head on the frozen features first, and put it back afterwards: logistic regression, or
            ridge regression for a number. Other models (language models) are taken as they are.

    Returns:
        The model.

    Raises:
        InputError: no such adapter, its configuration names another basis, it has been trained, there are no
            batches, a matrix is quantised, or has no gradient of the adapter's rank.
    """
    layers = untrained_layers(model, adapter_name)
    others = {layer.adapters[adapter_name].basis for layer in layers.values()} - set(FROM_DATA)
    if others:
        raise InputError(
            f"adapter {adapter_name!r}: got basis = {min(others)!r}; want one of SpectralConfig(basis='gradient')"
        )
    sums = task_gradients(model, layers, dataloader, forward_fn, fit_head=fit_head)
    for name, layer in layers.items():
        G, W = layer.layout.matrix(sums.pop(name)), layer.weight_matrix()
        basis = gradient_basis(G, W, layer.adapters[adapter_name].interval, layer.module_name)
        layer.settle_in(adapter_name, basis)
    return model


def untrained_layers(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers of a model that have an adapter, by their names in it.

    Raises:
        InputError: there are none, or the adapter has been trained.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.adapters
    }
    if not layers:
        raise InputError(f"adapter {adapter_name!r}: got no layer with it; want a spectral adapter of this model")
    trained = [name for name, layer in layers.items() if bool(layer.spectral_M[adapter_name].any())]
    if trained:
        raise InputError(
            f"{trained[0]} (adapter {adapter_name!r}): its coefficients are not zero, and in a new basis or at "
            "other positions they would be another update; choose both before training"
        )
    return layers


def task_gradients(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    dataloader: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Tensor],
    *,
    fit_head: bool,
) -> dict[str, Tensor]:
    """Σ ∂loss/∂W over the examples for each layer, as its weight is stored; see `initialize_gradient_basis`."""
    batches = list(dataloader)
    if not batches:
        raise InputError("got no batches; want some hundred examples of the task to take a gradient of")
    with _as_base(model), _converged(model, batches) if fit_head else nullcontext(), torch.enable_grad():
        losses = (find_batch_size(batch) * forward_fn(model, _placed(batch, model)) for batch in batches)
        return summed_gradients({name: innermost(layer) for name, layer in layers.items()}, losses)


def summed_gradients(modules: Mapping[str, nn.Module], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Σ ∂loss/∂W of each module's weight over losses, in float32 and as the weight is stored.

    Each module gets a leaf of its own over the same numbers while this runs: of a tied weight the gradient is that
    of this module alone, and nothing else of the model has its gradient taken.

    Args:
        modules: name → the module that holds the weight.
        losses: made one after another, while this runs.

    Raises:
        InputError: a weight is quantised, sharded or on meta.
    """
    weights: dict[str, Any] = {name: module.weight for name, module in modules.items()}
    for name, weight in weights.items():
        if not (is_dense(weight) and weight.is_floating_point()):
            raise InputError(f"{name}: a quantised or sharded weight has no gradient; take the unquantised base")
    sums = {
        name: torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for name, weight in weights.items()
    }
    leaves = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
    try:
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(partial(_moved, sums[name]))  # type: ignore[no-untyped-call]
            modules[name].weight = leaf
        for loss in losses:
            if loss.requires_grad:
                loss.backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
    finally:
        for name, weight in weights.items():
            modules[name].weight = weight
    return sums


def _moved(total: Tensor, leaf: Tensor) -> None:
    """Add a matrix's gradient to its sum as soon as it is there, and free it."""
    assert leaf.grad is not None
    total += leaf.grad
    leaf.grad = None


def converged_head(
    features: Float[Tensor, "n d"], labels: Tensor, outputs: int, *, bias: bool = True
) -> Callable[[Float[Tensor, "m d"]], Float[Tensor, "m c"]]:
    """The linear head that fits features best, as a function of features, worked out in float64.

    Logistic regression on classes, ridge regression where there is one output, with scikit-learn's default penalty
    on features around zero whose mean square is 1: in their own units it would weigh more on small features. A
    class that no example has gets probability 0.

    Raises:
        InputError: all examples are of one class, or a feature is not finite.
    """
    require("sklearn", extra="finetune", purpose="a fitted head needs")
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = features.detach().double().cpu(), labels.detach().cpu().numpy()
    if not bool(torch.isfinite(x).all()):
        raise InputError("the features of the frozen model hold NaN or Inf, as a weight of it does or overflows")
    centre = x.mean(0) * bias
    unit = (x - centre).square().mean().sqrt().item() or 1.0
    z = ((x - centre) / unit).numpy()
    weight = torch.zeros(outputs, x.shape[1], dtype=torch.float64)
    intercept = torch.full((outputs,), -1e4, dtype=torch.float64)
    if outputs == 1:
        ridge = Ridge(fit_intercept=bias).fit(z, y)
        weight[0], intercept[0] = torch.from_numpy(ridge.coef_), float(ridge.intercept_)
    elif len(set(y.tolist())) < 2:
        raise InputError(f"got {len(y)} examples of one class; want some of two classes at least for a gradient")
    else:
        logistic = LogisticRegression(fit_intercept=bias, tol=1e-6, max_iter=10_000).fit(z, y)
        fitted = [torch.from_numpy(part) for part in (logistic.coef_, logistic.intercept_)]
        if len(logistic.classes_) == 2:  # one logit between the two, half on each
            fitted = [torch.cat([-part, part]) / 2 for part in fitted]
        weight[logistic.classes_], intercept[logistic.classes_] = fitted

    def head(features: Tensor) -> Tensor:
        # Features often have most in common: what tells them apart would be lost in float32 products.
        around, W, b = (part.to(features.device) for part in (centre, weight / unit, intercept))
        return ((features.double() - around) @ W.mT + b).to(features.dtype)

    return head


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without its spectral adapters."""
    training = [(module, module.training) for module in model.modules()]
    disabled = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, AdaptedLayer)]
    model.eval()
    for layer, _ in disabled:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, before in disabled:
            layer._disable_adapters = before
        for module, mode in training:
            module.training = mode


@contextmanager
def _converged(model: nn.Module, batches: list[Any]) -> Iterator[None]:
    """The model as if the last layer of its task head, where it has one, were fitted to the frozen features."""
    labels = [batch["labels"] for batch in batches if isinstance(batch, Mapping) and "labels" in batch]
    is_plain = len(labels) == len(batches) and all(part.ndim == 1 for part in labels)
    head = _last_linear(model, batches[0]) if is_plain else None
    if head is None:
        yield
        return
    with torch.no_grad(), head.register_forward_hook(lambda layer, inputs, _: inputs[0]):
        features = torch.cat([_logits(model, batch) for batch in batches])
    fitted = converged_head(features, torch.cat(labels), head.out_features, bias=head.bias is not None)
    with head.register_forward_hook(lambda layer, inputs, _: fitted(inputs[0])):
        yield


@torch.no_grad()
def _last_linear(model: nn.Module, batch: Any) -> nn.Linear | None:
    """The layer that the outputs of an example come from; None where the outputs are not one row an example.

    Raises:
        InputError: it is not a linear layer.
    """
    called: list[nn.Linear] = []
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(module.register_forward_hook(lambda layer, *_: called.append(layer)))
        logits = _logits(model, batch)
    if logits is None or logits.ndim != 2:
        return None
    for layer in reversed(called):
        if layer.out_features == logits.shape[1]:
            return layer
    raise InputError(
        f"{type(model).__name__}: its task head does not end in a linear layer, so none can be fitted; "
        "fit_head=False takes the gradient under the head as it is"
    )


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What the model puts out for a batch, without its loss; None where it has no logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return getattr(model(**_placed(inputs, model)), "logits", None)


def _placed(batch: Any, model: nn.Module) -> Any:
    return send_to_device(batch, next(model.parameters()).device)
