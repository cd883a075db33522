"""The routes against a naive transcription, their gradients, and where they must not be used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F  # noqa: N812

from specbasis.adapter import functional
from specbasis.core.svd import decompose
from tests.adapter.helpers import matrix


def problem(out: int, in_: int, k: int, m: int, seed: int = 0, tokens: int = 7):
    W = matrix(out, in_, seed=seed)
    svd = decompose(W, ranks=m).interval(k, m)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(2, tokens, in_, generator=generator, dtype=torch.float64)
    C = torch.randn(m - k, m - k, generator=generator, dtype=torch.float64)
    b = torch.randn(out, generator=generator, dtype=torch.float64)
    return W, svd, x, C, b


def outputs(route: str, W, svd, x, C, b):
    if route == "factored":
        return F.linear(x, W, b) + functional.factored(x, svd.U, C, svd.Vh)
    if route == "folded":
        return functional.folded(x, W, b, svd.U, C, svd.Vh)
    if route == "inner":
        return functional.inner(x, svd.U, svd.S, C, svd.Vh, lambda moved: F.linear(moved, W, b))
    return functional.outer(F.linear(x, W, b), b, svd.U, svd.S, C)


ROUTES = ("factored", "folded", "inner", "outer")


@pytest.mark.parametrize("route", ROUTES)
@given(out=st.integers(2, 12), in_=st.integers(2, 12), data=st.data(), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_every_route_is_the_equation(route, out, in_, data, seed):
    m = data.draw(st.integers(1, min(out, in_)))
    k = data.draw(st.integers(0, m - 1))
    W, svd, x, C, b = problem(out, in_, k, m, seed)
    wanted = x @ (W + svd.U @ C @ svd.Vh).mT + b
    assert torch.allclose(outputs(route, W, svd, x, C, b), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("input_gradient", [True, False])
def test_gradcheck(route, shape, input_gradient):
    W, svd, x, C, b = problem(*shape, 1, 4, tokens=3)
    x.requires_grad_(input_gradient)
    C.requires_grad_()
    # The inner route without an input gradient takes the core's gradient at the frozen weight's output: same
    # number.
    assert torch.autograd.gradcheck(lambda x, C: outputs(route, W, svd, x, C, b), (x, C))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("input_gradient", [True, False])
def test_second_derivatives(route, input_gradient):
    """They go through the projection that is kept for the backward pass."""
    W, svd, x, C, b = problem(5, 6, 1, 3, tokens=2)
    x.requires_grad_(input_gradient)
    C.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, C: outputs(route, W, svd, x, C, b).square(), (x, C))


@pytest.mark.parametrize("route", ROUTES)
def test_batched_by_vmap_and_any_leading_dimensions(route):
    W, svd, x, C, b = problem(5, 6, 1, 3)
    wanted = outputs(route, W, svd, x, C, b)
    C.requires_grad_()
    each = torch.func.vmap(lambda row: outputs(route, W, svd, row, C, b))(x)
    assert torch.allclose(each, wanted)
    assert torch.allclose(outputs(route, W, svd, x[0, 0], C, b), wanted[0, 0])
    assert outputs(route, W, svd, x[:0], C, b).shape == wanted[:0].shape
    per_row = torch.func.vmap(
        torch.func.grad(lambda C, row: outputs(route, W, svd, row, C, b).square().sum()), (None, 0)
    )
    (whole,) = torch.autograd.grad(outputs(route, W, svd, x, C, b).square().sum(), C)
    assert torch.allclose(per_row(C.detach(), x).sum(0), whole)


@pytest.mark.parametrize("route", ROUTES)
def test_activations_kept_are_tokens_times_rank(route):
    W, svd, x, C, b = problem(40, 50, 0, 3, tokens=64)
    C.requires_grad_()
    x.requires_grad_()
    held = {t.data_ptr() for t in (W, svd.U, svd.Vh, svd.S, b)}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in held and tensor.untyped_storage().data_ptr() not in held:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs(route, W, svd, x, C, b)
    tokens = x.shape[0] * x.shape[1]
    assert max(t.numel() for t in kept) == tokens * 3


def test_routes_that_divide_by_singular_values_fail_where_they_are_small():
    """The guard is needed: at a condition of 1e7 the cheap route has no right digits in float32."""
    W = matrix(20, 30, torch.logspace(0, -7, 20))
    svd = decompose(W, ranks=20).interval(15, 20)
    x, C = torch.randn(50, 30), torch.randn(5, 5)
    U, S, Vh, W32 = svd.U.float(), svd.S.float(), svd.Vh.float(), W.float()
    wanted = (x.double() @ (svd.U @ C.double() @ svd.Vh).mT).float()
    cheap = functional.inner(x, U, S, C, Vh, lambda moved: F.linear(moved, W32)) - F.linear(x, W32)
    safe = functional.factored(x, U, C, Vh)
    assert (cheap - wanted).norm() / wanted.norm() > 1e-3
    assert (safe - wanted).norm() / wanted.norm() < 1e-5


def test_the_cheapest_route_follows_the_number_of_tokens():
    def route(tokens):
        return functional.choose(tokens, 768, 768, 300, backward=True, input_gradient=True)

    assert route(8) == "factored"
    assert route(100_000) == "folded"


def test_no_gradient_no_function():
    W, svd, x, C, b = problem(5, 8, 0, 3)
    y = functional.folded(x, W, b, svd.U, C, svd.Vh)
    assert not y.requires_grad
