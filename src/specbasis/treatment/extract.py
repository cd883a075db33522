"""A finished finetune as a small adapter: the best low-rank approximation of what it changed, and all the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned, weights_sha256
from specbasis.checkpoint.adapter_file import CONFIG, PREFIX, WEIGHTS
from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.digest import sealed
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.writer import stored_bytes, want_new, write_safetensors
from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.core.svd import SVD
from specbasis.core.text import shareable
from specbasis.interventions.evaluators.kit import Judge
from specbasis.jobs.cache import Cache
from specbasis.jobs.folder import environment, plain
from specbasis.jobs.progress import Progress, Report, silent
from specbasis.treatment.budget import ranks_for, ranks_within
from specbasis.treatment.extraction import RECORD, Extraction
from specbasis.treatment.judged import judge_treated
from specbasis.treatment.lora import HEADS, Factors, configuration, task_of
from specbasis.treatment.modules import holders
from specbasis.treatment.options import ExtractOptions
from specbasis.treatment.updates import Update, refuse_another_base, updates

Source = str | Path | Mapping[str, Tensor]


@takes(ExtractOptions)
def extract(
    base: Source,
    tuned: Source,
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    judge: Judge | None = None,
    progress: Report | None = None,
    **keywords: Any,
) -> Extraction:
    """Write a finetune as a LoRA adapter that PEFT loads without specbasis.

    For every matrix delta = tuned − base ≈ B A with B = U √S, A = √S Vh of its leading triplets: the best
    approximation of each rank (Eckart & Young). Scaling is 1. Nothing is dropped in silence: biases, norms, new
    heads, grown embeddings and what else has no low-rank update are carried whole (PEFT's ``modules_to_save`` and
    ``bias``), and what cannot be is listed with its share of ‖delta‖². A LoRA, DoRA or AdaLoRA as ``tuned`` is
    resized; the update of one that is stored as a product is not formed.

    One matrix and its factors are in memory at a time; the files of either model are read three times, the
    finetune's once with ``rank``.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetune, or a PEFT adapter of base.
        out: the new folder.
        options: all options as one value; or each as a keyword.
        judge: from a model to its metrics, such as `specbasis.interventions.evaluators.judge` makes: then base,
            finetune and what is written are judged.
        progress: called as work goes on.
        **keywords: the fields of `ExtractOptions`, below.

    Raises:
        InputError: a source cannot be read, the two are no base and finetune, nothing differs, the size holds
            nothing, or ``out`` exists.

    Source: Eckart & Young 1936; as LoRA extraction: thomwolf, peft #312 (2023), mergekit-extract-lora.
    """
    chosen, out = ExtractOptions.of(options, keywords), Path(out)
    want_new(out)
    pretrained = open_checkpoint(base)
    finetuned = open_tuned(tuned, pretrained)
    adapter = _Adapter(pretrained, finetuned, chosen, progress or silent)
    with writing(out), whole(out) as temporary:
        temporary.mkdir()
        adapter.write(temporary, base)
        record = {**adapter.record(), **environment(("transformers", "peft"))}
        if judge is not None:
            record["scores"] = judge_treated(pretrained, finetuned, open_tuned(temporary, pretrained), judge)
        record = sealed(plain(record))
        (temporary / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Extraction(out, record)


@dataclass(eq=False)
class _Adapter:
    """The adapter that is made of a pair of checkpoints: what goes where, and then the file."""

    base: Checkpoint
    tuned: Checkpoint
    options: ExtractOptions
    progress: Report
    low_rank: list[Update] = field(default_factory=list)
    carried: list[Update] = field(default_factory=list)
    left_out: list[tuple[Update, str]] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = Cache(Path(self.options.cache)) if self.options.cache else None
        changes = updates(self.base, self.tuned)
        self.holders, self.model_class = holders(
            self.tuned, frozenset(c.name for c in changes if c.role == "embedding")
        )
        changed = []
        for done, change in enumerate(changes):
            self.progress(Progress(done, len(changes), f"reading {change.name}"))
            if change.reason or change.is_changed:
                changed.append(change)
        if not changed:
            raise InputError(f"{self.tuned.source}: every number is the base's; there is nothing to extract")
        refuse_another_base(self.base, self.tuned, changed)
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
        # On one of two tied weights a low-rank update would miss the other; on both it would be merged twice. And
        # PEFT takes a name for that of every module whose path ends with it.
        return (
            change.is_matrix
            and bool(holder.kind)
            and not holder.twins
            and not any(module.endswith(f".{holder.module}") for module in self.modules)
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
            for module in (self.holders[change.name].module, *self.holders[change.name].twins)
            if module
        }
        modules = {m for m in modules if not _within(m, modules - {m})}
        endings = (*modules, *HEADS.get(self.task or "", ()))
        return {m for m in self.modules if m.endswith(endings)} if endings else set()

    @property
    def task(self) -> str | None:
        """What the model is for, as PEFT calls it. PEFT carries the head of a task whole."""
        if not self.options.carry:
            return None
        return task_of(self.model_class)

    @property
    def modules(self) -> set[str]:
        """The paths of all modules that hold parameters."""
        return {module for h in self.holders.values() for module in (h.module, *h.twins) if module}

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
        """What a budget leaves for the factors."""
        carried = sum(stored_bytes(n, e) for n, e in self._whole().items())
        if costs and budget < carried + min(costs):
            raise InputError(
                f"got size = {self.options.size}; what is carried whole takes {carried:,} bytes and one direction "
                f"of the smallest matrix {min(costs):,}: want {carried + min(costs):,} bytes at least, or leave "
                "out what is no matrix (--no-carry)"
            )
        return budget - carried

    def _cost(self, change: Update) -> int:
        """Bytes of one direction of a matrix."""
        return sum(change.matrix_shape) * FORMATS[self.options.dtype].bytes

    # --- the file -------------------------------------------------------------------------------------------------

    def write(self, folder: Path, base: Source) -> None:
        """The adapter's weights and configuration, one matrix in memory at a time."""
        entries: dict[str, Entry] = {}
        for done, change in enumerate(self.low_rank):
            if self.ranks[change.name]:
                decompose = partial(self._decompose, change, Progress(done, len(self.low_rank), change.name))
                holder, rank = self.holders[change.name], self.ranks[change.name]
                factors = Factors(holder, change.shape, change.matrix_shape, rank, self.options.dtype, decompose)
                entries |= factors.entries()
        entries |= self._whole()
        digest = weights_sha256(self.base)
        with (folder / WEIGHTS).open("wb") as stream:
            tensors = ((name, entry.load()) for name, entry in entries.items())
            write_safetensors(stream, entries, tensors, metadata={"base_sha256": digest})
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
        for name, entry in self.tuned.entries.items():
            holder = self.holders[name]
            modules = [m for m in (holder.module, *holder.twins) if _within(m, self.whole_modules)]
            if not modules and name in biases:
                modules = [f"{holder.module}.base_layer" if holder.module in adapted else holder.module]
            for module in modules:
                stored[f"{PREFIX}{module}.{holder.leaf}".replace("..", ".")] = entry
        return stored

    # --- what it holds --------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What of the finetune is in the file; see `Extraction`."""
        total = sum(c.squares[0] for c in (*self.low_rank, *self.carried))
        total += sum(c.squares[0] for c, _ in self.left_out if not c.reason and not isnan(c.squares[0]))
        self.lines += [_line(c, None, 0, self.options.dtype) for c in self.low_rank if not self.ranks[c.name]]
        held = sum(line["share"] * line["squares"] for line in self.lines) + sum(c.squares[0] for c in self.carried)
        share = partial(_share, total=total)
        return {
            "base": shareable(self.base.source),
            "tuned": shareable(self.tuned.source),
            "options": self.options.config(),
            "matrices": self.lines,
            "carried": [{"name": c.name, "share_of_update": share(c.squares[0])} for c in self.carried],
            "left_out": [
                {"name": c.name, "reason": reason, "share_of_update": None if c.reason else share(c.squares[0])}
                for c, reason in self.left_out
            ],
            "total": {
                "share": share(held),
                "bytes": sum(line["bytes"] for line in self.lines)
                + sum(stored_bytes(n, e) for n, e in self._whole().items()),
                "tuned_bytes": sum(stored_bytes(n, e) for n, e in self.tuned.entries.items() if e.dtype in FORMATS),
            },
        }


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
        "share": 0.0 if svd is None else _share(float(svd.S.square().sum()), total),
        "chance": min(1.0, rank / min(out, width)),
        "share_of_entries": None,
        "share_of_signs": None,
    }
    if change.factors() is None:
        delta = change.delta(torch.float32).abs().flatten()
        count = min(len(delta), size // (FORMATS[dtype].bytes + 4))
        largest = delta.topk(count).values.double()
        line["share_of_entries"] = _share(float(largest.square().sum()), total)
        line["share_of_signs"] = _share(float(delta.double().sum()) ** 2 / len(delta), total)
    return line


def _share(part: float, total: float) -> float:
    return min(1.0, part / total) if total else 1.0


def _within(module: str, modules: set[str]) -> bool:
    """Whether a module is one of some, or inside of one."""
    return any(module == other or module.startswith(f"{other}.") for other in modules)
