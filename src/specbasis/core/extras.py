"""Optional libraries: one door through which they come, and one line that says how to install a missing one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from specbasis.core.errors import MissingExtra

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = {
    **dict.fromkeys(("jinja2", "matplotlib", "pandas"), "report"),
    **dict.fromkeys(("accelerate", "datasets", "sklearn", "transformers"), "finetune"),
    "peft": "peft",
    **dict.fromkeys(("anarci", "anarcii"), "numbering"),
    **dict.fromkeys(("PIL", "mlxtend"), "pretrain"),
    **{"gguf": "gguf", "gradio": "app", "huggingface_hub": "hub", "lm_eval": "harness", "onnx": "onnx"},
    **{"powerlaw": "spectra", "ray": "ray"},
}
"""Library → the smallest extra of the package that installs it."""

PURPOSES = {
    "report": "the page, the figures, tables of pandas",
    "hub": "models of the Hub and of timm",
    "peft": "the spectral adapter in PEFT, and folders of adapters",
    "finetune": "finetuning, and judges that run a model of transformers",
    "onnx": "ONNX files",
    "gguf": "GGUF files",
    "spectra": "heavy tails of a model's spectra",
    "ray": "a comparison on several machines",
    "harness": "lm-evaluation-harness as the judge of an intervention",
    "numbering": "antibody numbering, the models of the examples",
    "pretrain": "pretraining the paper's masked autoencoder",
    "app": "comparisons in the browser",
}
"""Extra → what it is for; those that are left out build and test specbasis itself."""


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


def requirements(extra: str = "") -> Iterator[Requirement]:
    """What an extra of this package lists, and the extras that it stands on; without one, what every verb needs.

    Of a clone its pyproject.toml counts: what was noted when it was installed may be of an older state.
    """
    import tomllib
    from importlib import metadata

    from packaging.requirements import Requirement

    project = Path(__file__).parents[3] / "pyproject.toml"
    if project.is_file():
        listed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        texts = listed["optional-dependencies"].get(extra, []) if extra else listed["dependencies"]
    else:  # as in a wheel: 'ray>=2.40; extra == "ray"'
        of_all = [text.replace('"', "'").partition(";") for text in metadata.requires("specbasis") or []]
        texts = [text for text, _, marker in of_all if (f"extra == '{extra}'" in marker if extra else not marker)]
    for requirement in map(Requirement, texts):
        if requirement.name == "specbasis":
            for other in sorted(requirement.extras):
                yield from requirements(other)
        else:
            yield requirement


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
