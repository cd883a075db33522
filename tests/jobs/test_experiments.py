import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from specbasis.core.errors import InputError
from specbasis.jobs.experiments import read_experiments, run_experiments


def square(experiment, log=None):
    if log is not None:
        with log.open("a") as file:
            file.write(f"{experiment['x']}\n")
    if experiment["x"] == 3:
        raise RuntimeError("three\nis bad")
    return {"y": experiment["x"] ** 2, "loss": float("nan"), "t": torch.tensor([1.0, 2.0])}


GRID = [{"x": x} for x in (1, 3, 2, 1)]


def test_each_experiment_runs_once_failures_are_marked_and_tried_again(tmp_path):
    log, out, told = tmp_path / "log", tmp_path / "out", []
    rows = run_experiments(GRID, partial(square, log=log), out, config={"a": (1, 2)}, progress=told.append)
    assert [row.values.get("y") for row in rows] == [1, None, 4]
    assert rows[1].error == "RuntimeError: three"
    assert rows[0].values == {"y": 1, "loss": None, "t": [1.0, 2.0]}
    assert [(step.done, step.total) for step in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    again = run_experiments([*GRID, {"x": 5}], partial(square, log=log), out, config={"a": [1, 2]})
    assert [row.values.get("y") for row in again] == [1, None, 4, 25]
    assert log.read_text().split() == ["1", "3", "2", "3", "5"]
    assert [row.experiment["x"] for row in read_experiments(out)] == [1, 3, 2, 5]
    assert all(row.commit is None or len(row.commit) >= 40 for row in rows)


def test_a_manifest_has_a_run_once_until_its_command_changes(tmp_path, monkeypatch):
    for x in (1, 2):
        run_experiments([{"x": x}], square, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["other", "command"])
    run_experiments([{"x": 4}], square, tmp_path / "out")
    runs = json.loads((tmp_path / "out/manifest.json").read_text())["runs"]
    assert len(runs) == 2
    assert runs[0]["command"] != runs[1]["command"] == ["other", "command"]


def test_workers_give_the_rows_of_one(tmp_path):
    one = run_experiments(GRID, square, tmp_path / "one")
    two = run_experiments(GRID, square, tmp_path / "two", workers=2)
    assert [(row.experiment, row.values, row.error) for row in one] == [
        (row.experiment, row.values, row.error) for row in two
    ]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    script = (
        "import os, sys, time\nfrom specbasis.jobs.experiments import run_experiments\n"
        "def run(e):\n    if e['x'] == 2: os.kill(os.getpid(), 9)\n    return {'y': e['x']}\n"
        "run_experiments([{'x': 1}, {'x': 2}], run, sys.argv[1])\n"
    )
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", script, out], check=False).returncode == -9
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"cell": {"x": 2}, "val')  # what a kill in the middle of a line leaves
    assert [row.experiment["x"] for row in read_experiments(out)] == [1]
    rows = run_experiments([{"x": 1}, {"x": 2}], square, out)
    assert [row.values["y"] for row in rows] == [1, 4]
    assert [row.experiment["x"] for row in read_experiments(out)] == [1, 2]


def test_a_folder_serves_one_grid_and_one_run(tmp_path):
    out = tmp_path / "out"
    run_experiments(GRID, square, out, config={"base": "a"})
    with pytest.raises(InputError, match="holds another grid, made with base "):
        run_experiments(GRID, square, out, config={"base": "b"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no grid"):
        run_experiments(GRID, square, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="is a file"):
        run_experiments(GRID, square, tmp_path / "other/mine.txt")
    with pytest.raises(InputError, match="no grid here"):
        read_experiments(tmp_path / "other")

    def nested(experiment):
        return {"y": len(run_experiments(GRID, square, out, config={"base": "a"}))}

    inner = run_experiments([{"x": 9}], nested, out, config={"base": "a"})
    assert "another run is writing here" in inner[0].error


def test_a_damaged_line_is_named(tmp_path):
    out = tmp_path / "out"
    run_experiments(GRID, square, out)
    lines = (out / "rows.jsonl").read_text().splitlines()
    (out / "rows.jsonl").write_text("\n".join([lines[0], "{oops", lines[1]]) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2 is damaged"):
        read_experiments(out)


def test_a_figure_that_changed_on_disk_is_damage_and_lines_of_versions_before_seals_are_read(tmp_path):
    out = tmp_path / "out"
    run_experiments([{"x": 5}], square, out)
    line = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(line.replace('"y": 25', '"y": 27'))
    with pytest.raises(InputError, match=r"rows\.jsonl: line 1 is damaged"):
        read_experiments(out)
    stored = json.loads(line)
    del stored["sha256"]
    (out / "rows.jsonl").write_text(json.dumps(stored) + "\n")
    assert read_experiments(out)[0].values["y"] == 25


def test_an_error_that_says_all_itself_has_no_kind_before_it(tmp_path):
    def run(experiment):
        raise InputError("got nothing; want something") if experiment["mend"] else RuntimeError("three\nlines")

    rows = run_experiments([{"mend": True}, {"mend": False}], run, tmp_path / "out")
    assert [row.error for row in rows] == ["got nothing; want something", "RuntimeError: three"]
