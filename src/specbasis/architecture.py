"""What a parameter means: its block, its role, and how to read it as matrices (out, in).

Families are data: one file each in `architectures/`, read by `families()`. Fused, transposed and convolutional
layouts end here; everything above sees (out, in) matrices.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import takewhile
from typing import Any

from torch import Tensor

from specbasis.checkpoint import Checkpoint, Entry
from specbasis.errors import InputError

ROLES = (
    *(f"attention.{part}" for part in ("query", "key", "value", "output")),
    *(f"cross_attention.{part}" for part in ("query", "key", "value", "output")),
    "ffn.up", "ffn.gate", "ffn.down",
    "conv", "embedding", "head", "other",
)  # fmt: skip
"""The closed vocabulary of roles, in the order in which tables and figures show them."""


@dataclass(frozen=True)
class MatrixKey:
    """Where a matrix stands in its model.

    Attributes:
        block: number of its block, from 0, or None outside of the blocks.
        role: one of `ROLES`.
        name: unique in the model: the parameter's name, with [part] behind it where the parameter is fused.
        stack: "encoder", "decoder", … in models that have several, else empty.
    """

    block: int | None
    role: str
    name: str
    stack: str = ""


@dataclass(frozen=True)
class MatrixRef:
    """A matrix inside a checkpoint: the parameter that holds it and how to take it out.

    Attributes:
        key: where it stands in the model.
        parameter: the name under which the checkpoint stores it.
        shape: (out, in) of the matrix.
        transposed: the parameter is stored (in, out).
        rows: the rows [start, stop) of the (out, in) parameter that belong to this matrix; None for all.
    """

    key: MatrixKey
    parameter: str
    shape: tuple[int, int]
    transposed: bool = False
    rows: tuple[int, int] | None = None

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The matrix (out, in), a view of the stored tensor. Kernels are flattened to out × (in·kh·kw)."""
        W = checkpoint[self.parameter]
        W = W.mT if self.transposed else W.reshape(W.shape[0], -1)
        return W if self.rows is None else W[slice(*self.rows)]


@dataclass(frozen=True)
class Skipped:
    """A parameter, or a part of one, that is not compared, and why.

    Attributes:
        name: the parameter's name.
        side: "base", "tuned" or "both".
        reason: in words for a person.
    """

    name: str
    side: str
    reason: str


@dataclass(frozen=True)
class Family:
    """One architecture, as its file in `architectures/` declares it.

    Attributes:
        name: the file's name without its ending.
        title: in words for a person.
        recognised_by: patterns that must all occur among a model's names.
        stacks: path components that tell one stack of blocks from another.
        matrices: the [[matrix]] entries, first match wins.
    """

    name: str
    title: str
    recognised_by: tuple[str, ...]
    stacks: tuple[str, ...]
    matrices: tuple[Mapping[str, Any], ...]


STRUCTURAL = Family(
    "structural", "unknown architecture: every matrix by its shape, role other, block from its name", (), (), ()
)
"""What is used when no family recognises a model; it guesses no roles."""


@dataclass(frozen=True)
class ModelMap:
    """Every parameter of a model: as matrices, or skipped with the reason.

    Attributes:
        family: the architecture that was recognised, or `STRUCTURAL`.
        matrices: in the checkpoint's order.
        skipped: everything else.
    """

    family: Family
    matrices: tuple[MatrixRef, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class MatrixPair:
    """One matrix in both checkpoints."""

    key: MatrixKey
    base: MatrixRef
    tuned: MatrixRef


@dataclass(frozen=True)
class Pairing:
    """What two checkpoints have in common.

    Attributes:
        family: architecture of base.
        matched: matrices found in both with equal shape (or cut to common rows, on request).
        skipped: everything else on either side, with the reason.
        notes: prefixes that were aligned, rows that were cut.
    """

    family: Family
    matched: tuple[MatrixPair, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


@cache
def families() -> tuple[Family, ...]:
    """Every architecture file, in the order of file names.

    Raises:
        InputError: a file names a role that is not in `ROLES`.
    """
    return tuple(
        _family(file.name.removesuffix(".toml"), file.read_text(encoding="utf-8"))
        for file in sorted(files("specbasis").joinpath("architectures").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    )


def recognise(names: Iterable[str]) -> Family:
    """The family whose recognising patterns all occur and that names the most parameters, else `STRUCTURAL`."""
    names = [_bare(name) for name in names]
    counts = {
        family: sum(_match(family, name) is not None for name in names)
        for family in families()
        if all(any(_regex(pattern).search(name) for name in names) for pattern in family.recognised_by)
    }
    return max(counts, key=lambda family: counts[family], default=STRUCTURAL)


def model_map(checkpoint: Checkpoint) -> ModelMap:
    """Every matrix of a checkpoint with its block and role; every other parameter with the reason.

    In a known family, a matrix that its file does not name gets the role ``other``.
    """
    family = recognise(checkpoint)
    matrices: list[MatrixRef] = []
    skipped: list[Skipped] = []
    for name, entry in checkpoint.entries.items():
        reason = _not_a_matrix(name, entry)
        if reason:
            skipped.append(Skipped(name, "both", reason))
        else:
            matrices += _matrices(family, name, entry)
    return ModelMap(family, tuple(matrices), tuple(skipped))


def pair(base: Checkpoint, tuned: Checkpoint, *, common_rows: bool = False) -> Pairing:
    """Match the matrices of two checkpoints by name.

    Wrapper components (``module``, ``_orig_mod`` …) are dropped, and one leading prefix on either side is aligned
    where that makes more names and shapes agree (``bert.encoder…`` with ``encoder…``).

    Args:
        base: the pretrained checkpoint; its architecture gives block and role.
        tuned: the finetuned checkpoint.
        common_rows: compare the first rows that both have where only the number of rows differs (a vocabulary that
            grew), instead of skipping the matrix.

    Raises:
        InputError: no name in common, or two alignments of prefixes fit equally well.
    """
    drop_base, drop_tuned = _align(base, tuned)
    theirs = {_strip(name, drop_tuned): name for name in tuned}
    model = model_map(base)
    matched: list[MatrixPair] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    if drop_base or drop_tuned:
        notes.append(f"names aligned: base without {drop_base!r}, tuned without {drop_tuned!r}")

    for ref in model.matrices:
        other = theirs.get(_strip(ref.parameter, drop_base))
        if other is None:
            skipped.append(Skipped(ref.key.name, "base", "not in tuned"))
            continue
        shape, their_shape = base.entries[ref.parameter].shape, tuned.entries[other].shape
        partner = replace(ref, parameter=other)
        if not tuned.entries[other].is_float:
            skipped.append(Skipped(ref.key.name, "both", f"tuned stores {tuned.entries[other].dtype}, not a float"))
        elif shape == their_shape:
            matched.append(MatrixPair(ref.key, ref, partner))
        elif common_rows and shape[1:] == their_shape[1:] and ref.rows is None and not ref.transposed:
            rows = (0, min(shape[0], their_shape[0]))
            cut = (rows[1], ref.shape[1])
            matched.append(
                MatrixPair(ref.key, replace(ref, rows=rows, shape=cut), replace(partner, rows=rows, shape=cut))
            )
            notes.append(f"{ref.key.name}: first {rows[1]} rows of {shape[0]} (base) and {their_shape[0]} (tuned)")
        else:
            hint = "; --common-rows compares the rows that both have" if shape[1:] == their_shape[1:] else ""
            skipped.append(Skipped(ref.key.name, "both", f"shape {shape} in base, {their_shape} in tuned{hint}"))
    ours = {_strip(name, drop_base) for name in base}
    skipped += [
        replace(item, side="both" if _strip(item.name, drop_base) in theirs else "base") for item in model.skipped
    ]
    skipped += [
        Skipped(name, "tuned", _not_a_matrix(name, tuned.entries[name]) or "not in base")
        for bare, name in theirs.items()
        if bare not in ours
    ]
    return Pairing(model.family, tuple(matched), tuple(skipped), tuple(notes))


# --- one parameter ----------------------------------------------------------------------------------------------


def _not_a_matrix(name: str, entry: Entry) -> str:
    """Why a parameter is no matrix, or an empty string."""
    if not entry.is_float:
        return f"stored as {entry.dtype}, not as floating-point weights"
    if 0 in entry.shape:
        return "empty"
    if len(entry.shape) < 2:
        return "a vector or scalar (bias, norm), not a matrix"
    if len(entry.shape) == 3 and "conv" not in name.lower():
        return "3-D and not known to be a convolution: its layout is unknown"
    return ""


def _matrices(family: Family, name: str, entry: Entry) -> list[MatrixRef]:
    """The matrices that one parameter holds, by the family's file."""
    columns = 1
    for size in entry.shape[1:]:
        columns *= size
    shape = (entry.shape[0], columns)
    found = _match(family, _bare(name))
    if found is None:
        block, stack = _block_from_name(name) if family is STRUCTURAL else (None, "")
        role = "conv" if len(shape) < len(entry.shape) else "other"
        return [MatrixRef(MatrixKey(block, role, name, stack), name, shape)]
    matrix, block = found
    stack = next((part for part in name.split(".") if part in family.stacks), "")
    transposed = matrix.get("layout") == "transposed"
    if transposed:
        shape = (shape[1], shape[0])
    if "role" in matrix:
        return [MatrixRef(MatrixKey(block, matrix["role"], name, stack), name, shape, transposed)]
    roles = matrix["rows"]
    height = shape[0] // len(roles)
    if height * len(roles) != shape[0]:
        return [MatrixRef(MatrixKey(block, "other", name, stack), name, shape, transposed)]
    return [
        MatrixRef(
            MatrixKey(block, role, f"{name}[{role.rpartition('.')[2]}]", stack),
            name,
            (height, shape[1]),
            transposed,
            (i * height, (i + 1) * height),
        )
        for i, role in enumerate(roles)
    ]


def _match(family: Family, name: str) -> tuple[Mapping[str, Any], int | None] | None:
    for matrix in family.matrices:
        found = _regex(matrix["name"]).search(name)
        if found:
            block = found.groupdict().get("block")
            return matrix, None if block is None else int(block)
    return None


def _block_from_name(name: str) -> tuple[int | None, str]:
    """The first number among a name's components, and what stands before it."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (None, "") if at is None else (int(parts[at]), ".".join(parts[:at]))


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """A name pattern as a regular expression that matches the end of a name, from the start of a component.

    ``{block}`` is a number, ``*`` anything inside a component, ``**`` anything.
    """
    text = (
        re.escape(pattern).replace(r"\{block\}", r"(?P<block>\d+)").replace(r"\*\*", ".*").replace(r"\*", "[^.]*")
    )
    return re.compile(rf"(?:^|\.){text}$")


def _family(name: str, text: str) -> Family:
    data = tomllib.loads(text)
    for matrix in data["matrix"]:
        for role in matrix.get("rows", [matrix.get("role")]):
            if role not in ROLES:
                raise InputError(f"architectures/{name}.toml: role {role!r} of {matrix['name']!r} is not in ROLES")
    return Family(
        name,
        data["title"],
        tuple(data["recognised_by"]),
        tuple(data.get("stacks", ())),
        tuple(_Frozen(matrix) for matrix in data["matrix"]),
    )


class _Frozen(dict[str, Any]):
    """A [[matrix]] entry that can be hashed with its family."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self["name"])


# --- names of two checkpoints -----------------------------------------------------------------------------------

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _bare(name: str) -> str:
    """A name without the components that compilers and distributed wrappers insert."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def _strip(name: str, prefix: str) -> str:
    return _bare(name).removeprefix(prefix)


def _prefixes(names: Iterable[str]) -> list[str]:
    """Leading dotted prefixes, up to three components deep and without numbers, and the empty one."""
    found = {""}
    for name in names:
        parts = list(takewhile(lambda part: not part.isdigit(), name.split(".")[:-1]))
        found |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts) + 1))}
    return sorted(found)


def _align(base: Checkpoint, tuned: Checkpoint) -> tuple[str, str]:
    """The prefixes to drop from base's and tuned's names so that the most names and shapes agree.

    The shortest such prefixes win. Two equally short ones that agree equally often are ambiguous, and refused:
    a decoder must never be compared with an encoder.
    """
    ours = {_bare(name): entry.shape for name, entry in base.entries.items()}
    theirs = {_bare(name): entry.shape for name, entry in tuned.entries.items()}
    agreeing = Counter[tuple[str, str]]()
    for mine in _prefixes(ours):
        shapes = {name.removeprefix(mine): shape for name, shape in ours.items()}
        for other in _prefixes(theirs):
            if bool(mine) and mine == other:
                continue
            agreeing[mine, other] = sum(
                shapes.get(name.removeprefix(other)) == shape for name, shape in theirs.items()
            )
    best = max(agreeing.values())
    if best == 0:
        raise InputError(
            f"{base.source} and {tuned.source}: no parameter in common by name and shape "
            f"(e.g. {next(iter(ours))!r} and {next(iter(theirs))!r}); want two checkpoints of one architecture"
        )
    ranked = sorted((len(a) + len(b), a, b) for (a, b), count in agreeing.items() if count == best)
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        raise InputError(
            f"{base.source} and {tuned.source}: names can be aligned in several ways "
            f"({ranked[0][1:]} or {ranked[1][1:]} dropped); rename one side"
        )
    return ranked[0][1], ranked[0][2]
