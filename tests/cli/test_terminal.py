"""The command line on any terminal, before any reader, on any disk: a real process, its output, its exit code."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from specbasis import cli
from specbasis.cli.common import PLAIN
from specbasis.core.errors import InputError
from specbasis.jobs.results import COMPARISON
from tests.cli.conftest import Done, Run
from tests.helpers.patience import PATIENCE
from tests.pico import bert_state, finetuned, write

COMMAND = [sys.executable, "-m", "specbasis"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a finetune, and what compare makes of them."""
    folder = tmp_path_factory.mktemp("terminal")
    base = bert_state()
    write(folder / "base.safetensors", base)
    write(folder / "tuned.safetensors", finetuned(base))
    done = subprocess.run(
        [*COMMAND, "compare", "base.safetensors", "tuned.safetensors", "--out", "out", "--no-report"],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def run(*arguments: object, cwd: Path, shell: str = "", **environment: str) -> Done:
    """A process; `shell` is put behind the command, such as a pipe."""
    words = [*COMMAND, *map(str, arguments)]
    script = "set -o pipefail; " + " ".join(f"'{word}'" for word in words) + " " + shell
    done = subprocess.run(["bash", "-c", script], cwd=cwd, capture_output=True, timeout=PATIENCE,
                          env=os.environ | environment)  # fmt: skip
    out, err = (text.decode("latin-1") for text in (done.stdout, done.stderr))
    assert "Traceback" not in out + err
    return Done(done.returncode, out, err)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": name} for name in ("ascii", "latin-1", "cp1252", "utf-8", "utf-16", "ascii:strict")]
    + [{"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=lambda e: "-".join(e.values()),
)
def test_no_encoding_of_a_terminal_stops_the_output(folder: Path, environment: dict[str, str]) -> None:
    both = (
        "import sys; from specbasis.cli import main\n"
        "for words in (['report', 'out', '--json'], ['inspect', 'base.safetensors']):\n"
        "    sys.argv = ['specbasis', *words]\n"
        "    try: main()\n    except SystemExit as stop: assert not stop.code\n"
        "    print('the end')"
    )
    done = subprocess.run([sys.executable, "-c", both], cwd=folder, capture_output=True, timeout=PATIENCE,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("latin-1")
    encoding = environment.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    document, table, _ = done.stdout.decode(encoding).split("the end")
    assert set(json.loads(document)["pairs"]) == {"tuned"}
    assert "encoder.layer" in table or "attention" in table


def test_signs_that_a_terminal_lacks_are_spelt() -> None:
    cli.prepare_streams()
    assert "‖Δ‖ ≥ 1 × … ü".encode("ascii", "specbasis") == rb"|d| >= 1 x ... \xfc"
    assert all(spelt.isascii() for spelt in PLAIN.values())


def test_a_reader_that_goes_away_ends_the_printing_and_not_the_work(folder: Path) -> None:
    done = run("compare", "base.safetensors", "tuned.safetensors", "--out", "piped", cwd=folder, shell="| true")
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "piped" / "report.html").is_file()
    found = run("report", "out", "--fail-on", "low-rank", "--json", cwd=folder, shell="| true")
    assert found.returncode in (0, 1)
    assert run("--help", cwd=folder, shell="| true").returncode in (0, cli.CLOSED_PIPE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])  # held back, it fails as it is printed and again at the end
def test_output_that_does_not_arrive_is_said(folder: Path, unbuffered: str) -> None:
    for arguments in (("report", "out", "--json"), ("inspect", "base.safetensors"), ("--version",)):
        done = run(*arguments, cwd=folder, shell="> /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 2
        assert re.fullmatch(r"error: .*\(No space left on device\)\n", done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_stream_that_is_full_or_closed_does_not_change_the_exit_code(folder: Path) -> None:
    assert run("report", "nothing", cwd=folder, shell="2> /dev/full").returncode == 2
    assert run("inspect", "base.safetensors", cwd=folder, shell=">&-").returncode == 0
    assert run("report", "nothing", cwd=folder, shell="2>&-").returncode == 2


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\x1b[2Jb", "line\nend", "caf\udce9", "\u202etxt.exe", "'; touch ran; '", "a\tb", "[red]"]
)
def test_names_that_no_file_should_have(specbasis: Run, folder: Path, tmp_path: Path, name: str) -> None:
    done = specbasis("compare", folder / "base.safetensors", folder / "tuned.safetensors", "--out",
                     tmp_path / name, "--no-report")  # fmt: skip
    possible = len(name) <= 255 and name.isprintable() | name.isascii() | (
        "\u202e" in name
    )  # no bytes without a text
    assert done.returncode == (0 if possible else 2), done.stderr
    gone = specbasis("inspect", tmp_path / "nothing" / name)
    assert gone.returncode == 2
    for text in (done.stdout, done.stderr, gone.stderr):
        assert not {"\x1b", "\u202e", "\r"} & set(text)
    assert len(gone.stderr.splitlines()) == 1


def test_names_of_tensors_are_no_markup(specbasis: Run, tmp_path: Path) -> None:
    names = ("[/red].weight", "[bold]x.weight", "[link=x].weight")
    write(tmp_path / "m.safetensors", {name: torch.randn(80, 70) for name in names})
    done = specbasis("spectra", tmp_path / "m.safetensors", "--csv", tmp_path / "s.csv")
    assert done.returncode in (0, 2), done.stderr  # the extra may be missing
    if done.returncode == 0:
        assert all(name[:6] in done.stdout for name in names)


def test_an_error_of_the_program_is_one_line_a_log_and_its_own_exit_code(
    specbasis: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("nobody foresaw\nthis \x1b[31m")

    monkeypatch.setattr(cli.specbasis, "load", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = specbasis("report", tmp_path)
    assert done.returncode == 70
    log = re.fullmatch(r"internal error: RuntimeError: nobody foresaw; the details are in (\S+); .*\n", done.stderr)
    assert log is not None, done.stderr
    assert "Traceback" in Path(log[1]).read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    done = specbasis("report", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (70, 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: cannot be read or written (Permission denied)"),
        (ImportError("no symbol", name="torch._C"), "torch cannot be imported (no symbol); specbasis doctor says"),
        (OSError(24, "Too many open files"), "cannot be read or written (Too many open files)"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_no_fault_of_the_program(
    specbasis: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    said: str,
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(cli.specbasis, "load", fails)
    done = specbasis("report", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert said in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_little_memory_is_said(folder: Path) -> None:
    """Whatever fails first under a limit, in whatever library: a line, and no exit code of a finding."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}));"
    script = (
        limit + " sys.argv = ['specbasis', 'inspect', 'base.safetensors'];  from specbasis.cli import main; main()"
    )
    one_thread = {"OPENBLAS_NUM_THREADS": "1"}
    for size in (2**28, 2**29, 2**30):
        done = subprocess.run([sys.executable, "-c", script.format(size)], cwd=folder, capture_output=True,
                              text=True, timeout=PATIENCE, env=os.environ | one_thread)  # fmt: skip
        assert "Traceback" not in done.stderr
        # OpenBLAS ends the process by itself; nothing above it is asked.
        assert done.returncode != 1 or done.stderr.startswith("OpenBLAS error")


def fields(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The paths to all fields of a JSON document, those of a list's first item."""
    paths = []
    if isinstance(value, dict):
        for name, inner in value.items():
            paths += [(*path, name), *fields(inner, (*path, name))]
    elif isinstance(value, list) and value:
        paths += fields(value[0], (*path, 0))
    return paths


def opened_at(text: str, path: tuple[object, ...]) -> tuple[dict[str, Any], Any]:
    """A document without its seal, with which every change would be refused, and what holds the field of a path."""
    content = json.loads(text)
    content.pop("sha256", None)
    place = content
    for step in path[:-1]:
        place = place[step]
    return content, place


def test_a_manifest_that_lacks_a_field_is_read_or_refused(specbasis: Run, folder: Path) -> None:
    manifest = folder / "out" / "manifest.json"
    whole = manifest.read_text()
    paths = [
        path for path in fields(json.loads(whole)) if path[:1] not in (("versions",), ("machine",), ("sha256",))
    ]
    refused = 0
    try:
        for path in paths:
            content, place = opened_at(whole, path)
            del place[path[-1]]
            manifest.write_text(json.dumps(content))
            done = specbasis("report", folder / "out", "--json")
            assert done.returncode in (0, 2), (path, done.stderr)
            refused += done.returncode == 2
    finally:
        manifest.write_text(whole)
    assert refused >= 6


WRONG: tuple[object, ...] = (None, 5, "x", [], {}, [[1]], {"a": 1}, True)


def test_a_manifest_with_values_of_another_type_is_read_or_refused(folder: Path) -> None:
    manifest = folder / "out" / "manifest.json"
    whole = manifest.read_text()
    known = [p for p in fields(json.loads(whole)) if p[0] in ("base", "pairs", "runs", "failed")]
    paths = [p for p in known if not {"modified_ns", "changed_ns", "inode", "is_settled"} & set(p)]
    refused = set()
    try:
        for path in paths:
            for wrong in WRONG:
                content, place = opened_at(whole, path)
                place[path[-1]] = wrong
                manifest.write_text(json.dumps(content))
                try:
                    COMPARISON.read(folder / "out")
                except InputError:
                    refused.add(path)
    finally:
        manifest.write_text(whole)
    used = {p for p in paths if p[0] in ("base", "pairs", "runs") and p[-1] not in ("sha256", "b")}
    assert used <= refused
