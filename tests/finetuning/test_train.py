"""A finetune end to end on a pico model: the folder, the figures, resuming, and what is refused."""

import csv
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
from transformers import TrainerCallback

import specbasis
from specbasis.checkpoint import weights_sha256
from specbasis.cli import main
from specbasis.core.errors import InputError
from specbasis.finetuning import load, train
from specbasis.finetuning.base import load_base
from specbasis.finetuning.forgetting import pretraining_loss
from specbasis.finetuning.sources import load_task
from tests.finetuning import lab


def run(place, out, method="spectral", task="sst2", **options):
    options = {"epochs": 2, "learning_rate": 3e-3, "rank": None, **options}
    return specbasis.finetune(place / "base", task, method, out=out, data_dir=place / "glue", **options)


def weights(folder):
    """Every tensor that the run saved."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found
    return found


def test_a_run_learns_and_leaves_everything_that_it_promises(place, tmp_path):
    found = run(place, tmp_path / "run", "lora", epochs=6, learning_rate=2e-2)
    assert found.score == 1.0  # one word decides
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics == found.metrics
    assert metrics["dev"] == {"accuracy": 1.0}
    assert metrics["parameters"]["adapter"] == 3 * 8 * (4 * 32 + 2 * 48)
    assert metrics["parameters"]["head"] == 2 * 16 + 2
    assert metrics["steps"] == 6 * 4
    assert metrics["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "run").glob("*.safetensors"))
    assert metrics["seconds_per_epoch"] > 0
    assert metrics["peak_memory_bytes"] > 0
    assert metrics["forgetting"]["definition"] == "contrastive-halves"
    assert metrics["forgetting"]["text"] == "premises of RTE's dev set"
    assert metrics["forgetting"]["after"] != metrics["forgetting"]["before"]
    assert not (tmp_path / "run/checkpoints").exists()
    with (tmp_path / "run/predictions.csv").open(newline="") as file:
        said = list(csv.DictReader(file))
    dev = load_task("sst2", data_dir=place / "glue").dev["dev"]
    assert [int(line["example"]) for line in said] == list(range(len(dev)))
    assert [int(line["label"]) for line in said] == dev.labels  # in the order of the file
    assert all(line["predicted"] == line["label"] and line["set"] == "dev" for line in said)
    card = (tmp_path / "run/README.md").read_text()
    assert "# SST-2" in card
    assert "| dev | 1.0000 |" in card
    assert "model = PeftModel.from_pretrained(base" in card
    assert "num_labels=2" in card
    assert "More Information Needed" not in card
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["config"]["protocol"]["batch_size"] == 16
    weights_of_base = (place / "base/model.safetensors").read_bytes()
    assert manifest["config"]["base_sha256"] == hashlib.sha256(weights_of_base).hexdigest()
    for package in ("torch", "transformers", "peft", "tokenizers", "accelerate", "datasets", "scikit-learn"):
        assert manifest["environment"]["versions"][package] == version(package)

    model, tokenizer = load(tmp_path / "run")
    data = load_task("sst2", data_dir=place / "glue").dev["dev"]
    batch = tokenizer([text for (text,) in data.inputs], padding=True, return_tensors="pt")
    with torch.inference_mode():
        assert model(**batch).logits.argmax(-1).tolist() == [int(label) for label in data.labels]

    assert (
        run(place, tmp_path / "run", "lora", epochs=6, learning_rate=2e-2).metrics == metrics
    )  # done: read, not trained
    changed = (tmp_path / "run/metrics.json").read_text().replace('"accuracy": 1.0', '"accuracy": 0.5')
    (tmp_path / "run/metrics.json").write_text(changed)
    with pytest.raises(InputError, match=r"metrics\.json: is not what was written"):
        run(place, tmp_path / "run", "lora", epochs=6, learning_rate=2e-2)


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_other_kinds_of_task_are_scored_by_their_metrics(task, place, tmp_path):
    metrics = run(place, tmp_path / "run", "bitfit", task, epochs=1).metrics
    names = {"stsb": {"pearson", "spearman"}, "mnli": {"accuracy"}}[task]
    for name in ("matched", "mismatched") if task == "mnli" else ("dev",):
        assert set(metrics[name]) == names
    assert metrics["score"] == pytest.approx(sum(metrics[name].values()) / len(names))


def test_a_base_that_changed_between_hashing_and_loading_is_not_trained(place, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)

    def hashed(checkpoint):
        digest = weights_sha256(checkpoint)
        file = base / "model.safetensors"
        file.write_bytes(file.read_bytes())
        return digest

    monkeypatch.setattr("specbasis.finetuning.runs.weights_sha256", hashed)
    with pytest.raises(InputError, match=r"model\.safetensors: changed while it was being read"):
        specbasis.finetune(base, "sst2", "lora", out=tmp_path / "run", data_dir=place / "glue", epochs=1)
    assert not (tmp_path / "run/metrics.json").exists()


class Kill(TrainerCallback):
    """Stops a run as a signal would: by an exception, right after the first epoch is on disk."""

    def on_save(self, args, state, control, **kwargs):
        if state.epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["spectral", "full"])
def test_a_killed_run_goes_on_and_ends_where_an_undisturbed_one_does(method, place, tmp_path):
    whole = run(place, tmp_path / "whole", method)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", method, callbacks=[Kill()])
    assert not (tmp_path / "cut/metrics.json").exists()
    (checkpoint,) = (tmp_path / "cut/checkpoints").iterdir()
    # A later checkpoint that the kill left incomplete is passed over.
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-999"))
    (checkpoint.with_name("checkpoint-999") / "trainer_state.json").write_text('{"epo')
    again = run(place, tmp_path / "cut", method)
    assert again.metrics["steps"] == whole.metrics["steps"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_finished_run_is_returned_and_another_one_refused(place, tmp_path):
    first = run(place, tmp_path / "run", epochs=1)
    before = (tmp_path / "run/metrics.json").stat().st_mtime_ns
    assert run(place, tmp_path / "run", epochs=1).metrics == first.metrics
    assert (tmp_path / "run/metrics.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds another run, made with seed \d+ \(now \d+\); "):
        run(place, tmp_path / "run", epochs=1, seed=1)


def without_dropout(place, base):
    """The same base, whose runs can be compared weight by weight."""
    shutil.copytree(place / "base", base)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_the_cached_prefix_changes_time_not_what_is_learned(place, tmp_path):
    base = without_dropout(place, tmp_path / "base")  # the cache turns it off below the cut
    found = [
        specbasis.finetune(
            base, "sst2", out=tmp_path / name, data_dir=place / "glue", blocks=[2], epochs=3, learning_rate=1e-2,
            rank=8, group_by_length=True, cache_prefix=cache,
        )
        for name, cache in (("plain", None), ("cached", tmp_path / "cache"))
    ]  # fmt: skip
    assert found[0].metrics["prefix_cache"] is None
    assert "layer.2.intermediate" in found[1].metrics["prefix_cache"]["before"]
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "cached")
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=1e-5, msg=name)


class Widths(TrainerCallback):
    """Notes at how many positions the last block's feed-forward layer runs."""

    def __init__(self):
        self.found = set()

    def on_train_begin(self, args, state, control, model, **kwargs):
        (layer,) = (m for name, m in model.named_modules() if name.endswith("layer.2.intermediate"))
        self.handle = layer.register_forward_hook(lambda _, inputs, __: self.found.add(inputs[0].shape[1]))

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_without_a_cache_the_last_block_runs_on_the_first_position_and_learns_the_same(
    method, place, tmp_path, monkeypatch
):
    base = without_dropout(place, tmp_path / "base")
    options = {"data_dir": place / "glue", "epochs": 1, "learning_rate": 1e-2}
    narrow, wide = Widths(), Widths()
    specbasis.finetune(base, "sst2", method, out=tmp_path / "narrow", callbacks=[narrow], **options)
    monkeypatch.setattr(train, "narrowed", nullcontext)
    specbasis.finetune(base, "sst2", method, out=tmp_path / "wide", callbacks=[wide], **options)
    assert narrow.found == {1}
    assert min(wide.found) > 1
    other = weights(tmp_path / "wide")
    for name, value in weights(tmp_path / "narrow").items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("error::FutureWarning")  # users see no warning about our own words
def test_where_there_is_no_frozen_prefix_the_run_says_why_and_goes_on(place, tmp_path):
    metrics = run(place, tmp_path / "run", "full", epochs=1, cache_prefix=tmp_path / "cache").metrics
    assert metrics["prefix_cache"] is None
    assert metrics["notes"][0].startswith("no prefix cache: ")


def test_gradient_checkpointing_learns_the_same_and_bf16_runs(place, tmp_path):
    plain, again = (
        run(place, tmp_path / f"{again}", "lora", epochs=1, gradient_checkpointing=again) for again in (False, True)
    )
    for name, value in weights(plain.folder).items():
        torch.testing.assert_close(weights(again.folder)[name], value, rtol=0, atol=1e-5, msg=name)
    assert run(place, tmp_path / "bf16", epochs=1, precision="bf16").metrics["train_loss"][0] < 1


def test_the_best_epoch_is_chosen_on_train_alone(place, tmp_path):
    metrics = run(place, tmp_path / "run", epochs=3, select="best").metrics
    assert metrics["train_examples"] == 58  # a tenth of 64 is held out
    assert set(metrics["selection"]) == {"accuracy"}


def test_a_users_table_is_a_task(place, tmp_path):
    body = "".join(f'"{text[:-2]}",{"yes" if label else "no"}\n' for text, label in lab.sentiment(40))
    (tmp_path / "own.csv").write_text(f"text,liked\n{body}", encoding="utf-8")
    found = specbasis.finetune(
        place / "base", tmp_path / "own.csv", "lora", out=tmp_path / "run", text=["text"], label="liked", epochs=20,
        learning_rate=1e-2,
    )  # fmt: skip
    assert found.score == 1.0
    model, _ = load(tmp_path / "run")
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert found.metrics["forgetting"]["text"] == "texts of own's dev set"


@pytest.mark.parametrize(("basis", "rank"), [(None, 8), ("gradient", 2)])
def test_a_folder_of_images_is_a_task(basis, rank, tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    size = {"height": 16, "width": 16}
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
                  patch_size=8)
    ).save_pretrained(tmp_path / "vit")  # fmt: skip
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "vit")
    for name, shade in (("dark", 20), ("light", 235)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (shade + i % 5,) * 3).save(tmp_path / "images" / name / f"{i}.png")
    found = specbasis.finetune(
        tmp_path / "vit",
        tmp_path / "images",
        out=tmp_path / "run",
        rank=rank,
        epochs=6,
        learning_rate=1e-2,
        basis=basis,
    )
    assert found.score == 1.0
    assert found.metrics["forgetting"]["definition"] == ""
    (tmp_path / "images/dark/0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"0\.png: not a readable image"):
        specbasis.finetune(tmp_path / "vit", tmp_path / "images", out=tmp_path / "other", epochs=1, rank=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "got method 'lorra'; want one of"),
        ({"epochs": -1}, "got epochs = -1; want a positive number"),
        ({"precision": "fp8"}, "got precision = 'fp8'; want one of float32, bf16, fp16"),
        ({"warm_up": 1}, "no option 'warm_up'; did you mean warmup\\?"),
        ({"rank": 400}, "got rank = 400; the smallest adapted matrix has 16 singular values"),
        ({"blocks": [9]}, r"got block \[9\]"),
        ({"seed": -1}, "got seed = -1; want a number in 0"),
        ({"max_length": 2}, "got max_length = 2; want more than 2"),
        ({"examples": 0}, "got examples = 0; want at least 1"),
        ({"learning_rate": math.nan}, "got learning_rate = nan; want a positive number"),
        ({"weight_decay": -1.0}, "got weight_decay = -1.0; want 0 or a positive number"),
        ({"report_to": "paper"}, "got report_to = 'paper'; want none, or what is installed"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message, place, tmp_path):
    with pytest.raises(InputError, match=message):
        run(place, tmp_path / "run", **{"epochs": 1, **options})


def test_a_run_that_failed_before_it_trained_gives_its_folder_to_the_next(place, tmp_path):
    with pytest.raises(InputError, match="got rank = 400"):
        run(place, tmp_path / "run", epochs=1, rank=400)
    assert run(place, tmp_path / "run", epochs=1, rank=4).metrics["steps"] == 4


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_training_that_diverged_has_a_score_and_says_so(place, tmp_path, task):
    found = run(place, tmp_path / "run", "full", task=task, epochs=1, learning_rate=1e30)
    assert math.isfinite(found.score)
    assert any(note.startswith("diverged: ") for note in found.metrics["notes"])
    for name in ("predictions.csv", "metrics.json"):
        assert "nan" not in (tmp_path / "run" / name).read_text().lower()


def test_a_base_without_its_tokenizer_or_with_damaged_weights_is_refused(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / "bare" / name).unlink()
    shutil.copytree(place / "base", tmp_path / "damaged")
    weights = tmp_path / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for base, message in (
        (tmp_path / "bare", "its tokenizer knows no words; are the tokenizer's files"),
        (tmp_path / "damaged", "truncated or corrupted safetensors file"),
        (tmp_path / "nowhere", "nowhere: no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            specbasis.finetune(base, "sst2", out=tmp_path / "run", data_dir=place / "glue", epochs=1)


def test_texts_are_cut_where_the_positions_of_the_base_end(tmp_path):
    import transformers

    task = load_task("sst2", data_dir=lab.glue(tmp_path / "glue")).task
    base = lab.pico_bert(tmp_path / "bert")
    assert load_base(base, task, max_length=500).max_length == 32
    transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=len(lab.WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, pad_token_id=1,
        )
    ).save_pretrained(tmp_path / "roberta")  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "roberta")
    loaded = load_base(tmp_path / "roberta", task, max_length=500)
    assert loaded.max_length == 30  # its positions count from behind the padding
    ids = torch.full((1, loaded.max_length), 5)
    assert loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def test_a_base_that_is_none_is_refused(place, tmp_path):
    (tmp_path / "weights").mkdir()
    shutil.copy(place / "base/model.safetensors", tmp_path / "weights")
    for base, message in (
        (tmp_path / "weights", r"holds no config\.json"),
        (place / "glue", "no weights in this folder"),
    ):
        with pytest.raises(InputError, match=message):
            specbasis.finetune(base, "sst2", out=tmp_path / "run", data_dir=place / "glue")


def test_a_folder_that_holds_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run(place, tmp_path)


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # of safetensors
        "[enforce fail at inline_container.cc:672] . unexpected pos 3923776 vs 3923664",  # of torch.save
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(message, place, tmp_path, monkeypatch):
    real = train.save_file

    def full(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(InputError, match="no space left on the disk; free some, and the same command goes on"):
        run(place, tmp_path / "run", epochs=1)
    monkeypatch.setattr(train, "save_file", real)
    assert run(place, tmp_path / "run", epochs=1).metrics["steps"] == 4


# --- forgetting -----------------------------------------------------------------------------------------------

TEXTS = [text.replace(' "', " .") for text, _ in lab.sentiment(40)]


def test_forgetting_is_the_masked_lm_loss_where_the_base_has_its_head(tmp_path):
    task = load_task("sst2", data_dir=lab.glue(tmp_path / "glue")).task
    base = load_base(lab.pico_bert(tmp_path / "mlm", masked_lm=True), task)
    loss = pretraining_loss(base, TEXTS)
    assert loss.definition == "masked-lm"
    before = loss.loss(base.model)
    assert before == pytest.approx(torch.log(torch.tensor(float(len(lab.WORDS)))).item(), rel=0.2)  # random weights
    assert loss.loss(base.model) == before
    with torch.no_grad():
        base.model.bert.encoder.layer[2].output.dense.weight.mul_(50)
    assert loss.loss(base.model) != before


def test_forgetting_of_a_sentence_encoder_is_near_chance_when_its_embeddings_say_nothing(tmp_path):
    task = load_task("sst2", data_dir=lab.glue(tmp_path / "glue")).task
    base = load_base(lab.pico_bert(tmp_path / "st", sentence_encoder=True), task)
    loss = pretraining_loss(base, [f"{text} {text}" for text in TEXTS])
    with torch.no_grad():
        for norm in (base.model.bert.encoder.layer[2].output.LayerNorm,):
            norm.weight.zero_()
            norm.bias.fill_(1.0)  # every token the same vector
    assert loss.loss(base.model) == pytest.approx(torch.log(torch.tensor(32.0)).item(), abs=1e-4)


def test_a_base_of_neither_kind_has_no_forgetting_and_says_why(tmp_path):
    task = load_task("sst2", data_dir=lab.glue(tmp_path / "glue")).task
    loss = pretraining_loss(load_base(lab.pico_bert(tmp_path / "plain"), task), TEXTS)
    assert loss.loss(torch.nn.Linear(1, 1)) is None
    assert "neither a language-model head nor the marks of a sentence encoder" in loss.reason


# --- as typed ---------------------------------------------------------------------------------------------------


def typed(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["specbasis", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, *capsys.readouterr()


def test_finetune_as_typed_runs_and_refuses_in_one_line(place, tmp_path, monkeypatch, capsys):
    words = ["finetune", place / "base", "--data-dir", place / "glue", "--epochs", 1]
    code, out, _ = typed(
        monkeypatch, capsys, *words, "--out", tmp_path / "run", "--task", "SST-2", "--interval", "2:8"
    )
    assert code == 0
    assert "dev: accuracy 0." in out
    assert "parameters: 144 method, 34 head and pooler" in out
    for wrong, message in (
        (["--task", "sst3"], "error: got task 'sst3'; want one of cola"),
        (["--task", "rte", "--interval", "8:2"], "error: --interval got '8:2'; want "),
        (["--task", "rte", "--label", "x"], "error: RTE names its own columns"),
    ):
        code, _, err = typed(monkeypatch, capsys, *words, "--out", tmp_path / "wrong", *wrong)
        assert code == 2
        assert err.startswith(message)
        assert err.strip().count("\n") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cached"), [("spectral", True), ("lora", False), ("full", False)])
def test_two_processes_train_as_one_with_the_double_batch(method, cached, place, tmp_path):
    words = ["finetune", place / "base", "--task", "sst2", "--data-dir", place / "glue", "--out", tmp_path / "run"]
    words += ["--method", method, "--epochs", 1, *(["--cache-prefix", tmp_path / "cache"] if cached else [])]
    # What the launcher starts on several GPUs; the variable makes the processes take the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, "-m", "specbasis", *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["steps"] == 2  # 64 examples, 2 × 16 a step
    assert metrics["train_loss"][0] == pytest.approx(0.693, abs=0.05)  # a mean, not a sum over the processes
    assert (metrics["prefix_cache"] is not None) is cached
    assert done.stdout.count("dev: accuracy") == 1
    # Every example of the dev set is scored once, whichever process had it.
    model, tokenizer = load(tmp_path / "run")
    dev = load_task("sst2", data_dir=place / "glue").dev["dev"]
    with torch.inference_mode():
        logits = model(**tokenizer([text for (text,) in dev.inputs], padding=True, return_tensors="pt")).logits
    right = (logits.argmax(-1) == torch.tensor(dev.labels).long()).float().mean()
    assert metrics["dev"]["accuracy"] == pytest.approx(float(right))
