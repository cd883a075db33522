"""A callback of transformers' Trainer that follows the basis while a model trains."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from specbasis.architecture.key import MatrixRef
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.blocks import norm
from specbasis.core.errors import InputError
from specbasis.core.intruders import intruders
from specbasis.core.subspace import alignment
from specbasis.core.svd import SVD, decompose
from specbasis.tracking.options import TrackOptions

_LOG = logging.getLogger(__name__)

ON_INTRUDERS = ("ignore", "warn", "stop")


@dataclass(frozen=True, eq=False)
class _Start:
    """A matrix when training began, its leading vectors, and all left ones where intruders are looked for."""

    ref: MatrixRef
    W: Tensor
    svd: SVD
    left: Tensor | None

    def measure(self, W: Tensor, ranks: int, threshold: float) -> dict[str, Any]:
        now = decompose(W, min(ranks, *W.shape), name=self.ref.key.name)
        update = norm(W.to(torch.float64) - self.W)
        figures = {
            "alignment_left": alignment(self.svd.U, now.U).tolist(),
            "alignment_right": alignment(self.svd.Vh.mT, now.Vh.mT).tolist(),
            "singular_values": now.S.tolist(),
            "update": float(update),
            "relative_update": float(update / norm(self.W)),
        }
        if self.left is not None:
            figures["intruders"] = intruders(self.left, now.U, threshold)
        return figures


class SpectralCallback(TrainerCallback):
    """Alignment to the start, singular values and ‖delta‖ of the weight matrices while a Trainer trains.

    At its default frequency a measurement is taken whenever all of them so far, with the decompositions at the
    start, have taken at most the share ``budget`` of the time; and once at the end. Every measurement is a line of
    ``spectral.jsonl`` in the Trainer's output folder, and its means stand in the next log as
    ``spectral/alignment``, ``spectral/relative_update`` and ``spectral/intruders``. It changes nothing in the
    training unless asked to stop it.

    Memory beside the model: a copy of each matrix that is followed and its leading vectors in float64; for
    intruders all its left vectors, in float32. Runs in the process that writes files; parameters must be whole
    there (no ZeRO-3, FSDP).

    Attributes:
        history: the measurements: {"step": …, "matrices": {name: {alignment_left, alignment_right, singular_values:
            one number a rank; update: ‖W − W₀‖_F; relative_update: the same over ‖W₀‖_F; intruders: 0-based
            ranks}}}.
        seconds: what measuring has taken.
    """

    def __init__(
        self,
        *,
        ranks: int = 10,
        every: int | None = None,
        budget: float = 0.01,
        roles: Sequence[str] = (),
        blocks: Sequence[int] = (),
        name: str = "",
        start: str | Path | Mapping[str, Tensor] | None = None,
        on_intruders: str = "ignore",
        threshold: float = 0.5,
    ) -> None:
        """Say what to follow.

        Args:
            ranks: leading ranks.
            every: optimizer steps between measurements; by the budget when None.
            budget: share of the time that measuring may take where ``every`` is None.
            roles: only these roles, such as ``["ffn"]``; embeddings and heads are left out unless they are named.
            blocks: only these blocks.
            name: only matrices whose name matches this pattern.
            start: weights to compare with; those when training begins when None. To be given where a training
                goes on from a checkpoint of its own.
            on_intruders: "ignore" (not looked for), "warn" once a matrix, or "stop" the training after that step.
            threshold: greatest cosine with any vector of the start below which a vector is an intruder.

        Raises:
            InputError: a number out of its range, or an unknown role.
        """
        if on_intruders not in ON_INTRUDERS:
            raise InputError(f"got on_intruders = {on_intruders!r}; want one of {', '.join(ON_INTRUDERS)}")
        if every is not None and every < 1:
            raise InputError(f"got every = {every}; want at least 1")
        if not 0 < budget <= 1 or not 0 < threshold <= 1:
            raise InputError(f"got budget = {budget}, threshold = {threshold}; want both in (0, 1]")
        self.options = TrackOptions(ranks=ranks, roles=tuple(roles), blocks=tuple(blocks), name=name)
        self.every, self.budget = every, budget
        self.given, self.on_intruders, self.threshold = start, on_intruders, threshold
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._starts: dict[str, _Start] = {}
        self._began = self._last = 0.0
        self._warned: set[str] = set()
        self._path: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decompose the start."""
        if not state.is_world_process_zero:
            return
        self._began = time.perf_counter()
        self._path = Path(args.output_dir) / "spectral.jsonl"
        if state.global_step and self.given is None:
            warnings.warn(
                f"training goes on from step {state.global_step}: alignment is to the weights there; give start=… "
                "to compare with those at step 0",
                stacklevel=2,
            )
        weights = _weights(kwargs["model"])
        mapped = model_map(open_checkpoint(weights), admits=self.options.filter)
        refs = [r for r in mapped.matrices if self.options.roles or r.key.role not in ("embedding", "head")]
        if not refs:
            raise InputError("SpectralCallback: no matrix to follow; ask for other roles, blocks or names")
        base: Mapping[str, Tensor] = weights if self.given is None else open_checkpoint(self.given)
        self._starts = {ref.key.name: self._start(ref, base) for ref in refs}
        self._last = time.perf_counter() - self._began
        self.seconds = self._last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if self._starts and self._is_time(state.global_step):
            self._measure(kwargs["model"], state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end."""
        if self._starts and (not self.history or self.history[-1]["step"] != state.global_step):
            self._measure(kwargs["model"], state.global_step, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the means of the last measurement to what the Trainer logs."""
        if not self.history:
            return
        named = {f"spectral/{name}": value for name, value in _means(self.history[-1]).items()}
        # Reporters read the first, the Trainer keeps the second.
        for log in (kwargs.get("logs"), *state.log_history[-1:]):
            if log is not None:
                log.update(named)

    def _start(self, ref: MatrixRef, base: Mapping[str, Tensor]) -> _Start:
        if ref.parameter not in base:
            raise InputError(f"SpectralCallback: start has no {ref.parameter}; want weights of the same model")
        W = ref.read(base).detach().clone()
        whole = self.on_intruders != "ignore"
        svd = decompose(W, None if whole else min(self.options.ranks, *W.shape), name=ref.key.name)
        return _Start(ref, W, svd.truncate(min(self.options.ranks, len(svd.S))), svd.U.float() if whole else None)

    def _is_time(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        return self.seconds + self._last <= self.budget * (time.perf_counter() - self._began)

    def _measure(self, model: nn.Module, step: int, control: Any) -> None:
        started = time.perf_counter()
        weights = _weights(model)
        matrices = {
            name: start.measure(start.ref.read(weights), self.options.ranks, self.threshold)
            for name, start in self._starts.items()
        }
        self.history.append({"step": step, "matrices": matrices})
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        self._last = time.perf_counter() - started
        self.seconds += self._last
        self._warn(matrices, step, control)

    def _warn(self, matrices: Mapping[str, dict[str, Any]], step: int, control: Any) -> None:
        """Name each matrix with intruders once, and stop the training if that is asked for."""
        intruding = {name: figures["intruders"] for name, figures in matrices.items() if figures.get("intruders")}
        for name, ranks in intruding.items():
            if name not in self._warned:
                numbers = ", ".join(str(rank + 1) for rank in ranks)
                _LOG.warning("step %d: intruder directions in %s (ranks %s)", step, name, numbers)
                self._warned.add(name)
        if intruding and self.on_intruders == "stop":
            control.should_training_stop = True


def _weights(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if any(W.numel() == 0 for W in weights.values()):
        raise InputError(
            "SpectralCallback: parameters are spread over processes; follow the checkpoints with `track`"
        )
    return weights


def _means(entry: Mapping[str, Any]) -> dict[str, float]:
    matrices = list(entry["matrices"].values())
    aligned = [x for figures in matrices for side in ("left", "right") for x in figures[f"alignment_{side}"]]
    sizes = [figures["relative_update"] for figures in matrices]
    means = {"alignment": sum(aligned) / len(aligned), "relative_update": sum(sizes) / len(sizes)}
    if "intruders" in matrices[0]:
        means["intruders"] = float(sum(len(figures["intruders"]) for figures in matrices))
    return means
