"""Recognition: what the parameters of a model mean: block, role, and how to read each as matrices (out, in).

A checkpoint may hold several stacks of blocks (an encoder and a decoder, a vision and a text tower), each claimed
by the family whose recognising names all occur in it. A claim needs that evidence; a matrix that no pattern of its
family names, or whose shape contradicts the pattern, gets the role ``other``, and a note says so.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import prod
from typing import Any

import torch

from specbasis.architecture.cut import (
    ADAPTER,
    Names,
    Part,
    Place,
    cut,
    is_matrix_like,
    meaning_of,
    not_a_matrix,
    part_label,
    place_of,
    shape_fits,
    unusable,
)
from specbasis.architecture.family import (
    STRUCTURAL,
    Family,
    block_matcher,
    families,
    family_named,
    matcher,
    skeleton_of,
)
from specbasis.architecture.key import ROLES, Admits, MatrixKey, MatrixRef, Skipped
from specbasis.checkpoint import Checkpoint, Entry
from specbasis.checkpoint.names import bare_name


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
    return mapped_with_reader(checkpoint, admits)[0]


def mapped_with_reader(checkpoint: Checkpoint, admits: Admits | None) -> tuple[ModelMap, _Reader]:
    """`model_map`, and what the names alone tell of this model and of others whose names are alike."""
    names = Names(checkpoint)
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
        reason = unusable(name, checkpoint.entries)
        reading = reader.read(name)
        found = None if reason else meaning_of(reading.entries, entry.shape, reading.place, names)
        reason = reason or (found.entry.get("skip", "") if found else not_a_matrix(name, entry))
        if reason:
            skipped += [Skipped(name, "both", reason)] if name in wanted else []
        elif found is None:
            drafts.append(_unnamed(name, entry, reading))
        else:
            parts, doubt = cut(found, entry.shape, names)
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
        if item.name in checkpoint.entries and is_matrix_like(checkpoint.entries[item.name])
    } - {ref.parameter for ref in mapped.shared}
    skipped = sum(prod(checkpoint.entries[name].shape) for name in tables)
    return Coverage(
        sizes.total() + skipped,
        {role: sizes[role] for role in ROLES if sizes[role]},
        sum(prod(ref.shape) for ref in mapped.matrices if ref.parameter in unnamed),
        skipped,
        mapped.unnamed,
    )


# --- which family claims which stack of blocks ------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """The [[matrix]] entries with a pattern that matches a skeleton, and the expression that finds its block."""

    entries: tuple[Mapping[str, Any], ...]
    regex: re.Pattern[str]


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
    place: Place | None
    around: Place | None

    @property
    def entries(self) -> tuple[Mapping[str, Any], ...]:
        """The [[matrix]] entries that may hold for it."""
        return self.rule.entries if self.rule else ()


@dataclass(frozen=True)
class _Draft:
    """A parameter's matrices before blocks are numbered and stacks are labelled."""

    name: str
    tower: str | None
    place: Place | None
    parts: tuple[Part, ...]
    named: bool


def _claims(names: Names, *, shapes: bool = True) -> dict[str, Family]:
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
    return all(any(matcher(pattern).search(skeleton) for skeleton in skeletons) for pattern in patterns)


def _containers(
    family: Family, anchor: Mapping[str, Any], skeletons: Iterable[str], told: Names | None
) -> Iterator[str]:
    """The text before the block in every skeleton that an anchor matches, by name and, where given, by shape."""
    for skeleton in skeletons:
        found = next(filter(None, (matcher(anchor["name"], form).search(skeleton) for form in family.blocks)), None)
        if found and (told is None or "shape" not in anchor or shape_fits(anchor["shape"], told.shape(skeleton))):
            yield skeleton[: found.start()]


def _inside(name: str, container: str) -> bool:
    """Whether a name, or a container, lies in a container."""
    return not container or name == container or name.startswith(container + ".")


def _block_rule(skeleton: str, container: str, family: Family) -> _Rule | None:
    """The first entry of a family that matches a skeleton with its block right behind the container."""
    for form in family.blocks:
        for entry in family.matrices:
            if "{block}" in entry["name"]:
                regex = matcher(entry["name"], form)
                found = regex.search(skeleton)
                if found and skeleton[: found.start()] == container:
                    return _rule_of(entry, family, form)
    return None


def _rule_of(entry: Mapping[str, Any], family: Family, form: str = "{layer}") -> _Rule:
    alternatives = tuple(other for other in family.matrices if other["name"] == entry["name"])
    return _Rule(alternatives, matcher(entry["name"], form))


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
    for family in dict.fromkeys((*(towers[c] for c in near), family_named("common"))):
        for entry in family.matrices:
            only_tables = not towers or (tower is not None and family.name == "common")
            if "{block}" in entry["name"] or (only_tables and "skip" not in entry):
                continue
            if matcher(entry["name"]).search(skeleton):
                return tower, _rule_of(entry, family)
    return tower, None


def _in_block(name: str, container: str, family: Family) -> re.Match[str] | None:
    """Where a name that lies in a container continues with one of the family's block forms."""
    start = len(container) + 1 if container else 0
    forms = (block_matcher(form).match(name, start) for form in family.blocks)
    return next(filter(None, forms), None) if _inside(name, container) else None


def _common_components(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False)))


def _around(bare: str, skeleton: str, tower: str, family: Family) -> Place | None:
    """The place of a name that lies in a tower's blocks, whatever it is."""
    found = _in_block(skeleton, tower, family)
    if found is None:
        return None
    parts = bare.split(".")
    start = len(tower.split(".")) if tower else 0
    stop = start + found.group(0).rstrip(".").count(".") + 1
    numbers = tuple(int(part) for part in parts[start:stop] if part.isdigit())
    base = ".".join(parts[:stop])
    return Place(".".join(parts[:start]), numbers, base, bare[len(base) :])


def _unnamed(name: str, entry: Entry, reading: _Reading) -> _Draft:
    """A matrix that no pattern names: a kernel by its axes, else other; its block where its tower tells it."""
    shape = (entry.shape[0], prod(entry.shape[1:]))
    kernel = len(entry.shape) > 2
    part = Part("conv" if kernel else "other", shape)
    return _Draft(name, reading.tower, reading.around, (part,), named=kernel)


# --- the whole model --------------------------------------------------------------------------------------------


class _Reader:
    """What a model's names alone tell: rules, blocks counted on over stages, stacks labelled by what differs."""

    def __init__(self, names: Names, towers: Mapping[str, Family]) -> None:
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
        return self._readings.get(name) or self._read(bare_name(name))

    def _read(self, bare: str) -> _Reading:
        skeleton = skeleton_of(bare)
        if skeleton not in self._rules:
            self._rules[skeleton] = _rule(skeleton, self.towers)
        tower, rule = self._rules[skeleton]
        found = rule.regex.search(bare) if rule else None
        return _Reading(
            tower,
            rule if found else None,
            place_of(bare, found) if found and "block" in found.re.groupindex else None,
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
        for entry in reading.entries:
            if "skip" in entry:
                if "shape" not in entry:
                    return
                continue
            roles = entry.get("rows") or entry.get("columns") or [entry["role"]]
            labels = [""] if "role" in entry else [part_label(role) for role in roles]
            whole = [] if "role" in entry else [("other", "", False)]
            for role, label, named in (*((r, n, True) for r, n in zip(roles, labels, strict=True)), *whole):
                block, stack = self.where(name, reading.place, named)
                for expert in range(_MOST_EXPERTS) if entry.get("stacked") else [None]:
                    number = "" if expert is None else f"[{expert}]"
                    yield MatrixKey(block, role, f"{name}{number}{label}", stack)
        for role in ("other", "conv") if name.endswith("weight") else ("other",):
            block, stack = self.where(name, reading.around, role == "conv")
            yield MatrixKey(block, role, name, stack)

    def where(self, name: str, place: Place | None, named: bool) -> tuple[int | None, str]:
        """Block and stack of a parameter that lies in a place, or in none."""
        if place is not None:
            single = self._depth.get(place.container, 1) == 1
            block = place.numbers[0] if single else self._rank[place.container].get(place.numbers)
            return block, self._labels.get(place.container, ("", ""))[0]
        if self.towers and named:
            bare = bare_name(name)
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
        return family_named(counts.most_common(1)[0][0]) if counts else next(iter(self.towers.values()), STRUCTURAL)


_MOST_EXPERTS = 1024
"""Matrices in one stacked parameter that a pattern of names can address without the parameter being looked up."""


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
        twin = next((t for t in first[ref.shape] if equal_values(checkpoint, ref.parameter, t.parameter)), None)
        if twin is not None:
            shared[ref] = twin.parameter
        else:
            first[ref.shape].append(ref)
    return shared


def _nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (inner for inner in config.values() if isinstance(inner, Mapping))


def equal_values(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two parameters hold the same numbers, not all zero."""
    A, B = checkpoint[a], checkpoint[b]
    return A.shape == B.shape and A.dtype == B.dtype and torch.equal(A, B) and bool(A.any())


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
    if any(ADAPTER.search(name) for name in checkpoint.entries):
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
