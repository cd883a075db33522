"""What is written is there whole or not at all, files and folders."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specbasis.checkpoint.atomic import clear, clear_beside, whole, write_whole
from specbasis.core.errors import InputError


def test_text_bytes_and_what_a_function_writes(tmp_path: Path) -> None:
    for content in ("é", "é".encode(), lambda path: path.write_text("é", encoding="utf-8")):
        write_whole(tmp_path / "new" / "file", content)
        assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "é"
        (tmp_path / "new" / "file").write_text("old")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match=r"file: cannot be written \(No space left on device\)"):
        write_whole(tmp_path / "file", full)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with whole(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    with pytest.raises(FileExistsError), whole(tmp_path / "folder") as temporary:
        [temporary.mkdir() for _ in "ab"]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/second"]


def test_a_kill_between_the_two_moves_of_a_folder_is_mended(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".folder.{ended.pid}.old").mkdir()
    (tmp_path / f".folder.{ended.pid}.old" / "old").write_text("old")
    (tmp_path / f".folder.{ended.pid}.tmp").mkdir()
    (tmp_path / f".other.{os.getppid()}.tmp").mkdir()
    clear(tmp_path.iterdir())
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "old", f".other.{os.getppid()}.tmp"}


def test_what_is_written_inside_another_is_one_thing_and_a_kill_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    inner = (
        "import os\nfrom pathlib import Path\nfrom specbasis.checkpoint.atomic import whole, write_whole\n"
        "with whole(Path('out')) as folder:\n    with whole(folder) as nested:\n        nested.mkdir()\n"
        "        write_whole(nested / 'file', lambda path: (path.write_text('half'), os.kill(os.getpid(), 9)))\n"
    )
    killed = subprocess.run([sys.executable, "-c", inner], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    clear_beside(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with whole(tmp_path / "out") as folder, whole(folder) as nested:
        nested.mkdir()
        write_whole(nested / "file", "text")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/file"]
