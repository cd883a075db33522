"""What `finetune` leaves is a model wherever a model is taken, and stays the model that was trained."""

import json
import shutil

import pytest
import torch

from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.cli import main
from specbasis.core.errors import InputError
from specbasis.finetuning.runs import finetune, load, merge
from tests.finetuning.lab import glue, pico_bert

TEXTS = ["the film is good", "a very dull song is not great"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A base, GLUE, and runs by methods of several formats."""
    place = tmp_path_factory.mktemp("product")
    base, data = pico_bert(place / "base"), glue(place / "glue")
    for method, task, rank in (("spectral", "sst2", 4), ("lora", "mnli", 2), ("bitfit", "sst2", None)):
        finetune(base, task, method, out=place / method, data_dir=data, epochs=3, learning_rate=1e-2, rank=rank)
    return place


def logits(model, processor):
    with torch.no_grad():
        return model.eval()(**processor(TEXTS, padding=True, return_tensors="pt")).logits


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["specbasis", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def in_plain_transformers(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("method", ["spectral", "lora", "bitfit"])
def test_a_merged_run_is_the_trained_model_with_its_labels(lab, tmp_path, capfd, method):
    capfd.readouterr()
    merge(lab / method, tmp_path / "whole")
    assert "MISSING" not in "".join(capfd.readouterr())  # the report of weights that the adapter brings
    model, processor = in_plain_transformers(tmp_path / "whole")
    assert torch.allclose(logits(model, processor), logits(*load(lab / method)), atol=1e-5)
    assert model.config.num_labels == (3 if method == "lora" else 2)
    assert ("neutral" in model.config.label2id) == (method == "lora")
    with pytest.raises(InputError, match="exists already"):
        merge(lab / method, tmp_path / "whole")


@pytest.mark.parametrize("method", ["spectral", "lora"])
def test_an_adapter_alone_is_the_model_on_the_base_that_it_names(lab, method):
    alone, beside = open_checkpoint(lab / method), open_tuned(lab / method, open_checkpoint(lab / "base"))
    assert list(alone) == list(beside)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert any(beside.delta_factors(name) for name in beside)
    assert not any(
        alone.delta_factors(name) for name in alone
    )  # they would be added to whatever it is compared with


def test_an_adapter_with_another_head_than_its_base_says_how_many_labels(lab, tmp_path):
    shutil.copytree(lab / "lora", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()  # as PEFT alone leaves it
    assert len(open_checkpoint(tmp_path / "bare").config["id2label"]) == 3


def test_an_edited_run_is_a_model_and_not_an_adapter(lab, tmp_path, monkeypatch):
    out = tmp_path / "edited"
    assert run(monkeypatch, "edit", lab / "base", lab / "lora", "--kind", "swap", "--ranks", 2, "--out", out) == 0
    assert not (out / "adapter_config.json").exists()
    model, processor = in_plain_transformers(out)
    stored = open_checkpoint(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name.removeprefix("bert.")])
    assert not torch.allclose(logits(model, processor), logits(*load(lab / "lora")), atol=1e-4)


@pytest.mark.parametrize("method", ["spectral", "lora"])
def test_a_run_can_be_intervened_on(lab, tmp_path, monkeypatch, capsys, method):
    task = json.loads((lab / method / "manifest.json").read_text())["config"]["task"]
    subject = f"glue:{task}={lab / method}"
    words = (
        "--data-dir",
        lab / "glue",
        "--ranks",
        2,
        "--seeds",
        0,
        "--roles",
        "ffn",
        "--no-report",
        "--out",
        tmp_path,
    )
    assert run(monkeypatch, "intervene", lab / "base", subject, *words) == 0, capsys.readouterr()
    score = json.loads((lab / method / "metrics.json").read_text())["score"]
    assert (
        f"accuracy {score:.4f}; its change" in capsys.readouterr().out
    )  # unedited, it is the model that was trained


@pytest.mark.parametrize("verb", ["inspect", "spectra", "lineage", "compare"])
def test_verbs_of_models_take_a_run(lab, tmp_path, monkeypatch, capsys, verb):
    words = {
        "lineage": (lab / "base", lab / "lora"),
        "compare": (lab / "spectral", lab / "lora", "--out", tmp_path / "c", "--no-report"),
    }
    assert run(monkeypatch, verb, *words.get(verb, (lab / "lora",))) == 0, capsys.readouterr()


def test_a_finetune_of_a_finetune_stands_on_both(lab, tmp_path):
    again = finetune(
        lab / "spectral", "rte", "spectral", out=tmp_path / "again", data_dir=lab / "glue", epochs=1, rank=4
    )
    first, second, base = (
        open_checkpoint(lab / "spectral"),
        open_checkpoint(again.folder),
        open_checkpoint(lab / "base"),
    )
    name = next(name for name in base if first[name].ndim == 2 and not torch.equal(first[name], base[name]))
    step, whole = second[name] - first[name], second[name] - base[name]
    assert 0 < step.norm() < whole.norm()
    assert torch.equal(open_tuned(again.folder, first)[name], second[name])
    assert logits(*load(again.folder)).shape == (2, 2)


def test_what_no_verb_can_read_is_refused_with_the_verb_that_helps(lab):
    with pytest.raises(InputError, match="specbasis adapter merge"):
        open_checkpoint(lab / "bitfit")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "does not name its base"),
        ("/gone/base", "its base /gone/base is not there"),
        ("SELF", "is an adapter itself"),
    ],
)
def test_a_base_that_is_not_there_is_said(lab, tmp_path, name, said):
    place = tmp_path / "adapter"
    shutil.copytree(lab / "lora", place)
    config = json.loads((place / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(place) if name == "SELF" else name
    (place / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        open_checkpoint(place)


def test_a_base_that_has_moved_can_be_said(lab, tmp_path, monkeypatch, capsys):
    shutil.copytree(lab / "lora", tmp_path / "adapter")
    shutil.copytree(lab / "base", tmp_path / "moved")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/x"})
    )
    assert run(monkeypatch, "inspect", tmp_path / "adapter") == 2
    assert "its base /x is not there" in capsys.readouterr().err
    assert run(monkeypatch, "inspect", tmp_path / "adapter", "--base", tmp_path / "moved") == 0


def test_a_bare_name_is_pointed_to_the_hub():
    with pytest.raises(InputError, match="write hub:bert-base-uncased"):
        open_checkpoint("bert-base-uncased")
