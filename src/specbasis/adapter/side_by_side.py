"""Bases of many layers computed at once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from specbasis.adapter.adapted import AdaptedLayer
from specbasis.checkpoint.adapter_file import FROM_DATA

SIDE_BY_SIDE = 2048
"""Longest short side of matrices that are decomposed side by side, each on one thread.

An eigensolver of this size gains little from several threads. Larger: more memory at once.
"""

MOST_AT_ONCE = 8
"""Decompositions that may run side by side. Larger: more memory at once."""


def find_bases(layers: Iterable[AdaptedLayer], adapter_name: str) -> None:
    """Compute the bases of an adapter that was added with ``later``: matrices up to `SIDE_BY_SIDE` at once, one
    thread each; larger ones, and those on other devices, in turn with all threads.

    Raises: as `basis_of`.
    """
    waiting = [
        layer
        for layer in layers
        if adapter_name in layer.adapters and not layer.adapters[adapter_name].settled
        if layer.adapters[adapter_name].basis not in FROM_DATA
        if not (layer.stored_weight().is_meta or layer.spectral_M[adapter_name].is_meta)
    ]
    threads = torch.get_num_threads()
    small = [
        layer
        for layer in waiting
        if layer.stored_weight().device.type == "cpu" and min(layer.layout.shape(layer)) <= SIDE_BY_SIDE
    ]
    if threads > 1 and len(small) > 1:
        workers = min(threads, len(small), MOST_AT_ONCE)
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                list(executor.map(lambda layer: layer._compute(adapter_name), small))
        finally:
            torch.set_num_threads(threads)  # BLAS libraries hold this number for the whole process
    for layer in waiting:  # random numbers are drawn in order, whatever ran side by side
        if layer.adapters[adapter_name].settled:
            layer._start(adapter_name)
        else:
            layer.settle(adapter_name)
