"""Recognition: what the parameters of a model mean: block, role, and how to read each as matrices (out, in).

A checkpoint may hold several stacks of blocks (an encoder and a decoder, a vision and a text tower), each claimed
by the family whose recognising names all occur in it. A claim needs that evidence; a matrix that no pattern of its
family names, or whose shape contradicts the pattern, gets the role ``other``, and a note says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import prod
from typing import Any

from specbasis.architecture.cut import (
    ADAPTER,
    Names,
    Part,
    Place,
    cut,
    is_matrix_like,
    layout_of,
    matrix_size,
    may_be_tied,
    meaning,
    not_a_matrix,
    part_label,
    place_of,
    shared_values,
    unnamed_part,
    unusable,
)
from specbasis.architecture.family import (
    STRUCTURAL,
    Family,
    Rule,
    claims,
    family_named,
    is_inside,
    skeleton_of,
)
from specbasis.architecture.key import ROLES, Admits, MatrixKey, MatrixRef, Skipped
from specbasis.checkpoint import Checkpoint
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
    where an embedding and a head have equal shape and config.json does not say that they are not tied: then both
    are read and compared, unless neither is wanted.

    Args:
        checkpoint: the model.
        admits: which matrices are wanted; all when None. A parameter that by its name can hold none of them is not
            listed as skipped. The notes speak of the whole model.
    """
    return Recognition(checkpoint).model(admits)


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


@dataclass(frozen=True)
class Reading:
    """What a name alone tells of a parameter.

    Attributes:
        tower: the container of the stack whose blocks hold it.
        rule: the entries of a family's file that may hold for it.
        place: where it lies when one of them holds.
        around: where it lies when none does.
    """

    tower: str | None
    rule: Rule | None
    place: Place | None
    around: Place | None

    @property
    def entries(self) -> tuple[Mapping[str, Any], ...]:
        """The [[matrix]] entries that may hold for it."""
        return self.rule.entries if self.rule else ()


# --- the whole model --------------------------------------------------------------------------------------------


class Recognition:
    """A model's names, read: rules, blocks counted on over stages, stacks labelled by what differs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.names = Names(checkpoint)
        self.towers = claims(self.names.skeletons, self.names.shape)
        self._rules: dict[str, tuple[str | None, Rule | None]] = {}
        self._readings = {name: self._read(bare) for name, bare in self.names.bare.items()}
        numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        owner: dict[str, Family] = {}
        for reading in self._readings.values():
            place = reading.place or reading.around
            if place is not None and reading.tower is not None:
                numbers[place.container].add(place.numbers)
                owner[place.container] = self.towers[reading.tower]
        # A name that lies in a stage but in no block of it has fewer numbers than a block has.
        self._depth = {container: max(map(len, stages)) for container, stages in numbers.items()}
        self._rank = {
            container: {stage: i for i, stage in enumerate(sorted(s for s in stages if len(s) == depth))}
            for (container, stages), depth in zip(numbers.items(), self._depth.values(), strict=True)
        }
        self._labels = _labels(owner)

    def model(self, admits: Admits | None) -> ModelMap:
        """`model_map` of this checkpoint."""
        matrices: list[MatrixRef] = []
        skipped: list[Skipped] = []
        unnamed: list[str] = []
        doubts = Counter[str]()
        for name, reading in self._readings.items():
            parts, doubt, reason = self._parts(name, reading)
            if reason:
                named = any(entry.get("skip") == reason for entry in reading.entries)
                size = 0 if named else matrix_size(name, self.checkpoint.entries)
                skipped += [Skipped(name, "both", reason, size)] if self.may_hold(name, admits) else []
                continue
            named = bool(parts) and not doubt
            place = reading.place if parts else reading.around
            doubts.update([doubt] if doubt else [])
            shape = self.checkpoint.entries[name].shape
            if (
                not parts
            ):  # no pattern names it: a kernel by its axes, else other; its block where its tower tells it
                named = len(shape) > 2
                parts = (unnamed_part(shape, layout_of(name, self.checkpoint.entries)),)
            unnamed += [] if named else [name]
            block, stack = self._where(name, place, named)
            matrices += (
                MatrixRef(MatrixKey(block, part.role, name + part.label, stack), name, part.shape, **part.cut)
                for part in parts
            )
        wanted = [ref for ref in matrices if admits is None or admits(ref.key)]
        shared = shared_values(matrices, self.checkpoint) if any(map(may_be_tied, wanted)) else {}
        family = self._main_family()
        whole = ModelMap(
            family,
            tuple(ref for ref in matrices if ref not in shared),
            tuple(skipped),
            self.towers,
            tuple(unnamed),
            shared,
            tuple(f"{n} parameters: {text}" for text, n in doubts.items()),
        )
        twins = {ref: shared[ref] for ref in wanted if ref in shared}
        skipped += (
            Skipped(ref.key.name, "both", f"holds the values of {twin} (tied weights): counted once")
            for ref, twin in twins.items()
        )
        asked = {ref.parameter for ref in wanted}
        return replace(
            whole,
            matrices=tuple(ref for ref in wanted if ref not in shared),
            skipped=tuple(skipped),
            unnamed=tuple(name for name in unnamed if name in asked),
            shared=twins,
            notes=(*whole.notes, *self._remarks(whole)),
        )

    def may_hold(self, name: str, admits: Admits | None) -> bool:
        """Whether a parameter of this model, or of one with its names, may hold a wanted matrix, by its name."""
        return admits is None or any(map(admits, self._keys(name)))

    def _keys(self, name: str) -> Iterator[MatrixKey]:
        """Keys of the matrices that a parameter may hold, by its name: other where no pattern names it."""
        reading = self._readings.get(name) or self._read(bare_name(name))
        for entry in reading.entries:
            for role in entry.get("rows") or entry.get("columns") or [entry.get("role")]:
                if role is not None:
                    block, stack = self._where(name, reading.place, named=True)
                    yield MatrixKey(block, role, name + ("" if "role" in entry else part_label(role)), stack)
        if not reading.entries:
            block, stack = self._where(name, reading.around, named=False)
            yield MatrixKey(block, "other", name, stack)

    def _parts(self, name: str, reading: Reading) -> tuple[tuple[Part, ...], str, str]:
        """The matrices of a parameter that its family names, a doubt about them, and why it is none."""
        entry = self.checkpoint.entries[name]
        reason = unusable(name, self.checkpoint.entries)
        if reason:
            return (), "", reason
        layout = layout_of(name, self.checkpoint.entries)
        meant = meaning(reading.entries, entry.shape, reading.place, self.names)
        if meant is None:
            return (), "", not_a_matrix(name, entry, layout)
        if "skip" in meant:
            return (), "", meant["skip"]
        if layout == "in_out" and "layout" not in meant:
            return (), "", ""  # a family's names in another library's layout: its roles are not sure
        return *cut(meant, entry.shape, reading.place, self.names), ""

    def _read(self, bare: str) -> Reading:
        skeleton = skeleton_of(bare)
        if skeleton not in self._rules:
            self._rules[skeleton] = self._rule(skeleton)
        tower, rule = self._rules[skeleton]
        match = rule.regex.search(bare) if rule else None
        return Reading(
            tower,
            rule if match else None,
            place_of(bare, match) if match and "block" in match.re.groupindex else None,
            None if tower is None else self._around(bare, skeleton, tower),
        )

    def _rule(self, skeleton: str) -> tuple[str | None, Rule | None]:
        """The tower whose blocks hold a skeleton, and the entry that names it.

        Inside a block only the family that claims it gives a role, and what all families share may mark a table;
        outside of the blocks the family of the nearest tower comes first.
        """
        for container, family in self.towers.items():
            if is_inside(skeleton, container) and (rule := family.block_rule(skeleton, container)):
                return container, rule
        tower = next((c for c, family in self.towers.items() if family.block_at(skeleton, c)), None)
        near = [tower] if tower is not None else sorted(self.towers, key=lambda c: -_common_components(c, skeleton))
        for family in dict.fromkeys((*(self.towers[c] for c in near), family_named("common"))):
            only_tables = not self.towers or (tower is not None and family.name == "common")
            if rule := family.outer_rule(skeleton, only_tables=only_tables):
                return tower, rule
        return tower, None

    def _around(self, bare: str, skeleton: str, tower: str) -> Place | None:
        """The place of a name that lies in a tower's blocks, whatever it is."""
        block = self.towers[tower].block_at(skeleton, tower)
        if not block:
            return None
        parts = bare.split(".")
        start = len(tower.split(".")) if tower else 0
        stop = start + block.count(".")
        numbers = tuple(int(part) for part in parts[start:stop] if part.isdigit())
        base = ".".join(parts[:stop])
        return Place(".".join(parts[:start]), numbers, base, bare[len(base) :])

    def _where(self, name: str, place: Place | None, named: bool) -> tuple[int | None, str]:
        """Block and stack of a parameter that lies in a place, or in none."""
        if place is not None:
            single = self._depth.get(place.container, 1) == 1
            block = place.numbers[0] if single else self._rank[place.container].get(place.numbers)
            return block, self._labels.get(place.container, ("", ""))[0]
        if self.towers and named:
            bare = bare_name(name)
            inside = (label for label, path in self._labels.values() if path and is_inside(bare, path))
            return None, next(inside, "")
        # Unknown: the block is the first number among the components, and the stack what stands before it.
        components = name.split(".")
        before = list(takewhile(lambda part: not part.isdigit(), components))
        if len(before) == len(components):
            return None, ""
        return int(components[len(before)]), ".".join(before)

    def _main_family(self) -> Family:
        """The family whose patterns name most parameters in its blocks; of equals the first."""
        counts = Counter(
            self.towers[reading.tower].name
            for reading in self._readings.values()
            if reading.tower is not None and any("skip" not in entry for entry in reading.entries)
        )
        most = family_named(counts.most_common(1)[0][0]) if counts else None
        return most or next(iter(self.towers.values()), STRUCTURAL)

    def _remarks(self, whole: ModelMap) -> Iterator[str]:
        """What a person should know before trusting the roles."""
        if self.towers and whole.unnamed:
            counted = coverage(whole, self.checkpoint)
            share = counted.unnamed / max(1, counted.total)
            yield (
                f"{len(whole.unnamed)} matrices ({share:.1%} of the matrix parameters) are not in the map of "
                f"{whole.family.name} and have the role other, e.g. {whole.unnamed[0]}"
            )
        if any(ADAPTER.search(name) for name in self.checkpoint.entries):
            yield "holds an adapter that is not merged: the matrices it adapts are read without it"
        blocks: dict[tuple[str, str], set[int]] = defaultdict(set)
        for ref in whole.matrices if self.towers else ():
            if ref.key.block is not None:
                blocks[ref.key.stack, ref.parameter.split(".")[0]].add(ref.key.block)
        for (stack, _), numbers in blocks.items():
            missing = sorted(set(range(max(numbers))) - numbers)
            if missing:
                where = f" of {stack}" if stack else ""
                shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
                yield f"blocks {shown}{where} hold no matrix"
        for family in dict.fromkeys(self.towers.values()):
            times = self.checkpoint.config.get(family.repeated)
            stored = len({ref.key.block for ref in whole.matrices} - {None})
            if isinstance(times, int) and times > stored:
                yield f"{stored} stored block(s) are run through {times} times ({family.repeated}) and counted once"


def _common_components(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False)))


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
