"""The page of all commands, made from the commands themselves whenever the site is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

PAGE = "reference/command-line.md"
OPENING = """# Command line

Every verb with its arguments and flags, as `specbasis VERB --help` prints them. A name in capitals is a value
that you give.
"""


def commands(group: Any, context: Any, name: str = "specbasis") -> Iterator[tuple[str, Any]]:
    """Every command under a group, with its full name, in the order of `--help`."""
    for verb in group.list_commands(context):
        command, full = group.get_command(context, verb), f"{name} {verb}"
        verbs = hasattr(command, "list_commands")
        if not verbs or command.invoke_without_command:
            yield full, command
        if verbs:
            yield from commands(command, context, full)


def _cell(text: object) -> str:
    return re.sub(r"([|<\[])", r"\\\1", " ".join(str(text).split()))


def _prose(text: str) -> str:
    """Help as Markdown: what is not code means its asterisks and underscores."""
    parts = _cell(text).split("`")
    return "`".join(part if i % 2 else re.sub(r"([*_])", r"\\\1", part) for i, part in enumerate(parts))


def _code(text: object) -> str:
    return "`" + str(text).replace("|", "\\|") + "`"


def _spelling(parameter: Any) -> str:
    """How a parameter is written: `BASE`, `--out OUT`, `--carry` / `--no-carry`."""
    if parameter.param_type_name == "argument":
        return _code(parameter.metavar or parameter.name.upper())
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
    return " / ".join(_code(option + value) for option in (*parameter.opts, *parameter.secondary_opts))


def _row(parameter: Any) -> str:
    said = _prose(parameter.help or "")
    if parameter.required:
        said += " (required)"
    elif getattr(parameter, "show_default", False) and parameter.default not in (None, "", False):
        default = parameter.opts[0].lstrip("-") if parameter.default is True else parameter.default
        said += f" (default: {_code(default)})"
    return f"| {_spelling(parameter)} | {said} |"


def _prose_paragraphs(text: str) -> str:
    return "\n\n".join(map(_prose, text.split("\n\n")))


def section(name: str, command: Any) -> str:
    """One command: what it does, and a table of what it takes."""
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    shown.sort(key=lambda parameter: parameter.param_type_name != "argument")
    table = ["| argument or flag | what it is |", "|---|---|", *map(_row, shown)] if shown else []
    return "\n".join([f"## {name}", "", _prose_paragraphs(command.help or ""), "", *table, ""])


def page() -> str:
    """The whole page, in Markdown."""
    import typer

    from specbasis.cli import app

    group = typer.main.get_command(app)
    return "\n".join([OPENING, *(section(*one) for one in commands(group, typer.Context(group)))])


def on_files(files: Any, config: Any) -> Any:
    """Add the page to those of docs/."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files
