"""The job end to end on pico checkpoints on disk; oracles: numpy's SVD in float64 and the equations themselves."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

import specbasis
from specbasis.checkpoint import sha256
from specbasis.comparison import decomposition
from specbasis.core.errors import InputError
from specbasis.jobs.progress import Progress
from specbasis.jobs.results import Results
from tests.helpers.patience import until
from tests.pico import State, bert_state, finetuned, write

job = importlib.import_module("specbasis.comparison.compare")  # the module: the package's attribute is the function


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = bert_state()
    return write(tmp_path / "base.safetensors", base), write(tmp_path / "tuned.safetensors", finetuned(base))


def values(comparison: specbasis.Comparison, matrix: str, measure: str) -> np.ndarray:
    wanted = (pc.field("matrix") == matrix) & (pc.field("measure") == measure)
    return comparison.rows.filter(wanted).sort_by("index")["value"].to_numpy()


def test_every_number_against_numpy(pair: tuple[Path, Path]) -> None:
    comparison = specbasis.compare(*pair)
    base, tuned = (specbasis.open_checkpoint(path) for path in pair)
    name = "encoder.layer.1.intermediate.dense.weight"
    W, T = (np.asarray(c[name], dtype=np.float64) for c in (base, tuned))
    (Ub, Sb, Vb), (Ut, St, Vt), (Ud, Sd, Vd) = (np.linalg.svd(X, full_matrices=False) for X in (W, T, T - W))
    change = (St - Sb) / Sb
    p = Sb / Sb.sum()
    expected = {
        "alignment_left": np.abs((Ub * Ut).sum(0)),
        "alignment_right": np.abs((Vb * Vt).sum(1)),
        "update_alignment_left": np.abs((Ud * Ub).sum(0)),
        "update_alignment_right": np.abs((Vd * Vb).sum(1)),
        "singular_value_base": Sb,
        "singular_value_tuned": St,
        "singular_value_delta": Sd,
        "singular_value_change": change,
        "singular_value_ratio": Sd / Sb,
        "explained_variance_base": np.cumsum(Sb**2) / np.sum(W**2),
        "subspace_overlap_left": [np.sum((Ub[:, :k].T @ Ut[:, :k]) ** 2) / k for k in (1, 2, 4, 8, 12)],
        "principal_angle_right": scipy.linalg.subspace_angles(Vb[:10].T, Vt[:10].T)[::-1],
        "rsd": np.linalg.norm(St - Sb) / np.linalg.norm(Sb),
        "mrc": np.abs(change).mean(),
        "max_rc": np.abs(change).max(),
        "t1_rc": change[0],
        "tail_rc": change[-2:].mean(),  # ceil(10 % of 12) = 2
        "effective_rank_base": np.exp(-(p * np.log(p)).sum()),
        "stable_rank_tuned": np.sum(T**2) / St[0] ** 2,
        "relative_update": np.linalg.norm(T - W) / np.linalg.norm(W),
        "weight_cosine": np.sum(W * T) / np.linalg.norm(W) / np.linalg.norm(T),
    }
    for measure, value in expected.items():
        # Conditioning: gaps here exceed 1e-3 of the norm, so float64 leaves at least 1e-10.
        np.testing.assert_allclose(
            values(comparison, name, measure), np.atleast_1d(value), atol=1e-10, err_msg=measure
        )


def test_every_parameter_is_compared_or_listed_with_a_reason(pair: tuple[Path, Path]) -> None:
    comparison = specbasis.compare(*pair)
    about = comparison.manifest["pairs"][comparison.pairs[0]]
    listed = set(about["matrices"]) | {item["name"] for item in about["skipped"]}
    assert listed == set(specbasis.open_checkpoint(pair[0]))
    assert all(item["reason"] for item in about["skipped"])


def test_roles_and_blocks_reach_the_rows(pair: tuple[Path, Path]) -> None:
    rows = specbasis.compare(*pair).rows.to_pylist()
    found = {(r["matrix"], r["role"], r["block"]) for r in rows}
    assert ("encoder.layer.1.attention.self.key.weight", "attention.key", 1) in found
    assert ("embeddings.word_embeddings.weight", "embedding", None) in found
    assert {r["out_features"] for r in rows if r["role"] == "ffn.up"} == {48}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_matrices_are_exactly_one_and_zero(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {name: value.to(dtype) for name, value in bert_state().items()}
    tuned = {name: value.clone() for name, value in base.items()}
    changed = "encoder.layer.1.output.dense.weight"
    tuned[changed] = tuned[changed] + 0.1
    c = specbasis.compare(write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", tuned))
    frozen = [r for r in c.rows.to_pylist() if r["matrix"] != changed]
    exact = dict.fromkeys(
        ("alignment_left", "alignment_right", "subspace_overlap_left", "subspace_overlap_right"), 1.0
    )
    zeros = ("principal_angle_left", "singular_value_change", "singular_value_ratio", "singular_value_delta", "rsd")
    exact |= dict.fromkeys((*zeros, "relative_update", "max_rc"), 0.0)
    for measure, value in exact.items():
        assert {r["value"] for r in frozen if r["measure"] == measure} == {value}, measure
    assert {r["bound"] for r in frozen if r["measure"] == "alignment_left"} == {0.0}
    assert not [r for r in frozen if r["measure"].startswith("update_alignment")], "a zero update has no direction"
    assert set(c.verdicts[c.pairs[0]].frozen) == {r["matrix"] for r in frozen}


def test_a_repeated_row_leaves_no_false_precision(tmp_path: Path) -> None:
    base = bert_state()
    name = "encoder.layer.0.attention.self.query.weight"
    base[name][5] = base[name][4]  # rank n − 1: the last relative change divides by zero
    c = specbasis.compare(
        write(tmp_path / "a.safetensors", base),
        write(tmp_path / "b.safetensors", finetuned(base)),
        roles=["attention"],
    )
    rows = {r["measure"]: r for r in c.rows.to_pylist() if r["matrix"] == name and r["index"] is None}
    assert not any(rows[m]["resolved"] for m in ("mrc", "max_rc", "tail_rc"))
    assert rows["rsd"]["resolved"]
    assert rows["t1_rc"]["resolved"]


def test_a_frozen_matrix_of_zeros(tmp_path: Path) -> None:
    base = bert_state()
    base["pooler.dense.weight"] = torch.zeros(12, 12)
    a, b = (write(tmp_path / f"{n}.safetensors", base) for n in "ab")
    c = specbasis.compare(a, b)
    for measure, value in {"rsd": 0.0, "mrc": 0.0, "relative_update": 0.0, "weight_cosine": 1.0}.items():
        assert values(c, "pooler.dense.weight", measure).tolist() == [value]
    assert c.verdicts["b"].kind == "identical"


def _of(state: State, part: str) -> State:
    return {name: value for name, value in state.items() if part in name}


def _quantised(W: torch.Tensor) -> torch.Tensor:
    step = W.abs().amax(-1, keepdim=True) / 127
    return (W / step).round() * step


@pytest.mark.parametrize(
    ("tuned", "kind"),
    [
        (lambda base: base, "identical"),
        (lambda base: finetuned(base, 0.01), "finetuned"),
        (lambda base: finetuned(base, 1.0), "finetuned"),
        (lambda base: bert_state(width=64, seed=9), "independent"),
        (lambda base: finetuned(base, 10.0), "finetuned"),
        (lambda base: finetuned(base, 0.1, frozen="layer.0"), "finetuned"),
        (lambda base: finetuned(base, 0.1) | _of(bert_state(width=64, seed=9), "layer.0"), "mixed"),
        (lambda base: base | _of(bert_state(width=64, seed=9), "pooler"), "mixed"),
        (lambda base: {n: v.bfloat16() for n, v in base.items()}, "copy"),
        (lambda base: {n: v.half().float() for n, v in base.items()}, "copy"),
        (lambda base: {n: torch.where(v.abs() < 0.05, 0.0, v) for n, v in base.items()}, "copy"),
        (lambda base: {n: _quantised(v) for n, v in base.items()}, "copy"),
        (lambda base: {n: v.flip(0) if "layer" in n else v for n, v in base.items()}, "copy"),
        (lambda base: {n: v.bfloat16() for n, v in finetuned(base, 0.05).items()}, "finetuned"),
    ],
)
def test_verdicts(tmp_path: Path, tuned, kind: str) -> None:
    base = bert_state(width=64)
    c = specbasis.compare(write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", tuned(base)))
    verdict = c.verdicts[c.pairs[0]]
    assert verdict.kind == kind
    assert verdict.sentence.startswith(kind)
    for names, part in ((verdict.frozen, "frozen"), (verdict.unrelated, "not from this base")):
        assert (part in verdict.sentence) == (bool(names) and kind not in ("identical", "independent"))


def test_means_that_all_trainings_share_do_not_make_a_finetune() -> None:
    """An offset of all entries, and one for each column: cosines near 1 between independent trainings."""
    offset = torch.linspace(0.2, 0.4, 64)
    first, second = (
        {n: v + (offset if v.shape[-1] == 64 else 0.3) for n, v in bert_state(width=64, seed=seed).items()}
        for seed in (1, 9)
    )
    c = specbasis.compare(first, second, workers=1)
    assert np.median(c.rows.to_pandas()[lambda rows: rows.measure == "weight_cosine"].value) > 0.8
    assert c.verdicts["state_dict"].kind == "independent"


def test_the_chance_level_beside_the_alignment_is_of_both_sides() -> None:
    W = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    c = specbasis.compare({"w.weight": W}, {"w.weight": W + 0.1})
    chance = (4 / (3 * np.pi) + (2 / (np.pi * 400)) ** 0.5) / 2  # E|cos| in R^4, and nearly so in R^400
    assert f"(chance {chance:.3f})" in c.verdicts["state_dict"].sentence


def test_a_new_head_does_not_hide_a_finetune(tmp_path: Path) -> None:
    base = bert_state(width=64)
    tuned = finetuned(base, 0.05) | {"pooler.dense.weight": torch.randn(64, 64)}
    c = specbasis.compare(write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", tuned))
    verdict = c.verdicts[c.pairs[0]]
    assert verdict.kind == "finetuned"
    assert verdict.unrelated == ("pooler.dense.weight",)
    assert "pooler.dense.weight" in verdict.sentence


@pytest.mark.parametrize(
    ("ours", "theirs"), [("bert.", ""), ("", "module."), ("model.", "_orig_mod."), ("bert.", "module.roberta.")]
)
def test_prefixes_are_aligned(tmp_path: Path, ours: str, theirs: str) -> None:
    base = bert_state()
    a = write(tmp_path / "a.safetensors", {ours + n: v for n, v in base.items()})
    b = write(tmp_path / "b.safetensors", {theirs + n: v for n, v in finetuned(base).items()})
    c = specbasis.compare(a, b)
    assert len(c.manifest["pairs"][c.pairs[0]]["matrices"]) == 14


def test_an_encoder_is_never_compared_with_a_decoder(tmp_path: Path) -> None:
    stacks = ("encoder", "decoder")
    layers = {f"layers.{i}.fc.weight": torch.randn(6, 6) for i in range(2)}
    a = write(tmp_path / "a.safetensors", {f"{s}.{n}": v.clone() for s in stacks for n, v in layers.items()})
    b = write(tmp_path / "b.safetensors", layers)
    with pytest.raises(InputError, match="several ways"):
        specbasis.compare(a, b)


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    base, name = bert_state(), "embeddings.word_embeddings.weight"
    tuned = finetuned(base)
    tuned[name] = torch.cat([tuned[name], torch.randn(3, 12)])
    a, b = write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", tuned)
    skipped = specbasis.compare(a, b).manifest["pairs"]["b"]["skipped"]
    (reason,) = [item["reason"] for item in skipped if item["name"] == name]
    assert "(30, 12) in base" in reason
    assert "--common-rows" in reason
    c = specbasis.compare(a, b, common_rows=True)
    S = np.linalg.svd(np.asarray(tuned[name][:30], dtype=np.float64), compute_uv=False)
    np.testing.assert_allclose(values(c, name, "singular_value_tuned"), S, rtol=1e-12)
    assert any("first 30 rows" in note for note in c.manifest["pairs"]["b"]["notes"])


def test_filters(pair: tuple[Path, Path]) -> None:
    found = specbasis.compare(*pair, roles=["attention"], blocks=[1]).manifest["pairs"]["tuned"]["matrices"]
    assert len(found) == 4
    assert all("layer.1.attention" in name for name in found)
    assert specbasis.compare(*pair, name="*intermediate*").rows["block"].unique().to_pylist() == [0, 1]
    with pytest.raises(InputError, match="no role nonsense"):
        specbasis.compare(*pair, roles=["nonsense"])
    with pytest.raises(InputError, match=r"no matrix to compare: .* match none of roles .*ffn.up.*blocks 0 to 1"):
        specbasis.compare(*pair, name="nothing*")
    for what, given in (("roles", 3), ("blocks", 1), ("measures", 2)):
        with pytest.raises(InputError, match=f"got {what} = .*want a list"):
            specbasis.compare(*pair, **{what: given})


def test_what_cannot_run_leaves_no_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got engine = 'nonsense'"):
        specbasis.compare(*pair, tmp_path / "out", engine="nonsense")
    with pytest.raises(InputError, match="workers = 0"):
        job.plan(*pair, workers=0)
    assert not (tmp_path / "out").exists()


def test_an_error_stops_the_workers_at_once(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise InputError("full")

    monkeypatch.setattr(Results, "write", full)
    with pytest.raises(InputError, match="full") as held:  # keeps the traceback, and with it the frames
        specbasis.compare(*pair, engine="threads", workers=2)
    assert not [t for t in threading.enumerate() if t.name.startswith("specbasis")], held


def test_one_matrix_with_nan_is_named_and_the_others_are_done(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = finetuned(bert_state())
    bad["pooler.dense.weight"][3, 3] = float("nan")
    c = specbasis.compare(pair[0], write(tmp_path / "bad.safetensors", bad))
    assert [f["matrix"] for f in c.failed] == ["pooler.dense.weight"]
    assert "pooler.dense.weight" in c.failed[0]["error"]
    assert "NaN" in c.failed[0]["error"]
    assert len(c.rows["matrix"].unique()) == 13


def test_several_tuned_give_the_rows_of_each_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", finetuned(bert_state(), 0.2, seed=5))
    together = specbasis.compare(pair[0], [pair[1], other]).to_pandas()
    alone = specbasis.compare(pair[0], other).to_pandas()
    mine = together[together["pair"] == "other"].reset_index(drop=True)
    assert mine.astype({"pair": str}).equals(alone.astype({"pair": str})) or mine["value"].equals(alone["value"])


def test_rows_do_not_depend_on_workers(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.engines, "SMALL_WORK", 0)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, workers in zip(folders, (1, 2), strict=True):
        specbasis.compare(*pair, folder, workers=workers)
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.parquet")} for f in folders)
    assert one == two


def test_state_dicts_in_memory(pair: tuple[Path, Path]) -> None:
    base = bert_state()
    in_memory = specbasis.compare(base, finetuned(base))
    on_disk = specbasis.compare(*pair)
    for name in base:
        for measure in ("alignment_left", "singular_value_change", "rsd"):
            assert list(values(in_memory, name, measure)) == list(values(on_disk, name, measure))


def test_progress_reaches_the_end(pair: tuple[Path, Path]) -> None:
    seen: list[Progress] = []
    specbasis.compare(*pair, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == pytest.approx(seen[-1].total)


def test_the_manifest_says_what_was_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import hashlib

    c = specbasis.compare(*pair, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == c.manifest
    assert manifest["base"]["files"][0]["sha256"] == hashlib.sha256(pair[0].read_bytes()).hexdigest()
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["runs"][0]["matrices"] == 14


def test_a_second_run_computes_nothing_again(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    specbasis.compare(*pair, tmp_path / "out")
    monkeypatch.setattr(decomposition, "half_svd", lambda *a, **k: pytest.fail("decomposed again"))
    specbasis.compare(*pair, tmp_path / "out")
    assert len(specbasis.load(tmp_path / "out").manifest["runs"]) == 1


FACTORS = {
    "kohya": ("lora_unet_x_to_q.lora_down.weight", "lora_unet_x_to_q.lora_up.weight"),
    "kohya's kernels": ("lora_unet_x.lora_mid.weight", "lora_unet_x.lora_up.weight"),
    "LyCORIS": ("lycoris_x.hada_w1_a", "lycoris_x.lokr_w2"),
    "diffusers": ("unet.x.processor.to_q_lora.down.weight", "unet.x.to_k.lora_linear_layer.up.weight"),
    "PEFT": ("base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.default.weight"),
}


@pytest.mark.parametrize("layout", FACTORS)
def test_factors_of_adapters_are_not_compared_as_weights(layout: str, tmp_path: Path) -> None:
    states = [{name: torch.randn(32, 32) for name in FACTORS[layout]} for _ in range(2)]
    paths = [write(tmp_path / f"{i}.safetensors", state) for i, state in enumerate(states)]
    with pytest.raises(InputError, match=r"a factor of an adapter that is not merged|the factors of a LoRA"):
        specbasis.compare(*paths)


def test_a_part_that_was_asked_for_is_not_the_whole(tmp_path: Path) -> None:
    base = bert_state()
    part = specbasis.compare(base, {"own": finetuned(base)}, roles=["ffn.up"], ranks=4)
    facts, total = (
        part.facts["own"],
        len(specbasis.compare(base, dict(base), measures=["rsd"]).facts["state_dict"].matrices),
    )
    assert part.pairs == ["own"]
    assert len(facts.matrices) + len(facts.uncompared) == total
    assert facts.compared < 0.5
    assert f"Only {facts.compared:.0%} of the parameters were compared" in part.headlines["own"]
    assert f"own: {part.headlines['own'][:40]}" in repr(part)
    assert "(partial: " in part.verdicts["own"].sentence
    reasons = {item["reason"] for item in part.summary()["pairs"]["own"]["not_compared"] if item["size"]}
    assert reasons == {"not asked for"}
    same = specbasis.compare(base, dict(base), roles=["ffn.up"], ranks=4)
    assert same.verdicts["state_dict"].kind == "partial"


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))])
def test_a_module_is_refused_with_what_to_give(model: torch.nn.Module) -> None:
    with pytest.raises(InputError, match=r"here model.state_dict\(\)$"):
        specbasis.compare(model.state_dict(), model)  # type: ignore[arg-type]


def test_what_was_not_compared_is_never_identical(tmp_path: Path) -> None:
    base = bert_state()
    whole = specbasis.compare(base, dict(base))
    assert whole.verdicts["state_dict"].kind == "identical"
    total = len(whole.facts["state_dict"].matrices)
    kept = "encoder.layer.1.output.dense.weight"

    def quantised(name: str, W: torch.Tensor) -> torch.Tensor:
        return W if W.ndim < 2 or name == kept else (W * 100).round().to(torch.int8)

    others = {
        "quantised": {name: quantised(name, W) for name, W in base.items()},
        "lacking": {name: W for name, W in base.items() if W.ndim < 2 or name == kept},
        "grown": {name: W if W.ndim < 2 or name == kept else torch.cat([W, W]) for name, W in base.items()},
    }
    for other in others.values():
        found = specbasis.compare(base, other)
        verdict, facts = found.verdicts["state_dict"], found.facts["state_dict"]
        assert verdict.kind == "partial"
        assert "identical" not in verdict.sentence
        assert f"{total - 1} were not compared" in verdict.sentence
        assert len(facts.uncompared) == total - 1
        (frozen,) = (f for f in found.findings["state_dict"] if f.kind == "frozen")
        assert "100" not in frozen.sentence
        assert f"not compared: {total - 1} of both models" in frozen.sentence
        assert found.report(tmp_path / "page.html", figures=False).exists()
    head = specbasis.compare(base, {**base, "classifier.weight": torch.randn(2, 32)})
    assert head.verdicts["state_dict"].kind == "partial"
    assert head.facts["state_dict"].uncompared == ["classifier.weight"]
    broken = {**base, kept: torch.full_like(base[kept], math.nan)}
    assert specbasis.compare(base, broken).verdicts["state_dict"].kind == "partial"


def rewritten(path: Path, factor: float) -> None:
    """The same names, shapes, size and time; other weights."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write(path, {name: factor * W for name, W in load_file(path).items()})
    os.utime(path, ns=times)


def test_weights_that_changed_under_their_size_and_time_are_another_comparison(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    specbasis.compare(*pair, tmp_path / "out")
    rewritten(pair[1], 3.0)
    with pytest.raises(InputError, match="holds another comparison"):
        specbasis.compare(*pair, tmp_path / "out")


@pytest.mark.parametrize("when", ["after hashing", "between two matrices"])
@pytest.mark.parametrize("changed", [0, 1])
def test_rows_of_weights_that_changed_while_they_were_compared_are_not_kept(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch, when: str, changed: int
) -> None:
    def hashed(path: Path) -> str:
        digest = sha256(path)
        if when == "after hashing" and path == pair[changed]:
            rewritten(path, 3.0)
        return digest

    def progress(state: Progress) -> None:
        if when == "between two matrices" and 0 < state.done < state.total / 2:
            rewritten(pair[changed], 3.0)

    monkeypatch.setattr("specbasis.jobs.provenance.sha256", hashed)
    with pytest.raises(InputError, match=rf"{pair[changed].name}.*changed while it was being read"):
        specbasis.compare(*pair, tmp_path / "out", workers=1, progress=progress)
    kept = len(list((tmp_path / "out").rglob("*.parquet")))
    assert kept == 0 if when == "after hashing" else kept < 14


def test_a_file_that_was_left_alone_is_hashed_once(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr("specbasis.jobs.provenance.sha256", lambda path: read.append(path) or sha256(path))
    monkeypatch.setattr("specbasis.jobs.provenance._SETTLED", -1)  # as if it had been written long ago
    for _ in range(2):
        specbasis.compare(*pair, tmp_path / "out")
    assert sorted(read) == sorted(pair)


def test_a_part_that_is_lost_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = pair[0]
    specbasis.compare(base, base, tmp_path / "out")
    next((tmp_path / "out").rglob("*.parquet")).unlink()
    opened = specbasis.load(tmp_path / "out")
    ((_, (lost,)),) = [(label, [s for s in skipped if "without rows" in s["reason"]])
                       for label, skipped in opened.skipped.items()]  # fmt: skip
    assert lost["name"] not in opened.rows["matrix"].to_pylist()
    assert opened.verdicts["base"].kind == "partial"
    assert "without rows" in opened._repr_html_()
    specbasis.compare(base, base, tmp_path / "out")
    assert specbasis.load(tmp_path / "out").verdicts["base"].kind == "identical"


def test_a_damaged_part_is_done_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = specbasis.compare(*pair, tmp_path / "out")
    part = next((tmp_path / "out").rglob("*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    again = specbasis.compare(*pair, tmp_path / "out")
    assert part.read_bytes() == whole
    assert again.rows.equals(first.rows)


def test_another_comparison_is_not_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    specbasis.compare(*pair, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"another comparison, .*ranks"):
        specbasis.compare(*pair, tmp_path / "out", ranks=3)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


SCRIPT = """
import importlib, sys
job = importlib.import_module("specbasis.comparison.compare")
job.engines.SMALL_WORK = float(sys.argv[5])
job.compare(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_continued_gives_the_same_files(tmp_path: Path, workers: int) -> None:
    base = bert_state(blocks=6, width=160)
    a = write(tmp_path / "a.safetensors", base)
    b = write(tmp_path / "b.safetensors", finetuned(base))
    specbasis.compare(a, b, tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    for parts in (1, 8):
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, a, b, killed, str(workers), "0"], start_new_session=True
        )
        until(
            lambda parts=parts: len(list(killed.rglob("*.parquet"))) >= parts,
            lambda child=child: child.poll() is not None,
        )
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    done = len(list(killed.rglob("*.parquet")))
    specbasis.compare(a, b, killed)
    expected, found = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.parquet")} for f in (tmp_path / "undisturbed", killed)
    )
    assert found == expected
    assert 1 <= done
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux gives it")
def test_peak_memory_does_not_grow_with_the_number_of_matrices(tmp_path: Path) -> None:
    measure = SCRIPT + "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for blocks in (1, 8):
        base = bert_state(blocks=blocks, width=256)
        a = write(tmp_path / f"{blocks}" / "a.safetensors", base)
        b = write(tmp_path / f"{blocks}" / "b.safetensors", finetuned(base))
        out = subprocess.run(
            [sys.executable, "-c", measure, a, b, tmp_path / f"{blocks}" / "out", "1", "0"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(out.stdout.split()[-1]) * 1024)
    weights = 2 * 4 * 7 * 12 * 256**2  # what the seven additional blocks hold, both sides, float32: 44 MB
    # Memory-mapped pages of the files count as resident; nothing else may grow.
    assert peaks[1] - peaks[0] < 1.25 * weights + 16 * 2**20


def test_parquet_is_readable_by_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    specbasis.compare(*pair, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "rows")
    assert table.num_rows > 0
    assert {"pair", "matrix", "measure", "index", "value", "bound", "resolved"} <= set(table.column_names)


# --- less work for the same numbers ------------------------------------------------------------------------------


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(what, ranks) of every decomposition."""
    calls: list[tuple[str, int]] = []
    whole = decomposition.half_svd

    def counted(W, ranks, *, minus=None, **rest):
        calls.append(("delta" if minus is not None else "matrix", ranks))
        return whole(W, ranks, minus=minus, **rest)

    monkeypatch.setattr(decomposition, "half_svd", counted)
    return calls


def test_what_no_measure_reads_is_not_decomposed(pair: tuple[Path, Path], decomposed) -> None:
    whole = specbasis.compare(*pair, name="*intermediate*")
    assert sorted(set(decomposed)) == [("delta", 12), ("matrix", 12)]
    decomposed.clear()
    some = specbasis.compare(*pair, name="*intermediate*", measures=["alignment*", "rsd"])
    assert set(decomposed) == {("matrix", 12)}
    decomposed.clear()
    spectra = specbasis.compare(*pair, name="*intermediate*", measures=["singular_value_*"])
    assert set(decomposed) == {("matrix", 0), ("delta", 0)}
    decomposed.clear()
    free = specbasis.compare(*pair, name="*intermediate*", measures=["norm_base"])
    assert not decomposed
    for part in (some, spectra, free):
        assert part.verdicts["tuned"].kind == "finetuned"
        assert {"weight_cosine", "relative_update"} <= set(part.rows["measure"].unique().to_pylist())
        for measure in part.rows["measure"].unique().to_pylist():
            matrix = part.rows["matrix"][0].as_py()
            np.testing.assert_allclose(values(part, matrix, measure), values(whole, matrix, measure), rtol=1e-9)


def test_unknown_measures_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="no measure 'alignement"):
        specbasis.compare(*pair, measures=["alignement*"])


def test_other_measures_are_another_comparison(pair: tuple[Path, Path], tmp_path: Path) -> None:
    specbasis.compare(*pair, tmp_path / "out", measures=["rsd"])
    with pytest.raises(InputError, match=r"another comparison, .*measures"):
        specbasis.compare(*pair, tmp_path / "out")


def test_all_ranks_of_wide_matrices_against_numpy(tmp_path: Path) -> None:
    """Where right vectors stay implied: every alignment, overlap and angle of both sides."""
    g = torch.Generator().manual_seed(3)
    base = {"up.weight": torch.randn(150, 40, generator=g), "down.weight": torch.randn(40, 150, generator=g)}
    a = write(tmp_path / "a.safetensors", base)
    c = specbasis.compare(a, write(tmp_path / "b.safetensors", finetuned(base, 0.3)), ranks=40)
    tuned = specbasis.open_checkpoint(tmp_path / "b.safetensors")
    for name, W in base.items():
        (Ub, _, Vb), (Ut, _, Vt) = (
            np.linalg.svd(np.asarray(X, dtype=np.float64), full_matrices=False) for X in (W, tuned[name])
        )
        for side, X, Y in (("left", Ub, Ut), ("right", Vb.T, Vt.T)):
            np.testing.assert_allclose(values(c, name, f"alignment_{side}"), np.abs((X * Y).sum(0)), atol=1e-10)
            overlap = [np.sum((X[:, :k].T @ Y[:, :k]) ** 2) / k for k in (1, 2, 4, 8, 16, 32, 40)]
            np.testing.assert_allclose(values(c, name, f"subspace_overlap_{side}"), overlap, atol=1e-10)
            angles = scipy.linalg.subspace_angles(X[:, :10], Y[:, :10])[::-1]
            np.testing.assert_allclose(values(c, name, f"principal_angle_{side}"), angles, atol=1e-8)


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_rows_do_not_depend_on_the_engine(pair: tuple[Path, Path], tmp_path: Path, engine: str) -> None:
    folders = [tmp_path / "one", tmp_path / engine]
    specbasis.compare(*pair, folders[0], workers=1)
    specbasis.compare(*pair, folders[1], workers=2, engine=engine, memory="300M")
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.parquet")} for f in folders)
    assert one == two


def test_a_cache_gives_the_same_rows_cold_and_warm(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folders = [tmp_path / "cold", tmp_path / "warm"]
    for folder in folders:
        specbasis.compare(*pair, folder, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 28
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.parquet")} for f in folders)
    assert one == two


def test_devices_are_checked(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="got device 'cuda:77'"):
        specbasis.compare(*pair, device="cuda:77")
    with pytest.raises(InputError, match="got device 'gpu'"):
        specbasis.compare(*pair, device="gpu")


def test_the_plan_is_what_is_done(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    plan = job.plan(*pair, tmp_path / "out", workers=2, memory="1GB")
    assert [task.flops for task in plan.tasks] == sorted((t.flops for t in plan.tasks), reverse=True)
    assert not (tmp_path / "out").exists()
    assert plan.memory == 10**9
    assert 0 < plan.seconds < math.inf
    assert 0 < plan.bytes < plan.memory
    specbasis.compare(*pair, tmp_path / "out")
    assert len(specbasis.load(tmp_path / "out").rows["matrix"].unique()) == len(plan.tasks)
    assert not job.plan(*pair, tmp_path / "out").tasks


def test_a_quick_comparison_has_the_leading_ranks_alone_each_with_its_bound(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    spikes = 3 * torch.randn(600, 5, generator=g) @ torch.randn(5, 900, generator=g) / 100
    base = {
        "a.weight": torch.randn(600, 900, generator=g) / 50 + spikes,
        "b.weight": torch.randn(30, 50, generator=g),
    }
    paths = write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", finetuned(base))
    exact = specbasis.compare(*paths, ranks=16)
    some = specbasis.compare(*paths, tmp_path / "out", quick=True)
    assert not {"mrc", "rsd", "intruders_left"} & set(some.rows["measure"].unique().to_pylist())
    frame = some.to_pandas()
    for measure in ("alignment_left", "alignment_right", "singular_value_base", "explained_variance_delta"):
        for name in base:
            own = frame[(frame["matrix"] == name) & (frame["measure"] == measure)].sort_values("index")
            assert len(own) == (17 if measure.startswith(("singular", "explained")) else 16)
            known = (own["resolved"] == True).to_numpy() if own["bound"].notna().any() else np.arange(len(own)) < 5  # noqa: E712
            assert known.sum() >= 5
            allowed = np.nan_to_num(own["bound"].to_numpy(), nan=1e-4)[known] + 1e-7
            assert (abs(own["value"] - values(exact, name, measure)[: len(own)]).to_numpy()[known] <= allowed).all()
    assert [v.kind for v in some.verdicts.values()] == [v.kind for v in exact.verdicts.values()]
    assert any("quick" in note for note in some.manifest["pairs"]["b"]["notes"])
    assert specbasis.compare(*paths, tmp_path / "out", quick=True).rows.equals(some.rows)
    with pytest.raises(InputError, match="quick"):
        specbasis.compare(*paths, tmp_path / "out")


@pytest.mark.slow
def test_rows_of_a_ray_cluster_are_those_of_this_process(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """On a real cluster of this machine; a worker is killed while it works."""
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    base = bert_state(blocks=8, width=160)
    paths = write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", finetuned(base))
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            mine = any(parent.pid == os.getpid() for parent in process.parents())
            if progress.done and not killed and mine and title.startswith("ray::encoder"):
                process.kill()
                killed.append(process.pid)

    folders = [tmp_path / "here", tmp_path / "cluster"]
    specbasis.compare(*paths, folders[0])
    specbasis.compare(*paths, folders[1], engine="ray", workers=2, progress=kill_one)
    here, cluster = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.parquet")} for f in folders)
    assert killed
    assert here == cluster
    configs = [json.loads((f / "manifest.json").read_text())["config"] for f in folders]
    assert configs[0] == configs[1]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    base = bert_state(blocks=6, width=200)
    a = write(tmp_path / "a.safetensors", base)
    b = write(tmp_path / "b.safetensors", finetuned(base))
    mark = f"SPECBASIS_TEST_MARK={tmp_path.name}"
    environment = os.environ | dict([mark.split("=")])
    command = [sys.executable, "-c", SCRIPT, a, b, tmp_path / "out", "2", "0"]
    child = subprocess.Popen(command, env=environment)
    until(lambda: list((tmp_path / "out").rglob("*.parquet")), lambda: child.poll() is not None)
    child.kill()
    child.wait()
    assert until(lambda: not _marked(mark)), _marked(mark)


def _marked(mark: str) -> list[str]:
    """Processes whose environment has an entry."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "options",
    [{"ranks": 2.5}, {"ranks": True}, {"ranks": 5, "subspace": 6}, {"memory": 0}, {"engine": "processes"}],
)
def test_options_that_cannot_run_leave_no_folder(tmp_path: Path, options: dict[str, Any]) -> None:
    W = {"w.weight": torch.randn(8, 8)}
    with pytest.raises(InputError):
        specbasis.compare(W, W, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
