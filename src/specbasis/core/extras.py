"""Optional libraries: one door through which they come, and one line that says how to install a missing one."""

from __future__ import annotations

import json
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

from specbasis.core.errors import MissingExtra


def require(*libraries: str, extra: str, purpose: str) -> ModuleType:
    """Import optional libraries; returns the first.

    Args:
        libraries: names as in ``import``.
        extra: the extra of this package that installs them.
        purpose: what needs them, as the beginning of a sentence: "figures need".

    Raises:
        MissingExtra: one of them is not installed, or one that it needs itself.
    """
    try:
        modules = [import_module(library) for library in libraries]
    except ImportError as error:
        name = (error.name or libraries[0]).partition(".")[0]
        raise MissingExtra(f"{purpose} {name}, which is not installed: {command(extra)}") from error
    return modules[0]


def command(extra: str) -> str:
    """What installs an extra here: from the clone or the wheel that the package came from; it is on no index."""
    source = _source()
    return (
        f'pip install ".[{extra}]" in a clone of specbasis'
        if source is None
        else f'pip install "{source}[{extra}]"'
    )


def _source() -> Path | None:
    """The clone or the wheel that this package was installed from, where it is still there."""
    clone = Path(__file__).parents[3]
    if (clone / "pyproject.toml").is_file():
        return clone
    try:
        text = metadata.distribution("specbasis").read_text("direct_url.json")
        url = urlparse(json.loads(text or "{}").get("url", ""))
    except (metadata.PackageNotFoundError, ValueError):
        return None
    path = Path(unquote(url.path))
    return path if url.scheme == "file" and path.exists() else None
