"""Pairing: the matrices that two checkpoints have in common."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from specbasis.architecture.cut import equal_values, layout_of, matrix_size, unusable
from specbasis.architecture.family import Family
from specbasis.architecture.key import Admits, MatrixKey, MatrixRef, Skipped
from specbasis.architecture.recognise import ModelMap, Recognition
from specbasis.checkpoint import ABSENT, Checkpoint
from specbasis.checkpoint.names import alignments, bare_name, spelled, stripped
from specbasis.core.errors import InputError


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


def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    common_rows: bool = False,
    transposed: bool = False,
    admits: Admits | None = None,
) -> Pairing:
    """Match the matrices of two checkpoints by name.

    Wrapper components (``module``, ``_orig_mod`` …) are dropped, and one leading prefix on either side is aligned
    where that makes more names and shapes agree (``bert.encoder…`` with ``encoder…``). Where one of the two alone
    has the names that llama.cpp gives, matrices of one stack, block, role and shape are matched instead.

    Args:
        base: the pretrained checkpoint; its architecture gives block and role.
        tuned: the finetuned checkpoint.
        common_rows: compare the first rows that both have where only the number of rows differs (a vocabulary that
            grew), instead of skipping the matrix.
        transposed: the matrices of tuned are stored (in, out) where those of base are (out, in), or the other way.
        admits: which matrices are wanted, as in `model_map`; what it excludes is not listed as skipped.

    Raises:
        InputError: no name in common, or two alignments of prefixes fit equally well.
    """
    recognition = Recognition(base)
    model = recognition.model(admits)
    other = Recognition(tuned)
    if _of_llama_cpp(recognition) != _of_llama_cpp(other):
        return _by_role(model, other.model(admits))
    drop_base, counterparts, remarks = aligned(base, tuned, transposed)
    ours = {stripped(name, drop_base) for name in base}
    matched: list[MatrixPair] = []
    skipped: list[Skipped] = []
    notes: list[str] = [*model.notes, *remarks]
    untied = _untied(model.shared, tuned, counterparts, drop_base)
    for ref in (*model.matrices, *untied):
        name = counterparts.get(stripped(ref.parameter, drop_base))
        if name is None:
            skipped.append(Skipped(ref.key.name, "base", "not in tuned", prod(ref.shape)))
            continue
        shape, tuned_shape = base.entries[ref.parameter].shape, tuned.entries[name].shape
        layouts = layout_of(ref.parameter, base.entries), layout_of(name, tuned.entries)
        flipped = len(shape) == len(tuned_shape) == 2 and transposed != (layouts[0] != layouts[1])
        tuned_shape = tuned_shape[::-1] if flipped else tuned_shape
        partner = replace(ref, parameter=name, transposed=ref.transposed != flipped)
        whole = ref.rows is None and ref.columns is None and ref.expert is None and not ref.transposed
        if reason := unusable(name, tuned.entries):
            skipped.append(Skipped(ref.key.name, "both", f"in tuned: {reason}", prod(ref.shape)))
        elif shape == tuned_shape:
            matched.append(MatrixPair(ref.key, ref, partner))
        elif common_rows and shape[1:] == tuned_shape[1:] and whole:
            rows = (0, min(shape[0], tuned_shape[0]))
            cut = (rows[1], ref.shape[1])
            matched.append(
                MatrixPair(ref.key, replace(ref, rows=rows, shape=cut), replace(partner, rows=rows, shape=cut))
            )
            notes.append(f"{ref.key.name}: first {rows[1]} rows of {shape[0]} (base) and {tuned_shape[0]} (tuned)")
        else:
            hint = "; --common-rows compares the rows that both have" if shape[1:] == tuned_shape[1:] else ""
            reason = f"shape {shape} in base, {tuned_shape} in tuned{hint}"
            skipped.append(Skipped(ref.key.name, "both", reason, prod(ref.shape)))
    skipped += [
        replace(item, side="both" if stripped(item.name, drop_base) in counterparts else "base")
        for item in model.skipped
        if item.name not in {ref.key.name for ref in untied}
    ]
    skipped += [
        Skipped(name, "tuned", unusable(name, tuned.entries) or "not in base", matrix_size(name, tuned.entries))
        for bare, name in counterparts.items()
        if bare not in ours and recognition.may_hold(drop_base + bare, admits)
    ]
    return Pairing(model.family, tuple(matched), tuple(skipped), tuple(notes))


def _of_llama_cpp(recognition: Recognition) -> bool:
    return any(family.name.startswith("gguf") for family in recognition.towers.values())


def _by_role(base: ModelMap, tuned: ModelMap) -> Pairing:
    """Match the matrices of two models whose names say the same in different words."""
    ours, theirs = _by_place(base.matrices), _by_place(tuned.matrices)
    matched = tuple(MatrixPair(ref.key, ref, theirs[place]) for place, ref in ours.items() if place in theirs)
    alone = (("base", "not in tuned", ours, theirs), ("tuned", "not in base", theirs, ours))
    skipped = (
        Skipped(ref.key.name, side, reason, prod(ref.shape))
        for side, reason, these, those in alone
        for place, ref in these.items()
        if place not in those
    )
    note = f"names differ: {len(matched)} matrices are matched by block, role and shape"
    return Pairing(base.family, matched, (*base.skipped, *tuned.skipped, *skipped), (*base.notes, note))


def _by_place(matrices: Iterable[MatrixRef]) -> dict[tuple[Any, ...], MatrixRef]:
    """Stack, block, role, shape, and which of those that have these in common, such as the experts of a block."""
    count: Counter[tuple[Any, ...]] = Counter()
    places = {}
    for ref in sorted(matrices, key=lambda ref: [(len(part), part) for part in re.split(r"[.\[\]]", ref.key.name)]):
        place = (ref.key.stack, ref.key.block, ref.key.role, ref.shape)
        places[(*place, count[place])] = ref
        count[place] += 1
    return places


def aligned(
    base: Checkpoint, tuned: Checkpoint, transposed: bool = False
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """The prefix to drop from base's names, what tuned calls each of them then, and notes on what was aligned.

    Raises:
        InputError: nothing agrees, or the choice is ambiguous.
    """
    drop_base, drop_tuned = _align(base, tuned, transposed)
    counterparts = {stripped(name, drop_tuned): name for name in tuned}
    spellings = _spellings({stripped(name, drop_base) for name in base}, counterparts)
    notes = []
    if drop_base or drop_tuned:
        notes.append(f"names aligned: base without {drop_base!r}, tuned without {drop_tuned!r}")
    if spellings:
        theirs, own = next(iter(spellings.items()))
        count = len(spellings)
        notes.append(f"{count} names differ in their separators alone: {own!r} in base, {theirs!r} in tuned")
    return drop_base, {spellings.get(bare, bare): name for bare, name in counterparts.items()}, tuple(notes)


def _spellings(ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Names of tuned that base has with other separators → base's name; only where there is one."""
    by_spelling: dict[str, list[str]] = defaultdict(list)
    for name in ours:
        by_spelling[spelled(name)].append(name)
    other = [name for name in theirs if name not in ours]
    counts = Counter(map(spelled, other))
    return {
        name: by_spelling[spelled(name)][0]
        for name in other
        if len(by_spelling[spelled(name)]) == counts[spelled(name)] == 1
        and by_spelling[spelled(name)][0] not in theirs
    }


def _untied(
    shared: Mapping[MatrixRef, str], tuned: Checkpoint, counterparts: Mapping[str, str], prefix: str
) -> list[MatrixRef]:
    """Matrices that base ties to another one and tuned does not: they are compared after all."""
    names = {
        ref: [counterparts.get(stripped(n, prefix)) for n in (ref.parameter, twin)] for ref, twin in shared.items()
    }
    return [ref for ref, (name, twin) in names.items() if name and twin and not equal_values(tuned, name, twin)]


def _align(base: Checkpoint, tuned: Checkpoint, transposed: bool) -> tuple[str, str]:
    """The prefixes to drop from base's and tuned's names so that the most names and shapes agree.

    The shortest such prefixes win. Two equally short ones that agree equally often are ambiguous, and refused:
    a decoder must never be compared with an encoder.

    Raises:
        InputError: nothing agrees, or the choice is ambiguous.
    """
    ours, theirs = (
        {bare_name(n): _shape(n, c) for n, e in c.entries.items() if e.dtype != ABSENT} for c in (base, tuned)
    )
    turned = {name: shape[::-1] if len(shape) == 2 else shape for name, shape in theirs.items()}
    plain = alignments(ours, theirs)
    agreeing, ways = alignments(ours, turned) if transposed else plain
    if not transposed and sum(ours[name] == turned.get(name) for name in ours) > agreeing:
        raise InputError(
            f"{base.source} and {tuned.source}: the shapes agree once those of the matrices are reversed; "
            "--transposed compares weights that are stored the other way round"
        )
    if not agreeing and any(turned.get(n) == s or theirs.get(n) == s for n, s in _respelled(ours, theirs).items()):
        return "", ""
    if not agreeing and (common := [name for name in ours if name in theirs]):
        raise InputError(
            f"{base.source} and {tuned.source}: {len(common)} names in common, none of them with the same shape "
            f"(e.g. {common[0]}: {ours[common[0]]} and {theirs[common[0]]}); want two checkpoints of one size"
        )
    if not agreeing:
        raise InputError(
            f"{base.source} and {tuned.source}: no parameter in common by name and shape "
            f"(e.g. {bare_name(next(iter(base)))!r} and {bare_name(next(iter(tuned)))!r}); "
            "want two checkpoints of one architecture"
        )
    if len(ways) > 1 and len("".join(ways[0])) == len("".join(ways[1])):
        raise InputError(
            f"{base.source} and {tuned.source}: names can be aligned in several ways "
            f"({ways[0]} or {ways[1]} dropped); rename one side"
        )
    return ways[0]


def _shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    """(out, in) of a matrix, whichever way it is stored; of what else there is as it is."""
    shape = checkpoint.entries[name].shape
    return shape[::-1] if len(shape) == 2 and layout_of(name, checkpoint.entries) == "in_out" else shape


def _respelled(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Shapes of base by the names that tuned has for them, where these differ in separators alone."""
    return {their: ours[own] for their, own in _spellings(ours, theirs).items()}
