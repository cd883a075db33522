"""The pages that the site makes from the code are whole: every public name, every verb, every flag."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import specbasis

DOCS = Path(__file__).parents[1] / "docs"


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    named = dict(name.rsplit(".", 1)[::-1] for name in re.findall(r"^::: (\S+)$", page, flags=re.M))
    public = {name: getattr(specbasis, name) for name in specbasis.__all__}
    assert named == {value.__qualname__: value.__module__ for value in public.values()}


def test_every_verb_and_flag_is_in_the_reference() -> None:
    import typer

    from specbasis.cli import app

    command_line = hook("command_line")
    page = command_line.page()
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S))
    group = typer.main.get_command(app)
    context = typer.Context(group)
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        for name in command.list_commands(context) if hasattr(command, "list_commands") else [None]:
            one = command.get_command(context, name) if name else command
            text = sections[f"specbasis {verb}" + (f" {name}" if name else "")]
            options = {option for parameter in one.params for option in parameter.opts if option[:1] == "-"}
            assert options <= set(re.findall(r"`(-[\w-]+)", text))


def test_prose_of_help_is_no_markdown() -> None:
    assert hook("command_line")._prose("a *b* `c*` d_e|f") == r"a \*b\* `c*` d\_e\|f"
