"""Weights that stand still, out of the way: on disk and mapped into memory, or, off a GPU, in the host's memory."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

_ALIGNED = 64


class Parked:
    """Frozen parameters of a model whose memory can be given back while nothing computes with them.

    The parameters stay what they are, with their values: only where these are held changes. A state dict taken
    meanwhile is complete.

    Args:
        model: of which they are.
        standing: names of the modules that do not run.
        folder: where a file of their size can be; it has no name and is gone with the process.
    """

    def __init__(self, model: nn.Module, standing: Iterable[str], folder: Path) -> None:
        names = tuple(f"{name}." for name in standing)
        parameters = {
            id(p): p for name, p in model.named_parameters(remove_duplicate=False) if f"{name}.".startswith(names)
        }
        used = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not f"{n}.".startswith(names)}
        self.parameters = [
            p
            for key, p in parameters.items()
            if key not in used and type(p) is nn.Parameter and not p.requires_grad and p.is_contiguous()
        ]
        self.folder = folder
        self.device: torch.device | None = None

    @property
    def bytes(self) -> int:
        """Memory that is given back."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    def out(self) -> None:
        """Give the memory back. On a full disk nothing is given back, with a warning."""
        if self.device is not None or not self.parameters:
            return
        self.device = self.parameters[0].device
        if self.device.type != "cpu":
            for p in self.parameters:
                p.data = p.data.cpu()
            return
        try:
            self._map()
        except OSError as error:
            warnings.warn(f"{self.folder}: the frozen weights stay in memory ({error.strerror})", stacklevel=2)

    def back(self, *, for_good: bool = True) -> None:
        """Hold the values in the model's own memory again; for a batch in between a mapped file serves as well."""
        if self.device is None or (self.device.type == "cpu" and not for_good):
            return
        for p in self.parameters:
            p.data = p.data.clone() if self.device.type == "cpu" else p.data.to(self.device)
        self.device = None

    def _map(self) -> None:
        offsets = [0]
        for p in self.parameters:
            size = p.numel() * p.element_size()
            offsets.append(offsets[-1] + -(-size // _ALIGNED) * _ALIGNED)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for p, offset in zip(self.parameters, offsets, strict=False):
                file.seek(offset)
                file.write(p.data.view(-1).view(torch.uint8).numpy().data)
            file.truncate(offsets[-1])
            file.flush()
            mapped = torch.from_numpy(np.memmap(file, np.uint8, mode="r+"))
        for p, offset in zip(self.parameters, offsets, strict=False):
            part = mapped[offset : offset + p.numel() * p.element_size()]
            p.data = part.view(p.dtype).view(p.shape)


@contextmanager
def parking(model: nn.Module, standing: Iterable[str], folder: Path) -> Iterator[Parked]:
    """Parameters to be parked; at the end all are back."""
    parked = Parked(model, standing, folder)
    try:
        yield parked
    finally:
        parked.back()
