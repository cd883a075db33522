"""Cut: which matrices (out, in) a parameter holds, by its family's entry, its shape and its neighbours."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch

from specbasis.architecture.family import bind, multiples_hold, shape_fits, skeleton_of
from specbasis.architecture.key import MatrixRef
from specbasis.checkpoint import ABSENT, Checkpoint, Entry
from specbasis.checkpoint.names import bare_name


@dataclass(frozen=True)
class Place:
    """A name taken apart: the text before its block, the block's numbers, the text up to it and behind it."""

    container: str
    numbers: tuple[int, ...]
    base: str
    rest: str
    slots: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter: its role, the label behind the parameter's name, and how to cut it out."""

    role: str
    shape: tuple[int, int]
    label: str = ""
    cut: Mapping[str, Any] = field(default_factory=dict)


class Names:
    """A checkpoint's names without wrappers, and the shapes that stand behind them.

    A model of 20 000 tensors has a few hundred skeletons, names with their numbers set to 00, and patterns are
    tried on those alone. Numbers that a pattern spells out (net.2) stay.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.entries = checkpoint.entries
        self.config = checkpoint.config
        self.bare = {name: bare_name(name) for name in checkpoint.entries}
        self._stored = {bare: name for name, bare in self.bare.items()}
        self._first: dict[str, str] = {}
        for name, bare in self.bare.items():
            first = self._first.setdefault(skeleton_of(bare), name)
            if not self.entries[first].shape:  # a scalar, or a tensor that is not in the cache: it tells nothing
                self._first[skeleton_of(bare)] = name

    @property
    def skeletons(self) -> Collection[str]:
        """Every skeleton, in the order of the checkpoint."""
        return self._first.keys()

    def shape(self, skeleton: str) -> tuple[int, ...]:
        """The shape of the first parameter with a skeleton."""
        return self.entries[self._first[skeleton]].shape

    def sibling(self, place: Place, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter in the same block, by its name behind the block; None where it is missing."""
        stored = self._stored.get(f"{place.base}.{name.format(**place.slots)}")
        return None if stored is None else self.entries[stored].shape


def meaning(
    entries: Iterable[Mapping[str, Any]], shape: tuple[int, ...], place: Place | None, names: Names
) -> Mapping[str, Any] | None:
    """What a family's file says of a parameter: the first of the entries with its name that holds, or None."""
    return next((entry for entry in entries if _holds(entry, shape, place, names)), None)


def place_of(bare: str, match: re.Match[str]) -> Place:
    """The place of a name whose block a pattern matches."""
    numbers = [int(text) for key, text in match.groupdict().items() if key.startswith("block_")]
    slots = {key: text for key, text in match.groupdict().items() if not key.startswith("block")}
    end = match.end("block")
    return Place(bare[: match.start()], tuple(numbers), bare[:end], bare[end:], slots)


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
        shape is not None and len(shape) == len(pattern) and bind(pattern, shape, sizes)
        for pattern, shape in shapes
    ) and all(shape is not None and multiples_hold(pattern, shape, sizes) for pattern, shape in shapes)


def cut(
    entry: Mapping[str, Any], shape: tuple[int, ...], place: Place | None, names: Names
) -> tuple[tuple[Part, ...], str]:
    """The matrices that a parameter holds, and why it could not be taken apart where it could not."""
    whole = _oriented(entry, shape)
    transposed = {"transposed": True} if entry.get("layout", "").endswith("transposed") else {}
    if "role" in entry:
        cuts, doubt = [Part(entry["role"], whole)], ""
    elif "columns" in entry:
        cuts, doubt = _column_parts(entry, whole, place, names)
    else:
        cuts, doubt = _row_parts(entry, whole, place, names)
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
        # In interleaved weights each head brings its own query, key and value: the same few rows of every group.
        rows_of_group = {"rows": (start, stop)} | ({"groups": groups} if groups > 1 else {})
        parts.append(Part(role, (size, columns), part_label(role), rows_of_group))
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
    counts = {
        config[key]
        for config in _configs(names.config, columns)
        for key in [key for key in groups if isinstance(config.get(key), int)][:1]
    }
    return counts.pop() if len(counts) == 1 and min(counts) > 0 else None


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
    if entry.dtype == ABSENT:
        return "in a file that is not in the cache, and HF_HUB_OFFLINE is set"
    if not entry.is_float:
        return f"stored as {entry.dtype}, not as floating-point weights"
    if 0 in entry.shape:
        return "empty"
    if len(entry.shape) < 2 or (len(entry.shape) > 2 and sum(size > 1 for size in entry.shape) < 2):
        return "a vector or scalar (bias, norm), not a matrix"
    if any(leaf.endswith(suffix) for suffix in _SCALES) and _quantised_beside(name, entries):
        return "the scales of a quantised weight"
    if ADAPTER.search(name):
        return "a factor of an adapter that is not merged; merge it, or give the adapter's folder"
    if _FACTOR.search(name):
        return "a factor of a parametrised weight (weight norm); the matrix itself is not stored"
    return ""


_SCALES = ("_scale_inv", "_scale", "scales", "absmax")
ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector"  # PEFT
    r"|lora_(down|up|mid)|dora_scale|lok[rt]_\w+|hada_[wt]\d(_[ab])?|oft_(blocks|diag)"  # kohya, LyCORIS
    r"|(\w+_lora|lora_linear_layer)\.(down|up))(\.|$)"  # diffusers, before it took PEFT's names
)
_FACTOR = re.compile(r"(^|\.)(weight_[gv]|parametrizations\.weight\.original\d)$")


def _quantised_beside(name: str, entries: Mapping[str, Entry]) -> bool:
    module = name.rpartition(".")[0]
    return any(
        f"{module}.{leaf}" in entries
        and not entries[f"{module}.{leaf}"].dtype.startswith(("float16", "float32", "bfl"))
        for leaf in ("qweight", "weight", "weight_packed")
    )


def layout_of(name: str, entries: Mapping[str, Entry]) -> str:
    """How the axes of a parameter are to be read: "in_out" of a matrix (in, out) and of a kernel whose last axis is
    out, "conv" of a kernel whose first axis is out; empty where a matrix is (out, in), or nothing tells.

    By what the file or the user says; by the names of Keras and Flax (kernel) and of Chainer (W); of four and more
    axes by the vector in the same module, a bias, that has one number for each output.
    """
    entry, axes = entries[name], len(entries[name].shape)
    module, _, leaf = name.replace("/", ".").rpartition(".")
    if entry.layout or axes < 2:
        return entry.layout
    if leaf in ("kernel", "kernel:0") and (axes != 3 or "conv" in name.lower()):
        return "in_out"
    if axes < 4:
        return ""
    beside = (f"{name[: len(module)]}{name[len(module) : len(module) + 1]}{bias}" for bias in ("bias", "b", "beta"))
    ends = {entries[n].shape[0] for n in beside if n in entries and len(entries[n].shape) == 1}
    layouts = {"conv": entry.shape[0] in ends, "in_out": entry.shape[-1] in ends}
    if sum(layouts.values()) == 1:
        return max(layouts, key=lambda layout: layouts[layout])
    return "conv" if leaf in ("weight", "W") and entry.shape[0] > 1 else ""


def laid_out(checkpoint: Checkpoint, layouts: Mapping[str, str]) -> Checkpoint:
    """The same checkpoint with what a user says of layouts: pattern of names → "conv" or "in_out"."""

    def of(name: str, entry: Entry) -> Entry:
        wanted = [layout for pattern, layout in layouts.items() if fnmatchcase(name, pattern)]
        return replace(entry, layout=wanted[-1]) if wanted else entry

    return replace(checkpoint, entries={name: of(name, entry) for name, entry in checkpoint.entries.items()})


def not_a_matrix(name: str, entry: Entry, layout: str) -> str:
    """Why a parameter that no pattern names is no matrix, or an empty string."""
    axes = len(entry.shape)
    named = axes == 3 and "conv" in name.lower() and name.endswith("weight") and entry.shape[0] > 1
    kernel = named or bool(layout)
    if axes > 2 and not kernel:
        return f"{axes}-D and not known to be a convolution: its layout is unknown; --layout says it"
    return ""


def unnamed_part(shape: tuple[int, ...], layout: str) -> Part:
    """What no pattern names: a kernel by its axes, else other; (out, in) whatever it is stored as."""
    role = "conv" if len(shape) > 2 else "other"
    if layout == "in_out":
        return Part(role, (shape[-1], prod(shape[:-1])), cut={"transposed": True, "kernel": len(shape) > 2})
    return Part(role, (shape[0], prod(shape[1:])))


def is_matrix_like(entry: Entry) -> bool:
    """Whether a tensor holds floating-point numbers along two or more axes."""
    return entry.is_float and len(entry.shape) >= 2 and 0 not in entry.shape


def matrix_size(name: str, entries: Mapping[str, Entry]) -> int:
    """How many weights a parameter holds that may be a matrix, whatever they are stored as; 0 for what is none."""
    entry, none = entries[name], ("a vector", "empty", "the scales")
    counts = len(entry.shape) >= 2 and entry.dtype not in ("int64", "bool")
    return prod(entry.shape) if counts and not unusable(name, entries).startswith(none) else 0


def part_label(role: str) -> str:
    """What stands behind the name of a parameter for a part of it."""
    return f"[{role.rpartition('.')[2]}]"


# --- tied weights -----------------------------------------------------------------------------------------------


def may_be_tied(ref: MatrixRef) -> bool:
    """Whether a matrix is an embedding or a head."""
    return ref.key.role in ("embedding", "head")


def shared_values(matrices: Iterable[MatrixRef], checkpoint: Checkpoint) -> dict[MatrixRef, str]:
    """Embeddings and heads that repeat the values of an earlier one → the parameter that they repeat.

    Nothing is read where config.json says that embeddings are not tied.
    """
    nested = (inner for inner in checkpoint.config.values() if isinstance(inner, Mapping))
    if any(config.get("tie_word_embeddings") is False for config in (checkpoint.config, *nested)):
        return {}
    first: dict[tuple[int, int], list[MatrixRef]] = defaultdict(list)
    shared: dict[MatrixRef, str] = {}
    for ref in matrices:
        if not may_be_tied(ref) or len(checkpoint.entries[ref.parameter].shape) != 2:
            continue
        twin = next((t for t in first[ref.shape] if equal_values(checkpoint, ref.parameter, t.parameter)), None)
        if twin is not None:
            shared[ref] = twin.parameter
        else:
            first[ref.shape].append(ref)
    return shared


def equal_values(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two parameters hold the same numbers, not all zero."""
    A, B = checkpoint[a], checkpoint[b]
    return A.shape == B.shape and A.dtype == B.dtype and torch.equal(A, B) and bool(A.any())
