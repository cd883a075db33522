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
from scipy.special import stdtrit

from specbasis.comparison import verdict
from specbasis.lineage.kinship import Kinship, Shared

STRAIGHT = 3e-3
"""A merge lies on the line between two others to this share of their squared distance; a slerp is off by θ²/64."""

BRANCHES = 3
"""A checkpoint with so many branches is the centre of a star."""

RIGHT_ANGLE = 0.05
"""Cosine of two updates below which they lead away from where they meet, and not from a base beside it.

Between siblings of equal updates it is 1/2, at a gentle one among strong ones the square of its update over theirs.
"""

OPPOSITE = -0.5
"""Cosine of two updates below which what they start at lies between their ends: of a merge of the two it is -1."""

MARGIN = 0.06
"""An edge is resolved where the next best is longer by this share of its square, and by three standard errors."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """A step of training, or of copying, between two checkpoints.

    Attributes:
        parent, child: as the tree is drawn.
        direction: why the parent comes first: "form", "star", "vocabulary", "merge"; "unknown"; or "unresolved":
            not even that the two are neighbours is known, since a rival is as near, or for the reason in `doubt`.
        kinship: the figures of the two.
        rivals: pairs that would join the same two parts of the tree by an edge as short; at most three.
        share: of a merge, how much of this parent is in it, and the ends of its 95 % interval over the matrices.
        doubt: that the step has a part in common with the others from its parent, as if they began beside it; or
            that it is so large that the two may have been trained from the same start.
    """

    parent: str
    child: str
    direction: str
    kinship: Kinship
    rivals: tuple[tuple[str, str], ...] = ()
    share: tuple[float, float, float] | None = None
    doubt: str = ""


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
        apart = np.where(self.shared.sums.count > 0, self.shared.sums.distance, math.inf)
        np.fill_diagonal(apart, 0.0)
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
        for m, to in enumerate(self.apart):
            first, second, whole = to[:, None], to[None, :], self.apart
            with np.errstate(invalid="ignore", divide="ignore"):
                part = (whole + first - second) / (2 * whole)  # where m's foot on the line from i to j is
                off = first - part**2 * whole
            inside = (
                (first > 0)
                & (second > 0)
                & (first < whole)
                & (second < whole)
                & np.isfinite(whole + first + second)
            )
            inside &= (part > 0.05) & (part < 0.95) & (off <= STRAIGHT * whole)
            i, j = np.unravel_index(np.argmin(np.where(inside, off, math.inf)), off.shape)
            if inside[i, j]:
                nearest[m] = (float(off[i, j]), (int(min(i, j)), int(max(i, j))))
        return {m: parents for m, (_, parents) in nearest.items() if not set(parents) & set(nearest)}

    def share(self, m: int, parent: int, other: int) -> tuple[float, float, float]:
        """How much of a parent is in a merge, and the ends of its interval: one straight line a matrix."""
        sums = np.array([[a[other, m] + a[other, parent] - a[parent, m], 2 * a[other, parent]]
                         for a in self.shared.sums.apart.values()])  # fmt: skip
        sums = sums[np.isfinite(sums).all(1) & (sums[:, 1] > 0)]
        part = float(sums[:, 0].sum() / sums[:, 1].sum())
        n = len(sums)
        error = float(np.sqrt(((sums[:, 0] - part * sums[:, 1]) ** 2).sum() * n / max(n - 1, 1)) / sums[:, 1].sum())
        reach = float(stdtrit(n - 1, 0.975)) * error if n > 1 else math.inf
        return part, max(0.0, part - reach), min(1.0, part + reach)

    @cached_property
    def near(self) -> dict[int, list[int]]:
        """The neighbours of each checkpoint in the shortest trees over what is related, merges left out.

        Every edge is given its place in the order of lengths as its length: a tree of shortest edges depends on
        the order alone, equal distances keep that of the checkpoints, and copies at distance 0 have an edge too.
        """
        members = [k for k in range(len(self.apart)) if k not in self.merges]
        edges = [ij for ij in itertools.combinations(members, 2) if math.isfinite(self.related[ij])]
        edges.sort(key=lambda ij: self.related[ij])
        # Positions of 32 bits: what csgraph takes in every version of scipy.
        first, second = np.array(edges, np.int32).reshape(-1, 2).T
        lengths = coo_array((np.arange(1, len(edges) + 1), (first, second)), shape=self.apart.shape)
        shortest = np.sort(minimum_spanning_tree(lengths.tocsr()).data).astype(int) - 1
        near: dict[int, list[int]] = {k: [] for k in range(len(self.apart))}
        for i, j in (edges[place] for place in shortest):
            near[i].append(j)
            near[j].append(i)
        for original, copy in self.copies:
            if copy in near[original]:
                self._rehang(near, original, copy)
        return near

    def _rehang(self, near: Mapping[int, list[int]], original: int, copy: int) -> None:
        """What hangs on a copy that lost something hangs on the original where that is as near."""
        for k in [k for k in near[copy] if k != original and not self._same(copy, k)]:
            more = self.related[original, k] - self.related[copy, k]
            if more <= max(MARGIN * self.related[copy, k], 3 * self._error((copy, k), (original, k))):
                near[copy].remove(k)
                near[k][near[k].index(copy)] = original
                near[original].append(k)

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
        below = self._below(root)
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
                rivals = () if direction == "form" else self.rivals(parent, child, below[child], inside)
                doubt = "" if direction == "form" else self._doubt(parent, child)
                edges.append(
                    Edge(
                        names[parent],
                        names[child],
                        "unresolved" if rivals or doubt else direction,
                        self.kinships[parent, child],
                        tuple((names[i], names[j]) for i, j in rivals),
                        doubt=doubt,
                    )
                )
        if not identified and len(inside) > 2 and all(edge.direction == "unresolved" for edge in edges):
            reason = "siblings of a common base that is not here: no two are nearer to each other than to the rest"
        for m in members:
            parents = self.merges.get(m, ())
            for parent, other in itertools.permutations(parents, 2):
                share = self.share(m, parent, other)
                edges.append(Edge(names[parent], names[m], "merge", self.kinships[parent, m], share=share))
        by_name = {names[k]: cosine for k, cosine in angles.items()}
        return Tree(names[root], reason, identified, tuple(edges), tuple(names[k] for k in members), by_name)

    def _below(self, root: int) -> dict[int, set[int]]:
        """Each checkpoint of a tree → itself and what hangs on it."""
        below: dict[int, set[int]] = {}

        def visit(at: int, parent: int) -> set[int]:
            below[at] = {at}.union(*(visit(k, at) for k in self.near[at] if k != parent))
            return below[at]

        visit(root, -1)
        return below

    def rivals(
        self, parent: int, child: int, below: set[int], members: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Other edges that are as short between what hangs on a child and the rest, copies of both aside."""
        alike = [{k} | {other for other in members if self._same(k, other)} for k in (parent, child)]
        outside, inside = sorted(set(members) - below), sorted(below)
        longer = self.related[np.ix_(outside, inside)] - self.related[parent, child]
        rivals = []
        # Not even three standard errors are as much as the edge itself.
        for a, b in zip(*np.nonzero(longer <= self.related[parent, child]), strict=True):
            i, j, more = outside[a], inside[b], float(longer[a, b])
            if i in alike[0] and j in alike[1]:
                continue
            if more <= MARGIN * self.related[parent, child] or more <= 3 * self._error((parent, child), (i, j)):
                rivals.append((more, (i, j)))
                if len(rivals) == 3:
                    break
        return tuple(pair for _, pair in sorted(rivals))

    def _doubt(self, parent: int, child: int) -> str:
        """What speaks against a step of training from one to the other, or leaves it open; see `verdict.judge`."""
        if self.angle(parent, child) > RIGHT_ANGLE:
            return (
                f"shares a part with the other steps from {self.shared.names[parent]}, as if they began beside it"
            )
        square, norms, size = (
            self.related[parent, child],
            self.shared.sums.first,
            self.kinships[parent, child].distance,
        )
        turns = [abs(norms[j, i] - norms[i, j] - square) / 2 for i, j in ((parent, child), (child, parent))]
        if size <= verdict.GENTLE or (size <= verdict.STRONG and min(turns) <= verdict.RIGHT_ANGLE * square):
            return ""
        return "so far apart that both may have been trained from the same start"

    def _same(self, i: int, j: int) -> bool:
        return (i, j) in self.kinships and self.kinships[i, j].form != ""

    def _error(self, first: tuple[int, int], second: tuple[int, int]) -> float:
        """Standard error of the difference of two squared distances, over the matrices."""
        parts = np.array([a[second] - a[first] for a in self.shared.sums.apart.values()])
        parts = parts[np.isfinite(parts)]
        return float(parts.std(ddof=1) * math.sqrt(len(parts))) if len(parts) > 1 else 0.0

    def angle(self, k: int, of: int | None = None) -> float:
        """Median cosine between the updates from one checkpoint to its neighbours, or of one with the others.

        NaN where there are none. Copies have no update of their own.
        """
        return float(np.median(self._cosines(k, of) or [math.nan]))

    def _cosines(self, k: int, of: int | None = None) -> list[float]:
        """Of the updates from one checkpoint to each two of its neighbours, or to one and each of the others."""
        D, near = self.related, [i for i in self.near[k] if not self._same(k, i)]
        return [
            (D[k, i] + D[k, j] - D[i, j]) / (2 * math.sqrt(D[k, i] * D[k, j]))
            for i, j in itertools.combinations(near, 2)
            if D[k, i] > 0 and D[k, j] > 0 and of in (None, i, j) and math.isfinite(D[i, j])
        ]

    def _is_between(self, k: int) -> bool:
        """Whether it lies on the way between two of its neighbours, as a merge does, and no base."""
        return min(self._cosines(k), default=0.0) < OPPOSITE

    def root(self, members: Sequence[int], angles: Mapping[int, float]) -> tuple[int, str, bool]:
        """Where a tree begins, why, and whether that is identified."""
        if len(members) == 1:
            return members[0], "no relative here: a training of its own", True
        branches = {
            k: sum((k, other) not in self.copies and (other, k) not in self.copies for other in self.near[k])
            for k in members
        }
        stars = [
            k
            for k in members
            if branches[k] >= BRANCHES and angles.get(k, math.nan) < RIGHT_ANGLE and not self._is_between(k)
        ]
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
