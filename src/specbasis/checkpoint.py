"""A checkpoint as a lazy mapping from parameter name to tensor, whatever it is stored in.

Weights are data: nothing is unpickled that could run code, no path is followed out of its folder, and names are
checked before they reach a terminal. Nothing here knows what a parameter means.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specbasis.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One stored tensor, known from headers alone: its shape, its dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor] = field(repr=False, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether the stored numbers are floating-point."""
        return self.dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """Parameter name → tensor, read on access, one tensor in memory at a time.

    Attributes:
        source: what the user called it.
        entries: name → shape, dtype and reader, in file order.
        files: the files that hold the weights, for provenance.
        config: the model's config.json where there is one, else empty.
    """

    source: str
    entries: Mapping[str, Entry]
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        with _reading(self.source):
            return self.entries[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_checkpoint(source: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        source: one of

            - a `.safetensors` file; a torch file (`.pt .pth .bin .ckpt …`, told by content, not by name);
            - a folder with either, sharded with an index or not (Hugging Face layout);
            - ``pkg:package/path/to/file``: a resource inside an installed package, which is not imported;
            - any of these with ``#key.key``: a dictionary nested in a torch file;
            - a mapping from names to tensors, such as a `state_dict`.

    Raises:
        InputError: nothing there, not a checkpoint, truncated, corrupted, needing code to unpickle, leading out of
            its folder, or holding no tensors.
    """
    if isinstance(source, Mapping):
        return Checkpoint("state_dict", _tensor_entries(source, "state_dict"))
    text = str(source)
    place, key = (text, "") if Path(text).exists() else text.partition("#")[::2]
    path = _package_path(place) if place.startswith("pkg:") else Path(place).expanduser()
    if not path.exists():
        raise InputError(f"{text}: no such file or folder")
    with _reading(text):
        checkpoint = _open_folder(path, text) if path.is_dir() else _open_file(path, text, key)
    if key and path.is_dir():
        raise InputError(f"{text}: '#{key}' addresses a dictionary inside one torch file, but this is a folder")
    if not checkpoint.entries:
        raise InputError(f"{text}: holds no tensors")
    return checkpoint


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of every tensor, for a checkpoint that has no files."""
    digest = hashlib.sha256()
    for name, entry in checkpoint.entries.items():
        digest.update(f"{name} {entry.shape} {entry.dtype}\n".encode())
        digest.update(checkpoint[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- files and folders ------------------------------------------------------------------------------------------


def _open_file(path: Path, source: str, key: str = "") -> Checkpoint:
    """Open one weights file; its kind is told from its first bytes."""
    if not path.is_file():
        raise InputError(f"{source}: {path.name} is not a regular file")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise InputError(f"{source}: {path.name} is empty (0 bytes)")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        if key:
            raise InputError(f"{source}: a safetensors file holds no nested dictionaries; drop '#{key}'")
        entries = _safetensors_entries(path, source)
    elif head[:2] == b"PK" or head[:1] == b"\x80":
        entries = _tensor_entries(_nested(_torch_load(path, source), key, source), source)
    else:
        raise InputError(
            f"{source}: {path.name} is neither a safetensors nor a torch file (it begins with {head[:4]!r}); "
            "convert it to safetensors first"
        )
    return Checkpoint(source, entries, (path,), _config(path.parent))


_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
_PREFERRED = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


def _open_folder(folder: Path, source: str) -> Checkpoint:
    """Open a folder: an index first, then a single weights file, then complete shards without an index."""
    for pattern in ("*.safetensors.index.json", "*.bin.index.json"):
        indexes = sorted(folder.glob(pattern))
        if len(indexes) > 1:
            raise _ambiguous(source, indexes)
        if indexes:
            return _open_index(indexes[0], source)
    for name in _PREFERRED:
        if (folder / name).exists():
            return _open_file(_inside(folder, name, source), source)
    for pattern in _WEIGHTS:
        files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != "training_args.bin")
        if len(files) == 1 and not _SHARD.search(files[0].name):
            return _open_file(_inside(folder, files[0].name, source), source)
        if files:
            return _open_shards(files, source)
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{source}: a PEFT adapter without weights; want adapter_model.safetensors beside its config"
        )
    raise InputError(f"{source}: no weights in this folder; want one of {', '.join(_WEIGHTS)}")


def _open_index(index: Path, source: str) -> Checkpoint:
    """Open the shards that an index names, and check that each holds what the index says."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: {index.name} is not an index (want a JSON object with weight_map)") from error
    parts = {shard: _open_file(_inside(index.parent, shard, source), source) for shard in shards}
    entries = {}
    for name, shard in weight_map.items():
        if name not in parts[shard].entries:
            raise InputError(f"{source}: {index.name} puts {name!r} into {shard}, which does not hold it")
        entries[name] = parts[shard].entries[name]
    extra = {name: shard for shard, part in parts.items() for name in part if name not in entries}
    if extra:
        name, shard = next(iter(extra.items()))
        raise InputError(
            f"{source}: {shard} holds {len(extra)} tensors that {index.name} does not list, e.g. {name!r}"
        )
    files = tuple(file for part in parts.values() for file in part.files)
    return Checkpoint(source, entries, files, _config(index.parent))


def _open_shards(files: list[Path], source: str) -> Checkpoint:
    """Open shards that no index names, when their own numbering shows that none is missing."""
    numbers = [_SHARD.search(path.name) for path in files]
    expected = int(numbers[0].group(2)) if numbers[0] else 0
    if any(number is None for number in numbers) or len({n.group(2) for n in numbers if n}) != 1:
        raise _ambiguous(source, files)
    if sorted(int(n.group(1)) for n in numbers if n) != list(range(1, expected + 1)):
        raise InputError(f"{source}: {len(files)} of {expected} shards are here, and no index names them all")
    parts = [_open_file(_inside(path.parent, path.name, source), source) for path in files]
    entries = {name: entry for part in parts for name, entry in part.entries.items()}
    return Checkpoint(source, entries, tuple(files), parts[0].config)


def _inside(folder: Path, name: object, source: str) -> Path:
    """Path of a file named by an index, refused where it leads out of its folder.

    The Hub's cache links snapshots/REVISION/file to blobs/ of the same repository: that much is allowed.
    """
    posix = PurePosixPath(str(name))
    if (
        not isinstance(name, str)
        or posix.is_absolute()
        or ".." in posix.parts
        or "\\" in name
        or not name.isprintable()
    ):
        raise InputError(f"{source}: {name!r} leads out of its folder and is refused")
    path = folder / name
    if not path.exists():
        raise InputError(f"{source}: {name} is missing")
    root = folder.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
        raise InputError(f"{source}: {name} is a link out of its folder and is refused")
    return path


def _package_path(place: str) -> Path:
    """Path of ``pkg:package/inner/path``, found without importing the package."""
    package, _, inner = place.removeprefix("pkg:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise InputError(f"{place}: no installed package {package!r}; install it, or name a path")
    return _inside(Path(folders[0]), inner or ".", place)


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as data, empty where there is none; code that it names is never run."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _ambiguous(source: str, files: list[Path]) -> InputError:
    names = ", ".join(path.name for path in files[:4]) + (", …" if len(files) > 4 else "")
    return InputError(f"{source}: several weights files ({names}) and nothing says which; name one")


# --- contents ---------------------------------------------------------------------------------------------------

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _safetensors_entries(path: Path, source: str) -> dict[str, Entry]:
    handle: Any = safe_open(path, framework="pt")
    names = list(handle.keys())
    _check_names(names, source)
    headers = {name: handle.get_slice(name) for name in names}
    return {
        name: Entry(
            tuple(header.get_shape()),
            _DTYPES.get(header.get_dtype(), header.get_dtype().lower()),
            lambda name=name: handle.get_tensor(name),
        )
        for name, header in headers.items()
    }


def _torch_load(path: Path, source: str) -> Any:
    """What a torch file holds, memory-mapped where its format allows, without running any code."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise InputError(f"{source}: {path.name} has compressed entries, which torch never writes; refused")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported (?:global|class)[^\w]*)\s*([\w.]+)", str(error))
        needs = f" ({found.group(1)})" if found else ""
        raise InputError(
            f"{source}: {path.name} needs code{needs} to be unpickled, which is refused; if you trust "
            "it, load it with torch and write its tensors with safetensors.torch.save_file, then use that file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: {path.name} is truncated or corrupted ({_first_line(error)})") from error


def _nested(found: Any, key: str, source: str) -> Mapping[str, Any]:
    """The dictionary of tensors at a dotted key; without a key the only one there is."""
    for part in _walk(found, key, source):
        found = part
    if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
        return found
    inside = list(_state_dicts(found))
    if len(inside) == 1:
        return inside[0][1]
    if inside:
        shown = ", ".join(f"#{place} ({len(d)})" for place, d in inside[:6])
        raise InputError(f"{source}: several dictionaries of tensors inside; add the one you mean: {shown}")
    raise InputError(f"{source}: holds no dictionary of tensors (got {type(found).__name__})")


def _walk(found: Any, key: str, source: str) -> Iterator[Any]:
    """Steps down a dotted key; a dictionary's own key may hold dots itself."""
    while key:
        options = (
            [k for k in found if isinstance(k, str) and (key + ".").startswith(k + ".")]
            if (isinstance(found, Mapping))
            else []
        )
        if not options:
            have = ", ".join(map(str, list(found)[:6])) if isinstance(found, Mapping) else type(found).__name__
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


def _tensor_entries(tensors: Mapping[str, Any], source: str) -> dict[str, Entry]:
    found = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    _check_names(found, source)
    return {
        name: Entry(tuple(t.shape), str(t.dtype).removeprefix("torch."), lambda t=t: t.detach())
        for name, t in found.items()
    }


def _check_names(names: Any, source: str) -> None:
    for name in names:
        if not name.isprintable():
            raise InputError(f"{source}: tensor name {name!r} has control characters and is refused")


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turn what a reader raises on a damaged file into one line that names the source."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{source}: truncated or corrupted safetensors file ({_first_line(error)})") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
