"""The command line in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from specbasis import cli


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def specbasis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The entry point in this process: a new one would spend its time on importing torch."""

    def run(*arguments: object, cwd: Path | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["specbasis", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        if cwd:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    return run
