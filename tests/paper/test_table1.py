"""Tab. 1 and the controls: which runs there are, what the table says of rows, and a real grid on a pico model."""

import hashlib
import itertools
import json
import re
from dataclasses import replace
from functools import partial
from unittest.mock import ANY

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance
from sklearn.linear_model import LogisticRegression, Ridge
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.finetuning import train
from specbasis.finetuning.methods import METHODS, TABLE_5
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row, read_experiments
from specbasis.paper import table1
from specbasis.paper.floors import FLOORS, floor
from specbasis.paper.grid import _data, scaled_rate, whole_task
from specbasis.paper.options import ScoreboardOptions
from specbasis.paper.scoreboard import front
from specbasis.paper.table1 import comparison, lines
from specbasis.paper.table1_page import markdown, printed, write
from tests.finetuning import lab
from tests.finetuning.test_heads import mean_of


def page(what, rows):
    return markdown(what, lines(what, rows), rows, "pico")


def row(cell, score, error=None, predictions=None):
    values = {
        **({"predictions": predictions} if predictions else {}),
        "score": score,
        "parameters": {"adapter": 90000, "head": 770, "total": 10**7},
        "peak_memory_bytes": 2e8,
        "cpu_seconds_per_epoch": 30.0,
        "seconds_per_epoch": 40.0,
        "file_bytes": 5e6,
        "forgetting": {"before": 0.9, "after": 1.0},
    }
    return Row(cell.row(), {} if error else values, error, 1.0, "2026", None)


def test_the_default_is_the_papers_protocol():
    what = comparison("table1")
    assert len(what.tasks) == 8
    assert what.seeds == (42,)
    assert set(what.methods) == set(table1.COMPARED)
    for task, (epochs, rate) in TABLE_5.items():
        cell = what.cell(task, "spectral", 42, {})
        assert (cell.epochs, cell.learning_rate, cell.examples) == (epochs, rate, None)
    assert {method for method in table1.COMPARED + table1.CONTROLS if method != "scratch"} == set(METHODS)


def test_the_papers_numbers_agree_with_the_averages_that_it_prints():
    for line in printed()["row"]:
        assert np.mean(line["scores"]) == pytest.approx(line["average"], abs=0.011), line["printed"]


def test_seeds_are_outermost_so_that_a_partial_grid_is_a_table():
    what = comparison("table1", tasks=["rte", "sst2"], methods=["spectral", "lora"], seeds=[1, 2])
    assert [cell.seed for cell in what.cells({})] == [1] * 4 + [2] * 4


def test_mean_spread_and_paired_test_are_those_of_scipy_and_missing_runs_stay_empty():
    what = comparison("table1", tasks=["sst2", "rte"], methods=["spectral", "lora", "full"], seeds=[1, 2, 3])
    ours, lora = [0.80, 0.83, 0.84], [0.85, 0.84, 0.88]
    rows = [
        *(row(what.cell("sst2", "spectral", seed, {}), s) for seed, s in zip((1, 2, 3), ours, strict=True)),
        *(row(what.cell("sst2", "lora", seed, {}), s) for seed, s in zip((1, 2, 3), lora, strict=True)),
        row(what.cell("sst2", "full", 2, {}), 0.9),
        row(what.cell("sst2", "full", 3, {}), 0.0, error="RuntimeError: out of memory"),
    ]
    found = {(line.task, line.method): line for line in lines(what, rows)}
    line = found["sst2", "lora"]
    assert line.scores == dict(zip((1, 2, 3), lora, strict=True))
    assert line.differences["spectral"].mean == pytest.approx(np.mean(lora) - np.mean(ours))
    assert line.differences["spectral"].p == pytest.approx(stats.ttest_rel(lora, ours).pvalue)
    assert found["sst2", "full"].differences["spectral"].mean == pytest.approx(
        0.9 - 0.83
    )  # on the one seed that both have
    assert found["sst2", "full"].differences["spectral"].p is None
    text = page(what, rows)
    assert "7 of 18 runs" in text
    assert "| Full FT | 90,000 | 0.9 | 90.00 (1) | – |" in text
    assert f"| LoRA-K | 90,000 | 0.9 | 85.67 ± {100 * np.std(lora, ddof=1):.2f} | – |" in text
    assert "RuntimeError: out of memory" in text
    assert "| Our method | 0.36 M | 95.53 | 84.12 |" in text


def said(task, quality, seed):
    """A row's predictions that are right more often the higher the quality."""
    random = np.random.default_rng(seed)
    if GLUE[task].regression:
        labels = np.random.default_rng(0).uniform(0, 5, 80)
        one = Predictions(labels * quality + random.normal(size=80), labels)
    else:
        labels = np.random.default_rng(0).integers(0, 2, 80).astype(float)
        one = Predictions(np.where(random.random(80) < quality, labels, 1 - labels), labels)
    return {"dev": one.packed()}, GLUE[task].score(one.scores(GLUE[task]))


@pytest.mark.parametrize("task", ["sst2", "cola", "stsb"])
def test_the_interval_of_a_difference_is_a_paired_bootstrap_over_the_dev_set(task, tmp_path):
    what = comparison("table1", tasks=[task], methods=["spectral", "lora"], seeds=[1, 2])
    rows, each = [], {"spectral": [], "lora": []}
    for (method, quality), seed in itertools.product((("spectral", 0.7), ("lora", 0.9)), (1, 2)):
        predictions, score = said(task, quality, seed)
        rows.append(row(what.cell(task, method, seed, {}), score, predictions=predictions))
        each[method].append(Predictions.unpacked(predictions["dev"]))

    def difference(index):
        ours, theirs = (
            [GLUE[task].score(one.take(index).scores(GLUE[task])) for one in each[name]] for name in each
        )
        return np.mean(theirs) - np.mean(ours)

    line = lines(what, rows)[1]
    oracle = stats.bootstrap(
        (np.arange(80),), difference, vectorized=False, method="percentile", n_resamples=2000, rng=1
    ).confidence_interval
    np.testing.assert_allclose(line.differences["spectral"].interval, [oracle.low, oracle.high], atol=0.03)
    assert (
        f"{100 * line.differences['spectral'].mean:+.2f} [{100 * line.differences['spectral'].interval[0]:+.2f}, "
        in page(what, rows)
    )
    one = Predictions.unpacked(rows[0].values["predictions"]["dev"])
    chance = max(one.labels.mean(), 1 - one.labels.mean()) if task == "sst2" else 0.0
    assert f"| Always the most frequent class | – | – | {100 * chance:.2f} |" in page(what, rows)
    written = write(what, rows, "pico", tmp_path)
    assert [path.name for path in written] == ["table1.md", "table1.png", "table1.svg"]
    without = {name: value for name, value in rows[-1].values.items() if name != "predictions"}
    assert lines(what, [*rows[:3], replace(rows[3], values=without)])[1].differences["spectral"].interval is None


def test_every_rank_of_the_spectral_method_is_a_reference():
    what = comparison("table1", tasks=["rte"], methods=["spectral", "spectral@300", "lora"])
    scores = {"spectral": 0.5, "spectral@300": 0.6, "lora": 0.65}
    rows = [row(what.cell("rte", method, 42, {}), score) for method, score in scores.items()]
    found = {line.method: line.differences for line in lines(what, rows)}
    assert {name: one.mean for name, one in found["lora"].items()} == pytest.approx(
        {"spectral": 0.15, "spectral@300": 0.05}
    )
    assert list(found["spectral"]) == ["spectral@300"]
    text = page(what, rows)
    assert text.index("## Difference to: Spectral\n") < text.index("## Difference to: Spectral, K = 300\n")


def searched(what, scores):
    """Rows of a search in which each factor times the method's own rate scored so much, by task."""
    found = []
    while len(cells := what.search_cells(found)) > len(found):
        found = [row(c, scores[c.task][round(c.learning_rate / scaled_rate(c.method, c.task), 6)]) for c in cells]
    return found


def test_a_search_chooses_on_train_of_each_task_for_the_methods_that_share_it():
    methods, tasks = ["spectral", "spectral-random"], ["sst2", "rte"]
    what = comparison("controls", methods=methods, tasks=tasks, search=(1.0, 3.0, 9.0))
    cells = what.search_cells()
    assert {(c.task, c.method, c.seed, c.examples, c.selection) for c in cells} == {
        ("sst2", "spectral", 0, 2000, 1000),
        ("rte", "spectral", 0, 1660, 830),  # RTE's train holds 2490
    }
    assert what.factors([row(cell, 0.7) for cell in cells[:2]]) == {}  # not complete yet
    rows = searched(what, {"sst2": {1: 0.7, 3: 0.8, 9: 0.75}, "rte": {1: 0.5, 3: 0.5, 9: 0.6, 27: 0.5}})
    factors = what.factors(rows)
    assert factors == {("sst2", "spectral"): 3.0, ("rte", "spectral"): 9.0}
    assert len(rows) == 3 + 4
    assert what.cell("sst2", "spectral-random", 42, factors).learning_rate == pytest.approx(3e-4)
    assert what.cell("rte", "spectral-random", 42, factors).learning_rate == pytest.approx(9 * 2e-4)
    assert what.cell("sst2", "spectral", 42, {}).learning_rate == pytest.approx(1e-4)
    text = page(what, rows)
    assert "| Spectral | 0.0003 (×3) | 0.0018 (×9) |" in text
    assert "(factor of Spectral) | 0.0003 (×3) |" in text
    assert "2000 (RTE 1660) examples, 2 epochs, seed 0, scored on 1000 (RTE 830) others" in text


def test_one_task_can_be_searched_for_all():
    what = comparison(
        "table1", methods=["spectral"], tasks=["sst2", "rte"], search=(1.0, 3.0, 9.0), search_task="sst2"
    )
    rows = searched(what, {"sst2": {1: 0.7, 3: 0.8, 9: 0.75}})
    assert len(rows) == 3
    assert what.factors(rows) == {("sst2", "spectral"): 3.0, ("rte", "spectral"): 3.0}


@pytest.mark.parametrize(
    ("scores", "best", "runs"),
    [
        ({1: 0.7, 4: 0.8, 16: 0.9, 64: 0.8}, "0.0016 (×16)", 4),
        ({1: 0.7, 4: 0.6, 0.25: 0.8, 0.0625: 0.9, 0.015625: 0.91}, "1.5625e-06 (×0.015625*)", 5),
        ({1: 0.7, 4: 0.8, 16: 0.8}, "0.0004 (×4)", 3),
        ({0.25: 0.0, 1: 0.0, 4: 0.0}, "0.0001 (×1)", 3),  # nothing was learned: the published rate
        ({1: 0.1, 4: 0.2, 16: 0.3, 64: 0.4, 256: 0.5}, "0.0256 (×256*)", 5),
    ],
)
def test_a_search_goes_beyond_an_end_that_is_best_but_not_for_ever(scores, best, runs):
    what = comparison("controls", methods=["spectral"], search=(4.0, 1.0))
    rows = searched(what, {"sst2": scores})
    assert len(rows) == runs
    assert f"| Spectral | {best} |" in page(what, rows)


def test_a_failed_run_of_a_search_leaves_the_method_unsearched_and_ends():
    what = comparison("controls", methods=["spectral"], search=(1.0, 4.0))
    cells = what.search_cells()
    rows = [row(cells[0], 0.7), row(cells[1], 0.0, error="RuntimeError: no")]
    assert what.search_cells(rows) == cells
    assert what.factors(rows) == {}
    assert "0.0001 (not searched yet)" in page(what, rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["lorra"]}, "got method 'lorra'"),
        ({"methods": ["spectral@x"]}, "want NAME or NAME@RANK"),
        ({"tasks": ["snli"]}, "got task 'snli'"),
        ({"tasks": ["wnli"]}, "the paper has no epochs for WNLI; say --epochs wnli=NUMBER"),
        ({"seeds": []}, "got no seeds"),
    ],
)
def test_what_does_not_exist_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        comparison("table1", **given)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("grid")
    lab.pico_bert(place / "base", sentence_encoder=True)
    lab.glue(place / "glue", train=40, dev=20)
    return place


def typed(place, *words):
    base = ["--base", place / "base", "--data-dir", place / "glue"]
    return CliRunner().invoke(app, ["reproduce", *map(str, [*words, *base])])


def test_controls_run_resume_and_are_rebuilt_from_rows_alone(place, tmp_path, monkeypatch):
    out = tmp_path / "rows"
    words = ["controls", "--out", out, "--epochs", "1", "--seeds", "1,2", "--methods"]
    done = typed(place, *words, "scratch,spectral-scratch,probe")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "rows-models/scratch-sst2/model.safetensors").is_file()
    assert len(read_experiments(out)) == 6
    config = json.loads((out / "manifest.json").read_text())["config"]
    assert config["base"].endswith("/base")
    assert config["base_sha256"] == hashlib.sha256((place / "base/model.safetensors").read_bytes()).hexdigest()
    before = (out / "rows.jsonl").read_bytes()

    def never(*_, **__):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(train, "train", never)
    done = typed(place, *words, "scratch,spectral-scratch,probe,spectral")  # the last is new, and fails
    assert done.exit_code == 2
    assert (out / "rows.jsonl").read_bytes().startswith(before)
    assert "a finished cell was run again" in (out / "controls.md").read_text(encoding="utf-8")
    shown = typed(place, *words, "scratch,probe", "--no-run")
    assert shown.exit_code == 0
    assert re.search(r"\| Full, random start \| [\d,]+ \| [\d.]+ \| \d+\.\d\d ± \d+\.\d\d \|", shown.output)


def test_models_are_kept_where_they_are_asked_for_and_it_is_said_where_they_are_not(place, tmp_path):
    out = tmp_path / "rows"
    words = ["table1", "--out", out, "--tasks", "sst2", "--epochs", "1", "--seeds", "3,4", "--methods"]
    done = typed(place, *words, "bitfit,probe", "--keep", "lora")
    assert isinstance(done.exception, InputError)
    assert "--keep got 'lora'; want some of this grid's methods: bitfit, probe" in str(done.exception)
    assert typed(place, *words, "probe").exit_code == 0
    done = typed(place, *words, "bitfit,probe", "--keep", "bitfit,probe")
    assert done.exit_code == 0, done.output
    kept = tmp_path / "rows-models/bitfit-sst2"
    assert f"kept: {kept}" in done.output
    assert (kept / "trained.safetensors").is_file()
    assert "not kept: probe on sst2, whose row is older than --keep" in done.output
    done = typed(place, *words[:-3], "--seeds", "x")
    assert "--seeds got 'x'; want numbers" in str(done.exception)


def test_figure_5_is_written_with_its_axes(place, tmp_path):
    out = tmp_path / "rows"
    done = typed(place, "fig5b", "--out", out, "--task", "sst2", "--seeds", "1,2", "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert {"fig5b.md", "fig5b.svg", "fig5b.png"} <= {path.name for path in out.iterdir()}
    assert "| 1, 2 | 0 … 16 | 1,024 |" in (out / "fig5b.md").read_text(encoding="utf-8")
    assert "<!-- blocks that are adapted -->" in (out / "fig5b.svg").read_text(encoding="utf-8")


# --- the scoreboard -----------------------------------------------------------------------------------------------


def test_a_method_of_the_scoreboard_is_searched_at_its_own_size_and_scored_on_what_nothing_uses():
    what = comparison("scoreboard", ScoreboardOptions())
    assert (what.epochs["cola"], what.examples, what.held_out) == (2, {"sst2": 8000}, 5000)
    ours = what.cell("sst2", "spectral@basis=gradient@budget=0.1%", 42, {})
    assert (ours.method, ours.basis, ours.budget, ours.held_out) == ("spectral", "gradient", "0.1%", 5000)
    assert what.cell("cola", "lora@1", 42, {}).held_out is None
    assert what.cell("cola", "lora@1", 42, {}).rank == 1
    searched = {(cell.method, cell.rank, cell.basis, cell.budget) for cell in what.search_cells()}
    assert {("lora", None, None, None), ("lora", 1, None, None)} <= searched
    assert len(searched) == len(what.methods) - len(FLOORS)
    assert what.references == ["spectral@basis=gradient@budget=0.1%"]


def test_the_held_out_examples_are_in_no_training_and_in_no_search(place):
    data_dir = str(place / "glue")
    whole = whole_task("sst2", data_dir=data_dir).train
    scored = _data("sst2", data_dir, 20, None, 10)
    searched = _data("sst2", data_dir, 15, 10, None)
    held = set(scored.dev["held-out"].inputs)
    assert len(scored.dev["held-out"]) == 10
    assert len(scored.train) == 20
    rows = [set(split.rows) for split in (scored.dev["held-out"], scored.train)]
    assert not rows[0] & rows[1]
    for split in (searched.train, *searched.dev.values()):
        assert not rows[0] & set(split.rows)
    assert held <= set(whole.inputs)
    with pytest.raises(InputError, match="train holds 40 examples; got 30 to score on and 20 to train on"):
        _data("sst2", data_dir, 20, None, 30)
    with pytest.raises(InputError, match="got 10 to score on and 31 to train on or to search learning rates on"):
        _data("sst2", data_dir, 20, None, 10, 31)


def test_the_front_is_what_none_beats_for_as_little():
    what = comparison("scoreboard", ScoreboardOptions(tasks=("sst2",), seeds=(1,)))
    sizes = {"probe": (0, 0.70), "bitfit": (25_728, 0.80), "lora": (331_776, 0.85), "spectral": (90_000, 0.79)}
    rows = []
    for method, (size, score) in sizes.items():
        made = row(what.cell("sst2", method, 1, {}), score)
        rows.append(
            replace(made, values={**made.values, "parameters": {"adapter": size, "head": 2, "total": 10**7}})
        )
    table = [line for line in lines(replace(what, search=None), rows) if line.scores]
    assert [line.method for line in front(table)] == ["probe", "bitfit", "lora"]


def test_the_scoreboard_runs_and_is_drawn_again_from_its_rows(place, tmp_path):
    out = tmp_path / "rows"
    words = ["scoreboard", "--out", out, "--tasks", "sst2,stsb", "--examples", "sst2=20", "--held-out", "20"]
    words += ["--search", "", "--seeds", "1", "--methods", "spectral@budget=20,lora@1,probe,cosine,converged-probe"]
    words += ["--epochs", "1"]
    done = typed(place, *words)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "manifest.json").read_text())["config"]["protocol"] == {
        "group_by_length": True,
        "head": "mean",
    }
    ran = {(row.experiment["task"], row.experiment["method"]): row.values for row in read_experiments(out)}
    assert len(ran) == 9, "there is no cosine of one text"
    assert ran["stsb", "cosine"]["parameters"]["head"] == 0
    assert ran["sst2", "spectral"]["parameters"] == {"adapter": 20, "head": 34, "total": ANY}
    assert ran["stsb", "spectral"]["parameters"]["head"] == 4 * 16 + 1, "u, v, |u − v|, u·v"
    assert "held-out" in ran["sst2", "probe"]["predictions"]
    page = (out / "scoreboard.md").read_text(encoding="utf-8")
    assert "on 20 held-out examples of train (SST-2) or dev" in page
    assert "## The front" in page
    drawn = (out / "scoreboard.svg").read_text(encoding="utf-8")
    assert "<!-- trained numbers, with the head -->" in drawn
    again = typed(place, *words, "--no-run")
    assert again.exit_code == 0
    assert (out / "scoreboard.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_floors_are_what_scikit_learn_and_scipy_make_of_the_frozen_means(place, task):
    data = load_task(task, data_dir=place / "glue")

    def means(split):
        rows = [[mean_of(place / "base", text).detach().double() for text in texts] for texts in split.inputs]
        return [row if len(row) == 1 else [*row, (row[0] - row[1]).abs(), row[0] * row[1]] for row in rows]

    train, dev = ([np.concatenate(row) for row in means(split)] for split in (data.train, data.dev["dev"]))
    found = floor("converged-probe", str(place / "base"), data, "mean")
    said = Predictions.unpacked(found["predictions"]["dev"]).predicted
    centre = np.mean(train, axis=0)
    unit = np.sqrt(np.square(train - centre).mean())
    kind = Ridge if task == "stsb" else partial(LogisticRegression, tol=1e-8, max_iter=10_000)
    oracle = kind().fit((train - centre) / unit, data.train.labels).predict((dev - centre) / unit)
    np.testing.assert_allclose(said, oracle, atol=2e-3)
    if task == "stsb":
        found = floor("cosine", str(place / "base"), data, "mean")
        cosines = [1 - distance.cosine(row[0], row[1]) for row in means(data.dev["dev"])]
        labels = data.dev["dev"].labels
        wanted = (stats.pearsonr(cosines, labels)[0] + stats.spearmanr(cosines, labels)[0]) / 2
        assert found["score"] == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(InputError, match="want --head mean"):
        floor("cosine", str(place / "base"), data, "first")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        *((f"spectral@{odd}", "want NAME or NAME@RANK") for odd in ("", "x", "seed=1", "rank=x", "basis=")),
        ("lora@8@rank=4", "want NAME or NAME@RANK"),
        ("lora@0", "want lora@1 or more"),
        ("converged-probe@3", "want converged-probe"),
        ("lora@budget=100", "lora takes a rank alone"),
        ("psoft@basis=gradient", "psoft takes a rank alone"),
        ("spectral@basis=foo", "got basis = 'foo'; want one of"),
        ("spectral@budget=abc", "abc"),
    ],
)
def test_a_method_that_could_not_run_is_refused_before_any_does(method, said):
    with pytest.raises(InputError, match=said):
        comparison("scoreboard", ScoreboardOptions(methods=(method,)))


def test_floors_need_the_mean_and_are_drawn_alone(place, tmp_path):
    with pytest.raises(InputError, match="got converged-probe with a head on the first state; want --head mean"):
        comparison("table1", methods=["converged-probe"])
    words = [
        "scoreboard",
        "--out",
        tmp_path / "rows",
        "--tasks",
        "sst2",
        "--examples",
        "sst2=20",
        "--held-out",
        "20",
    ]
    done = typed(place, *words, "--search", "", "--seeds", "1,2", "--methods", "converged-probe")
    assert done.exit_code == 0, done.output
    assert "1 of 1 runs" in done.output
    assert "LOAD REPORT" not in done.output
