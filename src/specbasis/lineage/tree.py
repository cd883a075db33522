"""Relatedness of checkpoints: which were trained from which, as far as weights alone can tell.

What is identifiable. Trainings from different initialisations have weights that do not correspond: separate trees.
Within a tree, updates made independently of each other are nearly orthogonal, so squared distances add along its
paths (an additive tree), and the tree without direction is found by the shortest edges. An edge alone has no
direction: base and finetune are symmetric in their difference. A direction is given only

- by *form*: rounding, pruning and quantising lose what cannot be won back;
- by a *star*: where one checkpoint has three or more branches at right angles to each other, all but at most one of
  them lead away from it; that none leads towards it is the simplest reading, and is said to be that;
- by a vocabulary that grew, as a hint.

Everything else is said to be unidentifiable. A checkpoint on the straight line between two others is a merge. An
edge whose runner-up is as short, within the noise of the matrices or `forest.MARGIN`, or whose update is not at
right angles to the others from its parent, is unresolved: as between finetunes of a base that is not there. That
two are related at all is tested against random orders of rows and of columns, at a level that holds for the whole
folder (`Kinship.error`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specbasis.checkpoint import Checkpoint, open_checkpoint
from specbasis.checkpoint.formats import endings
from specbasis.core.brief import clipped
from specbasis.core.errors import InputError
from specbasis.core.text import number_of
from specbasis.jobs import results as store
from specbasis.jobs.folder import plain
from specbasis.lineage.forest import Edge, Tree, trees
from specbasis.lineage.kinship import RANKS, Kinship, Shared

DEPTH = 2
"""Levels of folders without weights of their own that are looked into."""

ENDINGS = (*endings(), ".tar")
"""Of the names of weight files; `.pth.tar` is a usual one of torch's."""


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        return clipped(self.as_text())

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
        content: dict[str, Any] = plain(asdict(self))
        return content


def lineage(sources: str | Path | Sequence[str | Path], *, align: bool = True) -> Lineage:
    """The trees of some checkpoints, from the distances and the correspondence of their weights.

    Reads every matrix of every checkpoint once, a part at a time: N² products for N checkpoints, no decomposition
    but those of `SAMPLED` matrices each (fewer in a folder of more than 40), for the alignment of leading vectors
    (``align``).

    Args:
        sources: checkpoints as of `specbasis.open_checkpoint`; at least two; ``"NAME=PATH"`` gives one a name. Or a
            folder that holds them: what in it cannot be read is left out, with a note.
        align: take the alignment of leading vectors too.

    Raises:
        InputError: fewer than two checkpoints, one cannot be read, or no two have anything in common.

    Source: additive trees: Buneman 1974; shortest edges: Kruskal 1956. For the question: Horwitz et al. 2025,
    Unsupervised Model Tree Heritage Recovery, whose direction from outlier weights is not used: it rests on how
    models are usually trained.
    """
    left_out: list[str] = []
    readable: Sequence[str | Checkpoint]
    if isinstance(sources, str | Path):
        readable = _readable(Path(sources), left_out)
    elif len(sources) < 2:
        raise InputError(f"got {len(sources)} checkpoint; want at least two, files or folders")
    else:
        readable = [str(source) for source in sources]
    _, opened = store.opened_by_label(readable, open_checkpoint)
    shared = Shared.of(list(opened.values()), list(opened))
    kinships = shared.kinships(align=align)
    return Lineage(trees(shared, kinships), tuple(kinships.values()), (*left_out, *shared.notes))


def _readable(folder: Path, left_out: list[str]) -> list[Checkpoint]:
    """The checkpoints in a folder that can be read; of the others a sentence each."""
    readable: list[Checkpoint] = []
    for path in members_of(folder):
        try:
            readable.append(open_checkpoint(path))
        except InputError as error:
            left_out.append(f"left out: {error}")
    if len(readable) < 2:
        raise InputError(
            f"{folder}: holds {number_of(len(readable), 'checkpoint')} to be read, want two; {left_out[0]}"
        )
    return readable


def members_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their names: weight files, and folders that hold weights.

    A folder without weights of its own, such as that of an organisation, is looked into, `DEPTH` levels down.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; want checkpoints, or a folder that holds them")
    paths = list(_inside(folder, DEPTH))
    if len(paths) < 2:
        raise InputError(
            f"{folder}: holds {number_of(len(paths), 'checkpoint')}; want at least two, files or folders"
        )
    return paths


def _inside(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        files = [path] if path.is_file() else list(path.iterdir())
        if any(file.name.endswith(ENDINGS) for file in files):
            yield path
        elif path.is_dir() and depth:
            yield from _inside(path, depth - 1)


def _draw(at: str, children: Mapping[str, Sequence[Edge]], indent: str, lines: list[str]) -> None:
    edges = children.get(at, ())
    for i, edge in enumerate(edges):
        last = i == len(edges) - 1
        sign = {"unknown": "—", "merge": "⇒", "unresolved": "┄"}.get(edge.direction, "→")
        k = edge.kinship
        form = k.form.lstrip("<")
        relation = form or f"‖Δ‖/‖W‖ {k.distance:.3g}, cosine {k.cosine:.3f}" + (
            "" if math.isnan(k.alignment) else f", top-{RANKS} alignment {k.alignment:.3f} (chance {k.chance:.3f})"
        )
        direction = f"direction: {edge.direction}"
        if edge.share:
            direction = "merge, {:.1%} of it ({:.1%} to {:.1%})".format(*edge.share)
        elif edge.rivals:
            direction = f"unresolved: {' — '.join(edge.rivals[0])} is as near"
        elif edge.direction == "unresolved":
            direction = (
                f"unresolved: shares a part with the other steps from {edge.parent}, as if they began beside it"
            )
        error = f"error rate {k.error:.1g}" if k.error >= 1e-12 else "error rate below 1e-12"
        lines.append(f"{indent}{'└' if last else '├'}{sign} {edge.child}  {relation}; {direction}; {error}")
        if edge.direction != "merge":
            _draw(edge.child, children, indent + ("   " if last else "│  "), lines)
