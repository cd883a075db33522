"""What a parameter means: its block, its role, and how to read it as matrices (out, in).

Families are data: one file each in `architectures/`, read by `families()`. Fused, interleaved, stacked, transposed
and convolutional layouts end here; everything above sees (out, in) matrices.

A checkpoint may hold several stacks of blocks (an encoder and a decoder, a vision and a text tower), each claimed
by the family whose recognising names all occur in it. A claim needs that evidence; a matrix that no pattern of its
family names, or whose shape contradicts the pattern, gets the role ``other``, and a note says so.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint import Checkpoint, Entry
from specbasis.errors import InputError

ROLES = (
    *(f"attention.{part}" for part in ("query", "key", "value", "output")),
    *(f"cross_attention.{part}" for part in ("query", "key", "value", "output")),
    "ffn.up", "ffn.gate", "ffn.down",
    "conv", "embedding", "head", "other",
)  # fmt: skip
"""The closed vocabulary of roles, in the order in which tables and figures show them.

In a gated feed-forward layer ``down(act(gate(x)) * up(x))`` the gate is the branch that passes the activation.
"""


@dataclass(frozen=True)
class MatrixKey:
    """Where a matrix stands in its model.

    Attributes:
        block: number of its block, from 0 and counted on over stages, or None outside of the blocks.
        role: one of `ROLES`.
        name: unique in the model: the parameter's name, with [expert] and [part] behind it where it holds several.
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
        groups: the rows come in this many equal groups (one a head, in fused weights that are interleaved), and
            `rows` counts inside each.
        columns: the columns [start, stop) that belong to this matrix; None for all.
        expert: which matrix of a stack along the first axis; None where the parameter is no stack.
    """

    key: MatrixKey
    parameter: str
    shape: tuple[int, int]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    groups: int = 1
    columns: tuple[int, int] | None = None
    expert: int | None = None

    def read(self, checkpoint: Mapping[str, Tensor]) -> Tensor:
        """The matrix (out, in). Kernels are flattened to out × (in·kh·kw).

        A view of the stored tensor, except where it is gathered from several groups of rows.
        """
        return self._part(checkpoint[self.parameter]).flatten(0, -2)

    def delta_factors(self, checkpoint: Checkpoint) -> tuple[Tensor, Tensor] | None:
        """Factors (B, A) of a low-rank update of this matrix, (out, r) and (r, in); None where there is none.

        They are those that `Checkpoint.delta_factors` gives for the whole parameter, cut as `read` cuts it.
        """
        factors = checkpoint.delta_factors(self.parameter) if self.expert is None else None
        if factors is None:
            return None
        B, A = (factors[1].mT, factors[0].mT) if self.transposed else factors
        A = A if self.columns is None else A[:, slice(*self.columns)]
        B = B if self.groups == 1 else B.reshape(self.groups, -1, B.shape[1])
        B = B if self.rows is None else B[..., slice(*self.rows), :]
        return B.flatten(0, -2), A

    def write(self, stored: Tensor, W: Tensor) -> None:
        """Put a matrix (out, in) into its place in the parameter's tensor, in place: the inverse of `read`.

        Raises:
            InputError: `W` has another shape than the matrix, or `stored` cannot be written through a view.
        """
        if tuple(W.shape) != self.shape:
            raise InputError(f"{self.key.name}: got a matrix of shape {tuple(W.shape)}, want {self.shape}")
        if not stored.is_contiguous():
            raise InputError(
                f"{self.key.name}: the stored tensor is not contiguous; call .contiguous() on it first"
            )
        part = self._part(stored)
        part.copy_(W.reshape(part.shape))

    def _part(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor as (out, in), or as (groups, out / groups, in)."""
        W = stored if self.expert is None else stored[self.expert]
        W = W.flatten(1)
        W = W.mT if self.transposed else W
        W = W if self.columns is None else W[:, slice(*self.columns)]
        W = W if self.groups == 1 else W.view(self.groups, -1, W.shape[1])
        return W if self.rows is None else W[..., slice(*self.rows), :]


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
    """One architecture, as its file in `architectures/` declares it (docs/adding-a-family.md has every key).

    Attributes:
        name: the file's name without its ending.
        title: in words for a person.
        recognised_by: patterns that must all occur in one stack of blocks, with equal text before the block.
        beside: patterns that must all occur anywhere in the model.
        unless: patterns none of which may occur in that stack: they mark a look-alike.
        stacks: path components that name a stack of blocks.
        blocks: what ``{block}`` stands for, in order of preference.
        repeated: a key of config.json with the number of times that the stored blocks are run through.
        matrices: the `matrix` entries, and behind them those of the family it is `like`; first match wins.
    """

    name: str
    title: str
    recognised_by: tuple[Mapping[str, Any], ...]
    stacks: tuple[str, ...]
    matrices: tuple[Mapping[str, Any], ...]
    beside: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ("{layer}",)
    repeated: str = ""


STRUCTURAL = Family(
    "structural", "unknown architecture: every matrix by its shape, role other, block from its name", (), (), ()
)
"""What is used when no family recognises a model; it guesses no roles."""


@dataclass(frozen=True)
class ModelMap:
    """Every parameter of a model: as matrices, or skipped with the reason.

    Attributes:
        family: the architecture that names most of the matrices, or `STRUCTURAL`.
        matrices: in the checkpoint's order.
        skipped: everything else.
        towers: container of each recognised stack of blocks (``model.layers``) → the family that claims it.
        unnamed: names of the matrices that no pattern names; their role is ``other`` (or ``conv``, by shape).
        shared: matrices left out because they repeat another parameter's values (tied weights) → that parameter.
        notes: what a person should know before trusting the roles, a sentence each.
    """

    family: Family
    matrices: tuple[MatrixRef, ...]
    skipped: tuple[Skipped, ...]
    towers: Mapping[str, Family] = field(default_factory=dict)
    unnamed: tuple[str, ...] = ()
    shared: Mapping[MatrixRef, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """How many of a model's matrix parameters (entries of float tensors with two or more axes) have which role.

    Attributes:
        total: matrix parameters in the checkpoint, tied ones once.
        by_role: role → parameters, in the order of `ROLES`; roles that do not occur are left out.
        unnamed: parameters of the matrices that no pattern names, part of the roles ``other`` and ``conv``.
        skipped: parameters of tables and of tensors whose layout is unknown.
        fell_to_other: names of the unnamed matrices.
    """

    total: int
    by_role: Mapping[str, int]
    unnamed: int
    skipped: int
    fell_to_other: tuple[str, ...]

    @property
    def named(self) -> float:
        """Share of the matrix parameters with a role other than ``other``, from 0 to 1; 0 of an empty model."""
        return sum(n for role, n in self.by_role.items() if role != "other") / self.total if self.total else 0.0


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
        notes: prefixes that were aligned, rows that were cut, and what `ModelMap.notes` says of base.
    """

    family: Family
    matched: tuple[MatrixPair, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


@cache
def families() -> tuple[Family, ...]:
    """Every architecture file, in the order of file names; `common.toml` holds the names that all of them share.

    Raises:
        InputError: a file names a role that is not in `ROLES`, or a key that the format does not have.
    """
    folder = files("specbasis").joinpath("architectures")
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return tuple(_family(name, _text(name)) for name in names)


def recognise(checkpoint: Checkpoint) -> Family:
    """The family that names most of a checkpoint's matrices, or `STRUCTURAL` where no family claims any."""
    return model_map(checkpoint).family


def model_map(checkpoint: Checkpoint) -> ModelMap:
    """Every matrix of a checkpoint with its block and role; every other parameter with the reason.

    In a known family, a matrix that its file does not name gets the role ``other``. Only headers are read, except
    where an embedding and a head have equal shape and config.json does not say whether they are tied.
    """
    names = _Names(checkpoint)
    towers = _claims(names)
    rules = {skeleton: _rule(skeleton, towers) for skeleton in names.examples}
    drafts: list[_Draft] = []
    skipped: list[Skipped] = []
    doubts = Counter[str]()
    for name, entry in checkpoint.entries.items():
        reason = _unusable(name, checkpoint.entries)
        tower, rule = rules[names.skeleton[name]]
        found = None if reason or rule is None else _meaning(name, tower, rule, names)
        reason = reason or (found.entry.get("skip", "") if found else _not_a_matrix(name, entry))
        if reason:
            skipped.append(Skipped(name, "both", reason))
        elif found is None:
            drafts.append(_unnamed(name, entry, tower, towers, names))
        else:
            parts, doubt = _parts(found, entry.shape, names)
            drafts.append(_Draft(name, tower, found.place, parts, named=not doubt))
            doubts.update([doubt] if doubt else [])
    matrices = _numbered(drafts, names, towers)
    shared = _shared(matrices, checkpoint)
    skipped += [
        Skipped(ref.key.name, "both", f"holds the values of {twin} (tied weights): counted once")
        for ref, twin in shared.items()
    ]
    unnamed = tuple(draft.name for draft in drafts if not draft.named)
    mapped = ModelMap(
        _main(towers, drafts),
        tuple(ref for ref in matrices if ref not in shared),
        tuple(skipped),
        towers,
        unnamed,
        shared,
        tuple(f"{n} parameters: {text}" for text, n in doubts.items()),
    )
    return replace(mapped, notes=(*mapped.notes, *_remarks(mapped, checkpoint)))


def coverage(mapped: ModelMap, checkpoint: Checkpoint) -> Coverage:
    """How many of a checkpoint's matrix parameters have a named role, and what fell to ``other``.

    Reads headers only.
    """
    sizes = Counter[str]()
    for ref in mapped.matrices:
        sizes[ref.key.role] += prod(ref.shape)
    unnamed = set(mapped.unnamed)
    tables = {
        item.name
        for item in mapped.skipped
        if item.name in checkpoint.entries and _is_matrix_like(checkpoint.entries[item.name])
    } - {ref.parameter for ref in mapped.shared}
    skipped = sum(prod(checkpoint.entries[name].shape) for name in tables)
    return Coverage(
        sizes.total() + skipped,
        {role: sizes[role] for role in ROLES if sizes[role]},
        sum(prod(ref.shape) for ref in mapped.matrices if ref.parameter in unnamed),
        skipped,
        mapped.unnamed,
    )


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
    untied = _untied(model.shared, tuned, theirs, drop_base)
    matched: list[MatrixPair] = []
    skipped: list[Skipped] = []
    notes: list[str] = list(model.notes)
    if drop_base or drop_tuned:
        notes.append(f"names aligned: base without {drop_base!r}, tuned without {drop_tuned!r}")

    for ref in (*model.matrices, *untied):
        other = theirs.get(_strip(ref.parameter, drop_base))
        if other is None:
            skipped.append(Skipped(ref.key.name, "base", "not in tuned"))
            continue
        shape, their_shape = base.entries[ref.parameter].shape, tuned.entries[other].shape
        partner = replace(ref, parameter=other)
        whole = ref.rows is None and ref.columns is None and ref.expert is None and not ref.transposed
        if unusable := _unusable(other, tuned.entries):
            skipped.append(Skipped(ref.key.name, "both", f"in tuned: {unusable}"))
        elif shape == their_shape:
            matched.append(MatrixPair(ref.key, ref, partner))
        elif common_rows and shape[1:] == their_shape[1:] and whole:
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
        replace(item, side="both" if _strip(item.name, drop_base) in theirs else "base")
        for item in model.skipped
        if item.name not in {ref.key.name for ref in untied}
    ]
    skipped += [
        Skipped(name, "tuned", _unusable(name, tuned.entries) or "not in base")
        for bare, name in theirs.items()
        if bare not in ours
    ]
    return Pairing(model.family, tuple(matched), tuple(skipped), tuple(notes))


# --- which family claims which stack of blocks ------------------------------------------------------------------


class _Names:
    """A checkpoint's names without wrappers, grouped by skeleton: the name with its numbers set to 00.

    A model of 20 000 tensors has a few hundred skeletons, and patterns are tried on those alone. Numbers that a
    pattern spells out (net.2) stay.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.entries = checkpoint.entries
        self.config = checkpoint.config
        self.bare = {name: _bare(name) for name in checkpoint.entries}
        self.stored = {bare: name for name, bare in self.bare.items()}
        self.skeleton = {name: _skeleton(bare) for name, bare in self.bare.items()}
        self.examples: dict[str, tuple[int, ...]] = {}
        for name, skeleton in self.skeleton.items():
            self.examples.setdefault(skeleton, checkpoint.entries[name].shape)

    def sibling(self, place: _Place, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter in the same block, by its name behind the block; None where it is missing."""
        stored = self.stored.get(f"{place.base}.{name.format(**place.slots)}")
        return None if stored is None else self.entries[stored].shape


@dataclass(frozen=True)
class _Rule:
    """The [[matrix]] entries with a pattern that matches a skeleton, and the expression that finds its block."""

    entries: tuple[Mapping[str, Any], ...]
    regex: re.Pattern[str]


@dataclass(frozen=True)
class _Place:
    """A name taken apart: the text before its block, the block's numbers, the text up to it, other numbers."""

    container: str
    numbers: tuple[int, ...]
    base: str
    slots: Mapping[str, str]


@dataclass(frozen=True)
class _Found:
    """What a parameter is: the [[matrix]] entry that holds for it, and its place where it lies in a block."""

    entry: Mapping[str, Any]
    place: _Place | None


@dataclass(frozen=True)
class _Part:
    """One matrix of a parameter before its block is numbered: role, label behind the name, and how to cut it."""

    role: str
    shape: tuple[int, int]
    label: str = ""
    cut: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Draft:
    """A parameter's matrices before blocks are numbered and stacks are labelled."""

    name: str
    tower: str | None
    place: _Place | None
    parts: tuple[_Part, ...]
    named: bool


_NUMBER = re.compile(r"(\w*\.|^)(\d+)(?=\.|$)")


def _skeleton(name: str) -> str:
    literal = _literal_numbers()
    return _NUMBER.sub(lambda found: found[0] if found[0] in literal else f"{found[1]}00", name)


@cache
def _literal_numbers() -> frozenset[str]:
    """Every number that a pattern spells out, with the component before it: ``net.2``."""
    texts = (text for family in families() for text in _patterns(family))
    return frozenset(found[0] for text in texts for found in _NUMBER.finditer(text))


def _patterns(family: Family) -> Iterator[str]:
    yield from (anchor["name"] for anchor in family.recognised_by)
    yield from (entry["name"] for entry in family.matrices)
    yield from (*family.beside, *family.unless)


def _claims(names: _Names) -> dict[str, Family]:
    """Container (as a skeleton) of every recognised stack of blocks → the family that claims it, in file order.

    A family claims a container where all its recognising patterns occur with equal text before the block and none
    of its `unless` patterns does. Of several, the one that names most skeletons there wins, then the one with more
    evidence. Of two containers one inside the other, the one with more named skeletons stays.
    """
    skeletons = tuple(names.examples)
    best: dict[str, tuple[tuple[int, int, str], Family]] = {}
    for family in families():
        if not family.recognised_by or not _occur(family.beside, skeletons):
            continue
        anchored = [set(_containers(family, anchor, names.examples)) for anchor in family.recognised_by]
        look_alikes = {c for p in family.unless for c in _containers(family, {"name": p}, names.examples)}
        for container in set.intersection(*anchored) - look_alikes:
            named = sum(_inside(s, container) and _block_rule(s, container, family) is not None for s in skeletons)
            rank = (named, len(family.recognised_by) + len(family.beside), family.name)
            if container not in best or rank > best[container][0]:
                best[container] = (rank, family)
    claimed: dict[str, Family] = {}
    for container in sorted(best, key=lambda c: (-best[c][0][0], c)):
        if not any(_inside(container, other) or _inside(other, container) for other in claimed):
            claimed[container] = best[container][1]
    return {
        c: claimed[c]
        for c in sorted(claimed, key=lambda c: next(i for i, s in enumerate(skeletons) if _inside(s, c)))
    }


def _occur(patterns: Iterable[str], skeletons: Iterable[str]) -> bool:
    return all(any(_regex(pattern).search(skeleton) for skeleton in skeletons) for pattern in patterns)


def _containers(
    family: Family, anchor: Mapping[str, Any], examples: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """The text before the block in every skeleton that an anchor matches, by name and, where given, by shape."""
    for skeleton, shape in examples.items():
        if "shape" in anchor and not _fits(anchor["shape"], shape):
            continue
        for form in family.blocks:
            found = _regex(anchor["name"], form).search(skeleton)
            if found:
                yield skeleton[: found.start()]
                break


def _inside(name: str, container: str) -> bool:
    """Whether a name, or a container, lies in a container."""
    return not container or name == container or name.startswith(container + ".")


def _block_rule(skeleton: str, container: str, family: Family) -> _Rule | None:
    """The first entry of a family that matches a skeleton with its block right behind the container."""
    for form in family.blocks:
        for entry in family.matrices:
            if "{block}" in entry["name"]:
                regex = _regex(entry["name"], form)
                found = regex.search(skeleton)
                if found and skeleton[: found.start()] == container:
                    return _rule_of(entry, family, form)
    return None


def _rule_of(entry: Mapping[str, Any], family: Family, form: str = "{layer}") -> _Rule:
    alternatives = tuple(other for other in family.matrices if other["name"] == entry["name"])
    return _Rule(alternatives, _regex(entry["name"], form))


def _rule(skeleton: str, towers: Mapping[str, Family]) -> tuple[str | None, _Rule | None]:
    """The tower whose blocks hold a skeleton, and the entry that names it.

    Inside a block only the family that claims it gives a role, and what all families share may mark a table;
    outside of the blocks the family of the nearest tower comes first.
    """
    for container, family in towers.items():
        if _inside(skeleton, container) and (rule := _block_rule(skeleton, container, family)):
            return container, rule
    tower = next((c for c, family in towers.items() if _in_block(skeleton, c, family)), None)
    near = [tower] if tower is not None else sorted(towers, key=lambda c: -_common_components(c, skeleton))
    for family in dict.fromkeys((*(towers[c] for c in near), _family_named("common"))):
        for entry in family.matrices:
            only_tables = not towers or (tower is not None and family.name == "common")
            if "{block}" in entry["name"] or (only_tables and "skip" not in entry):
                continue
            if _regex(entry["name"]).search(skeleton):
                return tower, _rule_of(entry, family)
    return tower, None


def _in_block(name: str, container: str, family: Family) -> re.Match[str] | None:
    """Where a name that lies in a container continues with one of the family's block forms."""
    start = len(container) + 1 if container else 0
    forms = (_form(form).match(name, start) for form in family.blocks)
    return next(filter(None, forms), None) if _inside(name, container) else None


def _common_components(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False)))


# --- one parameter ----------------------------------------------------------------------------------------------


def _meaning(name: str, tower: str | None, rule: _Rule, names: _Names) -> _Found | None:
    """What a family's file says of a parameter: the first entry with its name that holds for it, or None."""
    bare, shape = names.bare[name], names.entries[name].shape
    found = rule.regex.search(bare)
    if found is None:
        return None
    place = _place(bare, found) if "block" in rule.regex.groupindex else None
    entry = next((entry for entry in rule.entries if _holds(entry, shape, place, names)), None)
    return None if entry is None else _Found(entry, place)


def _place(bare: str, found: re.Match[str]) -> _Place:
    numbers = [int(text) for key, text in found.groupdict().items() if key.startswith("block_")]
    slots = {key: text for key, text in found.groupdict().items() if not key.startswith("block")}
    return _Place(bare[: found.start()], tuple(numbers), bare[: found.end("block")], slots)


def _holds(entry: Mapping[str, Any], shape: tuple[int, ...], place: _Place | None, names: _Names) -> bool:
    """Whether a parameter has the axes, the shape, the neighbours and the configuration that an entry asks for."""
    if "shape" in entry and not _fits(entry["shape"], shape):
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


def _read_width(entry: Mapping[str, Any], place: _Place | None, names: _Names) -> int | None:
    """Inputs of the parameter in the same block that reads this one's output; None where it is missing."""
    options = [entry["into"]] if isinstance(entry["into"], str) else entry["into"]
    shapes = (names.sibling(place, option) for option in options) if place else ()
    return next((_oriented(entry, shape)[1] for shape in shapes if shape and len(shape) > 1), None)


def _fit_together(patterns: Mapping[str, Sequence[str]], place: _Place, names: _Names) -> bool:
    """Whether parameters of one block have the shapes that a letter's one meaning in all of them allows."""
    sizes: dict[str, int] = {}
    shapes = [(pattern, names.sibling(place, name)) for name, pattern in patterns.items()]
    # Plain letters of all patterns first, so that multiples can refer to them.
    return all(
        shape is not None and len(shape) == len(pattern) and _bind(pattern, shape, sizes)
        for pattern, shape in shapes
    ) and all(shape is not None and _multiples(pattern, shape, sizes) for pattern, shape in shapes)


def _fits(pattern: Sequence[str], shape: tuple[int, ...]) -> bool:
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


def _parts(found: _Found, shape: tuple[int, ...], names: _Names) -> tuple[tuple[_Part, ...], str]:
    """The matrices that a parameter holds, and why it could not be taken apart where it could not."""
    entry = found.entry
    whole = _oriented(entry, shape)
    transposed = {"transposed": True} if entry.get("layout", "").endswith("transposed") else {}
    if "role" in entry:
        cuts, doubt = [_Part(entry["role"], whole)], ""
    elif "columns" in entry:
        cuts, doubt = _column_parts(entry, whole, found.place, names)
    else:
        cuts, doubt = _row_parts(entry, whole, found.place, names)
    cuts = cuts or [_Part("other", whole)]
    if not entry.get("stacked"):
        return tuple(replace(part, cut=transposed | dict(part.cut)) if transposed else part for part in cuts), doubt
    return tuple(
        replace(part, label=f"[{expert}]{part.label}", cut={**transposed, **part.cut, "expert": expert})
        for expert in range(shape[0])
        for part in cuts
    ), doubt


def _row_parts(
    entry: Mapping[str, Any], whole: tuple[int, int], place: _Place | None, names: _Names
) -> tuple[list[_Part], str]:
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
        parts.append(_Part(role, (size, columns), f"[{role.rpartition('.')[2]}]", cut))
        start = stop
    return parts, ""


def _column_parts(
    entry: Mapping[str, Any], whole: tuple[int, int], place: _Place | None, names: _Names
) -> tuple[list[_Part], str]:
    """Two matrices side by side; the first reads what the sibling named by ``reads`` puts out."""
    source = names.sibling(place, entry["reads"]) if place else None
    if source is None or not 0 < source[0] < whole[1]:
        return [], "fused columns that do not divide into their parts: role other"
    return [
        _Part(role, (whole[0], stop - start), f"[{role.rpartition('.')[2]}]", {"columns": (start, stop)})
        for role, start, stop in zip(entry["columns"], (0, source[0]), (source[0], whole[1]), strict=True)
    ], ""


def _groups(entry: Mapping[str, Any], rows: int, columns: int, names: _Names) -> int | None:
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


def _unnamed(name: str, entry: Entry, tower: str | None, towers: Mapping[str, Family], names: _Names) -> _Draft:
    """A matrix that no pattern names: a kernel by its axes, else other; its block where its tower tells it."""
    shape = (entry.shape[0], prod(entry.shape[1:]))
    place = None
    if tower is not None:
        found = _in_block(names.skeleton[name], tower, towers[tower])
        parts = names.bare[name].split(".")
        depth = len(tower.split(".")) if tower else 0
        assert found is not None
        inner = found.group(0).rstrip(".").count(".") + 1
        numbers = tuple(int(part) for part in parts[depth : depth + inner] if part.isdigit())
        place = _Place(".".join(parts[:depth]), numbers, ".".join(parts[: depth + inner]), {})
    kernel = len(entry.shape) > 2
    return _Draft(name, tower, place, (_Part("conv" if kernel else "other", shape),), named=kernel)


def _unusable(name: str, entries: Mapping[str, Entry]) -> str:
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
    if _ADAPTER.search(name):
        return "a factor of an adapter that is not merged; merge it, or give the adapter's folder"
    if _FACTOR.search(name):
        return "a factor of a parametrised weight (weight norm); the matrix itself is not stored"
    return ""


_SCALES = ("_scale_inv", "_scale", "scales", "absmax")
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|hada_w\d_[ab]|lora_magnitude_vector)(\.|$)")
_FACTOR = re.compile(r"(^|\.)(weight_[gv]|parametrizations\.weight\.original\d)$")


def _quantised_beside(name: str, entries: Mapping[str, Entry]) -> bool:
    module = name.rpartition(".")[0]
    return any(
        f"{module}.{leaf}" in entries
        and not entries[f"{module}.{leaf}"].dtype.startswith(("float16", "float32", "bfl"))
        for leaf in ("qweight", "weight", "weight_packed")
    )


def _not_a_matrix(name: str, entry: Entry) -> str:
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


def _is_matrix_like(entry: Entry) -> bool:
    return entry.is_float and len(entry.shape) >= 2 and 0 not in entry.shape


# --- the whole model --------------------------------------------------------------------------------------------


def _numbered(drafts: Sequence[_Draft], names: _Names, towers: Mapping[str, Family]) -> tuple[MatrixRef, ...]:
    """The drafts as matrices: blocks counted on over stages, stacks labelled by what tells them apart."""
    numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    owner: dict[str, Family] = {}
    for draft in drafts:
        if draft.place is not None:
            numbers[draft.place.container].add(draft.place.numbers)
            owner[draft.place.container] = towers[draft.tower or ""] if draft.tower in towers else STRUCTURAL
    # A name that lies in a stage but in no block of it has fewer numbers than a block has.
    depth = {c: max(map(len, found)) for c, found in numbers.items()}
    rank = {
        c: {place: i for i, place in enumerate(sorted(place for place in found if len(place) == depth[c]))}
        for c, found in numbers.items()
    }
    labels = _labels(owner)
    matrices: list[MatrixRef] = []
    for draft in drafts:
        if draft.place is not None:
            place = draft.place
            single = depth[place.container] == 1
            block: int | None = place.numbers[0] if single else rank[place.container].get(place.numbers)
            stack = labels[place.container][0]
        elif towers and draft.named:
            block = None
            stack = next(
                (label for label, path in labels.values() if path and _inside(names.bare[draft.name], path)), ""
            )
        else:
            block, stack = _block_from_name(draft.name)
        matrices += [
            MatrixRef(
                MatrixKey(block, part.role, draft.name + part.label, stack), draft.name, part.shape, **part.cut
            )
            for part in draft.parts
        ]
    return tuple(matrices)


def _labels(owner: Mapping[str, Family]) -> dict[str, tuple[str, str]]:
    """Container → label of its stack, and the path up to the component that the label ends with.

    The label is the component that the family declares as a stack, else the first one that tells the containers
    apart; a single container needs none.
    """
    paths = {container: container.split(".") for container in owner}
    labels: dict[str, tuple[str, str]] = {}
    for container, path in paths.items():
        at = next((i for i, part in enumerate(path) if part in owner[container].stacks), None)
        if at is not None:
            labels[container] = (path[at], ".".join(path[: at + 1]))
    if len(labels) == len(owner) and len({label for label, _ in labels.values()}) == len(owner):
        return labels
    if len(owner) == 1:
        return dict.fromkeys(owner, ("", ""))
    start = next(i for i in range(99) if len({tuple(path[i : i + 1]) for path in paths.values()}) > 1)
    stop = next(
        (j for j in range(start + 1, 99) if len({tuple(path[start:j]) for path in paths.values()}) == len(paths)),
        99,
    )
    return {c: (".".join(path[start:stop]), ".".join(path[:stop])) for c, path in paths.items()}


def _block_from_name(name: str) -> tuple[int | None, str]:
    """The first number among a name's components, and what stands before it."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (None, "") if at is None else (int(parts[at]), ".".join(parts[:at]))


def _main(towers: Mapping[str, Family], drafts: Sequence[_Draft]) -> Family:
    """The family that names most parameters; of equals the first."""
    counts = Counter(towers[d.tower].name for d in drafts if d.tower is not None and d.named)
    return _family_named(counts.most_common(1)[0][0]) if counts else next(iter(towers.values()), STRUCTURAL)


def _shared(matrices: Sequence[MatrixRef], checkpoint: Checkpoint) -> dict[MatrixRef, str]:
    """Embeddings and heads that repeat the values of an earlier one → the parameter that they repeat.

    Nothing is read where config.json says that embeddings are not tied.
    """
    if any(c.get("tie_word_embeddings") is False for c in (checkpoint.config, *_nested(checkpoint.config))):
        return {}
    first: dict[tuple[int, int], list[MatrixRef]] = defaultdict(list)
    shared: dict[MatrixRef, str] = {}
    for ref in matrices:
        if ref.key.role not in ("embedding", "head") or len(checkpoint.entries[ref.parameter].shape) != 2:
            continue
        twin = next((t for t in first[ref.shape] if _equal(checkpoint, ref.parameter, t.parameter)), None)
        if twin is not None:
            shared[ref] = twin.parameter
        else:
            first[ref.shape].append(ref)
    return shared


def _nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (inner for inner in config.values() if isinstance(inner, Mapping))


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two parameters hold the same numbers, not all zero."""
    A, B = checkpoint[a], checkpoint[b]
    return A.shape == B.shape and A.dtype == B.dtype and torch.equal(A, B) and bool(A.any())


def _untied(
    shared: Mapping[MatrixRef, str], tuned: Checkpoint, theirs: Mapping[str, str], prefix: str
) -> list[MatrixRef]:
    """Matrices that base ties to another one and tuned does not: they are compared after all."""
    found = []
    for ref, twin in shared.items():
        mine, other = theirs.get(_strip(ref.parameter, prefix)), theirs.get(_strip(twin, prefix))
        if mine and other and not _equal(tuned, mine, other):
            found.append(ref)
    return found


def _remarks(mapped: ModelMap, checkpoint: Checkpoint) -> Iterator[str]:
    """What a person should know before trusting the roles."""
    if mapped.towers and mapped.unnamed:
        share = coverage(mapped, checkpoint)
        yield (
            f"{len(mapped.unnamed)} matrices ({share.unnamed / max(1, share.total):.1%} of the matrix parameters) "
            f"are not in the map of {mapped.family.name} and have the role other, e.g. {mapped.unnamed[0]}"
        )
    if any(_ADAPTER.search(name) for name in checkpoint.entries):
        yield "holds an adapter that is not merged: the matrices it adapts are read without it"
    blocks: dict[tuple[str, str], set[int]] = defaultdict(set)
    for ref in mapped.matrices:
        if ref.key.block is not None and mapped.towers:
            blocks[ref.key.stack, ref.parameter.split(".")[0]].add(ref.key.block)
    for (stack, _), found in blocks.items():
        missing = sorted(set(range(max(found))) - found)
        if missing:
            where = f" of {stack}" if stack else ""
            shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
            yield f"blocks {shown}{where} hold no matrix"
    for family in dict.fromkeys(mapped.towers.values()):
        times = checkpoint.config.get(family.repeated)
        stored = len({ref.key.block for ref in mapped.matrices} - {None})
        if isinstance(times, int) and times > stored:
            yield f"{stored} stored block(s) are run through {times} times ({family.repeated}) and counted once"


# --- the files --------------------------------------------------------------------------------------------------

_MATRIX_KEYS = {
    "name", "role", "rows", "columns", "skip", "layout", "stacked", "groups", "into", "reads", "shape", "axes",
    "fits", "when", "grouped",
}  # fmt: skip
_FAMILY_KEYS = {"title", "recognised_by", "beside", "unless", "stacks", "blocks", "repeated", "like", "matrix"}


def _text(family: str) -> str:
    return files("specbasis").joinpath("architectures", f"{family}.toml").read_text(encoding="utf-8")


def _family(name: str, text: str) -> Family:
    data = tomllib.loads(text)
    for matrix in data["matrix"]:
        roles = matrix.get("rows") or matrix.get("columns") or [matrix.get("role", "other")]
        wrong = [role for role in roles if role not in ROLES]
        if wrong:
            raise InputError(f"architectures/{name}.toml: role {wrong[0]!r} of {matrix['name']!r} is not in ROLES")
        if not set(matrix) <= _MATRIX_KEYS or len(set(matrix) & {"role", "rows", "columns", "skip"}) != 1:
            raise InputError(
                f"architectures/{name}.toml: {matrix['name']!r} wants one of role, rows, columns, skip, and of the "
                f"other keys only {', '.join(sorted(_MATRIX_KEYS))}; got {', '.join(matrix)}"
            )
    if not set(data) <= _FAMILY_KEYS:
        raise InputError(f"architectures/{name}.toml: unknown keys {', '.join(sorted(set(data) - _FAMILY_KEYS))}")
    inherited = _family(data["like"], _text(data["like"])).matrices if "like" in data else ()
    return Family(
        name,
        data["title"],
        tuple(_Frozen({"name": a} if isinstance(a, str) else a) for a in data.get("recognised_by", ())),
        tuple(data.get("stacks", ())),
        tuple(_Frozen(matrix) for matrix in data["matrix"]) + inherited,
        tuple(data.get("beside", ())),
        tuple(data.get("unless", ())),
        tuple(data.get("blocks", ("{layer}",))),
        data.get("repeated", ""),
    )


class _Frozen(dict[str, Any]):
    """A table of a family's file that can be hashed with its family."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self["name"])


@cache
def _family_named(name: str) -> Family:
    return next(family for family in families() if family.name == name)


@cache
def _regex(pattern: str, block: str = "{layer}") -> re.Pattern[str]:
    """A name pattern as a regular expression that matches the end of a name, from the start of a component.

    ``{block}`` is the block's form, another ``{word}`` a number, ``*`` anything in a component, ``**`` anything.
    """
    text = _expression(pattern.replace("{block}", "\0")).replace("\0", f"(?P<block>{_expression(block, 'block_')})")
    return re.compile(rf"(?:^|\.){text}$")


@cache
def _form(block: str) -> re.Pattern[str]:
    return re.compile(_expression(block) + r"\.")


def _expression(pattern: str, prefix: str = "") -> str:
    text = re.sub(r"\\\{(\w+)\\\}", rf"(?P<{prefix}\1>\\d+)", re.escape(pattern))
    return text.replace(r"\*\*", ".*").replace(r"\*", "[^.]*")


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
    for name in {_NUMBER.sub(r"\g<1>00", name) for name in names}:
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
    # The first and the last stand for all names that differ in numbers alone: the blocks of a stack agree together.
    alike: dict[str, list[str]] = defaultdict(list)
    for name in ours:
        alike[_NUMBER.sub(r"\g<1>00", name)].append(name)
    agreeing = Counter[tuple[str, str]]()
    for other in _prefixes(theirs):
        shapes = {name.removeprefix(other): shape for name, shape in theirs.items()}
        for mine in _prefixes(ours):
            if bool(mine) and mine == other:
                continue
            agreeing[mine, other] = sum(
                len(group)
                * any(shapes.get(name.removeprefix(mine)) == ours[name] for name in {group[0], group[-1]})
                for group in alike.values()
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
