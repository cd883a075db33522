"""Ways from a finetune to its base, the choice among them, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from specbasis import open_checkpoint, repair
from specbasis.core.errors import InputError
from specbasis.core.svd import decompose
from specbasis.interventions.samples import Sample
from specbasis.jobs.cache import Cache
from specbasis.jobs.experiments import Row
from specbasis.treatment.points import Ways, grid
from specbasis.treatment.repair import Repair, conclude
from tests.pico import bert_state, finetuned, write

BASE = bert_state()
TUNED = finetuned(BASE, 0.3)
NAME = "encoder.layer.1.output.dense.weight"


def ways(tmp_path: Path, tuned: dict[str, torch.Tensor] = TUNED) -> Ways:
    return Ways.of(open_checkpoint(BASE), open_checkpoint(tuned), Cache(tmp_path / "cache"))


def at(found: Ways, way: str, amount: float, blocks: str = "all") -> dict[str, torch.Tensor]:
    return dict(found.at({"way": way, "amount": amount, "blocks": blocks})[0])


def test_interpolation_moves_every_parameter_along_its_line(tmp_path: Path) -> None:
    tensors = at(ways(tmp_path), "interpolation", 0.3)
    for name, W in BASE.items():
        wanted = W.double() + 0.3 * (TUNED[name].double() - W.double())
        torch.testing.assert_close(tensors[name].double(), wanted, atol=1e-7, rtol=0)


def test_the_ends_of_interpolation_are_the_two_models_bit_for_bit(tmp_path: Path) -> None:
    found = ways(tmp_path)
    for amount, state in ((0.0, BASE), (1.0, TUNED)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in at(found, "interpolation", amount).items())


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_truncation_keeps_the_fewest_directions_that_hold_the_share(tmp_path: Path, share: float) -> None:
    W, T = BASE[NAME].double(), TUNED[NAME].double()
    U, S, Vh = torch.linalg.svd(T - W, full_matrices=False)
    rank = next(k for k in range(1, len(S) + 1) if S[:k].square().sum() >= share * S.square().sum() * (1 - 1e-12))
    wanted = W + (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(at(ways(tmp_path), "truncation", share)[NAME].double(), wanted, atol=1e-7, rtol=0)


def test_directions_put_back_are_the_bases_vectors_with_the_finetunes_values(tmp_path: Path) -> None:
    base, tuned = decompose(BASE[NAME]), decompose(TUNED[NAME])
    sign = torch.sign((base.U * tuned.U).sum(0) + (base.Vh * tuned.Vh).sum(1))
    wanted = (base.U * sign * tuned.S) @ (base.Vh * sign[:, None])
    tensors = at(ways(tmp_path), "directions", 1.0)
    torch.testing.assert_close(tensors[NAME].double(), wanted, atol=1e-7, rtol=0)
    assert torch.equal(tensors["embeddings.word_embeddings.weight"], TUNED["embeddings.word_embeddings.weight"])


def test_depth_is_a_part_of_the_blocks(tmp_path: Path) -> None:
    lower, upper = (at(ways(tmp_path), "directions", 1.0, depth) for depth in ("lower", "upper"))
    for name in BASE:
        assert torch.equal(lower[name], TUNED[name]) or ".layer.0." in name
        assert torch.equal(upper[name], TUNED[name]) or ".layer.1." in name
    assert not torch.equal(lower[NAME.replace("1", "0")], TUNED[NAME.replace("1", "0")])


def test_intruders_are_damped_and_nothing_else(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(5)
    W = BASE[NAME].double()
    # A direction that mixes all of the base's alike is no singular vector of it.
    base = decompose(W)
    mixed = base.U @ torch.full((len(base.S),), len(base.S) ** -0.5, dtype=torch.float64)
    v = torch.nn.functional.normalize(torch.randn(W.shape[1], generator=g, dtype=torch.float64), dim=0)
    tuned = TUNED | {NAME: (W + 20 * mixed[:, None] * v).float()}
    tensors = at(ways(tmp_path, tuned), "intruders", 0.0)
    largest = torch.linalg.matrix_norm(tensors[NAME], 2)
    assert largest < 0.2 * torch.linalg.matrix_norm(tuned[NAME], 2)
    quiet = "encoder.layer.0.output.dense.weight"
    assert torch.equal(at(ways(tmp_path, BASE | {NAME: tuned[NAME]}), "intruders", 0.0)[quiet], BASE[quiet])


def test_the_base_keeps_its_own_modules(tmp_path: Path) -> None:
    base = BASE | {"cls.predictions.bias": torch.ones(3)}
    tuned = {f"bert.{n}": t for n, t in TUNED.items()} | {"classifier.weight": torch.ones(2, 12)}
    found = Ways.of(open_checkpoint(base), open_checkpoint(tuned), Cache(tmp_path))
    own, in_base = found.at({"way": "interpolation", "amount": 0.5, "blocks": "all"})
    assert set(own) == set(tuned)
    assert set(in_base) == set(base)
    assert torch.equal(own[f"bert.{NAME}"], in_base[NAME])


# --- the choice ---------------------------------------------------------------------------------------------------


def row(way: str, amount: float, change: float, back: float, forgotten: tuple[float, float] = (0.5, 0.4)) -> Row:
    values = {
        f"{half}.{name}{end}": value
        for half in ("choice", "report")
        for name, value in (("change", change), ("back", back), ("keep", 0.9 + change), ("recover", 0.0))
        for end in ("", "_low", "_high")
    }
    lost = {
        f"{half}.forgotten{end}": f
        for half in ("choice", "report")
        for end, f in zip(("", "_low", "_high"), (*forgotten, 0.6), strict=True)
    }
    return Row({"way": way, "amount": amount, "blocks": "all"}, values | lost, None, 1.0, "", None)


def test_the_point_that_brings_back_most_within_the_tolerance_is_chosen() -> None:
    rows = [row("interpolation", 0.5, -0.02, 0.9), row("interpolation", 0.8, -0.005, 0.4),
            row("directions", 1.0, -0.009, 0.7), row("truncation", 0.9, 0.001, 0.1)]  # fmt: skip
    record = conclude(rows, 0.01)
    assert record["chosen"]["way"] == "directions"
    assert record["interpolation"]["amount"] == 0.8
    assert "70%" in record["sentence"]
    assert "40%" in record["sentence"]


def test_a_choice_on_few_examples_says_that_it_decides_nothing() -> None:
    chosen = row("directions", 1.0, -0.009, 0.7)
    told = {count: conclude([replace(chosen, values={**chosen.values, "report.examples": count})], 0.01)["sentence"]
            for count in (5, 6)}  # fmt: skip
    assert told[5].startswith("Too few examples to tell (5 that report; want at least 12 in all). Chosen: ")
    assert told[6].startswith("Chosen: ")


def test_nothing_is_chosen_where_nothing_was_forgotten_or_nothing_keeps_the_task() -> None:
    unforgotten = conclude([row("directions", 1.0, 0.0, 0.5, forgotten=(0.01, -0.01))], 0.01)
    assert unforgotten["chosen"] is None
    assert "Nothing was measurably forgotten" in unforgotten["sentence"]
    costly = conclude([row("directions", 1.0, -0.5, 0.9)], 0.01)
    assert costly["chosen"] is None
    assert "No point keeps the task" in costly["sentence"]


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass
class Distance:
    """Scores by the distance of one matrix to that of a model: examples differ by noise of their own."""

    target: str
    metric: str = "near"

    def load(self, source: str) -> nn.Module:
        model = nn.Linear(1, 1)
        model.checkpoint = open_checkpoint(source)  # type: ignore[assignment]
        return model

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        wanted = open_checkpoint(self.target)
        apart = sum(float((model.checkpoint[n].double() - wanted[n].double()).norm()) for n in (NAME, NAME.replace("1", "0")))  # type: ignore[index, union-attr]  # fmt: skip # noqa: E501
        return {"near": Sample(-apart + 0.001 * np.random.default_rng(0).normal(size=(40, 1)))}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("transformers")
    return write(tmp_path / "base.safetensors", BASE), write(tmp_path / "tuned.safetensors", TUNED)


def test_what_is_written_is_the_chosen_point_and_the_same_call_continues(models, tmp_path, monkeypatch) -> None:
    base, tuned = models
    keep, recover = Distance(str(tuned)), Distance(str(base))
    done = repair(base, tuned, keep, recover, tmp_path / "out", tolerance=60, cache=tmp_path / "cache")
    assert len(done.rows) == len(grid()) + 2
    assert done.model is not None
    written = open_checkpoint(done.model)
    wanted = Ways.of(open_checkpoint(base), open_checkpoint(tuned), Cache(tmp_path / "cache")).at(
        done.record["chosen"]
    )
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted[0].items())
    half = {
        row.experiment.get("amount"): row.values for row in done.rows if row.experiment["way"] == "interpolation"
    }
    assert half[0.5]["report.back"] == pytest.approx(0.5, abs=1e-3)  # the distance is linear along the line
    monkeypatch.setattr(Distance, "__call__", lambda *_: pytest.fail("judged again"))
    again = repair(base, tuned, keep, recover, tmp_path / "out", tolerance=60, cache=tmp_path / "cache")
    assert again.record == done.record == Repair.load(tmp_path / "out").record
    assert Repair.load(tmp_path / "out").rows == done.rows
    page = done.report()
    picture, vector = (page.with_name(f"repair.{form}") for form in ("png", "svg"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(
        f">{way}<" in vector.read_text() or way in vector.read_text() for way in ("interpolation", "intruders")
    )


def test_an_evaluator_without_examples_is_refused_in_one_line(models, tmp_path) -> None:
    base, tuned = models

    class Single(Distance):
        def __call__(self, model: nn.Module) -> dict[str, float]:  # type: ignore[override]
            return {"near": 1.0}

    with pytest.raises(InputError, match="scores of single examples"):
        repair(base, tuned, Single(str(tuned)), Distance(str(base)), tmp_path / "out", cache=tmp_path / "cache")


def test_what_trying_again_does_not_mend_is_not_advised(models, tmp_path) -> None:
    base, tuned = models

    class Failing(Distance):
        error: Exception = InputError("no head for this task; want a finetune with its own")

        def __call__(self, model: nn.Module) -> dict[str, Sample]:
            raise self.error

    def refusal() -> str:
        with pytest.raises(InputError) as refused:
            repair(
                base, tuned, Failing(str(tuned)), Distance(str(base)), tmp_path / "out", cache=tmp_path / "cache"
            )
        return str(refused.value)

    assert refusal().endswith("want a finetune with its own")
    assert not (tmp_path / "out").exists()
    Failing.error = TimeoutError("the Hub does not answer")
    assert refusal().endswith("TimeoutError: the Hub does not answer; the same command tries it again")


def test_while_one_repairs_another_is_refused(models, tmp_path) -> None:
    base, tuned = models
    keep, recover = Distance(str(tuned)), Distance(str(base))
    refused: list[str] = []

    def second(_: object) -> None:
        if not refused:
            with pytest.raises(InputError, match="another run is writing here") as error:
                repair(base, tuned, keep, recover, tmp_path / "out", cache=tmp_path / "cache")
            refused.append(str(error.value))

    repair(base, tuned, keep, recover, tmp_path / "out", cache=tmp_path / "cache", progress=second)
    assert refused
    assert not list(tmp_path.glob(".out.*"))


def test_tasks_and_files_can_be_named(models, tmp_path) -> None:
    base, tuned = models
    with pytest.raises(InputError, match=r"'nothing\.txt', and there is no such file"):
        repair(base, tuned, Distance(str(tuned)), "nothing.txt", tmp_path / "out")
    with pytest.raises(InputError, match="'walk', and there is no such file"):
        repair(base, tuned, "walk", Distance(str(base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_task_to_keep_and_to_recover_is_refused(models, tmp_path) -> None:
    base, tuned = models
    with pytest.raises(InputError, match="one task to keep and to recover"):
        repair(base, tuned, Distance(str(base)), Distance(str(base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
