"""Alignment over checkpoints against torch.linalg.svd and `compare`; series with everything wrong in them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specbasis import compare, load
from specbasis.checkpoint import hub
from specbasis.core.errors import InputError
from specbasis.figures.tracking import write_track_figure
from specbasis.tracking import trajectory
from specbasis.tracking.runs import open_series
from specbasis.tracking.track import load_tracking, track
from specbasis.tracking.trajectory import follow, pairwise_distance
from tests.pico import bert_state, write


def walk(count, shape=(12, 8), size=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    steps = [torch.randn(*shape, generator=g) * (1.0 if i == 0 else size) for i in range(count)]
    return list(torch.stack(steps).cumsum(0))


def states(count, blocks=1, seed=0):
    state = bert_state(blocks=blocks, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield dict(state)
        state = {name: W + 0.01 * torch.randn(W.shape, generator=g) for name, W in state.items()}


def run_folder(tmp_path, steps=(10, 20, 30, 40), name="checkpoint-{}"):
    for step, state in zip(steps, states(len(steps)), strict=True):
        write(tmp_path / name.format(step) / "model.safetensors", state)
    return tmp_path


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_alignment_and_distance_of_every_pair(shape):
    matrices = walk(4, shape)
    t = follow(matrices.__getitem__, 4, ranks=5)
    exact = [torch.linalg.svd(W.double(), full_matrices=False) for W in matrices]
    for a in range(4):
        for b in range(4):
            left = (exact[a][0] * exact[b][0]).sum(0).abs()[:5]
            right = (exact[a][2] * exact[b][2]).sum(1).abs()[:5]
            bound = t.alignment_bound()[a, b] + 1e-12
            assert ((t.alignment("left")[a, b] - left).abs() <= bound).all()
            assert ((t.alignment("right")[a, b] - right).abs() <= bound).all()
            want = torch.linalg.norm(matrices[a].double() - matrices[b])
            assert float(t.distance[a, b]) == pytest.approx(float(want), rel=1e-12)
            assert float(t.mean_alignment(2)[a, b]) == pytest.approx(float(left[:2].sum() + right[:2].sum()) / 4)
    assert torch.equal(t.alignment("left").diagonal().unique(), torch.ones(1, dtype=torch.float64))


def test_distances_keep_their_digits_where_a_gram_matrix_loses_them():
    g = torch.Generator().manual_seed(0)
    X = 3 + torch.logspace(0, -9, 12, dtype=torch.float64)[:, None] * torch.randn(
        12, 500, dtype=torch.float64, generator=g
    )
    X[5] = X[2]
    want = torch.stack([(X - x).norm(dim=1) for x in X])
    torch.testing.assert_close(pairwise_distance(X), want, rtol=1e-11, atol=0)


def test_large_matrices_get_the_distances_that_fit(monkeypatch):
    matrices = walk(5)
    whole = follow(matrices.__getitem__, 5, ranks=3).distance
    monkeypatch.setattr(trajectory, "PAIRWISE_BYTES", 1)
    some = follow(matrices.__getitem__, 5, ranks=3).distance
    known = {(0, b) for b in range(5)} | {(a, 4) for a in range(5)} | {(a, a + 1) for a in range(4)}
    for a in range(5):
        for b in range(a + 1, 5):
            assert some[a, b].isnan() != ((a, b) in known)
            assert (a, b) not in known or float(some[a, b]) == pytest.approx(float(whole[a, b]))


def test_a_warm_started_iteration_agrees_with_the_whole_decomposition():
    g = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=g))[0] * 0.8 ** torch.arange(64)
    noise = torch.randn(3, 64, 64, dtype=torch.float64, generator=g)
    matrices = [base, *(base + 1e-3 * N for N in noise)]
    exact = follow(matrices.__getitem__, 4, ranks=4)
    iterated = follow(matrices.__getitem__, 4, ranks=4, approximate=32)
    torch.testing.assert_close(iterated.alignment("right"), exact.alignment("right"), rtol=0, atol=1e-6)


def test_a_matrix_with_nan_is_left_out_and_named():
    matrices = walk(4)
    matrices[2][0, 0] = float("nan")
    t = follow(matrices.__getitem__, 4, ranks=3)
    assert t.index == (0, 1, 3)
    assert "NaN" in t.failed[2]


def test_rows_agree_with_compare(tmp_path):
    run = run_folder(tmp_path / "run")
    found = track(run, tmp_path / "out", ranks=4, workers=1)
    assert found.steps == [10, 20, 30, 40]
    rows = found.rows.to_pandas()
    compared = compare(run / "checkpoint-10", run / "checkpoint-40", tmp_path / "pair", ranks=4).rows.to_pandas()
    for side in ("left", "right"):
        mine = rows[(rows["pair"] == "checkpoint-40") & (rows["measure"] == f"alignment_{side}_first")]
        mine = mine.set_index(["matrix", "index"])["value"]
        theirs = compared[compared["measure"] == f"alignment_{side}"].set_index(["matrix", "index"])["value"]
        np.testing.assert_allclose(mine.loc[theirs.index], theirs, atol=1e-8)
    mine = rows[(rows["pair"] == "checkpoint-40") & (rows["measure"] == "relative_update_first")]
    theirs = compared[compared["measure"] == "relative_update"].set_index("matrix")["value"]
    np.testing.assert_allclose(mine.set_index("matrix")["value"].loc[theirs.index], theirs, rtol=1e-9)
    with pytest.raises(InputError, match="no comparison"):
        load(tmp_path / "out")
    again = load_tracking(tmp_path / "out")
    assert again.rows.equals(found.rows)
    figures = write_track_figure(found)
    assert [path.suffix for path in figures] == [".png", ".svg"]
    assert all(path.stat().st_size > 10_000 for path in figures)


def test_a_run_with_gaps_copies_and_damage_is_followed_and_reported(tmp_path):
    run = run_folder(tmp_path, steps=(0, 100, 200, 300, 500, 600, 700))
    shutil.copytree(run / "checkpoint-200", run / "checkpoint-0200")  # the same step twice
    shutil.copytree(run / "checkpoint-100", run / "checkpoint-650")  # an old state under a new step
    file = run / "checkpoint-300" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])  # cut off
    (run / "checkpoint-600" / "model.safetensors").write_bytes(b"")
    (run / "checkpoint-800").mkdir()  # begun, nothing in it
    (run / "runs-2024").mkdir()
    write(run / "model.safetensors", dict(list(states(8))[-1]))  # the model that was saved at the end
    series = open_series(run)
    assert [one.step for one in series.saved] == [0, 100, 200, 500, 700, None]
    reasons = {one.source.rpartition("/")[2]: one.reason for one in series.passed_over}
    bad = {f"checkpoint-{step}" for step in (200, 650, 300, 600, 800)}
    assert reasons.keys() == {*bad, "runs-2024"}
    assert "repeats step 200" in reasons["checkpoint-200"]
    assert "holds exactly what" in reasons["checkpoint-650"]
    assert any("between 200 and 500" in note for note in series.notes)
    found = track(run, tmp_path / "out", ranks=2, roles=["ffn"], workers=2)
    assert len(found.manifest["passed_over"]) == 6
    assert set(found.rows["role"].unique().to_pylist()) == {"ffn.up", "ffn.down"}


def test_weight_files_lists_and_other_layouts(tmp_path):
    for step, state in zip((1, 2, 10), states(3), strict=True):
        write(tmp_path / "files" / f"epoch=0-step={step}.safetensors", state)
    assert [one.step for one in open_series(tmp_path / "files").saved] == [1, 2, 10]
    listed = sorted((tmp_path / "files").iterdir(), reverse=True)
    assert [one.source for one in open_series(listed).saved] == list(map(str, listed))
    assert open_series(listed).steps == [0, 1, 2]  # steps that do not ascend are no axis


def test_a_checkpoint_of_another_model_is_passed_over(tmp_path):
    run = run_folder(tmp_path, steps=(1, 2, 3))
    write(run / "checkpoint-4" / "model.safetensors", {"other.weight": torch.randn(3, 3)})
    assert "checkpoint-4" in open_series(run).passed_over[0].source


def test_revisions_of_a_repository_are_found_by_pattern(tmp_path, monkeypatch):
    from specbasis.tracking import runs

    opened = {f"hub:o/m@step{n}": state for n, state in zip((1, 2, 10), states(3), strict=True)}
    monkeypatch.setattr(runs, "list_revisions", lambda source: ["main", "step10", "step2", "step1"])
    real = runs.open_checkpoint
    monkeypatch.setattr(runs, "open_checkpoint", lambda source, stream: real(opened[source]))
    assert [one.source for one in open_series("hub:o/m@step*").saved] == [
        "hub:o/m@step1", "hub:o/m@step2", "hub:o/m@step10"
    ]  # fmt: skip


def test_list_revisions_asks_the_client(monkeypatch):
    class Api:
        def list_repo_refs(self, name):
            refs = type("Refs", (), {})()
            ref = lambda name: type("Ref", (), {"name": name})()  # noqa: E731
            refs.branches, refs.tags = [ref("main")], [ref(f"{name}-v1")]
            return refs

    monkeypatch.setattr(hub, "_client", lambda: type("Client", (), {"HfApi": Api}))
    assert hub.list_revisions("hub:o/m") == ["main", "o/m-v1"]


@pytest.mark.parametrize("make", [lambda d: d / "none", lambda d: d, lambda d: [d]])
def test_nothing_to_follow_is_one_line(tmp_path, make):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError) as error:
        track(make(tmp_path))
    assert "\n" not in str(error.value)


def test_the_same_folder_continues_and_another_series_is_refused(tmp_path):
    run = run_folder(tmp_path / "run")
    first = track(run, tmp_path / "out", ranks=2, workers=1)
    part = next(first.folder.rglob("*.parquet"))
    part.unlink()
    second = track(run, tmp_path / "out", ranks=2, workers=1)
    assert second.rows.equals(first.rows)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["runs"][-1]["matrices"] == 1
    with pytest.raises(InputError, match="another tracked training"):
        track(run, tmp_path / "out", ranks=3)


def test_a_checkpoint_that_changed_under_its_size_and_time_is_another_series(tmp_path):
    run = run_folder(tmp_path / "run")
    track(run, tmp_path / "out", ranks=2, workers=1)
    file = run / "checkpoint-20" / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    write(file, {name: 3 * W for name, W in load_file(file).items()})
    os.utime(file, ns=times)
    with pytest.raises(InputError, match=r"holds another tracked training, .*checkpoint-20"):
        track(run, tmp_path / "out", ranks=2, workers=1)


def test_a_folder_of_an_older_version_that_names_no_weights_goes_on(tmp_path):
    run = run_folder(tmp_path / "run")
    first = track(run, tmp_path / "out", ranks=2, workers=1)
    for about in first.manifest["checkpoints"]:
        del about["weights"]
    first.results.write_manifest()
    assert track(run, tmp_path / "out", ranks=2, workers=1).rows.equals(first.rows)
