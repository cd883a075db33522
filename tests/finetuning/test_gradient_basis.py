"""A finetune in the basis of the gradient, through the command: written, resumed, cached, loaded, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import specbasis
from specbasis.adapter import folder
from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.finetuning.base import load_base
from specbasis.finetuning.methods import attach
from specbasis.finetuning.sources import load_task
from tests.finetuning import lab
from tests.finetuning.test_train import Kill, weights, without_dropout


def run(place, out, task="sst2", base="base", **options):
    options = {"epochs": 2, "learning_rate": 1e-2, "rank": 2, "basis": "gradient", **options}
    return specbasis.finetune(place / base, task, out=out, data_dir=place / "glue", **options)


def bases(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "spectral_U" in name or "spectral_Vh" in name}


def test_the_command_writes_a_proven_adapter_and_says_what_made_its_basis(place, tmp_path):
    words = ["finetune", str(place / "base"), "--task", "sst2", "--method", "spectral", "--basis", "gradient"]
    words += ["--rank", "2", "--epochs", "4", "--learning-rate", "0.02", "--data-dir", str(place / "glue")]
    words += ["--out", str(tmp_path / "run"), "--seed", "7"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())["config"]
    assert manifest["placement"]["basis"] == "gradient"
    assert manifest["placement"]["basis_examples"] == 64, "all of train, which is shorter than the default"
    assert manifest["seed"] == 7
    assert json.loads((tmp_path / "run/metrics.json").read_text())["parameters"]["adapter"] == 4 * 2 * 2
    assert {row["basis"] for row in folder.verify(tmp_path / "run", place / "base")} == {"stored with the adapter"}
    lab.assert_predicts_as_written(tmp_path / "run", place / "glue")
    again = CliRunner().invoke(app, [*words, "--basis-examples", "32"])
    assert "holds another run" in str(again.exception), "another basis is another run"


def test_seed_and_number_of_examples_decide_the_basis_and_the_task_does(place, tmp_path):
    runs = {
        "first": {"basis_examples": 16},
        "again": {"basis_examples": 16},
        "seed": {"basis_examples": 16, "seed": 1},
        "more": {"basis_examples": 48},
        "task": {"basis_examples": 16, "task": "stsb"},
    }
    found = {}
    for name, options in runs.items():
        run(place, tmp_path / name, epochs=1, **options)
        found[name] = bases(tmp_path / name)
    for name, tensor in found["first"].items():
        assert torch.equal(tensor, found["again"][name])
        assert not any(torch.allclose(tensor, found[other][name], atol=1e-3) for other in ("seed", "more", "task"))


def test_a_killed_run_goes_on_in_the_basis_that_it_began_in(place, tmp_path):
    run(place, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", callbacks=[Kill()])
    run(place, tmp_path / "cut")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6, msg=name)


def test_the_cached_prefix_changes_time_not_what_is_learned(place, tmp_path):
    if not (place / "still").exists():
        without_dropout(place, place / "still")
    found = [
        run(place, tmp_path / name, base="still", blocks=[2], cache_prefix=cache)
        for name, cache in (("plain", None), ("cached", tmp_path / "cache"))
    ]
    assert "layer.2.intermediate" in found[1].metrics["prefix_cache"]["before"]
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "cached")
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_basis_fits_every_method_with_a_core_and_no_other(place):
    task = load_task("sst2", data_dir=place / "glue").task

    def attached(method, **options):
        return attach(load_base(place / "base", task).model, method, rank=2, **options)

    xs = attached("lora-xs", basis="gradient").model.peft_config["default"]
    assert (xs.basis, xs.scale) == ("gradient", "sigma")
    assert attached("spectral", basis="random", seed=3).model.peft_config["default"].basis == "random:3"
    for method in ("lora", "psoft", "svft", "houlsby", "full"):
        with pytest.raises(InputError, match=f"{method} has no option 'basis'"):
            attach(load_base(place / "base", task).model, method, basis="gradient")


def test_wrong_words_get_one_clear_line(place, tmp_path):
    with pytest.raises(InputError, match="got basis = 'gradients'; want one of"):
        run(place, tmp_path / "run", basis="gradients")
    with pytest.raises(InputError, match="got basis_examples = 8 with basis = 'random'; want basis = 'gradient'"):
        run(place, tmp_path / "run", basis="random", basis_examples=8)
    with pytest.raises(InputError, match="got 1 examples of one class"):
        run(place, tmp_path / "one", basis_examples=1)
