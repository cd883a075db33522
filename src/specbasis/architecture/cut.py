"""Cut: which matrices (out, in) a parameter holds, by its family's entry, its shape and its neighbours."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from specbasis.architecture.family import skeleton_of
from specbasis.checkpoint import Checkpoint, Entry
from specbasis.checkpoint.names import bare_name


class Names:
    """A checkpoint's names without wrappers, grouped by skeleton: the name with its numbers set to 00.

    A model of 20 000 tensors has a few hundred skeletons, and patterns are tried on those alone. Numbers that a
    pattern spells out (net.2) stay.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.entries = checkpoint.entries
        self.config = checkpoint.config
        self.shards = checkpoint.shards
        self.bare = {name: bare_name(name) for name in checkpoint.entries}
        self.stored = {bare: name for name, bare in self.bare.items()}
        self.skeleton = {name: skeleton_of(bare) for name, bare in self.bare.items()}
        self.alike: dict[str, list[str]] = defaultdict(list)
        for name, skeleton in self.skeleton.items():
            self.alike[skeleton].append(name)
        self._contacted: set[str | None] = {None}
        self._stand_ins: dict[tuple[str, tuple[int, ...], str], tuple[int, ...] | None] = {}

    def at_hand(self, names: Iterable[str]) -> None:
        """From here on the files of these names are contacted anyway, so that all that they hold is at hand."""
        self._contacted = {None, *map(self.shards.get, names)}

    def is_at_hand(self, name: str) -> bool:
        """Whether looking a name up contacts no further file."""
        return self.shards.get(name) in self._contacted

    def shape(self, skeleton: str) -> tuple[int, ...]:
        """The shape of the first parameter with a skeleton, of those at hand where there are any."""
        alike = self.alike[skeleton]
        return self.entries[next(filter(self.is_at_hand, alike), alike[0])].shape

    def sibling(self, place: Place, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter in the same block, by its name behind the block; None where it is missing."""
        name = f".{name.format(**place.slots)}"
        stored = self.stored.get(place.base + name)
        if stored is None:
            return None
        known = None if self.is_at_hand(stored) else self._stand_in(place, name)
        return known or self.entries[stored].shape

    def _stand_in(self, place: Place, name: str) -> tuple[int, ...] | None:
        """The shape that a sibling has in every block at hand in which this parameter has the same shape.

        None where there is no such block, or where they differ.
        """
        own = self.stored[place.base + place.rest]
        shape = self.entries[own].shape
        key = (place.rest, shape, name)
        if key not in self._stand_ins:
            found = set()
            for twin in filter(self.is_at_hand, self.alike[self.skeleton[own]]):
                sibling = self.stored.get(self.bare[twin].removesuffix(place.rest) + name, "")
                comparable = self.bare[twin].endswith(place.rest) and self.entries[twin].shape == shape
                if comparable and sibling and self.is_at_hand(sibling):
                    found.add(self.entries[sibling].shape)
            self._stand_ins[key] = found.pop() if len(found) == 1 else None
        return self._stand_ins[key]


@dataclass(frozen=True)
class Place:
    """A name taken apart: the text before its block, the block's numbers, the text up to it and behind it."""

    container: str
    numbers: tuple[int, ...]
    base: str
    rest: str
    slots: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Meaning:
    """What a parameter is: the [[matrix]] entry that holds for it, and its place where it lies in a block."""

    entry: Mapping[str, Any]
    place: Place | None


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter before its block is numbered: role, label behind the name, and how to cut it."""

    role: str
    shape: tuple[int, int]
    label: str = ""
    cut: Mapping[str, Any] = field(default_factory=dict)


def meaning_of(
    entries: Iterable[Mapping[str, Any]], shape: tuple[int, ...], place: Place | None, names: Names
) -> Meaning | None:
    """What a family's file says of a parameter: the first of the entries with its name that holds, or None."""
    entry = next((entry for entry in entries if _holds(entry, shape, place, names)), None)
    return None if entry is None else Meaning(entry, place)


def place_of(bare: str, found: re.Match[str]) -> Place:
    """The place of a name whose block a pattern matches."""
    numbers = [int(text) for key, text in found.groupdict().items() if key.startswith("block_")]
    slots = {key: text for key, text in found.groupdict().items() if not key.startswith("block")}
    end = found.end("block")
    return Place(bare[: found.start()], tuple(numbers), bare[:end], bare[end:], slots)


def _holds(entry: Mapping[str, Any], shape: tuple[int, ...], place: Place | None, names: Names) -> bool:
    """Whether a parameter has the axes, the shape, the neighbours and the configuration that an entry asks for."""
    if "shape" in entry and not shape_fits(entry["shape"], shape):
        return False
    if "skip" in entry:
        return True
    if len(shape) not in entry.get("axes", _AXES.get(entry.get("role", ""), (3,) if _is_3d(entry) else (2,))):
        return False
    if "when" in entry and not _configured(names.config, entry["when"], _oriented(entry, shape)[1]):
        return False
    if place is None:
        return True
    if "fits" in entry and not _fit_together(entry["fits"], place, names):
        return False
    if "into" not in entry or "role" not in entry:
        return True
    return _read_width(entry, place, names) == _oriented(entry, shape)[0]


_AXES = {"conv": (3, 4, 5), "embedding": (2, 4, 5)}
"""How many axes a parameter of a role may have; 2 for the others, unless the entry says so."""


def _is_3d(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("stacked")) or str(entry.get("layout", "")).startswith("heads")


def _oriented(entry: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in) of a parameter, or of one matrix of its stack."""
    shape = shape[1:] if entry.get("stacked") else shape
    flat = (shape[0], prod(shape[1:]))
    return (flat[1], flat[0]) if entry.get("layout", "").endswith("transposed") else flat


def _read_width(entry: Mapping[str, Any], place: Place | None, names: Names) -> int | None:
    """Inputs of the parameter in the same block that reads this one's output; None where it is missing."""
    options = [entry["into"]] if isinstance(entry["into"], str) else entry["into"]
    shapes = (names.sibling(place, option) for option in options) if place else ()
    return next((_oriented(entry, shape)[1] for shape in shapes if shape and len(shape) > 1), None)


def _fit_together(patterns: Mapping[str, Sequence[str]], place: Place, names: Names) -> bool:
    """Whether parameters of one block have the shapes that a letter's one meaning in all of them allows."""
    sizes: dict[str, int] = {}
    shapes = [(pattern, names.sibling(place, name)) for name, pattern in patterns.items()]
    # Plain letters of all patterns first, so that multiples can refer to them.
    return all(
        shape is not None and len(shape) == len(pattern) and _bind(pattern, shape, sizes)
        for pattern, shape in shapes
    ) and all(shape is not None and _multiples(pattern, shape, sizes) for pattern, shape in shapes)


def shape_fits(pattern: Sequence[str], shape: tuple[int, ...]) -> bool:
    """Whether a shape fits a pattern of letters (equal letters, equal sizes), multiples (3d), numbers and ``*``."""
    sizes: dict[str, int] = {}
    return len(pattern) == len(shape) and _bind(pattern, shape, sizes) and _multiples(pattern, shape, sizes)


def _bind(pattern: Sequence[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    letters = [(token, size) for token, size in zip(pattern, shape, strict=True) if token.isalpha()]
    return all(sizes.setdefault(token, size) == size for token, size in letters)


def _multiples(pattern: Sequence[str], shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    for token, size in zip(pattern, shape, strict=True):
        number, letter = token.rstrip("abcdefghijklmnopqrstuvwxyz"), token.lstrip("0123456789")
        if number.isdigit() and size != int(number) * (sizes.get(letter, -1) if letter else 1):
            return False
    return True


def cut(found: Meaning, shape: tuple[int, ...], names: Names) -> tuple[tuple[Part, ...], str]:
    """The matrices that a parameter holds, and why it could not be taken apart where it could not."""
    entry = found.entry
    whole = _oriented(entry, shape)
    transposed = {"transposed": True} if entry.get("layout", "").endswith("transposed") else {}
    if "role" in entry:
        cuts, doubt = [Part(entry["role"], whole)], ""
    elif "columns" in entry:
        cuts, doubt = _column_parts(entry, whole, found.place, names)
    else:
        cuts, doubt = _row_parts(entry, whole, found.place, names)
    cuts = cuts or [Part("other", whole)]
    if not entry.get("stacked"):
        return tuple(replace(part, cut=transposed | dict(part.cut)) if transposed else part for part in cuts), doubt
    return tuple(
        replace(part, label=f"[{expert}]{part.label}", cut={**transposed, **part.cut, "expert": expert})
        for expert in range(shape[0])
        for part in cuts
    ), doubt


def _row_parts(
    entry: Mapping[str, Any], whole: tuple[int, int], place: Place | None, names: Names
) -> tuple[list[Part], str]:
    """Fused rows: equal parts, or, with grouped queries, as many queries as the output projection reads."""
    roles, (rows, columns) = entry["rows"], whole
    groups = _groups(entry, rows, columns, names)
    if groups is None:
        return [], "fused rows that are interleaved by head, but config.json gives no number of heads: role other"
    sizes = [rows // len(roles)] * len(roles)
    if "into" in entry:
        width = _read_width(entry, place, names) or 0
        if entry.get("grouped"):
            sizes = [width] + [(rows - width) // (len(roles) - 1)] * (len(roles) - 1)
        elif width != sizes[0]:
            return [], "fused rows whose parts do not fit the matrix that reads them: role other"
    if sum(sizes) != rows or any(size <= 0 or size % groups or sizes[0] % size for size in sizes):
        return [], "fused rows that do not divide into their parts: role other"
    parts, start = [], 0
    for role, size in zip(roles, sizes, strict=True):
        stop = start + size // groups
        cut = {"rows": (start, stop)} | ({"groups": groups} if groups > 1 else {})
        parts.append(Part(role, (size, columns), part_label(role), cut))
        start = stop
    return parts, ""


def _column_parts(
    entry: Mapping[str, Any], whole: tuple[int, int], place: Place | None, names: Names
) -> tuple[list[Part], str]:
    """Two matrices side by side; the first reads what the sibling named by ``reads`` puts out."""
    source = names.sibling(place, entry["reads"]) if place else None
    if source is None or not 0 < source[0] < whole[1]:
        return [], "fused columns that do not divide into their parts: role other"
    return [
        Part(role, (whole[0], stop - start), part_label(role), {"columns": (start, stop)})
        for role, start, stop in zip(entry["columns"], (0, source[0]), (source[0], whole[1]), strict=True)
    ], ""


def _groups(entry: Mapping[str, Any], rows: int, columns: int, names: Names) -> int | None:
    """In how many equal groups fused rows come: 1, a number, one a pair of rows, or what config.json says."""
    groups = entry.get("groups", 1)
    if groups == "pairs":
        return rows // len(entry["rows"])
    if isinstance(groups, int):
        return groups
    found = {
        config[key]
        for config in _configs(names.config, columns)
        for key in [key for key in groups if isinstance(config.get(key), int)][:1]
    }
    return found.pop() if len(found) == 1 and min(found) > 0 else None


_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim")


def _configs(config: Mapping[str, Any], width: int) -> Iterator[Mapping[str, Any]]:
    """The (nested) configurations that do not contradict a parameter's width."""
    stated = next((config[key] for key in _WIDTHS if isinstance(config.get(key), int)), width)
    if stated == width:
        yield config
    for inner in config.values():
        if isinstance(inner, Mapping):
            yield from _configs(inner, width)


def _configured(config: Mapping[str, Any], wanted: Mapping[str, Any], width: int) -> bool:
    """Whether one configuration of that width has every wanted value (or one of several)."""
    return any(
        all(
            c.get(key) in value if isinstance(value, list) else c.get(key) == value for key, value in wanted.items()
        )
        for c in _configs(config, width)
    )


def unusable(name: str, entries: Mapping[str, Entry]) -> str:
    """Why a parameter holds no weights that can be read as a matrix, whatever its family, or an empty string."""
    entry = entries[name]
    leaf = name.rpartition(".")[2]
    if not entry.is_float:
        return f"stored as {entry.dtype}, not as floating-point weights"
    if 0 in entry.shape:
        return "empty"
    if len(entry.shape) < 2 or (len(entry.shape) > 2 and sum(size > 1 for size in entry.shape) < 2):
        return "a vector or scalar (bias, norm), not a matrix"
    if entry.dtype.startswith("float8") and any(f"{name}{suffix}" in entries for suffix in _SCALES):
        return "quantised: float8 with its scales apart; convert it to bfloat16 first"
    if any(leaf.endswith(suffix) for suffix in _SCALES) and _quantised_beside(name, entries):
        return "the scales of a quantised weight"
    if ADAPTER.search(name):
        return "a factor of an adapter that is not merged; merge it, or give the adapter's folder"
    if _FACTOR.search(name):
        return "a factor of a parametrised weight (weight norm); the matrix itself is not stored"
    return ""


_SCALES = ("_scale_inv", "_scale", "scales", "absmax")
ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|hada_w\d_[ab]|lora_magnitude_vector)(\.|$)")
_FACTOR = re.compile(r"(^|\.)(weight_[gv]|parametrizations\.weight\.original\d)$")


def _quantised_beside(name: str, entries: Mapping[str, Entry]) -> bool:
    module = name.rpartition(".")[0]
    return any(
        f"{module}.{leaf}" in entries
        and not entries[f"{module}.{leaf}"].dtype.startswith(("float16", "float32", "bfl"))
        for leaf in ("qweight", "weight", "weight_packed")
    )


def not_a_matrix(name: str, entry: Entry) -> str:
    """Why a parameter that no pattern names is no matrix, or an empty string."""
    axes = len(entry.shape)
    kernel = (
        name.endswith("weight")
        and entry.shape[0] > 1
        and (axes in (4, 5) or (axes == 3 and "conv" in name.lower()))
    )
    if axes > 2 and not kernel:
        return f"{axes}-D and not known to be a convolution: its layout is unknown"
    return ""


def is_matrix_like(entry: Entry) -> bool:
    """Whether a tensor holds floating-point numbers along two or more axes."""
    return entry.is_float and len(entry.shape) >= 2 and 0 not in entry.shape


def part_label(role: str) -> str:
    """What stands behind the name of a parameter for a part of it."""
    return f"[{role.rpartition('.')[2]}]"
