"""What a finetune says of itself, and that its predictions lead back to the user's rows."""

import csv
import json

import pytest

from specbasis import compare, decompose
from specbasis.cli import main
from specbasis.core.errors import InputError
from specbasis.finetuning.runs import finetune
from tests.finetuning.lab import pico_bert, sentiment


def cli(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["specbasis", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture
def table(tmp_path):
    """A table with two thirds of one class, in which every row is another text."""
    rows = [(f"{text} {'a ' * i}", label) for i, (text, label) in enumerate(sentiment(30)) if label or i % 4]
    for suffix in ("csv", "jsonl"):
        with (tmp_path / f"reviews.{suffix}").open("w", newline="") as file:
            if suffix == "csv":
                csv.writer(file).writerows([("words", "mood"), *rows])
            else:
                file.writelines(json.dumps({"words": text, "mood": str(label)}) + "\n" for text, label in rows)
    return tmp_path, rows


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predictions_name_the_rows_of_the_users_file(table, suffix):
    place, _ = table
    base, file = pico_bert(place / "base"), place / f"reviews.{suffix}"
    run = finetune(base, file, "probe", out=place / "run", text=("words",), label="mood", epochs=1)
    lines = file.read_text().splitlines()
    with (run.folder / "predictions.csv").open(newline="") as told:
        predictions = list(csv.DictReader(told))
    assert predictions
    for prediction in predictions:
        line = lines[int(prediction["row"]) - 1]  # as an editor counts them
        stored = json.loads(line)["mood"] if suffix == "jsonl" else line.rpartition(",")[2]
        assert stored == prediction["label"]
    assert len({prediction["row"] for prediction in predictions}) == len(predictions)


def test_a_finetune_says_where_it_is_what_it_must_beat_and_what_it_did(table, monkeypatch, capsys):
    place, _ = table
    base = pico_bert(place / "base", masked_lm=True)
    words = (
        "--task",
        place / "reviews.csv",
        "--text",
        "words",
        "--label",
        "mood",
        "--out",
        place / "run",
        "--dev",
        place / "reviews.csv",
    )
    command = ("finetune", base, *words, "--method", "probe", "--epochs", 3, "--learning-rate", 1e-9)
    assert cli(monkeypatch, *command) == 0
    told = capsys.readouterr()
    epochs = [line for line in told.err.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert epochs[0].startswith("epoch 1 of 3: loss 0.")
    assert all(line.endswith(" left") for line in epochs)
    assert "0:00:00 left" in epochs[-1]
    with (place / "run" / "predictions.csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    most = max(labels.count(label) for label in labels) / len(labels)
    assert f"(most frequent label: {most:.4f})" in told.out
    assert "training loss by epoch: 0." in told.out
    assert "Loss on held-back text (masked-lm" in told.out
    assert "note: dev: the model predicts the same for every example" in told.out
    assert cli(monkeypatch, *command) == 0  # finished, it says the same again
    assert f"(most frequent label: {most:.4f})" in capsys.readouterr().out


def test_values_show_a_few_lines_of_themselves(table, tmp_path):
    import torch

    from specbasis.checkpoint import open_checkpoint
    from tests.pico import bert_state, finetuned

    state = bert_state(width=24)
    comparison = compare(state, [finetuned(state, seed=seed) for seed in range(6)], ranks=2)
    place, _ = table
    base = pico_bert(place / "base")
    run = finetune(base, place / "reviews.csv", "probe", out=place / "run", text=("words",), label="mood", epochs=1)
    values = (decompose(torch.randn(40, 30)), comparison, comparison.results, open_checkpoint(state), run)
    for value in values:
        shown = repr(value)
        assert type(value).__name__ in shown
        assert shown.count("\n") <= 4
        assert max(map(len, shown.splitlines())) <= 110
        assert "tensor(" not in shown
    assert "float64 40×30" in repr(values[0])


def test_data_that_cannot_be_had_stop_a_grid_before_its_first_run(tmp_path, monkeypatch, capsys):
    base = pico_bert(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    from specbasis.finetuning import train

    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a run began"))
    words = ("--base", base, "--tasks", "sst2,rte", "--data-dir", tmp_path / "empty", "--out", tmp_path / "out")
    assert cli(monkeypatch, "reproduce", "table1", *words) == 2
    told = capsys.readouterr()
    assert "holds no folder SST-2" in told.err
    assert len([line for line in told.err.splitlines() if "error" in line]) == 1


def test_data_that_cannot_be_had_stop_interventions_before_anything_is_decomposed(tmp_path, monkeypatch):
    from specbasis import Subject, intervene
    from specbasis.interventions.evaluators import judge
    from specbasis.interventions.stage import Setting

    base = str(pico_bert(tmp_path / "base"))
    monkeypatch.setattr(Setting, "decompose_all", lambda *_: pytest.fail("it decomposed"))
    subject = Subject(base, judge("glue:sst2", data_dir=str(tmp_path)))
    with pytest.raises(InputError, match="holds no folder SST-2"):
        intervene(base, {"a": subject}, tmp_path / "out")


def test_a_figure_of_scores_names_the_flag(tmp_path):
    from specbasis.paper.figures import reproduce
    from tests.pico import bert_state, finetuned

    state = bert_state()
    with pytest.raises(InputError, match="--scores FILE"):
        reproduce("fig18", [compare(state, finetuned(state), ranks=2)], tmp_path)


def test_what_befell_every_matrix_is_one_line(tmp_path, monkeypatch, capsys):
    from tests.pico import bert_state, finetuned, write

    state = bert_state()
    tuned = finetuned(state)
    for name in list(tuned)[:8]:
        if tuned[name].ndim == 2:
            tuned[name] = tuned[name] * float("nan")
    base, broken = write(tmp_path / "b.safetensors", state), write(tmp_path / "t.safetensors", tuned)
    assert cli(monkeypatch, "compare", base, broken, "--ranks", 2, "--no-report", "--out", tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "; the same of " in errors[0]
    assert "NaN" in errors[0]
