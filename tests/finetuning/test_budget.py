"""A budget of coefficients through the command: written, told, resumed, loaded, refused; without one, as ever."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import specbasis
from specbasis.adapter import folder
from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.finetuning.base import load_base
from specbasis.finetuning.methods import attach, load as load_method
from specbasis.finetuning.sources import load_task
from tests.finetuning import lab
from tests.finetuning.test_train import Kill, weights, without_dropout

SQUARES = 3 * 6 * 16**2  # of the three blocks of the pico base


def run(place, out, base="base", **options):
    options = {"epochs": 2, "learning_rate": 1e-2, "budget": 100, **options}
    return specbasis.finetune(place / base, "sst2", out=out, data_dir=place / "glue", **options)


def placed(folder):
    return json.loads((folder / "manifest.json").read_text())["coefficients"]


def test_the_command_spreads_the_budget_and_the_manifest_says_where(place, tmp_path):
    words = ["finetune", str(place / "base"), "--task", "sst2", "--budget", "0.2k", "--epochs", "4"]
    words += ["--learning-rate", "0.02", "--data-dir", str(place / "glue"), "--out", str(tmp_path / "run")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    assert "200 coefficients in " in " ".join(ran.output.split())
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["config"]["placement"]["budget"] == "0.2k"
    assert manifest["config"]["placement"]["basis_examples"] == 64
    assert json.loads((tmp_path / "run/metrics.json").read_text())["parameters"]["adapter"] == 200
    rows = manifest["coefficients"]
    assert sum(row["coefficients"] for row in rows) == 200
    assert sum(row["gradient"] for row in rows) == pytest.approx(1)
    assert len(folder.verify(tmp_path / "run", place / "base")) == sum(row["coefficients"] > 0 for row in rows)
    saved = load_file(tmp_path / "run/adapter_model.safetensors")
    for row in rows:
        name = f"base_model.model.{row['module']}.spectral_M"
        assert (saved[name].numel() if name in saved else 0) == row["coefficients"]
    lab.assert_predicts_as_written(tmp_path / "run", place / "glue")
    again = CliRunner().invoke(app, [*words, "--placement", "uniform"])
    assert "holds another run" in str(again.exception), "another placement is another run"


def test_the_gradient_the_control_and_the_gradients_basis_choose_differently(place, tmp_path):
    found = {}
    for name, options in {
        "gradient": {},
        "uniform": {"placement": "uniform"},
        "basis": {"basis": "gradient"},
        "part": {"blocks": [-1], "rank": 6, "method": "lora-xs"},
        "share": {"budget": "1%"},
    }.items():
        run(place, tmp_path / name, epochs=1, **options)
        found[name] = {row["module"]: row for row in placed(tmp_path / name) if row["coefficients"]}
        total = sum(row["coefficients"] for row in found[name].values())
        assert total == 100 or name == "share"

    def held(name):
        return sum(row["energy"] * row["gradient"] for row in found[name].values())

    assert held("gradient") > 3 * held("uniform")
    assert held("basis") > held("gradient")
    assert all(row["interval"][0] == 0 for row in found["basis"].values()), "leading squares"
    assert all("layer.2." in module and row["interval"][1] <= 6 for module, row in found["part"].items())
    base = load_base(place / "base", load_task("sst2", data_dir=place / "glue").task).model
    share = sum(row["coefficients"] for row in found["share"].values())
    assert share == round(sum(p.numel() for p in base.parameters()) / 100)


@pytest.mark.parametrize("basis", ["pretrained", "gradient"])
def test_a_killed_run_goes_on_at_the_same_positions(place, tmp_path, basis):
    run(place, tmp_path / "whole", basis=basis)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", basis=basis, callbacks=[Kill()])
    run(place, tmp_path / "cut", basis=basis)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6, msg=name)
    assert placed(tmp_path / "whole") == placed(tmp_path / "cut")


def test_a_checkpoint_of_other_positions_is_not_gone_on_with(place, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", callbacks=[Kill()])
    (file,) = (tmp_path / "cut").glob("checkpoints/checkpoint-*/trained.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "spectral_positions" in name)
    tensors[name] = (tensors[name] + 1) % 16
    save_file(tensors, file)
    with pytest.raises(InputError, match="at other positions than this machine's gradient chooses now"):
        run(place, tmp_path / "cut")


def test_the_cached_prefix_changes_time_not_what_is_learned(place, tmp_path):
    if not (place / "still").exists():
        without_dropout(place, place / "still")
    found = [
        run(place, tmp_path / name, base="still", blocks=[2], cache_prefix=cache)
        for name, cache in (("plain", None), ("cached", tmp_path / "cache"))
    ]
    assert "layer.2" in found[1].metrics["prefix_cache"]["before"]
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "cached")
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_method_that_was_loaded_can_be_saved_again(place, tmp_path):
    run(place, tmp_path / "run")
    task = load_task("sst2", data_dir=place / "glue").task
    loaded = load_method(tmp_path / "run", load_base(place / "base", task).model)
    assert loaded.request.budget == 100
    loaded.save(tmp_path / "again")
    first, second = (load_file(tmp_path / f"{name}/adapter_model.safetensors") for name in ("run", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_without_a_budget_the_method_stands_where_the_paper_puts_it(place, tmp_path):
    task = load_task("sst2", data_dir=place / "glue").task
    attached = attach(load_base(place / "base", task).model, "spectral")
    layers = attached.model.base_model.spectral_layers()
    assert sorted({name.split(".")[3] for name in layers}) == ["1", "2"]
    assert all(".intermediate." in name or "output.dense" in name for name in layers)
    assert attached.counts.adapter == 4 * attached.request.rank**2
    run(place, tmp_path / "run", budget=None, epochs=1)
    assert "coefficients" not in json.loads((tmp_path / "run/manifest.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "many"}, "got 'many'; want a number, such as 60000, 60k or 1.5M, or a share, such as 0.1%"),
        ({"budget": 0}, "got 0, which is 0 of .*; want at least 1"),
        ({"budget": -5}, "got -5; want a number"),
        ({"budget": "0.0001%"}, "got '0.0001%', which is 0 of"),
        (
            {"budget": SQUARES + 1},
            f"a budget of {SQUARES + 1:,} coefficients; the adapted matrices have {SQUARES:,} on",
        ),
        ({"budget": None, "placement": "uniform"}, "got placement = 'uniform' without a budget"),
        ({"placement": "random"}, "got placement = 'random'; want one of gradient, uniform"),
        ({"method": "lora"}, "got budget = 100; lora takes rank only"),
        ({"method": "psoft"}, "got budget = 100; psoft takes rank only"),
        ({"rank": 99}, "got rank = 99"),
    ],
)
def test_what_cannot_be_gets_one_clear_line(place, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as refused:
        run(place, tmp_path / "run", **options)
    assert "\n" not in str(refused.value)
