"""An extracted LoRA that is trained on: plain PEFT is the reader of what comes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.core.errors import InputError
from specbasis.finetuning import load_task
from specbasis.treatment.extract import extract

from ..pico import bert_state, write
from .models import bert, pair, peft, transformers

WORDS = [f"w{i}" for i in range(59)]
CLASSES = ("a", "b", "c")


def table(path, seed, classes=CLASSES, n=96):
    """Texts of which half the words say their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(classes), n)
    texts = [" ".join([*[WORDS[label]] * 3, *rng.choice(WORDS, 3)]) for label in labels]
    lines = [f"{text},{classes[label]}" for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return texts, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ and tuned/ with a tokenizer, and tables to train on and to judge by."""
    folder = tmp_path_factory.mktemp("heal")
    pair(folder, bert)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    for name in ("base", "tuned"):
        tokenizer.save_pretrained(folder / name)
    table(folder / "train.csv", 0)
    return folder


def weights(path):
    return path / "adapter_model.safetensors"


def test_at_a_rate_of_zero_the_folder_stays_what_it_was(folder, tmp_path):
    plain = extract(folder / "base", folder / "tuned", tmp_path / "plain", rank=2)
    task = load_task(folder / "train.csv", text=("text",), label="label")
    healed = extract(
        folder / "base", folder / "tuned", tmp_path / "out", rank=2, heal=task, steps=3, learning_rate=0.0
    )
    first, second = (load_file(weights(tmp_path / name)) for name in ("plain", "out"))
    assert first.keys() <= second.keys()  # with one bias PEFT stores all
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert healed.matrices == plain.matrices
    with safe_open(weights(tmp_path / "plain"), "pt") as a, safe_open(weights(tmp_path / "out"), "pt") as b:
        assert a.metadata()["base_sha256"] == b.metadata()["base_sha256"]


def test_it_learns_and_plain_peft_says_the_scores_that_the_record_has(folder, tmp_path):
    texts, labels = table(tmp_path / "judged.csv", 1)
    done = CliRunner().invoke(
        app,
        [
            "extract", str(folder / "base"), str(folder / "tuned"), "--out", str(tmp_path / "out"), "--rank", "4",
            "--judge", f"table:{tmp_path / 'judged.csv'}", "--heal", f"table:{folder / 'train.csv'}",
            "--text", "text", "--label", "label", "--steps", "120", "--learning-rate", "0.02", "--json",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    first, last = record["healed"]["loss"]
    assert last < first - 0.2
    base = transformers.BertForSequenceClassification.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    (metric,) = [name for name in record["scores"] if "accuracy" in name and "healed" in name]
    assert record["scores"][metric]["treated"] == pytest.approx((logits.argmax(1).numpy() == labels).mean())
    before = record["scores"][metric.removesuffix(", healed")]
    assert record["scores"][metric]["treated"] > before["treated"] + 0.1
    assert record["scores"][metric]["tuned"] == before["tuned"]


def test_what_cannot_be_healed_is_refused_in_one_line_and_leaves_nothing(folder, tmp_path):
    task = load_task(folder / "train.csv", text=("text",), label="label")
    table(tmp_path / "two.csv", 0, classes=("a", "b"))
    two = load_task(tmp_path / "two.csv", text=("text",), label="label")
    write(tmp_path / "bare.safetensors", bert_state())
    places = (folder / "base", folder / "tuned", tmp_path / "out")
    with pytest.raises(InputError, match="want --as lora"):
        extract(*places, form="delta", heal=task)
    with pytest.raises(InputError, match="no head for"):
        extract(*places, rank=2, heal=two, steps=1)
    with pytest.raises(InputError, match=r"config\.json"):
        extract(tmp_path / "bare.safetensors", folder / "tuned", tmp_path / "out", rank=2, heal=task)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.safetensors", "two.csv"]


@pytest.mark.parametrize("given", ["sst2", "images:x", "glue:nonsense", "table:none.csv", "SAME"])
def test_a_task_that_is_none_to_train_on_is_refused_before_the_work(folder, tmp_path, given):
    same = f"table:{folder / 'train.csv'}"
    words = ["--judge", same, "--heal", same if given == "SAME" else given, "--text", "text", "--label", "label"]
    places = [str(folder / "base"), str(folder / "tuned"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["extract", *places, *words])
    assert isinstance(done.exception, InputError), done.output
    assert not (tmp_path / "out").exists()
