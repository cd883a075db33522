"""The spectral adapter as a method of Hugging Face PEFT. Importing this module registers it.

    from specbasis.adapter import SpectralConfig
    model = peft.get_peft_model(base, SpectralConfig(rank=300, blocks_to_transform=[-2, -1]))

PEFT's list of methods is a closed enumeration; `register` adds one member to it, once. Everything mathematical
is in
`layer`, `functional` and `proof`, which know nothing of PEFT.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import peft
import torch
from packaging.version import Version
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from specbasis.adapter import bases
from specbasis.adapter.layer import SpectralLinear, find_bases, innermost
from specbasis.adapter.task_heads import fresh_modules, head_modules, says_what_was_loaded
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD

NEEDS_PEFT = "0.21"
"""The oldest PEFT whose tuner interface this module speaks."""

NAME = "SPECTRAL"
FILE_NAME = f"{NAME}: run `from specbasis.adapter import SpectralConfig` first"
"""How adapter_config.json names the method. PEFT without specbasis stops with a KeyError that shows this text."""


@dataclass
class SpectralConfig(PeftConfig):
    """Configuration of a spectral adapter: W' = W + U[:, k:m] M Vh[k:m, :], only M trained.

    Args:
        interval: ranks [k, m) of the singular vectors, 0-based, m excluded; default (0, 300).
        rank: shorthand for interval (0, rank).
        interval_pattern: intervals of single layers: {regular expression at the end of the module name: (k, m)}.
        target_modules: names (endings) of modules, a regular expression, or "all-linear"; by default both matrices
            of every feed-forward network, where the architecture is known.
        exclude_modules: names or a regular expression of modules to leave out.
        blocks_to_transform: indices of the blocks to adapt; negative ones count from the last block.
        layers_pattern: name of the list of blocks, where a module's name holds several numbers.
        scale: "none", or "sigma" for coefficients in units of the singular values (LoRA-XS, PSOFT with free R).
        basis: "pretrained" singular vectors; "from:PATH", the singular vectors of the same matrix in another
            checkpoint; or a control, with ":SEED" behind it if wanted: "random" orthonormal vectors, or "shuffled",
            right singular vectors paired with left ones of other ranks.
        init: "zero" (the model starts bit-equal to its base) or "normal" (small random coefficients).
        dropout: share of input features dropped on the adapter's path in training.
        save_basis: put U and Vh into the adapter file. Without, loading decomposes the base again and refuses if
        any
            vector is not the trained one; the file is then little more than M.
        basis_file: a base-level basis file that many adapters share: read if it exists, written if not; or an
            existing folder, used as a cache of decompositions (`specbasis.jobs.cache.Cache`). Not saved.
        modules_to_save: modules trained and saved whole. A task head and pooler that the base checkpoint lacks are
            added by themselves.
        shard_basis: hold U and Vh as parameters without gradient, which FSDP shards.
        file_format: set by saving; tells a loaded configuration from a new one.
    """

    interval: tuple[int, int] | None = None
    rank: int | None = None
    interval_pattern: dict[str, tuple[int, int]] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    blocks_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    scale: str = "none"
    basis: str = "pretrained"
    init: str = "zero"
    dropout: float = 0.0
    save_basis: bool = True
    basis_file: str | None = None
    modules_to_save: list[str] | None = None
    shard_basis: bool = False
    file_format: int | None = None
    _place: ClassVar[Any] = None  # where it was loaded from: folder or name, subfolder, options of the download

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        if self.rank is not None:
            if self.interval is not None and tuple(self.interval) != (0, self.rank):
                raise InputError(f"got interval = {self.interval} and rank = {self.rank}; want one of the two")
            self.interval = (0, self.rank)
        self.interval = _pair(self.interval or (0, 300))
        self.interval_pattern = {name: _pair(pair) for name, pair in (self.interval_pattern or {}).items()}
        if isinstance(self.target_modules, (list, set, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own form
        if not re.fullmatch(r"pretrained|(random|shuffled)(:\d+)?|from:.+", self.basis):
            raise InputError(f"got basis = {self.basis!r}; want 'pretrained', 'random', 'shuffled' or 'from:PATH'")
        if self.basis.startswith("from:") and not self.save_basis:
            raise InputError(
                f"got basis = {self.basis!r} with save_basis = False; want save_basis = True: a path is no proof"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"got dropout = {self.dropout}; want 0 <= dropout < 1")
        if self.file_format not in (None, 1):
            raise InputError(
                f"the adapter folder has format {self.file_format}; this version of specbasis reads 1: upgrade it"
            )

    target_parameters = None
    bias = "none"

    @property
    def layers_to_transform(self) -> list[int] | int | None:
        """PEFT's name for the blocks."""
        return self.blocks_to_transform

    def interval_of(self, module_name: str) -> tuple[int, int]:
        """The interval for a module: the first pattern that matches the end of its name, else the common one."""
        for pattern, interval in (self.interval_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module_name):
                return interval
        assert self.interval is not None
        return self.interval

    def to_dict(self) -> dict[str, Any]:
        """The configuration as adapter_config.json holds it."""
        fields = super().to_dict()
        del fields["basis_file"], fields["rank"]
        if isinstance(fields["target_modules"], set):
            fields["target_modules"] = sorted(fields["target_modules"])
        return {**fields, "peft_type": FILE_NAME, "file_format": 1}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a configuration; remembers where from, so that an incomplete file is refused before injection."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._place = pretrained_model_name_or_path, subfolder, kwargs
        return config


class SpectralLayer(SpectralLinear, BaseTunerLayer):
    """`SpectralLinear` with the bookkeeping that PEFT expects of a tuner layer, and quantised base layers."""

    def __init__(self, base_layer: nn.Module, module_name: str, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, None, module_name=module_name)
        self._kept: tuple[Any, dict[str, Any]] | None = None  # what restores a quantised weight besides its tensor
        self.quantization_backend = resolve_quantization_backend(innermost(base_layer), **quantization)

    def weight_matrix(self) -> Tensor:
        """The frozen weight as a matrix (out, in), dequantised if need be."""
        if self.quantization_backend is None or self._original is not None:
            return super().weight_matrix()
        base = innermost(self)
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # bitsandbytes packs 4-bit weights in evaluation; its state dict is what unpacks them
        return self.kind.matrix(self.quantization_backend.get_base_weight(base).detach().float())

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self._unproven.discard(adapter_name)
        self._awaited.pop(adapter_name, None)
        self._exact.discard(adapter_name)
        self._rated.pop(adapter_name, None)
        self._sources.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the sum in place of the frozen weight; see `SpectralLinear.merge`. A quantised sum is rounded
        again.
        """
        names = check_adapters_to_merge(self, adapter_names)
        backend = self.quantization_backend
        if names and backend is not None:
            if not backend.supports_merge:
                raise ValueError(
                    f"{self.module_name}: merging into {backend.backend_name} weights is not supported by PEFT"
                )
            warnings.warn(
                f"{self.module_name}: the merged weight is quantised again with {backend.backend_name}; its "
                f"rounding changes "
                "the model. Merge into the unquantised base for an exact result",
                stacklevel=2,
            )
        super().merge(safe_merge, names)

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        super().unmerge()
        if self._kept is not None:
            state, attributes = self._kept
            vars(innermost(self).weight).update(attributes)
            if state is not None:
                innermost(self).state = state
            self._kept = None

    def _put_weight(self, weight: Tensor) -> None:
        if self.quantization_backend is None:
            super()._put_weight(weight)
            return
        base = innermost(self)
        if self._kept is None:
            # bitsandbytes keeps half of a quantised weight in the layer's state and PEFT rewrites the old
            # weight's marks.
            self._kept = getattr(base, "state", None), dict(vars(self._original))
            if self._kept[0] is not None:
                base.state = copy.copy(self._kept[0])
        self.quantization_backend.set_base_weight(self, weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's tensors next to the weight, and keep their dtype: float16 coefficients are other
        ones.
        """
        device = device or self.stored_weight().device
        M = self.spectral_M
        if adapter_name in M and not M[adapter_name].is_meta:
            M[adapter_name] = nn.Parameter(M[adapter_name].to(device), requires_grad=M[adapter_name].requires_grad)
            for frozen in (self.spectral_U, self.spectral_Vh, *self._proofs()):
                frozen._apply(lambda tensor: tensor.to(device))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive."""
        return True

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()


class SpectralModel(BaseTuner):
    """A model with spectral adapters in place of its target layers."""

    prefix = "spectral_"
    tuner_layer_cls = SpectralLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the target layers; see PEFT. Adds modules that the base checkpoint lacks to ``modules_to_save``.

        Raises:
            InputError: an adapter from a file does not restore a module that is random in this base.
        """
        config = self.peft_config[adapter_name]
        _resolve_blocks(config, model)
        _add_fresh_modules(config, model)
        if config.file_format is not None:
            _refuse_incomplete(config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.file_format is None:
                find_bases(self.spectral_layers().values(), adapter_name)
        except Exception:
            self._remove(adapter_name)
            raise
        if config.basis_file and not Path(config.basis_file).exists():
            bases.save_bases(config.basis_file, self.spectral_layers(), adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a submodule; a trained module saved whole may have parts instead of a weight, such as a
        pooler.
        """
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _remove(self, adapter_name: str) -> None:
        """Leave no trace of an adapter that could not be added to every layer."""
        for name, layer in self.spectral_layers().items():
            if adapter_name in layer.settings:
                layer.delete_adapter(adapter_name)
            if not layer.settings:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.base_layer)

    def spectral_layers(self) -> dict[str, SpectralLayer]:
        """Adapted layers by module name in the base model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, SpectralLayer)}

    @staticmethod
    def _check_target_module_exists(peft_config: SpectralConfig, key: str) -> Any:
        """Match a module name; unlike PEFT's own rule, the blocks also limit regular expressions and full names."""
        found = check_target_module_exists(peft_config, key)
        blocks = peft_config.blocks_to_transform
        if not found or isinstance(found, _ExcludedModule) or blocks is None:
            return found
        lists = peft_config.layers_pattern or [r"[^.]*"]
        lists = [lists] if isinstance(lists, str) else lists
        matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", key) for pattern in lists)
        index = next((int(match[1]) for match in matches if match), None)
        return index is not None and index in ([blocks] if isinstance(blocks, int) else blocks)

    def _prepare_adapter_config(self, peft_config: SpectralConfig, model_config: dict[str, Any]) -> SpectralConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = sorted(_feed_forward(self.model))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target
        if not isinstance(target, SpectralLayer):
            layer = SpectralLayer(target, current_key, get_quantization_kwargs(self.model))
        assert isinstance(layer, SpectralLayer)
        interval = peft_config.interval_of(current_key)
        layer.add(
            adapter_name,
            interval,
            scale=peft_config.scale,  # type: ignore[arg-type]
            basis=peft_config.basis,
            dropout=peft_config.dropout,
            init=peft_config.init,  # type: ignore[arg-type]
            keep_basis=peft_config.save_basis,
            source=_source(peft_config, layer, current_key, interval),
            from_file=peft_config.file_format is not None,
            later=True,
            shard=peft_config.shard_basis,
        )
        if adapter_name not in self.active_adapters:
            layer.spectral_M[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` down to every adapted layer and trained module."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams") or 1
        decoder_names = [name for name in names for _ in range(beams)]
        encoder = getattr(self.model, "get_encoder", lambda: None)() if beams > 1 else None
        in_encoder = (
            set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not self.model else set()
        )
        handles = [
            module.register_forward_pre_hook(
                functools.partial(_with_adapter_names, names if module in in_encoder else decoder_names),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (SpectralLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """A new adapter whose update is Σ weight · update, exactly: M = Σ weight · M in the common basis.

        Intervals of pretrained singular vectors may differ: the sum lives on their union.

        Raises:
            InputError: an adapter does not exist, the bases or scales differ, or the type is not "linear".
        """
        if combination_type != "linear":
            raise InputError(f"got combination_type = {combination_type!r}; want 'linear', which is exact here")
        if len(adapters) != len(weights) or not adapters:
            raise InputError(
                f"got {len(adapters)} adapters and {len(weights)} weights; want one weight for each adapter"
            )
        for name in adapters:
            if name not in self.peft_config:
                raise InputError(f"got adapter {name!r}; want one of {sorted(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise InputError(f"an adapter {adapter_name!r} exists already; choose a new name")
        configs = [self.peft_config[name] for name in adapters]
        if len({(config.basis, config.scale) for config in configs}) > 1:
            raise InputError(
                f"{', '.join(adapters)} have different bases or scales: their coefficients cannot be added"
            )
        parts = {
            name: [
                (weight, adapter)
                for weight, adapter in zip(weights, adapters, strict=True)
                if adapter in layer.settings
            ]
            for name, layer in self.spectral_layers().items()
        }
        unions = {
            name: _union(
                [layer.settings[adapter].interval for _, adapter in parts[name]],
                layer.settings[parts[name][0][1]].basis,
            )
            for name, layer in self.spectral_layers().items()
            if parts[name]
        }
        self.peft_config[adapter_name] = dataclasses.replace(
            configs[0],
            rank=None,
            target_modules=sorted(unions),
            blocks_to_transform=None,
            layers_pattern=None,
            interval_pattern={re.escape(name): interval for name, interval in unions.items()},
            init="zero",
            file_format=None,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, (k, _) in unions.items():
                layer = self.spectral_layers()[name]
                for weight, adapter in parts[name]:
                    layer._settle(adapter)
                    start, stop = (bound - k for bound in layer.settings[adapter].interval)
                    layer.spectral_M[adapter_name][start:stop, start:stop] += weight * layer.spectral_M[adapter]
                    signs = _relative_signs(layer, adapter_name, adapter, start, stop)
                    if not bool((signs == 1).all()):
                        block = layer.spectral_M[adapter_name][start:stop, start:stop]
                        block -= weight * layer.spectral_M[adapter]
                        block += weight * signs[:, None] * layer.spectral_M[adapter] * signs
        layer_status = adapter_name in self.active_adapters
        for layer in self.spectral_layers().values():
            if adapter_name in layer.settings:
                layer.spectral_M[adapter_name].requires_grad_(layer_status)


def _relative_signs(layer: SpectralLayer, new: str, old: str, start: int, stop: int) -> Tensor:
    """Sign of each vector of one adapter's basis relative to another's; refused where they are not the same
    vectors.

    Raises:
        InputError: the two adapters hold different vectors.
    """
    products = (layer.spectral_U[new][:, start:stop] * layer.spectral_U[old]).sum(0)
    if not bool(((products.abs() - 1).abs() < 1e-4).all()):
        raise InputError(
            f"{layer.module_name}: adapter {old!r} holds other singular vectors than the base gives now; add "
            f"the adapters' "
            "exported LoRA instead"
        )
    return torch.sign(products)


def _union(intervals: list[tuple[int, int]], basis: str) -> tuple[int, int]:
    if basis.startswith("random") and len(set(intervals)) > 1:
        raise InputError(
            "random bases on different intervals are different vectors: their coefficients cannot be added"
        )
    return min(k for k, _ in intervals), max(m for _, m in intervals)


def _pair(pair: Any) -> tuple[int, int]:
    try:
        k, m = pair
        return int(k), int(m)
    except (TypeError, ValueError):
        raise InputError(f"got interval = {pair!r}; want two ranks (k, m)") from None


def _with_adapter_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def _resolve_blocks(config: SpectralConfig, model: nn.Module) -> None:
    """Count negative block indices from the last block.

    Raises:
        InputError: the model does not say how many blocks it has.
    """
    blocks = config.blocks_to_transform
    listed = [blocks] if isinstance(blocks, int) else list(blocks or [])
    if not any(block < 0 for block in listed):
        return
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if count is None or min(listed) < -count:
        raise InputError(
            f"got blocks_to_transform = {blocks} for a model with {count} blocks; want indices of its blocks"
        )
    config.blocks_to_transform = [block % count for block in listed]


def _add_fresh_modules(config: SpectralConfig, model: nn.Module) -> None:
    """Train and save the head and pooler that the base checkpoint lacks; refuse a file that does not restore
    them.
    """
    fresh = fresh_modules(model)
    given = config.modules_to_save or []

    def unsaved(names: list[str]) -> list[str]:
        return [name for name in names if not any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in given)]

    missing = unsaved(fresh)
    if config.file_format is None:
        if missing:
            config.modules_to_save = [*given, *missing]
        return
    if missing:
        raise InputError(
            f"{', '.join(missing)}: random in this base (its checkpoint has no such weights), and the adapter "
            f"does not bring "
            "them; load the base checkpoint that the adapter was trained on, with its head"
        )
    names = _names_in_file(config)
    lacking = [name for name in fresh if names and not any(f".{name}." in key for key in names)]
    if lacking:
        raise InputError(
            f"{config._place[0]}: the adapter file lacks {', '.join(lacking)}, which is random in this base; "
            "predictions would be random. Save the adapter again with its head"
        )
    untold = [] if says_what_was_loaded(model) else unsaved(head_modules(model))
    if untold:
        warnings.warn(
            f"{', '.join(untold)}: the adapter does not bring them, and this model does not tell whether they came "
            "from a checkpoint; if not, predictions are random. Load the base with from_pretrained to have it "
            "checked",
            stacklevel=2,
        )


def _refuse_incomplete(config: SpectralConfig) -> None:
    """Refuse a file that does not say which basis its coefficients belong to.

    Raises:
        InputError: a part of an adapted matrix is missing.
    """
    names = _names_in_file(config) or set()
    parts = ("origin", "S", "sketch_U", "sketch_V", *(("U", "Vh") if config.save_basis else ()))
    for name in sorted(names):
        stem, is_core, _ = name.partition(".spectral_M")
        lacking = [f"spectral_{part}" for part in parts if is_core and f"{stem}.spectral_{part}" not in names]
        if lacking:
            raise InputError(
                f"{config._place[0]}: {stem} lacks {', '.join(lacking)}: the adapter file does not "
                "say which basis its coefficients belong to; save it again with save_pretrained"
            )


def _names_in_file(config: SpectralConfig) -> set[str] | None:
    """Names of the tensors in the file that belongs to a loaded configuration; None where it is not at hand.

    A file on the Hub is fetched as PEFT fetches it next: it is downloaded once.
    """
    if config._place is None:
        return None
    place, subfolder, options = config._place
    file = Path(place, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    if not Path(place).exists():
        known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        try:
            found = huggingface_hub.hf_hub_download(
                str(place),
                SAFETENSORS_WEIGHTS_NAME,
                subfolder=subfolder,
                **{key: value for key, value in options.items() if key in known},
            )
        except (OSError, ValueError):  # as all errors of the Hub are; PEFT says next what is wrong
            return None
        file = Path(found)
    return set(open_checkpoint(file)) if file.exists() else None


def _feed_forward(model: nn.Module) -> set[str]:
    """Names of the matrices of the feed-forward networks, by the architecture's own file.

    Raises:
        InputError: the architecture is not known, or keeps its experts stacked in parameters that are not layers.
    """
    matrices = model_map(open_checkpoint(_base_parameters(model))).matrices
    names = {ref.parameter.removesuffix(".weight") for ref in matrices if ref.key.role.startswith("ffn.")}
    want = "set target_modules, for example target_modules='all-linear'"
    if not names:
        raise InputError(f"the feed-forward layers of {type(model).__name__} are not known; {want}")
    stacked = sorted(names - {name for name, _ in model.named_modules()})
    if stacked:
        raise InputError(
            f"{len(stacked)} feed-forward parameters of {type(model).__name__} are stacks of experts, not layers "
            f"({stacked[0]}), and a spectral adapter wraps layers; {want}"
        )
    return names


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model has without its adapters, with packed weights of quantised layers by shape."""
    packed = {
        f"{name}.": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }
    held = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(packed))}
    for name, layer in packed.items():
        held[f"{name}weight"] = torch.zeros(1).expand(layer.out_features, layer.in_features)
    return {
        re.sub(r"\.(base_layer|original_module)(?=\.)", "", name): tensor
        for name, tensor in held.items()
        if ".spectral_" not in name and ".modules_to_save." not in name
    }


def _source(config: SpectralConfig, layer: SpectralLayer, name: str, interval: tuple[int, int]) -> Any:
    """Where the basis comes from, if not from decomposing the base weight: a basis file, or another checkpoint."""
    if config.basis.startswith("from:"):
        return functools.partial(bases.foreign_basis, config.basis.removeprefix("from:"), layer, name, interval)
    if config.basis == "pretrained" and config.basis_file and Path(config.basis_file).exists():
        return functools.partial(_stored_basis, config.basis_file, layer, name, interval)
    return None


def _stored_basis(path: str, layer: SpectralLayer, name: str, interval: tuple[int, int]) -> SVD:
    return bases.load_basis(path, layer.weight_matrix(), interval, name)


def register() -> None:
    """Make PEFT know the method. Doing it again changes nothing.

    Raises:
        InputError: this PEFT is too old, or has a method of the same name.
    """
    if Version(peft.__version__) < Version(NEEDS_PEFT):
        raise InputError(f"peft {peft.__version__} is installed; the spectral adapter needs peft >= {NEEDS_PEFT}")
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if known is None:
        register_peft_method(
            name=NAME.lower(), config_cls=SpectralConfig, model_cls=SpectralModel, prefix="spectral_"
        )
        PEFT_TYPE_TO_CONFIG_MAPPING[FILE_NAME] = SpectralConfig
    elif known is not SpectralConfig:
        raise InputError(f"peft {peft.__version__} has a method {NAME} of its own; upgrade specbasis")


register()
