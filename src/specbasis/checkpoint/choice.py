"""Choice: which files of a place hold the model, by their names and the index, each shard checked against it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from specbasis.checkpoint.entry import ABSENT, Checkpoint, Entry, check_names, json_object, no_key, reading, shown
from specbasis.checkpoint.formats import endings
from specbasis.checkpoint.formats.grid import rounding_share
from specbasis.checkpoint.formats.quantised import dequantised
from specbasis.checkpoint.places import Place
from specbasis.core.errors import InputError

USUAL = tuple(
    name + ending
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin",
                 "diffusion_pytorch_model.bin")
    for ending in ("", ".index.json")
)  # fmt: skip
"""The names that transformers and diffusers look for, in their order."""

_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_REFUSED = ("*.h5", "*.msgpack", "*.ckpt.index")
"""Weights of other frameworks: where there is nothing else, the message says how to convert them."""

_BESIDE = ("adapter_model.*", "training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*",
           "random_states*", "openvino_*")  # fmt: skip
"""Files that lie beside a model's weights and are not them."""

_SHARES = (
    ("*zero_pp_rank_*", "a checkpoint of DeepSpeed ZeRO", "python zero_to_fp32.py . OUT where that script lies"),
    ("*.distcp", "a distributed checkpoint of torch (DCP, FSDP)",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pt"),
    ("*manifest.ocdbt", "a checkpoint of Orbax",
     "orbax.checkpoint's restore, and safetensors.flax.save_file on the flattened dictionary"),
    ("*.keras", "a model of Keras", """python -c "import keras, numpy; model = keras.saving.load_model('IN'); """
     """numpy.savez('OUT.npz', **{w.path: w.numpy() for w in model.weights})\""""),
)  # fmt: skip
"""Pattern of a file's name → what it is part of, and the command that makes a checkpoint that is read."""

_LORA = re.compile(r"[._](lora_|lora\.|lora_linear_layer\.)(down|up|mid)\.weight$")
"""Names of factors that kohya, ComfyUI and older diffusers give."""

_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\..*)$")


def open_place(place: Place, key: str = "") -> Checkpoint:
    """Open the weights in a place: the file that was named, the usual names, an index, or complete shards.

    Raises:
        InputError: as `open_checkpoint`.
    """
    with reading(place.source):
        names = [place.given] if place.given else _choose(place)
        notes: list[str] = []
        entries: Mapping[str, Entry]
        if names[0].endswith(".index.json"):
            no_key(key, place.source)
            entries, names, notes = _open_index(place, names[0])
        elif place.given or (len(names) == 1 and not _SHARD.match(names[0])):
            entries = place.entries(names[0], key)
        else:
            no_key(key, place.source)
            entries = _open_shards(place, names)
        if not entries:
            raise InputError(f"{place.source}: holds no tensors")
        config, config_notes = read_config(place, "config.json")
        _refuse_lora(entries, place.source)
        entries = dequantised(entries, config, place.source)
        files, digests = place.provenance(names)
        notes = [*notes, *config_notes, *_beside(place, names), *_quantised(entries, bool(files))]
        return Checkpoint(place.source, entries, files, config, place.revision, digests, tuple(notes))


def read_config(place: Place, name: str) -> tuple[dict[str, Any], list[str]]:
    """A JSON object as data, empty where there is none, and notes of what was wrong; code it names is never run."""
    if name not in (_siblings(place) if place.given else place.names):
        return {}, []
    try:
        return json_object(place.text(name)), []
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        return {}, [f"{name} is not a JSON object and was ignored"]


def _siblings(place: Place) -> Collection[str]:
    """Names beside a file that the user named: a folder that cannot be listed is no reason to refuse the file."""
    try:
        return place.names
    except OSError:
        return ()


def _choose(place: Place) -> list[str]:
    """Names of the files that hold a place's weights."""
    names = [name for name in place.names if not any(fnmatchcase(name, pattern) for pattern in _BESIDE)]
    for usual in USUAL:
        if usual in names:
            return [usual]
    if "method.json" in names:
        raise InputError(
            f"{place.source}: holds what a finetune trained, and its method has no format that is read without its "
            "base; write the whole model with `specbasis adapter merge`, and use that"
        )
    _refuse_shares(place, place.names)
    weights = [f"*{ending}" for ending in endings()]
    for pattern in (*_INDICES, *weights, *_REFUSED):
        chosen = sorted(name for name in names if fnmatchcase(name, pattern))
        if pattern in _INDICES and len(chosen) > 1:
            raise _ambiguous(place, chosen)
        if chosen:
            return chosen
    _refuse_shares(place, place.below())
    below = sorted({path.split("/")[0] for path in place.below() if Path(path).suffix in (".safetensors", ".bin")})
    hint = f"; there are some in its folders {', '.join(map(shown, below[:6]))}: name one" if below else ""
    raise InputError(f"{place.source}: no weights in this folder; want one of {', '.join(weights[:5])}{hint}")


def _refuse_shares(place: Place, names: Iterable[str]) -> None:
    """Refuse a folder in which every process wrote its share, with the command that makes one checkpoint."""
    for name, (pattern, kind, command) in product(names, _SHARES):
        if fnmatchcase(name, pattern):
            raise InputError(
                f"{place.source}: {shown(name)} is a part of {kind}, which is not read here; once run {command}"
            )


def _beside(place: Place, names: list[str]) -> list[str]:
    """Notes of what was not read: the other shards of one that was named, the same model in shards, an adapter."""
    shard = _SHARD.match(place.given)
    if shard:
        return [f"{shown(place.given)} is one of {int(shard.group(3))} shards; only its tensors were read"]
    others = () if place.given else (f"{names[0]}.index.json", "adapter_config.json")
    return [f"{other} lies beside the weights and was not read" for other in others if other in place.names]


def _refuse_lora(entries: Mapping[str, Entry], source: str) -> None:
    """Refuse the factors of an adapter without a configuration that says what they change, and how much."""
    matrices = [name for name, entry in entries.items() if len(entry.shape) > 1]
    if matrices and all(_LORA.search(name) for name in matrices):
        raise InputError(
            f"{source}: holds the factors of a LoRA in the names of kohya or diffusers, and no model; with "
            "diffusers call pipe.load_lora_weights(FILE), pipe.fuse_lora(), pipe.save_pretrained(OUT), and use OUT"
        )


def _quantised(entries: Mapping[str, Entry], at_hand: bool) -> list[str]:
    """A note of what is stored quantised, with the size of the rounding in the smallest such matrix on disk."""
    stored = {name: entry for name, entry in entries.items() if entry.stored}
    if not stored:
        return []
    forms = ", ".join(f"{form} ({n})" for form, n in Counter(entry.stored for entry in stored.values()).items())
    note = f"stored quantised, and read as what the numbers stand for: {forms}"
    known = sorted((prod(entry.shape), name) for name, entry in stored.items() if entry.grid and prod(entry.shape))
    if not (known and at_hand):
        return [note]
    name = known[0][1]
    share = f"{rounding_share(stored[name]):.1%}"
    return [
        f"{note}; rounding is about {share} of the weights in {name}, and turns trailing singular vectors by itself"
    ]


def _open_index(place: Place, index: str) -> tuple[dict[str, Entry], list[str], list[str]]:
    """The shards that an index names: each must be there and, when opened, hold what the index says and no more."""
    try:
        weight_map = json_object(place.text(index))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{place.source}: {index} is not an index (want a JSON object whose weight_map maps names to files)"
        ) from error
    check_names(weight_map, place.source)
    unlisted = set(place.names) - set(shards)
    series = {number.group(1, 3, 4) for shard in shards if (number := _SHARD.match(shard))}
    for name in sorted(unlisted):
        number = _SHARD.match(name)
        if number and number.group(1, 3, 4) in series:
            raise InputError(
                f"{place.source}: {shown(name)} is here, and {index} does not list it; repair the index or remove "
                "the file"
            )
    here = [shard for shard in shards if place.require(shard)]
    parts = dict(zip(here, place.all_entries(here), strict=True))
    for shard, part in parts.items():
        _check_part(part, shard, weight_map, index, place.source)
    entries = {
        name: parts[shard][name] if shard in parts else _absent(place, shard, name)
        for name, shard in weight_map.items()
    }
    left = [name for name in sorted(unlisted) if name.endswith(Path(shards[0]).suffix)] if shards else []
    left = [name for name in left if not any(fnmatchcase(name, pattern) for pattern in _BESIDE)]
    notes = [f"not in {index} and not read: {', '.join(map(shown, left))}"] if left else []
    return entries, shards, notes


def _check_part(
    part: Mapping[str, Entry], shard: str, weight_map: Mapping[str, str], index: str, source: str
) -> None:
    """Refuse a shard that does not hold what the index says, or more."""
    listed = {name for name, file in weight_map.items() if file == shard}
    for name in sorted(listed - set(part)):
        raise InputError(f"{source}: {index} puts {name!r} into {shard}, which does not hold it")
    for name in sorted(set(part) - listed):
        other = weight_map.get(name)
        raise InputError(
            f"{source}: {shard} holds {len(set(part) - listed)} tensors that {index} "
            f"{f'puts into {other}' if other else 'does not list'}, e.g. {name!r}; repair the index"
        )


def _absent(place: Place, shard: str, name: str) -> Entry:
    return Entry((), ABSENT, lambda: place.all_entries([shard])[0][name].load())


def _open_shards(place: Place, names: list[str]) -> dict[str, Entry]:
    """Open shards that no index names, when their own numbering shows that none is missing."""
    numbers = [_SHARD.match(name) for name in names]
    series = {number.group(1, 3, 4) if number else None for number in numbers}
    if len(series) != 1 or None in series:
        raise _ambiguous(place, names)
    expected = int(next(number.group(3) for number in numbers if number))
    if sorted(int(number.group(2)) for number in numbers if number) != list(range(1, expected + 1)):
        raise InputError(f"{place.source}: {len(names)} of {expected} shards are here, and no index names them all")
    entries: dict[str, Entry] = {}
    for shard, part in zip(names, place.all_entries(names), strict=True):
        twice = sorted(set(part) & set(entries))
        if twice:
            raise InputError(f"{place.source}: {twice[0]!r} is in {shown(shard)} and in another shard")
        entries |= part
    return entries


def _ambiguous(place: Place, names: list[str]) -> InputError:
    some = ", ".join(map(shown, names[:4])) + (", …" if len(names) > 4 else "")
    return InputError(f"{place.source}: several weights files ({some}) and nothing says which; name one")
