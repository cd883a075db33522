"""What a parameter means: its block, its role, and how to read it as matrices (out, in).

Families are data: one file each in `families/`, read by `families()`. Fused, interleaved, stacked, transposed and
convolutional layouts end here; everything above sees (out, in) matrices.

A checkpoint may hold several stacks of blocks (an encoder and a decoder, a vision and a text tower), each claimed
by the family whose recognising names all occur in it. A claim needs that evidence; a matrix that no pattern of its
family names, or whose shape contradicts the pattern, gets the role ``other``, and a note says so.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint import Checkpoint, Entry
from specbasis.core.errors import InputError

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


Admits = Callable[[MatrixKey], bool]
"""Whether a matrix is wanted. It is also asked about what a parameter can turn out to be."""


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
    """One architecture, as its file in `families/` declares it (docs/adding-a-family.md has every key).

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
    folder = files("specbasis").joinpath("architecture", "families")
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return tuple(_family(name, _text(name)) for name in names)


def recognise(checkpoint: Checkpoint) -> Family:
    """The family that names most of a checkpoint's matrices, or `STRUCTURAL` where no family claims any."""
    return model_map(checkpoint).family


def model_map(checkpoint: Checkpoint, *, admits: Admits | None = None) -> ModelMap:
    """Every matrix of a checkpoint with its block and role; every other parameter with the reason.

    In a known family, a matrix that its file does not name gets the role ``other``. Only headers are read, except
    where an embedding and a head have equal shape and config.json does not say whether they are tied.

    Args:
        checkpoint: the model; all of its names are read, which costs nothing.
        admits: which matrices are wanted; all when None. A parameter that by its name can hold none of them is not
            looked up and not listed. Every name can turn out to be ``other`` by its shape, so asking for that role
            looks up every matrix.

    Where looking a name up contacts a file (`Checkpoint.shards`), only the files that hold wanted names are. A role
    that rests on the shape of a neighbour in another file is checked on the blocks that are at hand, where the
    parameter has the same shape and they agree; else that file's header is read. So is a header for each shape that
    a family is recognised by and that no wanted file shows. Embeddings and heads are compared for equal values
    with those at hand only, and a note says so.
    """
    return _mapped(checkpoint, admits)[0]


def _mapped(checkpoint: Checkpoint, admits: Admits | None) -> tuple[ModelMap, _Reader]:
    names = _Names(checkpoint)
    if admits is not None and names.shards:
        # What a first guess wants is where recognition may look at shapes.
        names.at_hand(_Reader(names, _claims(names, shapes=False)).wanted(admits))
    towers = _claims(names)
    reader = _Reader(names, towers)
    wanted = reader.wanted(admits)
    names.at_hand(wanted)
    tied = {name for name in names.bare if reader.may_be_tied(name)}
    looked = wanted | {name for name in tied if names.is_at_hand(name)} if wanted & tied else wanted
    drafts: list[_Draft] = []
    skipped: list[Skipped] = []
    doubts = Counter[str]()
    for name in names.bare:
        if name not in looked:
            continue
        entry = checkpoint.entries[name]
        reason = _unusable(name, checkpoint.entries)
        reading = reader.read(name)
        found = None if reason else _meaning(reading, entry.shape, names)
        reason = reason or (found.entry.get("skip", "") if found else _not_a_matrix(name, entry))
        if reason:
            skipped += [Skipped(name, "both", reason)] if name in wanted else []
        elif found is None:
            drafts.append(_unnamed(name, entry, reading))
        else:
            parts, doubt = _parts(found, entry.shape, names)
            drafts.append(_Draft(name, reading.tower, found.place, parts, named=not doubt))
            doubts.update([doubt] if doubt else [])
    matrices = tuple(ref for draft in drafts for ref in reader.matrices(draft))
    shared = _shared(matrices, checkpoint)
    mapped = ModelMap(
        reader.main_family(),
        tuple(ref for ref in matrices if ref not in shared),
        tuple(skipped),
        towers,
        tuple(draft.name for draft in drafts if not draft.named and draft.name in wanted),
        shared,
        tuple(f"{n} parameters: {text}" for text, n in doubts.items()),
    )
    notes = (*mapped.notes, *_remarks(mapped, checkpoint, reader, looked), *_untold(tied - looked, tied & wanted))
    kept = [ref for ref in matrices if admits is None or admits(ref.key)]
    shared = {ref: shared[ref] for ref in kept if ref in shared}
    twins = (
        Skipped(ref.key.name, "both", f"holds the values of {twin} (tied weights): counted once")
        for ref, twin in shared.items()
    )
    return replace(
        mapped,
        matrices=tuple(ref for ref in kept if ref not in shared),
        skipped=(*skipped, *twins),
        shared=shared,
        notes=notes,
    ), reader


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


def pair(
    base: Checkpoint, tuned: Checkpoint, *, common_rows: bool = False, admits: Admits | None = None
) -> Pairing:
    """Match the matrices of two checkpoints by name.

    Wrapper components (``module``, ``_orig_mod`` …) are dropped, and one leading prefix on either side is aligned
    where that makes more names and shapes agree (``bert.encoder…`` with ``encoder…``).

    Args:
        base: the pretrained checkpoint; its architecture gives block and role.
        tuned: the finetuned checkpoint.
        common_rows: compare the first rows that both have where only the number of rows differs (a vocabulary that
            grew), instead of skipping the matrix.
        admits: which matrices are wanted, as in `model_map`; what it excludes is neither looked up in either
            checkpoint nor listed as skipped.

    Raises:
        InputError: no name in common, or two alignments of prefixes fit equally well.
    """
    model, reader = _mapped(base, admits)
    refs = (*model.matrices, *model.shared)
    partial = admits is not None and bool(base.shards or tuned.shards)
    drop_base, drop_tuned = _align(base, tuned, {ref.parameter for ref in refs} if partial else None)
    theirs = {_strip(name, drop_tuned): name for name in tuned}
    counterparts = (theirs.get(_strip(ref.parameter, drop_base)) for ref in refs)
    at_hand = {tuned.shards.get(name) for name in counterparts if name} | {None} if partial else None
    untied = _untied(model.shared, tuned, theirs, drop_base, at_hand)
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
    for bare, name in theirs.items():
        if bare not in ours and (admits is None or reader.is_wanted(drop_base + bare, admits)):
            known = at_hand is None or tuned.shards.get(name) in at_hand
            skipped.append(Skipped(name, "tuned", (known and _unusable(name, tuned.entries)) or "not in base"))
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
        self.shards = checkpoint.shards
        self.bare = {name: _bare(name) for name in checkpoint.entries}
        self.stored = {bare: name for name, bare in self.bare.items()}
        self.skeleton = {name: _skeleton(bare) for name, bare in self.bare.items()}
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

    def sibling(self, place: _Place, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter in the same block, by its name behind the block; None where it is missing."""
        name = f".{name.format(**place.slots)}"
        stored = self.stored.get(place.base + name)
        if stored is None:
            return None
        known = None if self.is_at_hand(stored) else self._stand_in(place, name)
        return known or self.entries[stored].shape

    def _stand_in(self, place: _Place, name: str) -> tuple[int, ...] | None:
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
class _Rule:
    """The [[matrix]] entries with a pattern that matches a skeleton, and the expression that finds its block."""

    entries: tuple[Mapping[str, Any], ...]
    regex: re.Pattern[str]


@dataclass(frozen=True)
class _Place:
    """A name taken apart: the text before its block, the block's numbers, the text up to it and behind it."""

    container: str
    numbers: tuple[int, ...]
    base: str
    rest: str
    slots: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reading:
    """What a name alone tells of a parameter.

    Attributes:
        tower: the container of the stack whose blocks hold it.
        rule: the entries of a family's file that may hold for it.
        place: where it lies when one of them holds.
        around: where it lies when none does.
    """

    tower: str | None
    rule: _Rule | None
    place: _Place | None
    around: _Place | None


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


def _claims(names: _Names, *, shapes: bool = True) -> dict[str, Family]:
    """Container (as a skeleton) of every recognised stack of blocks → the family that claims it, in file order.

    A family claims a container where all its recognising patterns occur with equal text before the block and none
    of its `unless` patterns does. Of several, the one that names most skeletons there wins, then the one with more
    evidence. Of two containers one inside the other, the one with more named skeletons stays. Without shapes, what
    a recognising pattern says of them is taken to hold.
    """
    skeletons = tuple(names.alike)
    told = names if shapes else None
    best: dict[str, tuple[tuple[int, int, str], Family]] = {}
    for family in families():
        if not family.recognised_by or not _occur(family.beside, skeletons):
            continue
        anchored = [set(_containers(family, anchor, skeletons, told)) for anchor in family.recognised_by]
        look_alikes = {c for p in family.unless for c in _containers(family, {"name": p}, skeletons, told)}
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
    family: Family, anchor: Mapping[str, Any], skeletons: Iterable[str], told: _Names | None
) -> Iterator[str]:
    """The text before the block in every skeleton that an anchor matches, by name and, where given, by shape."""
    for skeleton in skeletons:
        found = next(filter(None, (_regex(anchor["name"], form).search(skeleton) for form in family.blocks)), None)
        if found and (told is None or "shape" not in anchor or _fits(anchor["shape"], told.shape(skeleton))):
            yield skeleton[: found.start()]


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


def _meaning(reading: _Reading, shape: tuple[int, ...], names: _Names) -> _Found | None:
    """What a family's file says of a parameter: the first entry with its name that holds for it, or None."""
    entries = reading.rule.entries if reading.rule else ()
    entry = next((entry for entry in entries if _holds(entry, shape, reading.place, names)), None)
    return None if entry is None else _Found(entry, reading.place)


def _place(bare: str, found: re.Match[str]) -> _Place:
    numbers = [int(text) for key, text in found.groupdict().items() if key.startswith("block_")]
    slots = {key: text for key, text in found.groupdict().items() if not key.startswith("block")}
    end = found.end("block")
    return _Place(bare[: found.start()], tuple(numbers), bare[:end], bare[end:], slots)


def _around(bare: str, skeleton: str, tower: str, family: Family) -> _Place | None:
    """The place of a name that lies in a tower's blocks, whatever it is."""
    found = _in_block(skeleton, tower, family)
    if found is None:
        return None
    parts = bare.split(".")
    start = len(tower.split(".")) if tower else 0
    stop = start + found.group(0).rstrip(".").count(".") + 1
    numbers = tuple(int(part) for part in parts[start:stop] if part.isdigit())
    base = ".".join(parts[:stop])
    return _Place(".".join(parts[:start]), numbers, base, bare[len(base) :])


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
        parts.append(_Part(role, (size, columns), _label(role), cut))
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
        _Part(role, (whole[0], stop - start), _label(role), {"columns": (start, stop)})
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


def _unnamed(name: str, entry: Entry, reading: _Reading) -> _Draft:
    """A matrix that no pattern names: a kernel by its axes, else other; its block where its tower tells it."""
    shape = (entry.shape[0], prod(entry.shape[1:]))
    kernel = len(entry.shape) > 2
    part = _Part("conv" if kernel else "other", shape)
    return _Draft(name, reading.tower, reading.around, (part,), named=kernel)


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


class _Reader:
    """What a model's names alone tell: rules, blocks counted on over stages, stacks labelled by what differs."""

    def __init__(self, names: _Names, towers: Mapping[str, Family]) -> None:
        self.names = names
        self.towers = towers
        self._rules: dict[str, tuple[str | None, _Rule | None]] = {}
        self._readings = {name: self._read(bare) for name, bare in names.bare.items()}
        numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        owner: dict[str, Family] = {}
        for reading in self._readings.values():
            place = reading.place or reading.around
            if place is not None and reading.tower is not None:
                numbers[place.container].add(place.numbers)
                owner[place.container] = towers[reading.tower]
        # A name that lies in a stage but in no block of it has fewer numbers than a block has.
        self._depth = depth = {c: max(map(len, found)) for c, found in numbers.items()}
        self._rank = {
            c: {place: i for i, place in enumerate(sorted(place for place in found if len(place) == depth[c]))}
            for c, found in numbers.items()
        }
        self._labels = _labels(owner)

    def read(self, name: str) -> _Reading:
        """The reading of one of the model's names, or of one that another checkpoint has."""
        return self._readings.get(name) or self._read(_bare(name))

    def _read(self, bare: str) -> _Reading:
        skeleton = _skeleton(bare)
        if skeleton not in self._rules:
            self._rules[skeleton] = _rule(skeleton, self.towers)
        tower, rule = self._rules[skeleton]
        found = rule.regex.search(bare) if rule else None
        return _Reading(
            tower,
            rule if found else None,
            _place(bare, found) if found and "block" in found.re.groupindex else None,
            None if tower is None else _around(bare, skeleton, tower, self.towers[tower]),
        )

    def wanted(self, admits: Admits | None) -> set[str]:
        """The names that may hold an admitted matrix."""
        return {name for name in self.names.bare if admits is None or self.is_wanted(name, admits)}

    def is_wanted(self, name: str, admits: Admits) -> bool:
        """Whether a parameter may hold an admitted matrix, by its name alone."""
        return any(map(admits, self._possible(name)))

    def may_be_tied(self, name: str) -> bool:
        """Whether a parameter may be an embedding or a head, by its name alone."""
        rule = self.read(name).rule
        return rule is not None and any(entry.get("role") in ("embedding", "head") for entry in rule.entries)

    def _possible(self, name: str) -> Iterator[MatrixKey]:
        """Every key that a matrix of this parameter can turn out to have."""
        reading = self.read(name)
        for entry in reading.rule.entries if reading.rule else ():
            if "skip" in entry:
                if "shape" not in entry:
                    return
                continue
            roles = entry.get("rows") or entry.get("columns") or [entry["role"]]
            labels = [""] if "role" in entry else [_label(role) for role in roles]
            whole = [] if "role" in entry else [("other", "", False)]
            for role, label, named in (*((r, n, True) for r, n in zip(roles, labels, strict=True)), *whole):
                block, stack = self.where(name, reading.place, named)
                for expert in range(_MOST_EXPERTS) if entry.get("stacked") else [None]:
                    number = "" if expert is None else f"[{expert}]"
                    yield MatrixKey(block, role, f"{name}{number}{label}", stack)
        for role in ("other", "conv") if name.endswith("weight") else ("other",):
            block, stack = self.where(name, reading.around, role == "conv")
            yield MatrixKey(block, role, name, stack)

    def where(self, name: str, place: _Place | None, named: bool) -> tuple[int | None, str]:
        """Block and stack of a parameter that lies in a place, or in none."""
        if place is not None:
            single = self._depth.get(place.container, 1) == 1
            block = place.numbers[0] if single else self._rank[place.container].get(place.numbers)
            return block, self._labels.get(place.container, ("", ""))[0]
        if self.towers and named:
            bare = _bare(name)
            inside = (label for label, path in self._labels.values() if path and _inside(bare, path))
            return None, next(inside, "")
        return _block_from_name(name)

    def matrices(self, draft: _Draft) -> Iterator[MatrixRef]:
        """The matrices of a parameter, with their keys."""
        block, stack = self.where(draft.name, draft.place, draft.named)
        for part in draft.parts:
            key = MatrixKey(block, part.role, draft.name + part.label, stack)
            yield MatrixRef(key, draft.name, part.shape, **part.cut)

    def main_family(self) -> Family:
        """The family whose patterns name most parameters in its blocks; of equals the first."""
        counts = Counter(
            self.towers[reading.tower].name
            for reading in self._readings.values()
            if reading.tower is not None and reading.rule and any("skip" not in e for e in reading.rule.entries)
        )
        return (
            _family_named(counts.most_common(1)[0][0]) if counts else next(iter(self.towers.values()), STRUCTURAL)
        )


_MOST_EXPERTS = 1024
"""Matrices in one stacked parameter that a pattern of names can address without the parameter being looked up."""


def _label(role: str) -> str:
    """What stands behind the name of a parameter for a part of it."""
    return f"[{role.rpartition('.')[2]}]"


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
    shared: Mapping[MatrixRef, str],
    tuned: Checkpoint,
    theirs: Mapping[str, str],
    prefix: str,
    at_hand: Collection[str | None] | None,
) -> list[MatrixRef]:
    """Matrices that base ties to another one and tuned does not: they are compared after all.

    So are those whose twin in tuned lies in a file that is not otherwise read.
    """
    found = []
    for ref, twin in shared.items():
        mine, other = theirs.get(_strip(ref.parameter, prefix)), theirs.get(_strip(twin, prefix))
        if mine and other:
            known = at_hand is None or tuned.shards.get(other) in at_hand
            found += [] if known and _equal(tuned, mine, other) else [ref]
    return found


def _untold(unread: Collection[str], wanted: Collection[str]) -> Iterator[str]:
    """That ties with embeddings and heads which were not looked up are not known."""
    if unread and wanted:
        yield (
            f"{min(wanted)} may hold the same values as {min(unread)} (tied weights), which was not read: "
            "its file holds nothing that was asked for"
        )


def _remarks(mapped: ModelMap, checkpoint: Checkpoint, reader: _Reader, looked: Collection[str]) -> Iterator[str]:
    """What a person should know before trusting the roles; names that were not looked up count as matrices."""
    if mapped.towers and mapped.unnamed:
        share = coverage(mapped, checkpoint)
        of = "the matrix parameters" + (" looked at" if len(looked) < len(checkpoint) else "")
        yield (
            f"{len(mapped.unnamed)} matrices ({share.unnamed / max(1, share.total):.1%} of {of}) "
            f"are not in the map of {mapped.family.name} and have the role other, e.g. {mapped.unnamed[0]}"
        )
    if any(_ADAPTER.search(name) for name in checkpoint.entries):
        yield "holds an adapter that is not merged: the matrices it adapts are read without it"
    found_in = [(ref.parameter, ref.key.block, ref.key.stack) for ref in mapped.matrices]
    for name in checkpoint.entries:
        if name not in looked:
            reading = reader.read(name)
            found_in.append((name, *reader.where(name, reading.place or reading.around, reading.rule is not None)))
    blocks: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, block, stack in found_in:
        if block is not None and mapped.towers:
            blocks[stack, name.split(".")[0]].add(block)
    for (stack, _), found in blocks.items():
        missing = sorted(set(range(max(found))) - found)
        if missing:
            where = f" of {stack}" if stack else ""
            shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
            yield f"blocks {shown}{where} hold no matrix"
    for family in dict.fromkeys(mapped.towers.values()):
        times = checkpoint.config.get(family.repeated)
        stored = len({block for _, block, _ in found_in} - {None})
        if isinstance(times, int) and times > stored:
            yield f"{stored} stored block(s) are run through {times} times ({family.repeated}) and counted once"


# --- the files --------------------------------------------------------------------------------------------------

_MATRIX_KEYS = {
    "name", "role", "rows", "columns", "skip", "layout", "stacked", "groups", "into", "reads", "shape", "axes",
    "fits", "when", "grouped",
}  # fmt: skip
_FAMILY_KEYS = {"title", "recognised_by", "beside", "unless", "stacks", "blocks", "repeated", "like", "matrix"}


def _text(family: str) -> str:
    return files("specbasis").joinpath("architecture", "families", f"{family}.toml").read_text(encoding="utf-8")


def _family(name: str, text: str) -> Family:
    data = tomllib.loads(text)
    for matrix in data["matrix"]:
        roles = matrix.get("rows") or matrix.get("columns") or [matrix.get("role", "other")]
        wrong = [role for role in roles if role not in ROLES]
        if wrong:
            raise InputError(
                f"architecture/families/{name}.toml: role {wrong[0]!r} of {matrix['name']!r} is not in ROLES"
            )
        if not set(matrix) <= _MATRIX_KEYS or len(set(matrix) & {"role", "rows", "columns", "skip"}) != 1:
            raise InputError(
                f"architecture/families/{name}.toml: {matrix['name']!r} wants one of role, rows, columns, skip, "
                f"and of the other keys only {', '.join(sorted(_MATRIX_KEYS))}; got {', '.join(matrix)}"
            )
    if not set(data) <= _FAMILY_KEYS:
        raise InputError(
            f"architecture/families/{name}.toml: unknown keys {', '.join(sorted(set(data) - _FAMILY_KEYS))}"
        )
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
    """Leading dotted prefixes up to three components deep, the empty one too; with numbers where all share it."""
    names = list(names)
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    found = {"", *(".".join(shared[:depth]) + "." for depth in range(1, min(4, len(shared) + 1)))}
    for name in {_NUMBER.sub(r"\g<1>00", name) for name in names}:
        parts = list(takewhile(lambda part: not part.isdigit(), name.split(".")[:-1]))
        found |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts) + 1))}
    return sorted(found)


def _may_drop(mine: str, other: str) -> bool:
    """Whether prefixes may be dropped from both sides: never two of a block, such as layers.3. and layers.5."""
    return not (mine and other) or (mine != other and not re.search(r"(^|\.)\d+\.", f"{mine}.{other}"))


def _align(base: Checkpoint, tuned: Checkpoint, wanted: Collection[str] | None = None) -> tuple[str, str]:
    """The prefixes to drop from base's and tuned's names so that the most names and shapes agree.

    The shortest such prefixes win. Two equally short ones that agree equally often are ambiguous, and refused:
    a decoder must never be compared with an encoder.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetuned checkpoint.
        wanted: the parameters of base to which shapes may be looked up; all when None. Names then come first, and
            all shapes decide only where names and the wanted shapes do not.

    Raises:
        InputError: nothing agrees, or the choice is ambiguous.
    """
    way = None if wanted is None else _align_by_names(base, tuned, wanted)
    return way or _align_by_shapes(base, tuned)


def _align_by_names(base: Checkpoint, tuned: Checkpoint, wanted: Collection[str]) -> tuple[str, str] | None:
    """The prefixes under which the most names agree; None where that leaves a doubt.

    Where several fit equally, those under which the most wanted parameters have equal shapes. Where a prefix is
    dropped, a wanted parameter has to confirm it by its shape.
    """
    ours = {_bare(name) for name in base.entries}
    theirs = {_bare(name): name for name in tuned.entries}
    stripped = {mine: {name.removeprefix(mine) for name in ours} for mine in _prefixes(ours)}
    shifted = {other: {name.removeprefix(other): name for name in theirs} for other in _prefixes(theirs)}
    agreeing = {
        (mine, other): len(names & their_names.keys())
        for mine, names in stripped.items()
        for other, their_names in shifted.items()
        if _may_drop(mine, other)
    }
    most = max(agreeing.values())
    if most == 0:
        raise _nothing_agrees(base, tuned)
    by_partners: dict[tuple[str | None, ...], tuple[str, str]] = {}
    for way in sorted((way for way, n in agreeing.items() if n == most), key=lambda way: (len("".join(way)), way)):
        partners = (shifted[way[1]].get(_strip(name, way[0])) for name in wanted)
        by_partners.setdefault(tuple(partner and theirs[partner] for partner in partners), way)
    if len(by_partners) == 1 and not any(way := next(iter(by_partners.values()))):
        return way

    def confirmed(partners: tuple[str | None, ...]) -> int:
        pairs = zip(wanted, partners, strict=True)
        return sum(bool(b) and base.entries[a].shape == tuned.entries[b].shape for a, b in pairs if b)

    counts = Counter({partners: confirmed(partners) for partners in by_partners}).most_common(2)
    clear = counts[0][1] > 0 and (len(counts) == 1 or counts[0][1] > counts[1][1])
    return by_partners[counts[0][0]] if clear or not wanted else None


def _align_by_shapes(base: Checkpoint, tuned: Checkpoint) -> tuple[str, str]:
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
            if not _may_drop(mine, other):
                continue
            agreeing[mine, other] = sum(
                len(group)
                * any(shapes.get(name.removeprefix(mine)) == ours[name] for name in {group[0], group[-1]})
                for group in alike.values()
            )
    best = max(agreeing.values())
    if best == 0:
        raise _nothing_agrees(base, tuned)
    ranked = sorted((len(a) + len(b), a, b) for (a, b), count in agreeing.items() if count == best)
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        raise InputError(
            f"{base.source} and {tuned.source}: names can be aligned in several ways "
            f"({ranked[0][1:]} or {ranked[1][1:]} dropped); rename one side"
        )
    return ranked[0][1], ranked[0][2]


def _nothing_agrees(base: Checkpoint, tuned: Checkpoint) -> InputError:
    mine, other = ({_bare(name): name for name in checkpoint.entries} for checkpoint in (base, tuned))
    if common := [name for name in mine if name in other]:
        # Of one alone: a shape may cost a request.
        one, another = base.entries[mine[common[0]]].shape, tuned.entries[other[common[0]]].shape
        return InputError(
            f"{base.source} and {tuned.source}: {len(common)} names in common, none of them with the same shape "
            f"(e.g. {common[0]}: {one} and {another}); want two checkpoints of one size"
        )
    ours, theirs = (_bare(next(iter(checkpoint.entries))) for checkpoint in (base, tuned))
    return InputError(
        f"{base.source} and {tuned.source}: no parameter in common by name and shape "
        f"(e.g. {ours!r} and {theirs!r}); want two checkpoints of one architecture"
    )
