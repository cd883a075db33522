"""Shared set-up: one thread, shape and type checks of every annotated function, reproducible properties."""

import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)  # small matrices: a second thread costs more than it gives

# Every jaxtyping annotation becomes a check while the tests run. It has to come before the first import of specbasis.
install_import_hook("specbasis", "beartype.beartype")

settings.register_profile(
    "specbasis",
    deadline=None,  # the first call of a LAPACK routine is slow
    derandomize=True,  # the same examples in every run
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("specbasis")
