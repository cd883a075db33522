"""A missing library is one line with the command that installs it, whoever asks."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from specbasis.core.errors import InputError, MissingExtra
from specbasis.core.extras import EXTRAS, command, require

ROOT = Path(__file__).parents[2]
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
RUN = """
sys.argv = ["specbasis", *{arguments!r}]
from specbasis.cli import main
main()
"""


def test_every_library_is_in_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}
    for library, extra in EXTRAS.items():
        listed = [re.split(r"[\[<>=]", requirement)[0] for requirement in project["optional-dependencies"][extra]]
        assert names.get(library, library) in listed, library


def test_the_command_installs_this_package() -> None:
    assert command("report") == f'pip install "{ROOT}[report]"'


def test_what_is_installed_comes_and_another_error_stays_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require("json", purpose="this needs").__name__ == "json"
    (tmp_path / "broken.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        require("broken", purpose="this needs")


def test_an_error_about_an_extra_is_both_an_input_error_and_an_import_error() -> None:
    assert issubclass(MissingExtra, InputError)
    assert issubclass(MissingExtra, ImportError)


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra"),
    [
        ({"transformers"}, ["pretrain", "--out", "o"], "pretrain"),
        ({"matplotlib"}, ["reproduce", "fig4", "--out", "o"], "pretrain"),
        ({"peft"}, ["finetune", "base", "--task", "rte", "--out", "o"], "finetune"),
        ({"powerlaw"}, ["spectra", "base.safetensors"], "spectra"),
    ],
)
def test_verbs_say_what_is_missing(tmp_path: Path, hidden: set[str], arguments: list[str], extra: str) -> None:
    from tests.pico import bert_state, write

    write(tmp_path / "base.safetensors", bert_state())
    code = HIDE.format(names=hidden) + RUN.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"[{extra}]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_library_call_says_what_is_missing() -> None:
    code = HIDE.format(names={"peft"}) + (
        "try:\n    from specbasis.adapter import SpectralConfig\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "peft, which is not installed: pip install" in done.stdout, done.stderr


def test_compare_without_the_report_extra_keeps_rows_and_tables(tmp_path: Path) -> None:
    from tests.pico import bert_state, finetuned, write

    base = bert_state()
    write(tmp_path / "base.safetensors", base)
    write(tmp_path / "tuned.safetensors", finetuned(base))
    arguments = ["compare", "base.safetensors", "tuned.safetensors", "--out", "o", "--ranks", "3"]
    code = HIDE.format(names={"matplotlib", "jinja2"}) + RUN.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attention.query" in done.stdout
    assert "note: no page: " in done.stderr
    assert (tmp_path / "o" / "manifest.json").is_file()
