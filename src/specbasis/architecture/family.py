"""Families: architectures as data, one file each in `families/`, and the name patterns that they are written in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from specbasis.architecture.key import ROLES
from specbasis.checkpoint.names import NUMBER
from specbasis.core.errors import InputError


@dataclass(frozen=True)
class Family:
    """One architecture, as its file in `families/` declares it (docs/adding-a-family.md has every key).

    Attributes:
        name: the file's name without its ending.
        title: in words for a person.
        recognised_by: patterns that must all occur in one stack of blocks, with equal text before the block.
        beside: patterns that must all occur anywhere in the model.
        unless: patterns none of which may occur in that stack: they mark a look-alike.
        stacks: path components that name a stack of blocks.
        blocks: what ``{block}`` stands for, in order of preference.
        repeated: a key of config.json with the number of times that the stored blocks are run through.
        matrices: the `matrix` entries, and behind them those of the family it is `like`; first match wins.
    """

    name: str
    title: str
    recognised_by: tuple[Mapping[str, Any], ...]
    stacks: tuple[str, ...]
    matrices: tuple[Mapping[str, Any], ...]
    beside: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ("{layer}",)
    repeated: str = ""


STRUCTURAL = Family(
    "structural", "unknown architecture: every matrix by its shape, role other, block from its name", (), (), ()
)
"""What is used when no family recognises a model; it guesses no roles."""


@cache
def families() -> tuple[Family, ...]:
    """Every architecture file, in the order of file names; `common.toml` holds the names that all of them share.

    Raises:
        InputError: a file names a role that is not in `ROLES`, or a key that the format does not have.
    """
    folder = files("specbasis").joinpath("architecture", "families")
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return tuple(_family(name, _text(name)) for name in names)


MATRIX_KEYS = {
    "name", "role", "rows", "columns", "skip", "layout", "stacked", "groups", "into", "reads", "shape", "axes",
    "fits", "when", "grouped",
}  # fmt: skip
FAMILY_KEYS = {"title", "recognised_by", "beside", "unless", "stacks", "blocks", "repeated", "like", "matrix"}


def _text(family: str) -> str:
    return files("specbasis").joinpath("architecture", "families", f"{family}.toml").read_text(encoding="utf-8")


def _family(name: str, text: str) -> Family:
    data = tomllib.loads(text)
    for matrix in data["matrix"]:
        roles = matrix.get("rows") or matrix.get("columns") or [matrix.get("role", "other")]
        wrong = [role for role in roles if role not in ROLES]
        if wrong:
            raise InputError(
                f"architecture/families/{name}.toml: role {wrong[0]!r} of {matrix['name']!r} is not in ROLES"
            )
        if not set(matrix) <= MATRIX_KEYS or len(set(matrix) & {"role", "rows", "columns", "skip"}) != 1:
            raise InputError(
                f"architecture/families/{name}.toml: {matrix['name']!r} wants one of role, rows, columns, skip, "
                f"and of the other keys only {', '.join(sorted(MATRIX_KEYS))}; got {', '.join(matrix)}"
            )
    if not set(data) <= FAMILY_KEYS:
        raise InputError(
            f"architecture/families/{name}.toml: unknown keys {', '.join(sorted(set(data) - FAMILY_KEYS))}"
        )
    inherited = _family(data["like"], _text(data["like"])).matrices if "like" in data else ()
    return Family(
        name,
        data["title"],
        tuple(_Frozen({"name": a} if isinstance(a, str) else a) for a in data.get("recognised_by", ())),
        tuple(data.get("stacks", ())),
        tuple(_Frozen(matrix) for matrix in data["matrix"]) + inherited,
        tuple(data.get("beside", ())),
        tuple(data.get("unless", ())),
        tuple(data.get("blocks", ("{layer}",))),
        data.get("repeated", ""),
    )


class _Frozen(dict[str, Any]):
    """A table of a family's file that can be hashed with its family."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self["name"])


@cache
def family_named(name: str) -> Family:
    """The family of a file in `families/`."""
    return next(family for family in families() if family.name == name)


@cache
def matcher(pattern: str, block: str = "{layer}") -> re.Pattern[str]:
    """A name pattern as a regular expression that matches the end of a name, from the start of a component.

    ``{block}`` is the block's form, another ``{word}`` a number, ``*`` anything in a component, ``**`` anything.
    """
    text = _expression(pattern.replace("{block}", "\0")).replace("\0", f"(?P<block>{_expression(block, 'block_')})")
    return re.compile(rf"(?:^|\.){text}$")


@cache
def block_matcher(block: str) -> re.Pattern[str]:
    """A form of a block, such as ``{layer}``, as a regular expression for the start of a name."""
    return re.compile(_expression(block) + r"\.")


def _expression(pattern: str, prefix: str = "") -> str:
    text = re.sub(r"\\\{(\w+)\\\}", rf"(?P<{prefix}\1>\\d+)", re.escape(pattern))
    return text.replace(r"\*\*", ".*").replace(r"\*", "[^.]*")


def skeleton_of(name: str) -> str:
    """A name with its numbers set to 00, except those that a pattern spells out (``net.2``)."""
    literal = _literal_numbers()
    return NUMBER.sub(lambda found: found[0] if found[0] in literal else f"{found[1]}00", name)


@cache
def _literal_numbers() -> frozenset[str]:
    """Every number that a pattern spells out, with the component before it: ``net.2``."""
    texts = (text for family in families() for text in _patterns(family))
    return frozenset(found[0] for text in texts for found in NUMBER.finditer(text))


def _patterns(family: Family) -> Iterator[str]:
    yield from (anchor["name"] for anchor in family.recognised_by)
    yield from (entry["name"] for entry in family.matrices)
    yield from (*family.beside, *family.unless)
