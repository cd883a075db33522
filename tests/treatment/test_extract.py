"""`extract`: plain PEFT is the reader, torch's SVD in float64 the oracle of what is kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import specbasis
from specbasis import open_checkpoint
from specbasis.checkpoint import open_tuned
from specbasis.core.errors import InputError
from specbasis.treatment.extract import Extraction, extract

from ..pico import bert_state, finetuned, write
from .models import (
    SMALL,
    assert_same_function,
    bert,
    by_peft,
    convnext,
    deberta,
    function,
    gpt2,
    llama,
    mixtral,
    pair,
    peft,
    shaken,
    t5,
    transformers,
    vit,
)

FAMILIES = {
    "bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "t5": t5, "convnext": convnext, "mixtral": mixtral,
    "deberta": deberta, "llama tied": lambda: llama(tied=True), "bert body": lambda: bert().bert,
    "llama body": lambda: llama().model,
}  # fmt: skip


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """A pico BERT and its finetune, on disk."""
    folder = tmp_path_factory.mktemp("berts")
    pair(folder, bert)
    return folder


def changed(folder, tuned="tuned", **options):
    """A finetune whose state was changed by hand, beside its base."""
    return extract(folder / "base", folder / tuned, folder / "out", **options)


def deltas(folder):
    base, tuned = (open_checkpoint(folder / name) for name in ("base", "tuned"))
    return {name: tuned[name].double() - base[name].double() for name in base if name in tuned}


# --- the best approximation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_a_lora_of_each_rank_is_the_truncated_svd(rank, berts, tmp_path):
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", rank=rank)
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    by_name = deltas(berts)
    assert len(extraction.matrices) > 10
    for line in extraction.matrices:
        delta = by_name[line["name"]]
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        kept = min(rank, *delta.shape)
        best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
        key = f"base_model.model.{line['name'].removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            got = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
        else:
            got = (factors[f"{key}.lora_embedding_B"].double() @ factors[f"{key}.lora_embedding_A"].double()).mT
        assert float((got - best).norm()) <= 1e-6 * float(best.norm()), line["name"]
        assert line["rank"] == kept


def test_the_record_says_what_is_in_the_file(berts, tmp_path):
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", size="24kB")
    by_name, held, total = deltas(berts), 0.0, 0.0
    for line in extraction.matrices:
        delta, rank = by_name[line["name"]], line["rank"]
        squares = torch.linalg.svdvals(delta).square()
        held += float(squares[:rank].sum())
        assert line["squares"] == pytest.approx(float(squares.sum()))
        # Of the factors as they are stored, in float32.
        assert line["share"] == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-7)
        assert line["bytes"] == 4 * rank * sum(delta.shape)
        assert line["chance"] == rank / min(delta.shape)
        # An entry takes 4 bytes and its place 4; signs are one size a matrix, the best one: the mean of |delta|.
        largest = delta.abs().flatten().sort(descending=True).values[: line["bytes"] // 8]
        assert line["share_of_entries"] == pytest.approx(float(largest.square().sum() / squares.sum()), rel=1e-5)
        signs = delta.sign() * delta.abs().mean()
        left = float((delta - signs).square().sum() / squares.sum())
        assert line["share_of_signs"] == pytest.approx(1 - left, rel=1e-5)
    total = sum(float(delta.square().sum()) for delta in by_name.values())
    carried = {item["name"]: item["share_of_update"] for item in extraction.record["carried"]}
    for name, share in carried.items():
        assert share == pytest.approx(float(by_name[name].square().sum()) / total)
    assert set(carried) | {line["name"] for line in extraction.matrices} == set(by_name)
    assert extraction.record["total"]["share"] == pytest.approx(held / total + sum(carried.values()))
    assert extraction.record["total"]["bytes"] == bytes_of(tmp_path / "out") <= 24_000
    again = Extraction.load(tmp_path / "out")
    assert again.record == extraction.record
    assert "all" in extraction.table.markdown()
    assert "<table" in extraction._repr_html_()


def bytes_of(folder):
    """Of all files but the record and the page."""
    beside = (Extraction.RECORD, "report.html", "extract.png", "extract.svg")
    return sum(path.stat().st_size for path in folder.iterdir() if path.name not in beside)


def test_signs_that_average_to_zero_still_count(tmp_path):
    base = bert_state()
    signs = {
        name: w + 0.01 * (2 * torch.randint(0, 2, w.shape, generator=torch.Generator().manual_seed(1)) - 1)
        for name, w in base.items()
    }
    extraction = extract(base, signs, tmp_path / "out", rank=1)
    for line in extraction.matrices:  # one size for each matrix is all that there is
        assert line["share_of_signs"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_a_share_of_the_update_is_kept(energy, berts, tmp_path):
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", energy=energy)
    held = sum(line["share"] * line["squares"] for line in extraction.matrices)
    whole = sum(line["squares"] for line in extraction.matrices)
    assert energy * whole * (1 - 1e-7) <= held  # of factors in float32
    largest = max(
        float(torch.linalg.matrix_norm(delta, 2)) ** 2 for delta in deltas(berts).values() if delta.ndim > 1
    )
    assert held - energy * whole < largest


@pytest.mark.parametrize("size", ["12kB", "20kB", "40kB", "1GB"])
def test_the_file_is_no_larger_than_asked(size, berts, tmp_path):
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", size=size)
    assert bytes_of(tmp_path / "out") == extraction.record["total"]["bytes"]
    assert bytes_of(tmp_path / "out") <= {"12kB": 12_000, "20kB": 20_000, "40kB": 40_000, "1GB": 10**9}[size]
    assert size != "1GB" or extraction.record["total"]["share"] == pytest.approx(1.0)


def test_a_server_that_takes_matrices_alone_up_to_a_rank(berts, tmp_path):
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", energy=1.0, max_rank=4, carry=False)
    for line in extraction.matrices:  # no more than pays: factors of 3 × 16 are smaller than that up to rank 2
        assert line["rank"] == min(4, line["shape"][0] * line["shape"][1] // sum(line["shape"]))
    assert all("lora_" in name for name in load_file(tmp_path / "out/adapter_model.safetensors"))
    assert {item["reason"] for item in extraction.record["left_out"]} == {"not asked for (carry)"}
    by_name = deltas(berts)
    total = sum(float(delta.square().sum()) for delta in by_name.values())
    for item in extraction.record["left_out"]:
        assert item["share_of_update"] == pytest.approx(float(by_name[item["name"]].square().sum()) / total)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_a_narrow_format(dtype, berts, tmp_path):
    extract(berts / "base", berts / "tuned", tmp_path / "out", energy=1.0, dtype=dtype)
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {w.dtype for name, w in factors.items() if "lora_" in name} == {getattr(torch, dtype)}
    got = open_tuned(tmp_path / "out", open_checkpoint(berts / "base"))
    for name, delta in deltas(berts).items():
        error = float((got[name].double() - open_checkpoint(berts / "tuned")[name].double()).norm())
        assert error <= 0.02 * float(delta.norm()) + 1e-6


# --- what plain PEFT and transformers make of the folder ----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_gives_back_the_function_of_the_finetune(family, tmp_path):
    base, tuned = pair(tmp_path, FAMILIES[family])
    want, before = function(tuned), function(base)
    # Experts that are stacked in memory cannot be stored whole: factors of full rank have to be asked for.
    extraction = changed(tmp_path, **({"rank": 64} if family == "mixtral" else {"energy": 1.0}))
    assert not extraction.record["left_out"]
    live, merged = by_peft(base, tmp_path / "out")
    assert_same_function(live, want, before)
    assert_same_function(merged, want)
    got, stored = (
        open_tuned(tmp_path / "out", open_checkpoint(tmp_path / "base")),
        open_checkpoint(tmp_path / "tuned"),
    )
    for name in stored:
        torch.testing.assert_close(got[name], stored[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (bert, "bias"), (bert, "LayerNorm"), (bert, "classifier"), (bert, "word_embeddings"), (vit, "cls_token"),
        (vit, "position_embeddings"), (convnext, "dwconv"), (convnext, "layer_scale"), (mixtral, "gate.weight"),
        (mixtral, "experts"), (gpt2, "c_attn.bias"), (deberta, "rel_embeddings"), (t5, "relative_attention_bias"),
    ],
)  # fmt: skip
def test_a_finetune_of_one_kind_of_parameter_alone(make, part, tmp_path):
    base, tuned = pair(tmp_path, make, only=part, size=0.5)
    want, before = function(tuned), function(base)
    assert float((want - before).abs().max()) > 1e-4 * float(want.abs().max())
    extraction = changed(tmp_path, **({"rank": 64} if part == "experts" else {"energy": 1.0}))
    assert not extraction.record["left_out"]
    assert extraction.record["total"]["share"] == pytest.approx(1.0)
    for got in by_peft(base, tmp_path / "out"):
        assert_same_function(got, want)


def test_a_process_without_specbasis_loads_the_folder(tmp_path):
    for name in ("bert", "llama tied"):
        base, tuned = pair(tmp_path / name, FAMILIES[name])
        changed(tmp_path / name, energy=1.0)
        torch.save((function(base), function(tuned)), tmp_path / name / "want.pt")
    code = """
import sys
import warnings
sys.modules["specbasis"] = None
import torch, transformers, peft
for name, kind in (("bert", "SequenceClassification"), ("llama tied", "CausalLM")):
    before, want = torch.load(f"{name}/want.pt")
    ids = {"input_ids": torch.arange(5, 19).reshape(2, 7)}
    labels = {"num_labels": 3} if name == "bert" else {}
    auto = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(f"{name}/out", **labels)
    plain = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(f"{name}/base")
    plain.load_adapter(f"{name}/out")
    for model in (auto, plain, auto.merge_and_unload()):
        error = (model.eval()(**ids).logits - want).abs().max() / want.abs().max()
        assert error < 2e-5 < (before - want).abs().max() / want.abs().max(), (name, error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finetune_in_a_narrow_format(dtype, tmp_path):
    base, tuned = pair(tmp_path, llama)
    tuned.to(dtype).save_pretrained(tmp_path / "tuned")
    tuned = type(tuned).from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    changed(tmp_path, energy=1.0)
    for got in by_peft(base, tmp_path / "out"):
        assert_same_function(got, function(tuned), None)


def test_a_new_head_on_a_body(tmp_path):
    _, tuned = pair(tmp_path, bert)
    bert().bert.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    extraction = changed(tmp_path, energy=1.0)
    assert {"classifier.weight", "classifier.bias"} <= {item["name"] for item in extraction.record["carried"]}
    base = type(tuned).from_pretrained(tmp_path / "base", num_labels=3)
    for got in by_peft(base, tmp_path / "out"):
        assert_same_function(got, function(tuned))


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grew(tied, tmp_path):
    base, tuned = pair(tmp_path, lambda: llama(tied))
    tuned.resize_token_embeddings(67)
    tuned.save_pretrained(tmp_path / "tuned")
    extraction = changed(tmp_path, energy=1.0)
    assert extraction.record["notes"]
    assert any("has 67 rows, the base's 64" in note for note in extraction.record["notes"])
    old, new = (open_checkpoint(tmp_path / n)["model.embed_tokens.weight"].double() for n in ("base", "tuned"))
    squares = float((new[:64] - old).square().sum() + new[64:].square().sum())
    total = squares + sum(float(d.square().sum()) for n, d in same_shape(tmp_path).items())
    if not tied:
        old, new = (open_checkpoint(tmp_path / n)["lm_head.weight"].double() for n in ("base", "tuned"))
        total += float((new[:64] - old).square().sum() + new[64:].square().sum())
    shares = {item["name"]: item["share_of_update"] for item in extraction.record["carried"]}
    assert shares["model.embed_tokens.weight"] == pytest.approx(squares / total)
    base.resize_token_embeddings(67)
    for got in by_peft(base, tmp_path / "out"):
        assert_same_function(got, function(tuned))


def same_shape(folder):
    base, tuned = (open_checkpoint(folder / name) for name in ("base", "tuned"))
    return {n: tuned[n].double() - base[n].double() for n in base if tuned[n].shape == base[n].shape}


def test_running_statistics_and_counters_of_batch_norms(tmp_path):
    def make():
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        return transformers.ResNetForImageClassification(config)

    def tune(model):
        tuned = shaken(model).train()
        tuned(torch.randn(4, 3, 32, 32))
        return tuned

    base, tuned = pair(tmp_path, make, tune)
    images = torch.randn(2, 3, 32, 32)
    want, before = (model.eval()(images).logits.detach() for model in (tuned, base))
    extraction = changed(tmp_path, energy=1.0)
    assert not extraction.record["left_out"]
    got = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(pixel_values=images).logits
    assert_same_function(got, want, before)


def test_a_model_of_torch_alone(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    tuned = shaken(model).eval()
    torch.save(model.state_dict(), tmp_path / "base")
    torch.save(tuned.state_dict(), tmp_path / "tuned")
    extraction = changed(tmp_path, energy=1.0)
    assert not extraction.record["left_out"]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    x = torch.randn(2, 5, 16)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    assert_same_function(adapted(x), tuned(x), model.eval()(x))
    assert_same_function(adapted.merge_and_unload()(x), tuned(x))


# --- adapters as finetunes ----------------------------------------------------------------------------------------

LINEAR = ["q_proj", "k_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR}
ADAPTERS = {
    "patterns": (
        llama,
        {"rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.down_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "rslora": (llama, {"use_rslora": True}),
    "dora": (llama, {"use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "saved tables": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "one of two tied tables": (lambda: llama(True), {"modules_to_save": ["embed_tokens"]}),
    "tied tables that differ": (lambda: llama(True), {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "renamed family": (vit, {"target_modules": ["query", "q_proj"], "modules_to_save": ["classifier"]}),
    "on a body": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "on a body, no task": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
}  # fmt: skip


def adapt(folder, make, config):
    """A base and an adapter on it, on disk; returns the base and the merged model."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(type(model).from_pretrained(folder / "whole"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "tuned")
    return type(model).from_pretrained(folder / "whole"), adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_made_anew(case, tmp_path):
    make, options = ADAPTERS[case]
    base, tuned = adapt(tmp_path, make, peft.LoraConfig(**LORA | options))
    if "body" in case:
        base.bert.save_pretrained(tmp_path / "base")
    extraction = changed(tmp_path, energy=1.0)
    assert not extraction.record["left_out"]
    assert extraction.record["total"]["share"] == pytest.approx(1.0, abs=1e-12)
    want, before = function(tuned), function(base)
    for got in by_peft(base, tmp_path / "out"):
        assert_same_function(got, want, before)


@pytest.mark.filterwarnings("ignore")
def test_adalora_and_spectral_adapters_become_loras(tmp_path):
    from specbasis.adapter import SpectralConfig

    configs = {
        "adalora": peft.AdaLoraConfig(init_r=6, target_r=3, total_step=100, lora_alpha=32, target_modules=LINEAR),
        "spectral": SpectralConfig(rank=6, target_modules=["down_proj", "up_proj"]),
    }
    for name, config in configs.items():
        base, tuned = adapt(tmp_path / name, llama, config)
        extraction = changed(tmp_path / name, energy=1.0)
        assert max(line["rank"] for line in extraction.matrices if not line.get("whole")) <= 6
        for got in by_peft(base, tmp_path / name / "out"):
            assert_same_function(got, function(tuned))


@pytest.mark.filterwarnings("ignore")
def test_a_lora_of_less_and_of_more_rank(tmp_path):
    base, tuned = adapt(tmp_path, llama, peft.LoraConfig(**LORA))
    dense, under = tuned.state_dict(), base.state_dict()
    less = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "less", rank=2)
    for line in less.matrices:
        squares = torch.linalg.svdvals(dense[line["name"]].double() - under[line["name"]].double()).square()
        assert line["share"] == pytest.approx(float(squares[:2].sum() / squares.sum()), rel=1e-5)
        assert line["share_of_entries"] is line["share_of_signs"] is None
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "more", rank=8)
    factors = load_file(tmp_path / "more/adapter_model.safetensors")
    assert {w.shape[0] for name, w in factors.items() if "lora_A" in name} == {8}
    for got in by_peft(base, tmp_path / "more"):
        assert_same_function(got, function(tuned))


# --- what cannot be, and what goes wrong --------------------------------------------------------------------------


def replaced(folder, name, change, which="tuned"):
    path = folder / which / "model.safetensors"
    state = load_file(path)
    state[name] = change(state[name])
    save_file(state, path, metadata={"format": "pt"})


def poisoned(tensor):
    tensor = tensor.clone()
    tensor.flatten()[3] = float("nan")
    return tensor


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    "name",
    [QUERY, "classifier.weight", "bert.encoder.layer.0.output.LayerNorm.weight", QUERY.replace("weight", "bias")],
)
def test_nan_in_one_parameter_is_told_and_not_passed_on(name, tmp_path):
    base, _ = pair(tmp_path, bert)
    replaced(tmp_path, name, poisoned)
    extraction = changed(tmp_path, energy=1.0)
    assert extraction.record["left_out"] == [{"name": name, "reason": "holds NaN or Inf", "share_of_update": None}]
    for tensor in load_file(tmp_path / "out/adapter_model.safetensors").values():
        assert bool(torch.isfinite(tensor).all())
    for got in by_peft(base, tmp_path / "out"):
        assert bool(torch.isfinite(got).all())


def test_a_matrix_that_was_quantised_is_not_dropped_in_silence(tmp_path):
    pair(tmp_path, bert)
    replaced(tmp_path, QUERY, lambda w: (w * 100).to(torch.int8))
    (left,) = changed(tmp_path, energy=1.0).record["left_out"]
    assert left["name"] == QUERY
    assert "int8" in left["reason"]
    replaced(tmp_path, QUERY, lambda w: w + 1)
    replaced(tmp_path, QUERY, lambda w: (w * 100).to(torch.int8), which="base")
    (left,) = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "again").record["left_out"]
    assert left["name"] == QUERY


def independent(folder):
    torch.manual_seed(5)
    bert().save_pretrained(folder / "tuned")


def independent_with_nan(folder):
    independent(folder)
    replaced(folder, QUERY, poisoned)


def wider(folder):
    config = transformers.BertConfig(**{**SMALL, "hidden_size": 32})
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "tuned")


def equal(folder):
    bert().from_pretrained(folder / "base").save_pretrained(folder / "tuned")


def occupied(folder):
    (folder / "out").mkdir()
    (folder / "out/mine").write_text("kept")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (independent, {}, "lies further from .*which-base"),
        (independent_with_nan, {}, "lies further from"),
        (wider, {}, "less than half of it in these shapes.*want the base"),
        (lambda folder: llama().save_pretrained(folder / "tuned"), {}, "no parameter in common"),
        (equal, {}, "every number is the base's; nothing differs from"),
        (occupied, {}, "exists already; want a new folder"),
        (lambda folder: (folder / "out").write_text("mine"), {}, "exists already"),
        (None, {"size": "1kB"}, "got size = 1kB.*want [0-9,]+ bytes at least, or leave out"),
        (None, {"size": "1kB", "carry": False}, "want [0-9,]+ bytes at least$"),
        (None, {"size": "lots"}, "got 'lots'; want a size"),
        (None, {"size": 0}, "want more than nothing"),
        (None, {"rank": 0}, "got rank = 0"),
        (None, {"max_rank": 0}, "got max_rank = 0"),
        (None, {"energy": 2}, "got energy = 2"),
        (None, {"energy": 0}, "got energy = 0"),
        (None, {"energy": float("nan")}, "got energy = nan"),
        (None, {"rank": 2, "energy": 0.5}, "got rank and energy; want one"),
        (None, {"dtype": "int8"}, "got dtype = 'int8'"),
    ],
)  # fmt: skip
def test_refusals_leave_everything_as_it_was(prepare, options, message, tmp_path):
    pair(tmp_path, bert)
    if prepare is not None:
        prepare(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        changed(tmp_path, **options)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_least_size_that_a_refusal_names_is_enough(berts, tmp_path):
    with pytest.raises(InputError) as refusal:
        extract(berts / "base", berts / "tuned", tmp_path / "out", size=100)
    least = int(str(refusal.value).partition("want ")[2].partition(" bytes")[0].replace(",", ""))
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", size=least)
    assert sum(line["rank"] for line in extraction.matrices) >= 1


def test_what_is_carried_arrives_beside_matrices_of_no_rank_of_some_and_stored_whole(tmp_path):
    base, tuned = pair(tmp_path, bert)
    shaken(tuned, size=1.0, only="output.dense.weight").save_pretrained(tmp_path / "tuned")
    wanted = open_checkpoint(tmp_path / "tuned")
    seen = set()
    for size in ("32kB", "34kB", "36kB", "45kB"):
        extraction = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / size, size=size)
        kinds = {"whole" if line.get("whole") else bool(line["rank"]) for line in extraction.matrices}
        seen |= kinds
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / size).merge_and_unload()
        state = merged.state_dict()
        for name in (item["name"] for item in extraction.record["carried"]):
            assert torch.equal(state[name], wanted[name]), (size, name)
        for line in extraction.matrices:
            if line.get("whole"):
                assert torch.equal(state[line["name"]], wanted[line["name"]])
    assert seen == {True, False, "whole"}


def test_a_rank_that_does_not_pay_is_told_and_by_rank_alone_given(berts, tmp_path):
    asked = extract(berts / "base", berts / "tuned", tmp_path / "asked", rank=64)
    assert all(line["rank"] == min(line["shape"]) and "whole" not in line for line in asked.matrices)
    assert any("a LoRA of rank 64 takes more bytes than the matrix" in note for note in asked.record["notes"])
    spread = extract(berts / "base", berts / "tuned", tmp_path / "spread", energy=0.999)
    for line in spread.matrices:
        out, width = line["shape"]
        if line.get("whole"):
            assert (line["bytes"], line["share"]) == (4 * out * width, 1.0)
        else:
            assert line["rank"] <= out * width // (out + width)
    assert any("takes more bytes than the matrix" in note for note in spread.record["notes"])
    assert spread.record["total"]["bytes"] < asked.record["total"]["bytes"]
    capped = extract(berts / "base", berts / "tuned", tmp_path / "capped", energy=0.999, carry=False)
    assert not any(line.get("whole") for line in capped.matrices)
    assert any("99.90% was asked for" in note for note in capped.record["notes"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_share_is_that_of_the_factors_as_they_are_stored(dtype, berts, tmp_path):
    extraction = extract(berts / "base", berts / "tuned", tmp_path / "out", rank=8, dtype=dtype)
    factors, by_name = load_file(tmp_path / "out/adapter_model.safetensors"), deltas(berts)
    compared = 0
    for line in extraction.matrices:
        key = f"base_model.model.{line['name'].removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            delta = by_name[line["name"]]
            product = factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
            share = 1 - float((delta - product).square().sum() / delta.square().sum())
            assert line["share"] == pytest.approx(share, abs=1e-12)
            best = torch.linalg.svdvals(delta).square()
            # Rounding costs what it costs: an unrounded share would be the best one to the last digit.
            gap = float(best[:8].sum() / best.sum()) - line["share"]
            assert gap > 1e-7 if dtype == "bfloat16" else gap > -1e-12
            compared += 1
    assert compared > 8


def test_a_size_that_biases_alone_do_not_fit_into(tmp_path):
    pair(tmp_path, bert, only="bias")
    with pytest.raises(InputError, match="bytes at least"):
        changed(tmp_path, size=100)


def command(folder, *words, **options):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "specbasis", "extract", "base", "tuned", "--out", "out", *words]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_killed_half_way_nothing_looks_complete_and_the_same_command_works(tmp_path):
    write(tmp_path / "base", state := bert_state(blocks=2))
    write(tmp_path / "tuned", finetuned(state))
    code = (
        "import os, specbasis, specbasis.treatment.low_rank as e\n"
        "first = e.LowRank.note\n"
        "def note(form, change, **own):\n"
        "    if 'output' in change.name: os.kill(os.getpid(), 9)\n"
        "    return first(form, change, **own)\n"
        "e.LowRank.note = note\n"
        "specbasis.extract('base', 'tuned', 'out', rank=2)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    extraction = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert extraction.matrices
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_a_full_disk_is_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    write(tmp_path / "base", state := bert_state(blocks=2))
    write(tmp_path / "tuned", finetuned(state))
    full = command(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    _, error = full.communicate()
    assert full.returncode == 2
    assert "out: cannot be written (File too large)" in error.replace("\n", " ")
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_while_one_writes_another_is_refused_before_its_work(tmp_path):
    write(tmp_path / "base", state := bert_state(blocks=2))
    write(tmp_path / "tuned", finetuned(state))
    others = []

    def second(at):
        if "output" in str(at) and not others:
            others.append(command(tmp_path, "--rank", "2"))
            others.append(others[0].communicate()[1])

    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, progress=second)
    assert others[0].returncode == 2
    assert "another run is writing here" in others[1].replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]
    assert Extraction.load(tmp_path / "out").matrices


def run(*words):
    from specbasis.cli import app

    return CliRunner().invoke(app, ["extract", *map(str, words)])


def test_the_command_tells_what_is_in_the_folder(berts, tmp_path):
    done = run(berts / "base", berts / "tuned", "--out", tmp_path / "out", "--rank", 2)
    assert done.exit_code == 0, done.output
    assert "carried whole" in done.output
    document = run(berts / "base", berts / "tuned", "--out", tmp_path / "json", "--rank", 2, "--json")
    record = json.loads(document.stdout)
    assert record["folder"] == str(tmp_path / "json")
    assert record["matrices"] == Extraction.load(tmp_path / "out").matrices


def test_strict_is_an_exit_code(berts, tmp_path):
    arguments = (berts / "base", berts / "tuned", "--strict", "--rank", 2, "--out")
    assert run(*arguments, tmp_path / "all").exit_code == 0
    assert run(*arguments, tmp_path / "matrices", "--no-carry").exit_code == 2
    assert (tmp_path / "matrices" / Extraction.RECORD).exists()


def test_a_task_that_cannot_be_judged_is_refused_before_the_work(berts, tmp_path):
    for task in ("nonsense", "glue:nonsense", f"table:{tmp_path / 'gone.csv'}"):
        done = run(berts / "base", berts / "tuned", "--out", tmp_path / "out", "--rank", 2, "--judge", task)
        assert isinstance(done.exception, InputError), task
    assert not (tmp_path / "out").exists()

    class Broken:
        metric = "none"

        def load(self, source):
            raise InputError("no tokenizer")

    told = []
    with pytest.raises(InputError, match="no tokenizer"):
        extract(berts / "base", berts / "tuned", tmp_path / "out", judge=Broken(), progress=told.append)
    assert told
    assert not any("singular" in str(at) for at in told)


def test_a_table_of_texts_judges_base_finetune_and_result(tmp_path):
    _, tuned = pair(tmp_path, bert)
    words = [f"w{i}" for i in range(59)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "tuned")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 6)) for _ in range(24)]
    labels = rng.integers(0, 3, 24)
    lines = ["text,label", *(f"{text},{label}" for text, label in zip(texts, labels, strict=True))]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    done = run(
        tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "out", "--energy", 1,
        "--judge", f"table:{tmp_path / 'table.csv'}", "--text", "text", "--label", "label", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)["scores"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        right = float((tuned(**encoded).logits.argmax(1).numpy() == labels).mean())
    (metric,) = [name for name in scores if "accuracy" in name]
    assert scores[metric]["tuned"] == pytest.approx(right)
    assert scores[metric]["treated"] == pytest.approx(right)
    assert scores[metric]["change"] == pytest.approx(0.0)
    assert scores[metric]["examples"] == 24


def test_no_whole_model_is_in_memory(tmp_path):
    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.linear.weight": torch.randn(128, 128, generator=g) for i in range(160)}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", {n: w + 0.01 * torch.randn(w.shape, generator=g) for n, w in base.items()})
    model = (tmp_path / "base").stat().st_size
    del base
    code = (
        "import resource, sys\n"
        "from specbasis.treatment.extract import extract\n"
        "import torch, transformers, specbasis.core.svd\n"
        "extract('base', 'tuned', 'warm', rank=1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "extract('base', 'tuned', 'out', energy=0.9)\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < model / 2


def test_cached_decompositions_give_the_same(berts, tmp_path):
    plain = extract(berts / "base", berts / "tuned", tmp_path / "plain", size="20kB")
    for name in ("first", "second"):
        cached = extract(berts / "base", berts / "tuned", tmp_path / name, size="20kB", cache=tmp_path / "cache")
        assert [line["rank"] for line in cached.matrices] == [line["rank"] for line in plain.matrices]
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "second"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-7)


def test_state_dicts_are_sources_too(tmp_path):
    base, tuned = bert_state(), finetuned(bert_state())
    assert specbasis.extract(base, tuned, tmp_path / "out", rank=2).matrices


def test_factors_that_their_format_cannot_hold_are_refused(tmp_path):
    base = {"layer.weight": torch.zeros(8, 6), "other.weight": torch.full((8, 6), 1e12)}
    tuned = base | {"layer.weight": 1e11 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(InputError, match="do not fit into float16"):
        extract(base, tuned, tmp_path / "out", rank=2, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_folder_that_a_command_runs_in_is_no_new_one(tmp_path, monkeypatch):
    state = bert_state(width=16)
    base, tuned = (
        write(tmp_path / "base.safetensors", state),
        write(tmp_path / "tuned.safetensors", finetuned(state)),
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "../empty", "/"):
        with pytest.raises(InputError, match=r"want a new one|exists already"):
            extract(base, tuned, out, rank=1)
