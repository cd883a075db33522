"""A PEFT adapter folder and its base, read as the tuned model.

LoRA, DoRA, rank-stabilised LoRA, PiSSA, AdaLoRA and spectral adapters. What the adapter leaves alone is the base's
own entry. What it changes is computed on access, one matrix at a time, in float32 (float64 over a float64 base) and
never rounded to a narrower type of the base, in which a small update can vanish:

    tuned = base + s B A,              LoRA, s = alpha / r, or alpha / √r with use_rslora
    tuned = base + s B diag(E) A,      AdaLoRA, s = alpha / (init_r + 1e-5)
    tuned = base + U C Vh,             spectral, this project's own
    tuned = m ⊙ (base + s B A) / ‖base + s B A‖,  DoRA, one norm for each output

Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Liu et al. 2024 (DoRA, Eq. 5); Meng et al. 2024 (PiSSA);
Zhang et al. 2023 (AdaLoRA, Eq. 3), in the file format of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.adapter_file import CONFIG, AdapterFile, read_adapter
from specbasis.checkpoint.choice import read_config
from specbasis.checkpoint.entry import Checkpoint, Entry, shown
from specbasis.checkpoint.formats.safetensors import base_sha256
from specbasis.checkpoint.live_names import adapted_class, live_names, without_memory
from specbasis.checkpoint.names import alignments
from specbasis.checkpoint.places import Place
from specbasis.checkpoint.spectral import spectral_factors
from specbasis.core.errors import InputError
from specbasis.core.patterns import Matcher
from specbasis.core.svd import decompose

_REFUSED = {
    "layer_replication": "replicated layers have no counterpart in the base",
    "trainable_token_indices": "single trained rows of an embedding are not read",
    "target_parameters": "adapters of bare parameters (experts) are not read",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it mixes adapters by token",
    "use_qalora": "it acts on pooled inputs of a quantised model",
    "use_bdlora": "block-diagonal factors are not read",
    "kasa_config": "its base is truncated first",
    "monteclora_config": "it samples its factors",
}
"""Fields of an adapter's config that, when set, make the tuned matrix something else than the formulas above."""

_KINDS = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "SPECTRAL": "spectral"}
"""The kinds that are read, by PEFT's name for them."""

_MUTATED = ("olora", "corda", "loftq", "lora_ga", "pissa_niter")
"""Initialisations that change the base in a way that the adapter's files do not tell."""


def open_adapter(place: Place, base: Checkpoint) -> Checkpoint:
    """The tuned model that an adapter makes of its base.

    Args:
        place: the adapter's folder: adapter_config.json and adapter_model.safetensors (or .bin, without code).
        base: the checkpoint that it was trained on.

    Returns:
        A checkpoint with the base's names, plus modules that only the adapter has (a new head), and the config.json
        of the adapter's folder, or the base's with as many labels as a stored head has. Entries
        that are not adapted are the base's own objects. Low-rank updates have `Entry.factors`; DoRA, which rescales
        every row, has none.

    Raises:
        InputError: another kind of adapter, one that needs what is not in its files, a tensor that is not
            understood, or modules that the base does not have in these shapes.
    """
    file = read_adapter(place)
    _check(file)
    file.prove()
    modules = file.modules
    if file.kind == "SPECTRAL":
        modules = spectral_factors(file, lambda module: base[names.parameter(module)])
    names = _Names(base, modules, place.source)
    saved = {names.saved(path): entry for path, entry in file.saved.items()}
    adapted = {names.parameter(module): module for module in modules}
    in_out = _stored_in_out(file.config, {module: name for name, module in adapted.items()}, modules, base)
    entries = {**base.entries, **saved}
    matcher = Matcher(f"{place.source}: {CONFIG}")
    for name, module in adapted.items():
        entries[name] = _Update(module, modules[module], file, entries[name], in_out, matcher).entry()
    made_from = next((base_sha256(path) for path in file.files if path.suffix == ".safetensors"), "")
    return replace(
        base,
        source=file.source,
        entries=entries,
        files=file.files,
        config=read_config(place, "config.json")[0] or _tuned_config(base.config, file),
        digests=file.digests,
        revision=file.revision,
        under=base,
        made_from=made_from,
        notes=(
            f"{_KINDS[file.kind]} adapter on {base.source}: {len(modules)} modules adapted, "
            f"{len(file.saved)} tensors replaced",
            *([] if made_from or file.kind == "SPECTRAL" else _other_base(file.config, base.source)),
        ),
    )


def _other_base(config: Mapping[str, Any], source: str) -> list[str]:
    """A note where an adapter whose file proves no base names one that is called otherwise than this."""
    named = str(config.get("base_model_name_or_path") or "")
    last, own = (re.split(r"[/:\\]", text.partition("@")[0].rstrip("/"))[-1].lower() for text in (named, source))
    if not named or last == own or named.replace("/", "--") in source:  # as the Hub's cache calls its folders
        return []
    return [f"the adapter names {shown(named)} as its base; whether these are the same weights it does not say"]


def _tuned_config(config: Mapping[str, Any], file: AdapterFile) -> Mapping[str, Any]:
    """A base's configuration with the class that an adapter was trained on and the labels that it stores."""
    heads = [
        entry.shape
        for name, entry in file.saved.items()
        if re.fullmatch(r"(classifier|score)\.(.*\.)?weight", name)
    ]
    if config and (model_class := adapted_class(config, file.config)):
        config = {**config, "architectures": [model_class]}
    if not config or not heads or len(heads[-1]) < 2 or heads[-1][0] == len(config.get("id2label") or (0, 1)):
        return config
    names = [f"LABEL_{label}" for label in range(heads[-1][0])]
    return {**config, "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def alone(adapted: Checkpoint) -> Checkpoint:
    """An adapter on its base as a model of its own: no update is low-rank against whatever it is compared with."""
    under = adapted.under
    assert under is not None
    entries = {name: replace(entry, factors=None) for name, entry in adapted.entries.items()}
    digests = {**{f"base {name}": digest for name, digest in under.digests.items()}, **adapted.digests}
    return replace(adapted, entries=entries, files=(*under.files, *adapted.files), digests=digests)


def _check(file: AdapterFile) -> None:
    """Refuse an adapter whose tuned matrices the formulas of this module do not give."""
    source, config = file.source, file.config
    merge = "merge it with peft (merge_and_unload), save the model, and use that"
    if file.kind not in _KINDS:
        raise InputError(
            f"{source}: a PEFT adapter of kind {file.kind[:40]!r}; LoRA, DoRA, PiSSA, AdaLoRA, spectral ones are "
            f"read; for others, {merge}"
        )
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise InputError(f"{source}: its {CONFIG} sets {name}: {reason}; {merge}")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_MUTATED):
        raise InputError(
            f"{source}: initialised with {start[:40]!r}, which changes the base; save it again with peft's "
            f"path_initial_model_for_weight_conversion, or {merge}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{source}: {name} in {CONFIG} is not a JSON object")


class _Names:
    """How the adapter's module names map to the base's parameter names.

    An adapter has the names that the model had in memory, which transformers changes in some families as it loads
    them: where the stored names do not fit, the base's are taken by those.

    An adapter is saved from a whole model (``transformer.h.0…``), a base often from its body (``h.0…``). One
    leading prefix is dropped on either side, so that the base has every adapted module in its size. Where that is
    so for several parts of the base (two towers of one shape), it is refused: a wrong pair is worse than none.
    """

    def __init__(self, base: Checkpoint, modules: Mapping[str, Mapping[str, Entry]], source: str) -> None:
        self.base = base
        self.source = source
        self.modules = modules
        self.stored = {name: name for name in base}
        ways = self._ways()
        if not ways:
            self.stored = {live: name for name, live in self._live.items()}
            ways = self._ways()
        self.drop, self.add = self._only(ways)

    @cached_property
    def _live(self) -> dict[str, str]:
        """Name in the base → name in memory."""
        model = without_memory(self.base)
        known = {} if model is None else live_names(model)
        return {name: known.get(name, name) for name in self.base}

    def parameter(self, module: str) -> str:
        return self.stored[self._base_name(module, self.drop, self.add)]

    def saved(self, path: str) -> str:
        """Name of a tensor that the adapter stores whole: the base's where it has one, else the adapter's own."""
        path = path.replace(".modules_to_save", "").replace(".original_module", "").replace(".base_layer", "")
        if "lora_" in path or "ranknum" in path:
            raise InputError(f"{self.source}: {path!r} is no part of a LoRA, DoRA, PiSSA or AdaLoRA adapter")
        name = self.add + path.removeprefix(self.drop)
        if name not in self.stored and name not in self.base:
            return {live: stored for stored, live in self._live.items()}.get(name, path)
        return self.stored.get(name, name)

    def _base_name(self, module: str, drop: str, add: str) -> str:
        return f"{add}{module.removeprefix(drop)}.weight"

    def _ways(self) -> list[tuple[str, str]]:
        """The prefixes to drop and to add so that the base has every adapted module, the best ones."""
        adapted = {f"{module}.weight": parts for module, parts in self.modules.items()}
        if adapted.keys() <= self.stored.keys():
            return [("", "")]
        _, ways = alignments(dict.fromkeys(adapted), dict.fromkeys(self.stored))
        ways = [way for way in ways if all(way[1] + name.removeprefix(way[0]) in self.stored for name in adapted)]
        if len(ways) > 1:
            sizes = {
                name: parts["B"].shape[0] * math.prod(parts["A"].shape[1:])
                for name, parts in adapted.items()
                if {"A", "B"} <= set(parts)
            }
            theirs = {live: math.prod(self.base.entries[name].shape) for live, name in self.stored.items()}
            agreeing, sized = alignments(sizes, theirs)
            ways = [way for way in sized if agreeing == len(sizes) and way in ways] or ways
        return ways

    def _only(self, ways: list[tuple[str, str]]) -> tuple[str, str]:
        """The one way that there is.

        Raises:
            InputError: there is none, or there are several.
        """
        adapted = [f"{module}.weight" for module in self.modules]
        if not ways:
            missing = next(name for name in adapted if name not in self.base).removesuffix(".weight")
            raise InputError(
                f"{self.source}: the base {self.base.source} has no {missing!r}, which the adapter changes; "
                "give the checkpoint that it was trained on (tied weights stored once: store both)"
            )
        if len(ways) > 1:
            parts_of_base = sorted(way[1] + adapted[0].removeprefix(way[0]) for way in ways)
            raise InputError(
                f"{self.source}: fits several parts of the base ({', '.join(parts_of_base[:3])}); "
                "give the part that it was trained on as the base"
            )
        return ways[0]


def _stored_in_out(
    config: Mapping[str, Any],
    parameters: Mapping[str, str],
    modules: Mapping[str, Mapping[str, Entry]],
    base: Checkpoint,
) -> bool:
    """Whether the base stores its adapted linear layers (in, out): what a square matrix's shape cannot tell.

    Told by those that are not square; the config's fan_in_fan_out decides where all are square.
    """
    sizes = {
        parameters[module]: (parts["B"].shape[0], parts["A"].shape[-1])
        for module, parts in modules.items()
        if {"A", "B"} <= set(parts) and "embedding" not in parts
    }
    shapes = {name: base.entries[name].shape for name, (rows, columns) in sizes.items() if rows != columns}
    turned = [shape == sizes[name][::-1] for name, shape in shapes.items() if len(shape) == 2]
    return any(turned) if turned else bool(config.get("fan_in_fan_out"))


@dataclass(frozen=True, eq=False)
class _Update:
    """One adapted module: its stored parts, its scale, and how its base is stored."""

    module: str
    parts: Mapping[str, Entry]
    file: AdapterFile
    base: Entry
    in_out: bool
    matcher: Matcher

    def entry(self) -> Entry:
        """The tuned parameter, checked by shapes alone."""
        if not {"A", "B"} <= set(self.parts) or (self.file.kind == "ADALORA") != ("E" in self.parts):
            raise self._refused(f"has {', '.join(sorted(self.parts))}; want the factors of {self.file.kind}")
        if not self.base.is_float:
            raise self._refused(f"is stored as {self.base.dtype} in the base; give the base in floating point")
        shape = self.base.shape
        rows, columns = self._stored_size()
        if len(shape) < 2 or (rows, columns) != (shape[0], math.prod(shape[1:])):
            got = f"{self.parts['B'].shape} and {self.parts['A'].shape}"
            raise self._refused(f"has factors {got}, which do not make the base's {shape}")
        scale = self._scale()
        if "magnitude_vector" not in self.parts:
            if self.file.config.get("use_dora"):
                raise self._refused("has no magnitudes, although its config sets use_dora")
            return Entry(
                shape, self._dtype(), lambda: self._sum(scale).reshape(shape), lambda: self._factors(scale)
            )
        if math.prod(self.parts["magnitude_vector"].shape) != (columns if self._turned else rows):
            raise self._refused(f"has magnitudes {self.parts['magnitude_vector'].shape} for the base's {shape}")
        return Entry(shape, self._dtype(), lambda: self._rescaled(scale).reshape(shape))

    @property
    def _turned(self) -> bool:
        """Whether the base stores this matrix (in, out)."""
        if "embedding" in self.parts:
            return True
        size = (self.parts["B"].shape[0], math.prod(self.parts["A"].shape[1:]))
        return len(self.base.shape) == 2 and (size != self.base.shape or (size[0] == size[1] and self.in_out))

    def _stored_size(self) -> tuple[int, int]:
        B, A = self.parts["B"].shape, self.parts["A"].shape
        if len(B) < 2 or len(A) < 2 or A[0] == 0 or math.prod(B[1:]) != A[0]:
            raise self._refused(f"has factors {B} and {A}, which have no rank in common")
        size = B[0], math.prod(A[1:])
        return size[::-1] if self._turned else size

    def _scale(self) -> float:
        """What the product of the factors is multiplied by."""
        if self.file.kind == "SPECTRAL":
            return 1.0
        patterns = self.file.config.get("alpha_pattern") or {}
        pattern = self.matcher.first(patterns, self.module)
        alpha: Any = self.file.config.get("lora_alpha") if pattern is None else patterns[pattern]
        try:
            scale = float(alpha)
            if self.file.kind == "ADALORA":
                first = float(self.file.config["init_r"])
                return (scale if scale > 0 else first) / (first + 1e-5)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{self.file.source}: {CONFIG} lacks lora_alpha (or init_r) as a number") from error
        rank = self.parts["A"].shape[0]
        return scale / (math.sqrt(rank) if self.file.config.get("use_rslora") else rank)

    def _dtype(self) -> str:
        return "float64" if self.base.dtype == "float64" else "float32"

    def _low_rank(self, scale: float) -> tuple[Tensor, Tensor]:
        """(s B, A) in float64, of the matrix (out, in), the columns of s B scaled by E for AdaLoRA."""
        A, B = self._part("A"), self._part("B") * scale
        if "E" in self.parts:
            B = B * self._part("E").reshape(1, -1)
        if str(self.file.config.get("init_lora_weights")) == "pissa":
            # The base of the update is what is left of the stored one without its r leading triplets.
            W = self.base.load()
            leading = decompose(W.mT if self._turned else W, B.shape[1], name=self.module)
            B, A = torch.cat([B, -leading.U * leading.S], dim=1), torch.cat([A, leading.Vh])
        return B, A

    def _factors(self, scale: float) -> tuple[Tensor, Tensor]:
        B, A = self._low_rank(scale)
        return (A.mT.contiguous(), B.mT.contiguous()) if self._turned else (B, A)

    def _sum(self, scale: float) -> Tensor:
        B, A = self._factors(scale)
        kind = getattr(torch, self._dtype())
        W: Tensor = self.base.load().reshape(B.shape[0], -1).to(kind)
        return torch.addmm(W, B.to(kind), A.to(kind))

    def _rescaled(self, scale: float) -> Tensor:
        total = self._sum(scale)
        outputs = total.mT if self._turned else total
        magnitude = self._part("magnitude_vector").flatten().to(outputs.dtype)
        scaled: Tensor = outputs * (magnitude / outputs.norm(dim=1))[:, None]
        return scaled.mT if self._turned else scaled

    def _part(self, name: str) -> Tensor:
        tensor: Tensor = self.parts[name].load().to(torch.float64)
        return tensor.reshape(tensor.shape[0], -1) if name in ("A", "B") else tensor

    def _refused(self, reason: str) -> InputError:
        return InputError(f"{self.file.source}: {self.module} {reason}")
