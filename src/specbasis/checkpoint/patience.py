"""Patience with the Hub: a request is repeated while its failure can pass, and a final one is a line of advice."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from specbasis.core.errors import InputError

RETRIES = 5
"""How often a request is repeated after a failure that can pass: no connection, cut off, 408, 429, 5xx."""

WAIT_SECONDS = 8.0
"""Wait before the first repetition; it doubles with each. A server's Retry-After wins, up to `MAX_WAIT_SECONDS`."""

MAX_WAIT_SECONDS = 300.0

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class CutOffError(OSError):
    """A body that ended before its announced end, or ran past it: worth another try."""


class NoRangesError(OSError):
    """A server that sends the whole file when asked for a part."""


def patiently(call: Callable[[], T], source: str, repository: str, request: str) -> T:
    """Call, repeat while the failure can pass, and turn a final failure into one line that says what to do."""
    for attempt in range(RETRIES + 1):
        try:
            return call()
        # Whatever the client or the answer of a broken server raises is a failure of this one request.
        except Exception as error:
            if attempt == RETRIES or not _can_pass(error):
                raise _explained(error, source, repository, request) from error
            seconds = _retry_after(error) or WAIT_SECONDS * 2**attempt
            if seconds >= 1:
                _LOG.warning("%s: %s; trying again in %.0f s", repository, _brief(error), seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0) or 0)


def _is_unresolved(error: BaseException | None) -> bool:
    """Whether the Hub's name has no address: the machine is offline, and waiting does not help."""
    cause = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _can_pass(error: BaseException | None) -> bool:
    from huggingface_hub import errors

    if error is None or isinstance(error, (errors.OfflineModeIsEnabled, NoRangesError)) or _is_unresolved(error):
        return False
    if isinstance(error, errors.LocalEntryNotFoundError):  # the client hides what went wrong behind it
        return _can_pass(error.__cause__)
    if _status(error):
        return _status(error) in (408, 429) or _status(error) >= 500
    cut_off = type(error) is OSError and error.errno is None  # the client's own check of the length
    return cut_off or isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError, CutOffError))


def _retry_after(error: BaseException) -> float:
    """Seconds that a server asked to wait, 0 where it asked for nothing."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    value = str(getattr(response, "headers", {}).get("Retry-After", ""))
    return min(float(value), MAX_WAIT_SECONDS) if value.isdigit() else 0.0


def _explained(error: BaseException, source: str, repository: str, request: str) -> InputError:
    """One line for a failed request: what was asked of which repository, why it failed, what to do."""
    from huggingface_hub import errors

    if isinstance(error, InputError):
        return error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        hidden = error.__cause__
        error = error if isinstance(hidden, errors.OfflineModeIsEnabled) else hidden
    return InputError(f"{source}: {_advice(error, repository, request)}")


def _advice(error: BaseException, repository: str, request: str) -> str:
    from huggingface_hub import errors

    status = _status(error)
    file = f"{request or 'the repository'} of {repository}"
    cases: list[tuple[bool | type | tuple[type, ...], str]] = [
        (_is_unresolved(error),
         f"no such file or folder, and the Hub cannot be reached to look for {repository} (its name has no "
         "address); check the path, or the connection"),
        (errors.GatedRepoError,
         f"{repository} is gated; ask for access on its page, then log in (hf auth login) or set HF_TOKEN"),
        (errors.DisabledRepoError, f"{repository} is disabled on the Hub; use another source for it"),
        (errors.RevisionNotFoundError,
         f"{repository} has no {request or 'such revision'}; name a branch, tag or commit that it has"),
        (isinstance(error, errors.RepositoryNotFoundError) or status == 401,
         f"no repository {repository} on the Hub that this token may see (and no such local path); check the name, "
         f"and log in (hf auth login) or set HF_TOKEN if it is private{_timm_hint(repository)}"),
        ((errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError),
         f"{file} is not in the cache and HF_HUB_OFFLINE is set; unset it, or download it first"),
        (errors.EntryNotFoundError, f"{repository} has no {request or 'such file'}"),
        (errors.HFValidationError, f"{repository!r} is not a name of a repository; want org/name"),
        (status == 403,
         f"access to {file} is forbidden to this token; make one with the permission to read it"),
        (status == 429,
         f"the Hub limits the rate of requests ({repository}, still after {RETRIES} retries); wait, or set "
         "HF_TOKEN for a higher limit"),
        (NoRangesError, f"the server does not send parts of {file} ({error}); read it without streaming"),
        (_can_pass(error),
         f"{file} could not be read, still after {RETRIES} retries ({_brief(error)}); check the connection and try "
         "again, or set HF_HUB_OFFLINE=1 to read what is in the cache"),
    ]  # fmt: skip
    for case, text in cases:
        if case is True or (case is not False and isinstance(error, case)):
            return text
    return f"{file}: {_brief(error)}"


def _timm_hint(repository: str) -> str:
    if repository.startswith("timm/") and "." not in repository:
        return "; timm's names end in a pretrained tag, as in timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"
    return ""


def _brief(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
