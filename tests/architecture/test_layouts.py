"""Matrices are (out, in) whatever library stored them, and kernels out × the rest."""

from pathlib import Path

import pytest
import torch

import specbasis
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from tests.pico import State, bert_state, finetuned


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _read(state: State) -> dict[str, torch.Tensor]:
    """Every matrix of a model as it is read."""
    checkpoint = open_checkpoint(state)
    return {ref.key.name: ref.read(checkpoint) for ref in model_map(checkpoint).matrices}


@pytest.mark.parametrize(
    ("name", "shape", "beside", "out"),
    [
        ("conv.W", (16, 3, 5, 5), {}, 0),  # Chainer
        ("dense.W", (16, 12), {}, 0),
        ("conv/kernel", (5, 5, 3, 16), {}, -1),  # Keras, Flax
        ("conv1d/kernel:0", (5, 3, 16), {}, -1),
        ("dense/kernel", (12, 16), {}, -1),
        ("a.filters", (16, 3, 5, 5), {"a.bias": (16,)}, 0),  # by its neighbour
        ("a.filters", (5, 5, 3, 16), {"a.b": (16,)}, -1),
        ("a.weight", (16, 3, 5, 5), {}, 0),
    ],
)
def test_names_and_neighbours_tell_the_layout(name: str, shape: tuple, beside: dict, out: int) -> None:
    W = normal(*shape)
    (read,) = _read({name: W} | {n: normal(*size) for n, size in beside.items()}).values()
    assert torch.equal(read, W.flatten(1) if out == 0 else W.flatten(0, -2).mT)


def test_what_nothing_tells_is_left_out_until_the_user_says_it() -> None:
    base = {"a.filters": normal(5, 5, 6, 16), "a.weight": normal(16, 16)}
    tuned = {name: W + 0.1 * torch.randn_like(W) for name, W in base.items()}
    c = specbasis.compare(base, tuned, workers=1)
    assert c.facts["state_dict"].compared == pytest.approx(256 / 2656)
    assert "--layout" in c.skipped["state_dict"][0]["reason"]
    whole = specbasis.compare(base, tuned, workers=1, layout=("*.filters=in_out",))
    assert whole.facts["state_dict"].compared == 1.0
    (kernel,) = (m for m in whole.facts["state_dict"].matrices if m["matrix"] == "a.filters")
    assert (kernel["out"], kernel["in"]) == (16, 150)
    for wrong in ("a.filters", "=conv", "a=rows"):
        with pytest.raises(InputError, match="want a pattern of names and conv or in_out"):
            specbasis.compare(base, tuned, layout=(wrong,))


def test_the_graph_of_an_onnx_file_tells_the_layout(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weights = {"k.weight": normal(8, 3, 5, 5), "m": normal(12, 20), "g": normal(12, 20), "t": normal(20, 12)}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "k.weight"], ["y"]),
        onnx.helper.make_node("MatMul", ["x", "m"], ["z"]),
        onnx.helper.make_node("Gemm", ["x", "g"], ["u"]),
        onnx.helper.make_node("Gemm", ["x", "t"], ["v"], transB=1),
    ]
    tensors = [onnx.numpy_helper.from_array(W.numpy(), name) for name, W in weights.items()]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], [], tensors)), str(path))
    checkpoint = open_checkpoint(path)
    read = {ref.key.name: ref.read(checkpoint) for ref in model_map(checkpoint).matrices}
    wanted = {
        "k.weight": weights["k.weight"].flatten(1),
        "m": weights["m"].mT,
        "g": weights["g"].mT,
        "t": weights["t"],
    }
    assert all(torch.equal(read[name], W) for name, W in wanted.items())
    # Left is left: the same weights as PyTorch stores them are a copy, square ones too.
    c = specbasis.compare(_stored(wanted), path, workers=1)
    assert {m["relative_update"] for m in c.facts[c.pairs[0]].matrices} == {0.0}
    assert len(c.facts[c.pairs[0]].matrices) == 4


def _stored(wanted: State) -> State:
    return {name: W.reshape(8, 3, 5, 5) if name == "k.weight" else W.contiguous() for name, W in wanted.items()}


def test_weights_that_are_transposed_as_a_whole_are_offered_and_compared() -> None:
    base = bert_state(width=64)
    tuned = finetuned(base)
    turned = {name: W.mT.contiguous() if W.ndim == 2 else W for name, W in tuned.items()}
    plain = specbasis.compare(base, tuned, workers=1)
    for some in (base, {n: W for n, W in base.items() if "intermediate" in n}):
        with pytest.raises(InputError, match="--transposed compares"):
            specbasis.compare(some, turned, workers=1)
    whole = specbasis.compare(base, turned, workers=1, transposed=True)
    assert whole.verdicts["state_dict"].sentence == plain.verdicts["state_dict"].sentence
    assert whole.rows["value"].to_pylist() == pytest.approx(plain.rows["value"].to_pylist(), nan_ok=True, rel=1e-6)


@pytest.mark.parametrize("separator", ["/", "_", " "])
def test_names_that_differ_in_separators_are_the_same(separator: str) -> None:
    base = bert_state(width=64)
    tuned = {name.replace(".", separator): W for name, W in finetuned(base).items()}
    c = specbasis.compare(base, tuned, workers=1)
    assert c.facts["state_dict"].compared == 1.0
    assert any("separators alone" in note for note in c.manifest["pairs"]["state_dict"]["notes"])
