"""Errors that a user can act on; the command line prints them as one line and exits with code 2."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from specbasis.core.text import printable


class InputError(ValueError):
    """Something given from outside cannot be used: says what was got, what was wanted, and what to do.

    One line, whatever names from files are in it: what would end the line or steer a terminal is spelt out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)).replace("\n", "\\n"))


class NonFiniteError(InputError):
    """A matrix holds NaN or Inf, so it has no singular value decomposition."""


def want(kind: str, known: Collection[str], *names: object) -> None:
    """Refuse a name that is none of some, with the nearest one, and all that there are.

    Args:
        kind: what the names should name: "measure", "role", "method".
        known: what there is.
        names: what was given.

    Raises:
        InputError: one of them is not known.
    """
    for name in names:
        if name not in known:
            raise InputError(f"no {kind} {name!r}; {guess(str(name), known)}there is: {', '.join(known)}")


def told(error: Exception) -> str:
    """An error in one line, its kind before what it says; an `InputError` needs none."""
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0]


_NO_MEMORY = re.compile("out of memory|can(no|')t allocate memory|failed to map segment", re.IGNORECASE)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, of Python, of torch or of the loader of its libraries, says that memory is lacking."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


class MissingExtra(InputError, ImportError):  # noqa: N818 - says what is missing
    """An optional library is not installed: says which, and the command that installs it."""


def guess(name: str, names: Iterable[str]) -> str:
    """For an error about a name that does not exist: "did you mean NEAREST? ", or nothing where none is like it."""
    known = {known.lower(): known for known in names}  # `FFN` is as near to `ffn` as a name can be
    near = get_close_matches(name.lower(), known, 1)
    return f"did you mean {known[near[0]]}? " if near else ""
