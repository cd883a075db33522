"""The command line speaks one language: panels, shared flags, nearest names, no large library too early."""

import subprocess
import sys
from typing import Any

import pytest
import typer

from specbasis.cli import app

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
