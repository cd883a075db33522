"""ONNX and GGUF, written by their own libraries: floats of every width; quantised ONNX is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError


def matrix(rows=64, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def read_all(source):
    checkpoint = open_checkpoint(source)
    return {name: checkpoint[name] for name in checkpoint if checkpoint.entries[name].is_float}


def refused(source, match):
    with pytest.raises(InputError, match=match) as caught:
        read_all(source)
    return str(caught.value)


def read_or_refuse(path):
    """Reading a damaged file gives tensors, or an InputError of one line; nothing else."""
    try:
        read_all(path)
    except InputError as error:
        lines = str(error).splitlines()
    else:
        return
    assert len(lines) == 1


def noise_share(message):
    return float(re.search(r"about ([\d.]+)%", message)[1]) / 100


# --- ONNX ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx")


def save_onnx(onnx, path, initialisers, nodes=(), **options):
    graph = onnx.helper.make_graph(list(nodes), "g", [], [], initializer=initialisers)
    onnx.save(onnx.helper.make_model(graph), str(path), **options)


@pytest.mark.parametrize("external", [False, True])
def test_onnx_floats_of_every_width(onnx, tmp_path, external):
    W = matrix()
    stored = {"f": W.numpy(), "d": W.double().numpy(), "h": W.half().numpy(), "shape": np.array([64, 96])}
    initialisers = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    raw = W.bfloat16().view(torch.uint16).numpy().tobytes()
    kind = onnx.TensorProto.BFLOAT16
    initialisers.append(onnx.helper.make_tensor("b", kind, W.shape, raw, raw=True))
    initialisers.append(onnx.helper.make_tensor("listed", onnx.TensorProto.FLOAT, W.shape, W.flatten().tolist()))
    initialisers.append(onnx.helper.make_tensor("b listed", kind, W.shape, W.bfloat16().float().flatten().tolist()))
    initialisers.append(onnx.numpy_helper.from_array(np.empty((0, 4), np.float32), "empty"))
    options = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0} if external else {}
    save_onnx(onnx, tmp_path / "model.onnx", initialisers, **options)
    checkpoint = open_checkpoint(tmp_path)
    want = {"f": W, "d": W.double(), "h": W.half(), "b": W.bfloat16(), "listed": W, "b listed": W.bfloat16()}
    for name, tensor in want.items():
        assert checkpoint.entries[name].shape == (64, 96)
        assert checkpoint.entries[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(checkpoint[name], tensor), name
    assert checkpoint["empty"].shape == (0, 4)
    assert not checkpoint.entries["shape"].is_float


def test_onnx_data_outside_the_folder_is_refused(onnx, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64 * 96 * 4))
    (tmp_path / "model").mkdir()
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=(64, 96))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add(key="location", value="../secret")
    for place in ("../secret", str(tmp_path / "secret"), "link", ""):
        entry.value = place
        graph = onnx.helper.make_graph([], "g", [], [], initializer=[tensor])
        (tmp_path / "model" / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        if place == "link":
            (tmp_path / "model" / "link").symlink_to(tmp_path / "secret")
        refused(tmp_path / "model", "refused")
    entry.value = "short"
    (tmp_path / "model" / "short").write_bytes(bytes(10))
    (tmp_path / "model" / "m.onnx").write_bytes(
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=[tensor])).SerializeToString()
    )
    refused(tmp_path / "model", "10 of its 24576 bytes")


def test_quantised_onnx_is_refused_with_its_noise(onnx, tmp_path):
    W = matrix()
    step = float(W.abs().max()) / 127
    q = (W / step).round()
    initialisers = [
        onnx.numpy_helper.from_array(q.to(torch.int8).numpy(), "q"),
        onnx.numpy_helper.from_array(np.array(step, np.float32), "step"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [onnx.helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["w"])]
    save_onnx(onnx, tmp_path / "model.onnx", initialisers, nodes)
    message = refused(tmp_path / "model.onnx", "quantised.*DequantizeLinear")
    actual = float((q * step - W).square().mean().sqrt() / W.square().mean().sqrt())
    assert noise_share(message) == pytest.approx(actual, rel=0.1)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_damaged_onnx_files_are_read_or_refused(onnx, tmp_path, damage):
    W = matrix(6, 4)
    kinds = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    listed = [onnx.helper.make_tensor(f"w{kind}", kind, W.shape, W.flatten().tolist()) for kind in kinds]
    path = tmp_path / "m.onnx"
    save_onnx(onnx, path, [*listed, onnx.numpy_helper.from_array(W.numpy(), "raw")])
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[place % len(content)] = value
    path.write_bytes(content)
    read_or_refuse(path)


def test_an_onnx_file_that_is_none(onnx, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"this is a text and no graph at all")
    refused(tmp_path / "m.onnx", "truncated or corrupted")


# --- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


def save_gguf(gguf, path, arrays):
    """arrays: name → (array, type or None)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_floats(gguf, path):
    W = matrix()
    brain = W.bfloat16().view(torch.uint8).numpy()
    save_gguf(
        gguf,
        path,
        {
            "blk.0.attn_q.weight": (W.numpy(), None),
            "blk.0.attn_k.weight": (W.half().numpy(), None),
            "blk.0.attn_v.weight": (brain, gguf.GGMLQuantizationType.BF16),
            "blk.0.attn_norm.weight": (W[0].numpy(), None),
        },
    )
    return {"q": W, "k": W.half(), "v": W.bfloat16()}


def test_gguf_floats_of_every_width(gguf, tmp_path):
    want = gguf_floats(gguf, tmp_path / "m.gguf")
    for source in (tmp_path, tmp_path / "m.gguf"):
        checkpoint = open_checkpoint(source)
        for part, tensor in want.items():
            name = f"blk.0.attn_{part}.weight"
            assert checkpoint.entries[name].shape == (64, 96)
            assert checkpoint.entries[name].dtype == str(tensor.dtype).removeprefix("torch.")
            assert torch.equal(checkpoint[name], tensor)
        assert checkpoint.entries["blk.0.attn_norm.weight"].shape == (96,)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3), cut=st.integers(5, 10**6))
def test_damaged_gguf_files_are_read_or_refused(gguf, tmp_path, damage, cut):
    path = tmp_path / "m.gguf"
    gguf_floats(gguf, path)
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[place + 4] = value
    path.write_bytes(content[:cut])
    read_or_refuse(path)


def test_what_to_install_is_said(tmp_path, monkeypatch):
    import sys

    for name, content in (("gguf", b"GGUF" + bytes(20)), ("onnx", bytes(20))):
        (tmp_path / f"m.{name}").write_bytes(content)
        monkeypatch.setitem(sys.modules, name, None)
        refused(tmp_path / f"m.{name}", rf"pip install .*\[{name}\]")
