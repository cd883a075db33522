"""How lists, ranges and sizes are written as text; every flag and every file reads them here.

A range is ``k:m``, from k up to but without m; either end may be left out, and a negative one counts from the end:
``0:30``, ``30:``, ``:30``, ``-5:``. Ranges and single numbers are joined by commas: ``0:30,100,-5:``. The older
``k-m``, which includes both ends, is still read.
"""

from __future__ import annotations

import re
from pathlib import Path

from specbasis.core.errors import InputError

_RANGE = re.compile(r"(-?\d{1,7})?:(-?\d{1,7})?", re.ASCII)
_OLD = re.compile(r"(\d{1,7})-(\d{1,7})", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,10}", re.ASCII)


def words(text: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def labelled(word: str) -> tuple[str, str]:
    """Label and source of ``LABEL=SOURCE``; the label is empty where there is none, or the whole word is a path."""
    label, equals, source = word.partition("=")
    named = equals and source and re.fullmatch(r"[^/\\:]+", label) and not Path(word).exists()
    return (label, source) if named else ("", word)


def ranges(text: str, flag: str = "ranges") -> tuple[int | slice, ...]:
    """The single numbers, as they stand, and the ranges, as slices, of a text.

    Args:
        text: such as "0:30,100,-5:".
        flag: what the text was given for, named in an error.

    Raises:
        InputError: a word is neither, or a range is empty whatever it is taken of.
    """
    parsed: list[int | slice] = []
    for word in words(text):
        if match := _RANGE.fullmatch(word):
            first, stop = (None if end is None else int(end) for end in match.groups())
        elif match := _OLD.fullmatch(word):
            first, stop = int(match[1]), int(match[2]) + 1
        elif _NUMBER.fullmatch(word):
            parsed.append(int(word))
            continue
        else:
            raise _no_range(flag, word)
        if first is not None and stop is not None and (first < 0) == (stop < 0) and first >= stop:
            raise _no_range(flag, word)
        parsed.append(slice(first, stop))
    return tuple(parsed)


def numbers(text: str, flag: str = "blocks") -> tuple[int, ...]:
    """The numbers of a text whose ranges have two ends, in its order: "0,10:12" is 0, 10, 11.

    Raises:
        InputError: a word is no range, or one that counts from an end that is not known.
    """
    indices: list[int] = []
    for item in ranges(text, flag):
        first, stop = (item, item + 1) if isinstance(item, int) else (item.start or 0, item.stop)
        if first < 0 or stop is None or stop < 0:
            raise _no_range(flag, text)
        indices += range(first, stop)
    return tuple(indices)


def intervals(text: str, flag: str = "ranks", *, origin: int = 0) -> tuple[tuple[int, int], ...]:
    """Each range of a text as its interval [k, m); a single number n is [n, n + 1).

    Args:
        text: such as "0:10,10:30".
        flag: what the text was given for, named in an error.
        origin: what the first rank is called in the older spelling ``k-m``, and as a single number.

    Raises:
        InputError: a word is no range, or one without an end.
    """
    ends = []
    for word in words(text):
        shift = 0 if ":" in word else origin
        members = numbers(word, flag)
        if members[0] < shift:
            raise _no_range(flag, word)
        ends.append((members[0] - shift, members[-1] + 1 - shift))
    return tuple(ends)


def parse_bytes(text: str) -> int:
    """Bytes from "8GB", "1.5 GiB", "500M" or a plain number.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match:
        raise InputError(f"got {text!r}; want a size, such as 8GB or 500M")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))
    if size < 1:
        raise InputError(f"got {text!r}; want more than nothing, such as 8GB")
    return size


def parse_count(text: int | str, total: int) -> int:
    """How many of something: 60000, "60k", "1.5M", or a share of a total, "0.1%".

    Raises:
        InputError: it is none of these, or less than one.
    """
    match = re.fullmatch(
        r"(\d{1,15})|(\d{1,9}(?:\.\d{1,9})?) ?([kmg%])", str(text).strip(), re.IGNORECASE | re.ASCII
    )
    if not match or isinstance(text, bool):
        raise InputError(f"got {text!r}; want a number, such as 60000, 60k or 1.5M, or a share, such as 0.1%")
    whole, number, unit = match.groups()
    size = (
        int(whole)
        if whole
        else round(float(number) * {"k": 1e3, "m": 1e6, "g": 1e9}.get(unit.lower(), total / 100))
    )
    if size < 1:
        raise InputError(f"got {text!r}, which is {size} of {total:,}; want at least 1")
    return size


def human_bytes(size: float) -> str:
    """1.5 GiB, 300 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _no_range(flag: str, word: str) -> InputError:
    given = f"{flag} got" if flag.startswith("--") else f"got {flag}"
    return InputError(f"{given} {word!r}; want numbers and ascending ranges, such as 0,10:12")
