"""Whole checkpoints: pico models on disk, merged, and read again."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import specbasis
from specbasis.cli import app
from specbasis.core.draws import rotated
from specbasis.core.errors import InputError
from specbasis.interventions.samples import Sample
from specbasis.treatment.finetunes import Finetunes
from specbasis.treatment.merge import Merging
from specbasis.treatment.methods import Delta, merged
from specbasis.treatment.options import DEFAULTS, MergeOptions
from tests.pico import bert_state, finetuned, write

QUERY = "encoder.layer.0.attention.self.query.weight"
BIAS = "encoder.layer.0.attention.self.query.bias"
WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture
def family(tmp_path):
    """A base in float64, so that an update is what was added, and three finetunes."""
    base = {name: value.double() for name, value in bert_state().items()}
    tuned = [finetuned(base, seed=seed, frozen="LayerNorm") for seed in (1, 2, 3)]
    paths = [write(tmp_path / name / "model.safetensors", s) for name, s in zip("abc", tuned, strict=True)]
    return write(tmp_path / "base" / "model.safetensors", base), [str(path.parent) for path in paths], base, tuned


def deltas(base, tuned, name):
    return [Delta(state[name].double() - base[name].double()) for state in tuned]


@pytest.mark.parametrize("method", [m for m in DEFAULTS if m != "dare"])
def test_every_matrix_is_what_the_method_makes_of_its_updates(family, tmp_path, method):
    base, paths, W, T = family
    merging = specbasis.merge(base, paths, tmp_path / "out", method=method)
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == W.keys()
    for name in W:
        if "LayerNorm" in name:
            assert torch.equal(written[name], W[name])  # as nobody changed it
            continue
        delta = merged(
            deltas(W, T, name), MergeOptions(method=method), torch.Generator(), is_matrix=W[name].ndim == 2
        )
        assert torch.allclose(written[name], W[name] + delta, atol=1e-12), name
        line = next(line for line in merging.record["parameters"] if line["name"] == name)
        with_first = next(pair for pair in line["pairs"] if pair["pair"] == ["a", "merged"])
        own = T[0][name] - W[name]
        assert line["norms"]["merged"] == pytest.approx(float(delta.norm()))
        assert with_first["cosine"] == pytest.approx(float((own * delta).sum() / own.norm() / delta.norm()))
    assert len(merging.record["parameters"]) == len(W) - 1
    assert Merging.load(tmp_path / "out").record == merging.record


def test_a_matrix_that_is_stored_in_out_is_merged_as_out_in(tmp_path):
    def state(seed):
        g = torch.Generator().manual_seed(seed)
        names = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
        matrices = {
            f"h.{i}.{name}.weight": torch.randn(shape, generator=g, dtype=torch.float64)
            for i in range(2)
            for name, shape in names.items()
        }
        return {"wte.weight": torch.zeros(20, 8, dtype=torch.float64), **matrices}

    W = state(0)
    T = [{name: W[name] + 0.1 * x for name, x in state(seed).items()} for seed in (1, 2)]
    for method in ("knots", "iso-cts"):
        specbasis.merge(W, {"a": T[0], "b": T[1]}, tmp_path / method, method=method)
        written = load_file(tmp_path / method / "model.safetensors")
        name = "h.0.mlp.c_fc.weight"
        transposed = [Delta((t[name] - W[name]).mT) for t in T]
        delta = merged(transposed, MergeOptions(method=method), torch.Generator())
        assert torch.allclose(written[name], W[name] + delta.mT, atol=1e-12)


def test_dare_draws_for_every_matrix_anew_and_the_seed_decides(family, tmp_path):
    base, paths, W, T = family
    states = []
    for i, seed in enumerate((0, 0, 1)):
        specbasis.merge(base, paths[:1], tmp_path / str(i), method="dare", scale=1.0, density=0.5, seed=seed)
        states.append(load_file(tmp_path / str(i) / "model.safetensors"))
    kept = [{name: (state[name] - W[name]).abs() > 1e-12 for name in W} for state in states]
    key = QUERY.replace("query", "key")
    assert torch.equal(kept[0][QUERY], kept[1][QUERY])
    assert not torch.equal(kept[0][QUERY], kept[2][QUERY])
    assert not torch.equal(kept[0][QUERY], kept[0][key])
    delta = 2 * kept[0][QUERY] * (T[0][QUERY] - W[QUERY])
    assert torch.allclose(states[0][QUERY] - W[QUERY], delta, atol=1e-12)


@pytest.mark.parametrize("method", DEFAULTS)
def test_tied_weights_stay_tied(family, tmp_path, method):
    _, _, W, T = family
    head = "cls.predictions.decoder.weight"
    tied = [{**state, head: state[WORDS].clone()} for state in (W, *T)]
    specbasis.merge(tied[0], dict(zip("abc", tied[1:], strict=True)), tmp_path / "out", method=method)
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written[head], written[WORDS])
    assert not torch.equal(written[head], W[WORDS])


def test_numbers_are_stored_as_the_widest_of_the_formats(tmp_path):
    base = {name: value.bfloat16() for name, value in bert_state().items()}
    tuned = {name: value.float() for name, value in finetuned(bert_state(), 1e-4).items()}
    specbasis.merge(base, {"a": tuned}, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], tuned[name]) for name in tuned)  # in bfloat16 the update would be gone


def test_what_is_not_shared_stays_out_and_is_listed_or_comes_from_one(family, tmp_path):
    base, _, W, T = family
    prefixed = {f"bert.{name}": value for name, value in T[0].items()}
    prefixed |= {"classifier.weight": torch.ones(2, 12).double(), "classifier.bias": torch.ones(2).double()}
    grown = {**T[1], WORDS: torch.cat([T[1][WORDS], torch.ones(3, 12).double()])}
    states = {"head": prefixed, "grown": grown}
    named = [f"{name}={write(tmp_path / name / 'model.safetensors', state)}" for name, state in states.items()]
    merging = specbasis.merge(base, named, tmp_path / "out")
    left_out = {(line["name"], line["finetune"]) for line in merging.record["left_out"]}
    assert left_out == {
        ("classifier.weight", "head"),
        ("classifier.bias", "head"),
        (WORDS, "grown"),
        (WORDS, "head"),
    }
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == W.keys()
    assert torch.equal(written[WORDS], W[WORDS])
    assert torch.allclose(written[QUERY], (T[0][QUERY] + T[1][QUERY]) / 2, atol=1e-12)
    specbasis.merge(base, named, tmp_path / "headed", head="head")
    headed = load_file(tmp_path / "headed/model.safetensors")
    assert headed.keys() == prefixed.keys()
    assert torch.equal(headed["classifier.weight"], prefixed["classifier.weight"])
    assert torch.equal(headed[f"bert.{WORDS}"], prefixed[f"bert.{WORDS}"])
    assert torch.equal(headed[f"bert.{QUERY}"], written[QUERY])


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path):
    """Two LoRAs of a BERT in float64, and the models that PEFT makes of them."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).double().save_pretrained(tmp_path / "base")
    for name, rank in (("a", 2), ("b", 3)):
        model = transformers.BertModel.from_pretrained(tmp_path / "base", torch_dtype=torch.float64)
        lora = peft.LoraConfig(r=rank, target_modules=["query", "dense"])
        tuned = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        tuned.save_pretrained(tmp_path / name)
        tuned.merge_and_unload().save_pretrained(tmp_path / f"{name}-dense")
    return tmp_path


@pytest.mark.parametrize("method", DEFAULTS)
def test_loras_are_merged_as_the_models_that_peft_makes_of_them(adapters, method):
    for end in ("", "-dense"):
        tuned = {name: adapters / f"{name}{end}" for name in "ab"}
        specbasis.merge(adapters / "base", tuned, adapters / f"out{end}", method=method)
    from_factors, from_weights = (load_file(adapters / f"out{end}/model.safetensors") for end in ("", "-dense"))
    base = load_file(adapters / "base/model.safetensors")
    for name, value in from_factors.items():
        moved = (value - base[name]).norm()
        assert (value - from_weights[name]).norm() <= 1e-6 * moved, name
    transformers = pytest.importorskip("transformers")
    loaded = transformers.BertModel.from_pretrained(adapters / "out", torch_dtype=torch.float64)
    assert torch.equal(loaded.state_dict()[QUERY], from_factors[QUERY])


@pytest.mark.parametrize("method", ["ties", "knots", "iso-cts"])
def test_loras_on_weights_stored_in_out_on_embeddings_and_on_different_modules(tmp_path, method):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).double().save_pretrained(tmp_path / "base")
    loras = {
        "a": peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], rank_pattern={"c_proj": 3}),
        "b": peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc", "wte"]),
        "c": peft.LoraConfig(r=2, use_dora=True, target_modules=["c_attn"]),
    }
    for name, lora in loras.items():
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base", torch_dtype=torch.float64)
        tuned = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_" in parameter_name and "magnitude" not in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        tuned.save_pretrained(tmp_path / name)
        tuned.merge_and_unload().save_pretrained(tmp_path / f"{name}-dense")
    for end in ("", "-dense"):
        tuned = {name: tmp_path / f"{name}{end}" for name in loras}
        specbasis.merge(tmp_path / "base", tuned, tmp_path / f"out{end}", method=method)
    from_factors, from_weights = (load_file(tmp_path / f"out{end}/model.safetensors") for end in ("", "-dense"))
    base = load_file(tmp_path / "base/model.safetensors")
    for name, value in from_factors.items():
        assert (value - from_weights[name]).norm() <= 1e-6 * (value - base[name]).norm(), name


def test_an_adapter_that_names_other_weights_is_refused(adapters):
    file = adapters / "a/adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "base_sha256": "0" * 64})
    with pytest.raises(InputError, match="was made from other files than"):
        specbasis.merge(adapters / "base", [adapters / "a", adapters / "b"], adapters / "out")
    digest = specbasis.checkpoint.weights_sha256(specbasis.open_checkpoint(adapters / "base"))
    save_file(load_file(file), file, metadata={"format": "pt", "base_sha256": digest})
    specbasis.merge(adapters / "base", [adapters / "a", adapters / "b"], adapters / "out")


# --- the map ------------------------------------------------------------------------------------------------------


def test_the_map_says_what_two_updates_have_in_common(family):
    base, paths, W, T = family
    merging = specbasis.merge(base, paths[:2], ranks=4)
    line = next(line for line in merging.record["parameters"] if line["name"] == QUERY)
    A, B = (T[i][QUERY] - W[QUERY] for i in (0, 1))
    (pair,) = line["pairs"]
    assert line["norms"] == pytest.approx({"a": float(A.norm()), "b": float(B.norm())})
    assert pair["cosine"] == pytest.approx(float((A * B).sum() / A.norm() / B.norm()))
    assert pair["conflicts"] == pytest.approx(float((A.sign() != B.sign()).double().mean()))
    (U, S, Vh), (X, _, Yh) = (torch.linalg.svd(D) for D in (A, B))
    overlaps = [(P[:, :4].mT @ Q[:, :4]).square().sum() / 4 for P, Q in ((U, X), (Vh.mT, Yh.mT))]
    assert pair["overlap"] == pytest.approx(float(sum(overlaps) / 2))
    assert pair["chance"] == pytest.approx(4 / 12)
    response = [float(U[:, i] @ B @ Vh[i] / S[i]) for i in range(4)]
    assert pair["response"][0] == pytest.approx(response)
    bias = next(line for line in merging.record["parameters"] if line["name"] == BIAS)
    assert bias["role"] == "vectors"
    assert "overlap" not in bias["pairs"][0]
    assert {"overlap", "agree", "fight"} <= {column.name for column in merging.table.columns}
    assert "<table" in merging._repr_html_()


def test_the_map_tells_an_ally_and_an_opponent(family):
    _, _, W, T = family
    opposed = {name: 2 * W[name] - T[0][name] for name in W}
    together = {name: W[name] + 2 * (T[0][name] - W[name]) for name in W}
    merging = specbasis.merge(W, {"a": T[0], "b": together, "c": opposed})
    matrices = [line for line in merging.record["parameters"] if line["role"] != "vectors"]
    for ab, ac, _ in (line["pairs"] for line in matrices):
        assert (ab["cosine"], ac["cosine"]) == pytest.approx((1.0, -1.0))
        assert (ab["conflicts"], ac["conflicts"]) == pytest.approx((0.0, 1.0), abs=1e-3)
        assert ab["response"][0][0] == pytest.approx(2.0)
        assert ac["response"][0][0] == pytest.approx(-1.0)
        assert ab["agree"] > 0.5 > ab["fight"] == 0
        assert ac["fight"] > 0.5 > ac["agree"] == 0


def test_of_random_updates_of_equal_spectrum_the_map_shows_chance():
    """The oracle of the null is `core.draws.rotated`: the same update between random rotations."""
    g = torch.Generator().manual_seed(0)
    base = {f"encoder.layer.{i}.output.dense.weight": torch.zeros(24, 40, dtype=torch.float64) for i in range(60)}
    spectrum = [torch.diag_embed(0.5 ** torch.arange(24.0).double()) @ torch.eye(24, 40).double() for _ in base]
    tuned = [
        {name: rotated(W, W + X, g) for (name, W), X in zip(base.items(), spectrum, strict=True)} for _ in range(2)
    ]
    merging = specbasis.merge(base, dict(zip("ab", tuned, strict=True)), ranks=5)
    pairs = [line["pairs"][0] for line in merging.record["parameters"]]
    cosines = np.array([pair["cosine"] for pair in pairs])
    assert np.sqrt((cosines**2).mean()) == pytest.approx(1 / np.sqrt(24 * 40), rel=0.3)
    for name, chance in (("overlap", pairs[0]["chance"]), ("agree", 0.025), ("fight", 0.025)):
        values = np.array([pair[name] for pair in pairs])
        assert abs(values.mean() - chance) < 4 * values.std() / np.sqrt(len(values)), name


# --- refused ------------------------------------------------------------------------------------------------------


def test_an_independent_model_is_refused(family, tmp_path):
    base, paths, *_ = family
    other = {name: value.double() for name, value in bert_state(seed=9).items()}
    with pytest.raises(InputError, match=r"lies further from .* than from zero"):
        specbasis.merge(base, [paths[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [QUERY, BIAS])
def test_a_nan_is_refused_by_name_before_anything_is_written(family, tmp_path, name):
    base, paths, _, T = family
    broken = {**T[1], name: T[1][name].index_fill(0, torch.tensor(0), torch.nan)}
    with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
        specbasis.merge(base, {"a": paths[0], "broken": broken}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_meant_is_refused(family, tmp_path):
    base, paths, W, _ = family
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="exists already; want a new folder"):
        specbasis.merge(base, paths, tmp_path / "full")
    for sources in ([], {}, paths[0], W):
        with pytest.raises(InputError, match="got no list of finetunes"):
            specbasis.merge(base, sources, tmp_path / "out")
    with pytest.raises(InputError, match="no finetune 'd'; there is: a, b, c"):
        specbasis.merge(base, paths, tmp_path / "out", head="d")
    with pytest.raises(InputError, match="no finetune 'd'"):
        specbasis.merge(base, paths, tmp_path / "out", judge={"d": Rows()})
    with pytest.raises(InputError, match="a finetune called 'mean'"):
        specbasis.merge(base, {"mean": paths[0]}, tmp_path / "out")
    with pytest.raises(InputError, match="there is nothing to merge"):
        specbasis.merge(base, {"a": W, "b": W}, tmp_path / "out")
    with pytest.raises(InputError, match="two models are called 'x'"):
        specbasis.merge(base, [f"x={path}" for path in paths], tmp_path / "out")


def test_a_run_that_stops_half_way_leaves_nothing(family, tmp_path):
    base, paths, *_ = family

    def stop(now):
        if now.done == 5 and not now.name.startswith("reading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        specbasis.merge(base, paths, tmp_path / "new/out", progress=stop)
    assert list((tmp_path / "new").iterdir()) == []


def test_killed_half_way_nothing_looks_complete_and_the_same_command_leaves_nothing_else(family, tmp_path):
    base, paths, *_ = family
    where = tmp_path / "new"
    where.mkdir()
    code = (
        "import os, sys, specbasis\n"
        "def stop(now):\n    if now.done == 5 and not now.name.startswith('reading'): os.kill(os.getpid(), 9)\n"
        "specbasis.merge(sys.argv[1], sys.argv[2:], 'out', progress=stop)"
    )
    killed = subprocess.run([sys.executable, "-c", code, base, *paths], cwd=where, capture_output=True)
    assert killed.returncode == -9
    assert not (where / "out").exists()
    assert [path.name for path in where.iterdir() if path.name.startswith(".out.")]
    specbasis.merge(base, paths, where / "out")
    assert [path.name for path in where.iterdir()] == ["out"]


def test_one_matrix_and_its_updates_are_in_memory_at_a_time(family, tmp_path, monkeypatch):
    base, paths, *_ = family
    alive, most = [], []
    own = Finetunes.deltas

    def counted(self, name):
        import weakref

        made = own(self, name)
        alive.extend(weakref.ref(delta) for delta in made.values())
        most.append(sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(Finetunes, "deltas", counted)
    specbasis.merge(base, paths, tmp_path / "out")
    assert max(most) <= 3


# --- judged -------------------------------------------------------------------------------------------------------


class Rows:
    """A judge without a library: of each row of the query matrix whether its sum is above zero, or a loss."""

    def __init__(self, metric="above", higher_is_better=True):
        self.metric, self.higher_is_better = metric, higher_is_better

    def load(self, source):
        return load_file(f"{source}/model.safetensors")

    def __call__(self, model):
        name = next(name for name in model if name.endswith(QUERY))
        scores = model[name].abs().sum(1)[:, None].numpy()
        head = float(model["classifier.weight"][0, 0]) if "classifier.weight" in model else 1.0
        return {self.metric: Sample(head * scores, higher_is_better=self.higher_is_better)}


def test_every_model_is_judged_with_the_head_of_the_task(family, tmp_path):
    base, _, W, T = family
    heads = (2.0, 3.0)
    tuned = {
        label: {**state, "classifier.weight": torch.full((1, 1), head).double()}
        for label, state, head in zip("ab", T[:2], heads, strict=True)
    }
    judges = {"a": Rows(), "b": Rows("loss", higher_is_better=False)}
    merging = specbasis.merge(base, tuned, tmp_path / "out", method="task-arithmetic", scale=1.0, judge=judges)
    A, B = (T[i][QUERY] for i in (0, 1))
    bodies = {"a": A, "b": B, "mean": (A + B) / 2, "merged": A + B - W[QUERY]}
    values = {name: float(body.abs().sum(1).mean()) for name, body in bodies.items()}
    scores = merging.record["scores"]
    for label, head in zip("ab", heads, strict=True):
        assert scores["tasks"][label]["values"] == pytest.approx({n: head * value for n, value in values.items()})
    normalised = {n: (value / values["a"] + values["b"] / value) / 2 for n, value in values.items()}
    assert scores["normalised"] == pytest.approx(normalised)
    change = scores["tasks"]["a"]
    assert change["change"] == pytest.approx(2 * (values["merged"] - values["mean"]))
    assert change["change_low"] <= change["change"] <= change["change_high"]
    assert [row[0] for row in merging.scores.rows] == ["a", "b", "mean", "merged"]


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_merges_maps_and_says_what_stays_out(family, tmp_path, capsys):
    base, paths, _, T = family
    state = {**T[0], "classifier.weight": torch.ones(2, 12).double()}
    headed = write(tmp_path / "headed.safetensors", state)
    run("merge", base, f"h={headed}", paths[1], "--dry-run")
    printed = capsys.readouterr().out
    assert "fight" in printed
    assert "left out: classifier.weight of h: the base has none of this shape" in printed
    assert "nothing is written" in printed
    run(
        "merge",
        base,
        f"h={headed}",
        paths[1],
        "--method",
        "ties",
        "--density",
        "0.5",
        "--out",
        tmp_path / "out",
        "--json",
    )
    record = json.loads(capsys.readouterr().out)
    assert record["options"]["density"] == 0.5
    assert json.loads((tmp_path / "out" / Merging.RECORD).read_text())["parameters"] == record["parameters"]
    run("merge", base, paths[1], "--method", "mean", "--out", tmp_path / "mean")
    assert "kept" in capsys.readouterr().out
    with pytest.raises(InputError, match="got no --out"):
        run("merge", base, paths[1])
    with pytest.raises(InputError, match="want NAME=TASK"):
        run("merge", base, paths[1], "--out", tmp_path / "new", "--judge", "glue:sst2")
    task = ("--judge", f"b=text:{base}")
    with pytest.raises(InputError, match="two tasks of one finetune"):
        run("merge", base, paths[1], "--out", tmp_path / "new", *task, *task)
    with pytest.raises(InputError, match="nothing to write"):
        run("merge", base, paths[1], "--dry-run", *task)


def test_a_merge_draws_itself(family, tmp_path):
    pytest.importorskip("matplotlib")
    base, paths, *_ = family
    path = specbasis.merge(base, paths[:2], tmp_path / "out").report()
    assert path == tmp_path / "out/report.html"
    assert path.with_name("merge.png").stat().st_size > 1000
    assert specbasis.merge(base, paths[:2]).report(tmp_path / "map.html").stat().st_size > 1000


def test_while_one_merges_another_is_refused(family, tmp_path):
    base, paths, *_ = family
    refused = []

    def second(_):
        if not refused:
            with pytest.raises(InputError, match="another run is writing here") as error:
                specbasis.merge(base, paths, tmp_path / "out")
            refused.append(error)

    specbasis.merge(base, paths, tmp_path / "out", progress=second)
    assert refused
    assert not list(tmp_path.glob(".out.*"))
    with pytest.raises(InputError, match="exists already"):
        specbasis.merge(base, paths, tmp_path / "out")
