"""Names of parameters: without the components that wrappers insert, and without the prefix that one side adds."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from itertools import takewhile

from specbasis.checkpoint.entry import Checkpoint
from specbasis.core.errors import InputError

NUMBER = re.compile(r"(\w*\.|^)(\d+)(?=\.|$)")


_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def bare_name(name: str) -> str:
    """A name without the components that compilers and distributed wrappers insert."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def stripped(name: str, prefix: str) -> str:
    """A name without wrappers and without a prefix."""
    return bare_name(name).removeprefix(prefix)


def _prefixes(names: Iterable[str]) -> list[str]:
    """Leading dotted prefixes up to three components deep, the empty one too; with numbers where all share it."""
    names = list(names)
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    found = {"", *(".".join(shared[:depth]) + "." for depth in range(1, min(4, len(shared) + 1)))}
    for name in {NUMBER.sub(r"\g<1>00", name) for name in names}:
        parts = list(takewhile(lambda part: not part.isdigit(), name.split(".")[:-1]))
        found |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts) + 1))}
    return sorted(found)


def _may_drop(mine: str, other: str) -> bool:
    """Whether prefixes may be dropped from both sides: never two of a block, such as layers.3. and layers.5."""
    return not (mine and other) or (mine != other and not re.search(r"(^|\.)\d+\.", f"{mine}.{other}"))


def align(base: Checkpoint, tuned: Checkpoint, wanted: Collection[str] | None = None) -> tuple[str, str]:
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
    ours = {bare_name(name) for name in base.entries}
    theirs = {bare_name(name): name for name in tuned.entries}
    shortened = {mine: {name.removeprefix(mine) for name in ours} for mine in _prefixes(ours)}
    shifted = {other: {name.removeprefix(other): name for name in theirs} for other in _prefixes(theirs)}
    agreeing = {
        (mine, other): len(names & their_names.keys())
        for mine, names in shortened.items()
        for other, their_names in shifted.items()
        if _may_drop(mine, other)
    }
    most = max(agreeing.values())
    if most == 0:
        raise _nothing_agrees(base, tuned)
    by_partners: dict[tuple[str | None, ...], tuple[str, str]] = {}
    for way in sorted((way for way, n in agreeing.items() if n == most), key=lambda way: (len("".join(way)), way)):
        partners = (shifted[way[1]].get(stripped(name, way[0])) for name in wanted)
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
    ours = {bare_name(name): entry.shape for name, entry in base.entries.items()}
    theirs = {bare_name(name): entry.shape for name, entry in tuned.entries.items()}
    # The first and the last stand for all names that differ in numbers alone: the blocks of a stack agree together.
    alike: dict[str, list[str]] = defaultdict(list)
    for name in ours:
        alike[NUMBER.sub(r"\g<1>00", name)].append(name)
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
    mine, other = ({bare_name(name): name for name in checkpoint.entries} for checkpoint in (base, tuned))
    if common := [name for name in mine if name in other]:
        # Of one alone: a shape may cost a request.
        one, another = base.entries[mine[common[0]]].shape, tuned.entries[other[common[0]]].shape
        return InputError(
            f"{base.source} and {tuned.source}: {len(common)} names in common, none of them with the same shape "
            f"(e.g. {common[0]}: {one} and {another}); want two checkpoints of one size"
        )
    ours, theirs = (bare_name(next(iter(checkpoint.entries))) for checkpoint in (base, tuned))
    return InputError(
        f"{base.source} and {tuned.source}: no parameter in common by name and shape "
        f"(e.g. {ours!r} and {theirs!r}); want two checkpoints of one architecture"
    )
