"""Families: architectures as data, one file each in `families/`, and the name patterns that they are written in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from specbasis.architecture.key import ROLES
from specbasis.checkpoint.names import NUMBER
from specbasis.core.errors import InputError

MATRIX_KEYS = {
    "name", "role", "rows", "columns", "skip", "layout", "stacked", "groups", "into", "reads", "shape", "axes",
    "fits", "when", "grouped",
}  # fmt: skip
"""Keys of a [[matrix]] entry; docs/adding-a-family.md explains each."""

FAMILY_KEYS = {"title", "recognised_by", "beside", "unless", "stacks", "blocks", "repeated", "like", "matrix"}
"""Keys of a family's file."""


@dataclass(frozen=True)
class Rule:
    """The [[matrix]] entries with a pattern that matches a name, and the expression that finds its block."""

    entries: tuple[Mapping[str, Any], ...]
    regex: re.Pattern[str]


@dataclass(frozen=True, eq=False)
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

    def containers(self, pattern: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Each name that a pattern matches, behind the text before its block."""
        for name in names:
            match = next(filter(None, (matcher(pattern, form).search(name) for form in self.blocks)), None)
            if match:
                yield name[: match.start()], name

    def block_rule(self, name: str, container: str) -> Rule | None:
        """The first entry that matches a name with its block right behind the container."""
        for form in self.blocks:
            for entry in self.matrices:
                if "{block}" in entry["name"]:
                    match = matcher(entry["name"], form).search(name)
                    if match and name[: match.start()] == container:
                        return self._rule(entry, form)
        return None

    def outer_rule(self, name: str, *, only_tables: bool) -> Rule | None:
        """The first entry without a block that matches a name; where asked, of those that mark no matrix."""
        for entry in self.matrices:
            usable = "{block}" not in entry["name"] and (not only_tables or "skip" in entry)
            if usable and matcher(entry["name"]).search(name):
                return self._rule(entry)
        return None

    def _rule(self, entry: Mapping[str, Any], form: str = "{layer}") -> Rule:
        """All entries with the pattern of one: their other keys decide between them."""
        alike = tuple(other for other in self.matrices if other["name"] == entry["name"])
        return Rule(alike, matcher(entry["name"], form))

    def block_at(self, name: str, container: str) -> str:
        """The block in which a name lies, as it stands behind the container, with a dot; empty where in none."""
        start = len(container) + 1 if container else 0
        matches = (block_matcher(form).match(name, start) for form in self.blocks)
        match = next(filter(None, matches), None) if is_inside(name, container) else None
        return match[0] if match else ""


STRUCTURAL = Family(
    "structural", "unknown architecture: every matrix by its shape, role other, block from its name", (), (), ()
)
"""What is used when no family recognises a model; it guesses no roles."""


# --- the files --------------------------------------------------------------------------------------------------


@cache
def families() -> tuple[Family, ...]:
    """Every architecture file, in the order of file names; `common.toml` holds the names that all of them share.

    Raises:
        InputError: a file names a role that is not in `ROLES`, or a key that the format does not have.
    """
    folder = files("specbasis").joinpath("architecture", "families")
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return tuple(_parsed(name, _text(name)) for name in names)


@cache
def family_named(name: str) -> Family:
    """The family of a file in `families/`."""
    return next(family for family in families() if family.name == name)


def _text(family: str) -> str:
    return files("specbasis").joinpath("architecture", "families", f"{family}.toml").read_text(encoding="utf-8")


def _parsed(name: str, text: str) -> Family:
    data = tomllib.loads(text)
    file = f"architecture/families/{name}.toml"
    for matrix in data["matrix"]:
        roles = matrix.get("rows") or matrix.get("columns") or [matrix.get("role", "other")]
        wrong = [role for role in roles if role not in ROLES]
        if wrong:
            raise InputError(f"{file}: role {wrong[0]!r} of {matrix['name']!r} is not in ROLES")
        if not set(matrix) <= MATRIX_KEYS or len(set(matrix) & {"role", "rows", "columns", "skip"}) != 1:
            raise InputError(
                f"{file}: {matrix['name']!r} wants one of role, rows, columns, skip, and of the other keys only "
                f"{', '.join(sorted(MATRIX_KEYS))}; got {', '.join(matrix)}"
            )
    if not set(data) <= FAMILY_KEYS:
        raise InputError(f"{file}: unknown keys {', '.join(sorted(set(data) - FAMILY_KEYS))}")
    inherited = _parsed(data["like"], _text(data["like"])).matrices if "like" in data else ()
    return Family(
        name,
        data["title"],
        tuple({"name": anchor} if isinstance(anchor, str) else anchor for anchor in data.get("recognised_by", ())),
        tuple(data.get("stacks", ())),
        (*data["matrix"], *inherited),
        tuple(data.get("beside", ())),
        tuple(data.get("unless", ())),
        tuple(data.get("blocks", ("{layer}",))),
        data.get("repeated", ""),
    )


# --- patterns of names ------------------------------------------------------------------------------------------


def is_inside(name: str, container: str) -> bool:
    """Whether a name, or a container, lies in a container."""
    return not container or name == container or name.startswith(container + ".")


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
    return NUMBER.sub(lambda match: match[0] if match[0] in literal else f"{match[1]}00", name)


@cache
def _literal_numbers() -> frozenset[str]:
    """Every number that a pattern spells out, with the component before it: ``net.2``."""
    patterns = (
        pattern
        for family in families()
        for pattern in (
            *(anchor["name"] for anchor in family.recognised_by),
            *(entry["name"] for entry in family.matrices),
            *family.beside,
            *family.unless,
        )
    )
    return frozenset(match[0] for pattern in patterns for match in NUMBER.finditer(pattern))


# --- patterns of shapes -----------------------------------------------------------------------------------------


def shape_fits(pattern: Sequence[str], shape: tuple[int, ...]) -> bool:
    """Whether a shape fits a pattern of letters (equal letters, equal sizes), multiples (3d), numbers and ``*``."""
    sizes: dict[str, int] = {}
    return len(pattern) == len(shape) and bind(pattern, shape, sizes) and multiples_hold(pattern, shape, sizes)


def bind(pattern: Sequence[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Note the size of every letter of a pattern in ``sizes``; false where a letter has another one already."""
    letters = [(token, size) for token, size in zip(pattern, shape, strict=True) if token.isalpha()]
    return all(sizes.setdefault(token, size) == size for token, size in letters)


def multiples_hold(pattern: Sequence[str], shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    """Whether numbers (3) and multiples of letters (3d) in a pattern agree with the sizes of the letters."""
    for token, size in zip(pattern, shape, strict=True):
        number, letter = token.rstrip("abcdefghijklmnopqrstuvwxyz"), token.lstrip("0123456789")
        if number.isdigit() and size != int(number) * (sizes.get(letter, -1) if letter else 1):
            return False
    return True


# --- which family claims which stack of blocks ------------------------------------------------------------------


def claims(skeletons: Collection[str], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Family]:
    """Container (as a skeleton) of every recognised stack of blocks → the family that claims it, in file order.

    A family claims a container where all its recognising patterns occur with equal text before the block and none
    of its `unless` patterns does. Of several, the one that names most skeletons there wins, then the one with more
    evidence. Of two containers one inside the other, the one with more named skeletons stays.

    Args:
        skeletons: the names of a model with their numbers set to 00, in its order.
        shape: the shape of the first parameter with a skeleton.
    """
    best: dict[str, tuple[tuple[int, int, str], Family]] = {}
    for family in families():
        beside = all(any(matcher(pattern).search(s) for s in skeletons) for pattern in family.beside)
        if not family.recognised_by or not beside:
            continue
        anchored = [
            {
                container
                for container, skeleton in family.containers(anchor["name"], skeletons)
                if "shape" not in anchor or shape_fits(anchor["shape"], shape(skeleton))
            }
            for anchor in family.recognised_by
        ]
        look_alikes = {c for pattern in family.unless for c, _ in family.containers(pattern, skeletons)}
        for container in set.intersection(*anchored) - look_alikes:
            named = sum(is_inside(s, container) and family.block_rule(s, container) is not None for s in skeletons)
            rank = (named, len(family.recognised_by) + len(family.beside), family.name)
            if container not in best or rank > best[container][0]:
                best[container] = (rank, family)
    claimed: dict[str, Family] = {}
    for container in sorted(best, key=lambda c: (-best[c][0][0], c)):
        if not any(is_inside(container, other) or is_inside(other, container) for other in claimed):
            claimed[container] = best[container][1]
    return {
        c: claimed[c]
        for c in sorted(claimed, key=lambda c: next(i for i, s in enumerate(skeletons) if is_inside(s, c)))
    }
