"""Files that were made to hang a reader, to exhaust memory, or to hold what is no array of numbers."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.checkpoint.formats.pickles import DEEPEST
from specbasis.checkpoint.regular import read_bytes
from specbasis.core.errors import InputError


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        list(open_checkpoint(path).values())
    assert "\n" not in str(caught.value)


# --- pickles ------------------------------------------------------------------------------------------------------

BYTES = 6 * 10**9


def number(n):
    return b"\x8a\x08" + n.to_bytes(8, "little")


def called(name, *arguments, opcode=b"R"):
    """A pickle that calls a name with arguments, which are pickled already."""
    return b"\x80\x02c" + name.replace(".", "\n", 1).encode() + b"\n(" + b"".join(arguments) + b"t" + opcode + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def pairs(levels):
    """A tuple of twice the tuple before it, so many times: 2**levels values when it is written out."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


PICKLES = {
    "bytearray": called("builtins.bytearray", number(BYTES)),
    "bytearray in Python 2's words": called("__builtin__.bytearray", number(BYTES)),
    "tensor": b"\x80\x02ctorch\nTensor\n(" + number(BYTES) + b"tR.",
    "tensor of a class": b"\x80\x02ctorch\nDoubleTensor\n(" + number(BYTES) + b"t\x81.",
    "storage": b"\x80\x02ctorch.storage\nUntypedStorage\n(" + number(BYTES) + b"tR.",
    "tensor by way of another function": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nctorch\nTensor\n("
        + number(BYTES) + b"t}tR."
    ),
    "codec of quadratic time": called("_codecs.encode", text("ü" * 10**5), text("punycode")),
    "key of shared tuples": b"\x80\x02}" + pairs(60) + b"K\x01s.",
    "key of deep tuples": b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.",
    "set of shared tuples": b"\x80\x02cbuiltins\nset\n(](" + pairs(60) + b"etR.",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("form", ["archive", "bare"])
def test_a_pickle_that_asks_for_more_than_its_file_holds_is_refused(tmp_path, name, form):
    path = tmp_path / "m.pt"
    if form == "bare":
        head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + PICKLES[name])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", PICKLES[name])
            archive.writestr("m/version", "3\n")
    refused(path, r"m\.pt asks for .*; refused")


def test_storages_that_promise_more_than_the_file_holds_are_refused(tmp_path):
    torch.save({"w": torch.zeros(3, 5)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pt").read_bytes()
    assert content.count(b"K\x0f") == 1
    (tmp_path / "m.pt").write_bytes(content.replace(b"K\x0f", b"J" + struct.pack("<i", 2**31 - 1)))
    refused(tmp_path / "m.pt", "asks for storages of 2147483647 numbers in a file of")


def test_what_torch_writes_asks_for_nothing(tmp_path):
    """Optimisers, shared tuples, attributes of tensors, scalars, tied weights: all that a training keeps."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], betas=(0.9, 0.99))
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    tagged = torch.ones(2, 2)
    tagged.note = "an attribute"
    content = {
        "model": {**model.state_dict(), "tied": model.weight, "tagged": tagged, "parameter": model.weight},
        "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state(), b"bytes", torch.Size((2, 3)), 1 + 2j, {1, 2}],
        "nested": (((((1,),),),),),
    }
    for archive in (True, False):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=archive)
        checkpoint = open_checkpoint(f"{tmp_path / 'm.pt'}#model")
        assert torch.equal(checkpoint["tied"], model.weight)
        assert torch.equal(checkpoint["tagged"], torch.ones(2, 2))


def test_dictionaries_that_are_shared_are_walked_once(tmp_path):
    inner = {"x": torch.ones(2, 2), "y": 1}
    for _ in range(4):
        inner = {f"k{i}": inner for i in range(200)}
    torch.save(inner, tmp_path / "m.pt")
    with pytest.raises(InputError, match="holds no dictionary of tensors"):  # it is deeper than is looked
        open_checkpoint(tmp_path / "m.pt")
    torch.save(inner["k0"]["k0"], tmp_path / "m.pt")
    assert set(open_checkpoint(tmp_path / "m.pt")) == {"x", "y"} - {"y"}


def test_two_entries_of_one_name_are_refused(tmp_path):
    """One reader of zip files takes the first, another the last: what was looked through is not what is loaded."""
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr("m/DATA.pkl", PICKLES["bytearray"])
    refused(tmp_path / "m.pt", "two entries of one name")


def test_the_depth_that_is_refused_is_one_that_no_file_has():
    assert DEEPEST >= 50


# --- GGUF ---------------------------------------------------------------------------------------------------------


def gguf_file(*, settings=(), tensors=(), version=3, count=None, body=bytes(256)):
    """Settings: (name, type, value as bytes). Tensors: (name, shape, type, offset)."""

    def string(name):
        return struct.pack("<Q", len(name)) + name.encode()

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if count is None else count, len(settings))
    head += b"".join(string(name) + struct.pack("<I", kind) + value for name, kind, value in settings)
    for name, shape, kind, offset in tensors:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + body


NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) + struct.pack("<IQ", 4, 0)

GGUF = {
    "array of 2**63 numbers": ({"settings": [("a", 9, struct.pack("<IQ", 4, 2**63))]}, "in the header"),
    "array whose bytes wrap": ({"settings": [("a", 9, struct.pack("<IQ", 12, 2**61))]}, "in the header"),
    "array of 2**40 strings": ({"settings": [("a", 9, struct.pack("<IQ", 8, 2**40))]}, "truncated"),
    "arrays in arrays": ({"settings": [("a", 9, NESTED)]}, "setting of type 9"),
    "unknown type": ({"settings": [("a", 77, b"")]}, "setting of type 77"),
    "string of 2**63 bytes": ({"settings": [("a", 8, struct.pack("<Q", 2**63))]}, "in the header"),
    "more tensors than bytes": ({"count": 2**62}, "truncated"),
    "offset that wraps": ({"tensors": [("w", (4, 4), 0, 2**64 - 32)]}, "ends at byte"),
    "size that wraps": ({"tensors": [("w", (2**32, 2**32), 0, 0)]}, "ends at byte"),
    "beyond the end": ({"tensors": [("w", (4, 4), 0, 224)]}, "ends at byte"),
    "overlap": ({"tensors": [("a", (4, 4), 0, 0), ("b", (4, 4), 0, 32)]}, "'b' overlaps"),
    "the same bytes": ({"tensors": [("a", (4, 4), 0, 0), ("b", (4, 4), 0, 0)]}, "'b' overlaps"),
    "one name twice": ({"tensors": [("a", (4, 4), 0, 0), ("a", (4, 4), 0, 64)]}, "one name"),
    "too many axes": ({"tensors": [("a", (1,) * 9, 0, 0)]}, "9 axes"),
    "unknown format of numbers": ({"tensors": [("a", (4, 4), 999, 0)]}, "999"),
    "the other byte order": ({"version": 3 << 24}, "other byte order"),
    "an old version": ({"version": 1}, "version 1"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_lengths_are_not_believed(tmp_path, name):
    pytest.importorskip("gguf")
    fields, said = GGUF[name]
    (tmp_path / "m.gguf").write_bytes(gguf_file(**fields))
    refused(tmp_path / "m.gguf", f"truncated or corrupted .*{said}|{said}")


def test_gguf_settings_of_every_type_are_passed_over(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("texts", ["a", "bb"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float64("double", 0.5)
    writer.add_bool("flag", True)
    writer.add_uint64("long", 2**40)
    writer.add_custom_alignment(64)
    want = torch.arange(12.0).reshape(3, 4)
    writer.add_tensor("a.weight", want.numpy())
    writer.add_tensor("b.weight", -want.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert torch.equal(checkpoint["a.weight"], want)
    assert torch.equal(checkpoint["b.weight"], -want)


# --- ONNX ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "said"), [((2**40, 2**20), "of its"), ((-1, 4), "negative"), ((10**6, 10**3), "of its")]
)
@pytest.mark.parametrize("outside", [False, True])
def test_onnx_sizes_are_not_believed(tmp_path, shape, said, outside):
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=shape)
    if outside:
        (tmp_path / "w.bin").write_bytes(bytes(64))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
    else:
        tensor.raw_data = bytes(64)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor])), str(tmp_path / "m.onnx"))
    refused(tmp_path / "m.onnx", said)


# --- files that are none ------------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def device(path):
    path.symlink_to("/dev/zero")


@pytest.fixture(params=[pipe, listening, device], ids=["pipe", "socket", "device"])
def no_file(request):
    return request.param


def test_a_configuration_that_is_no_file(tmp_path, no_file):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    no_file(tmp_path / "config.json")
    refused(tmp_path, "not a regular file|link out of its folder")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "m.gguf", "m.onnx"]
)
def test_weights_that_are_no_file(tmp_path, no_file, name):
    no_file(tmp_path / name)
    refused(tmp_path, "not a regular file|link out of its folder")
    refused(tmp_path / name, "not a regular file|device")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_no_file(tmp_path, no_file, name):
    base = open_checkpoint({"w.weight": torch.ones(2, 2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / name).unlink(missing_ok=True)
    no_file(tmp_path / name)
    with pytest.raises(InputError, match=r"not a regular file|link out of its folder|without weights"):
        open_tuned(tmp_path, base)


def test_data_of_an_onnx_file_that_are_no_file(tmp_path, no_file):
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=(2, 2))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor])), str(tmp_path / "m.onnx"))
    no_file(tmp_path / "w.bin")
    refused(tmp_path / "m.onnx", "not a regular file|link out of its folder")


def test_text_that_is_larger_than_any(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**29)  # a hole
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "has 536870912 bytes; want a file of at most")
    assert len(read_bytes(tmp_path / "model.safetensors", limit=None)) > 16


# --- tensors that are no arrays of numbers ------------------------------------------------------------------------


def test_tensors_of_every_kind_are_listed_and_those_that_are_no_weights_not_read(tmp_path):
    W = torch.randn(4, 4)
    with pytest.warns(UserWarning, match="nested"):
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    odd = {
        "meta": torch.empty(4, 4, device="meta"),
        "nested": nested,
        "sparse": W.to_sparse(),
        "rows": W.to_sparse_csr(),
        "complex": torch.randn(4, 4, dtype=torch.complex64),
        "quantised": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8),
        "scales": torch.ones(4, 4).to(getattr(torch, "float8_e8m0fnu", torch.int8)),  # torch 2.7 has it
        "integers": torch.ones(4, 4, dtype=torch.int32),
    }
    torch.save({**odd, "plain": W}, tmp_path / "m.pt")
    # A live model on the meta device has shapes, which is all that roles need; in a file they are no weights.
    for source, floats in ((tmp_path / "m.pt", ["plain"]), ({**odd, "plain": W}, ["meta", "plain"])):
        checkpoint = open_checkpoint(source)
        assert [name for name, entry in checkpoint.entries.items() if entry.is_float] == floats
        assert torch.equal(checkpoint["plain"], W)
        for name in ("meta", "nested", "sparse", "rows"):
            with pytest.raises(InputError, match="not an array of numbers"):
                checkpoint[name]


FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_read(tmp_path, name):
    W = torch.randn(6, 4).to(getattr(torch, name))
    torch.save({"w": W}, tmp_path / "m.pt")
    entry = open_checkpoint(tmp_path / "m.pt").entries["w"]
    assert (entry.is_float, entry.dtype) == (True, name)
    assert torch.equal(entry.load().float(), W.float())


@pytest.mark.parametrize("bomb", ["(a+)+b", "(a|a)*b", "((((a?){99}){99}){99}){99}b"])
def test_a_pattern_of_an_adapter_ends(tmp_path, bomb):
    module = "a" * 60
    base = open_checkpoint({f"{module}.weight": torch.zeros(8, 8)})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {bomb: 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    names = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
    save_file(dict(zip(names, (A, B), strict=True)), tmp_path / "adapter_model.safetensors")
    try:
        tuned = open_tuned(tmp_path, base)
    except InputError as error:
        assert "take too long" in str(error)  # noqa: PT017 - one of two right answers
    else:
        torch.testing.assert_close(tuned[f"{module}.weight"], B @ A)


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 10**400}, {"lora_alpha": "x"}, {"lora_alpha": None}, {"alpha_pattern": {"w": 10**400}},
     {"alpha_pattern": {"(": 1}}, {"alpha_pattern": ["w"]}, {"peft_type": 3}, {"r": 0}],
)  # fmt: skip
def test_configurations_of_adapters_that_cannot_be_meant(tmp_path, changes):
    shapes = (changes.get("r", 2), 8)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"base_model.model.w.lora_A.weight": torch.zeros(shapes), "base_model.model.w.lora_B.weight":
         torch.zeros(shapes[::-1])},
        tmp_path / "adapter_model.safetensors",
    )  # fmt: skip
    with pytest.raises(InputError):
        dict(open_tuned(tmp_path, open_checkpoint({"w.weight": torch.ones(8, 8)})))
