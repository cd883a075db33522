"""Multiplying all weights by a power of two changes nothing but the unit, over the whole range of each format.

A power of two is exact, so that figures are compared bit for bit. Where entries become subnormal they lose digits,
and with them their own: there, figures are finite and nothing ends in an error.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import specbasis
from specbasis.checkpoint import open_checkpoint
from specbasis.comparison.spectra import spectra
from specbasis.core.blocks import norm
from specbasis.core.edits import noise_like
from specbasis.core.rounding import rounding
from specbasis.lineage.tree import lineage
from specbasis.tracking.track import track

NAME = "model.layers.0.self_attn.q_proj.weight"
BASE = torch.randn(70, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
UPDATES = 0.01 * torch.randn(3, 70, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

NORMAL = [
    *((torch.float32, k) for k in (66, 120, -100)),
    *((torch.bfloat16, k) for k in (66, 120, -100)),
    (torch.float16, 8),
    *((torch.float64, k) for k in (66, -100, 300, -300, 1015, -990)),
]
SUBNORMAL = [  # and the exponent of the smallest number of all
    (torch.float32, -140, -149),
    (torch.bfloat16, -130, -133),
    (torch.float16, -18, -24),
    (torch.float64, -1060, -1074),
]


def scaled(dtype: torch.dtype, exponent: int, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """A base and its finetunes, rounded to a format before they are multiplied."""
    tuned = [BASE, *(BASE + UPDATES[:i].sum(0) for i in range(1, count))]
    return [{NAME: (W.to(dtype).double() * 2.0**exponent).to(dtype)} for W in tuned]


def compared(dtype: torch.dtype, exponent: int) -> dict[tuple[str, int | None], tuple[float, bool | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        rows = specbasis.compare(*scaled(dtype, exponent), nulls=True, null_samples=2, heads=4, workers=1).rows
    columns = (rows[name].to_pylist() for name in ("measure", "index", "value", "resolved"))
    return {(measure, index): (value, resolved) for measure, index, value, resolved in zip(*columns, strict=True)}


def unit(measure: str, exponent: int) -> float:
    in_weights = measure.startswith("norm_") or measure in (
        f"singular_value_{x}" for x in ("base", "tuned", "delta")
    )
    return float(np.ldexp(1.0, exponent)) if in_weights else 1.0


@pytest.mark.parametrize(("dtype", "exponent"), NORMAL)
def test_rows_change_their_unit_alone(dtype: torch.dtype, exponent: int) -> None:
    ordinary, found = compared(dtype, 0), compared(dtype, exponent)
    assert found.keys() == ordinary.keys()
    for (measure, index), (value, resolved) in ordinary.items():
        now, is_resolved = found[measure, index]
        assert is_resolved == resolved, (measure, index)
        if measure in (
            "rounding_update_float16",
            "rounding_update_bfloat16",
        ):  # formats that may not have this size
            assert 0 < now <= 1 + 1e-12
        elif "rounding" in measure or measure.startswith(("alignment_low", "alignment_high")):  # other precision
            assert now == pytest.approx(value, rel=1e-6, nan_ok=True), measure
        else:
            assert now == value * unit(measure, exponent) or math.isnan(now) == math.isnan(value) == 1, measure


@pytest.mark.parametrize(("dtype", "exponent", "smallest"), SUBNORMAL)
def test_subnormal_weights_are_compared(dtype: torch.dtype, exponent: int, smallest: int) -> None:
    found = compared(dtype, exponent)
    assert 0.5 < found["weight_cosine", None][0] <= 1
    noise = 2.0 ** (smallest - exponent) / math.sqrt(12)  # they have few digits, which is not passed over
    assert found["rounding_update", None][0] == pytest.approx(noise / float(BASE.square().mean().sqrt()), rel=0.1)
    for side in ("left", "right"):
        assert all(0 <= found[f"alignment_{side}", i][0] <= 1 for i in range(64))


def test_one_matrix_out_of_range_of_the_other_ends_in_figures_or_as_failed() -> None:
    for base, tuned in ((0, 1020), (1020, 0), (-1020, 1020), (1020, -1060)):
        W, T = scaled(torch.float64, base)[0], scaled(torch.float64, tuned)[0]
        W["model.layers.1.self_attn.q_proj.weight"] = T["model.layers.1.self_attn.q_proj.weight"] = BASE
        comparison = specbasis.compare(W, T, nulls=True, workers=1)
        done = {*comparison.rows["matrix"].unique().to_pylist()} | {
            failed["matrix"] for failed in comparison.failed
        }
        assert done == set(W)


@pytest.mark.parametrize(("form", "exponent"), [("float32", 66), ("float32", -100), ("float32", -140),
                                                ("bfloat16", 100), ("bfloat16", -128), ("float16", -16),
                                                ("float64", 900), ("float64", -1030)])  # fmt: skip
def test_the_variance_of_rounding_is_that_of_rounding(form: str, exponent: int) -> None:
    """Against the error that rounding makes of many more digits; in units in which its square is in range."""
    fine = (1 + torch.rand(64, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float64)) * 2.0**exponent
    fine *= torch.randn(64, 70, generator=torch.Generator().manual_seed(3)).sign()
    stored, scale = fine.to(getattr(torch, form)), 2.0 ** min(-exponent, 1000)
    if form == "float64":  # nothing has more digits: half a step, at each entry
        step = np.spacing(np.abs(fine.numpy())) * scale
        assert rounding(stored, form, scale=scale).variance[form] == pytest.approx((step**2).mean() / 12, rel=1e-9)
        return
    error = ((stored.double() - fine) * scale).square().mean()
    assert rounding(stored, form, scale=scale).variance[form] == pytest.approx(float(error), rel=0.05)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 66), (torch.float32, -100), (torch.float64, 990),
                                                 (torch.float64, -950)])  # fmt: skip
def test_the_other_verbs_change_their_unit_alone(dtype: torch.dtype, exponent: int, tmp_path) -> None:
    pytest.importorskip("powerlaw")

    def figures(exponent: int) -> list[float]:
        files = [tmp_path / f"{exponent}-{i}.safetensors" for i in range(4)]
        for file, state in zip(files, scaled(dtype, exponent, 4), strict=True):
            save_file(state, file)
        models = [open_checkpoint(file) for file in files]
        series = track(files, ranks=5, workers=1).rows
        in_weights = [m in ("norm", "singular_value") for m in series["measure"].to_pylist()]
        followed = [v for v, w in zip(series["value"].to_pylist(), in_weights, strict=True) if not w]
        edges = [edge.kinship for tree in lineage(files).trees for edge in tree.edges]
        (_, _, shape), *_ = spectra(models[0])
        W, T = (model[NAME] for model in models[:2])
        noise = float(norm(noise_like(W, T) - W.double()) / norm(W))
        return [
            *followed,
            *(x for k in edges for x in (k.cosine, k.distance, k.alignment)),
            *(shape.alpha, shape.entropy, shape.stable_rank, shape.spikes),
            noise,
        ]

    assert figures(exponent) == pytest.approx(figures(0), rel=1e-6, nan_ok=True)
