"""The checkpoints of a training in their order, from a folder, the Hub or a list, and what was passed over."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from specbasis.architecture.key import Admits, MatrixRef
from specbasis.architecture.pair import MatrixPair, pair
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, open_checkpoint
from specbasis.checkpoint.digest import digest
from specbasis.checkpoint.hub import list_revisions
from specbasis.core.errors import InputError
from specbasis.jobs.results import unique_labels

Source = str | Path

_WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar"}
_FINAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Saved:
    """One checkpoint of a training.

    Attributes:
        source: where it is.
        step: number in its name (of optimizer steps, epochs, …); None where it has none.
    """

    source: str
    step: int | None


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is left out, and why."""

    source: str
    reason: str


@dataclass(frozen=True, eq=False)
class Series:
    """The checkpoints of one training that can be read, in their order, and the matrices that they have in common.

    Attributes:
        saved: what they are called.
        labels: short names, unique.
        checkpoints: the same, open.
        matrices: name → where that matrix is in each checkpoint; None where it is not.
        passed_over: what was left out, and why.
        notes: gaps, matrices that are not in all, a sentence each.
    """

    saved: tuple[Saved, ...]
    labels: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    matrices: dict[str, tuple[MatrixRef | None, ...]]
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> list[int]:
        """Where each is on the axis of training: its step, if all have one and they ascend; else 0, 1, 2, …"""
        steps = [saved.step for saved in self.saved if saved.step is not None]
        ascending = all(a < b for a, b in pairwise(steps))
        return steps if len(steps) == len(self.saved) and ascending else list(range(len(self.saved)))


def open_series(run: Source | Sequence[Source], *, admits: Admits | None = None, stream: bool = False) -> Series:
    """Open the checkpoints of a training.

    Args:
        run: one of

            - a folder with numbered checkpoints in it, folders (``checkpoint-500``, ``epoch_3``, ``step1000``)
              or weight files (``model_0010.safetensors``, ``epoch=2-step=100.ckpt``), in the order of the last
              number in their names, and behind them the model in the folder itself, if there is one;
            - ``hub:org/name@PATTERN`` with a ``*``: the branches and tags that match, in the order of their
              numbers;
            - a list of any sources, in its order.
        admits: which matrices are wanted; all when None.
        stream: from the Hub, read only the byte ranges that are wanted.

    A checkpoint that cannot be read, repeats a step, or holds exactly what an earlier one holds is passed over
    and listed; a step that is missing in a regular series is noted.

    Raises:
        InputError: fewer than two checkpoints can be read, or nothing is in common.
    """
    listed, passed = _numbered(run) if isinstance(run, str | Path) else (_given(run), [])
    opened: list[tuple[Saved, Checkpoint]] = []
    for saved in listed:
        try:
            checkpoint = open_checkpoint(saved.source, stream=stream)
            len(checkpoint.entries)
        except InputError as error:
            passed.append(PassedOver(saved.source, str(error)))
            continue
        opened.append((saved, checkpoint))
    aligned = _aligned(opened, admits, passed)
    kept = _without_copies(aligned, passed)
    if len(kept) < 2:
        why = f"; the first passed over: {passed[0].source}: {passed[0].reason}" if passed else ""
        title = str(run) if isinstance(run, str | Path) else f"{len(run)} sources"
        raise InputError(f"{title}: {len(kept)} checkpoint(s) to follow; want at least 2{why}")
    followed = tuple(member.saved for member in kept)
    matrices = {name: tuple(member.matrices.get(name) for member in kept) for name in kept[0].matrices}
    notes = _gaps([checkpoint.step for checkpoint in followed if checkpoint.step is not None])
    for name, refs in matrices.items():
        if None in refs:
            notes.append(f"{name}: missing in {refs.count(None)} of {len(kept)} checkpoints")
    return Series(
        followed,
        tuple(unique_labels([checkpoint.source for checkpoint in followed])),
        tuple(member.checkpoint for member in kept),
        matrices,
        tuple(passed),
        tuple(notes),
    )


# --- listing ----------------------------------------------------------------------------------------------------


def _given(run: Sequence[Source]) -> list[Saved]:
    return [Saved(str(source), _step(re.split(r"[/@]", str(source))[-1])) for source in run]


def _numbered(run: Source) -> tuple[list[Saved], list[PassedOver]]:
    """The numbered checkpoints of a folder or repository, in the order of their numbers, each number once."""
    text = str(run)
    if text.startswith("hub:") and "*" in text:
        address, _, pattern = text.partition("@")
        names = [name for name in list_revisions(address) if fnmatch.fnmatchcase(name, pattern)]
        return _in_order([(f"{address}@{name.replace('/', '%2F')}", _step(name)) for name in names])
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise InputError(f"{run}: no such folder; want one with numbered checkpoints, or name them one by one")
    inside = folder.resolve()
    passed: list[PassedOver] = []
    folders: list[tuple[str, int | None]] = []
    weights: list[tuple[str, int | None]] = []
    for path in sorted(folder.iterdir()):
        step = _step(path.name if path.is_dir() else path.stem)
        if step is None or path.name.startswith("."):
            continue
        if not path.resolve().is_relative_to(inside):
            passed.append(PassedOver(str(path), "is a link that leads out of the folder"))
        elif path.is_dir():
            folders.append((str(path), step))
        elif path.suffix in _WEIGHTS and not re.search(r"-\d+-of-\d+$", path.stem):
            weights.append((str(path), step))
    listed, repeated = _in_order(folders or weights)
    if folders and any((folder / name).is_file() for name in _FINAL):
        listed.append(Saved(str(folder), None))
    if not listed:
        raise InputError(
            f"{run}: no numbered checkpoints in this folder (checkpoint-500, step1000, model_0010.safetensors, …)"
        )
    return listed, passed + repeated


def _step(name: str) -> int | None:
    """The number behind "step" in a name, or the last number in it."""
    numbers = re.findall(r"step\D{0,2}(\d+)", name, re.ASCII) or re.findall(r"\d+", name, re.ASCII)
    return int(numbers[-1][:18]) if numbers else None


def _in_order(named: list[tuple[str, int | None]]) -> tuple[list[Saved], list[PassedOver]]:
    listed: dict[int | None, Saved] = {}
    passed: list[PassedOver] = []
    for source, step in sorted(named, key=lambda pair: (pair[1] is None, pair[1] or 0)):
        if step in listed:
            passed.append(PassedOver(source, f"repeats step {step} of {listed[step].source}"))
        else:
            listed[step] = Saved(source, step)
    return list(listed.values()), passed


def _gaps(steps: Sequence[int]) -> list[str]:
    """Steps that a series with one usual distance leaves out."""
    distances = [b - a for a, b in pairwise(steps)]
    if len(distances) < 3:
        return []
    usual, count = Counter(distances).most_common(1)[0]
    if 2 * count < len(distances):
        return []
    return [
        f"gap: no checkpoint between {a} and {b}, elsewhere one every {usual}"
        for a, b in pairwise(steps)
        if b - a > usual
    ]


# --- what they have in common -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Aligned:
    saved: Saved
    checkpoint: Checkpoint
    matrices: dict[str, MatrixRef]

    def digest(self, names: Sequence[str]) -> str:
        matrices = (self.matrices[name].read(self.checkpoint) for name in names)
        return digest(json.dumps(list(names)), *matrices)


def _aligned(
    opened: Sequence[tuple[Saved, Checkpoint]], admits: Admits | None, passed: list[PassedOver]
) -> list[_Aligned]:
    """Each checkpoint with the matrices that it shares with the first one."""
    if not opened:
        return []
    first, *others = opened
    matrices = {ref.key.name: ref for ref in model_map(first[1], admits=admits).matrices}
    if not matrices:
        raise InputError(
            f"{first[0].source}: none of its matrices is asked for; ask for other roles, blocks or names"
        )
    aligned = [_Aligned(*first, matrices)]
    for saved, checkpoint in others:
        try:
            matched: tuple[MatrixPair, ...] = pair(first[1], checkpoint, admits=admits).matched
        except InputError as error:
            passed.append(PassedOver(saved.source, str(error)))
            continue
        refs = {m.key.name: m.tuned for m in matched if m.key.name in matrices}
        if refs:
            aligned.append(_Aligned(saved, checkpoint, refs))
        else:
            passed.append(PassedOver(saved.source, f"no matrix in common with {first[0].source}"))
    return aligned


def _without_copies(aligned: Sequence[_Aligned], passed: list[PassedOver]) -> list[_Aligned]:
    """Those whose matrices can be read and differ from each earlier one's: the last matrix, or all if it agrees."""
    kept: list[_Aligned] = []
    seen: dict[tuple[str, str], list[_Aligned]] = {}
    for member in aligned:
        names, source = list(member.matrices), member.saved.source
        try:
            alike = seen.setdefault((names[-1], member.digest(names[-1:])), [])
            same = (a for a in alike if list(a.matrices) == names and a.digest(names) == member.digest(names))
            twin = next(same, None)
        except InputError as error:
            passed.append(PassedOver(source, str(error)))
            continue
        if twin is not None:
            passed.append(PassedOver(source, f"holds exactly what {twin.saved.source} holds"))
            continue
        alike.append(member)
        kept.append(member)
    return kept
