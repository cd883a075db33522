"""The command line speaks one language: panels, shared flags, nearest names, no large library too early."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from specbasis.cli import app, common
from specbasis.jobs.progress import Progress
from tests.cli.conftest import Run
from tests.pico import bert_state, finetuned, write

LARGE = {"torch", "scipy.stats", "transformers", "peft", "matplotlib", "pyarrow", "datasets"}


def verbs() -> dict[str, Any]:
    """Name → command, those of groups as "GROUP VERB"."""
    found: dict[str, Any] = {}
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "list_commands"):
            found |= {f"{name} {verb}": command.get_command(None, verb) for verb in command.list_commands(None)}
        else:
            found[name] = command
    return found


def of(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help"]


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["finetune", "--help"], ["--version"]])
def test_help_imports_nothing_large(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['specbasis', *{arguments!r}]\nfrom specbasis.cli import main\n"
        f"try:\n    main()\nexcept SystemExit: print(sorted({LARGE!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_importing_the_package_imports_nothing_large() -> None:
    code = (
        f"import sys, specbasis; print(sorted({LARGE!r} & set(sys.modules)))\n"
        "import specbasis.lineage.tree; from specbasis import compare, lineage\n"
        "print(callable(compare), callable(lineage), callable(specbasis.lineage))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True True True"], done.stderr


def test_everyday_verbs_import_no_library_that_they_do_not_use(tmp_path: Path) -> None:
    """Of scipy.stats alone the import takes a second; drawing and training have their own verbs."""
    base, tuned = write(tmp_path / "b.safetensors", bert_state()), write(tmp_path / "t.safetensors", bert_state())
    code = (
        "import sys\nfrom specbasis.cli import main\n"
        f"for words in (['inspect', {str(base)!r}], ['compare', {str(base)!r}, {str(tuned)!r}, '--quick']):\n"
        "    sys.argv = ['specbasis', *words]\n    try:\n        main()\n    except SystemExit: pass\n"
        "print('imported', sorted({'scipy.stats', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported []", done.stderr


def test_every_public_name_is_there() -> None:
    import specbasis

    for name in specbasis.__all__:
        assert type(getattr(specbasis, name)).__name__ != "module", name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        specbasis.nonsense  # noqa: B018


def test_a_verb_shows_at_most_12_flags_outside_advanced() -> None:
    for name, command in verbs().items():
        everyday = [p for p in of(command) if p.rich_help_panel != "Advanced"]
        assert len(everyday) <= 12, (name, [p.opts for p in everyday])


def test_one_idea_has_one_flag() -> None:
    spoken = {option for command in verbs().values() for p in of(command) for option in p.opts}
    other_words = {"--rate", "--lr", "--batch", "--draw", "--cache-dir", "--figures"}
    assert not spoken & other_words
    assert {"--learning-rate", "--batch-size", "--seeds", "--no-run", "--cache", "--cache-prefix"} <= spoken


def test_equal_flags_have_equal_types_in_all_verbs() -> None:
    kinds: dict[str, set[bool]] = {}
    for command in verbs().values():
        for p in of(command):
            kinds.setdefault(p.opts[0], set()).add(bool(p.is_flag))
    assert not {flag for flag, found in kinds.items() if len(found) > 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "a", "b", "--out", "o", "--rank", "3"], "--ranks"),
        (["comprae", "a", "b"], "compare"),
        (["compare", "a", "b", "--out", "o", "--roles", "fnn"], "did you mean ffn?"),
        (["compare", "a", "b", "--out", "o", "--measures", "alignment_lft"], "did you mean alignment_left?"),
        (["compare", "a"], "Missing"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    from specbasis.cli import main

    monkeypatch.setattr(sys, "argv", ["specbasis", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("verb", ["", *verbs()])
def test_help_has_a_short_form_everywhere(specbasis: Run, verb: str) -> None:
    assert specbasis(*verb.split(), "-h") == specbasis(*verb.split(), "--help")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    state = bert_state()
    write(tmp_path / "base.safetensors", state)
    write(tmp_path / "tuned.safetensors", finetuned(state))
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


@pytest.mark.parametrize("behind", [False, True])
def test_quiet_leaves_results_and_errors(
    specbasis: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: tuple[Path, Path], behind: bool
) -> None:
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")  # and restored when the test ends
    words = ["compare", *pair, "--out", tmp_path / "out", "--quick", "--no-report"]
    told = specbasis(*words)
    quiet = specbasis(*words, "--quiet") if behind else specbasis("--quiet", *words)
    assert "note: quick: " in told.stdout
    assert [line for line in told.stdout.splitlines() if not line.startswith("note: ")] == quiet.stdout.splitlines()
    assert os.environ["TQDM_DISABLE"] == "1"
    failed = specbasis("compare", "--quiet", pair[0], tmp_path / "missing", "--out", tmp_path / "new")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "note: quick: " in specbasis(*words).stdout  # one run's flag is not the next one's


def test_quiet_behind_two_dashes_is_a_name(specbasis: Run) -> None:
    assert "--quiet" in specbasis("inspect", "--", "--quiet").stderr


@pytest.mark.parametrize("is_quiet", [False, True])
def test_quiet_leaves_out_the_lines_of_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_quiet: bool
) -> None:
    monkeypatch.setattr(common.ASIDE, "quiet", is_quiet)
    with common.progress_by_run() as tell:
        tell(Progress(1, 4, "the first"))
    assert capsys.readouterr().err == ("" if is_quiet else "1 of 4: the first\n")


def entry_point(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as its script runs it, below a shell."""
    code = "import sys; sys.argv[0] = 'specbasis'; from specbasis.cli import main; main()"
    line = shlex.join([sys.executable, "-c", code, *arguments]) + "; exit $?"
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_the_shell_completes_verbs_and_flags(tmp_path: Path) -> None:
    shown = entry_point("--show-completion", "bash")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "complete -o default -F _specbasis_completion specbasis" in shown.stdout
    asked = {"_SPECBASIS_COMPLETE": "complete_bash", "COMP_WORDS": "specbasis compare --ran", "COMP_CWORD": "2"}
    assert entry_point(**asked).stdout.split() == ["--ranks"]
    installed = entry_point("--install-completion", HOME=str(tmp_path))
    assert installed.returncode == 0
    assert "specbasis" in (tmp_path / ".bashrc").read_text(encoding="utf-8")
