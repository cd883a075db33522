"""The basis ablation on a pico model, through the command; its bases, and its page's figures by other means."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.core.statistics import adjusted
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import read_experiments
from specbasis.paper import ablation
from specbasis.paper.ablation import BASES, Part, chosen_rates, packed, unpacked
from specbasis.paper.ablation_page import Runs, _scores, write
from specbasis.paper.options import AblationOptions
from tests.finetuning import lab


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablation")
    base, other = (str(lab.pico_bert(root / name, seed=seed)) for name, seed in (("base", 0), ("scratch", 5)))
    return root, base, other, str(lab.glue(root / "glue", train=300))


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "PARTS", {"sst2": Part(64, 32, 3), "cola": Part(64, 32, 1)})
        patch.setattr(ablation, "GRADIENT_EXAMPLES", 64)
        yield


@pytest.fixture(scope="module")
def grid(places, small):
    root, base, other, glue = places
    out = root / "out"
    words = ["reproduce", "basis", "--base", base, "--data-dir", glue, "--out", str(out), "--sizes", "2,4"]
    words += ["--seeds", "1,2", "--rates", "0.001,0.02", "--scratch", f"sst2={other}", "--held-back", "100"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    return out, words


def test_a_call_runs_what_it_says_and_the_same_call_runs_nothing(grid):
    out, words = grid
    before = (out / "rows.jsonl").read_bytes()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert (out / "rows.jsonl").read_bytes() == before
    rows = read_experiments(out)
    stages = [(r.experiment["task"], r.experiment.get("size"), r.experiment["stage"]) for r in rows]
    assert stages[:3] == [("sst2", None, "floor"), ("sst2", 2, "search"), ("sst2", 2, "runs")]
    of_task = {r.experiment["task"]: {a["basis"] for a in r.values["arms"]} for r in rows if "arms" in r.values}
    assert of_task["sst2"] == set(BASES)
    assert of_task["cola"] == set(BASES) - {"scratch"}, "no model from scratch was given for it"


def test_scores_are_those_of_the_stored_predictions_and_rates_those_of_the_search(grid):
    rows = read_experiments(grid[0])
    for search, runs in zip(rows[1::2], rows[2::2], strict=False):
        if runs.experiment["stage"] != "runs":
            continue
        count, task = runs.values["examples"], runs.experiment["task"]
        labels = unpacked(runs.values["labels"], count)
        oracle = accuracy_score if task == "sst2" else matthews_corrcoef
        for arm in runs.values["arms"]:
            assert arm["score"] == pytest.approx(oracle(labels, unpacked(arm["predicted"], count)), abs=1e-9)
            assert arm["rate"] == chosen_rates(search)[arm["basis"]]
    assert {a["rate"] for a in rows[1].values["arms"]} == {0.001, 0.02}


def test_one_rate_is_not_searched_for_and_another_head_is_another_folder(grid, places):
    _, words = grid
    out = places[0] / "first"
    at = words.index("--out") + 1
    again = [*words[:at], str(out), *words[at + 1 :], "--tasks", "sst2", "--sizes", "2", "--head", "first"]
    again += ["--rates", "0.02", "--bases", "leading,random,gradient"]
    ran = CliRunner().invoke(app, again)
    assert ran.exit_code == 0, ran.output
    rows = read_experiments(out)
    assert [row.experiment["stage"] for row in rows] == ["floor", "runs"]
    assert {arm["rate"] for arm in rows[1].values["arms"]} == {0.02}
    text = (out / "basis.md").read_text(encoding="utf-8")
    assert "| gradient − leading |" in text
    assert "gradient-shuffled |" not in text
    assert "0.02!" not in text, "an only rate is at no edge"
    mixed = CliRunner().invoke(app, [*words, "--head", "first"])
    assert "without head (now first)" in str(mixed.exception)


def test_the_table_of_two_bases_is_their_difference(grid):
    rows = read_experiments(grid[0])
    runs = next(row for row in rows if row.experiment["stage"] == "runs")
    found = Runs(GLUE["sst2"], 2, runs.values)
    mean, (low, high), p = found.difference("gradient", "leading")
    scores = {b: np.mean([a["score"] for a in runs.values["arms"] if a["basis"] == b]) for b in BASES}
    assert mean == pytest.approx(100 * (scores["gradient"] - scores["leading"]))
    assert low <= mean <= high
    assert mean == pytest.approx(found.difference("gradient")[0] - found.difference("leading")[0])
    losses = {b: np.array([a["train_loss"] for a in runs.values["arms"] if a["basis"] == b]) for b in BASES}
    moved = losses["gradient"] - losses["leading"]
    mean, (low, high), p = found.loss_difference("gradient", "leading")
    test = scipy.stats.ttest_rel(losses["gradient"], losses["leading"])
    interval = test.confidence_interval(0.95)
    assert (mean, low, high, p) == pytest.approx((moved.mean(), *interval, test.pvalue))


def test_nothing_that_is_scored_was_trained_on_or_chosen_on(places, small):
    _, base, _, glue = places
    material = ablation.Material(ablation.checked(AblationOptions(base=base, data_dir=glue, held_back=50)), "sst2")
    assert [len(part) for part in material.parts.values()] == [64, 32, 50]
    assert len(material.data.dev["dev"]) == 12, "the dev set comes first among what is scored"


def test_bases_are_orthonormal_and_what_their_names_say(places, small):
    _, base, other, glue = places
    options = ablation.checked(AblationOptions(base=base, data_dir=glue, scratch=(("sst2", other),), held_back=50))
    material = ablation.Material(options, "sst2")
    for kind in BASES:
        for name, basis in material.basis(kind, 3, 1).items():
            eye = torch.eye(3)
            assert torch.allclose(basis.U.mT @ basis.U, eye, atol=1e-5), kind
            assert torch.allclose(basis.Vh @ basis.Vh.mT, eye, atol=1e-5), kind
            W = material.encoder.matrices[name].weight
            S = torch.linalg.svdvals(W)
            ranks = {"leading": slice(0, 3), "middle": slice(6, 9), "last": slice(13, 16)}.get(kind)
            if ranks is not None:
                core = basis.U.mT @ W @ basis.Vh.mT
                assert torch.allclose(core.abs(), torch.diag(S[ranks]), atol=1e-4), kind
    one, two = (material.basis("random", 3, seed) for seed in (1, 2))
    assert all(not torch.allclose(one[name].U, two[name].U) for name in one)


def test_weighted_scores_are_those_of_repeated_examples():
    random = np.random.default_rng(0)
    labels, classes = random.integers(2, size=40), random.integers(2, size=(3, 40))
    drawn = random.integers(40, size=(5, 40))
    weights = np.stack([np.bincount(d, minlength=40) for d in drawn], axis=1).astype(float)
    for task, oracle in (("sst2", accuracy_score), ("cola", matthews_corrcoef)):
        found = _scores(GLUE[task], classes.astype(float), labels.astype(float), weights)
        expected = [[oracle(labels[d], c[d]) for d in drawn] for c in classes]
        assert found == pytest.approx(np.array(expected), abs=1e-12)


def test_holm_by_its_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    assert adjusted(p, "holm") == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # 4·.005, 3·.01, 2·.03, then at least that


def test_two_classes_are_kept_as_bits():
    classes = np.random.default_rng(1).integers(2, size=37)
    assert (unpacked(packed(classes), 37) == classes).all()


def test_the_page_is_made_of_rows_alone(grid):
    out, _ = grid
    text = (out / "basis.md").read_text(encoding="utf-8")
    for words in (
        "## SST-2",
        "## CoLA",
        "2 seeds, 100 held-out examples",
        "A converged logistic regression",
        "K = 4",
    ):
        assert words in text
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["config"]["parts"]["sst2"]["train"] == 64
    assert (out / "basis.png").stat().st_size > 10_000


def test_sizes_stand_in_order_whatever_order_they_ran_in(grid, tmp_path):
    rows = read_experiments(grid[0])
    for name, ordered in (("as run", rows), ("backwards", list(reversed(rows)))):
        write([row for row in ordered if row.experiment["task"] == "sst2"], "base", tmp_path / name)
    pages = [(tmp_path / name / "basis.md").read_text(encoding="utf-8") for name in ("as run", "backwards")]
    assert "| basis | K = 2 | K = 4 |" in pages[0]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ("mnli",)}, "task 'mnli'"),
        ({"bases": ("leadin",)}, "leading"),
        ({"seeds": (1,)}, "at least two"),
    ],
)
def test_what_cannot_be_run_is_one_line(change, said):
    with pytest.raises(InputError, match=said):
        ablation.checked(AblationOptions(**change))
