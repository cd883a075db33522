"""What a comparison will cost, from shapes alone: flops, seconds, memory; and the rates of this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache

import torch

from specbasis.checkpoint.regular import read_json
from specbasis.core.blocks import BLOCK_BYTES
from specbasis.core.errors import InputError
from specbasis.core.krylov import quick_cost
from specbasis.core.svd import half_svd
from specbasis.jobs.cache import cache_folder
from specbasis.jobs.folder import write_json
from specbasis.measures.measure import Measure
from specbasis.measures.table import needed, reads

EIGEN = 11.0
"""Time of a symmetric eigensolver for one n³, in flops at the rate of a product; half of it for values alone."""


@dataclass(frozen=True)
class Work:
    """What a computation costs.

    Attributes:
        products: flops of matrix products.
        eigen: Σ n³ over the eigensolvers' matrices, half of it where only values are wanted.
        bytes: peak memory beside the matrices themselves.
    """

    products: float = 0.0
    eigen: float = 0.0
    bytes: int = 0

    @property
    def flops(self) -> float:
        """All of it in flops at the rate of a product."""
        return self.products + EIGEN * self.eigen

    def seconds(self, rates: Rates) -> float:
        """Predicted time on one thread."""
        return self.products / rates.products + self.eigen * rates.eigen


@dataclass(frozen=True)
class Rates:
    """How fast one thread of a machine is.

    Attributes:
        products: flops per second of a float64 product.
        eigen: seconds per n³ of a symmetric eigensolver with vectors.
    """

    products: float
    eigen: float


def matrix_work(
    shape: tuple[int, int],
    measures: Sequence[Measure],
    ranks: int,
    pairs: int = 1,
    draws: int = 0,
    *,
    quick: bool = False,
) -> Work:
    """What comparing one matrix with some finetunes of it costs.

    Gram matrix n²m, eigensolver of n³, and for k ranks of base and tuned the cheaper of a cross product n²m and of
    back-products 2nmk, n the short side; what reads every vector of base, a few products more; each draw of a
    random update, one decomposition and one product. With ``quick``, `quick_svd` where it iterates.
    """
    n, m = sorted(shape)
    k = min(ranks, n)
    need = needed(measures, k)
    if quick and (cost := quick_cost(n, m, k)) is not None:
        times = sum(1 if which == "base" else pairs for which, count in need.items() if count is not None)
        return Work(times * cost[0], 0.0, cost[1] + BLOCK_BYTES)
    implied = 2 * k > n
    products = eigen = 0.0
    for which, count in need.items():
        if count is not None:
            times = 1 if which == "base" else pairs
            products += times * (1.125 * n * n * m + (0 if implied or not count else 2 * n * m * k + 3 * m * k * k))
            eigen += times * n**3 * (1.0 if count else 0.5)
    crossed = {measure.vectors for measure in measures if len(measure.vectors) == 2}
    if implied:
        products += len(crossed) * pairs * (2 * n * n * m + 2 * n * n * k)
    whole = reads(measures, "every")
    if whole:
        products += pairs * (4 * n * n * k + 2 * n * m * k)  # intruders
    if any("every" in measure.reads and measure.values for measure in measures):
        products += pairs * ((2 * n * n * m + 4 * n**3) if 3 * k > n else (8 * n * m * k + 4 * n * n * k))
    products += pairs * draws * (1.125 * n * n * m + 2 * n * n * m)
    eigen += pairs * draws * n**3
    solver = 8 * (6 if whole else 5) * n * n
    blocks = 2 * min(8 * n * m, BLOCK_BYTES)
    held = sum(8 * (n * k + (0 if implied else m * k)) + min(8 * n * m, BLOCK_BYTES) for c in need.values() if c)
    return Work(products, eigen, solver + blocks + held)


@cache
def rates() -> Rates:
    """The rates of this machine, measured once (about a second) and kept in the user's cache folder."""
    path = cache_folder() / "rates.json"
    key = f"{platform.node()} {platform.machine()} torch {torch.__version__}"
    try:
        kept = read_json(path)
        return Rates(**kept[key])
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    measured = _measure()
    with suppress(InputError):  # a home that cannot be written: measured again next time
        write_json(path, {**kept, key: asdict(measured)})
    return measured


def _measure() -> Rates:
    n = 768
    W = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _fastest(lambda: W @ W)
        return Rates(2 * n**3 / product, (_fastest(lambda: half_svd(W, n, implied=True)) - product) / n**3)
    finally:
        torch.set_num_threads(threads)


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Time until all tasks are done, longest first, each on the worker that is free first."""
    free = [0.0] * workers
    for task in sorted(seconds, reverse=True):
        at = min(range(workers), key=free.__getitem__)
        free[at] += task
    return max(free)
