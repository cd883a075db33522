"""What a spectral configuration means for one model: its blocks, target layers, and the heads that go with it."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from specbasis.adapter.adapted import AdaptedLayer
from specbasis.adapter.inert import is_inert
from specbasis.adapter.peft_config import DEFAULT_RANK, SpectralConfig
from specbasis.adapter.task_heads import fresh_modules, head_modules, says_what_was_loaded
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.checkpoint.adapter_file import (
    BASIS,
    CONFIG,
    PICKLED,
    PROOF,
    WEIGHTS,
    AdapterFile,
    adapter_folder,
    checked_seal,
)
from specbasis.core.errors import InputError


def resolve(config: SpectralConfig, model: nn.Module) -> AdapterFile | None:
    """Make a configuration definite for a model: blocks counted from the front, and heads that must be trained.

    Returns:
        The file that the configuration came with, proven; None for a new adapter, or where it is not at hand.

    Raises:
        InputError: the blocks do not exist; or the file is incomplete, not what was saved, or does not restore a
            module that is random in this base.
    """
    _resolve_blocks(config, model)
    fresh = fresh_modules(model)
    if config.file_format is None:
        missing = _unsaved(config, fresh)
        if missing:
            config.modules_to_save = [*(config.modules_to_save or []), *missing]
        return None
    checked_seal(vars(config), "the adapter")
    file = _file_of(config)
    _check_heads(config, model, fresh, file)
    if file is not None:
        file.require(("M", *PROOF, *(BASIS if config.save_basis else ())))
        file.prove()
    return file


def check_targets(config: SpectralConfig, file: AdapterFile | None, layers: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file that has other layers, or of one other coefficients, than its configuration targets here.

    Args:
        config: the configuration.
        file: its file, where it is at hand.
        layers: names of the adapted layers, and the shapes of their coefficients.

    Names are compared from the first number on: transformers renames what is above the blocks of some models.

    Raises:
        InputError: it does, with the first name of those that differ.
    """
    saved = file.modules if file is not None else (config.seal or {}).get("layers")
    if saved is None:
        return
    source = "the adapter" if file is None else file.source
    for name, parts in file.modules.items() if file is not None else ():
        wanted = layers.get(name, parts["M"].shape)
        if tuple(parts["M"].shape) != tuple(wanted):
            raise InputError(
                f"{source}: {name} holds coefficients of shape {tuple(parts['M'].shape)}, the configuration "
                f"wants {tuple(wanted)}; load it as it was saved"
            )
    stored, targeted = (Counter(_within_blocks(name) for name in names) for names in (saved, layers))
    for more, fewer, problem in (
        (stored, targeted, "is in the file, and the configuration does not target it in this model"),
        (targeted, stored, "is targeted by the configuration, and is not in the file"),
    ):
        names = sorted((more - fewer).elements())
        if names:
            raise InputError(
                f"{source}: {names[0]} (and {len(names) - 1} more) {problem}; load it as it was saved, on the "
                "base that it was trained on (for a new adapter, set file_format = None)"
            )


def _within_blocks(name: str) -> str:
    """A module's name from its first number on, ``3.mlp.up_proj``; its last part where there is no number."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[start:])


def _resolve_blocks(config: SpectralConfig, model: nn.Module) -> None:
    blocks = config.blocks_to_transform
    listed = [blocks] if isinstance(blocks, int) else list(blocks or [])
    if not any(block < 0 for block in listed):
        return
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if count is None or min(listed) < -count:
        raise InputError(
            f"got blocks_to_transform = {blocks} for a model with {count} blocks; want indices of its blocks"
        )
    config.choose_blocks([block % count for block in listed])


def _unsaved(config: SpectralConfig, names: list[str]) -> list[str]:
    """Those of these modules that the configuration does not save whole."""
    saved = config.modules_to_save or []
    return [
        name for name in names if not any(re.match(rf"(^|.*\.){re.escape(part)}($|\..*)", name) for part in saved)
    ]


def _check_heads(config: SpectralConfig, model: nn.Module, fresh: list[str], file: AdapterFile | None) -> None:
    """Refuse an adapter that leaves a head or pooler random; warn where the model does not tell."""
    missing = _unsaved(config, fresh)
    if missing:
        raise InputError(
            f"{', '.join(missing)}: random in this base (its checkpoint has no such weights), and the adapter does "
            "not bring them; load the base checkpoint that the adapter was trained on, with its head"
        )
    stored = [] if file is None else [f".{name}" for name in file.saved]
    lacking = [name for name in fresh if file is not None and not any(f".{name}." in path for path in stored)]
    if lacking:
        raise InputError(
            f"{config._place[0]}: the adapter file lacks {', '.join(lacking)}, which is random in this base; "
            "predictions would be random. Save the adapter again with its head"
        )
    doubtful = [] if says_what_was_loaded(model) else _unsaved(config, head_modules(model))
    if doubtful:
        warnings.warn(
            f"{', '.join(doubtful)}: the adapter does not bring them, and this model does not tell whether they "
            "came from a checkpoint; if not, predictions are random. Load the base with from_pretrained to have "
            "it checked",
            stacklevel=2,
        )


def _file_of(config: SpectralConfig) -> AdapterFile | None:
    """The file that belongs to a loaded configuration; None where it is not at hand.

    A file on the Hub is fetched as PEFT fetches it next: it is downloaded once.
    """
    if config._place is None:
        return None
    place, subfolder, options = config._place
    folder = Path(place, subfolder or "")
    if not Path(place).exists():
        known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        options = {key: value for key, value in options.items() if key in known}
        try:
            for name in (CONFIG, WEIGHTS):
                path = huggingface_hub.hf_hub_download(str(place), name, subfolder=subfolder, **options)
        except (OSError, ValueError):  # as all errors of the Hub are; PEFT says next what is wrong
            return None
        folder = Path(path).parent
    stored = any((folder / name).is_file() for name in (WEIGHTS, PICKLED))
    return adapter_folder(folder, source=str(place)) if stored else None


def all_linear(config: SpectralConfig, model: nn.Module) -> set[str]:
    """Names of all linear layers but a language model's head, as PEFT finds them, without those that never act."""
    names = set(_maybe_include_all_linear_layers(config, model).target_modules or ())
    inert = {
        name for name in names if is_inert(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    }
    if inert:
        first, more = min(inert), f" (and {len(inert) - 1} more)" if len(inert) > 1 else ""
        warnings.warn(
            f"all-linear leaves out {first}{more}: its weight is read, the layer is not called: an adapter would "
            "not act",
            stacklevel=2,
        )
    return names - inert


def tell_small_layers(config: SpectralConfig, layers: Mapping[str, AdaptedLayer]) -> None:
    """Say which layers have fewer singular vectors than the default of `DEFAULT_RANK`, and so get all of theirs."""
    if config.interval is not None:
        return
    ranks = {name: min(layer.layout.shape(layer)) for name, layer in layers.items()}
    small = sorted((rank, name) for name, rank in ranks.items() if rank < DEFAULT_RANK)
    if small:
        warnings.warn(
            f"{len(small)} of {len(ranks)} layers have fewer than the default of {DEFAULT_RANK} singular vectors "
            f"and get all of theirs (the smallest: {small[0][1]}, {small[0][0]}); give a rank to have fewer",
            stacklevel=2,
        )


def feed_forward(model: nn.Module) -> set[str]:
    """Names of the matrices of the feed-forward networks, by the architecture's own file.

    Raises:
        InputError: the architecture is not known, or keeps its experts stacked in parameters that are not layers.
    """
    matrices = model_map(open_checkpoint(_base_parameters(model))).matrices
    names = {ref.parameter.removesuffix(".weight") for ref in matrices if ref.key.role.startswith("ffn.")}
    want = "Please specify `target_modules`, for example 'all-linear'"  # PEFT's own words
    if not names:
        raise InputError(f"the feed-forward layers of {type(model).__name__} are not known. {want}")
    stacked = sorted(names - {name for name, _ in model.named_modules()})
    if stacked:
        raise InputError(
            f"{len(stacked)} feed-forward parameters of {type(model).__name__} are stacks of experts, not layers "
            f"({stacked[0]}), and a spectral adapter wraps layers. {want}"
        )
    return names


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model has without its adapters, with packed weights of quantised layers by shape."""
    packed = {
        f"{name}.": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }
    stored = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(packed))}
    for name, layer in packed.items():
        stored[f"{name}weight"] = torch.zeros(1).expand(layer.out_features, layer.in_features)
    return {
        re.sub(r"\.(base_layer|original_module)(?=\.)", "", name): tensor
        for name, tensor in stored.items()
        if ".spectral_" not in name and ".modules_to_save." not in name
    }
