"""Where an update lies, by plain linear algebra; and the experiment on a pico model, through the command."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.core.columns import generator_of
from specbasis.core.errors import InputError
from specbasis.core.svd import decompose
from specbasis.jobs.experiments import read_experiments
from specbasis.paper import anatomy
from specbasis.paper.anatomy import EDITS, shares
from tests.finetuning import lab
from tests.helpers.matrices import gaussian

W, DELTA = gaussian(60, 40, 1), 0.1 * gaussian(60, 40, 2)


def test_shares_are_those_of_numpy():
    U, _, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    C = U.T @ DELTA.numpy() @ Vh.T
    total = float((DELTA**2).sum())
    found = shares(W, W + DELTA)
    assert found["size"] == pytest.approx(float(DELTA.norm() / W.norm()), rel=1e-4)
    assert found["thin"] == pytest.approx((C**2).sum() / total, rel=1e-4)
    assert found["thin_chance"] == 40 * 40 / (60 * 40)
    assert set(found) == {"size", "top", "thin", "thin_chance", "10", "30"}, (
        "blocks larger than the matrix are left out"
    )
    part = found["10"]
    values = np.linalg.svd(DELTA.numpy(), compute_uv=False) ** 2
    expected = {
        "leading": (C[:10, :10] ** 2).sum(),
        "middle": (C[15:25, 15:25] ** 2).sum(),
        "last": (C[30:, 30:] ** 2).sum(),
        "diagonal": (np.diag(C)[:10] ** 2).sum(),
        "low_rank": values[:1].sum(),
        "entries": np.sort((C**2).ravel())[-100:].sum(),
        "plain": np.sort((DELTA.numpy() ** 2).ravel())[-100:].sum(),
    }
    for name, value in expected.items():
        assert part[name] == pytest.approx(value / total, rel=1e-4), name


def test_an_update_inside_the_leading_block_is_seen_there_and_kept_by_it():
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    delta = U[:, :10] @ gaussian(10, 10, 3) @ Vh[:10]
    assert shares(W, W + delta)["10"]["leading"] == pytest.approx(1, abs=1e-4)
    factors = decompose(W), decompose(W + delta), decompose(delta)
    kept = EDITS["leading 30"](*factors, generator_of("x"))
    assert torch.allclose(kept, W + delta, atol=1e-9)


def test_edits_do_what_they_are_called():
    T = W + DELTA
    factors = decompose(W), decompose(T), decompose(DELTA)
    edited = {name: edit(*factors, generator_of(name)) for name, edit in EDITS.items()}
    values = torch.linalg.svdvals
    assert torch.allclose(edited["base"], W, atol=1e-9)
    assert torch.allclose(values(edited["base values"]), values(W), atol=1e-9)
    assert torch.allclose(values(edited["base vectors"]), values(T), atol=1e-9)
    for name in ("base values", "base vectors"):
        moved, control = edited[name] - T, edited[f"{name}, rotated"] - T
        assert torch.allclose(values(moved), values(control), atol=1e-9), "as far, with the same spectrum"
        assert abs(float((moved * control).sum() / moved.square().sum())) < 0.2, "in another direction"
    assert torch.allclose(values(edited["rotated"] - W), values(DELTA), atol=1e-9)
    rest = DELTA - (edited["thin basis"] - W)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert float((U.mT @ rest @ Vh.mT).norm()) < 1e-9


def test_the_experiment_runs_from_the_command_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(anatomy, "TRAINED", {"sst2": {"epochs": 1, "learning_rate": 1e-3}})
    base, glue, out = lab.pico_bert(tmp_path / "base"), lab.glue(tmp_path / "glue"), tmp_path / "out"
    words = ["reproduce", "anatomy", "--base", str(base), "--data-dir", str(glue), "--out", str(out)]
    words += ["--tasks", "sst2", "--seeds", "1,2"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    rows = read_experiments(out)
    assert [row.experiment["seed"] for row in rows] == [1, 2]
    for row in rows:
        scores = row.values["scores"]
        assert {"tuned", *EDITS} <= set(scores)
        assert scores["tuned"]["score"] == pytest.approx(row.values["train"]["score"]), (
            "the finetune's own dev score"
        )
        low, high = scores["base"]["interval"]
        assert low <= scores["base"]["difference"] <= high
        assert sum("pooler" in name for name in row.values["matrices"]) == 1
    before = (out / "rows.jsonl").read_bytes()
    assert CliRunner().invoke(app, [*words, "--no-run"]).exit_code == 0
    assert (out / "rows.jsonl").read_bytes() == before
    assert "| base vectors |" in (out / "anatomy.md").read_text(encoding="utf-8")


def test_an_unknown_task_is_one_line(tmp_path):
    words = ["reproduce", "anatomy", "--out", str(tmp_path / "out"), "--tasks", "mnl"]
    with pytest.raises(InputError, match="no task 'mnl'"):
        CliRunner().invoke(app, words, catch_exceptions=False)
