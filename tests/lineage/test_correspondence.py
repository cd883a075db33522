"""p-values of models that are related and of models that are not."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from specbasis.lineage.correspondence import by_label, correspondence, forms, log_p, scores
from specbasis.lineage.fingerprint import fingerprint
from tests.pico import State, bert_state, finetuned

BASE = bert_state(blocks=4, width=64, seed=1)
RECORD = fingerprint(BASE)


def _forms(state: State) -> set[str]:
    query = fingerprint(state)
    return set(forms(query, RECORD, by_label(query, RECORD)))


def test_z_of_independent_models_is_standard_normal() -> None:
    z = []
    models = []
    for seed in range(40):
        state = bert_state(blocks=2, width=32, seed=seed)
        # Tails, and means of columns that all models have in common, as trained weights may have them.
        models.append(fingerprint({n: W**3 + torch.linspace(-1e-3, 1e-3, W.shape[-1]) for n, W in state.items()}))
    for query, last in pairwise(models):
        z += scores(query.roots, last.roots, by_label(query, last))[0].tolist()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(np.mean(z)) < 4 / math.sqrt(len(z))


def test_the_bound_holds_for_signs_of_any_sizes() -> None:
    """The share of random signs whose bound is below p is at most p, whatever the sizes of the products are."""
    random = np.random.default_rng(0)
    for power in (0, 1, 4):
        sizes = random.standard_normal((12, 20)) ** power
        signs = random.choice([-1.0, 1.0], (4000, 12, 20))
        bounds = np.array([math.exp(log_p(*scores(s * sizes, np.ones_like(sizes), _same(12)), 12)) for s in signs])
        for p in (0.3, 0.1, 0.01):
            assert (bounds <= p).mean() <= p


def _same(n: int) -> list[tuple[int, int]]:
    return [(k, k) for k in range(n)]


@pytest.mark.parametrize("shared", [1, 2])
def test_a_table_that_unrelated_models_share_is_no_kinship(shared: int) -> None:
    other = bert_state(blocks=2, width=64, seed=9)
    names = ["embeddings.word_embeddings.weight", "pooler.dense.weight"][:shared]
    query = fingerprint({**other, **{name: BASE[name] for name in names}})
    assert correspondence(query, RECORD).log_p > math.log(0.01)


@pytest.mark.parametrize(("size", "related"), [(0.1, True), (3.0, True), (1e4, False)])
def test_a_finetune_corresponds_until_its_base_is_drowned(size: float, related: bool) -> None:
    assert (correspondence(fingerprint(finetuned(BASE, size, seed=99)), RECORD).log_p < math.log(1e-6)) == related


def test_blocks_are_found_wherever_they_stand() -> None:
    kept = {"0": "1", "1": "3"}
    state = {n: W for n, W in BASE.items() if "layer" not in n}
    for new, old in kept.items():
        start = f"encoder.layer.{old}."
        state |= {n.replace(start, f"encoder.layer.{new}."): W for n, W in BASE.items() if n.startswith(start)}
    found = correspondence(fingerprint(finetuned(state, 0.2)), RECORD)
    assert found.way == "by blocks"
    assert {str(q[1]): str(r[1]) for q, r in found.depth.items() if r} == kept
    assert correspondence(fingerprint(finetuned(BASE, 0.2)), RECORD).depth == {}


def _permuted(scale: bool) -> State:
    g = torch.Generator().manual_seed(3)
    state = dict(BASE)
    for b in range(4):
        order = torch.randperm(256, generator=g)
        factor = torch.exp(torch.randn(256, generator=g)) if scale else torch.ones(256)
        up, down = f"encoder.layer.{b}.intermediate.dense.weight", f"encoder.layer.{b}.output.dense.weight"
        state[up] = (BASE[up] * factor[:, None])[order]
        state[down] = (BASE[down] / factor)[:, order]
    return state


@pytest.mark.parametrize("scale", [False, True])
def test_permuted_and_rescaled_units_are_seen(scale: bool) -> None:
    assert _forms(_permuted(scale)) - {"undecided"} == {"equal", "units in another order or rescaled"}


def test_a_permuted_residual_stream_is_recognised_by_orders_alone() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    state = {n: W[:, order] if W.ndim == 2 and W.shape[1] == 64 else W for n, W in BASE.items()}
    state = {n: W[order] if W.ndim == 2 and W.shape[0] == 64 else W for n, W in state.items()}
    found = correspondence(fingerprint(state), RECORD)
    assert found.way == "without the order of units"
    assert found.log_p < math.log(1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_unrelated_models_correspond_in_no_way(seed: int) -> None:
    query = fingerprint(bert_state(blocks=3 + seed % 2, width=64, seed=100 + seed))
    assert correspondence(query, RECORD).log_p > math.log(0.01)


def _int8(W: torch.Tensor) -> torch.Tensor:
    step = W.abs().amax(-1, keepdim=True) / 127
    return (W / step).round() * step


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda W: W, "equal"),
        (lambda W: W.bfloat16(), "rounded to bfloat16"),
        (lambda W: W.half(), "rounded to float16"),
        (_int8, "quantised"),
        (lambda W: _int8(W).bfloat16(), "quantised"),
        (lambda W: W + 0.0007 * torch.randn(W.shape, generator=torch.Generator().manual_seed(2)), "changed"),
        (lambda W: 1.7 * W, "scaled"),
        (lambda W: torch.where(W.abs() < 0.05, 0, W), "entries pruned"),
        (lambda W: W + 0.05 * torch.randn(W.shape, generator=torch.Generator().manual_seed(2)), "changed"),
        (lambda W: torch.randn(W.shape, generator=torch.Generator().manual_seed(2)), "unlike"),
    ],
)
def test_forms(change: object, form: str) -> None:
    state = {n: change(W) if W.ndim == 2 and min(W.shape) > 32 else W for n, W in BASE.items()}
    # Of a 64 × 64 matrix a random order of its entries cannot be told from a change beyond doubt.
    assert _forms(state) - {"equal", "undecided"} == {form} - {"equal"}


def test_names_of_two_frameworks_meet_by_their_ends_or_their_shapes() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"weight_ih": (128, 32), "weight_hh": (128, 32), "proj": (64, 96)}
    state = {f"rnn.{n}": torch.randn(shape, generator=g) for n, shape in shapes.items()}
    record = fingerprint(state)
    for names in (("x.weight_hh", "x.weight_ih", "x.proj"), ("weight_hh", "weight_ih", "proj")):
        query = fingerprint({n: state[f"rnn.{n.removeprefix('x.')}"] for n in names})
        assert set(forms(query, record, by_label(query, record))) == {"equal"}
    numbered = fingerprint({f"onnx::{k}": W for k, W in enumerate(state.values())})
    assert set(forms(numbered, record, by_label(numbered, record))) == {"equal"}
