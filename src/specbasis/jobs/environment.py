"""What a manifest says about where it was made: time, versions, commit, machine and command. No large library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specbasis.core.text import shareable

ALWAYS = ("specbasis", "torch", "numpy", "scipy", "pyarrow", "safetensors")
"""Packages whose versions every manifest has."""

WHERE_USED = {
    "transformers": "transformers",
    "peft": "peft",
    "tokenizers": "tokenizers",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "sklearn": "scikit-learn",
}
"""Modules whose packages' versions a manifest has if the module is loaded, or is said to be used."""


def environment(uses: Iterable[str] = ()) -> dict[str, Any]:
    """Time, versions, commit, machine and command, for a manifest.

    Args:
        uses: modules of `WHERE_USED` that the run is going to load.
    """
    modules = {name for name in WHERE_USED if name in sys.modules} | set(uses)
    packages = (*ALWAYS, *(package for name, package in WHERE_USED.items() if name in modules))
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
        },
        "command": [Path(sys.argv[0]).name, *map(shareable, sys.argv[1:])],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package where it runs from its own git checkout."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
