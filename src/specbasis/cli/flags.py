"""From a dataclass of options to flags; and the arguments and flags that several verbs share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from specbasis.core.grammar import words
from specbasis.core.options import ADVANCED, PYTHON, Options, default, option, parser, rules, without_none

BASE = Annotated[
    str, typer.Argument(metavar="BASE", help="pretrained: file, folder, hub:org/name, timm:name, pkg:…")
]
MODEL = Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint, as in compare")]
OUT = Annotated[Path, typer.Option("--out", help="folder of the results; the same command continues it")]
JSON = Annotated[bool, typer.Option("--json", help="print one JSON document, nothing else")]
STREAM = Annotated[bool, typer.Option("--stream", help="read only the needed bytes from the Hub")]
NO_RUN = Annotated[bool, typer.Option("--no-run", help="only draw again, from the rows that are there")]
REPORT = Annotated[bool, typer.Option(help="write the page")]
SCORES = Annotated[Path | None, typer.Option(help="CSV with a column pair (or model) and a column of scores")]
COLUMN = Annotated[str, typer.Option(help="which column of --scores, where it has several")]


@dataclass(frozen=True)
class Examples(Options):
    """Which examples a task has."""

    limit: int | None = option(None, "judge on this many examples", panel=ADVANCED, least=1)
    data_dir: Path | None = option(None, "GLUE in its official layout; default: from the Hub", panel=ADVANCED)
    text: str = option("", "columns of a table that hold the one or two texts", panel=ADVANCED)
    label: str = option("", "column of the table with the label", panel=ADVANCED)

    @property
    def judging(self) -> dict[str, Any]:
        """The options of `specbasis.interventions.evaluators.judge`."""
        folder = None if self.data_dir is None else str(self.data_dir)
        return {"data_dir": folder, "limit": self.limit, "text": words(self.text), "label": self.label}


def flags(verb: Callable[..., Any], **lists: Callable[[], None]) -> Callable[..., Any]:
    """A verb with a flag for each field of the options classes among its parameters.

    Args:
        verb: its parameters are typer's, or have a class of options as their type.
        **lists: name of a field → what ``--FIELD help`` prints before it ends.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    taken: dict[str, type[Options]] = {}
    for parameter in inspect.signature(verb).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and issubclass(kind, Options):
            taken[parameter.name] = kind
            names = [name for name, (rule, _) in rules(kind).items() if rule.panel != PYTHON]
            parameters += [_flag(kind, name, lists.get(name)) for name in names]
        else:
            parameters.append(parameter.replace(annotation=kind))
    # Python wants what must be given in front of what has a default.
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

    @wraps(verb)
    def run(**given: Any) -> Any:
        options = {
            parameter: kind(**{name: _value(kind, name, given.pop(name)) for name in rules(kind) if name in given})
            for parameter, kind in taken.items()
        }
        return verb(**given, **options)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _spelling(kind: type[Options], name: str) -> str:
    return rules(kind)[name][0].flag or "--" + name.replace("_", "-")


def _flag(kind: type[Options], name: str, print_list: Callable[[], None] | None) -> inspect.Parameter:
    """The flag of one field, as typer reads parameters."""
    rule, hint = rules(kind)[name]
    value, spelling, plain = default(kind, name), _spelling(kind, name), without_none(hint)
    if parser(rule, hint):
        plain = str
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        value = str(value) if isinstance(value, int) else value
    flag = typer.Option(
        f"{spelling}/--no-{spelling[2:]}" if plain is bool and value else spelling,
        help=rule.help + ("; `help` lists them" if print_list else ""),
        rich_help_panel=rule.panel or None,
        metavar=rule.metavar or None,
        show_default=value not in ("", None, False),
        is_eager=print_list is not None,
        callback=listing(print_list) if print_list else None,
    )
    annotation = Annotated[plain | None if value is None else plain, flag]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def listing(print_list: Callable[[], None]) -> Callable[[str], str]:
    """``--FLAG help`` prints a list and ends, whatever else is there."""

    def answer(value: str) -> str:
        if value == "help":
            print_list()
            raise typer.Exit
        return value

    return answer


def _value(kind: type[Options], name: str, given: Any) -> Any:
    """What a flag's text means."""
    parse = parser(*rules(kind)[name])
    if parse is None or given is None:
        return given
    if given == "" and default(kind, name) is None:
        return None
    return parse(given, _spelling(kind, name))
