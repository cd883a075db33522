"""Edits on a model in memory: applied in place for a while, and taken back bit for bit whatever happens."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from specbasis.architecture.key import Admits, MatrixRef
from specbasis.architecture.pair import pair
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, open_checkpoint
from specbasis.checkpoint.live_names import live_names
from specbasis.core.edits import Edit
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, decompose

New = Tensor | Callable[[Tensor], Tensor]
"""A new matrix (out, in), or what makes it from the stored one."""

Decompose = Callable[[Tensor, str], SVD]
"""From a matrix and its name to its full decomposition: `specbasis.decompose`, or a cache's."""

M = TypeVar("M", bound=nn.Module)


@contextmanager
def edited(
    model: M, edits: Mapping[str | MatrixRef, New], *, originals: Mapping[str, Tensor] | None = None
) -> Iterator[M]:
    """A model with some of its matrices changed in place, and changed back bit for bit on exit.

    Works on whatever module holds the weights: a matrix inside a fused or transposed parameter is written to its
    slice, and tied parameters, which share memory, follow. On exit (normal, by an exception, or by Ctrl-C, which
    waits until the last matrix is back) every parameter has its former bits. The model's mode is not changed.

    Args:
        model: the live model; its parameters keep their identity, so optimisers and references stay valid.
        edits: matrix → what it is to be. The matrix is named as `architecture.recognise.model_map` names it, of the
            model's `state` or its state_dict, or given as its `MatrixRef`. A function gets the stored matrix
            (out, in) and is called when its turn comes, so one new matrix is in memory at a time.
        originals: where the unedited parameters can be read again, bit-equal to the model's, such as the open
            checkpoint that it was loaded from. By default the edited matrices are copied.

    Raises:
        InputError: no such matrix, a wrong shape, NaN or Inf in a new matrix, two edits of the same numbers, or a
            parameter that cannot be written: not floating-point, not contiguous, or not in memory.
    """
    opened = state(model)
    live = replace(opened, entries=open_checkpoint(_live(model)).entries)
    stored = {**live, **opened}
    refs = _resolved(stored, (live, opened), edits)
    done: list[tuple[MatrixRef, Tensor | None]] = []
    with _Interrupts() as interrupts:
        try:
            try:
                interrupts.begin()
                with torch.no_grad():
                    for ref, new in refs.items():
                        W = ref.read(stored)
                        changed = new(W) if callable(new) else new
                        # A sum is finite where every entry is, and read several times faster.
                        if not (bool(torch.isfinite(changed.sum())) or bool(torch.isfinite(changed).all())):
                            raise InputError(f"{ref.key.name}: the edited matrix holds NaN or Inf")
                        done.append((ref, W.clone() if originals is None else None))
                        ref.write(stored[ref.parameter], changed)
                        del W, changed
                yield model
            finally:
                interrupts.wait = True
        finally:
            # A second `finally`: an interrupt may come before the line above has run, and this one still does.
            with torch.no_grad():
                for ref, original in done:
                    back = ref.read(originals or {}) if original is None else original
                    ref.write(stored[ref.parameter], back)


def matrix_edits(
    edit: Edit,
    tuned: Checkpoint,
    other: Checkpoint | None = None,
    *,
    admits: Admits | None = None,
    factors: Decompose | None = None,
) -> dict[MatrixRef, Callable[[Tensor], Tensor]]:
    """One edit for every wanted matrix of a model, as functions of the stored matrix.

    Nothing is decomposed until a function is called, and nothing is kept after it: one matrix's factors at a time.

    Args:
        edit: what to do.
        tuned: the model that is edited, for its names; a live model's `state` will do.
        other: the model that vectors or values are taken from; matched by name as everywhere.
        admits: which matrices; all when None.
        factors: how to decompose; a cache's function where the same matrices are edited again and again.

    Raises:
        InputError: the edit needs ``other``, or no matrix is left.
    """
    if edit.needs_other and other is None:
        raise InputError(f"kind {edit.kind!r} takes from another model; name one")
    places = sites(tuned, other, admits)
    return {ref: bound(edit, ref, source, other, factors) for ref, source in places.items()}


def sites(tuned: Checkpoint, other: Checkpoint | None, admits: Admits | None) -> dict[MatrixRef, MatrixRef | None]:
    """The wanted matrices of a model, each with the same matrix of another one where there is another.

    Raises:
        InputError: there is none.
    """
    places: dict[MatrixRef, MatrixRef | None]
    if other is None:
        places = dict.fromkeys(model_map(tuned, admits=admits).matrices)
    else:
        places = {m.tuned: m.base for m in pair(other, tuned, admits=admits).matched}
    if not places:
        raise InputError(f"{tuned.source}: no matrix to edit: roles, blocks and name leave none")
    return places


def bound(
    edit: Edit, ref: MatrixRef, source: MatrixRef | None, other: Checkpoint | None, factors: Decompose | None
) -> Callable[[Tensor], Tensor]:
    """An edit of one matrix as a function of what is stored."""
    decomposed = factors or (lambda W, name: decompose(W, name=name))

    def apply(W: Tensor) -> Tensor:
        given = None
        if edit.needs_other and source is not None and other is not None:
            given = decomposed(source.read(other), f"{source.key.name} in {other.source}")
        return edit.apply(W, decomposed(W, ref.key.name), given, name=ref.key.name)

    return apply


def state(model: nn.Module) -> Checkpoint:
    """A live model as a checkpoint: its own tensors, tied ones under each of their names.

    Names are those under which its checkpoints store them: transformers 5 renames the parameters of some families
    as it loads them. What is stored in another form altogether (experts one by one) keeps its name in the module.
    """
    opened = open_checkpoint(_as_stored(model, _live(model)))
    config: Any = getattr(model, "config", None)
    return replace(opened, config=config.to_dict()) if hasattr(config, "to_dict") else opened


def _live(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def _as_stored(model: nn.Module, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under transformers' names on disk, where each of these still is memory of the model."""
    if "transformers" not in sys.modules:  # then this is no model of transformers, and importing it takes seconds
        return live
    stored = {name: live[own] for name, own in live_names(model).items() if own in live}
    kept = {tensor.data_ptr() for tensor in stored.values()}
    return stored | {name: tensor for name, tensor in live.items() if tensor.data_ptr() not in kept}


def _resolved(
    stored: Mapping[str, Tensor], opened: Sequence[Checkpoint], edits: Mapping[str | MatrixRef, New]
) -> dict[MatrixRef, New]:
    """The matrices that are meant, checked before anything is written."""
    by_name: dict[str, MatrixRef] = {}
    if any(isinstance(matrix, str) for matrix in edits):
        by_name = {ref.key.name: ref for names in opened for ref in model_map(names).matrices}
    refs: dict[MatrixRef, New] = {}
    places: dict[tuple[object, ...], str] = {}
    for matrix, new in edits.items():
        ref = matrix if isinstance(matrix, MatrixRef) else by_name.get(matrix)
        if ref is None or ref.parameter not in stored:
            some, wanted = ", ".join(list(by_name or stored)[:3]), matrix if ref is None else ref.parameter
            raise InputError(f"no matrix {wanted!r} in the model; it has {some} …")
        tensor = stored[ref.parameter]
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.is_contiguous():
            storage = f"{tensor.dtype} on {tensor.device}, contiguous: {tensor.is_contiguous()}"
            raise InputError(f"{ref.parameter}: cannot be edited in place ({storage}); want contiguous floats")
        place = (tensor.data_ptr(), *region(ref))
        if place in places:
            raise InputError(f"{ref.key.name} and {places[place]} are the same numbers (tied); edit one of them")
        places[place] = ref.key.name
        refs[ref] = new
    return refs


class _Interrupts:
    """Ctrl-C while a context is open: at once while `wait` is off, at the end of the context when it is on.

    It waits until `begin`, which is called where a clean-up stands ready: an exception between the change of the
    handler and the block would leave that handler behind. The first interrupt turns waiting on again, so a second
    one cannot come between it and the clean-up. Nothing is done outside of the main thread, where no interrupt
    arrives.
    """

    def __init__(self) -> None:
        self.wait = True
        self._pending: list[tuple[int, FrameType | None]] = []
        self._former: Callable[[int, FrameType | None], object] | None = None

    def __enter__(self) -> _Interrupts:
        former = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(former):
            self._former = former
            signal.signal(signal.SIGINT, self._handle)
        return self

    def begin(self) -> None:
        """Let interrupts through, one that has come already first."""
        self.wait = False
        if self._pending:
            self._handle(*self._pending.pop(0))

    def __exit__(self, *_: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            for number, frame in self._pending[:1]:
                self._former(number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wait or self._former is None:
            self._pending.append((number, frame))
            return
        self.wait = True
        self._former(number, frame)


def region(ref: MatrixRef) -> tuple[object, ...]:
    """Which part of its parameter a matrix is."""
    return (ref.rows, ref.columns, ref.groups, ref.expert)
