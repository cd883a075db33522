"""Files and folders that appear whole or not at all: the one way in which anything here is written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specbasis.core.errors import InputError

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")
"""The name of what a process is writing, or has set aside to write it: `.NAME.PROCESS.tmp`."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` at which to write a file or a folder, which becomes ``path`` when the block ends.

    It takes the place of what was there. If the block raises, or the process is killed, what was there stays;
    `clear` removes what a kill leaves, one thing however deep such blocks are in each other. A file is flushed to
    the disk before it takes its name.

    Raises:
        OSError: the system refuses it; `writing` makes one line of that.
    """
    if is_temporary(path):  # inside such a block: whoever makes it whole removes it as well
        yield path
        return
    temporary, aside = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        if path.is_dir() and temporary.is_dir():  # no system call puts a folder in the place of another
            path.replace(aside)
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the error to be seen is that of the block
            _restore(aside, path)
            _remove(temporary)


def write_whole(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: text in UTF-8, bytes, or what a function writes at the path it is given.

    Raises:
        InputError: the system refuses it.
    """
    with writing(path), whole(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # names of files
        elif isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses (permissions, a full disk) into one line that names the path.

    Raises:
        InputError: in place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); what is done is kept: mend this and run again"
        ) from error


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of something that is not written to its end."""
    return bool(_TEMPORARY.fullmatch(path.name))


def clear(paths: Iterable[Path]) -> None:
    """Remove what killed processes left of their writing, and put back what they had set aside for it."""
    for path in list(paths):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or _is_running(int(match[2])):
            continue
        if match[3] == "old":
            _restore(path, path.with_name(match[1]))
        else:
            _remove(path)


def clear_beside(path: Path) -> None:
    """`clear` what killed processes left of their writing of this path."""
    if path.parent.is_dir():
        clear(other for other in path.parent.iterdir() if other.name.startswith(f".{path.name}."))


def _restore(aside: Path, path: Path) -> None:
    """Put back what was set aside where nothing has taken its place."""
    if aside.exists() and not path.exists():
        aside.replace(path)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether the number is that of another process that is alive."""
    if process == os.getpid() or os.name == "nt":  # on Windows signal 0 would end the process
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
