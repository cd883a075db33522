"""A finetune extracted as a LoRA: which matrix gets how many ranks, and what is carried beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.adapter.card import adapter_card
from specbasis.checkpoint.adapter_file import CONFIG, PREFIX, WEIGHTS
from specbasis.checkpoint.card import CARD
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.writer import stored_bytes
from specbasis.core.dtypes import FORMATS
from specbasis.core.text import named_parts
from specbasis.treatment.budget import Curve
from specbasis.treatment.form import Choice, Form, made_together, unusable
from specbasis.treatment.lora import HEADS, configuration, factor_shapes, factors, task_of
from specbasis.treatment.modules import Holder, holders
from specbasis.treatment.updates import Update, share


class LowRank(Form):
    """What goes into the adapter: ranks of the matrices, modules that are stored whole, biases.

    An option of a matrix is its rank; the one beyond the most that it may have is the matrix itself.
    """

    WEIGHTS = WEIGHTS
    takes_biases = True
    """Whether the file may hold a bias of a module that is not stored whole."""

    # --- what goes where ------------------------------------------------------------------------------------------

    def sort(self, changed: Sequence[Update]) -> None:
        """Put every change among the low-rank ones, those that are carried whole, or those that are left out."""
        embeddings = frozenset(c.name for c in changed if c.role == "embedding")
        self.holders, self.model_class = holders(self.tuned, embeddings)
        self.whole_modules = self._whole_modules(changed)
        adapted = {self.holders[c.name].module for c in changed if self._is_low_rank(c)}
        for change in changed:
            holder = self.holders[change.name]
            is_whole = _within(holder.module, self.whole_modules)
            if reason := unusable(change):
                self.left_out.append((change, reason))
            elif not is_whole and self._is_low_rank(change):
                self.matrices.append(change)
            elif not self.options.carry:
                self.left_out.append((change, "not asked for (carry)"))
            elif not is_whole and holder.module in adapted and not self.takes_biases:
                self.left_out.append((change, "the bias of an adapted layer, which this form cannot hold"))
            elif holder.module or holder.leaf == "bias":
                self.carried.append(change)
            else:
                self.left_out.append((change, "a parameter of the model itself, which no adapter holds"))

    def _is_low_rank(self, change: Update) -> bool:
        holder = self.holders[change.name]
        # On one of two tied weights a low-rank update would miss the other; on both it would be merged twice. One
        # that is an adapter's already stays what it was. And PEFT takes a name for that of every module whose path
        # ends with it.
        return (
            change.is_matrix
            and self.takes(holder)
            and (not holder.twins or self.tuned.entries[change.name].factors is not None)
            and holder.module not in self._tails
        )

    def takes(self, holder: Holder) -> bool:
        """Whether a module takes an update of this form."""
        return bool(holder.kind)

    def _whole_modules(self, changed: Sequence[Update]) -> set[str]:
        """The modules that are stored whole.

        The outermost of those with a change that is neither low-rank nor a bias, the heads of the task, and what
        PEFT takes for one of these by the ending of its name.
        """
        if not self.options.carry:
            return set()
        adapted = {self.holders[c.name].module for c in changed if self._is_low_rank(c)}
        modules = {
            module
            for change in changed
            if not change.reason and not self._is_low_rank(change) and not self._is_bias(change, adapted)
            for module in self._places(change.name)
            if module
        }
        modules = {m for m in modules if not _within(m, modules - {m})}
        endings = (*modules, *HEADS.get(self.task or "", ()))
        return {m for m in self.modules if m.endswith(endings)} if endings else set()

    def _is_bias(self, change: Update, adapted: set[str]) -> bool:
        """Whether a change is a bias that is stored by itself, or cannot be stored."""
        holder = self.holders[change.name]
        return holder.leaf == "bias" and (self.takes_biases or holder.module in adapted)

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

    def chosen(self) -> Choice:
        """The rank of each matrix: one for all, or as size or share want it, at most as many as pay."""
        self.most = [min(*c.matrix_shape, self.options.max_rank or min(c.matrix_shape)) for c in self.matrices]
        pays = [self._bytes_whole(c) // self.cost(c) for c in self.matrices]
        if self.options.rank is not None:
            ranks = [min(self.options.rank, most) for most in self.most]
            larger = [c.name for c, rank, most in zip(self.matrices, ranks, pays, strict=True) if rank > most]
            if larger:
                self.notes.append(
                    f"a LoRA of rank {self.options.rank} takes more bytes than the matrix: {named_parts(larger, 1)}"
                )
            return ranks
        self.most = [min(most, pay) for most, pay in zip(self.most, pays, strict=True)]
        curves = [self.curve(c, most) for c, most in zip(self.matrices, self.most, strict=True)]
        choice = self.spread(curves)
        whole = [c.name for c, rank, most in zip(self.matrices, choice, self.most, strict=True) if rank > most]
        if whole:
            self.notes.append(
                f"stored whole ({len(whole)} of {len(choice)} matrices, modules_to_save), since a LoRA that holds "
                f"as much takes more bytes than the matrix: {named_parts(whole, 1)}; for servers that take factors "
                "alone: --max-rank or --no-carry"
            )
        self.tell_share(curves, choice)
        return choice

    def tell_share(self, curves: Sequence[Curve], choice: Choice) -> None:
        """Note where the share that was asked for is not reached."""
        total = sum(curve.total for curve in curves)
        kept = 1 - sum(c.lost[o] for c, o in zip(curves, choice, strict=True)) / total if total else 1.0
        if self.options.energy is not None and kept < self.options.energy * (1 - 1e-9):
            self.notes.append(
                f"{kept:.2%} of the squared updates of the matrices is what this form holds at most; "
                f"{self.options.energy:.2%} was asked for"
            )

    def curve(self, change: Update, most: int) -> Curve:
        """What a matrix costs and loses at each rank that pays, and whole where it may be."""
        squares = self.tell(change, "singular values of ").spectrum(self.cache).square().cpu().numpy()
        whole = self._bytes_whole(change) if self._may_be_whole(change) else None
        return Curve.of_directions(squares, self.cost(change), most, whole)

    def _may_be_whole(self, change: Update) -> bool:
        """Whether the module can be stored whole: asked for, and the only one that its name means."""
        holder = self.holders[change.name]
        is_wanted = self.options.carry and self.options.max_rank is None
        return is_wanted and holder.is_module and not holder.twins and holder.module in self._unique

    @cached_property
    def _unique(self) -> set[str]:
        """The paths that no other path ends with."""
        backwards = sorted(module[::-1] for module in self.modules)
        following = [*backwards[1:], ""]
        return {m[::-1] for m, after in zip(backwards, following, strict=True) if not after.startswith(m)}

    def _bytes_whole(self, change: Update) -> int:
        return stored_bytes(change.name, self.tuned.entries[change.name])

    def cost(self, change: Update) -> int:
        """Bytes of one direction of a matrix."""
        return sum(change.matrix_shape) * FORMATS[self.options.dtype].bytes

    # --- the files ------------------------------------------------------------------------------------------------

    def entries(self, choice: Choice) -> dict[str, Entry]:
        """Factors of the matrices, and what is stored as it is."""
        entries: dict[str, Entry] = {}
        for change, rank, most in zip(self.matrices, choice, self.most, strict=True):
            if 0 < rank <= most:
                entries |= self.parts(change, rank)
        return entries | self._whole(choice)

    def write(self, folder: Path) -> None:
        """See `Form.write`; matrices of no rank, and whole ones, get their lines."""
        for change, rank, most in zip(self.matrices, self.choice, self.most, strict=True):
            if rank == 0:
                self.note(change, rank=0, bytes=0, share=0.0, **self.beside(change, 0, 0))
            elif rank > most:
                size, full = self._bytes_whole(change), min(change.matrix_shape)
                self.note(change, rank=full, whole=True, bytes=size, share=1.0, **self.beside(change, full, size))
        super().write(folder)

    def parts(self, change: Update, rank: int) -> dict[str, Entry]:
        """The tensors of one matrix."""
        shapes = factor_shapes(self.holders[change.name], change.shape, change.matrix_shape, rank)
        formats = {name: (self.options.dtype, shape) for name, shape in shapes.items()}
        return made_together(formats, partial(self._factors, change, rank, shapes))

    def _factors(self, change: Update, rank: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        self.tell(change)
        svd = change.decompose(rank, self.cache)
        B, A = factors(svd, rank, getattr(torch, self.options.dtype), change.name)
        size = rank * self.cost(change)
        self.note(change, rank=rank, bytes=size, share=change.held(B, A), **self.beside(change, rank, size))
        halves = (B.mT, A.mT) if self.holders[change.name].kind == "Embedding" else (A, B)
        stored = zip(shapes.items(), halves, strict=True)
        return {name: half.reshape(shape).contiguous() for (name, shape), half in stored}

    def beside(self, change: Update, rank: int, size: int) -> dict[str, float | None]:
        """What random directions hold of a matrix, and, in so many bytes, its largest entries; and its signs."""
        shares: dict[str, float | None] = {"chance": rank / min(change.matrix_shape)}
        if change.factors() is not None:  # an update that is not formed
            return {**shares, "share_of_entries": None, "share_of_signs": None}
        delta, total = change.delta(torch.float32).abs().flatten(), change.squares[0]
        count = min(len(delta), size // (FORMATS[self.options.dtype].bytes + 4))
        return {
            **shares,
            "share_of_entries": share(float(delta.topk(count).values.double().square().sum()), total),
            "share_of_signs": share(float(delta.double().sum()) ** 2 / len(delta), total),
        }

    def texts(self, choice: Choice) -> dict[str, str]:
        """The configurations, of the adapter and of the model where it has one, and the card."""
        texts = {CONFIG: json.dumps(self.configuration(choice), indent=2, sort_keys=True) + "\n"}
        if self.tuned.config:
            texts["config.json"] = json.dumps(dict(self.tuned.config), indent=2) + "\n"
        texts[CARD] = adapter_card(self.configuration(choice), self.base_sha256, self.tuned.entries)
        return texts

    def configuration(self, choice: Choice) -> dict[str, Any]:
        """PEFT's configuration of the adapter."""
        return configuration(
            self.ranks(choice),
            self._stored_whole(choice),
            task=self.task,
            base=self.address,
            is_in_out=any(self.holders[c.name].kind == "Conv1D" for c in self.matrices),
            has_biases=any(self.holders[c.name].leaf == "bias" for c in self.carried),
        )

    def ranks(self, choice: Choice) -> dict[str, int]:
        """Module → rank, of those that have factors."""
        chosen = zip(self.matrices, choice, self.most, strict=True)
        return {self.holders[c.name].module: rank for c, rank, most in chosen if 0 < rank <= most}

    def _stored_whole(self, choice: Choice) -> set[str]:
        """The modules that are stored whole, those of matrices for which no rank pays among them."""
        chosen = zip(self.matrices, choice, self.most, strict=True)
        return self.whole_modules | {self.holders[c.name].module for c, rank, most in chosen if rank > most}

    def _whole(self, choice: Choice) -> dict[str, Entry]:
        """Name in the file → what is stored as it is: biases, and all parameters of the modules that are whole."""
        adapted, whole, biases = self.ranks(choice), self._stored_whole(choice), {c.name for c in self.carried}
        stored: dict[str, Entry] = {}
        instead = {c.name: self.base.entries.get(c.counterpart) for c, _ in self.left_out}
        for name, own in self.tuned.entries.items():
            holder, entry = self.holders[name], instead.get(name, own)
            if entry is None:
                continue
            modules = [m for m in self._places(name) if _within(m, whole)]
            if not modules and name in biases:
                modules = [f"{holder.module}.base_layer" if holder.module in adapted else holder.module]
            for module in modules:
                stored[f"{PREFIX}{module}.{holder.leaf}".replace("..", ".")] = entry
        return stored


def _within(module: str, modules: set[str]) -> bool:
    """Whether a module is one of some, or inside of one."""
    return any(module == other or module.startswith(f"{other}.") for other in modules)
