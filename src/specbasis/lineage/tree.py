"""Relatedness of checkpoints: which were trained from which, as far as weights alone can tell.

What is identifiable. Trainings from different initialisations have weights that do not correspond: separate trees.
Within a tree, updates made independently of each other are nearly orthogonal, so squared distances add along its
paths (an additive tree), and the tree without direction is found by the shortest edges. An edge alone has no
direction: base and finetune are symmetric in their difference. A direction is given only

- by *form*: rounding, pruning and quantising lose what cannot be won back;
- by a *star*: where one checkpoint has three or more branches at right angles to each other, all but at most one of
  them lead away from it; that none leads towards it is the simplest reading, and is said to be that;
- by a vocabulary that grew, as a hint.

Everything else is said to be unidentifiable. A checkpoint on the straight line between two others is a merge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specbasis.architecture.key import MatrixKey, MatrixRef
from specbasis.architecture.pair import pair
from specbasis.checkpoint import Checkpoint, open_checkpoint
from specbasis.comparison.verdict import RELATED_COSINE, RELATED_SIGMAS, UNTESTED_COSINE, copy_form
from specbasis.core.entries import LEAST_SIDE, read_entries
from specbasis.core.errors import InputError
from specbasis.core.subspace import chance_alignment
from specbasis.core.svd import half_svd
from specbasis.jobs import results as store
from specbasis.jobs.folder import plain

STRAIGHT = 1e-3
"""A merge lies on the line between two others to this share of their squared distance."""

BRANCHES = 3
"""A checkpoint with so many branches is the centre of a star."""

RIGHT_ANGLE = 0.5
"""Cosine of two updates below which the shortest edges connect both to their base and not to each other."""

SAMPLED = 8
"""Matrices in which the alignment of leading vectors is taken."""

RANKS = 10

_CHUNK = 2**22  # entries of all models together that are in memory at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Kinship:
    """How two checkpoints are related.

    Attributes:
        first, second: their names.
        matrices: how many they have in common.
        cosine: of their weights, median over matrices; chance is 0.
        z: that cosine in standard deviations of random orders, median; NaN where the cosine alone decides.
        distance: ‖first − second‖ / ‖·‖, over all weights, each matrix scaled to its mean norm.
        alignment: of the leading `RANKS` vectors, both sides, mean over sampled matrices.
        chance: what independent directions would give there.
        related: whether their weights correspond.
        form: in what form second holds the weights of first ("rounded to bfloat16", …), or first those of second,
            behind a "<"; empty where neither.
    """

    first: str
    second: str
    matrices: int
    cosine: float
    z: float
    distance: float
    alignment: float
    chance: float
    related: bool
    form: str = ""


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


@dataclass(frozen=True, eq=False)
class Lineage:
    """Trees of a set of checkpoints, and the figures of every two of them.

    Attributes:
        trees: largest first; an independent training without relatives is a tree of one.
        kinships: every two checkpoints with matrices in common.
        notes: what could not be compared.
    """

    trees: tuple[Tree, ...]
    kinships: tuple[Kinship, ...]
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """The trees as indented lines: update size, alignment, and how far the direction is known."""
        lines: list[str] = []
        for tree in self.trees:
            lines.append(f"{tree.root}  [{tree.reason}]")
            children: dict[str, list[Edge]] = {}
            for edge in tree.edges:
                children.setdefault(edge.parent, []).append(edge)
            _draw(tree.root, children, "", lines)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def summary(self) -> dict[str, Any]:
        """Trees, kinships and notes as plain data for JSON."""
        content: dict[str, Any] = {
            "trees": [asdict(tree) for tree in self.trees],
            "kinships": [asdict(k) for k in self.kinships],
            "notes": list(self.notes),
        }
        plain_content: dict[str, Any] = plain(content)
        return plain_content


def lineage(sources: Sequence[str | Path], *, align: bool = True) -> Lineage:
    """The trees of some checkpoints, from the distances and the correspondence of their weights.

    Reads every matrix of every checkpoint once, a part at a time: N² products for N checkpoints, no decomposition
    but those of `SAMPLED` matrices each, for the alignment of leading vectors (``align``).

    Args:
        sources: checkpoints as of `specbasis.open_checkpoint`; at least two.
        align: take the alignment of leading vectors too.

    Raises:
        InputError: fewer than two checkpoints, one cannot be read, or no two have anything in common.

    Source: additive trees: Buneman 1974; shortest edges: Kruskal 1956. For the question: Horwitz et al. 2025,
    Unsupervised Model Tree Heritage Recovery, whose direction from outlier weights is not used: it rests on how
    models are usually trained.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if len(sources) < 2:
        raise InputError(f"got {len(sources)} checkpoint; want at least two, or a folder that holds several")
    opened = [open_checkpoint(source) for source in sources]
    names = store.unique_labels([checkpoint.source for checkpoint in opened])
    matrices, grown, notes = _common(opened, names)
    if not matrices:
        raise InputError(f"no matrix in common by name and shape among {', '.join(names[:4])}")
    sums = _Sums(len(names))
    for found in matrices.values():
        sums.add(opened, found)
    vectors = _leading(opened, matrices, sums) if align else {}
    kinships = {
        (i, j): _kinship(opened, names, matrices, sums, vectors, i, j)
        for i, j in itertools.combinations(range(len(names)), 2)
        if sums.count[i, j]
    }
    return Lineage(_trees(names, kinships, sums, grown), tuple(kinships.values()), tuple(notes))


def members_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder: weight files, and folders that hold weights, in the order of their names."""
    endings = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; want checkpoints, or a folder that holds them")
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [
        path
        for path in inside
        if (path.is_file() and path.name.endswith(endings))
        or (path.is_dir() and any(part.name.endswith(endings) for part in path.iterdir()))
    ]
    if len(found) < 2:
        raise InputError(
            f"{folder}: holds {len(found)} checkpoints; want at least two weight files or model folders"
        )
    return found


# --- reading ----------------------------------------------------------------------------------------------------

Places = dict[int, MatrixRef]


def _common(
    opened: Sequence[Checkpoint], names: Sequence[str]
) -> tuple[dict[MatrixKey, Places], set[tuple[int, int]], list[str]]:
    """Matrix → checkpoint → where it is; who has more rows than whom; what fits nothing.

    The first checkpoint of an architecture stands for all of it: who has its names is read by its roles.
    """
    matrices: dict[MatrixKey, Places] = {}
    grown: set[tuple[int, int]] = set()
    notes, waiting = [], list(range(len(opened)))
    while waiting:
        first, *others = waiting
        waiting = []
        for other in others:
            try:
                pairing = pair(opened[first], opened[other], common_rows=True)
            except InputError:
                waiting.append(other)
                continue
            for m in pairing.matched:
                places = matrices.setdefault(m.key, {first: m.base})
                places[other] = m.tuned
                rows = [opened[k].entries[ref.parameter].shape[0] for k, ref in ((first, m.base), (other, m.tuned))]
                if rows[0] != rows[1]:
                    grown.add((first, other) if rows[0] < rows[1] else (other, first))
            if not pairing.matched:
                waiting.append(other)
        if not any(first in places for places in matrices.values()):
            notes.append(f"{names[first]}: no matrix in common with the others")
    return matrices, grown, notes


class _Sums:
    """Sums over all matrices, each scaled to its mean squared norm, for every two checkpoints that both have it."""

    def __init__(self, n: int) -> None:
        self.first = np.zeros((n, n))  # Σ w ‖X_i‖², over the matrices that i and j have in common
        self.distance = np.zeros((n, n))  # Σ w ‖X_i − X_j‖²
        self.count = np.zeros((n, n), int)
        self.cosines: dict[tuple[int, int], list[tuple[float, MatrixKey]]] = {}

    def add(self, opened: Sequence[Checkpoint], places: Places) -> None:
        """Take in one matrix of every checkpoint that has it, a part at a time."""
        who = sorted(places)
        read = [places[k].read(opened[k]) for k in who]
        rows = min(len(X) for X in read)
        flat = [X[:rows].reshape(-1) for X in read]
        size, step = len(flat[0]), max(1, _CHUNK // len(who))
        gram = np.zeros((len(who), len(who)))
        apart = np.zeros_like(gram)
        for start in range(0, size, step):
            X = torch.stack([x[start : start + step].to(torch.float64) for x in flat])
            gram += (X @ X.mT).numpy()
            # Differences to the first have more digits than the Gram matrix where all are near it.
            D = X - X[:1]
            inner = (D @ D.mT).numpy()
            square = np.diag(inner)
            apart += square[:, None] + square[None, :] - 2 * inner
        norms = np.diag(gram)
        if not np.isfinite(norms).all() or norms.mean() == 0:
            return
        weight = size / norms.mean()
        at = np.ix_(who, who)
        self.first[at] += weight * norms[:, None]
        self.distance[at] += weight * apart.clip(min=0)
        self.count[at] += 1
        key = places[who[0]].key
        for (a, i), (b, j) in itertools.combinations(enumerate(who), 2):
            product = math.sqrt(norms[a] * norms[b])
            cosine = float(gram[a, b]) / product if product else math.nan
            self.cosines.setdefault((i, j), []).append((cosine, key))


def _leading(
    opened: Sequence[Checkpoint], matrices: Mapping[MatrixKey, Places], sums: _Sums
) -> dict[tuple[int, MatrixKey], tuple[torch.Tensor, torch.Tensor]]:
    """Leading vectors, left and right, of every checkpoint in a few matrices spread over those that most have."""
    shared = sorted(matrices, key=lambda key: (-len(matrices[key]), key.name))
    wide = [key for key in shared if min(next(iter(matrices[key].values())).shape) >= 2 * RANKS]
    wide = [key for key in wide if len(matrices[key]) == len(matrices[wide[0]])]
    chosen = [wide[int(i)] for i in np.unique(np.linspace(0, len(wide) - 1, min(SAMPLED, len(wide))).round())]
    found = {}
    for key in chosen:
        rows = min(ref.shape[0] for ref in matrices[key].values())
        for k, ref in matrices[key].items():
            W = ref.read(opened[k])[:rows]
            if bool(torch.isfinite(W).all()) and float(W.abs().max()) > 0:
                s = half_svd(W, RANKS, name=f"{key.name} in {opened[k].source}")
                found[k, key] = (s.vectors("left", RANKS), s.vectors("right", RANKS))
    return found


def _kinship(
    opened: Sequence[Checkpoint],
    names: Sequence[str],
    matrices: Mapping[MatrixKey, Places],
    sums: _Sums,
    vectors: Mapping[tuple[int, MatrixKey], tuple[torch.Tensor, torch.Tensor]],
    i: int,
    j: int,
) -> Kinship:
    known = [(c, key) for c, key in sums.cosines[i, j] if not math.isnan(c)]
    cosine = float(np.median([c for c, _ in known])) if known else math.nan
    # Far from both the cosines of trainings of their own and those of gentle finetunes the order of rows is tested.
    related, z = cosine >= UNTESTED_COSINE, math.nan
    if RELATED_COSINE <= cosine < 2 * UNTESTED_COSINE:
        z = _order(opened, matrices, known, i, j)
        related = z >= RELATED_SIGMAS
    scale = math.sqrt((sums.first[i, j] + sums.first[j, i]) / 2)
    aligned, chances = [], []
    for key in {key for k, key in vectors if k == i} & {key for k, key in vectors if k == j}:
        for X, Y in zip(vectors[i, key], vectors[j, key], strict=True):
            aligned.append(float((X * Y).sum(0).abs().mean()))
            chances.append(chance_alignment(len(X)))
    return Kinship(
        names[i],
        names[j],
        int(sums.count[i, j]),
        cosine,
        z,
        math.sqrt(sums.distance[i, j]) / scale,
        float(np.mean(aligned)) if aligned else math.nan,
        float(np.mean(chances)) if chances else math.nan,
        bool(related),
        _form(opened, matrices, i, j) if related else "",
    )


def _spread(
    matrices: Mapping[MatrixKey, Places], i: int, j: int, keys: Sequence[MatrixKey] | None = None
) -> list[MatrixKey]:
    """A few matrices that both have, the large ones first left out: these are read once more."""
    keys = [key for key in keys or matrices if {i, j} <= matrices[key].keys()]
    keys = sorted(keys, key=lambda key: math.prod(matrices[key][i].shape))
    usable = [key for key in keys if min(matrices[key][i].shape) >= LEAST_SIDE] or keys
    return [usable[int(k)] for k in np.unique(np.linspace(0, len(usable) - 1, min(SAMPLED, len(usable))).round())]


def _both(opened: Sequence[Checkpoint], places: Places, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    W, T = places[i].read(opened[i]), places[j].read(opened[j])
    rows = min(len(W), len(T))
    return W[:rows], T[:rows]


def _order(
    opened: Sequence[Checkpoint],
    matrices: Mapping[MatrixKey, Places],
    known: Sequence[tuple[float, MatrixKey]],
    i: int,
    j: int,
) -> float:
    z = []
    for key in _spread(matrices, i, j, [key for _, key in known]):
        value = read_entries(*_both(opened, matrices[key], i, j)).figures["weight_cosine_z"]
        z += [] if math.isnan(value) else [value]
    return float(np.median(z)) if z else math.nan


def _form(opened: Sequence[Checkpoint], matrices: Mapping[MatrixKey, Places], i: int, j: int) -> str:
    """In what form one holds the weights of the other, where all sampled matrices say the same."""
    forms: set[str] = set()
    for key in _spread(matrices, i, j):
        W, T = _both(opened, matrices[key], i, j)
        if torch.equal(W.double(), T.double()):
            continue
        found = ""
        for sign, (A, B) in (("", (W, T)), ("<", (T, W))):
            about = {"out": len(A), "in": A.shape[1], "size": A.numel(), **read_entries(A, B).figures}
            form = copy_form(about)
            if form and "base is" not in form:
                found = sign + form
        forms.add(found)
        if forms != {found} or not found:
            return ""
    return forms.pop() if forms else "equal"


# --- trees ------------------------------------------------------------------------------------------------------


def _trees(
    names: Sequence[str],
    kinships: Mapping[tuple[int, int], Kinship],
    sums: _Sums,
    grown: set[tuple[int, int]],
) -> tuple[Tree, ...]:
    n = len(names)
    D = np.full((n, n), math.inf)
    np.fill_diagonal(D, 0.0)
    for (i, j), k in kinships.items():
        D[i, j] = D[j, i] = k.distance**2 if k.related else math.inf
    far = {(i, j): k.distance**2 for (i, j), k in kinships.items()}
    merges = _merges(D, far, n)
    edges = _shortest([k for k in range(n) if k not in merges], D)
    trees = [_tree(names, members, edges, D, kinships, grown, merges) for members in _components(n, edges, merges)]
    return tuple(sorted(trees, key=lambda tree: -len(tree.members)))


def _merges(D: Floats, far: Mapping[tuple[int, int], float], n: int) -> dict[int, tuple[int, int]]:
    """Checkpoints on the straight line between two others, well inside of it, and those two."""
    found: dict[int, tuple[float, tuple[int, int]]] = {}
    for m in range(n):
        for i, j in itertools.combinations([k for k in range(n) if k != m], 2):
            apart = far.get((min(i, j), max(i, j)), math.inf)
            first, second = (far.get((min(m, k), max(m, k)), math.inf) for k in (i, j))
            if not (math.isfinite(apart + first + second) and 0 < first < apart and 0 < second < apart):
                continue
            part = (apart + first - second) / (2 * apart)  # where m's foot on the line from i to j is
            off = first - part**2 * apart
            if 0.05 < part < 0.95 and off <= STRAIGHT * apart and (m not in found or off < found[m][0]):
                found[m] = (off, (i, j))
    return {m: parents for m, (_, parents) in found.items() if not set(parents) & set(found)}


def _shortest(members: Sequence[int], D: Floats) -> list[tuple[int, int]]:
    """The edges of the shortest trees over what is related."""
    group = {k: k for k in members}

    def of(k: int) -> int:
        while group[k] != k:
            k = group[k]
        return k

    edges = []
    for i, j in sorted(itertools.combinations(members, 2), key=lambda ij: D[ij]):
        if math.isfinite(D[i, j]) and of(i) != of(j):
            group[of(i)] = of(j)
            edges.append((i, j))
    return edges


def _components(n: int, edges: Sequence[tuple[int, int]], merges: Mapping[int, tuple[int, int]]) -> list[list[int]]:
    near: dict[int, set[int]] = {k: set() for k in range(n)}
    for i, j in (*edges, *((m, parents[0]) for m, parents in merges.items())):
        near[i].add(j)
        near[j].add(i)
    seen: set[int] = set()
    groups = []
    for k in range(n):
        group, waiting = [], [k]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                group.append(at)
                waiting += near[at]
        if group:
            groups.append(sorted(group))
    return groups


def _tree(
    names: Sequence[str],
    members: Sequence[int],
    edges: Sequence[tuple[int, int]],
    D: Floats,
    kinships: Mapping[tuple[int, int], Kinship],
    grown: set[tuple[int, int]],
    merges: Mapping[int, tuple[int, int]],
) -> Tree:
    kin = {**kinships, **{(j, i): k for (i, j), k in kinships.items()}}
    near: dict[int, list[int]] = {k: [] for k in members}
    for i, j in edges:
        if i in near:
            near[i].append(j)
            near[j].append(i)
    sources = {(i, j) for i in near for j in near[i] if _is_copy_of(names, kin[i, j], i, j)}
    angles = {k: _angle(k, near[k], D) for k in near if len(near[k]) >= 2}
    root, reason, identified = _root(near, sources, angles, grown, D, names)
    drawn: list[Edge] = []
    waiting, seen = [root], {root}
    while waiting:
        at = waiting.pop(0)
        for child in sorted(near[at], key=lambda k: D[at, k]):
            if child in seen:
                continue
            seen.add(child)
            waiting.append(child)
            known = "form" if (at, child) in sources else "star" if identified else "unknown"
            if known == "unknown" and (at, child) in grown:
                known = "vocabulary"
            drawn.append(Edge(names[at], names[child], known, kin[at, child]))
    for m in members:
        if m in merges:
            drawn += [Edge(names[parent], names[m], "merge", kin[parent, m]) for parent in merges[m]]
    return Tree(
        names[root],
        reason,
        identified,
        tuple(drawn),
        tuple(names[k] for k in members),
        {names[k]: cosine for k, cosine in angles.items()},
    )


def _is_copy_of(names: Sequence[str], kinship: Kinship, i: int, j: int) -> bool:
    """Whether j is i in a form that loses something."""
    if kinship.form in ("", "equal"):
        return False
    first, second = (
        (kinship.second, kinship.first) if kinship.form.startswith("<") else (kinship.first, kinship.second)
    )
    return (names[i], names[j]) == (first, second)


def _angle(k: int, near: Sequence[int], D: Floats) -> float:
    """Median cosine between the updates from one checkpoint to its neighbours."""
    return float(
        np.median(
            [
                (D[k, i] + D[k, j] - D[i, j]) / (2 * math.sqrt(D[k, i] * D[k, j]))
                for i, j in itertools.combinations(near, 2)
                if D[k, i] > 0 and D[k, j] > 0
            ]
            or [math.nan]
        )
    )


def _root(
    near: Mapping[int, Sequence[int]],
    sources: set[tuple[int, int]],
    angles: Mapping[int, float],
    grown: set[tuple[int, int]],
    D: Floats,
    names: Sequence[str],
) -> tuple[int, str, bool]:
    """Where a tree begins, why, and whether that is identified."""
    if len(near) <= 1:
        alone = next(iter(near))
        return alone, "no relative here: a training of its own", True
    later = {child for _, child in sources}
    stars = [
        k for k in near if len(_own(near[k], k, sources)) >= BRANCHES and angles.get(k, math.nan) < RIGHT_ANGLE
    ]
    if stars:
        centre = max(stars, key=lambda k: len(_own(near[k], k, sources)))
        n = len(_own(near[centre], centre, sources))
        return (
            centre,
            f"centre of a star: {n} branches, median cosine of their updates {angles[centre]:.2f}; at most one of "
            "them can lead towards it",
            True,
        )
    first = [k for k in near if k not in later]
    if len(near) == 2 and sources:
        return first[0], "the other is a copy of it in a form that loses something", True
    fewer = [k for k in first if any((k, other) in grown for other in near[k])]
    middle = min(first, key=lambda k: float(np.sum(np.sqrt(D[k, list(near)]))))
    if fewer:
        return fewer[0], "direction not identifiable from the weights; a vocabulary that grew hints at it", False
    return middle, "direction not identifiable from the weights: any of these may be the base", False


def _own(near: Sequence[int], k: int, sources: set[tuple[int, int]]) -> list[int]:
    """Neighbours that are no mere copies."""
    return [other for other in near if (k, other) not in sources and (other, k) not in sources]


def _draw(at: str, children: Mapping[str, Sequence[Edge]], indent: str, lines: list[str]) -> None:
    edges = children.get(at, ())
    for i, edge in enumerate(edges):
        last = i == len(edges) - 1
        sign = {"unknown": "—", "merge": "⇒"}.get(edge.direction, "→")
        k = edge.kinship
        form = k.form.lstrip("<")
        what = form or f"‖Δ‖/‖W‖ {k.distance:.3g}, cosine {k.cosine:.3f}" + (
            "" if math.isnan(k.alignment) else f", top-{RANKS} alignment {k.alignment:.3f} (chance {k.chance:.3f})"
        )
        lines.append(f"{indent}{'└' if last else '├'}{sign} {edge.child}  {what}; direction: {edge.direction}")
        if edge.direction != "merge":
            _draw(edge.child, children, indent + ("   " if last else "│  "), lines)
