"""`extract --as spectral`: torch's SVD of the base is the oracle, PEFT with the adapter registered the reader."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbasis import open_checkpoint
from specbasis.adapter import folder as adapters
from specbasis.checkpoint import open_tuned
from specbasis.core.errors import InputError
from specbasis.treatment.extract import extract

from .models import assert_same_function, bert, function, gpt2, llama, pair, peft, shaken, vit

WEIGHTS = "adapter_model.safetensors"
TARGETS = {
    "gpt2": ["c_fc", "c_proj"],
    "llama": ["up_proj", "down_proj", "q_proj"],
    "bert": ["query", "output.dense"],
}


def trained(folder, make, targets, rank=5):
    """A base on disk and, merged, a spectral adapter of it with random coefficients; returns both."""
    from specbasis.adapter import SpectralConfig

    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    base = type(make()).from_pretrained(folder / "base")
    adapted = peft.get_peft_model(
        type(base).from_pretrained(folder / "base"), SpectralConfig(rank=rank, target_modules=targets)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "spectral_M" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "tuned")
    return base, merged


def by_peft(base, folder):
    """What PEFT, with the adapter registered, makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(tie|tied|does not bring).*")
        return function(peft.PeftModel.from_pretrained(base, folder))


@pytest.mark.parametrize(("name", "make"), [("llama", llama), ("gpt2", gpt2), ("bert", bert)])
def test_a_finetune_that_was_trained_as_one_is_extracted_back(name, make, tmp_path):
    base, merged = trained(tmp_path, make, TARGETS[name])
    extraction = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral", rank=5)
    was, now = (load_file(tmp_path / folder / WEIGHTS) for folder in ("adapter", "out"))
    cores = [key for key in was if key.endswith("spectral_M")]
    assert cores
    assert sorted(cores) == sorted(key for key in now if key.endswith("spectral_M"))
    weights = open_checkpoint(tmp_path / "base")
    size = max(float(weights[name].abs().max()) for name in weights)
    for key in cores:  # signs are free: of two bases that prove the same sketches, products are equal
        signs = [
            (was[key.replace("_M", f"_sketch_{s}")] * now[key.replace("_M", f"_sketch_{s}")]).sum(1).sign()
            for s in "UV"
        ]
        again = signs[0][:, None] * now[key] * signs[1]
        # Merging rounds each entry of W to float32; 16 columns of them are summed.
        assert float((again - was[key]).abs().max()) <= 2**-24 * size * 16
    assert all(line["share"] >= 1 - 1e-9 and line["share"] > line["share_of_lora"] for line in extraction.matrices)
    assert not extraction.record["notes"]
    before = function(base)
    assert_same_function(by_peft(base, tmp_path / "out"), function(merged), before)
    read = open_tuned(tmp_path / "out", weights)
    for name, tensor in open_checkpoint(tmp_path / "tuned").items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=2**-22 * size)
    assert all(row["interval"] == (0, 5) for row in adapters.verify(tmp_path / "out", tmp_path / "base"))


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"energy": 0.5}, {"size": "30kB"}, {"size": "60kB", "max_rank": 3}]
)
def test_a_core_is_the_projection_of_the_update_on_the_bases_leading_vectors(options, tmp_path):
    pair(tmp_path, llama)
    extraction = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral", **options)
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    read, held, total = open_tuned(tmp_path / "out", base), 0.0, 0.0
    for line in extraction.matrices:
        W, k = base[line["name"]].double(), line["rank"]
        delta = tuned[line["name"]].double() - W
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        core = U[:, :k] @ (U[:, :k].mT @ delta @ Vh[:k].mT) @ Vh[:k]
        torch.testing.assert_close(read[line["name"]].double() - W, core, rtol=1e-4, atol=1e-7)
        share = float(core.square().sum() / delta.square().sum())
        assert line["share"] == pytest.approx(share, abs=1e-6)
        assert line["chance"] == pytest.approx(k**2 / delta.numel())
        rank = line["bytes"] // (4 * sum(delta.shape))  # a LoRA of as many bytes
        squares = torch.linalg.svdvals(delta).square()
        assert line["share_of_lora"] == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-6)
        held, total = held + share * float(delta.square().sum()), total + float(delta.square().sum())
        assert k <= options.get("max_rank", k)
    size = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != extraction.RECORD)
    assert size == extraction.record["total"]["bytes"]
    if "size" in options:
        assert size <= int(options["size"].removesuffix("kB")) * 1000
    if "energy" in options:
        assert held / total >= options["energy"]
    if options.get("rank") == 4:
        assert any(
            "a core is for finetunes that were trained as one" in note for note in extraction.record["notes"]
        )


def test_what_no_core_can_hold_is_carried_or_listed(tmp_path):
    base, tuned = pair(tmp_path, bert, only="LayerNorm", size=0.5)
    with pytest.raises(InputError, match="no linear layer of it differs"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral")
    shaken(tuned, only="bias").save_pretrained(tmp_path / "tuned")
    with pytest.raises(InputError, match="no linear layer of it differs"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral")
    shaken(tuned, only="weight").save_pretrained(tmp_path / "tuned")
    biased = shaken(shaken(tuned, only="weight"), only="attention.self.query.bias")
    biased.save_pretrained(tmp_path / "tuned")
    extraction = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral", energy=1.0)
    left = {item["name"]: item["reason"] for item in extraction.record["left_out"]}
    assert set(left) == {f"bert.encoder.layer.{i}.attention.self.query.bias" for i in (0, 1)}
    assert all("bias of an adapted layer" in reason for reason in left.values())
    carried = {item["name"] for item in extraction.record["carried"]}
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= carried
    by_peft(base, tmp_path / "out")  # it loads, with heads, tables and norms


@pytest.mark.filterwarnings("ignore")
def test_a_vision_model_whose_modules_have_other_names_in_memory(tmp_path):
    base, tuned = pair(tmp_path, vit, only="q_proj.weight", size=0.3)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral", energy=1.0)
    before = function(base)
    assert_same_function(function(peft.PeftModel.from_pretrained(base, tmp_path / "out")), function(tuned), before)


def test_another_base_or_another_core_is_refused(tmp_path):
    trained(tmp_path, llama, TARGETS["llama"])
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral", rank=5)
    torch.manual_seed(9)
    llama().save_pretrained(tmp_path / "other")
    other = open_tuned(tmp_path / "out", open_checkpoint(tmp_path / "other"))
    with pytest.raises(InputError, match="not those that the adapter was trained in"):
        dict(other)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    key = next(key for key in stored if key.endswith("spectral_M"))
    stored[key] += 1
    save_file(stored, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds other numbers than were saved"):
        open_tuned(tmp_path / "out", open_checkpoint(tmp_path / "base"))


def test_cores_end_where_the_bases_vectors_are_not_determined(tmp_path):
    from safetensors.torch import load_file as load

    pair(tmp_path, llama)
    name = "model.layers.0.mlp.up_proj.weight"
    for which in ("base", "tuned"):
        path = tmp_path / which / "model.safetensors"
        state = load(path)
        if which == "base":
            U, S, Vh = torch.linalg.svd(state[name].double(), full_matrices=False)
            S[3] = S[4]  # two equal values
            state[name] = ((U * S) @ Vh).float()
            moved = state[name]
        else:
            state[name] = moved + 0.01 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
        save_file(state, path, metadata={"format": "pt"})
    extraction = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", form="spectral", rank=6)
    ranks = {line["name"]: line["rank"] for line in extraction.matrices}
    assert ranks[name] in (3, 6)  # float32 rounding parts them by chance; then they are determined
    assert set(ranks.values()) <= {3, 6}
    json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    dict(open_tuned(tmp_path / "out", open_checkpoint(tmp_path / "base")))
