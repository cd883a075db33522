"""Errors that a user can act on; the command line prints them as one line and exits with code 2."""


class InputError(ValueError):
    """Something given from outside cannot be used: says what was got, what was wanted, and what to do."""


class NonFiniteError(InputError):
    """A matrix holds NaN or Inf, so it has no singular value decomposition."""
