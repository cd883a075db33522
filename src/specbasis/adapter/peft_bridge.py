"""The spectral adapter as a method of Hugging Face PEFT. Importing this module registers it.

    from specbasis.adapter import SpectralConfig
    model = peft.get_peft_model(base, SpectralConfig(rank=300, blocks_to_transform=[-2, -1]))

PEFT's list of methods is a closed enumeration; `register` adds one member to it, once. Everything mathematical is
in `layer`, `functional` and `proof`, which know nothing of PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from packaging.version import Version
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.mixed import model as mixed
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils import register_peft_method
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from specbasis.adapter.bases import save_bases
from specbasis.adapter.inert import refuse_inert
from specbasis.adapter.peft_config import FILE_NAME, NAME, SpectralConfig
from specbasis.adapter.peft_layer import SpectralLayer, adapted_layer
from specbasis.adapter.peft_resolve import all_linear, check_targets, feed_forward, resolve, tell_small_layers
from specbasis.adapter.rest import fingerprints, is_dense, rest_of, warn_of_another_base
from specbasis.adapter.side_by_side import find_bases
from specbasis.adapter.state import Seal
from specbasis.checkpoint.adapter_file import FROM_DATA, PREFIX, seal
from specbasis.checkpoint.pattern import SQUARE
from specbasis.core.errors import InputError

__all__ = ["SpectralConfig", "SpectralModel"]

NEEDS_PEFT = "0.21"
"""The oldest PEFT whose tuner interface this module speaks."""


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
        file = resolve(config, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = {
                name: layer for name, layer in self.spectral_layers().items() if adapter_name in layer.adapters
            }
            if config.file_format is None:
                tell_small_layers(config, layers)
                find_bases(layers.values(), adapter_name)
            else:
                check_targets(
                    config, file, {n: layer.spectral_M[adapter_name].shape for n, layer in layers.items()}
                )
        except Exception:
            self._remove(adapter_name)
            raise
        if config.file_format is not None and config.seal is not None:
            seal = Seal(config.seal["layers"])
            for layer in layers.values():
                layer.adapters[adapter_name].seal = seal
            warn_of_another_base(config.seal, model, config.seal["saved"] if file is None else file.saved)
        if config.basis_file and config.basis == "pretrained" and not Path(config.basis_file).exists():
            save_bases(
                config.basis_file, {name: layer.stored_basis(adapter_name) for name, layer in layers.items()}
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a submodule; a trained module saved whole (a pooler) may have parts instead of a weight."""
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _remove(self, adapter_name: str) -> None:
        """Leave no trace of an adapter that could not be added to every layer."""
        for name, layer in self.spectral_layers().items():
            if adapter_name in layer.adapters:
                layer.delete_adapter(adapter_name)  # type: ignore[operator]
            if not layer.adapters:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.base_layer)

    def spectral_layers(self) -> dict[str, SpectralLayer]:
        """Adapted layers by module name in the base model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, SpectralLayer)}

    @staticmethod
    def _check_target_module_exists(peft_config: SpectralConfig, key: str) -> Any:
        """Match a module name; unlike PEFT's own rule, the blocks also limit regular expressions and full names."""
        match = check_target_module_exists(peft_config.matched(key), key)
        blocks = peft_config.blocks_to_transform
        if not match or isinstance(match, _ExcludedModule) or blocks is None:
            return match
        lists = peft_config.layers_pattern or [r"[^.]*"]
        lists = [lists] if isinstance(lists, str) else lists
        numbers = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", key) for pattern in lists)
        index = next((int(number[1]) for number in numbers if number), None)
        return index is not None and index in ([blocks] if isinstance(blocks, int) else blocks)

    def _prepare_adapter_config(self, peft_config: SpectralConfig, model_config: dict[str, Any]) -> SpectralConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = sorted(feed_forward(self.model))
        elif str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = sorted(all_linear(peft_config, self.model))
        peft_config.match(name for name, _ in self.model.named_modules())
        return peft_config

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Give an adapter's cores float32, or with ``autocast_adapter_dtype=False`` the dtype of their base layers.

        PEFT calls this when an adapter is added and when it is loaded. Bases stay in float32: a rounded one is
        another.
        """
        for layer in self.spectral_layers().values():
            if adapter_name in layer.adapters:
                layer.cast_core(
                    adapter_name, torch.float32 if autocast_adapter_dtype else layer.stored_weight().dtype
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpectralConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The tensors of the adapter's file, which PEFT is about to write; the configuration gets their seal.

        Raises:
            InputError: the adapter waits for a basis from data.
        """
        for layer in model.modules() if config.basis in FROM_DATA else ():
            if isinstance(layer, SpectralLayer) and adapter_name in layer.adapters:
                layer.settle(adapter_name)
        stored: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, **kwargs
        )
        whole = f".modules_to_save.{adapter_name}."
        saved = {
            name.removeprefix(PREFIX).replace(whole, "."): tensor
            for name, tensor in state_dict.items()
            if whole in name
        }
        config.seal = None
        if all(
            is_dense(tensor) for tensor in (*stored.values(), *saved.values())
        ):  # else a shard is at hand, no more
            named = {cls._remove_adapter_name_from_key(name, adapter_name): t for name, t in stored.items()}
            base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
            config.seal = seal(config, named, saved, fingerprints(rest_of(base, saved)))
        return stored

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
            refuse_inert(parent, target_name, current_key)
            layer = adapted_layer(target, current_key, get_quantization_kwargs(self.model))
        assert isinstance(layer, SpectralLayer)
        layer.add(
            adapter_name,
            peft_config.interval_of(current_key, layer.layout.shape(layer)),
            later=isinstance(self, SpectralModel),  # a PeftMixedModel creates layers through here too
            from_file=peft_config.file_format is not None,
            shard=peft_config.shard_basis,
            pattern=peft_config.pattern_of(current_key),
            scale=peft_config.scale,
            basis=peft_config.basis,
            basis_file=peft_config.basis_file,
            keep_basis=peft_config.save_basis,
            init=peft_config.init,
            dropout=peft_config.dropout,
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

        Intervals of pretrained singular vectors may differ: the sum lives on their union, as a square whatever the
        patterns.

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
        layers = {
            name: layer for name, layer in self.spectral_layers().items() if set(adapters) & set(layer.adapters)
        }
        unions = {name: _union(layer, adapters, configs[0].basis) for name, layer in layers.items()}
        self.peft_config[adapter_name] = dataclasses.replace(
            configs[0],
            rank=None,
            target_modules=sorted(unions),
            blocks_to_transform=None,
            layers_to_transform=None,
            layers_pattern=None,
            interval_pattern={re.escape(name): interval for name, interval in unions.items()},
            pattern=SQUARE,
            init="zero",
            file_format=None,
            seal=None,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, layer in layers.items():
                if configs[0].basis in FROM_DATA:
                    layer.settle_as(adapter_name, next(name for name in adapters if name in layer.adapters))
                for weight, adapter in zip(weights, adapters, strict=True):
                    if adapter in layer.adapters:
                        layer.settle(adapter)
                        start, stop = (bound - unions[name][0] for bound in layer.adapters[adapter].interval)
                        signs = _relative_signs(layer, adapter_name, adapter, start, stop)
                        block = layer.spectral_M[adapter_name][start:stop, start:stop]
                        block += weight * signs[:, None] * layer.coefficients(adapter) * signs
                layer.spectral_M[adapter_name].requires_grad_(adapter_name in self.active_adapters)


def _relative_signs(layer: SpectralLayer, new: str, old: str, start: int, stop: int) -> Tensor:
    """Sign of each vector of one adapter's basis relative to another's.

    Raises:
        InputError: the two adapters hold different vectors.
    """
    products = (layer.spectral_U[new][:, start:stop] * layer.spectral_U[old]).sum(0)
    if not bool(((products.abs() - 1).abs() < 1e-4).all()):
        raise InputError(
            f"{layer.module_name}: adapter {old!r} holds other singular vectors than the base gives now; add the "
            "adapters' exported LoRA instead"
        )
    return torch.sign(products)


def _union(layer: SpectralLayer, adapters: list[str], basis: str) -> tuple[int, int]:
    """The smallest interval that holds those of a layer's adapters."""
    first, *others = (name for name in adapters if name in layer.adapters)
    intervals = {layer.adapters[name].interval for name in (first, *others)}
    if basis in FROM_DATA and not all(layer._same_proof(first, other) for other in others):
        raise InputError(
            f"{layer.module_name}: adapters with bases from other data are in other vectors: their coefficients "
            "cannot be added; add the adapters' exported LoRA instead"
        )
    if basis.startswith("random") and len(intervals) > 1:
        raise InputError(
            "random bases on different intervals are different vectors: their coefficients cannot be added"
        )
    return min(k for k, _ in intervals), max(m for _, m in intervals)


def _with_adapter_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def _join_mixed_models() -> None:
    """Let `peft.PeftMixedModel` take the method: its lists of methods are closed as well."""
    theirs: Any = mixed.MixedModel._create_and_replace

    @functools.wraps(theirs)
    def create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        create = SpectralModel._create_and_replace if isinstance(config, SpectralConfig) else theirs
        create(self, config, *args, **kwargs)

    types = (*mixed.COMPATIBLE_TUNER_TYPES, PeftType[NAME])
    mixed.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
    mixed.PREFIXES.append(SpectralModel.prefix)
    mixed.Configs, mixed.Layers = mixed.Configs | SpectralConfig, (*mixed.Layers, SpectralLayer)
    mixed.MixedModel._create_and_replace = create_and_replace


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
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if registered is None:
        register_peft_method(
            name=NAME.lower(), config_cls=SpectralConfig, model_cls=SpectralModel, prefix="spectral_"
        )
        PEFT_TYPE_TO_CONFIG_MAPPING[FILE_NAME] = SpectralConfig
        _join_mixed_models()
    elif registered is not SpectralConfig:
        raise InputError(f"peft {peft.__version__} has a method {NAME} of its own; upgrade specbasis")


register()
