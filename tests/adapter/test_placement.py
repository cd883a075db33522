"""A budget of coefficients over all matrices: against brute force, the control, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402

from specbasis.adapter import (  # noqa: E402
    SpectralConfig,
    SpectralLinear,
    initialize_gradient_basis,
    parameter_counts,
    place_coefficients,
    set_positions,
)
from specbasis.core.errors import InputError  # noqa: E402
from specbasis.core.grammar import parse_count  # noqa: E402
from tests.adapter.helpers import randomise  # noqa: E402
from tests.adapter.test_gradients import base, batches, classifier  # noqa: E402, F401

TARGETS = r".*layer\.[01]\.(attention\.self\.value|intermediate\.dense|output\.dense)"

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def adapted(base, **options):  # noqa: F811
    config = {"rank": 12, "target_modules": TARGETS, "task_type": "SEQ_CLS", **options}
    return get_peft_model(classifier(base), SpectralConfig(**config))


def dense_gradients(base, model):  # noqa: F811
    """Autograd's own gradient of each adapted weight of the plain model, under the head as it is."""
    plain = classifier(base).eval()
    sum(len(batch["labels"]) * plain(**batch).loss for batch in batches()).backward()
    return {name: plain.get_submodule(name).weight.grad.double() for name in model.base_model.spectral_layers()}


def places(model):
    """(module, i, j) of every trained coefficient."""
    found = []
    for name, layer in model.base_model.spectral_layers().items():
        if "default" not in layer.adapters:
            continue
        k, m = layer.adapters["default"].interval
        if layer.adapters["default"].pattern == "square":
            at = itertools.product(range(k, m), range(k, m))
        else:
            at = layer.spectral_positions["default"].mT.tolist()
        found += [(name, i, j) for i, j in at]
    return set(found)


@pytest.mark.parametrize("scale", ["none", "sigma"])
@pytest.mark.parametrize("interval", [(0, 12), (3, 9)])
def test_the_largest_squared_gradients_of_all_matrices_win(base, scale, interval):  # noqa: F811
    model = adapted(base, rank=None, interval=interval, scale=scale)
    gradients = dense_gradients(base, model)
    entries, energy = {}, {}
    for name, layer in model.base_model.spectral_layers().items():
        U, S, Vh = torch.linalg.svd(layer.weight_matrix().double(), full_matrices=False)
        for i, j in itertools.product(range(*interval), range(*interval)):
            g = float(U[:, i] @ gradients[name] @ Vh[j])
            energy[name, i, j] = g**2
            entries[name, i, j] = ((float(S[i]) if scale == "sigma" else 1.0) * g) ** 2
    wanted = set(sorted(entries, key=entries.get, reverse=True)[:50])
    placed = place_coefficients(model, batches(), 50, fit_head=False)
    assert places(model) == wanted
    assert parameter_counts(model).adapter == 50
    assert sum(matrix.coefficients for matrix in placed) == 50
    total = sum(float(G.square().sum()) for G in gradients.values())
    for matrix in placed:
        own = {place for place in wanted if place[0] == matrix.module}
        norm = float(gradients[matrix.module].square().sum())
        assert matrix.coefficients == len(own)
        assert matrix.energy == pytest.approx(sum(energy[place] for place in own) / norm, rel=1e-3)
        assert matrix.gradient == pytest.approx(norm / total, rel=1e-3)


def test_in_the_gradients_basis_squares_hold_the_most_energy_that_squares_can(base):  # noqa: F811
    budget = 40
    model = adapted(base, target_modules=TARGETS.replace("(attention.self.value|", "("), basis="gradient")
    spectra = [torch.linalg.svdvals(G) ** 2 for G in dense_gradients(base, model).values()]
    placed = place_coefficients(model, batches(), budget, fit_head=False)
    assert parameter_counts(model).adapter == budget
    sizes, partial = [], 0
    for layer in model.base_model.spectral_layers().values():
        layer_places = {(i, j) for name, i, j in places(model) if name == layer.module_name}
        K = max(n for n in range(13) if {*itertools.product(range(n), range(n))} <= layer_places)
        assert all(max(i, j) <= K for i, j in layer_places), "a square and a part of its next row and column"
        sizes.append(K)
        partial += len(layer_places) != K * K
    assert partial <= 1
    names = [matrix.module for matrix in placed if matrix.coefficients]
    assert len(names) == len(sizes)

    def held(sizes):
        return sum(float(spectrum[:K].sum()) for spectrum, K in zip(spectra, sizes, strict=True))

    by_module = dict(zip(names, sizes, strict=True))
    ours = [by_module.get(matrix.module, 0) for matrix in placed]
    spent = sum(K * K for K in ours)
    every = itertools.product(range(7), repeat=len(spectra))
    assert held(ours) >= max(held(sizes) for sizes in every if sum(K * K for K in sizes) <= spent) * (1 - 1e-9)


def test_all_of_every_square_is_what_was_there_and_one_more_is_refused(base, tmp_path):  # noqa: F811
    model = adapted(base)
    names, every = set(model.base_model.spectral_layers()), 6 * 12**2
    with pytest.raises(
        InputError, match="got a budget of 865 coefficients; the adapted matrices have 864 on their"
    ):
        place_coefficients(model, batches(), every + 1)
    placed = place_coefficients(model, batches(), every)
    assert set(model.base_model.spectral_layers()) == names
    assert model.peft_config["default"].pattern == "square"
    assert sum(matrix.gradient for matrix in placed) == pytest.approx(1)
    assert all(0 < matrix.energy < 1 for matrix in placed), "of 16 ranks 12"


@pytest.mark.parametrize("basis", ["pretrained", "gradient", "random:4", "shuffled"])
@pytest.mark.parametrize("by", ["gradient", "uniform"])
def test_the_same_examples_give_the_same_file_and_the_file_the_same_model(base, tmp_path, basis, by):  # noqa: F811
    logits, found = [], []
    for folder in ("first", "second"):
        model = adapted(base, basis=basis)
        place_coefficients(model, batches(), "60", by=by, seed=3)
        found.append(places(model))
        assert len(found[-1]) == 60
        randomise(model)
        model.save_pretrained(tmp_path / folder)
        with torch.no_grad():
            logits.append(model.eval()(batches()[0]["input_ids"]).logits)
    assert found[0] == found[1]
    assert torch.equal(*logits)
    again = PeftModel.from_pretrained(classifier(base), tmp_path / "first").eval()
    with torch.no_grad():
        assert torch.equal(again(batches()[0]["input_ids"]).logits, logits[0])


def test_the_uniform_control_follows_its_seed_and_no_evidence(base):  # noqa: F811
    found = {}
    for seed, data in ((0, 0), (0, 5), (1, 0)):
        model = adapted(base)
        placed = place_coefficients(model, batches(seed=data), 216, by="uniform", seed=seed)
        found[seed, data] = places(model)
        counts = [matrix.coefficients for matrix in placed]
        assert all(10 < count < 70 for count in counts), "36 each are expected"
        assert all(matrix.energy > 0 for matrix in placed)
    assert found[0, 0] == found[0, 5]
    assert found[0, 0] != found[1, 0]


def test_a_matrix_without_coefficients_is_the_bases_own_again(base, tmp_path):  # noqa: F811
    model = adapted(base)
    first, *others = model.base_model.spectral_layers()
    set_positions(model, {first: torch.tensor([[1, 1, 7], [0, 5, 2]])})
    assert list(model.base_model.spectral_layers()) == [first]
    assert all(isinstance(model.base_model.model.get_submodule(name), nn.Linear) for name in others)
    randomise(model)
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).target_modules == {first}
    with torch.no_grad():
        ids = batches()[0]["input_ids"]
        again = PeftModel.from_pretrained(classifier(base), tmp_path).eval()
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_second_adapter_keeps_the_layers_that_the_first_one_leaves(base):  # noqa: F811
    model = adapted(base)
    config = SpectralConfig(rank=3, target_modules=TARGETS, basis="gradient", task_type="SEQ_CLS")
    model.add_adapter("other", config)
    names = list(model.base_model.spectral_layers())
    set_positions(model, {names[0]: torch.tensor([[0], [0]])})
    place_coefficients(model, batches(), 9, adapter_name="other")
    layers = model.base_model.spectral_layers()
    assert [name for name, layer in layers.items() if "default" in layer.adapters] == names[:1]
    assert len(places(model)) == 1, "the first adapter is as it was"
    randomise(model, std=5)
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        merged = classifier(base)
        merged.get_submodule(names[0]).weight += layers[names[0]].get_delta_weight("default")
        assert torch.allclose(model.eval()(ids).logits, merged.eval()(ids).logits, atol=1e-5)
    model.set_adapter("other")
    model(**batches()[0]).loss.backward()
    trained = [p for n, p in model.named_parameters() if "spectral_M.other" in n]
    assert sum(p.numel() for p in trained) == 9
    assert all(p.grad.abs().sum() > 0 for p in trained)


class Dead(nn.Module):
    """Two branches, of which the loss depends on one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.live, self.dead = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.live(x) + 0 * self.dead(x)


@pytest.mark.parametrize("basis", ["pretrained", "gradient"])
def test_a_matrix_without_a_gradient_gets_nothing(basis):
    config = SpectralConfig(rank=6, target_modules=["live", "dead"], basis=basis)
    model = inject_adapter_in_model(config, Dead())
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    placed = place_coefficients(model, [x], 9, forward_fn=lambda m, x: m(x).square().mean())
    assert [(matrix.module, matrix.coefficients) for matrix in placed] == [("live", 9), ("dead", 0)]
    assert isinstance(model.dead, nn.Linear)
    infinite = inject_adapter_in_model(config, Dead())
    with pytest.raises(InputError, match="live: its gradient over these examples is not finite"):
        place_coefficients(infinite, [x], 9, forward_fn=lambda m, x: m(x).square().mean() * 1e38 * 1e38)


def test_what_cannot_be_is_refused_in_one_line(base):  # noqa: F811
    model = adapted(base)
    for budget in (0, -3, "0", "0.0001%", "sixty", "", "60 000", "1e5", 2.5, True, None, "٦٠", "nan%", "9" * 400):
        with pytest.raises(InputError, match=r"want (a number|at least 1)") as refused:
            place_coefficients(model, batches(), budget)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="got by = 'gradients'; want one of gradient, uniform"):
        place_coefficients(model, batches(), 10, by="gradients")
    with pytest.raises(InputError, match="'absent': got no layer with it"):
        place_coefficients(model, batches(), 10, adapter_name="absent")
    with pytest.raises(InputError, match="got no batches"):
        place_coefficients(model, [], 10)
    with pytest.raises(InputError, match="got positions for nowhere; want modules"):
        set_positions(model, {"nowhere": torch.tensor([[0], [0]])})
    with pytest.raises(InputError, match="0 modules with positions"):
        set_positions(model, {})
    lone = nn.ModuleDict({"lin": SpectralLinear(nn.Linear(4, 4), interval=(0, 2))})
    with pytest.raises(InputError, match="want modules of a PEFT model"):
        set_positions(lone, {"layer": torch.tensor([[0], [0]])})
    name = next(iter(model.base_model.spectral_layers()))
    with pytest.raises(InputError, match=r"outside of ranks \[0, 12\)"):
        set_positions(model, {name: torch.tensor([[0], [12]])})
    randomise(model)
    for call in (place_coefficients, lambda model, data, _: initialize_gradient_basis(model, data)):
        with pytest.raises(InputError, match="coefficients are not zero"):
            call(model, batches(), 10)


def test_a_budget_in_words():
    assert [parse_count(text, 22_000_000) for text in (7, "60000", "60k", "1.5M", "0.1%", " 2 K ")] == [
        7,
        60_000,
        60_000,
        1_500_000,
        22_000,
        2_000,
    ]
