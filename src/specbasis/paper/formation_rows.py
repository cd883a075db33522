"""The rows of a formation grid: which trainings there are, and the curves of their matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specbasis.jobs.experiments import Row

Array = NDArray[np.float64]

GROUPS = ("final FFN", "all matrices")
"""The two feed-forward matrices of the last encoder block, which the paper shows, and every matrix of the
blocks."""

SAME_EPOCHS = 0.1
"""Pretrainings whose epochs differ by less than this share count as equally long."""


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of some matrices of an experiment, (matrices, steps).

    Attributes:
        aligned: alignment with the first checkpoint.
        size: size of the update, ‖delta‖/‖W‖.
        null: alignment that a Gaussian update as large as the whole one leaves.
        chance: alignment of independent directions.
    """

    aligned: Array
    size: Array
    null: Array
    chance: float

    @property
    def end(self) -> float:
        """Alignment of the last checkpoint with the first, mean over the matrices."""
        return float(self.aligned[:, -1].mean())

    @property
    def beyond_chance(self) -> float:
        """The same, less what independent directions have."""
        return self.end - self.chance

    @property
    def end_size(self) -> float:
        """‖delta‖/‖W‖ at the last checkpoint, mean over the matrices."""
        return float(self.size[:, -1].mean())

    def at_size(self, sizes: Array) -> float:
        """Alignment where the update of each matrix has a given size, on the line between checkpoints; mean."""
        return float(np.mean([_at(s, a, x) for s, a, x in zip(self.size, self.aligned, sizes, strict=True)]))


def _at(sizes: Array, aligned: Array, x: float) -> float:
    """The alignment when the update first reaches a size."""
    over = np.nonzero(sizes >= x)[0]
    j = int(over[0]) if len(over) else len(sizes) - 1
    if j == 0:
        return float(aligned[0])
    return float(np.interp(x, [sizes[j - 1], sizes[j]], [aligned[j - 1], aligned[j]]))


def at_equal_size(curves: Sequence[Curves]) -> list[float]:
    """Alignment of each, where every matrix's update is as large as the smallest that all of them reach."""
    sizes = np.min([c.size.max(axis=1) for c in curves], axis=0)
    return [c.at_size(sizes) for c in curves]


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows by what they are."""

    rows: Sequence[Row]

    def of(self, phase: str, **wanted: Any) -> list[Row]:
        """Rows of a phase whose experiments have these values."""
        return [
            row
            for row in self.rows
            if row.experiment["phase"] == phase
            and all(row.experiment.get(name) == value for name, value in wanted.items())
        ]

    def by_seed(self, phase: str, **wanted: Any) -> dict[int, list[Row]]:
        """The same, seed by seed."""
        rows: dict[int, list[Row]] = defaultdict(list)
        for row in self.of(phase, **wanted):
            rows[row.experiment["seed"]].append(row)
        return dict(rows)

    def families(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Sets of pretrainings, (images, steps), that differ in their images: equally many steps, or epochs."""
        sizes = sorted({(row.experiment["images"], row.experiment["steps"]) for row in self.of("pretrain")})
        families: list[tuple[str, list[tuple[int, int]]]] = []
        for steps in sorted({steps for _, steps in sizes}):
            same = [size for size in sizes if size[1] == steps]
            families += [(f"{steps} steps each", same)] if len(same) > 1 else []
        taken: set[tuple[int, int]] = set()
        for images, steps in sizes:
            same = [s for s in sizes if abs(s[1] * images / (s[0] * steps) - 1) < SAME_EPOCHS and s not in taken]
            if len(same) > 1:
                taken |= set(same)
                families.append((f"equal epochs ({', '.join(str(s) for _, s in same)} steps)", same))
        return families


def trained(row: Row) -> str:
    """What was trained: the task, or which pretraining."""
    experiment = row.experiment
    return experiment.get("task") or f"pretraining, {experiment['images']} images, {experiment['steps']} steps"


def members(row: Row, group: str) -> list[dict[str, Any]]:
    """What a row says of each matrix of a group."""
    inside = [matrix for matrix in row.values["matrices"].values() if matrix["block"] is not None]
    last = max(matrix["block"] for matrix in inside)
    if group == "all matrices":
        return inside
    return [matrix for matrix in inside if matrix["block"] == last and matrix["role"].startswith("ffn.")]


def curves(row: Row, group: str) -> Curves:
    """Curves of a group's matrices."""
    of = members(row, group)
    first, size, null = (
        np.array([matrix[name] for matrix in of], dtype=np.float64) for name in ("first", "update_first", "null")
    )
    return Curves(first, size, null, float(np.mean([matrix["chance"] for matrix in of])))
