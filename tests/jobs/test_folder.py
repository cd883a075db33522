"""One results folder for all: refused in words, cleared of what kills leave, one process at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specbasis.core.errors import InputError
from specbasis.jobs.environment import ALWAYS, WHERE_USED, environment
from specbasis.jobs.folder import Kind, locked, opened, refuse_another

MADE = Kind("thing", version=("format", 1), keys=("config", "pairs"))


def begun(path: Path, config: dict[str, object] | None = None, *, kept: bool = True) -> None:
    with opened(path, MADE, config or {"ranks": 1}) as folder:
        folder.manifest["pairs"] = {}
        folder.write_manifest()
        if kept:
            (path / "rows").mkdir(exist_ok=True)
            (path / "rows" / "one").write_text("kept")


def ended_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_the_same_configuration_goes_on_and_another_is_refused_in_words(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    begun(out, {"ranks": 1, "base": {"source": "a", "blocks": (1, 2)}})
    begun(out, {"ranks": 1, "base": {"source": "a", "blocks": [1, 2]}})  # as JSON has it
    with pytest.raises(
        InputError, match=r"holds another thing, made with base source a \(now b\), without seed \(now 3"
    ):
        begun(out, {"ranks": 1, "base": {"source": "b", "blocks": [1, 2]}, "seed": 3})
    assert MADE.read(out)["config"]["base"]["source"] == "a"


def test_of_two_long_settings_that_begin_alike_the_difference_is_shown(tmp_path: Path) -> None:
    words = ", ".join(f"measure_{i}" for i in range(20))
    begun(tmp_path / "out", {"ranks": 1, "measures": f"{words}, last"})
    with pytest.raises(InputError, match=r"measures … last \(now … other\)"):
        begun(tmp_path / "out", {"ranks": 1, "measures": f"{words}, other"})


def test_a_manifest_beside_which_nothing_was_kept_gives_way(tmp_path: Path) -> None:
    begun(tmp_path / "out", {"ranks": 1}, kept=False)
    begun(tmp_path / "out", {"ranks": 2})
    assert MADE.read(tmp_path / "out")["config"] == {"ranks": 2}


def test_files_and_folders_of_others_are_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no thing"):
        begun(tmp_path)
    with pytest.raises(InputError, match="is a file; want a folder for the thing"):
        begun(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    gone = ended_process()
    out = tmp_path / "out"
    # Killed before the first manifest: only temporary files are there, so the folder is still free.
    (out / "rows").mkdir(parents=True)
    (out / f".manifest.json.{gone}.tmp").write_bytes(b"{")
    (out / "rows" / f".m.parquet.{gone}.tmp").write_bytes(b"half")
    (out / f".checkpoint-5.{gone}.tmp").mkdir()
    begun(out)
    assert not list(out.rglob("*.tmp"))


def test_what_a_running_process_or_a_user_has_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(out)
    mine = out / "rows" / f".m.parquet.{os.getppid()}.tmp"
    mine.write_bytes(b"in flight")
    (out / ".notes.tmp").write_bytes(b"a user's")
    begun(out)
    assert mine.exists()
    assert (out / ".notes.tmp").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".notes.tmp").write_bytes(b"a user's")
    with pytest.raises(InputError, match="not empty"):
        begun(tmp_path / "other")


def test_other_formats_and_broken_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format 99"):
        MADE.read(tmp_path)
    for text in ("{", "[1]", "{}", '{"format": 1}', '{"format": 1, "config": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="not the manifest"):
            MADE.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "config": {"kind": "track"}, "pairs": {}}')
    with pytest.raises(InputError, match="holds no thing but another kind of run"):
        MADE.read(tmp_path)
    with pytest.raises(InputError, match="no thing here"):
        MADE.read(tmp_path / "nothing")


def test_one_process_at_a_time_writes_and_the_lock_goes_with_it(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\nfrom specbasis.jobs.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another run is writing here"):
            begun(tmp_path)
        other.kill()
        other.wait()
    with locked(tmp_path, wait=True):
        pass
    begun(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(InputError, match="cannot be written"):
        begun(tmp_path / "out")


def test_a_manifest_names_what_is_always_there_and_what_is_loaded_or_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in WHERE_USED:
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert set(environment()["versions"]) == {"python", *ALWAYS}
    monkeypatch.setitem(sys.modules, "peft", json)
    versions = environment(uses=["sklearn"])["versions"]
    assert set(versions) == {"python", *ALWAYS, "peft", "scikit-learn"}


def test_the_commit_is_that_of_the_checkout() -> None:
    checkout = (Path(__file__).parents[2] / ".git").exists()
    assert (environment()["commit"] is not None) == checkout


def test_a_manifest_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "out", {"ranks": 10, "seed": 1})
    path = tmp_path / "out/manifest.json"
    whole = path.read_text()
    for old, new in (('"ranks": 10', '"ranks": 11'), ('"pairs": {}', '"pairs": {"p": {"matrices": []}}')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(InputError, match=r"manifest\.json: .*SHA-256"):
            MADE.read(tmp_path / "out")
        with pytest.raises(InputError, match=r"manifest\.json: .*SHA-256"):
            begun(tmp_path / "out", {"ranks": 11, "seed": 1})
    stored = json.loads(whole)
    del stored["sha256"]  # as versions before seals wrote it
    path.write_text(json.dumps(stored))
    begun(tmp_path / "out", {"ranks": 10, "seed": 1})


def test_a_model_is_named_as_it_was_called_whatever_its_name_ends_in(tmp_path: Path) -> None:
    digest = "0" * 64
    then, now = {"tuned": {"model_weights": digest}, "base_sha256": digest}, {"base_sha256": "1" * 64}
    with pytest.raises(InputError, match=r"tuned model_weights \(not asked for now\), from another base \(its"):
        refuse_another(tmp_path, "comparison", then, now)
