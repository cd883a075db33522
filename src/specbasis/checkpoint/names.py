"""Names of parameters: without what wrappers insert, and aligned where one of two models adds a prefix."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile

NUMBER = re.compile(r"(\w*\.|^)(\d+)(?=\.|$)")
"""A number among the components of a name, and the component before it."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def bare_name(name: str) -> str:
    """A name without the components that compilers and distributed wrappers insert."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def stripped(name: str, prefix: str) -> str:
    """A name without wrappers and without a prefix."""
    return bare_name(name).removeprefix(prefix)


def spelled(name: str) -> str:
    """A name with one separator: libraries write layer_0 weight, layer/0/weight and layer.0.weight."""
    return re.sub(r"[ _/.]+", ".", name)


def namesakes(name: str, names: Collection[str]) -> list[str]:
    """The name itself where it is among the names, else those that differ in leading components of either alone."""
    if name in names:
        return [name]
    return [other for other in names if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]


def alignments(ours: Mapping[str, object], theirs: Mapping[str, object]) -> tuple[int, list[tuple[str, str]]]:
    """The prefixes to drop from the names of two sides so that the most names agree.

    Names that differ in numbers alone are judged by the first and the last of them: the blocks of a stack agree
    together. Where both sides drop a prefix, half of the names of one must agree, and where either does, in more
    than the word behind the last dot: ``embed.weight`` and ``head.weight`` have nothing in common.
    Costs (prefixes of either side, multiplied) × (names without their numbers).

    Args:
        ours: name without wrappers → what has to be equal for two names to agree: a shape, a size, or nothing.
        theirs: the same of the other side.

    Returns:
        how many of our names agree at most, and the pairs of prefixes under which so many do, the shortest first;
        of those that give our names the same partners only the first. Names that agree as they are need no
        prefix dropped: where half of them do, or the prefixes that more agree without are in doubt.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in ours:
        alike[NUMBER.sub(r"\g<1>00", name)].append(name)
    alone = any(all("." not in name for name in side) for side in (ours, theirs))  # a module by itself

    def may_be_leaf(left: str, right: str) -> bool:
        return not (left or right) or (alone and not (left and right))

    lefts = _prefixes(ours)
    agreeing = Counter[tuple[str, str]]()
    for right in _prefixes(theirs):
        partners = {name.removeprefix(right): name for name in theirs}
        for left in (prefix for prefix in lefts if _may_drop(prefix, right)):
            for group in alike.values():
                bare = ((name, name.removeprefix(left)) for name in {group[0], group[-1]})
                # Without its whole module a name is "weight", which every module has.
                pairs = (
                    (name, partners.get(rest)) for name, rest in bare if may_be_leaf(left, right) or "." in rest
                )
                agree = any(partner is not None and theirs[partner] == ours[name] for name, partner in pairs)
                agreeing[left, right] += len(group) * agree
    least = min(len(ours), len(theirs)) / 2
    agreeing = Counter({way: n for way, n in agreeing.items() if n >= least or not all(way)})
    plain = agreeing["", ""]
    if plain >= max(least, 1):
        return plain, [("", "")]
    most = max(agreeing.values(), default=0)
    ways = sorted((way for way, n in agreeing.items() if n == most), key=lambda way: (len("".join(way)), way))
    distinct: dict[tuple[str | None, ...], tuple[str, str]] = {}
    for left, right in ways if most else ():
        partners = {name.removeprefix(right): name for name in theirs}
        distinct.setdefault(tuple(partners.get(name.removeprefix(left)) for name in ours), (left, right))
    if plain and len(distinct) > 1:
        return plain, [("", "")]
    return most, list(distinct.values())


def _prefixes(names: Iterable[str]) -> list[str]:
    """Leading dotted prefixes up to three components deep, the empty one too; with numbers where all share it."""
    names = list(names)
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    prefixes = {"", *(".".join(shared[:depth]) + "." for depth in range(1, min(4, len(shared) + 1)))}
    for name in {NUMBER.sub(r"\g<1>00", name) for name in names}:
        parts = list(takewhile(lambda part: not part.isdigit(), name.split(".")[:-1]))
        prefixes |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts) + 1))}
    return sorted(prefixes)


def _may_drop(left: str, right: str) -> bool:
    """Whether prefixes may be dropped from both sides: never two of a block, such as layers.3. and layers.5."""
    return not (left and right) or (left != right and not re.search(r"(^|\.)\d+\.", f"{left}.{right}"))
