"""An adapter folder as the command line sees it: look into it, verify it against a base, merge it, export it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specbasis.adapter import functional
from specbasis.adapter.bases import basis_of, parameter_named
from specbasis.adapter.card import MODEL_CLASSES, adapter_card, label_count
from specbasis.adapter.diagnostics import diagnose
from specbasis.checkpoint import (
    Checkpoint,
    Entry,
    open_checkpoint,
    open_tuned,
    refuse_other_weights,
    weights_sha256,
)
from specbasis.checkpoint.adapter_file import CONFIG, PREFIX, PROOF, WEIGHTS, adapter_folder, named_base
from specbasis.checkpoint.atomic import write_whole, writing
from specbasis.checkpoint.card import CARD
from specbasis.checkpoint.entry import reading
from specbasis.checkpoint.places import transformers_address
from specbasis.checkpoint.proof import Proof, check_format, settled_basis, weight_digest
from specbasis.checkpoint.spectral import oriented, stored_core
from specbasis.checkpoint.writer import copy_modules, want_new, write_model
from specbasis.core.brief import brief
from specbasis.core.errors import InputError
from specbasis.core.extras import quiet
from specbasis.core.svd import SVD, decompose


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """One adapted matrix as the folder holds it; U and Vh are None where the basis was not saved. ``square`` is M
    with zeros where nothing was trained, float64.
    """

    module: str
    M: Tensor
    proof: Proof
    scale: str
    U: Tensor | None
    Vh: Tensor | None
    square: Tensor

    @property
    def core(self) -> Tensor:
        """C in units of the weight, float64."""
        return functional.core(self.square, self.proof.S.double(), self.scale)


@brief
@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A spectral adapter on disk: its configuration, its adapted matrices, and the modules saved whole."""

    path: Path
    config: Mapping[str, Any]
    layers: tuple[StoredLayer, ...]
    whole: Mapping[str, Tensor]


def read_folder(path: str | Path) -> AdapterFolder:
    """Read an adapter folder as ``save_pretrained`` writes it.

    Raises:
        InputError: a file is missing or damaged, or the folder holds another kind of adapter.
    """
    file = adapter_folder(path)
    if file.kind != "SPECTRAL":
        raise InputError(f"{path}: holds a {file.kind} adapter; want a spectral one")
    if not file.modules:
        raise InputError(f"{path}: holds no coefficients; save the adapter again")
    file.require(("M", *PROOF))
    file.prove()
    scale = str(file.config.get("scale", "none"))
    with reading(file.source):
        layers = [_stored_layer(module, parts, scale) for module, parts in file.modules.items()]
        whole = {name: entry.load() for name, entry in file.saved.items()}
    return AdapterFolder(Path(path), file.config, tuple(layers), whole)


def _stored_layer(module: str, parts: Mapping[str, Entry], scale: str) -> StoredLayer:
    tensors = {part: entry.load() for part, entry in parts.items()}
    proof = Proof(*(tensors[part] for part in PROOF))
    return StoredLayer(module, tensors["M"], proof, scale, tensors.get("U"), tensors.get("Vh"), stored_core(parts))


def info(folder: str | Path) -> dict[str, Any]:
    """What an adapter holds and what it did, from its own file: counts, intervals, drift, rotation, condition.

    Raises:
        InputError: see `read_folder`.
    """
    adapter = read_folder(folder)
    rows = []
    for layer in adapter.layers:
        diagnosis = diagnose(layer.core, layer.proof.S)
        rows.append(
            {
                "module": layer.module,
                "weight": f"{layer.proof.shape[0]} × {layer.proof.shape[1]} {layer.proof.dtype}",
                "interval": layer.proof.interval,
                "parameters": layer.M.numel(),
                "drift": diagnosis.drift,
                "S_before": [float(layer.proof.S[0]), float(layer.proof.S[-1])],
                "S_after": [float(diagnosis.S[0]), float(diagnosis.S[-1])],
                "mean_left_alignment": float(diagnosis.left.mean()),
                "mean_right_alignment": float(diagnosis.right.mean()),
                "condition": diagnosis.condition,
                "basis_saved": layer.U is not None,
            }
        )
    return {
        "folder": str(folder),
        "base": adapter.config.get("base_model_name_or_path"),
        "basis": adapter.config.get("basis"),
        "scale": adapter.config.get("scale"),
        "adapter_parameters": sum(layer.M.numel() for layer in adapter.layers),
        "head_parameters": sum(tensor.numel() for tensor in adapter.whole.values()),
        "layers": rows,
    }


def verify(folder: str | Path, base: str | Path | None = None) -> list[dict[str, Any]]:
    """Check that an adapter's coefficients meet the basis they were trained in, in this base.

    Args:
        folder: the adapter folder.
        base: the base model's checkpoint; by default the one that the adapter names.

    Returns:
        One row for each adapted matrix: module, interval, and how its basis was found.

    Raises:
        InputError: any vector is not the trained one; the message names the layer and the reason.
    """
    adapter = read_folder(folder)
    checkpoint = open_checkpoint(_base_path(adapter, base))
    rows = []
    for layer in adapter.layers:
        _basis(layer, adapter, checkpoint)
        origin = "stored with the adapter" if layer.U is not None else "decomposed again, every vector equal"
        rows.append({"module": layer.module, "interval": layer.proof.interval, "basis": origin})
    return rows


def export_lora(
    folder: str | Path, output: str | Path, base: str | Path | None = None, rank: int | None = None
) -> Path:
    """Write the adapter as a LoRA that PEFT loads without specbasis: B = U C, A = Vh, scaling 1.

    Exact, and no matrix is decomposed, unless ``rank`` truncates: then the best approximation of that rank, from
        the SVD of the r × r core alone, C ≈ P diag(s) Qᵀ, B = U P diag(s), A = Qᵀ Vh.

    Args:
        folder: the adapter folder.
        output: the new folder.
        base: the base model's checkpoint; needed where the basis was not saved, and for convolutions.
        rank: at most this rank for every layer.

    Raises:
        InputError: the basis is not the trained one, the rank is below 1, or the output exists already.
    """
    adapter = read_folder(folder)
    if rank is not None and rank < 1:
        raise InputError(f"got rank = {rank}; want at least 1")
    want_new(Path(output))
    need = base is not None or any(layer.U is None for layer in adapter.layers)
    checkpoint = open_checkpoint(_base_path(adapter, base)) if need else _base_at_hand(adapter)
    tensors: dict[str, Tensor] = {PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    ranks: dict[str, int] = {}
    transposed = False
    for layer in adapter.layers:
        U, Vh, kernel, is_transposed = _basis(layer, adapter, checkpoint)
        whole = layer.M.ndim == 2  # a square, of which every rank is trained, whatever its numbers came to
        B, A = _lora_factors(U.double(), layer.core, Vh.double(), rank, whole)
        ranks[layer.module] = B.shape[1]
        transposed |= is_transposed
        if len(kernel) == 2:
            A, B = A.view(len(A), -1, *kernel), B[:, :, None, None]
        tensors[f"{PREFIX}{layer.module}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{PREFIX}{layer.module}.lora_B.weight"] = B.float().contiguous()
    common = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type"),
        "auto_mapping": adapter.config.get("auto_mapping"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "revision": adapter.config.get("revision"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {module: r for module, r in ranks.items() if r != common},
        "alpha_pattern": {module: r for module, r in ranks.items() if r != common},
        "target_modules": sorted(ranks),
        "modules_to_save": adapter.config.get("modules_to_save"),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    output = Path(output)
    digest = weights_sha256(checkpoint) if checkpoint else ""
    metadata = {"format": "pt"} | ({"base_sha256": digest} if digest else {})
    write_whole(output / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
    write_whole(output / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_whole(output / CARD, adapter_card(config, digest, adapter.whole))
    return output


def _base_at_hand(adapter: AdapterFolder) -> Checkpoint | None:
    """The base that an adapter names, where it is on this machine and the trained one still."""
    name = str(adapter.config.get("base_model_name_or_path") or "")
    if not name or not Path(name).exists():
        return None
    with suppress(InputError):
        checkpoint = open_checkpoint(name)
        for layer in adapter.layers:
            _basis(layer, adapter, checkpoint)
        return checkpoint
    return None


def kept_shares(folder: str | Path, rank: int) -> dict[str, float]:
    """What `export_lora` keeps of each layer's squared update at a rank: Σ_{i<rank} σ_i² / Σ σ_i² of its core.

    1 where the update is zero. Raises InputError as `read_folder` does.
    """
    squares = {layer.module: decompose(layer.core).S.square() for layer in read_folder(folder).layers}
    return {module: float(S[:rank].sum() / S.sum()) if S.sum() else 1.0 for module, S in squares.items()}


def _lora_factors(U: Tensor, C: Tensor, Vh: Tensor, rank: int | None, whole: bool) -> tuple[Tensor, Tensor]:
    coupled = torch.ones_like(C, dtype=torch.bool) if whole else C != 0
    left, right = coupled.any(1), coupled.any(0)
    if rank is None or rank >= min(int(left.sum()), int(right.sum())):
        if left.sum() < right.sum():  # only the ranks of the smaller side that have coefficients
            return U[:, left], C[left] @ Vh
        right[0] |= not bool(right.any())
        return U @ C[:, right], Vh[right]
    core = decompose(C, ranks=rank, name="core")
    return U @ (core.U * core.S), core.Vh @ Vh


def _basis(
    layer: StoredLayer, adapter: AdapterFolder, base: Checkpoint | None
) -> tuple[Tensor, Tensor, tuple[int, ...], bool]:
    """The proven basis of a stored layer, its kernel size if a convolution, and whether it is stored (in, out)."""
    name = f"{adapter.path}: {layer.module}"
    if base is None:
        assert layer.U is not None
        assert layer.Vh is not None
        return layer.U, layer.Vh, (), False
    weight = _base_weight(layer, base)
    W, is_transposed = oriented(weight.flatten(1), layer.proof)
    kernel = tuple(weight.shape[2:])
    basis = str(adapter.config.get("basis", "pretrained"))
    stored = None if layer.U is None or layer.Vh is None else (layer.U, layer.Vh)

    def compute() -> SVD:
        return basis_of(W, layer.proof.interval, basis, name)

    U, Vh, _ = settled_basis(layer.proof, W, stored, compute, name, singular=basis == "pretrained")
    return U, Vh, kernel, is_transposed


def _base_weight(layer: StoredLayer, base: Checkpoint) -> Tensor:
    """The weight of an adapted layer, by its name or else by its values.

    transformers renames parameters of some models while it loads them: then only the digest tells which it was.
    """
    want = "the base that the adapter was trained on"
    try:
        return base[parameter_named(base, f"{layer.module}.weight", where=base.source, want=want)]
    except InputError:
        shape = layer.proof.shape
        for name, entry in base.entries.items():
            if len(entry.shape) >= 2 and (entry.shape[0], math.prod(entry.shape[1:])) in (shape, shape[::-1]):
                weight = base[name]
                if layer.proof.digest in (weight_digest(weight.flatten(1)), weight_digest(weight.flatten(1).mT)):
                    return weight
        raise


def _base_path(adapter: AdapterFolder, base: str | Path | None) -> str:
    return str(base) if base else named_base(adapter.config, str(adapter.path))


def merge(folder: str | Path, output: str | Path, base: str | Path | None = None) -> Path:
    """Write the dense model W + U C Vh, head included, as an ordinary transformers folder.

    Sums are formed in float64 and rounded once to the base's dtype. Needs transformers and peft. LoRA and its
    relatives, which need neither, are written as `checkpoint.open_tuned` reads them.

    Raises:
        InputError: the basis is not the trained one, the base cannot be loaded for the adapter's task, or the
            output exists already.
    """
    import transformers
    from peft import PeftModel

    from specbasis.adapter import peft_bridge  # noqa: F401  registers the method

    want_new(Path(output))
    stored = adapter_folder(folder)
    if stored.kind != "SPECTRAL":
        opened = open_checkpoint(base or named_base(stored.config, str(folder)))
        tuned = open_tuned(folder, opened)
        refuse_other_weights(tuned)
        return write_model(tuned, Path(output))
    adapter = read_folder(folder)
    checkpoint = open_checkpoint(_base_path(adapter, base))
    for layer in adapter.layers:  # PEFT's own words for a module that the base lacks are a traceback
        weight = _base_weight(layer, checkpoint).flatten(1)
        check_format(layer.proof, oriented(weight, layer.proof)[0], layer.module)
    address = transformers_address(_base_path(adapter, base))
    mapping = adapter.config.get("auto_mapping") or {}
    task = MODEL_CLASSES.get(str(adapter.config.get("task_type")), mapping.get("base_model_class", "AutoModel"))
    model_class = getattr(transformers, task, None)
    if model_class is None:
        raise InputError(
            f"{folder}: made for a {task}, which is not a class of transformers; merge it in your own code"
        )
    labels = label_count(adapter.config, adapter.whole)
    options = {"num_labels": labels} if labels else {}
    output = Path(output)
    with quiet(), writing(output):
        model = model_class.from_pretrained(**address, dtype="auto", trust_remote_code=False, **options)
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
        merged.save_pretrained(output)
    location = Path(address["pretrained_model_name_or_path"], address.get("subfolder", ""))
    tokenizer = ("tokenizer", "vocab", "special_tokens", "spm", "merges")
    beside = (*tokenizer, "sentence_", "config_sentence_")  # sentence-transformers'
    for file in sorted(location.iterdir()) if location.is_dir() else []:
        if file.is_file() and not file.is_symlink() and file.name.startswith(beside):
            shutil.copy2(file, output / file.name)
    copy_modules(location, output)
    return output
