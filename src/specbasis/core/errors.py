"""Errors that a user can act on; the command line prints them as one line and exits with code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something given from outside cannot be used: says what was got, what was wanted, and what to do."""


class NonFiniteError(InputError):
    """A matrix holds NaN or Inf, so it has no singular value decomposition."""


def unknown(kind: str, name: object, names: Iterable[str]) -> InputError:
    """What to raise where a name is none of some: it says the nearest one, and all that there are.

    Args:
        kind: what the name should have named: "measure", "role", "method".
        name: what was given.
        names: what there is.
    """
    names = list(names)
    nearest = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return InputError(f"no {kind} {name!r}; {hint}there is: {', '.join(names)}")
