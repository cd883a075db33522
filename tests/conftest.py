"""Shared set-up: one thread, shape and type checks of every annotated function, reproducible properties."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook

torch.set_num_threads(1)  # small matrices: a second thread costs more than it gives

# Every annotation of a shape becomes a check while the tests run. This comes before the first import of specbasis.
SHAPED = (
    "core.svd",
    "core.subspace",
    "measures",
    "adapter.diagnostics",
    "checkpoint.proof",
)  # adapter.functional is compiled
install_import_hook([f"specbasis.{module}" for module in SHAPED], "beartype.beartype")

settings.register_profile(
    "specbasis",
    deadline=None,  # the first call of a LAPACK routine is slow
    derandomize=True,  # the same examples in every run
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("specbasis")


def pytest_collection_finish() -> None:
    """Leave what libraries hold out of later collections of garbage, of which each training makes several."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No shape checks, as at a user's: for the tests of what the code itself says to bad input."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
