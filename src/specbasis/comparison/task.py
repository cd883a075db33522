"""One base matrix and what it is compared with: the work that travels to a worker, and the rows that come back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from specbasis.architecture.key import MatrixRef
from specbasis.architecture.pair import MatrixPair
from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned
from specbasis.comparison.decomposition import decompose_pair
from specbasis.comparison.options import Options
from specbasis.core.draws import KINDS
from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import NonFiniteError
from specbasis.core.quantised import Grid
from specbasis.jobs.cost import Work, matrix_work
from specbasis.jobs.results import Figures, rows_of
from specbasis.measures.measure import Measure, Values
from specbasis.measures.table import measure_all
from specbasis.measures.triple import Absent, Decomposition

Source = str | Mapping[str, Tensor]
"""What a checkpoint is called in every process, or its tensors, which stay in this one."""

Outcome = tuple[str, pa.Table | str]
"""Label of a pair, and its rows of a matrix, or why there are none."""


@dataclass(frozen=True)
class Task:
    """One base matrix and what it is compared with. Holds names and places, never tensors of files.

    Attributes:
        base: source of the base checkpoint.
        todo: (label, source of the tuned checkpoint, where the matrix is in both).
        options: how far to look, and where to compute.
    """

    base: Source
    todo: tuple[tuple[str, Source, MatrixPair], ...]
    options: Options

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.todo[0][2].key.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.todo[0][2].base.shape

    @cached_property
    def work(self) -> Work:
        """What it is predicted to cost."""
        return matrix_work(
            self.shape,
            self.options.taken,
            self.options.leading,
            len(self.todo),
            draws=self.options.null_samples * len(KINDS),
            quick=self.options.quick,
        )

    @property
    def flops(self) -> float:
        """Predicted work."""
        return self.work.flops

    @property
    def bytes(self) -> int:
        """Predicted peak memory, with that of the two matrices, as float32."""
        return self.work.bytes + 2 * FORMATS["float32"].bytes * self.shape[0] * self.shape[1]

    def run(self) -> list[Outcome]:
        """Compare; return the rows, or the error, of each pair."""
        outcomes: list[Outcome] = []
        decomposed: dict[MatrixRef, Decomposition] = {}
        base = _opened(self.base, None, self.options.stream)
        for label, source, matched in self.todo:
            tuned = _opened(source, self.base, self.options.stream)
            where = f"{matched.key.name} in "
            try:
                triple = decompose_pair(
                    matched.base.read(base),
                    matched.tuned.read(tuned),
                    self.options,
                    names=(where + base.source, where + tuned.source),
                    base=decomposed.get(matched.base),
                    update=matched.tuned.delta_factors(tuned),
                    grids=partial(_grids, base=(matched.base, base), tuned=(matched.tuned, tuned)),
                    heads=self.options.heads_of(base, matched),
                )
                rows = _table(label, matched, measure_all(triple, self.options.taken), self.options.tolerance)
            except NonFiniteError as error:
                outcomes.append((label, str(error)))
            else:
                whole = triple.base if triple.every is None else triple.every
                is_shared = triple.scale == 1.0 and not isinstance(whole, Absent)
                decomposed = {matched.base: whole} if is_shared else {}
                outcomes.append((label, rows))
        return outcomes


def _grids(**sides: tuple[MatrixRef, Checkpoint]) -> dict[str, Grid]:
    """Side → the matrix with its levels, where it is stored quantised."""
    grids = {side: ref.grid(checkpoint) for side, (ref, checkpoint) in sides.items()}
    return {side: grid for side, grid in grids.items() if grid is not None}


_OPENED: dict[Any, Checkpoint] = {}


def _opened(source: Source, base: Source | None, stream: bool) -> Checkpoint:
    """A checkpoint of the run that this process is working for, opened once."""
    key = _key(source, base)
    if key not in _OPENED:
        _OPENED[key] = (
            open_checkpoint(source, stream=stream)
            if base is None
            else open_tuned(source, _opened(base, None, stream), stream=stream)
        )
    return _OPENED[key]


@contextmanager
def sharing(checkpoints: Iterable[tuple[Source, Source | None, Checkpoint]]) -> Iterator[None]:
    """Let the tasks of this process find what is open already: (source, source of its base, checkpoint).

    Afterwards nothing stays open, since files may change.
    """
    opened = {_key(source, base): checkpoint for source, base, checkpoint in checkpoints}
    _OPENED.update(opened)
    try:
        yield
    finally:
        for key in opened:
            _OPENED.pop(key, None)


def _key(source: Source, base: Source | None) -> Any:
    """A source by its name, or by the identity of its tensors; a tuned one by that of its base as well."""
    return tuple(x if isinstance(x, str) else id(x) for x in (source, base))


def _table(
    label: str, matched: MatrixPair, measured: Iterable[tuple[Measure, Values]], tolerance: float
) -> pa.Table:
    """The rows of one matrix of one pair."""
    return rows_of(matched.key, matched.base.shape, (_figures(label, *figures, tolerance) for figures in measured))


def _figures(label: str, measure: Measure, values: Values, tolerance: float) -> Figures:
    index = (values.index or np.arange(len(values.value))) if measure.index else None
    resolved = values.resolved(tolerance, relative=measure.unit == "weight")
    if resolved is None or values.bound is None:
        return Figures(label, measure.name, values.value.cpu().numpy(), index)
    return Figures(
        label, measure.name, values.value.cpu().numpy(), index, values.bound.cpu().numpy(), resolved.cpu().numpy()
    )
