"""A finetune extracted as a LoRA: which matrix gets how many ranks, and what is carried beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint import Checkpoint, weights_sha256
from specbasis.checkpoint.adapter_file import CONFIG, PREFIX, WEIGHTS
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.writer import safetensors_header, stored_bytes, write_safetensors
from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD
from specbasis.jobs.cache import Cache
from specbasis.jobs.progress import Progress, Report
from specbasis.treatment.budget import ranks_for, ranks_within
from specbasis.treatment.lora import HEADS, Factors, configuration, task_of
from specbasis.treatment.modules import holders
from specbasis.treatment.options import ExtractOptions
from specbasis.treatment.updates import Update, share

Source = str | Path | Mapping[str, Tensor]


@dataclass(eq=False)
class LowRank:
    """What goes into the adapter: ranks of the matrices, modules that are stored whole, biases."""

    base: Checkpoint
    tuned: Checkpoint
    changes: list[Update]
    options: ExtractOptions
    progress: Report
    low_rank: list[Update] = field(default_factory=list)
    carried: list[Update] = field(default_factory=list)
    left_out: list[tuple[Update, str]] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = Cache(Path(self.options.cache)) if self.options.cache else None
        embeddings = frozenset(c.name for c in self.changes if c.role == "embedding")
        self.holders, self.model_class = holders(self.tuned, embeddings)
        changed = [c for c in self.changes if c.reason or c.is_changed]
        self._sort(changed)
        self._spread()

    # --- what goes where ------------------------------------------------------------------------------------------

    def _sort(self, changed: list[Update]) -> None:
        """Put every change among the low-rank ones, those that are carried whole, or those that are left out."""
        whole_modules = self._whole_modules(changed)
        for change in changed:
            holder = self.holders[change.name]
            if change.reason:
                self.left_out.append((change, change.reason))
            elif isnan(change.squares[0]):
                self.left_out.append((change, "holds NaN or Inf"))
            elif not _within(holder.module, whole_modules) and self._is_low_rank(change):
                self.low_rank.append(change)
            elif not self.options.carry:
                self.left_out.append((change, "not asked for (carry)"))
            elif holder.module or holder.leaf == "bias":
                self.carried.append(change)
            else:
                self.left_out.append((change, "a parameter of the model itself, which no adapter holds"))
        self.whole_modules = whole_modules if self.options.carry else set()

    def _is_low_rank(self, change: Update) -> bool:
        holder = self.holders[change.name]
        # On one of two tied weights a low-rank update would miss the other; on both it would be merged twice. One
        # that is an adapter's already stays what it was. And PEFT takes a name for that of every module whose path
        # ends with it.
        return (
            change.is_matrix
            and bool(holder.kind)
            and (not holder.twins or self.tuned.entries[change.name].factors is not None)
            and holder.module not in self._tails
        )

    def _whole_modules(self, changed: list[Update]) -> set[str]:
        """The modules that are stored whole.

        The outermost of those with a change that is neither low-rank nor a bias, the heads of the task, and what
        PEFT takes for one of these by the ending of its name.
        """
        if not self.options.carry:
            return set()
        modules = {
            module
            for change in changed
            if not change.reason and not self._is_low_rank(change) and self.holders[change.name].leaf != "bias"
            for module in self._places(change.name)
            if module
        }
        modules = {m for m in modules if not _within(m, modules - {m})}
        endings = (*modules, *HEADS.get(self.task or "", ()))
        return {m for m in self.modules if m.endswith(endings)} if endings else set()

    def _places(self, name: str) -> tuple[str, ...]:
        """The modules that a parameter is stored for: of an adapter the one that it names alone."""
        holder = self.holders[name]
        return (holder.module, *holder.twins) if self.tuned.under is None else (holder.module,)

    @property
    def task(self) -> str | None:
        """What the model is for, as PEFT calls it. PEFT carries the head of a task whole."""
        if not self.options.carry:
            return None
        return task_of(self.model_class)

    @cached_property
    def modules(self) -> set[str]:
        """The paths of all modules that hold parameters."""
        return {module for h in self.holders.values() for module in (h.module, *h.twins) if module}

    @cached_property
    def _tails(self) -> set[str]:
        """What stands behind a dot of any of these paths."""
        return {".".join(parts[i:]) for parts in (m.split(".") for m in self.modules) for i in range(1, len(parts))}

    # --- how many ranks -------------------------------------------------------------------------------------------

    def _spread(self) -> None:
        most = [min(*c.matrix_shape, self.options.max_rank or min(c.matrix_shape)) for c in self.low_rank]
        if self.options.rank is not None:
            ranks = [min(self.options.rank, m) for m in most]
        else:
            energies = []
            for done, (change, m) in enumerate(zip(self.low_rank, most, strict=True)):
                self.progress(Progress(done, len(most), f"singular values of {change.name}"))
                energies.append(change.spectrum(self.cache)[:m].square().cpu().numpy())
            costs = [self._cost(change) for change in self.low_rank]
            budget = self.options.budget
            if budget is None:
                ranks = ranks_for(energies, costs, self.options.energy or 1.0)
            else:
                ranks = ranks_within(energies, costs, self._left_of(budget, costs))
        self.ranks = {c.name: rank for c, rank in zip(self.low_rank, ranks, strict=True)}

    def _left_of(self, budget: int, costs: list[int]) -> int:
        """What a budget leaves for the factors when names and shapes are told and the rest is carried."""
        full = {c.name: min(c.matrix_shape) for c in self.low_rank}
        header = len(safetensors_header(self._entries(full), self._metadata))
        carried = sum(stored_bytes(name, entry) for name, entry in self._whole().items())
        least = header + carried + min(costs, default=0)
        if budget < least:
            hint = ", or leave out what is no matrix (--no-carry)" if carried else ""
            raise InputError(
                f"got size = {self.options.size}; names and shapes take {header:,} bytes, what is carried whole "
                f"{carried:,}, one direction of the smallest matrix {min(costs, default=0):,}: want {least:,} "
                f"bytes at least{hint}"
            )
        return budget - header - carried

    def _cost(self, change: Update) -> int:
        """Bytes of one direction of a matrix."""
        return sum(change.matrix_shape) * FORMATS[self.options.dtype].bytes

    # --- the file -------------------------------------------------------------------------------------------------

    def write(self, folder: Path, base: Source) -> None:
        """The adapter's weights and configuration, one matrix in memory at a time."""
        entries = self._entries(self.ranks)
        with (folder / WEIGHTS).open("wb") as stream:
            tensors = ((name, entry.load()) for name, entry in entries.items())
            write_safetensors(stream, entries, tensors, self._metadata)
            self.stored = stream.tell()
        self.lines += [_line(c, None, 0, self.options.dtype) for c in self.low_rank if not self.ranks[c.name]]
        config = configuration(
            {self.holders[name].module: rank for name, rank in self.ranks.items()},
            self.whole_modules,
            task=self.task,
            base=base,
            is_in_out=any(self.holders[c.name].kind == "Conv1D" for c in self.low_rank),
            has_biases=any(self.holders[c.name].leaf == "bias" for c in self.carried),
        )
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self.tuned.config:
            text = json.dumps(dict(self.tuned.config), indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")

    def _entries(self, ranks: Mapping[str, int]) -> dict[str, Entry]:
        """All tensors of the file when the matrices get these ranks."""
        entries: dict[str, Entry] = {}
        for done, change in enumerate(self.low_rank):
            if rank := ranks[change.name]:
                decompose = partial(self._decompose, change, Progress(done, len(self.low_rank), change.name))
                holder = self.holders[change.name]
                factors = Factors(holder, change.shape, change.matrix_shape, rank, self.options.dtype, decompose)
                entries |= factors.entries()
        return entries | self._whole()

    @cached_property
    def _metadata(self) -> dict[str, str]:
        return {"base_sha256": weights_sha256(self.base)}

    def _decompose(self, change: Update, at: Progress) -> SVD:
        self.progress(at)
        rank = self.ranks[change.name]
        svd = change.decompose(rank, self.cache)
        self.lines.append(_line(change, svd, rank, self.options.dtype))
        return svd

    def _whole(self) -> dict[str, Entry]:
        """Name in the file → what is stored as it is: biases, and all parameters of the modules that are whole."""
        adapted = {self.holders[c.name].module for c in self.low_rank}
        biases = {c.name for c in self.carried}
        stored: dict[str, Entry] = {}
        instead = {c.name: self.base.entries.get(c.counterpart) for c, _ in self.left_out}
        for name, own in self.tuned.entries.items():
            holder, entry = self.holders[name], instead.get(name, own)
            if entry is None:
                continue
            modules = [m for m in self._places(name) if _within(m, self.whole_modules)]
            if not modules and name in biases:
                modules = [f"{holder.module}.base_layer" if holder.module in adapted else holder.module]
            for module in modules:
                stored[f"{PREFIX}{module}.{holder.leaf}".replace("..", ".")] = entry
        return stored


def _line(change: Update, svd: SVD | None, rank: int, dtype: str) -> dict[str, Any]:
    """What of one matrix is in the file, beside what as many bytes could hold otherwise."""
    out, width = change.matrix_shape
    total, size = change.squares[0], rank * (out + width) * FORMATS[dtype].bytes
    line = {
        "name": change.name,
        "role": change.role,
        "block": change.block,
        "shape": [out, width],
        "rank": rank,
        "bytes": size,
        "squares": total,
        "share": 0.0 if svd is None else share(float(svd.S.square().sum()), total),
        "chance": min(1.0, rank / min(out, width)),
        "share_of_entries": None,
        "share_of_signs": None,
    }
    if change.factors() is None:
        delta = change.delta(torch.float32).abs().flatten()
        count = min(len(delta), size // (FORMATS[dtype].bytes + 4))
        largest = delta.topk(count).values.double()
        line["share_of_entries"] = share(float(largest.square().sum()), total)
        line["share_of_signs"] = share(float(delta.double().sum()) ** 2 / len(delta), total)
    return line


def _within(module: str, modules: set[str]) -> bool:
    """Whether a module is one of some, or inside of one."""
    return any(module == other or module.startswith(f"{other}.") for other in modules)
