"""The one reader of adapter files: a PEFT adapter's folder as data, LoRA and its relatives and this project's own.

Nothing is computed and no base is needed. peft itself is not needed and not imported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specbasis.checkpoint.choice import USUAL, read_config
from specbasis.checkpoint.entry import Entry, reading
from specbasis.checkpoint.places import Place, locate
from specbasis.core.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Before every name in a file that PEFT writes."""

BASIS, PROOF = ("U", "Vh"), ("origin", "S", "sketch_U", "sketch_V")
"""Parts of an adapted matrix in a spectral adapter, besides the core M: what it may leave out, and what it may "
"not."""

_PICKLED = "adapter_model.bin"
_PART = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<lora>A|B|E|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?"
    r"|spectral_(?P<spectral>M|U|Vh|S|sketch_U|sketch_V|origin))$"
)


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A PEFT adapter as its folder holds it.

    Attributes:
        source: what the user called it.
        config: content of adapter_config.json.
        modules: module name → part → stored tensor: A, B, E, magnitude_vector of LoRA and its relatives (and
            ``embedding`` where A and B are those of one); M, `PROOF` and perhaps `BASIS` of a spectral adapter.
        saved: name → every other tensor: heads and other modules that are stored whole.
        files: on disk, for provenance.
        digests: file name → digest, on the Hub.
        revision: the commit, on the Hub.
    """

    source: str
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Entry]]
    saved: Mapping[str, Entry]
    files: tuple[Path, ...]
    digests: Mapping[str, str]
    revision: str

    @property
    def kind(self) -> str:
        """PEFT's name of the method in capitals; a spectral adapter's file says more behind it."""
        return str(self.config.get("peft_type", "")).upper().partition(":")[0]

    def require(self, parts: tuple[str, ...]) -> None:
        """Refuse a spectral adapter in which a matrix lacks one of these parts.

        Raises:
            InputError: it does.
        """
        for module, stored in self.modules.items():
            lacking = [f"spectral_{part}" for part in parts if part not in stored]
            if lacking:
                raise InputError(
                    f"{self.source}: {module} lacks {', '.join(lacking)}: the adapter file does not say which "
                    "basis its coefficients belong to; save it again with save_pretrained"
                )


def is_adapter(place: Place) -> bool:
    """Whether a place is a PEFT adapter's folder, and not a whole model with one beside it."""
    return not place.given and CONFIG in place.names and not set(USUAL) & set(place.names)


def adapter_folder(folder: str | Path, source: str = "") -> AdapterFile:
    """Read the adapter in a folder on disk; ``source`` is what messages call it, where it came from elsewhere.

    Raises:
        InputError: there is no such folder, or as `read_adapter`.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; want the folder of a saved adapter")
    file = read_adapter(locate(folder)[0])
    return replace(file, source=source) if source else file


def read_adapter(place: Place) -> AdapterFile:
    """Read the adapter in a place, whose weights are in adapter_model.safetensors (or .bin, without code).

    Raises:
        InputError: a file is missing or damaged.
    """
    with reading(place.source):
        if CONFIG not in place.names:
            raise InputError(f"{place.source}: no {CONFIG}; want the folder of a saved adapter")
        config, _ = read_config(place, CONFIG)
        if "peft_type" not in config:
            raise InputError(f"{place.source}: {CONFIG} is not an adapter's configuration; save the adapter again")
        name = next((name for name in (WEIGHTS, _PICKLED) if name in place.names), None)
        if name is None:
            raise InputError(
                f"{place.source}: a PEFT adapter without weights; want {WEIGHTS} beside {CONFIG}: the folder is "
                "incomplete; save the adapter again"
            )
        stored = place.entries(name)
        files, digests = place.provenance([name, CONFIG])
    modules: defaultdict[str, dict[str, Entry]] = defaultdict(dict)
    saved: dict[str, Entry] = {}
    for full, entry in stored.items():
        path = full.removeprefix(PREFIX)
        match = _PART.match(path)
        if match is None:
            saved[path] = entry
            continue
        part = match["lora"] or match["spectral"]
        modules[match["module"]][part.removeprefix("embedding_")] = entry
        if part.startswith("embedding_"):
            modules[match["module"]]["embedding"] = entry
    return AdapterFile(place.source, config, modules, saved, files, digests, place.revision)
