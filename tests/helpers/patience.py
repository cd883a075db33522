"""The one place where a test's patience comes from: a net under a hang, never a measure of speed."""

import time
from collections.abc import Callable

PATIENCE = 1800.0
"""Seconds after which what has not happened is taken never to happen, on any machine under any load."""


def until(happened: Callable[[], object], gave_up: Callable[[], object] = lambda: False) -> bool:
    """Wait for a condition; whether it came about before another one did, or before patience ran out."""
    end = time.monotonic() + PATIENCE
    while not (met := bool(happened())) and not gave_up() and time.monotonic() < end:
        time.sleep(0.005)
    return met or bool(happened())
