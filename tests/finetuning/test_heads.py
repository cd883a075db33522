"""A head on the mean of the states: against a naive transcription, through the command, saved, merged, refused."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import specbasis
from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.finetuning import load
from specbasis.finetuning.base import load_base
from specbasis.finetuning.runs import merge
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import GLUE, Task
from tests.finetuning.test_train import without_dropout


def run(place, out, task="sst2", base="base", **options):
    options = {"epochs": 1, "learning_rate": 1e-2, "head": "mean", "data_dir": place / "glue", **options}
    return specbasis.finetune(place / base, task, out=out, **options)


def mean_of(place, text):
    """A text alone through transformers' own model, its states averaged one by one."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    states = AutoModel.from_pretrained(place).eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return sum(states) / len(states)


@pytest.mark.parametrize("task", ["sst2", "stsb", "mnli"])
def test_it_is_the_formula_whatever_stands_in_the_same_batch(place, task):
    torch.manual_seed(3)
    base = load_base(place / "base", GLUE[task], head="mean")
    split = load_task(task, data_dir=place / "glue").train.take([0, 3, 6, 7])  # of unequal lengths
    batch = base.collator()(base.encode(split))
    with torch.no_grad():
        found = base.model.eval()(**batch)
        rows = []
        for texts in split.inputs:
            u, *v = (mean_of(place / "base", text) for text in texts)
            rows.append(torch.cat([u, v[0], (u - v[0]).abs(), u * v[0]]) if v else u)
        wanted = F.linear(torch.stack(rows), base.model.mean_head.weight, base.model.mean_head.bias)
    torch.testing.assert_close(found.logits, wanted, rtol=1e-5, atol=1e-6)
    labels = torch.tensor(split.labels)
    loss = F.mse_loss(wanted[:, 0], labels) if task == "stsb" else F.cross_entropy(wanted, labels.long())
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)


def test_the_encoder_is_called_as_below_transformers_own_head(place):
    ours = load_base(place / "base", GLUE["sst2"], head="mean").model
    theirs = AutoModelForSequenceClassification.from_pretrained(place / "base")
    names = {name for name, _ in theirs.named_parameters() if not name.startswith(("bert.pooler", "classifier"))}
    assert {name for name, _ in ours.named_parameters()} == names | {"mean_head.weight", "mean_head.bias"}


@pytest.mark.parametrize("method", ["spectral", "lora", "full", "houlsby", "pfeiffer", "probe"])
@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_what_a_run_loads_as_predicts_what_it_wrote(place, tmp_path, method, task):
    run(place, tmp_path / "run", task, method=method)
    model, _ = load(tmp_path / "run")
    dev = load_task(task, data_dir=place / "glue").dev["dev"]
    base = load_base(place / "base", GLUE[task], head="mean")
    with torch.no_grad():
        logits = model(**base.collator()(base.encode(dev))).logits
    said = [line.split(",")[-1] for line in (tmp_path / "run/predictions.csv").read_text().splitlines()[1:]]
    if task == "stsb":
        torch.testing.assert_close(logits[:, 0], torch.tensor(list(map(float, said))), rtol=1e-4, atol=1e-5)
    else:
        assert [str(k) for k in logits.argmax(1).tolist()] == said
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert "a head on the mean of the last states" in card
    assert "or with PEFT" not in card, "PEFT alone would lose the head"
    if method == "lora":
        specbasis.card(tmp_path / "run")
        assert "PeftModel" not in (tmp_path / "run/README.md").read_text(encoding="utf-8")


def test_a_merged_run_is_the_encoder_for_transformers_and_its_head_is_read_again(place, tmp_path):
    run(place, tmp_path / "run", "stsb")
    merge(tmp_path / "run", tmp_path / "merged")
    model, processor = load(tmp_path / "run")
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == ["BertModel"]
    encoder = AutoModel.from_pretrained(tmp_path / "merged").eval()
    inputs = processor(["the film is good .", "a book"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(encoder(**inputs)[0], model.get_base_model().base_model(**inputs)[0])
        again = type(model.get_base_model()).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1)
    assert not torch.equal(own.classifier.weight, again.mean_head.weight[:, :16]), "no head on another state"


def test_the_cached_prefix_changes_nothing_and_pairs_do_without(place, tmp_path):
    without_dropout(place, tmp_path / "still")
    plain = run(tmp_path, tmp_path / "plain", base="still", blocks=[2], epochs=2, data_dir=place / "glue")
    cached = run(
        tmp_path, tmp_path / "cached", base="still", blocks=[2], epochs=2, data_dir=place / "glue",
        cache_prefix=tmp_path / "cache",
    )  # fmt: skip
    assert cached.metrics["prefix_cache"] is not None
    assert cached.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], abs=2e-6)
    pairs = run(place, tmp_path / "pairs", "stsb", blocks=[2], cache_prefix=tmp_path / "cache")
    assert pairs.metrics["prefix_cache"] is None
    assert any("two rows of a batch" in note for note in pairs.metrics["notes"])


def test_pairs_take_a_gradient_basis_a_budget_and_batches_by_length(place, tmp_path):
    done = run(place, tmp_path / "run", "mrpc", basis="gradient", budget=20, group_by_length=True)
    assert done.metrics["parameters"]["adapter"] == 20


def test_the_command_takes_it_for_tables_of_two_texts_and_a_folder_remembers(place, tmp_path):
    rows = ["one,two,label"] + [f"the film is {word},a book,{word}" for word in ("good", "bad") * 12]
    (tmp_path / "own.csv").write_text("\n".join(rows) + "\n")
    words = ["finetune", place / "base", "--task", tmp_path / "own.csv", "--text", "one,two", "--label", "label"]
    words += ["--head", "mean", "--epochs", "1", "--out", tmp_path / "run"]
    ran = CliRunner().invoke(app, list(map(str, words)))
    assert ran.exit_code == 0, ran.output
    config = json.loads((tmp_path / "run/manifest.json").read_text())["config"]
    assert (config["protocol"]["head"], config["head"]["pair"]) == ("mean", True)
    assert load(tmp_path / "run")[0].get_base_model().mean_head.in_features == 4 * 16
    words[words.index("mean")] = "first"
    assert "holds another run" in str(CliRunner().invoke(app, list(map(str, words))).exception)
    words[words.index("first")] = "last"
    assert "want one of first, mean" in str(CliRunner().invoke(app, list(map(str, words))).exception)


def test_folders_of_the_usual_head_say_what_those_of_versions_before_say(place, tmp_path):
    run(place, tmp_path / "run", head="first")
    config = json.loads((tmp_path / "run/manifest.json").read_text())["config"]
    assert "head" not in config["protocol"]
    assert "pair" not in config["head"]


def test_images_and_decoders_are_refused(place, tmp_path):
    from transformers import BartConfig, BartModel

    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartModel(BartConfig(vocab_size=26, d_model=8, **small, **heads)).save_pretrained(tmp_path / "bart")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "bart")
    with pytest.raises(InputError, match="got a mean head on an encoder with a decoder; want an encoder"):
        load_base(tmp_path / "bart", GLUE["sst2"], head="mean")
    with pytest.raises(InputError, match="got a mean head for Photos; want a task of texts"):
        load_base(place / "base", Task("photos", "Photos", ("accuracy",), ("a", "b"), images=True), head="mean")
