"""Alignment against the score at equal size: closed forms, and the experiment on a pico model."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.linear_model import LinearRegression
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.finetuning.base import load_base
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row, read_experiments
from specbasis.paper import one_task
from specbasis.paper.one_task import ALL, correlations, moved, partial_correlation
from tests.finetuning import lab


def row(setting, seed, alignment, score, size):
    values = {"alignment": {ALL: alignment}, "score": score, "size": size, "examples": 10}
    return Row({"task": "sst2", "frozen": 0, "setting": setting, "seed": seed}, values, None, 1.0, "", None)


def test_a_partial_correlation_is_that_of_the_residuals_of_a_regression():
    random = np.random.default_rng(0)
    z = random.normal(size=50)
    x, y = z**2 + random.normal(size=50), -z + random.normal(size=50)
    ranks = rankdata(z)[:, None]
    features = np.hstack([ranks, ranks**2])
    left = [rankdata(v) - LinearRegression().fit(features, rankdata(v)).predict(features) for v in (x, y)]
    assert partial_correlation(x, y, z) == pytest.approx(pearsonr(*left)[0], abs=1e-9)


def test_what_the_size_says_is_not_said_again_by_alignment(monkeypatch):
    monkeypatch.setattr(one_task, "RESAMPLES", 500)
    random = np.random.default_rng(1)
    size = np.exp(random.normal(size=60))
    fall = -rankdata(size)  # alignment falls with the size, and the score with it; else there is noise alone
    aligned, score = (fall + 3 * random.normal(size=60) for _ in range(2))
    rows = [row(i // 2, i % 2, *v) for i, v in enumerate(zip(aligned, score, size, strict=True))]
    [line] = correlations(rows)
    assert (line["finetunes"], line["settings"]) == (60, 30)
    assert line["score"][0] == pytest.approx(spearmanr(aligned, score)[0])
    assert line["score"][1] > 0.8
    value, low, high = line["score at equal size"]
    assert low < 0 < high
    assert abs(value) < 0.3


def test_where_alignment_is_the_size_nothing_is_left():
    size = np.arange(1.0, 20.0)
    assert np.isnan(partial_correlation(-size, np.random.default_rng(0).normal(size=19), size))


def test_matrices_that_did_not_move_are_left_out(tmp_path):
    base = load_base(str(lab.pico_bert(tmp_path / "base")), GLUE["sst2"]).model
    tuned = copy.deepcopy(base)
    name = "bert.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        weight = tuned.get_parameter(name)
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        S[[0, 1]] = S[[1, 0]]  # the leading two change places, and nothing else does
        weight.copy_((U * S) @ Vh)
    result = moved(base, tuned)
    W = base.get_parameter(name).double()
    assert result["size"] == pytest.approx(float((weight.double() - W).norm() / W.norm()), rel=1e-4)
    ranks = min(one_task.LEADING, len(S))
    assert result["alignment"][ALL] == pytest.approx((ranks - 2) / ranks, abs=1e-3)
    assert not any(part.startswith("shallow") for part in result["alignment"])


def test_the_experiment_runs_from_the_command_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(one_task, "RATES", (1e-2,))
    monkeypatch.setattr(one_task, "AMOUNTS", ((8, 3), (8, 4), (8, 5)))
    monkeypatch.setattr(one_task, "RESAMPLES", 200)
    monkeypatch.setattr(one_task, "FROZEN", (0, 1))
    monkeypatch.setattr(one_task, "HELD_BACK", 4)
    base, glue, out = lab.pico_bert(tmp_path / "base"), lab.glue(tmp_path / "glue"), tmp_path / "out"
    words = ["reproduce", "one-task", "--base", str(base), "--data-dir", str(glue), "--out", str(out)]
    ran = CliRunner().invoke(app, [*words, "--seeds", "1"])
    assert ran.exit_code == 0, ran.output
    rows = read_experiments(out)
    assert len(rows) == 6
    assert all((row.experiment["frozen"] == 1) is ("shallow 1-10" not in row.values["alignment"]) for row in rows)
    assert (out / "one-task.png").stat().st_size > 1000
    assert "6 full finetunes on SST-2, 6 settings" in (out / "one-task.md").read_text()
    lines = (out / "rows.jsonl").read_text()
    assert CliRunner().invoke(app, [*words, "--seeds", "1"]).exit_code == 0
    assert (out / "rows.jsonl").read_text() == lines
