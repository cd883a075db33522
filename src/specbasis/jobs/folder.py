"""The results folder: where everything that runs long is kept, so that it can be stopped, go on, and be read again.

A folder holds what one configuration made. Its manifest says which configuration that is, with which versions and
on which machine; whoever comes with another one is refused in words. One process at a time writes in it, and
every file is there whole or not at all. What else the folder holds is up to its kind.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from specbasis.checkpoint.atomic import clear, clear_beside, is_temporary, write_whole, writing
from specbasis.checkpoint.digest import proven, sealed
from specbasis.checkpoint.regular import read_json
from specbasis.core.brief import brief
from specbasis.core.errors import InputError

LOCK = ".lock"
"""File that the process holds which writes in a folder; it stays behind, and then says nothing."""


@dataclass(frozen=True)
class Kind:
    """What a folder is called in messages, and how its manifest is told from others.

    Attributes:
        noun: what the folder holds, such as "comparison".
        manifest: name of the manifest's file.
        version: key of the layout's version in the manifest, and the version that is written; None where the
            layout has none.
        keys: what a manifest has to have.
        mark: what its configuration has as ``kind``, where a layout serves several kinds.
        grows: the part of its configuration to which entries can be added; empty where nothing can.
        form: of what its parts are, where they are there: a type, the list of one form, or an object of forms, in
            which `EACH` stands for every other name.
    """

    noun: str
    manifest: str = "manifest.json"
    version: tuple[str, int] | None = None
    keys: tuple[str, ...] = ("config",)
    mark: str | None = None
    grows: str = ""
    form: Mapping[str, Any] = field(default_factory=dict)

    def read(self, folder: Path) -> dict[str, Any]:
        """The manifest of a folder.

        Raises:
            InputError: no such folder, no manifest in it, or one of another kind or version.
        """
        path = folder / self.manifest
        if not path.is_file():
            raise InputError(
                f"{folder}: no {self.noun} here (no {self.manifest}); want a folder in which one was kept"
            )
        try:
            manifest: dict[str, Any] = proven(read_json(path))
            key, wanted = self.version or ("", None)
            if key and manifest[key] != wanted:
                raise InputError(
                    f"{folder}: {self.noun} of format {manifest[key]}; this version reads format {wanted}: "
                    "run it again in a new folder"
                )
            for name in self.keys:
                manifest[name]
            wrong = _misfit(manifest, {"config": {}, **self.form})
            if wrong:
                raise ValueError(f"what it says of{wrong} is nothing that was written there")
            if manifest["config"].get("kind") != self.mark:
                raise InputError(f"{folder}: holds no {self.noun} but another kind of run; choose another folder")
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{path}: is not the manifest of a {self.noun} ({reason}); choose another folder"
            ) from error
        return _Fields(manifest, path)


EACH = "*"
"""In a `Kind.form`: every name that it does not mention."""


def _misfit(value: Any, form: Any, place: str = "") -> str:
    """Where a value from a manifest is not of its form; empty where all of it is."""
    if isinstance(form, type | UnionType):
        return "" if isinstance(value, form) and not isinstance(value, bool) else place
    if not isinstance(value, type(form)):
        return place
    inner = enumerate(value) if isinstance(value, list) else value.items()
    forms = {EACH: form[0]} if isinstance(form, list) else form
    known = ((name, part, forms.get(name, forms.get(EACH))) for name, part in inner)
    wrong = (_misfit(part, wanted, f"{place} {name}") for name, part, wanted in known if wanted is not None)
    return next(filter(None, wrong), "")


class _Fields(dict[str, Any]):
    """An object of a manifest, which says in one line what it lacks."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        super().__init__({name: _fields(value, path) for name, value in fields.items()})
        self._manifest = path  # no name that a page's template may look up

    def __missing__(self, name: str) -> Any:
        raise InputError(
            f"{self._manifest}: lacks {name!r}: it was changed, or is of another version; run it again"
        )


def _fields(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return [_fields(inner, path) for inner in value]
    return _Fields(value, path) if isinstance(value, dict) else value


@brief
@dataclass(frozen=True, eq=False)
class Folder:
    """A results folder.

    Attributes:
        folder: where it is.
        manifest: its contents; `write_manifest` puts them on disk. ``sealed`` says that everything in the folder
            carries a seal (`checkpoint.digest`): in one that an earlier version began, what has none is taken.
        kind: what it holds.
    """

    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    kind: Kind = Kind("results")

    def write_manifest(self) -> None:
        """Put the manifest on disk, with its seal, whole or not at all."""
        self.manifest.update(sealed(self.manifest))
        write_json(self.folder / self.kind.manifest, self.manifest)


@contextmanager
def opened(
    path: Path, kind: Kind, config: Mapping[str, Any], *, wait: bool = False, add: bool = False
) -> Iterator[Folder]:
    """Begin, or go on with, what one configuration makes in a folder, alone in it until the block ends.

    The manifest is that of the folder, or a new one that has format and configuration and is not on disk yet. A
    manifest beside which nothing was kept gives way to another configuration.

    Args:
        path: the folder; made where it is missing.
        kind: what it holds.
        config: what makes two runs the same; compared as JSON has it.
        wait: wait while another process writes there.
        add: what the folder holds may lack entries of ``kind.grows``, or have others: it gets them all.

    Raises:
        InputError: the folder is a file, cannot be written, is in use, or holds anything else than this.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; want a folder for the {kind.noun}, new or of the same {kind.noun}")
    if not (path / kind.manifest).exists() and _kept(path, kind):
        raise InputError(f"{path}: is not empty and holds no {kind.noun}; choose a new folder")
    wanted = json.loads(json.dumps(dict(config)))
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=wait):
        manifest: dict[str, Any] = {}
        if (path / kind.manifest).exists():
            manifest = kind.read(path)
            kept = manifest["config"]
            if kept != wanted and not _kept(path, kind):
                manifest = {}
            else:
                if add:
                    wanted[kind.grows] = kept[kind.grows] | wanted[kind.grows]
                    kept = kept | {kind.grows: wanted[kind.grows] | kept[kind.grows]}
                refuse_another(path, kind.noun, kept, wanted, kind.grows)
        with writing(path):
            clear(path.rglob(".*"))
        head = dict([kind.version]) if kind.version else {}
        yield Folder(path, (manifest or {"sealed": True}) | head | {"config": wanted}, kind)


def _kept(path: Path, kind: Kind) -> bool:
    """Whether a folder holds anything beside its manifest."""
    own = {LOCK, kind.manifest}
    return any(file.name not in own and not is_temporary(file) and not file.is_dir() for file in path.rglob("*"))


@contextmanager
def locked(folder: Path, *, wait: bool = False, beside: bool = False) -> Iterator[None]:
    """Be alone in a folder until the block ends; the lock goes with the process.

    Args:
        folder: which.
        wait: wait while another process is there.
        beside: for a folder that is to appear whole: the lock stands beside it, and is gone when the block ends;
            what killed processes left of the folder goes first.

    Raises:
        InputError: another process is there, and is not waited for; or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    here = folder.absolute()
    path = here.with_name(f".{here.name}{LOCK}") if beside else here / LOCK
    lock = FileLock(path)
    with writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout as error:
            raise InputError(
                f"{folder}: another run is writing here; wait until it ends or choose another folder"
            ) from error
        except NotImplementedError:
            warnings.warn(f"{folder}: this file system has no locks; let one process at a time write", stacklevel=4)
    try:
        if beside:
            clear_beside(here)
        yield
    finally:
        if beside:
            with suppress(OSError):  # Windows removes no file that is open
                path.unlink()
        lock.release()


def refuse_another(
    folder: Path, noun: str, kept: Mapping[str, Any], wanted: Mapping[str, Any], grows: str = ""
) -> None:
    """Check that what a folder holds was made with the settings that are wanted.

    Args:
        folder: which.
        noun: what it holds.
        kept: the settings that it was made with.
        wanted: those that are asked for now.
        grows: the setting to which entries can be added on request.

    Raises:
        InputError: some differ; the message says how, those within another as ``outer inner``.
    """
    then, now = _flat(kept), _flat(wanted)
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not differing:
        return
    added = grows and all(
        name.startswith(f"{grows} ") and None in (then.get(name), now.get(name)) for name in differing
    )
    more = "add to it with --add" if added else "ask for the same"
    differences = ", ".join(_difference(name, then.get(name), now.get(name)) for name in differing)
    raise InputError(f"{folder}: holds another {noun}, made {differences}; {more}, or choose another folder")


def _difference(name: str, then: Any, now: Any) -> str:
    """How one setting differs, in words; of a digest only that it does."""
    hashed = any(isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value) for value in (then, now))
    name = re.sub("([ _]sha256| weights)$", "", name)  # a model may be called model_weights
    if hashed and not (then and now):
        return f"with {name} (not asked for now)" if then else f"without {name}"
    if hashed:
        return f"from another {name} (its content differs)"
    if isinstance(then, str) and isinstance(now, str):  # of two long ones only what differs
        first = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), 0)
        start = then.rfind(", ", 0, first) + 2
        then, now = (f"… {text[start:]}" if start > 1 else text for text in (then, now))
    return (
        f"with {name} {_short(then)} (now {_short(now)})"
        if then not in (None, [], "")
        else (f"without {name} (now {_short(now)})")
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = _flat(value) if isinstance(value, Mapping) else {}
        flat |= {f"{name} {key}": setting for key, setting in inner.items()} or {name: value}
    return flat


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return textwrap.shorten(str(value), 60, placeholder=" …") if value not in (None, "") else "none"


def plain(value: Any) -> Any:
    """As JSON has it: what is not a finite number becomes None, a tensor or an array a list."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
