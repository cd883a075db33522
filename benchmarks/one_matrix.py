"""One large matrix, all ranks and the leading 200: time and error of specbasis and of torch.linalg.svd in float32.

    python benchmarks/one_matrix.py --shape 4096 11008

The error is that of the leading 200 singular values, relative to the largest: specbasis bounds its own; that of the
float32 values is their distance from those, which is right up to that bound.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from specbasis import decompose
from specbasis.core.krylov import approximate_svd
from specbasis.core.svd import half_svd


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Seconds, CPU seconds, result."""
    started, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - started, time.process_time() - cpu, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 11008))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    g = torch.Generator().manual_seed(0)
    rows, columns = arguments.shape
    W = torch.randn(rows, columns, generator=g) * 0.02
    W += 0.002 * torch.randn(rows, 16, generator=g) @ torch.randn(16, columns, generator=g)
    *reference, (_, theirs, _) = timed(lambda: torch.linalg.svd(W, full_matrices=False))
    print(f"{rows}×{columns} float32, {arguments.threads} threads; seconds, CPU s, share of torch.linalg.svd")
    print(f"{'torch.linalg.svd float32':34}{reference[0]:8.2f}{reference[1]:8.2f}")
    ways: dict[str, Callable[[], object]] = {
        "all ranks, both sides": lambda: decompose(W),
        "leading 200, both sides": lambda: decompose(W, 200),
        "values alone": lambda: half_svd(W, 0),
        "leading 10, iteration": lambda: approximate_svd(W, 10),
    }
    for name, way in ways.items():
        *took, found = timed(way)
        share = [a / b for a, b in zip(took, reference, strict=True)]
        line = f"{name:34}{took[0]:8.2f}{took[1]:8.2f}  {share[0]:.2f} of the time, {share[1]:.2f} of the CPU time"
        known = min(len(found.spectrum), 200)
        bound = float((found.spectrum_error[:known] / found.spectrum[0]).max())
        off = float(((theirs[:known].double() - found.spectrum[:known]).abs() / found.spectrum[0]).max())
        print(f"{line}; bound on its error {bound:.0e}, error of the float32 values {off:.0e}")


if __name__ == "__main__":
    main()
