"""What version 0.1.0 wrote still opens: rows, an unfinished comparison, the cache, adapters, a finetune.

tests/fixtures/record_v0_1.py says how the files were made.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import specbasis
from specbasis.comparison.options import NEW

OLD = Path(__file__).parent / "fixtures/v0_1"


@pytest.fixture
def old(tmp_path):
    """A copy, which the tests may write to."""
    shutil.copytree(OLD, tmp_path / "v0_1")
    return tmp_path / "v0_1"


def parts(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.parquet")}


def same_rows(recorded, now):
    """The same rows; the figures are those of another machine, so to within their bounds and rounding."""
    order = ["pair", "matrix", "measure", "index"]
    words = dict.fromkeys(order[:3], str)
    recorded, now = (rows.to_pandas().astype(words).sort_values(order).reset_index() for rows in (recorded, now))
    # What is new since then is beside what was there.
    now = now[~now["measure"].isin({"weight_cosine_z", *NEW})].reset_index(drop=True)
    for name in ("pair", "matrix", "measure", "index", "block", "role", "out_features", "in_features"):
        assert recorded[name].astype(str).tolist() == now[name].astype(str).tolist(), name
    clear = recorded["resolved"].map(lambda resolved: resolved is not False).to_numpy()
    values, again = recorded["value"].to_numpy()[clear], now["value"].to_numpy()[clear]
    # A p-value has no bound of its own; it multiplies what rounding leaves of an alignment by the slope of its law.
    rounding = np.where(recorded["measure"].str.startswith("p_"), 1e-4, 1e-6)[clear]
    margin = recorded["bound"].fillna(0.0).to_numpy()[clear] + rounding * np.maximum(1.0, np.abs(values))
    assert ((np.abs(values - again) <= margin) | (values == again) | (np.isnan(values) & np.isnan(again))).all()


def test_rows_open_and_add_up_to_what_they_did(old):
    comparison = specbasis.load(old / "compare")
    assert comparison.verdicts["tuned"].kind == "finetuned"
    again = specbasis.compare(old / "base.safetensors", old / "tuned.safetensors", nulls=True, workers=1)
    same_rows(comparison.rows, again.rows)


def test_a_comparison_that_it_left_unfinished_goes_on(old):
    folder = old / "compare"
    lost = sorted(folder.rglob("*.parquet"))[0]
    before = parts(folder)
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    specbasis.compare(old / "base.safetensors", old / "tuned.safetensors", folder, nulls=True, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done is not done again"
    assert parts(folder).keys() == before.keys()


def test_its_cache_is_used(old, monkeypatch):
    monkeypatch.setattr("specbasis.jobs.cache.decompose", lambda *args, **options: pytest.fail("decomposed again"))
    expected = specbasis.load(old / "cached").rows
    base, tuned = old / "base.safetensors", old / "tuned.safetensors"
    again = specbasis.compare(base, tuned, nulls=True, null_samples=2, cache=old / "cache", workers=1)
    same_rows(expected, again.rows)


def test_its_adapter_proves_its_basis_and_computes_what_it_did(old):
    peft = pytest.importorskip("peft")
    from specbasis.adapter import SpectralConfig  # noqa: F401 - makes the method known to PEFT
    from tests.adapter.helpers import load_classifier

    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(load_classifier(old / "model"), old / "adapter").eval()
    recorded = load_file(old / "logits.safetensors")
    torch.testing.assert_close(model(input_ids=recorded["ids"]).logits, recorded["logits"])


def test_its_finetune_is_taken_as_done(old, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(old.parent)  # its manifest names the base as it was given, from here
    before = json.loads((old / "finetune/metrics.json").read_text())
    options = {"data_dir": "v0_1/glue", "epochs": 1, "rank": 4}
    again = specbasis.finetune("v0_1/bert", "sst2", "spectral", out="v0_1/finetune", **options)
    assert again.metrics == before
