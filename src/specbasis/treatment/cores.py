"""A finetune extracted as a spectral adapter: the core of each update in the base's leading singular vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from specbasis.checkpoint.adapter_file import PREFIX, PROOF, SETTINGS, values_digest
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.proof import COLUMNS, TOLERANCE, prove
from specbasis.core.errors import InputError
from specbasis.core.extras import require
from specbasis.treatment.budget import Curve
from specbasis.treatment.form import Choice, made_together
from specbasis.treatment.lora import base_address
from specbasis.treatment.low_rank import LowRank
from specbasis.treatment.modules import Holder
from specbasis.treatment.updates import Update, leading, share

ORIGIN = 10
"""Whole numbers of 8 bytes that say what a basis is of."""

NUMBER = 4
"""Bytes of all other numbers: float32."""


class Cores(LowRank):
    """The leading k × k core M = Uᵀ delta V of each matrix, with U and V the base's singular vectors.

    The file holds M and what proves the basis, which is decomposed again when the adapter is loaded. An option of a
    matrix is k.
    """

    takes_biases = False

    def chosen(self) -> Choice:
        """See `LowRank.chosen`; no core goes further than the base's vectors are determined."""
        require("peft", purpose="a spectral adapter needs")
        self.digests: dict[str, str] = {}
        self.saved: dict[str, str] = {}
        if not self.matrices:
            raise InputError(
                f"{self.tuned.source}: no linear layer of it differs from the base's; want another form (--as)"
            )
        self.most, curves = [], []
        for change in self.matrices:
            short = min(change.matrix_shape)
            wanted = min(short, self.options.rank or short, self.options.max_rank or short)
            basis = leading(self.tell(change, "basis of ").base_matrix(), wanted, self.cache, change.name)
            self.most.append(int((basis.bound <= TOLERANCE / 8).long().cumprod(0).sum()))
            curves.append(_curve(basis.core(change.delta()), change.squares[0], self.most[-1]))
        choice = list(self.most) if self.options.rank else self.spread(curves)
        self.tell_share(curves, choice)
        return choice

    def takes(self, holder: Holder) -> bool:
        """See `LowRank.takes`: linear layers alone."""
        return holder.kind in ("Linear", "Conv1D") and holder.is_module

    def parts(self, change: Update, rank: int) -> dict[str, Entry]:
        """The core of one matrix, and the proof of its basis."""
        module = f"{PREFIX}{self.holders[change.name].module}"
        shapes = {"origin": (ORIGIN,), "S": (rank,), **dict.fromkeys(("sketch_U", "sketch_V"), (rank, COLUMNS))}
        formats: dict[str, tuple[str, tuple[int, ...]]] = {f"{module}.spectral_M": ("float32", (rank, rank))}
        formats |= {f"{module}.spectral_{p}": ("int64" if p == "origin" else "float32", shapes[p]) for p in PROOF}
        return made_together(formats, partial(self._made, change, rank))

    def _made(self, change: Update, rank: int) -> dict[str, Tensor]:
        W, module = self.tell(change).base_matrix(), self.holders[change.name].module
        basis = leading(W, rank, self.cache, change.name)
        exact, proof = basis.core(change.delta()), prove(basis, (0, rank), W)
        M, size = exact.float(), int(_bytes(np.array(rank)))
        held = share(float((2 * exact * M - M.double().square()).sum()), change.squares[0])
        self.note(change, rank=rank, bytes=size, share=held, **self.beside(change, rank, size))
        parts = {"M": M, **{part: getattr(proof, part) for part in PROOF}}
        self.digests[module] = values_digest(parts)
        return {f"{PREFIX}{module}.spectral_{part}": tensor.contiguous() for part, tensor in parts.items()}

    def beside(self, change: Update, rank: int, size: int) -> dict[str, float | None]:
        """As `LowRank.beside`, and what a LoRA of as many bytes holds."""
        out, width = change.matrix_shape
        squares = change.spectrum(self.cache).square()[: size // (NUMBER * (out + width))]
        of_lora = share(float(squares.sum()), change.squares[0])
        chance = rank**2 / (out * width)
        return {**super().beside(change, rank, size), "chance": chance, "share_of_lora": of_lora}

    def write(self, folder: Path) -> None:
        """See `LowRank.write`; then a note says what a LoRA of as many bytes would hold."""
        self.saved = {
            name.removeprefix(PREFIX): values_digest({name.removeprefix(PREFIX): entry.load()})
            for name, entry in self._whole(self.choice).items()
        }
        super().write(folder)
        total = sum(line["squares"] for line in self.lines)
        cores, loras = (
            sum(line[name] * line["squares"] for line in self.lines) / total for name in ("share", "share_of_lora")
        )
        if loras > cores:
            self.notes.append(
                f"the cores hold {cores:.1%} of these updates, LoRAs of as many bytes {loras:.1%}: a core is for "
                "finetunes that were trained as one; of this one a LoRA is better (--as lora)"
            )

    def configuration(self, choice: Choice) -> dict[str, Any]:
        """The configuration of the adapter, with the seal of its file."""
        from specbasis.adapter import SpectralConfig

        ranks, address = self.ranks(choice), base_address(self.address)
        common = max(ranks.values(), default=1)
        config = SpectralConfig(
            interval=(0, common),
            interval_pattern={module: (0, rank) for module, rank in ranks.items() if rank != common},
            target_modules=sorted(ranks),
            modules_to_save=sorted(self._stored_whole(choice)) or None,
            save_basis=False,
            task_type=self.task,
            base_model_name_or_path=address.get("pretrained_model_name_or_path"),
            revision=address.get("revision"),
            inference_mode=True,
        )
        none = "0" * 16  # as long as a digest, for the size
        saved = (name.removeprefix(PREFIX) for name in self._whole(choice))
        seal = {
            **{name: getattr(config, name) for name in SETTINGS},
            "layers": {module: self.digests.get(module, none) for module in ranks},
            "saved": {name: self.saved.get(name, none) for name in saved},
            "base": {},
        }
        return {**config.to_dict(), "seal": seal}


def _curve(core: Tensor, total: float, most: int) -> Curve:
    """What the leading squares of a core cost, and leave of ‖delta‖²."""
    held = core.square().cumsum(0).cumsum(1).diagonal()[:most].cpu().numpy()
    lost = np.clip(total - np.concatenate([[0.0], held]), 0.0, None)
    return Curve(_bytes(np.arange(most + 1)), lost)


def _bytes(k: Any) -> Any:
    """Of the leading k × k core with its values, sketches and origin."""
    return (NUMBER * (k**2 + (1 + 2 * COLUMNS) * k) + 8 * ORIGIN) * (k > 0)
