"""Verdicts by kinds of pairs: what a test can tell, its size and power, and what nothing tells."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import specbasis
from specbasis.comparison.comparison import Comparison
from specbasis.comparison.verdict import LEVEL, correspondence, least_cosine, threshold
from specbasis.core.entries import read_entries
from tests.pico import State, bert_state, finetuned


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fact(W: torch.Tensor, T: torch.Tensor) -> dict[str, float]:
    """What the verdict reads of a matrix."""
    return {"out": W.shape[0], "in": W.shape[1], "size": W.numel(), **read_entries(W, T).figures}


def compared(base: State, tuned: State, **options: object) -> Comparison:
    return specbasis.compare(base, tuned, workers=1, **options)


# --- the test of a matrix ---------------------------------------------------------------------------------------


def test_the_size_of_the_test_is_its_level_whatever_the_spectrum() -> None:
    """Independent pairs with flat and with steep spectra and means in common, at a level that can be counted."""
    for decades, mean in ((0.0, 0.0), (1.0, 0.5), (2.0, 1.0)):
        heavy = torch.diag(torch.logspace(0, -decades, 24))
        z = []
        for seed in range(300):
            W, T = (normal(40, 24, seed=2 * seed + side) @ heavy + mean for side in (0, 1))
            z.append(fact(W, T)["weight_cosine_z"])
        assert np.mean(np.array(z) > 2.33) <= 0.01 + 3 * math.sqrt(0.01 / 300)
        assert not any(value > threshold({"out": 40, "in": 24}, 1) for value in z)


def test_the_power_of_the_test_is_what_it_says() -> None:
    """At `least_cosine` nineteen of twenty pairs are found; at a third of it few are."""
    found = {1.0: 0, 1 / 3: 0}
    for seed in range(100):
        W, noise = normal(32, 32, seed=2 * seed), normal(32, 32, seed=2 * seed + 1)
        least = least_cosine(fact(W, W + 4 * noise), 1)
        for share in found:
            cosine = share * least
            m = fact(W, cosine * W + math.sqrt(1 - cosine**2) * noise)
            found[share] += m["weight_cosine_z"] >= threshold(m, 1)
    assert found[1.0] >= 88
    assert found[1 / 3] <= 25


def test_more_matrices_ask_for_more_and_a_measured_deviation_for_the_most() -> None:
    small, large = {"out": 64, "in": 64}, {"out": 768, "in": 768}
    assert threshold(small, 1) == pytest.approx(3.0902, abs=1e-3)  # the normal law at LEVEL
    assert threshold(small, 1) < threshold(small, 100) < threshold(large, 100)
    assert LEVEL == 1e-3


@pytest.mark.parametrize("shape", [(1, 96), (64, 1), (2, 300), (7, 7)])
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_a_matrix_without_power_is_undecided_whatever_it_holds(shape: tuple[int, int], size: float) -> None:
    W = normal(*shape)
    assert correspondence(fact(W, W + size * normal(*shape, seed=1))) == "undecided"
    assert correspondence(fact(W, normal(*shape, seed=1))) == "undecided"
    base = bert_state(width=64) | {"head.weight": W}
    tuned = finetuned(base, 0.05) | {"head.weight": W + normal(*shape, seed=1)}
    c = compared(base, tuned)
    verdict = c.verdicts["state_dict"]
    assert (verdict.kind, verdict.undecided, verdict.unrelated) == ("finetuned", ("head.weight",), ())
    assert not [f for f in c.findings["state_dict"] if f.severity == "problem" and f.kind != "noise"]
    assert (
        compared({"head.weight": W}, {"head.weight": tuned["head.weight"]}).verdicts["state_dict"].kind
        == "undecided"
    )


def test_a_low_ceiling_is_no_foreign_part() -> None:
    """Two directions carry nearly all: even a copy is few deviations from chance, a finetune fewer."""
    base = {f"layers.{i}.weight": normal(64, 64, seed=i) @ torch.diag(torch.logspace(0, -3, 64)) for i in range(7)}
    tuned = {n: W + 1.1 * W.norm() / 64 * normal(64, 64, seed=50 + i) for i, (n, W) in enumerate(base.items())}
    facts = compared(base, tuned).facts["state_dict"].matrices
    assert max(m["weight_cosine_z_limit"] for m in facts) < 45
    assert max(m["weight_cosine"] for m in facts) < 0.75
    verdict = compared(base, tuned).verdicts["state_dict"]
    assert verdict.kind in ("finetuned", "related")
    assert verdict.unrelated == ()


# --- the pair: real trainings, small ----------------------------------------------------------------------------

WIDTHS = (24, 32, 32, 16)


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(WIDTHS) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _trained(net: nn.Sequential, steps: int, seed: int, task: int = 0, frozen: int = 0) -> nn.Sequential:
    """Trained to tell classes of structured inputs that a network makes; batches by seed."""
    teacher, generator = _net(1000 + task), torch.Generator().manual_seed(seed)
    for parameter in list(net.parameters())[:frozen]:
        parameter.requires_grad_(False)
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(steps):
        x = torch.randn(64, WIDTHS[0], generator=generator) * torch.logspace(0.6, -0.6, WIDTHS[0])
        loss = nn.functional.cross_entropy(net(x), teacher(x)[:, :4].argmax(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


def _from(state: State, **how: int) -> State:
    net = _net(0)
    net.load_state_dict(state)
    return _state(_trained(net, **how))


def _state(net: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def base() -> State:
    return _state(_trained(_net(0), 600, 0))


PAIRS: dict[str, tuple[Callable[[State], State], set[str]]] = {
    "finetuned 100 steps": (lambda base: _from(base, steps=100, seed=5), {"finetuned"}),
    "finetuned on another task": (lambda base: _from(base, steps=300, seed=5, task=1), {"finetuned", "related"}),
    "finetuned with frozen layers": (lambda base: _from(base, steps=300, seed=5, task=1, frozen=2), {"finetuned"}),
    "another training of the same start": (lambda base: _state(_trained(_net(0), 600, 9, task=1)), {"related"}),
    "an independent training": (lambda base: _state(_trained(_net(7), 600, 7)), {"independent"}),
    "the start itself": (lambda base: _state(_net(0)), {"related", "finetuned"}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_real_trainings(base: State, pair: str) -> None:
    make, kinds = PAIRS[pair]
    verdict = compared(base, make(base)).verdicts["state_dict"]
    assert verdict.kind in kinds
    if verdict.kind == "related":
        assert "trained from the same initialisation (or from a common base)" in verdict.sentence


# --- forms of a copy --------------------------------------------------------------------------------------------


def _int8(W: torch.Tensor) -> torch.Tensor:
    step = W.abs().amax(-1, keepdim=True) / 127
    return (W / step).round() * step if W.ndim == 2 else W


def test_a_copy_is_one_from_either_side_and_small_parts_do_not_hide_it() -> None:
    full = bert_state(width=64) | {"tiny.weight": normal(4, 40)}
    coarse = {name: _int8(W) for name, W in full.items()} | {"tiny.weight": full["tiny.weight"] + 1e-3}
    for base, tuned in ((coarse, full), (full, coarse)):
        verdict = compared(base, tuned).verdicts["state_dict"]
        assert verdict.kind == "copy"
        assert "quantised" in verdict.sentence


@pytest.mark.parametrize("factor", [0.5, 3.0, -1.0, 1.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiple_is_a_scaled_copy(factor: float, dtype: torch.dtype) -> None:
    base = {name: W.to(dtype) for name, W in bert_state(width=64).items()}
    verdict = compared(base, {name: factor * W for name, W in base.items()}).verdicts["state_dict"]
    if factor != 1.001 or dtype == torch.float32:  # bfloat16 has no number between 1 and 1.0039
        assert verdict.kind == "copy"
        assert "scaled by" in verdict.sentence


def test_a_matrix_of_zeros_is_a_problem_and_not_pruned() -> None:
    base = bert_state(width=64)
    tuned = finetuned(base) | {"pooler.dense.weight": torch.zeros(64, 64)}
    c = compared(base, tuned)
    assert c.verdicts["state_dict"].unrelated == ("pooler.dense.weight",)
    problems = {f.kind: f.matrices for f in c.findings["state_dict"] if f.severity == "problem"}
    assert problems["zeros"] == ("pooler.dense.weight",)
    assert "pruned" not in c.verdicts["state_dict"].sentence


def test_a_tail_below_the_rounding_is_no_adapter() -> None:
    """A full finetune with a falling spectrum, in bfloat16, beside a merged adapter of rank 3."""
    base = {f"layers.{i}.weight": normal(96, 96, seed=i) for i in range(3)}

    def update(seed: int, spectrum: torch.Tensor) -> torch.Tensor:
        U, V = (torch.linalg.qr(normal(96, 96, seed=seed + s))[0] for s in (0, 1))
        return U * spectrum @ V.mT

    falling = 2.0 * torch.arange(1, 97.0) ** -1.3
    adapter = torch.tensor([2.0, 1.8, 1.5] + [0.0] * 93)
    kinds = []
    for spectrum in (falling, adapter):
        tuned = {n: (W + update(10 * i, spectrum)).bfloat16() for i, (n, W) in enumerate(base.items())}
        coarse = {n: W.bfloat16() for n, W in base.items()}
        kinds.append(
            {f.kind for f in compared(coarse, tuned).findings["state_dict"]} & {"low-rank", "below-rounding"}
        )
    assert kinds == [{"below-rounding"}, {"low-rank"}]


# --- what was compared ------------------------------------------------------------------------------------------


def test_the_share_that_was_compared_is_said_everywhere() -> None:
    base = bert_state(width=64)
    kept = "encoder.layer.0.attention.self.query.weight"
    tuned = {name: W if name == kept or W.ndim < 2 else torch.cat([W, W]) for name, W in finetuned(base).items()}
    c = compared(base, tuned)
    verdict = c.verdicts["state_dict"]
    share = 64 * 64 / sum(W.numel() for W in base.values() if W.ndim == 2)
    assert verdict.compared == pytest.approx(share)
    assert f"(partial: {share:.1%} of the matrix parameters were compared)" in verdict.sentence
    assert verdict.sentence in c._repr_html_()
    left = c.summary()["pairs"]["state_dict"]["not_compared"]
    assert sum(item["size"] for item in left) == sum(
        W.numel() for n, W in base.items() if W.ndim == 2 and n != kept
    )
    whole = compared(base, finetuned(base)).verdicts["state_dict"]
    assert whole.compared == 1.0
    assert "partial" not in whole.sentence
    failed = compared(base, finetuned(base) | {kept: torch.full((64, 64), math.nan)}).verdicts["state_dict"]
    assert failed.compared == pytest.approx(1 - share)


def test_means_are_of_what_can_turn() -> None:
    """Frozen matrices and sides that are too short have an alignment of 1, which says nothing."""
    trained = {"layers.0.weight": normal(32, 40), "layers.1.weight": normal(32, 40, seed=1)}
    still = {f"frozen.{i}.weight": normal(32, 40, seed=2 + i) for i in range(6)}
    base = {**trained, **still, "row.weight": normal(1, 40)}
    tuned = {n: W if n in still else W + normal(*W.shape, seed=9) for n, W in base.items()}
    alone = compared(trained, {n: tuned[n] for n in trained}).summaries["state_dict"][-1]
    c = compared(base, tuned)
    line = c.summaries["state_dict"][-1]
    assert (line.matrices, line.frozen, line.short) == (9, 6, 1)
    assert line.top10[0] == pytest.approx(alone.top10[0])
    assert line.chance[0] == pytest.approx(alone.chance[0])
    assert "6 frozen of 9 matrices, and the short side of 1 matrix" in c._repr_html_()
    whole = compared(still, dict(still)).summaries["state_dict"][-1]
    assert whole.top10 == (1.0, 1.0)


def test_a_mean_over_thirty_ranks_is_of_thirty() -> None:
    base = bert_state(width=64)
    tuned = finetuned(base, 0.2)
    few, many = (compared(base, tuned, ranks=ranks).summaries["state_dict"][-1] for ranks in (16, 40))
    assert few.top10 == pytest.approx(many.top10)
    assert np.isnan(few.top30).all()
    assert np.isfinite(many.top30).all()
    narrow = bert_state(width=12)  # of which there are no thirty
    assert np.isfinite(compared(narrow, finetuned(narrow)).summaries["state_dict"][-1].top30).all()
