"""Names of a package that are imported when they are first used: `import specbasis` must not wait for torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import get_data
from typing import Any

from specbasis.core.extras import missing


def lazily(package: str) -> tuple[Callable[[str], Any], list[str]]:
    """The ``__getattr__`` (PEP 562) and the ``__all__`` of a package.

    Its names are those that it imports under ``if TYPE_CHECKING:``, which type checkers read too.
    """
    source = get_data(package, "__init__.py")  # of a folder or of a zip, as the package's loader reads it
    tree = ast.parse(source or b"")
    imports = [node for branch in tree.body if isinstance(branch, ast.If) for node in branch.body]
    homes = {
        alias.name: str(node.module) for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(homes[name]), name)
        except ImportError as error:
            raise missing(error, f"{package}.{name} needs") or error from error
        vars(sys.modules[package])[name] = value
        return value

    return find, sorted(homes)
