"""Quantised matrices that a checkpoint stores in several tensors: packed codes, and scales and zeros beside them.

`packings.FAMILIES` is the table: which tensors signal a family, and the function that gives the matrix back. A
matrix is read when it is asked for; the tensors beside it vanish from the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from specbasis.checkpoint.entry import Entry, parsing, shown
from specbasis.checkpoint.formats.grid import Family, Parts, grid_entry, want
from specbasis.checkpoint.formats.packings import FAMILIES
from specbasis.core.errors import InputError
from specbasis.core.quantised import Grid

READ = ("bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "")
"""quant_method of config.json whose tensors are read here, or whose floating-point tensors are weights."""


def dequantised(entries: Mapping[str, Entry], config: Mapping[str, Any], source: str) -> dict[str, Entry]:
    """The tensors of a checkpoint with its quantised matrices as the numbers that they stand for.

    Raises:
        InputError: the tensors of such a matrix do not fit together, or a method stored some that is not read here.
    """
    places = ("quantization_config", "compression_config", "quantization")
    setting: Any = next((config[place] for place in places if place in config), {})
    settings = setting if isinstance(setting, Mapping) else {}
    result, beside, renamed = dict(entries), set[str](), dict[str, str]()
    for name, family in _families(entries):
        stem = name[: len(name) - len(family.leaf)]
        leaves = [leaf for leaf in (family.leaf, *family.needs, *family.also) if stem + leaf in entries]
        parts = Parts(stem, family.leaf, {leaf: entries[stem + leaf] for leaf in leaves}, settings)
        renamed[name] = whole = stem + family.name
        with parsing(name, source):
            want(whole == name or whole not in entries, f"{whole} is there as well")
            shape, stored, read = family.build(parts)
        entry = grid_entry(shape, stored, _reader(read, name, shape, source))
        if parts.stacked and family.in_stacks:
            entry = replace(entry, member=partial(_member, family, parts, name, shape[1:], source))
        result[name] = entry
        beside |= {stem + leaf for leaf in leaves} - {name}
    method = str(settings.get("quant_method", ""))
    left = [n for n, e in result.items() if n not in beside and len(e.shape) > 1 and not e.is_float]
    if method not in READ and left:
        raise InputError(
            f"{source}: is quantised by {shown(method)!r}, which is not read here (e.g. {left[0]!r} is stored as "
            f"{result[left[0]].dtype}); load it with transformers, call dequantize() and save_pretrained on it"
        )
    return {renamed.get(name, name): entry for name, entry in result.items() if name not in beside}


def _families(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Family]]:
    """The names of codes, and the first family whose tensors are there."""
    for name, entry in entries.items():
        for family in FAMILIES:
            stem = name[: len(name) - len(family.leaf)]
            if (
                entry.dtype in family.dtypes
                and name.endswith(family.leaf)
                and all(stem + n in entries for n in family.needs)
            ):
                yield name, family
                break


def _member(family: Family, parts: Parts, name: str, shape: tuple[int, ...], source: str, place: int) -> Grid:
    """One matrix of a stack."""
    with parsing(name, source):
        *_, read = family.build(parts.member(place))
    return _reader(read, name, shape, source)()


def _reader(read: Callable[[], Grid], name: str, shape: tuple[int, ...], source: str) -> Callable[[], Grid]:
    def checked() -> Grid:
        with parsing(name, source):
            grid = read()
            want(tuple(grid.values.shape) == shape, f"{tuple(grid.values.shape)} numbers for {shape}")
            return grid

    return checked
