"""Adapter folders: what info says, what verify refuses, and that merge and export are the adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from specbasis.adapter import SpectralConfig, diagnostics, folder  # noqa: E402
from specbasis.checkpoint import open_checkpoint, open_tuned  # noqa: E402
from specbasis.cli import app  # noqa: E402
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import TARGETS, load_classifier, randomise, save_deberta  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(48).reshape(4, 12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a trained adapter with and without its basis, and the adapted model's logits."""
    place = tmp_path_factory.mktemp("models")
    base = save_deberta(place / "base")
    torch.manual_seed(1)
    loaded = load_classifier(base)
    state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for save_basis in (True, False):
        model = load_classifier(base)
        model.load_state_dict(state)
        config = SpectralConfig(
            rank=10,
            target_modules=TARGETS,
            blocks_to_transform=[1, 2],
            task_type="SEQ_CLS",
            save_basis=save_basis,
            interval_pattern={r"layer\.2\.output\.dense": (3, 8)},
            scale="sigma",
        )
        model = get_peft_model(model, config).eval()
        randomise(model, std=0.4)
        model.save_pretrained(place / ("with" if save_basis else "without"))
    with torch.no_grad():
        return place, model(IDS).logits


def run_plain(code: str, *arguments: object) -> torch.Tensor:
    """Run code in a process that must not import specbasis; it prints logits as JSON."""
    code += "\nimport sys, json\nassert not any(m.startswith('specbasis') for m in sys.modules)"
    code += "\nprint('#', json.dumps(y.tolist()))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.split("#")[-1]))


LOAD = """
import sys, torch, transformers
load = transformers.AutoModelForSequenceClassification.from_pretrained
base, *loras, dense = sys.argv[1:]
models = [load(dense)]
import peft
for lora in loras:
    torch.manual_seed(7)
    models.append(peft.PeftModel.from_pretrained(load(base, num_labels=3), lora))
with torch.no_grad(): y = torch.stack([m.eval()(torch.arange(48).reshape(4, 12)).logits for m in models])
"""


def test_exported_loras_in_plain_peft_and_a_merged_model_in_plain_transformers(models, tmp_path):
    place, wanted = models
    loras = [folder.export_lora(place / kind, tmp_path / kind, base=place / "base") for kind in ("with", "without")]
    dense = folder.merge(place / "without", tmp_path / "dense", base=place / "base")
    for logits in run_plain(LOAD, place / "base", *loras, dense):
        assert torch.allclose(logits, wanted, atol=1e-5)
    for out in loras:
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["r"] == 10
        assert list(config["rank_pattern"].values()) == [5]


@pytest.mark.parametrize("write", [folder.merge, folder.export_lora])
def test_what_is_there_is_never_written_over(models, tmp_path, write):
    place, _ = models
    out = tmp_path / "model"
    shutil.copytree(place / "base", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write(place / "with", out, base=out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("kind", ["with", "without"])
def test_a_base_of_the_same_shape_that_is_another_is_refused_wherever_the_adapter_is_read(models, tmp_path, kind):
    place, _ = models
    other = save_deberta(tmp_path / "other", seed=99)
    tuned = open_tuned(place / kind, open_checkpoint(other))
    name = next(name for name, entry in tuned.entries.items() if entry.factors)
    with pytest.raises(InputError, match="load the base that the adapter was trained on"):
        tuned[name]
    done = CliRunner().invoke(app, ["compare", str(other), str(place / kind), "--no-report"])
    assert isinstance(done.exception, InputError), done.output
    assert "No problems found" not in done.output


def test_a_base_without_the_adapted_modules_is_refused_in_one_line(models, tmp_path):
    place, _ = models
    tensors = {n: t for n, t in load_file(place / "base" / "model.safetensors").items() if "layer.2" not in n}
    shallow = tmp_path / "shallow"
    shutil.copytree(place / "base", shallow)
    save_file(tensors, shallow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layer\.2"):
        folder.merge(place / "with", tmp_path / "out", base=shallow)
    assert not (tmp_path / "out").exists()


def test_truncated_export_is_the_best_of_its_rank(models, tmp_path):
    place, _ = models
    shares = folder.kept_shares(place / "with", 3)
    out = folder.export_lora(place / "with", tmp_path / "lora", rank=3)
    tensors = load_file(out / "adapter_model.safetensors")
    full = load_file(folder.export_lora(place / "with", tmp_path / "full") / "adapter_model.safetensors")
    for name in full:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            dense, cut = (
                full[other].double() @ full[name].double(),
                tensors[other].double() @ tensors[name].double(),
            )
            S = torch.linalg.svdvals(dense)
            assert tensors[name].shape[0] == 3
            assert float((dense - cut).norm()) == pytest.approx(float(S[3:].norm()), rel=1e-4)
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert shares.pop(module) == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-4)
    assert not shares


def test_exported_convolutions_and_conv1d(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.square = transformers.pytorch_utils.Conv1D(8, 8)
            self.wide = transformers.pytorch_utils.Conv1D(20, 8)

        def forward(self, x):
            return self.wide(self.square(self.conv(x).mean((2, 3))))

    base = Net()
    save_file({k: v.contiguous() for k, v in base.state_dict().items()}, tmp_path / "base.safetensors")
    x = torch.randn(2, 4, 6, 6)
    for save_basis in (True, False):
        model = get_peft_model(
            Net(), SpectralConfig(rank=5, target_modules=["conv", "square", "wide"], save_basis=save_basis)
        ).eval()
        randomise(model, std=0.5)
        model.save_pretrained(tmp_path / "a")
        out = folder.export_lora(tmp_path / "a", tmp_path / f"lora{save_basis}", base=tmp_path / "base.safetensors")
        lora = peft.PeftModel.from_pretrained(Net(), out)
        assert torch.allclose(lora(x), model(x), atol=1e-5)


def test_a_base_whose_names_change_in_loading(tmp_path):
    """transformers renames the parameters of a ViT on their way from the file: values tell which is which."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    assert not any("mlp.fc1" in name for name in load_file(tmp_path / "base" / "model.safetensors"))

    def load(folder):
        return transformers.ViTForImageClassification.from_pretrained(folder).eval()

    targets = ["fc1", "fc2", "projection"]
    model = get_peft_model(
        load(tmp_path / "base"), SpectralConfig(rank=5, target_modules=targets, save_basis=False)
    )
    randomise(model.eval(), std=0.4)
    model.save_pretrained(tmp_path / "adapter")
    x = torch.randn(2, 3, 8, 8)
    assert len(folder.verify(tmp_path / "adapter", tmp_path / "base")) == 5
    folder.export_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")
    folder.merge(tmp_path / "adapter", tmp_path / "dense", base=tmp_path / "base")
    wanted = model(x).logits
    assert torch.allclose(
        peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora")(x).logits, wanted, atol=1e-5
    )
    assert torch.allclose(load(tmp_path / "dense")(x).logits, wanted, atol=1e-5)


def test_verify(models, tmp_path):
    place, _ = models
    assert {row["basis"] for row in folder.verify(place / "with", place / "base")} == {"stored with the adapter"}
    assert {row["basis"] for row in folder.verify(place / "without")} == {"decomposed again, every vector equal"}
    other = save_deberta(tmp_path / "other", seed=5)
    for kind in ("with", "without"):
        with pytest.raises(InputError, match="load the base that the adapter was trained on"):
            folder.verify(place / kind, other)


def test_info(models):
    place, _ = models
    found = folder.info(place / "with")
    assert found["adapter_parameters"] == 3 * 100 + 25
    assert found["head_parameters"] == 32 * 32 + 32 + 3 * 32 + 3
    row = found["layers"][-1]
    assert row["module"] == "deberta.encoder.layer.2.output.dense"
    assert row["interval"] == (3, 8)
    assert row["weight"] == "32 × 64 float32"
    assert row["drift"] > 0
    json.dumps(found)


def test_diagnosis_is_the_svd_of_the_merged_weight():
    from specbasis.adapter import SpectralLinear
    from specbasis.core.svd import decompose
    from tests.adapter.helpers import linear

    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}), std=0.05)
    found = diagnostics.diagnose(layer.core("default"), layer.spectral_S["default"])
    before, after = decompose(base.weight.detach()), decompose(layer.merged_weight(["default"]))
    assert torch.allclose(found.S, after.S[:5], atol=1e-5)
    assert torch.allclose(found.left, (before.U * after.U).sum(0).abs()[:5], atol=1e-4)
    assert torch.allclose(found.right, (before.Vh * after.Vh).sum(1).abs()[:5], atol=1e-4)
    assert found.condition == pytest.approx(float(after.S[0] / after.S[4]), rel=1e-4)


@pytest.mark.parametrize("damage", ["none", "config", "kind", "tensors", "truncated", "proof"])
def test_bad_folders_get_one_line(models, tmp_path, damage):
    place, _ = models
    bad = tmp_path / "bad"
    if damage != "none":
        bad.mkdir()
        config = json.loads((place / "with" / "adapter_config.json").read_text())
        tensors = load_file(place / "with" / "adapter_model.safetensors")
        if damage == "kind":
            config["peft_type"] = "LORA"
        if damage == "tensors":
            tensors = {"x": torch.zeros(2)}
        if damage == "proof":
            tensors = {k: v for k, v in tensors.items() if "sketch_V" not in k}
        (bad / "adapter_config.json").write_text("{" if damage == "config" else json.dumps(config))
        save_file(tensors, bad / "adapter_model.safetensors")
        if damage == "truncated":
            file = bad / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
    for call in (folder.info, folder.verify, lambda path: folder.export_lora(path, tmp_path / "out")):
        with pytest.raises(InputError) as error:
            call(bad)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
