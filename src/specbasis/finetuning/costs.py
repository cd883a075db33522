"""What a run costs: peak memory, time for each epoch, bytes on disk."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


@contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """Peak memory of what runs inside, in bytes, above what was there before.

    On a GPU: torch's peak of allocated memory. Else, on Linux: the peak of the resident set, less the resident set
    when it began (libraries, data); elsewhere None.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: int(torch.cuda.max_memory_allocated() - before)
        return
    try:  # give freed memory back and restart the kernel's peak: an earlier run in this process does not count
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        yield lambda: None
        return
    yield lambda: _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    entry = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(entry[1]) * 1024 if entry else 0


class Stopwatch(TrainerCallback):
    """Wall and processor time of every epoch of training, evaluation left out.

    Attributes:
        wall: seconds of each epoch.
        cpu: processor seconds of each epoch, of all threads of this process: what a busy machine does not change
            much.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._start = (0.0, 0.0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._start = (time.perf_counter(), time.process_time())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop; evaluation and saving come after."""
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


class EpochLines(TrainerCallback):
    """A line at the end of every epoch: its number, the loss, and the time left.

    Attributes:
        tell: what is given the line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self._start = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, at the epoch that a checkpoint was in."""
        self._start = (time.perf_counter(), state.epoch or 0.0)
        if state.is_world_process_zero:
            self.tell(f"training: {state.max_steps} steps, epochs: {args.num_train_epochs:g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what takes time now."""
        if state.is_world_process_zero:
            self.tell("trained; the dev set and what was forgotten are judged now")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The epoch's loss is logged when it ends."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        started, first = self._start
        epoch_seconds = (time.perf_counter() - started) / max(state.epoch - first, 1e-9)
        left = timedelta(seconds=round(epoch_seconds * max(args.num_train_epochs - state.epoch, 0)))
        self.tell(f"epoch {state.epoch:g} of {args.num_train_epochs:g}: loss {logs['loss']:.4f}, {left} left")


def weights_bytes(folder: Path) -> int:
    """Bytes of the weights files right in a folder: what must be kept for each task, checkpoints left out."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
