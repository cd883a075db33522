"""Optional libraries: one door through which they come, and one line that says how to install a missing one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from specbasis.core.errors import MissingExtra

EXTRAS = {
    **dict.fromkeys(("jinja2", "matplotlib", "pandas"), "report"),
    **dict.fromkeys(("accelerate", "datasets", "sklearn", "transformers"), "finetune"),
    **dict.fromkeys(("packaging", "peft"), "peft"),
    **dict.fromkeys(("anarci", "anarcii"), "numbering"),
    **dict.fromkeys(("PIL", "mlxtend"), "pretrain"),
    **{"gguf": "gguf", "huggingface_hub": "hub", "lm_eval": "harness", "onnx": "onnx"},
    **{"powerlaw": "spectra", "ray": "ray"},
}
"""Library → the smallest extra of the package that installs it."""


def require(*libraries: str, purpose: str, extra: str = "") -> ModuleType:
    """Import optional libraries; returns the first.

    Args:
        libraries: names as in ``import``.
        purpose: what needs them, as the beginning of a sentence: "figures need".
        extra: the extra that installs them all, where it is another than that of the one that is missing.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        modules = [import_module(library) for library in libraries]
    except ImportError as error:
        known = missing(error, purpose, extra)
        if known is None:
            raise
        raise known from error
    return modules[0]


def missing(error: ImportError, purpose: str = "this needs", extra: str = "") -> MissingExtra | None:
    """What to say where an optional library is missing; None where the error is about anything else."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS or isinstance(error, MissingExtra):
        return None
    return MissingExtra(f"{purpose} {library}, which is not installed: {command(extra or EXTRAS[library])}")


def command(extra: str) -> str:
    """What installs an extra here: from the clone or the wheel that the package came from; it is on no index."""
    source = _source()
    if source is None:
        return f'pip install ".[{extra}]" in a clone of specbasis'
    return f'pip install "{source}[{extra}]"'


def _source() -> Path | None:
    """The clone or the wheel that this package was installed from, where it is still there."""
    clone = Path(__file__).parents[3]
    if (clone / "pyproject.toml").is_file():
        return clone
    # Late, since every command reads this module and few get here.
    import json
    from importlib import metadata
    from urllib.parse import unquote, urlparse

    try:
        text = metadata.distribution("specbasis").read_text("direct_url.json")
        url = urlparse(json.loads(text or "{}").get("url", ""))
    except (metadata.PackageNotFoundError, ValueError):
        return None
    path = Path(unquote(url.path))
    return path if url.scheme == "file" and path.exists() else None


@contextmanager
def quiet() -> Iterator[None]:
    """No loading reports, bars and announcements of transformers, as it was afterwards."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
