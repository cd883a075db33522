"""Trees over checkpoints of known kinship: the shortest edges, merges, and what gives them a direction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from specbasis.lineage.kinship import Kinship, Shared

STRAIGHT = 1e-3
"""A merge lies on the line between two others to this share of their squared distance."""

BRANCHES = 3
"""A checkpoint with so many branches is the centre of a star."""

RIGHT_ANGLE = 0.5
"""Cosine of two updates below which the shortest edges connect both to their base and not to each other."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """A step of training, or of copying, between two checkpoints.

    Attributes:
        parent, child: as the tree is drawn.
        direction: why the parent comes first: "form", "star", "vocabulary", "merge", or "unknown".
        kinship: the figures of the two.
    """

    parent: str
    child: str
    direction: str
    kinship: Kinship


@dataclass(frozen=True)
class Tree:
    """Checkpoints that share an ancestor.

    Attributes:
        root: the checkpoint at which it is drawn to begin.
        reason: what makes it the root, or that nothing does.
        identified: whether anything does.
        edges: parents before children.
        members: all checkpoints of it.
        angles: median cosine between the updates of each centre of a star, by its name: independent: 0.
    """

    root: str
    reason: str
    identified: bool
    edges: tuple[Edge, ...]
    members: tuple[str, ...]
    angles: Mapping[str, float] = field(default_factory=dict)


def trees(shared: Shared, kinships: Mapping[tuple[int, int], Kinship]) -> tuple[Tree, ...]:
    """The trees of some checkpoints, largest first."""
    forest = Forest(shared, {**kinships, **{(j, i): k for (i, j), k in kinships.items()}})
    return tuple(
        sorted((forest.tree(members) for members in forest.components), key=lambda tree: -len(tree.members))
    )


@dataclass(frozen=True, eq=False)
class Forest:
    """All trees of some checkpoints, each of which is called by its number.

    Attributes:
        shared: the checkpoints.
        kinships: of every two with matrices in common, in both orders.
    """

    shared: Shared
    kinships: Mapping[tuple[int, int], Kinship]

    @cached_property
    def apart(self) -> Floats:
        """Squared distance of every two; infinite where they have nothing in common."""
        apart = np.full((len(self.shared.names),) * 2, math.inf)
        np.fill_diagonal(apart, 0.0)
        for at, kinship in self.kinships.items():
            apart[at] = kinship.distance**2
        return apart

    @cached_property
    def related(self) -> Floats:
        """Squared distance of every two that are related; infinite where they are not."""
        related = self.apart.copy()
        for at, kinship in self.kinships.items():
            related[at] = related[at] if kinship.related else math.inf
        return related

    @cached_property
    def merges(self) -> dict[int, tuple[int, int]]:
        """Checkpoints on the straight line between two others, well inside of it, and those two."""
        nearest: dict[int, tuple[float, tuple[int, int]]] = {}
        n = len(self.apart)
        for m in range(n):
            for i, j in itertools.combinations([k for k in range(n) if k != m], 2):
                whole, first, second = self.apart[i, j], self.apart[m, i], self.apart[m, j]
                if not (math.isfinite(whole + first + second) and 0 < first < whole and 0 < second < whole):
                    continue
                part = (whole + first - second) / (2 * whole)  # where m's foot on the line from i to j is
                off = first - part**2 * whole
                if 0.05 < part < 0.95 and off <= STRAIGHT * whole and (m not in nearest or off < nearest[m][0]):
                    nearest[m] = (off, (i, j))
        return {m: parents for m, (_, parents) in nearest.items() if not set(parents) & set(nearest)}

    @cached_property
    def near(self) -> dict[int, list[int]]:
        """The neighbours of each checkpoint in the shortest trees over what is related, merges left out.

        Every edge is given its place in the order of lengths as its length: a tree of shortest edges depends on
        the order alone, equal distances keep that of the checkpoints, and copies at distance 0 have an edge too.
        """
        members = [k for k in range(len(self.apart)) if k not in self.merges]
        edges = [ij for ij in itertools.combinations(members, 2) if math.isfinite(self.related[ij])]
        edges.sort(key=lambda ij: self.related[ij])
        first, second = np.array(edges, int).reshape(-1, 2).T
        lengths = coo_array((np.arange(1, len(edges) + 1), (first, second)), shape=self.apart.shape)
        shortest = np.sort(minimum_spanning_tree(lengths.tocsr()).data).astype(int) - 1
        near: dict[int, list[int]] = {k: [] for k in range(len(self.apart))}
        for i, j in (edges[place] for place in shortest):
            near[i].append(j)
            near[j].append(i)
        return near

    @cached_property
    def components(self) -> list[list[int]]:
        """The checkpoints of each tree; a merge belongs to that of its first parent."""
        edges = [(i, j) for i, near in self.near.items() for j in near]
        edges += [(m, parents[0]) for m, parents in self.merges.items()]
        first, second = np.array(edges, int).reshape(-1, 2).T
        graph = coo_array((np.ones(len(edges)), (first, second)), shape=self.apart.shape)
        n, label = connected_components(graph, directed=False)
        return sorted(np.flatnonzero(label == c).tolist() for c in range(n))

    @cached_property
    def copies(self) -> set[tuple[int, int]]:
        """(a, b) where b is a in a form that loses something."""
        return {
            (i, j)
            for (i, j), k in self.kinships.items()
            if k.form not in ("", "equal") and (self.shared.names[i] == k.first) != k.form.startswith("<")
        }

    def tree(self, members: Sequence[int]) -> Tree:
        """The tree over some checkpoints, drawn from its root."""
        names, inside = self.shared.names, [k for k in members if k not in self.merges]
        angles = {k: self.angle(k) for k in inside if len(self.near[k]) >= 2}
        root, reason, identified = self.root(inside, angles)
        edges: list[Edge] = []
        waiting, seen = [root], {root}
        while waiting:
            parent = waiting.pop(0)
            for child in sorted(set(self.near[parent]) - seen, key=lambda k: self.related[parent, k]):
                seen.add(child)
                waiting.append(child)
                direction = "form" if (parent, child) in self.copies else "star" if identified else "unknown"
                if direction == "unknown" and (parent, child) in self.shared.grown:
                    direction = "vocabulary"
                edges.append(Edge(names[parent], names[child], direction, self.kinships[parent, child]))
        for m in members:
            for parent in self.merges.get(m, ()):
                edges.append(Edge(names[parent], names[m], "merge", self.kinships[parent, m]))
        by_name = {names[k]: cosine for k, cosine in angles.items()}
        return Tree(names[root], reason, identified, tuple(edges), tuple(names[k] for k in members), by_name)

    def angle(self, k: int) -> float:
        """Median cosine between the updates from one checkpoint to its neighbours; NaN where there are none."""
        D = self.related
        cosines = [
            (D[k, i] + D[k, j] - D[i, j]) / (2 * math.sqrt(D[k, i] * D[k, j]))
            for i, j in itertools.combinations(self.near[k], 2)
            if D[k, i] > 0 and D[k, j] > 0
        ]
        return float(np.median(cosines or [math.nan]))

    def root(self, members: Sequence[int], angles: Mapping[int, float]) -> tuple[int, str, bool]:
        """Where a tree begins, why, and whether that is identified."""
        if len(members) == 1:
            return members[0], "no relative here: a training of its own", True
        branches = {
            k: sum((k, other) not in self.copies and (other, k) not in self.copies for other in self.near[k])
            for k in members
        }
        stars = [k for k in members if branches[k] >= BRANCHES and angles.get(k, math.nan) < RIGHT_ANGLE]
        if stars:
            centre = max(stars, key=lambda k: branches[k])
            return (
                centre,
                f"centre of a star: {branches[centre]} branches, median cosine of their updates "
                f"{angles[centre]:.2f}; at most one of them can lead towards it",
                True,
            )
        later = {j for i, j in self.copies if j in self.near[i]}
        first = [k for k in members if k not in later]
        if len(members) == 2 and len(first) == 1:
            return first[0], "the other is a copy of it in a form that loses something", True
        for k in first:
            if any((k, other) in self.shared.grown for other in self.near[k]):
                hint = "direction not identifiable from the weights; a vocabulary that grew hints at it"
                return k, hint, False
        middle = min(first, key=lambda k: float(np.sum(np.sqrt(self.related[k, members]))))
        return middle, "direction not identifiable from the weights: any of these may be the base", False
