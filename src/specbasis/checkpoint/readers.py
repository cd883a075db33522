"""Readers: the tensors of one weights file, known from its header; its kind is told from its first bytes.

Nothing is unpickled that could run code, and names are checked before they reach a terminal.
"""

from __future__ import annotations

import importlib
import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specbasis.checkpoint.entry import (
    Entry,
    check_names,
    first_line,
    inside,
    json_object,
    no_key,
    parsing,
    reading,
    shown,
)
from specbasis.checkpoint.hub import Repository
from specbasis.core.dtypes import FORMATS, UNSCALED, by_code, name_of
from specbasis.core.errors import InputError

_TENSORFLOW = ("TensorFlow", "from_tf", "tensorflow tf-keras")

_CONVERT = {
    ".h5": _TENSORFLOW,
    ".index": _TENSORFLOW,
    ".meta": _TENSORFLOW,
    ".data-00000-of-00001": _TENSORFLOW,
    ".msgpack": ("Flax", "from_flax", "flax"),
}
"""Suffix → framework, transformers' option that reads it, and what that needs."""


def file_entries(path: Path, source: str, key: str = "") -> Mapping[str, Entry]:
    """The tensors of one weights file on disk; its kind is told from its first bytes."""
    name = shown(path.name)
    if not path.is_file():
        raise InputError(f"{source}: {name} is not a regular file")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise InputError(f"{source}: {name} is empty (0 bytes)")
    suffix = ".h5" if head.startswith(b"\x89HDF") else path.suffix
    config = path.parent / "config.json"
    check_framework(path.with_suffix(suffix).name, source, str(path.parent), config.read_bytes)
    if head.startswith((b"PK", b"\x80")) and path.suffix != ".safetensors":
        return tensor_entries(_nested(_torch_load(path, source), key, source), source, bounded=True)
    no_key(key, source)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _safetensors_entries(path, source)
    if head.startswith(b"GGUF"):
        return _gguf_entries(path, source)
    if path.suffix == ".onnx":
        return _onnx_entries(path, source)
    raise InputError(
        f"{source}: {name} is neither a safetensors nor a torch file (it begins with {head[:4]!r}); "
        "convert it to safetensors first"
    )


def check_framework(name: str, source: str, model: str, config: Callable[[], bytes]) -> None:
    """Refuse a TensorFlow or Flax file by its suffix, with the command that converts it.

    Args:
        name: the file's.
        source: what the user called it.
        model: the folder or repository, for the command.
        config: reads the model's config.json, for the class that the command loads.
    """
    if Path(name).suffix not in _CONVERT:
        return
    framework, option, package = _CONVERT[Path(name).suffix]
    try:
        architecture = str(json_object(config())["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        architecture = ""
    kind = architecture.removeprefix("TF").removeprefix("Flax")
    kind = kind if kind.isidentifier() and kind.isascii() else "AutoModel"
    place = model if re.fullmatch(r"[\w./ -]+", model, re.ASCII) else "FOLDER"
    # transformers dropped both frameworks in 5, and its last releases before that fail to convert.
    raise InputError(
        f"{source}: {shown(name)} is a {framework} file, which is not read here; convert it once, with "
        f'pip install "transformers<4.50" torch {package} and then python -c "import transformers; '
        f"transformers.{kind}.from_pretrained('{place}', {option}=True).save_pretrained('CONVERTED')\""
    )


def _safetensors_entries(path: Path, source: str) -> dict[str, Entry]:
    with reading(source):
        handle: Any = safe_open(path, framework="pt")
        names = list(handle.keys())
        check_names(names, source)
        headers = {name: handle.get_slice(name) for name in names}
        entries = {
            name: Entry(
                tuple(header.get_shape()),
                by_code(header.get_dtype()),
                lambda name=name: handle.get_tensor(name),
            )
            for name, header in headers.items()
        }
    return {name: with_scale(entry, name, entries) for name, entry in entries.items()}


def remote_entries(repository: Repository, file: str, source: str, stream: bool) -> dict[str, Entry]:
    """The tensors of a safetensors file on the Hub, known from its header, which is read by byte range.

    A tensor is read by its own byte range when streaming, else from the whole file, downloaded at first need.
    """
    head = repository.header(file)
    try:
        header = _parse_header(head[8:], repository.files[file].size - len(head))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: {file} is truncated or corrupted ({first_line(error)})") from error
    check_names(header, source)
    downloaded: dict[str, Mapping[str, Entry]] = {}

    def whole(name: str) -> Tensor:
        if not downloaded:
            downloaded[file] = _safetensors_entries(repository.path(file), source)
        return downloaded[file][name].load()

    def part(name: str) -> Tensor:
        shape, dtype, start, stop = header[name]
        if dtype not in FORMATS:
            raise InputError(f"{source}: {name!r} is stored as {dtype}, which cannot be streamed")
        return _numbers(repository.read(file, len(head) + start, len(head) + stop), dtype, shape)

    load = part if stream else whole
    entries = {
        name: Entry(shape, dtype, lambda name=name: load(name)) for name, (shape, dtype, *_) in header.items()
    }
    return {name: with_scale(entry, name, entries) for name, entry in entries.items()}


def _parse_header(text: bytes | bytearray, size: int) -> dict[str, tuple[tuple[int, ...], str, int, int]]:
    """Name → shape, dtype, start and stop of a safetensors header, its tensors filling ``size`` bytes without gaps.

    Raises:
        ValueError, KeyError, TypeError: anything else.

    Source: the safetensors format.
    """
    found = {}
    for name, item in json_object(bytes(text)).items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(item["shape"]), item["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name!r}: sizes and offsets are no whole numbers")
        dtype = by_code(str(item["dtype"]))
        if dtype in FORMATS and stop - start != FORMATS[dtype].bytes * math.prod(shape):
            raise ValueError(f"{name!r}: {stop - start} bytes for {shape} {dtype}")
        found[name] = (shape, dtype, start, stop)
    end = 0
    for _, _, start, stop in sorted(found.values(), key=lambda item: item[2:]):
        if start != end or stop < start:
            raise ValueError("tensors overlap or leave gaps")
        end = stop
    if end != size:
        raise ValueError(f"tensors fill {end} of {size} bytes")
    return found


def with_scale(entry: Entry, name: str, names: Collection[str]) -> Entry:
    """Mark a float8 tensor whose scales are stored beside it: the weights are the product, not these numbers."""
    scales = (name + "_scale_inv", name + "_scale")
    if entry.dtype.startswith("float8") and any(scale in names for scale in scales):
        return replace(entry, dtype=f"scaled {entry.dtype}")
    return entry


def _torch_load(path: Path, source: str) -> Any:
    """What a torch file holds, memory-mapped where its format allows, without running any code."""
    zipped = _is_archive(path, source)
    with parsing(path.name, source):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            detail = found.group(1) if found else first_line(ValueError(str(error).rpartition("error:")[2]))
            needs = "needs" if found else "is corrupted or needs"
            raise InputError(
                f"{source}: {shown(path.name)} {needs} code ({detail}) to be unpickled, which is refused; if you "
                "trust it, load it with torch and write its tensors with safetensors.torch.save_file"
            ) from error


def _is_archive(path: Path, source: str) -> bool:
    """Whether a file is a zip archive, which is refused if it is compressed, overlapping, or of another kind."""
    name = shown(path.name)
    with parsing(name, source):
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
    if any(item.filename.endswith("/constants.pkl") for item in items):
        raise InputError(
            f"{source}: {name} is a TorchScript program; load it with torch.jit.load and save its state_dict"
        )
    if any(item.compress_type != zipfile.ZIP_STORED or item.compress_size != item.file_size for item in items):
        raise InputError(f"{source}: {name} has compressed entries, which torch never writes; refused")
    if sum(item.file_size for item in items) > path.stat().st_size:
        raise InputError(f"{source}: {name} unpacks to more than its size, which torch never writes; refused")
    if not any(item.filename.endswith("data.pkl") for item in items):
        raise InputError(f"{source}: {name} is a zip archive, but not torch's (no data.pkl); want a weights file")
    return True


def _nested(found: Any, key: str, source: str) -> Mapping[str, Any]:
    """The dictionary of tensors at a dotted key; without a key the only one there is."""
    for part in _walk(found, key, source):
        found = part
    found_in = list(_state_dicts(found))
    if len(found_in) == 1:
        return found_in[0][1]
    if found_in:
        some = ", ".join(f"#{shown(place)} ({len(d)})" for place, d in found_in[:6])
        raise InputError(f"{source}: several dictionaries of tensors inside; add the one you mean: {some}")
    if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
        return found
    kind = type(found).__name__
    raise InputError(f"{source}: holds no dictionary of tensors (got {kind})")


def _walk(found: Any, key: str, source: str) -> Iterator[Any]:
    """Steps down a dotted key; a dictionary's own key may hold dots itself."""
    while key:
        keys = [k for k in found if isinstance(k, str)] if isinstance(found, Mapping) else []
        options = [k for k in keys if (key + ".").startswith(k + ".")]
        if not options:
            have = ", ".join(map(shown, keys[:6])) if keys else type(found).__name__
            raise InputError(f"{source}: no key '{key}' inside; there is: {have}")
        step = max(options, key=len)
        found, key = found[step], key[len(step) + 1 :]
        yield found


def _state_dicts(found: Any, place: str = "", depth: int = 4) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every nested dictionary that maps strings to tensors with at least one matrix among them."""
    if not isinstance(found, Mapping) or depth == 0:
        return
    tensors = [v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)]
    if any(t.ndim >= 2 for t in tensors):
        yield place, found
        return
    for key, value in found.items():
        if isinstance(key, str):
            yield from _state_dicts(value, f"{place}.{key}" if place else key, depth - 1)


def tensor_entries(tensors: Mapping[str, Any], source: str, *, bounded: bool = False) -> dict[str, Entry]:
    """Entries of tensors in memory; ``bounded`` refuses views that claim more numbers than the file stores."""
    found = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    check_names(found, source)
    entries = {}
    for name, tensor in found.items():
        dtype = name_of(tensor.dtype)
        if tensor.layout is not torch.strided:
            dtype = f"sparse {dtype}"
        elif bounded and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            dtype = f"repeated {dtype}"
        entries[name] = Entry(tuple(tensor.shape), dtype, lambda tensor=tensor: tensor.detach())
    return {name: with_scale(entry, name, entries) for name, entry in entries.items()}


_QUANTISED_OPERATORS = ("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
                        "QLinearMatMul", "QLinearConv", "MatMulNBits", "QAttention", "QGemm")  # fmt: skip


def _onnx_entries(path: Path, source: str) -> dict[str, Entry]:
    """The initialisers of an ONNX graph; data that lies outside the file is read from inside its folder only."""
    onnx = _extra("onnx", source)
    with parsing(path.name, source):
        graph = onnx.load(str(path), load_external_data=False).graph
        operators = sorted({node.op_type for node in graph.node if node.op_type in _QUANTISED_OPERATORS})
        if operators:
            raise _quantised(path, source, f"its graph uses {', '.join(operators)}", _onnx_noise(onnx, graph))
        check_names((tensor.name for tensor in graph.initializer), source)
        kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    return {
        tensor.name: Entry(
            tuple(tensor.dims),
            by_code(kinds[tensor.name]),
            lambda tensor=tensor: _onnx_tensor(onnx, tensor, path, source),
        )
        for tensor in graph.initializer
    }


def _onnx_tensor(onnx: Any, tensor: Any, path: Path, source: str) -> Tensor:
    """One floating-point initialiser, from the file itself or from the file that it points to."""
    with parsing(path.name, source):
        dtype = by_code(onnx.TensorProto.DataType.Name(tensor.data_type))
        if dtype not in UNSCALED:
            raise InputError(f"{source}: {tensor.name!r} is not stored in floating point")
        shape = tuple(tensor.dims)
        size = FORMATS[dtype].bytes * math.prod(shape)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {item.key: item.value for item in tensor.external_data}
            with inside(path.parent, where.get("location", ""), source).open("rb") as file:
                file.seek(int(where.get("offset") or 0))
                raw = file.read(size)
        else:
            raw = tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()
        if len(raw) != size:
            raise InputError(f"{source}: {tensor.name!r} has {len(raw)} of its {size} bytes")
        return _numbers(raw, dtype, shape)


def _onnx_noise(onnx: Any, graph: Any) -> tuple[str, float] | None:
    """The first quantised matrix and its rounding noise, from its integers and their scale."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        found = [stored[name] for name in node.input[:3] if name in stored]
        if node.op_type == "DequantizeLinear" and len(found) == 3 and len(found[0].dims) == 2:
            q, step, zero = (torch.from_numpy(onnx.numpy_helper.to_array(t).astype("float64")) for t in found)
            if step.numel() == 1:
                return found[0].name, _rounding_noise(step.reshape(1), (q - zero) * step)
    return None


def _gguf_entries(path: Path, source: str) -> dict[str, Entry]:
    """The tensors of a GGUF file, memory-mapped, in (out, in) order."""
    gguf = _extra("gguf", source)
    with parsing(path.name, source):
        tensors = gguf.GGUFReader(path).tensors
        check_names((tensor.name for tensor in tensors), source)
        quantised = [t for t in tensors if len(t.shape) > 1 and by_code(t.tensor_type.name) not in FORMATS]
        if quantised:
            names = ", ".join(sorted({tensor.tensor_type.name for tensor in quantised}))
            share = f"{len(quantised)} of its {len(tensors)} tensors are stored as {names}"
            raise _quantised(path, source, share, _gguf_noise(gguf, quantised))
        entries = {}
        for tensor in tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            dtype = by_code(tensor.tensor_type.name)
            entries[tensor.name] = Entry(
                shape,
                dtype,
                lambda data=tensor.data, shape=shape, dtype=dtype: _numbers(data.tobytes(), dtype, shape),
            )
    return entries


def _gguf_noise(gguf: Any, quantised: list[Any]) -> tuple[str, float] | None:
    """The first matrix that can be dequantised and its rounding noise, from the levels in its blocks of 32."""
    for tensor in quantised:
        try:
            rows = gguf.quants.dequantize(tensor.data[:64], tensor.tensor_type)
        except NotImplementedError:
            continue
        blocks = torch.from_numpy(rows.astype("float64")).reshape(-1, 32)
        steps = blocks.sort(dim=1).values.diff(dim=1)
        least = torch.where(steps > 1e-6 * blocks.abs().amax(1, keepdim=True), steps, math.inf).amin(1)
        return tensor.name, _rounding_noise(least[least.isfinite()], blocks)
    return None


def _numbers(raw: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its own from little-endian bytes."""
    kind = FORMATS[dtype].torch
    writable = raw if isinstance(raw, bytearray) else bytearray(raw)
    return (torch.frombuffer(writable, dtype=kind) if raw else torch.empty(0, dtype=kind)).reshape(shape)


def _rounding_noise(steps: Tensor, values: Tensor) -> float:
    """Noise of rounding to levels a step apart, as a share of the values' root mean square: step/√12 / rms."""
    return float((steps.square().mean() / 12).sqrt() / values.square().mean().sqrt())


def _quantised(path: Path, source: str, reason: str, noise: tuple[str, float] | None) -> InputError:
    figure = f" (about {noise[1]:.1%} of the root mean square of {noise[0]!r})" if noise else ""
    return InputError(
        f"{source}: {shown(path.name)} is quantised ({reason}), and its rounding noise{figure} would pass for "
        "a change of the trailing singular vectors; want the model in floating point"
    )


def _extra(name: str, source: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{source}: reading this file needs {name}; pip install 'specbasis[{name}]'") from error
    return module
