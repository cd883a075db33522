"""From a dataclass of options to flags; and the words that all verbs share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from specbasis.core.options import Options, Rule, default, parser, rules, without_none

BASE = Annotated[
    str, typer.Argument(metavar="BASE", help="pretrained: file, folder, hub:org/name, timm:name, pkg:…")
]
MODEL = Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint, as in compare")]
OUT = Annotated[Path, typer.Option("--out", help="folder of the results; the same command continues it")]
JSON = Annotated[bool, typer.Option("--json", help="print one JSON document, nothing else")]
STREAM = Annotated[bool, typer.Option("--stream", help="from the Hub read only the bytes that are wanted")]
NO_RUN = Annotated[bool, typer.Option("--no-run", help="only draw again, from the rows that are there")]


def flags(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with a flag for each field of the options classes among its parameters."""
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    taken: dict[str, type[Options]] = {}
    for parameter in inspect.signature(verb).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and issubclass(kind, Options):
            taken[parameter.name] = kind
            parameters += [_flag(kind, name, rule, hint) for name, (rule, hint) in rules(kind).items() if rule.help]
        else:
            parameters.append(parameter.replace(annotation=kind))
    # Arguments first, then flags that must be given: Python wants those without a default in front.
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

    @wraps(verb)
    def run(**given: Any) -> Any:
        for parameter, kind in taken.items():
            values = {name: _value(kind, name, given.pop(name)) for name in rules(kind) if name in given}
            given[parameter] = kind(**values)
        return verb(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flag(kind: type[Options], name: str, rule: Rule, hint: Any) -> inspect.Parameter:
    """The flag of one field, as typer reads parameters."""
    value = default(kind, name)
    plain = without_none(hint)
    if parser(rule, hint):
        plain, value = str, _spelled(value)
    spelling = rule.flag or "--" + name.replace("_", "-")
    declared = f"{spelling}/--no-{spelling[2:]}" if plain is bool and value else spelling
    said = typer.Option(
        declared,
        help=rule.help,
        rich_help_panel=rule.panel or None,
        metavar=rule.metavar or None,
        show_default=value not in ("", None, False, inspect.Parameter.empty),
    )
    annotation = Annotated[plain | None if value is None else plain, said]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _value(kind: type[Options], name: str, given: Any) -> Any:
    """What a flag's text means."""
    rule, hint = rules(kind)[name]
    parse = parser(rule, hint)
    if parse is None or given is None:
        return given
    if given == "" and default(kind, name) is None:
        return None
    return parse(given, rule.flag or "--" + name.replace("_", "-"))


def _spelled(value: Any) -> Any:
    """A default as the text that means it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
