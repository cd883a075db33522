"""Finetuning methods behind one door: attach one to a model, train it, save it, load it.

attached = attach(model, "spectral", rank=300)
Trainer(attached.model, callbacks=list(attached.callbacks), ...).train()
attached.save("out")

A method is one file of this folder, which registers its rows when it is imported.
"""

from __future__ import annotations

import importlib
import pkgutil

from specbasis.finetuning.methods.attached import Attached, Size, attach, load, match_budget, parameters
from specbasis.finetuning.methods.kit import METHODS, Method, Request, method_named
from specbasis.finetuning.methods.sites import ALL_LINEAR, FEED_FORWARD, Site, sites
from specbasis.finetuning.methods.spectral import TABLE_5


def import_methods() -> None:
    """Import every file of this folder, so that the methods in it are known."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


import_methods()

__all__ = [
    "ALL_LINEAR",
    "FEED_FORWARD",
    "METHODS",
    "TABLE_5",
    "Attached",
    "Method",
    "Request",
    "Site",
    "Size",
    "attach",
    "load",
    "match_budget",
    "method_named",
    "parameters",
    "sites",
]
