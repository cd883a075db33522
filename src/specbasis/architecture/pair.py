"""Pairing: the matrices that two checkpoints have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from specbasis.architecture.cut import unusable
from specbasis.architecture.family import Family
from specbasis.architecture.key import Admits, MatrixKey, MatrixRef, Skipped
from specbasis.architecture.recognise import equal_values, mapped_with_reader
from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.names import align, stripped


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
    model, reader = mapped_with_reader(base, admits)
    refs = (*model.matrices, *model.shared)
    partial = admits is not None and bool(base.shards or tuned.shards)
    drop_base, drop_tuned = align(base, tuned, {ref.parameter for ref in refs} if partial else None)
    theirs = {stripped(name, drop_tuned): name for name in tuned}
    counterparts = (theirs.get(stripped(ref.parameter, drop_base)) for ref in refs)
    at_hand = {tuned.shards.get(name) for name in counterparts if name} | {None} if partial else None
    untied = _untied(model.shared, tuned, theirs, drop_base, at_hand)
    matched: list[MatrixPair] = []
    skipped: list[Skipped] = []
    notes: list[str] = list(model.notes)
    if drop_base or drop_tuned:
        notes.append(f"names aligned: base without {drop_base!r}, tuned without {drop_tuned!r}")

    for ref in (*model.matrices, *untied):
        other = theirs.get(stripped(ref.parameter, drop_base))
        if other is None:
            skipped.append(Skipped(ref.key.name, "base", "not in tuned"))
            continue
        shape, their_shape = base.entries[ref.parameter].shape, tuned.entries[other].shape
        partner = replace(ref, parameter=other)
        whole = ref.rows is None and ref.columns is None and ref.expert is None and not ref.transposed
        if reason := unusable(other, tuned.entries):
            skipped.append(Skipped(ref.key.name, "both", f"in tuned: {reason}"))
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
    ours = {stripped(name, drop_base) for name in base}
    skipped += [
        replace(item, side="both" if stripped(item.name, drop_base) in theirs else "base")
        for item in model.skipped
        if item.name not in {ref.key.name for ref in untied}
    ]
    for bare, name in theirs.items():
        if bare not in ours and (admits is None or reader.is_wanted(drop_base + bare, admits)):
            known = at_hand is None or tuned.shards.get(name) in at_hand
            skipped.append(Skipped(name, "tuned", (known and unusable(name, tuned.entries)) or "not in base"))
    return Pairing(model.family, tuple(matched), tuple(skipped), tuple(notes))


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
        mine, other = theirs.get(stripped(ref.parameter, prefix)), theirs.get(stripped(twin, prefix))
        if mine and other:
            known = at_hand is None or tuned.shards.get(other) in at_hand
            found += [] if known and equal_values(tuned, mine, other) else [ref]
    return found
