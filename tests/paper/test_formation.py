"""The grid on pico models: killed and continued, its claims against arithmetic by hand, its figures and verbs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.jobs.experiments import Row, read_experiments
from specbasis.paper import formation_grid as formation
from specbasis.paper.formation import FIGURES, SMALL, experiments_of, paper, write_outcome
from specbasis.paper.formation_claims import Curves, at_equal_size, claims, markdown
from specbasis.paper.formation_grid import Formation, run_formation
from tests.paper.pico import TINY, training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources of images: stripes of two kinds, and noise."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for source in ("a", "b"):
        pixels = rng.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
        pixels[::2, ::2] = 255
        np.savez(folder / f"{source}.npz", images=pixels, labels=np.arange(90) % 2)
    return folder


def plan_of(data, **changes):
    short = {"steps": 4, "checkpoints": 2, "validations": 1}
    return Formation(
        data=str(data / "a.npz"),
        second=str(data / "b.npz"),
        mae=TINY,
        passes=(((10, 6), (40, 6)),),
        seeds=(0, 1),
        pretraining=training(checkpoints=3, validations=2),
        same_task=training(**short),
        new_task=training(task="classify", **short),
        same_task_images=8,
        new_task_images=8,
        validation=6,
        **changes,
    )


@pytest.fixture(scope="module")
def grid(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    plan = plan_of(data)
    experiments = [
        experiment for experiment in plan.experiments() if experiment.get("task") != "second_data"
    ]  # reconstruction has the other data
    return plan, out, run_formation(plan, out, experiments=experiments)


def test_the_grid_has_every_start_task_and_seed(grid):
    plan, _, rows = grid
    assert [row.error for row in rows] == [None] * 27
    assert len(plan.experiments()) == 2 * (2 * 5 + 4) + 2 + 4
    tasks_run = {"same_task", "true_labels", "random_labels"}
    for seed in plan.seeds:
        for images in (10, 40):
            here = {"phase": "post", "seed": seed, "images": images, "steps": 6}
            assert {row.experiment["task"] for row in rows if here.items() <= row.experiment.items()} == tasks_run
        here = {"phase": "scratch", "seed": seed}
        assert {row.experiment["task"] for row in rows if here.items() <= row.experiment.items()} == tasks_run
    assert rows[0].experiment == {"phase": "pretrain", "seed": 0, "images": 10, "steps": 6}
    first = rows[0].values
    assert first["steps"] == [0, 2, 4, 6]
    one = first["matrices"]["vit.layers.1.mlp.fc2.weight"]
    assert (one["role"], one["block"], one["first"][0], one["update_first"][0]) == ("ffn.down", 1, 1.0, 0.0)
    assert len(first["ffn"]["ffn.up"]["between"]) == 4
    starts = {r.experiment["task"]: r.values["matrices"] for r in rows if r.experiment["phase"] == "scratch"}
    assert all("decoder" not in name and "head" not in name for m in starts.values() for name in m)
    assert len({len(m) for m in starts.values()}) == 1


class Killed(BaseException):
    pass


def test_a_killed_grid_goes_on_to_the_same_rows(grid, data, tmp_path, monkeypatch):
    plan, _, rows = grid
    some = [row.experiment for row in rows[:3]]
    real, calls = formation.train, []

    def train(*args, **kwargs):
        calls.append(args)

        def tell(progress):
            if len(calls) == 3 and progress.done == 3:
                raise Killed

        return real(*args, **kwargs, progress=tell)

    monkeypatch.setattr(formation, "train", train)
    with pytest.raises(Killed):
        run_formation(plan, tmp_path, experiments=some)
    assert len(read_experiments(tmp_path)) == 1
    continued = run_formation(plan, tmp_path, experiments=some)
    assert [row.values for row in continued] == [row.values for row in rows[:3]]


def test_a_claim_is_what_its_definition_says(grid):
    _, _, rows = grid
    found, at_the_end = claims(rows), "alignment at the end"
    by_letter = {
        letter: [c for c in found if c.claim.startswith(letter)] for letter in ("(a)", "(b)", "(c)", "(d)", "(e)")
    }
    assert all(by_letter.values())

    def end(row):
        of = [m for m in row.values["matrices"].values() if m["block"] == 1 and m["role"].startswith("ffn.")]
        return np.mean([m["first"][-1] for m in of])

    posts = {
        (r.experiment["seed"], r.experiment["images"], r.experiment["task"]): end(r)
        for r in rows
        if r.experiment["phase"] == "post"
    }
    slopes = [(posts[s, 40, "true_labels"] - posts[s, 10, "true_labels"]) / math.log2(4) for s in (0, 1)]
    (claim,) = [
        c for c in by_letter["(b)"]
        if c.setting == "true_labels, 6 steps each" and c.group == "final FFN" and c.measure.startswith(at_the_end)
    ]  # fmt: skip
    assert claim.each == pytest.approx(slopes, abs=1e-5)
    assert claim.effect == pytest.approx(np.mean(slopes), abs=1e-5)
    differences = [
        np.mean([posts[s, n, "random_labels"] - posts[s, n, "true_labels"] for n in (10, 40)]) for s in (0, 1)
    ]
    (claim,) = [
        c for c in by_letter["(c)"]
        if c.setting.startswith("from pretrained") and c.group == "final FFN" and c.measure.startswith(at_the_end)
    ]  # fmt: skip
    assert claim.each == pytest.approx(differences, abs=1e-5)
    of_random = [r for r in rows if r.experiment["phase"] == "post" and r.experiment["task"] == "random_labels"]
    losses = [
        np.mean([r.values["log"][-1]["loss"] for r in of_random if r.experiment["seed"] == s]) for s in (0, 1)
    ]
    (claim,) = [
        c for c in found
        if c.measure == "training loss at the end" and c.setting == "random_labels from pretrained weights"
    ]  # fmt: skip
    assert claim.each == pytest.approx(losses, abs=1e-5)
    table = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert len(table) == len(found) + 2


def test_equal_size_is_the_point_on_the_curve():
    fast = Curves(np.array([[1.0, 0.8, 0.2]]), np.array([[0.0, 0.1, 0.5]]), np.zeros(1), 0.0)
    slow = Curves(np.array([[1.0, 0.9, 0.7]]), np.array([[0.0, 0.1, 0.3]]), np.zeros(1), 0.0)
    assert at_equal_size([fast, slow]) == pytest.approx([0.5, 0.7])


@pytest.mark.parametrize(
    "figure", ["fig4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fig9", "fig21"))]
)
def test_figures_and_claims_are_made_from_rows_alone(grid, data, tmp_path, figure):
    _, out, _ = grid
    paths, found = write_outcome(figure, read_experiments(out), tmp_path)
    assert {path.name for path in paths} == {f"{figure}.png", f"{figure}.svg", "claims.json", "claims.md"}
    assert all(path.stat().st_size for path in paths)
    assert {c.claim[:3] for c in found} == set(FIGURES[figure].letters)
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert len(stored) >= len(found)


def test_rows_without_what_a_figure_needs_are_one_line(tmp_path):
    row = Row({"phase": "pretrain", "seed": 0, "images": 1, "steps": 1}, {}, "killed", 0.0, "", None)
    for rows in ([], [row]):
        with pytest.raises(InputError, match="has ended"):
            write_outcome("fig4", rows, tmp_path)


def test_the_papers_plan_and_the_small_one():
    plan = paper()
    assert plan.passes[0][0] == (1000, 3200)
    assert plan.passes[0][-1] == (50_000, 156_400)
    assert (plan.validation, plan.same_task_images, plan.new_task_images) == (5000, 1000, 3000)
    assert len(SMALL.seeds) >= 3
    assert {len(p) for p in SMALL.passes[0]} == {2}
    phases = {experiment["phase"] for experiment in experiments_of("fig9", SMALL)}
    assert phases == {"pretrain", "post", "scratch"}


def test_a_test_set_that_is_too_small_is_said(data, tmp_path):
    plan = replace(plan_of(data), validation=14)
    (row,) = run_formation(plan, tmp_path, experiments=plan.experiments()[:1])
    assert "15 test images; want 22" in row.error


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_verbs_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "images" / f"kind{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    run = tmp_path / "run"
    flags = {"steps": 2, "batch-size": 8, "validation": 4, "checkpoints": 2, "validations": 1, "device": "cpu"}
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    trained = cli("pretrain", "--data", tmp_path / "images", "--out", run, *given)
    assert trained.exit_code == 0, trained.output
    assert "2 steps on 50 images" in trained.output
    followed = cli("track", run, "--out", tmp_path / "track", "--roles", "ffn", "--blocks", "5", "--workers", 1)
    assert followed.exit_code == 0, followed.output
    assert "3 checkpoints, 2 matrices" in followed.output
    assert (tmp_path / "track" / "track.svg").is_file()


def test_reproduce_draws_from_rows_and_checks_its_flags(grid):
    _, out, _ = grid
    drawn = cli("reproduce", "scratch", "--out", out, "--no-run")
    assert drawn.exit_code == 0, drawn.output
    assert "scratch.png" in drawn.output
    for flags in (["--size", "huge"], ["--images", "10"], ["--seeds", "x"]):
        refused = cli("reproduce", "fig9", "--out", out, *flags)
        assert isinstance(refused.exception, InputError)
