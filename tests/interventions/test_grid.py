"""Grids on models on disk: rows, controls, failures that are marked, resuming; files, figures, command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from specbasis import Edit, InputError, Subject, decompose, edited, intervene, open_checkpoint
from specbasis.cli import app
from specbasis.core.edits import replace
from specbasis.core.statistics import correlation
from specbasis.figures.interventions import PLOTS, lines, write_figures
from specbasis.interventions import grid as grids, read_grid
from specbasis.interventions.sharing import overlaps, sharing
from specbasis.interventions.stored import RECORD, write_edited
from specbasis.jobs.cache import Cache
from tests.interventions.models import bert_pair, bits
from tests.pico import bert_state, finetuned, write


class Pico(nn.Module):
    """The pico encoder's weights as a module; what it computes depends on every feed-forward matrix."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor.clone(), requires_grad=False))

    def state_dict(self, *args, **kwargs):
        return {name.replace("/", "."): p for name, p in self.named_parameters()}

    def forward(self, x):
        w = self.state_dict()
        for b in range(2):
            x = x + torch.tanh(x @ w[f"encoder.layer.{b}.intermediate.dense.weight"].T) @ (
                w[f"encoder.layer.{b}.output.dense.weight"].T
            )
        return x


def load(source):
    return Pico(dict(open_checkpoint(source)))


X = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))


class Closeness:
    """How near the outputs are to those of the unedited model: one score an example."""

    metric = "closeness"

    def __init__(self, source):
        self.target = load(source)(X)

    def __call__(self, model):
        return {"closeness": -(model(X) - self.target).norm(dim=1), "constant": 1.0}


@pytest.fixture
def models(tmp_path):
    state = bert_state()
    sources = {"base": write(tmp_path / "base.safetensors", state)}
    for number, label in enumerate(("one", "two"), start=1):
        sources[label] = write(tmp_path / f"{label}.safetensors", finetuned(state, 0.3, number))
    return {label: str(path) for label, path in sources.items()}


def run(models, out, *, evaluate=None, **options):
    subjects = {
        label: Subject(models[label], evaluate or Closeness(models[label]), load) for label in ("one", "two")
    }
    options = {"roles": ("ffn",), "ranks": (1, 4, "all"), "seeds": 2, "resamples": 50} | options
    return intervene(models["base"], subjects, out, cache=str(out) + "-cache", **options)


def test_a_grid_has_its_controls_and_says_what_a_hand_made_edit_says(models, tmp_path):
    rows = run(models, tmp_path / "out")
    assert all(row.error is None for row in rows)
    kinds = {row.experiment["kind"] for row in rows}
    assert kinds == {"none", "swap", "random_complement", "random", "zero"}
    # 2 models: unedited; 3 sets of ranks × (2 sources + 2 draws of 2 random kinds + zero)
    assert len(rows) == 2 * (1 + 3 * (2 + 4 + 1))
    row = next(r for r in rows if r.experiment.get("source") == "two" and r.experiment["ranks"] == 4)
    model = load(models["one"])
    for b in range(2):
        for part in ("intermediate", "output"):
            name = f"encoder.layer.{b}.{part}.dense.weight"
            T, O = model.state_dict()[name], open_checkpoint(models["two"])[name]  # noqa: E741
            T.copy_(replace(T, decompose(T), decompose(O), 4))
    expected = Closeness(models["one"])(model)["closeness"].double()
    assert row.values["closeness"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert row.values["closeness.low"] <= row.values["closeness"] <= row.values["closeness.high"]
    assert row.values["closeness.change"] == pytest.approx(row.values["closeness"])
    assert row.values["matrices"] == 4
    assert 0 < row.values["size"] < 1
    assert {row.values["constant.change"] for row in rows} == {0}


def test_a_grid_resumes_and_its_models_are_decomposed_once(models, tmp_path, monkeypatch):
    calls = []
    real = Cache.decompose
    monkeypatch.setattr(
        "specbasis.jobs.cache.decompose",
        lambda W, ranks, name: calls.append(name) or decompose(W, ranks, name=name),
    )
    first = run(models, tmp_path / "out", ranks=(1,))
    assert len(calls) == 3 * 4
    monkeypatch.setattr(grids, "run_experiment", lambda *a: pytest.fail("a finished experiment ran again"))
    assert [row.experiment for row in run(models, tmp_path / "out", ranks=(1,))] == [
        row.experiment for row in first
    ]
    assert len(calls) == 3 * 4
    assert Cache.decompose is real


def test_workers_side_by_side_give_the_same_rows(models, tmp_path):
    options = {"ranks": (1, "all"), "seeds": 1}
    alone = run(models, tmp_path / "alone", **options)
    together = run(models, tmp_path / "together", workers=2, **options)
    assert all(row.error is None for row in together)
    seconds = ("edit_seconds", "evaluate_seconds", "summarise_seconds")
    values = [
        [{k: v for k, v in row.values.items() if k not in seconds} for row in rows] for rows in (alone, together)
    ]
    assert [row.experiment for row in alone] == [row.experiment for row in together]
    assert values[0] == values[1]


def test_an_evaluator_that_fails_marks_its_cells_and_the_grid_goes_on(models, tmp_path):
    calls = []

    def evaluate(model):
        calls.append(bits(model))
        if len(calls) == 4:
            raise RuntimeError("no memory\nlong story")
        return {"m": torch.full((5,), float("nan") if len(calls) == 6 else 0.5)}

    rows = run(models, tmp_path / "out", evaluate=evaluate, ranks=(2,))
    errors = [row.error for row in rows if row.error]
    assert errors[0] == "RuntimeError: no memory"
    assert "metric 'm': 5 of 5 values of the evaluator are NaN or Inf" in errors[1]
    assert len(errors) == 2
    assert not grids.STAGES
    again = run(models, tmp_path / "out", evaluate=evaluate, ranks=(2,))
    assert all(row.error is None for row in again)
    # Once for each model, and once for each cell that had failed.
    assert len(calls) == len(rows) + 1 + 2


def test_a_model_that_cannot_be_judged_unedited_fails_its_own_cells_only(models, tmp_path):
    good = Closeness(models["two"])
    seen = []

    def evaluate(model):
        seen.append(1)
        if torch.equal(model(X), load(models["one"])(X)):
            raise ValueError("broken head")
        return {"closeness": good(model)["closeness"]}

    rows = run(models, tmp_path / "out", evaluate=evaluate, ranks=(2,))
    failed = [row for row in rows if row.error]
    assert {row.experiment["tuned"] for row in failed} == {"one"}
    assert "one unedited: ValueError: broken head" in failed[-1].error
    assert len(failed) == len(rows) / 2


def test_ctrl_c_in_a_cell_leaves_rows_and_the_next_call_continues(models, tmp_path):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"m": torch.ones(4)}

    before = {label: open_checkpoint(path) for label, path in models.items()}
    stored = {label: {n: t.clone() for n, t in c.items()} for label, c in before.items()}
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out", evaluate=evaluate, ranks=(2,))
    assert not grids.STAGES
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 3
    assert all(row.error is None for row in run(models, tmp_path / "out", evaluate=evaluate, ranks=(2,)))
    for label, path in models.items():
        assert all(torch.equal(t, stored[label][n]) for n, t in open_checkpoint(path).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ["three"]}, "no source 'three'; there is: base, one, two"),
        ({"kinds": ("turn",)}, "got kind = 'turn'"),
        ({"blocks": ("5-2",)}, "got blocks '5-2'"),
        ({"blocks": ("7",)}, "no matrix to edit"),
        ({"roles": ("legs",)}, "no role legs"),
    ],
)
def test_a_bad_grid_is_refused_before_any_work(models, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(models, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sharing_is_one_for_nearly_equal_models_and_goes_with_overlap(models, tmp_path):
    twin = write(tmp_path / "twin.safetensors", finetuned(dict(open_checkpoint(models["one"])), 1e-4, 9))
    subjects = {
        "one": Subject(models["one"], Closeness(models["one"]), load),
        "twin": Subject(str(twin), Closeness(str(twin)), load),
    }
    out = tmp_path / "out"
    intervene(models["base"], subjects, out, kinds=("swap",), ranks=(2, 6), roles=("ffn",), seeds=2, resamples=200)
    rows, metrics = read_grid(out)
    assert metrics == {"one": "closeness", "twin": "closeness"}
    places = {"base": models["base"], "one": models["one"], "twin": str(twin)}
    known = overlaps(places, ["ffn"], [2, 6, "all"])
    table = sharing(rows, metrics, overlaps=known)
    by_pair = {(row.tuned, row.source, row.ranks): row for row in table}
    assert len(table) == 2 * 2 * 2
    for k in (2, 6):
        assert by_pair["one", "twin", k].index == pytest.approx(1, abs=0.01)
        assert by_pair["one", "twin", k].overlap == pytest.approx(1, abs=0.01)
        from_base = by_pair["one", "base", k]
        assert from_base.low <= from_base.index <= from_base.high < 1
        assert from_base.chance < from_base.overlap < 1
        assert from_base.chance == pytest.approx((k / 12 + k / 48) / 2)
    columns = np.array([(row.overlap, row.index) for row in table], float)
    assert correlation(*columns.T) > 0.5


def test_every_figure_comes_from_rows_alone(models, tmp_path):
    out = tmp_path / "out"
    run(models, out, ranks=(1, 4, -4), roles=("ffn", "attention"), kinds=("swap",), seeds=1, resamples=20)
    cache = str(out) + "-cache"
    names = ("fig15", "fig17", "sharing")
    written = write_figures(out, names, models=models, cache=cache)
    assert {path.name for path in written} == {f"{name}.{form}" for name in names for form in ("png", "svg")} | {
        "sharing.csv"
    }
    assert all(path.stat().st_size > 200 for path in written)
    sharing_table = (out / "sharing.csv").read_text()
    assert len(sharing_table.splitlines()) == 1 + 2 * 2 * 2 * 2
    # Without the models, the overlaps that were kept are used.
    assert (out / "sharing.csv") in write_figures(out, ["sharing"])
    assert (out / "sharing.csv").read_text() == sharing_table
    rows, metrics = read_grid(out)
    shown = {name: lines(rows, "one", "ffn", metrics["one"], PLOTS[name]) for name in ("fig12", "fig13", "fig17")}
    assert [line.name for line in shown["fig12"]] == ["vectors of base", "random vectors", "zero"]
    assert [line.name for line in shown["fig13"]] == ["vectors of two", "random vectors", "zero"]
    assert {line.name: line.x for line in shown["fig17"]} == {
        "leading ranks masked": (1, 4), "trailing ranks masked": (4,)
    }  # fmt: skip
    bottom = next(r for r in rows if r.experiment["tuned"] == "one" and r.experiment.get("ranks") == -4)
    assert shown["fig17"][1].y == (bottom.values["closeness"],)
    with pytest.raises(InputError, match="no model 'three'"):
        write_figures(out, ["fig12"], only=["three"])
    done = CliRunner().invoke(app, ["reproduce", "fig17", str(out), "--out", str(tmp_path / "figures")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figures/fig17.png").read_bytes() == (out / "figures/fig17.png").read_bytes()


# --- edited checkpoints -------------------------------------------------------------------------------------------


def test_an_edited_checkpoint_is_what_the_live_edit_is_and_transformers_loads_it(tmp_path):
    from transformers import BertForSequenceClassification

    base, one, two = bert_pair(tmp_path)
    (one / "vocab.txt").write_text("[PAD]\n")
    (one / "evil.py").write_text("raise SystemExit\n")
    arguments = [str(base), str(one), "--out", str(tmp_path / "new"), "--ranks", "3", "--from", str(two)]
    done = CliRunner().invoke(app, ["edit", *arguments, "--roles", "ffn", "--sides", "left"])
    assert done.exit_code == 0, done.output
    model = BertForSequenceClassification.from_pretrained(one)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "new")
    from specbasis.architecture.selection import Selection
    from specbasis.interventions import matrix_edits
    from specbasis.interventions.live import state

    edit = Edit("swap", 3, sides="left")
    admits = Selection(("ffn",)).filter
    with edited(model, matrix_edits(edit, state(model), open_checkpoint(two), admits=admits)):
        assert bits(model) == bits(loaded)
    assert bits(model) != bits(loaded)
    record = json.loads((tmp_path / "new" / RECORD).read_text())
    assert len(record["matrices"]) == 4
    assert record["edit"]["kind"] == "swap"
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", RECORD
    }  # fmt: skip
    again = CliRunner().invoke(app, ["edit", *arguments])
    assert again.exit_code != 0
    assert "exists already" in str(again.exception)


def test_shards_are_written_one_tensor_at_a_time_and_nothing_is_left_of_a_failure(tmp_path, models):
    out = write_edited(models["base"], models["one"], Edit("zero", 2), tmp_path / "new", shard_bytes=4000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    together = {}
    for shard in shards:
        part = load_file(out / shard)
        assert {index["weight_map"][name] for name in part} == {shard}
        together |= part
    original = open_checkpoint(models["one"])
    assert list(open_checkpoint(out)) == list(together) or set(open_checkpoint(out)) == set(original)
    name = "encoder.layer.0.output.dense.weight"
    s = decompose(original[name])
    atol = 1e-6 * float(s.S[0])
    torch.testing.assert_close(decompose(together[name]).S[:-2], s.S[2:], rtol=0, atol=atol)
    assert torch.equal(together["embeddings.LayerNorm.weight"], original["embeddings.LayerNorm.weight"])

    def fail(progress):
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_edited(models["base"], models["one"], Edit("zero", 2), tmp_path / "other", progress=fail)
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


def test_a_written_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(4),
        "c": torch.randn(2).half(),
        "é": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    from specbasis.checkpoint.writer import write_model

    out = write_model(open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "out", lambda _, tensor: tensor)
    read = load_file(out / "model.safetensors")
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert np.all([read[name].shape == tensor.shape for name, tensor in tensors.items()])


def test_subjects_on_the_command_line_are_told_apart(tmp_path):
    for text, message in (("nothing", "want TASK=TUNED"), ("sport:run=x", "want one of glue:")):
        done = CliRunner().invoke(app, ["intervene", "base", text, "--out", str(tmp_path / "o")])
        assert message in str(done.exception)
