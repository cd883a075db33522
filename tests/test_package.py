"""Wheel and source archive hold what the package needs, and the wheel runs where nothing else is installed."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.pico import bert_state, finetuned, write

ROOT = Path(__file__).parents[1]
MEGABYTE = 1_000_000


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source archive."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_holds_every_file_of_the_package(built: tuple[Path, Path]) -> None:
    package = ROOT / "src" / "specbasis"
    wanted = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith("plotly.js.gz") for name in wanted)
    assert any(name.endswith("families/llama.toml") for name in wanted)
    assert wanted <= set(zipfile.ZipFile(built[0]).namelist())


def test_source_archive_is_small_and_builds_the_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    assert built[1].stat().st_size < 2 * MEGABYTE
    with tarfile.open(built[1]) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python has since 3.11.4
        archive.extractall(tmp_path)
    source = next(tmp_path.iterdir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=source)
    again = next((tmp_path / "dist").glob("*.whl"))
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(built[0]).namelist())


def test_the_wheel_lists_the_requirements_that_a_clone_does(built: tuple[Path, Path], tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from packaging.utils import canonicalize_name
from specbasis.core.extras import PURPOSES, requirements
for extra in ("", *PURPOSES):
    print(extra, sorted({(canonicalize_name(r.name), str(r.specifier)) for r in requirements(extra)}))
"""
    wheel, clone = (run(sys.executable, "-c", code, place, cwd=tmp_path) for place in (built[0], ROOT / "src"))
    assert "('torch', '>=2.6')" in wheel
    assert wheel == clone


@pytest.mark.slow
def test_wheel_runs_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    torch = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8").strip()
    cpu = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"{torch}+cpu"], capture_output=True, check=False
    )
    run(
        python, "-m", "pip", "install", "--quiet", *([] if cpu.returncode == 0 else [torch]), built[0], cwd=tmp_path
    )
    state = bert_state()
    write(tmp_path / "base.safetensors", state)
    write(tmp_path / "tuned.safetensors", finetuned(state))
    command = tmp_path / "venv" / "bin" / "specbasis"
    assert run(command, "--version", cwd=tmp_path).strip()
    printed = run(command, "compare", "base.safetensors", "tuned.safetensors", "--out", "out", cwd=tmp_path)
    assert "finetuned from this base" in printed
