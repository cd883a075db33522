"""Finetuning methods behind one door: attach one to a model, train it, save it, load it.

attached = attach(model, "spectral", rank=300)
Trainer(attached.model, callbacks=list(attached.callbacks), ...).train()
attached.save("out")
"""

from __future__ import annotations

from specbasis.finetuning.methods.attach import Attached, attach, load, method_named
from specbasis.finetuning.methods.budget import Size, match_budget, parameters
from specbasis.finetuning.methods.build import Request
from specbasis.finetuning.methods.placement import ALL_LINEAR, FEED_FORWARD, Site, head_modules, sites
from specbasis.finetuning.methods.table import METHODS, TABLE_5, Method

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
    "head_modules",
    "load",
    "match_budget",
    "method_named",
    "parameters",
    "sites",
]
