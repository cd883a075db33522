"""Regular expressions that others wrote, matched in bounded time: Python's own engine may backtrack for ever.

A parsed expression maps the places at which a match may stand to those at which it may stand behind each part.
There are no more places than characters, so that nothing is tried twice, whatever the expression.

Source: Thompson 1968, Regular expression search algorithm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from specbasis.core.errors import InputError

BUDGET = 5_000_000
"""Steps that all matches of one `Matcher` may take together, some seconds; names and patterns of a large model take
a thousandth."""

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_LETTERS = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)


class Matcher:
    """Matches names against the patterns of one file, as PEFT does: the end of a name, from a component's start.

    Args:
        where: the file, named in errors.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.left = BUDGET
        self.parsed: dict[str, Any] = {}
        self.atoms: dict[int, re.Pattern[str]] = {}

    def first(self, patterns: Iterable[str], name: str) -> str | None:
        """The first pattern that matches the end of a name from the start of a component, ``(.*[.])?(pattern)$``.

        Raises:
            InputError: one is no pattern, refers back to a group, or takes too long.
        """
        return next((pattern for pattern in patterns if self._matches(pattern, name)), None)

    def whole(self, pattern: str, name: str) -> bool:
        """Whether a pattern matches all of a name.

        Raises:
            InputError: as `first`.
        """
        return self._matches(pattern, name, whole=True)

    def _matches(self, pattern: str, name: str, *, whole: bool = False) -> bool:
        if pattern == name:
            return True
        try:
            if pattern not in self.parsed:
                parsed = _parser.parse(pattern)
                plain = all(kind in _LETTERS for kind, _ in parsed)  # nothing to try twice: Python's engine is fast
                self.parsed[pattern] = re.compile(rf"(.*\.)?({pattern})$") if plain else parsed
            self._spend(1)
            if isinstance(self.parsed[pattern], re.Pattern):
                matched = self.parsed[pattern].match(name)
                return bool(matched) and not (whole and matched[1])
            starts = {0} if whole else {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
            return len(name) in self._behind(self.parsed[pattern], name, starts)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{self.where}: {pattern[:80]!r} is no pattern ({error})") from error

    def _spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise InputError(f"{self.where}: its patterns take too long to match; write simpler ones")

    def _behind(self, parts: Iterable[tuple[Any, Any]], name: str, places: set[int]) -> set[int]:
        """Where a match of some parts that began at one of the places may end."""
        for part in parts:
            if not places:
                break
            places = self._step(part, name, places)
        return places

    def _step(self, part: tuple[Any, Any], name: str, places: set[int]) -> set[int]:
        kind, value = part
        self._spend(len(places))
        if kind is _constants.BRANCH:
            return set().union(*(self._behind(branch, name, places) for branch in value[1]))
        if kind is _constants.SUBPATTERN and not (value[1] or value[2]):
            return self._behind(value[3], name, places)
        if kind in _REPEATS:
            least, most, inner = value
            return self._repeated(least, most, inner, name, places)
        if kind in (_constants.ASSERT, _constants.ASSERT_NOT) and value[0] > 0:
            wanted = kind is _constants.ASSERT
            return {place for place in places if bool(self._behind(value[1], name, {place})) == wanted}
        if kind not in (*_LETTERS, _constants.AT):
            raise re.error(f"{str(kind).lower()} is not supported here")
        if id(part) not in self.atoms:
            atom = _parser.SubPattern(_parser.State(), [part])
            self.atoms[id(part)] = _compiler.compile(atom)
        return {match.end() for place in places if (match := self.atoms[id(part)].match(name, place))}

    def _repeated(self, least: int, most: int, parts: Any, name: str, places: set[int]) -> set[int]:
        """Behind so many repetitions; a place that was reached before, with fewer, is not followed again."""
        for _ in range(least):
            behind = self._behind(parts, name, places)
            if behind == places:
                break
            places = behind
        reached, new, count = set(places), places, least
        while new and count < most:
            new = self._behind(parts, name, new) - reached
            reached |= new
            count += 1
        return reached
