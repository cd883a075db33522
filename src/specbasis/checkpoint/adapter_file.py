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

import torch
from torch import Tensor

from specbasis.checkpoint.choice import USUAL, read_config
from specbasis.checkpoint.digest import digest
from specbasis.checkpoint.entry import Entry, reading, shown
from specbasis.checkpoint.pattern import check_positions
from specbasis.checkpoint.places import Place, locate
from specbasis.core.brief import brief
from specbasis.core.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

PREFIX = "base_model.model."
"""Before every name in a file that PEFT writes."""

BASIS, PROOF = ("U", "Vh"), ("origin", "S", "sketch_U", "sketch_V")
"""Parts of an adapted matrix in a spectral adapter besides M: what it may leave out, and what it may not."""

POSITIONS = "positions"
"""Where the coefficients stand, if they are not all of the square; see `checkpoint.pattern`."""

FROM_DATA = ("gradient",)
"""Kinds of basis that examples made. Nothing but the file tells their vectors, so its seal covers them."""

SETTINGS = ("scale", "basis")
"""Fields of a spectral configuration that decide what the coefficients mean."""

_HALF = (torch.float16, torch.bfloat16)

AGAIN = f'fetch or save the adapter again (if the change is meant, remove "seal" from {CONFIG})'
_PART = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<lora>A|B|E|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?"
    r"|spectral_(?P<spectral>M|U|Vh|S|sketch_U|sketch_V|origin|positions))$"
)


@brief
@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A PEFT adapter as its folder holds it.

    Attributes:
        source: what the user called it.
        config: content of adapter_config.json.
        modules: module name → part → stored tensor: A, B, E, magnitude_vector of LoRA and its relatives (and
            ``embedding`` where A and B are those of one); M, `PROOF` and perhaps `BASIS` and `POSITIONS` of a
            spectral adapter.
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

    def require(self, parts: tuple[str, ...], *, only: str | None = None) -> None:
        """Refuse a spectral adapter in which a matrix, or only the one of this module, lacks one of these parts.

        Raises:
            InputError: it does.
        """
        for module, stored in self.modules.items() if only is None else [(only, self.modules[only])]:
            lacking = [f"spectral_{part}" for part in parts if part not in stored]
            if lacking:
                raise InputError(
                    f"{self.source}: {module} lacks {', '.join(lacking)}: the adapter file does not say which "
                    "basis its coefficients belong to; save it again with save_pretrained"
                )

    def prove(self) -> None:
        """Refuse a spectral adapter that is not what was saved, by the seal in its configuration.

        U and Vh are part of it where the basis is one of `FROM_DATA`; else the sketch and the base prove them.
        Files of version 0.1 have no seal.

        Raises:
            InputError: a setting, the coefficients of a layer or a module saved whole differ, or are gone; or
                positions of coefficients are none.
        """
        for module, parts in self.modules.items():
            if POSITIONS in parts or ("M" in parts and len(parts["M"].shape) != 2):
                self.require(("M", "S", "origin", POSITIONS), only=module)
                with reading(self.source):
                    positions, M, origin = (parts[part].load() for part in (POSITIONS, "M", "origin"))
                interval = int(origin[0]), int(origin[1])
                if interval[1] - interval[0] != parts["S"].shape[0]:
                    raise InputError(
                        f"{self.source}: {module} is for ranks [{interval[0]}, {interval[1]}) and has "
                        f"{parts['S'].shape[0]} singular values; fetch or save the adapter again"
                    )
                check_positions(positions, M, interval, f"{self.source}: {module}")
        recorded = checked_seal(self.config, self.source)
        if recorded is None:
            return
        under_seal = sealed_parts(self.config.get("basis"))
        layers = {
            module: {part: entry for part, entry in parts.items() if part in under_seal}
            for module, parts in self.modules.items()
        }
        whole = {name: {name: self.saved[name]} for name in recorded["saved"] if name in self.saved}
        self._compare("layer", recorded["layers"], layers)
        self._compare("module", recorded["saved"], whole)

    def _compare(self, kind: str, recorded: Mapping[str, str], stored: Mapping[str, Mapping[str, Entry]]) -> None:
        """Refuse names that are in one of the two alone, and values of another digest."""
        with reading(self.source):
            now = {
                name: values_digest({part: e.load() for part, e in parts.items()}) for name, parts in stored.items()
            }
        problems = {
            "is not in the file": sorted(recorded.keys() - now.keys()),
            "is in the file and was not saved with it": sorted(now.keys() - recorded.keys()),
            "holds other numbers than were saved": sorted(
                n for n in now.keys() & recorded if now[n] != recorded[n]
            ),
        }
        for problem, names in problems.items():
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise InputError(f"{self.source}: {kind} {names[0]}{more} {problem}; {AGAIN}")


def checked_seal(config: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """The seal of a spectral configuration, if it has one.

    Raises:
        InputError: it is damaged, or one of `SETTINGS` is not what it was.
    """
    recorded = config.get("seal")
    if recorded is None:
        return None
    parts = ("layers", "saved", "base")
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(part), dict) for part in parts):
        raise InputError(f"{source}: the seal in {CONFIG} is damaged; {AGAIN}")
    for name in SETTINGS:
        if config.get(name) != recorded.get(name):
            raise InputError(
                f"{source}: {CONFIG} says {name} = {config.get(name)!r}, the coefficients were saved with "
                f"{recorded.get(name)!r}; {AGAIN}"
            )
    return recorded


def seal(
    config: Any, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], base: Mapping[str, str]
) -> dict[str, Any]:
    """What the configuration of a spectral adapter records of its file, for `AdapterFile.prove`.

    Args:
        config: the configuration; its `SETTINGS` are recorded as they are.
        tensors: the adapted matrices' tensors by their names in the file.
        saved: tensors of modules that are saved whole, by their names without `PREFIX`.
        base: what is recorded of the base.
    """
    layers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _PART.match(name.removeprefix(PREFIX))
        if match is not None and match["spectral"] in sealed_parts(config.basis):
            layers[match["module"]][match["spectral"]] = tensor
    return {
        **{name: getattr(config, name) for name in SETTINGS},
        "layers": {module: values_digest(parts) for module, parts in layers.items()},
        "saved": {name: values_digest({name: tensor}) for name, tensor in saved.items()},
        "base": dict(base),
    }


def sealed_parts(basis: str | None) -> tuple[str, ...]:
    """Parts of an adapted matrix that its digest in the seal covers, for a kind of basis."""
    return ("M", POSITIONS, *PROOF, *(BASIS if basis in FROM_DATA else ()))


def values_digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 64 bits of the digest of named tensors: names, shapes and values, whatever the floating dtype."""
    named = (
        (name, tensor.float() if tensor.dtype in _HALF else tensor) for name, tensor in sorted(tensors.items())
    )
    return digest(*(part for pair in named for part in pair))[:16]


def named_base(config: Mapping[str, Any], source: str) -> str:
    """The base that an adapter's configuration names, as a source: a path that exists, or a repository on the Hub.

    Raises:
        InputError: it names none, or a path where nothing is.
    """
    name, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if not name:
        raise InputError(f"{source}: the adapter does not name its base; give the base's place beside it")
    if ":" in name or Path(name).expanduser().exists():
        return name
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII):
        return f"hub:{name}" + (f"@{revision}" if revision else "")
    raise InputError(
        f"{source}: its base {shown(name)} is not there; give the place where the base is now, or write it into "
        f"{CONFIG} as base_model_name_or_path"
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
        name = next((name for name in (WEIGHTS, PICKLED) if name in place.names), None)
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
