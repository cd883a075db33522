"""Files of every format, mutated: each is read or refused in one line, and none takes memory that it does not hold.

A few hundred mutations a reader here; ten thousand with the marker `slow`.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.comparison.correlations import read_scores
from specbasis.core.errors import InputError
from specbasis.finetuning.tables import read_table
from specbasis.jobs.experiments import read_experiments
from specbasis.jobs.results import load
from tests.checkpoint.test_formats import gguf_floats, save_gguf, save_onnx
from tests.checkpoint.test_quantised import gptq as gptq_matrix, matrix

EXTREMES = [bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(7) + b"\x80", b"\x00\x00\x00\x40" + bytes(4)]
TEXTS = [b"{", b"}", b"[", b'"', b"\n", b",", b"null", b"-1", b"1e999", b"\x00", b"\xed\xa0\x80", b"9" * 5000]
ROOM = 3 * 2**30
"""Bytes of address space that a reader may take beside what the process has."""


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes, bits, extreme numbers, pieces of JSON, pieces moved, doubled or cut."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        # Headers are where the decisions are.
        at = at if draw.random() < 0.5 else min(at, draw.randrange(400))
        length = draw.choice((1, 2, 4, 8, 64))
        kind = draw.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at : at + 8] = draw.choice(EXTREMES)
        elif kind == 3:
            data[at : at + draw.randrange(3)] = draw.choice(TEXTS)
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6:
            source = draw.randrange(len(data) + 1)
            data[at : at + length] = data[source : source + length]
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


@contextmanager
def little_memory():
    """Let an allocation fail that is far larger than any file here."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- readers: what writes the files, which of them is mutated, and what reads it ----------------------------------


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.0.weight": torch.randn(6, 4, generator=generator),
        "layer.1.weight": torch.randn(3, 6, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
    }


def read_checkpoint(path):
    checkpoint = open_checkpoint(path)
    for name, entry in checkpoint.entries.items():
        if entry.is_float:
            assert tuple(checkpoint[name].shape) == entry.shape
        if entry.grid:
            assert all(tuple(end.shape) == entry.shape for end in entry.grid().cells())


def safetensors(folder):
    save_file(tensors(), folder / "m.safetensors")
    return folder / "m.safetensors", lambda: read_checkpoint(folder / "m.safetensors")


def archive(folder):
    torch.save({"model": tensors(), "epoch": 3, "rng": torch.get_rng_state()[:8]}, folder / "m.pt")
    return folder / "m.pt", lambda: read_checkpoint(folder / "m.pt")


def bare_pickle(folder):
    torch.save({"model": tensors(), "epoch": 3}, folder / "m.pt", _use_new_zipfile_serialization=False)
    return folder / "m.pt", lambda: read_checkpoint(folder / "m.pt")


def index(folder):
    save_file(tensors(), folder / "model-00001-of-00001.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), "model-00001-of-00001.safetensors")}))
    return path, lambda: read_checkpoint(folder)


def config(folder):
    save_file(tensors(), folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 12, "architectures": ["Bert"]}))
    return path, lambda: read_checkpoint(folder)


def onnx(folder):
    library = pytest.importorskip("onnx")
    parts = [library.numpy_helper.from_array(t.float().numpy(), name) for name, t in tensors().items()]
    save_onnx(library, folder / "m.onnx", parts)
    return folder / "m.onnx", lambda: read_checkpoint(folder / "m.onnx")


def onnx_outside(folder):
    library = pytest.importorskip("onnx")
    parts = [library.numpy_helper.from_array(t.float().numpy(), name) for name, t in tensors().items()]
    save_onnx(library, folder / "m.onnx", parts, save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx", lambda: read_checkpoint(folder / "m.onnx")


def gguf(folder):
    gguf_floats(pytest.importorskip("gguf"), folder / "m.gguf")
    return folder / "m.gguf", lambda: read_checkpoint(folder / "m.gguf")


def gguf_quantised(folder):
    library = pytest.importorskip("gguf")
    kind = library.GGMLQuantizationType.Q4_K
    block, size = library.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(0, 60, (4, 512 // block * size), dtype=torch.uint8).numpy()
    save_gguf(library, folder / "m.gguf", {"blk.0.attn_q.weight": (blocks, kind)})
    return folder / "m.gguf", lambda: read_checkpoint(folder / "m.gguf")


def npz(folder):
    import numpy as np

    np.savez(folder / "m.npz", **{name: X.float().numpy() for name, X in tensors().items()})
    return folder / "m.npz", lambda: read_checkpoint(folder / "m.npz")


def _quantised_parts(tensors, **config):
    def quantised(folder):
        save_file({name: X.contiguous() for name, X in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder / "model.safetensors", lambda: read_checkpoint(folder)

    return quantised


def _state(folder):
    """The quant_state of bitsandbytes, which is JSON in a tensor."""
    about = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 16], "nested_blocksize": 256}
    about |= {"nested_dtype": "float32", "nested_offset": 0.1}
    (folder / "state.json").write_text(json.dumps(about))

    def read():
        text = (folder / "state.json").read_bytes()
        parts = {
            "a.weight": torch.zeros(64, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(2, dtype=torch.uint8),
            "a.weight.quant_map": torch.linspace(-1, 1, 16), "a.weight.nested_absmax": torch.ones(1),
            "a.weight.nested_quant_map": torch.linspace(-1, 1, 256),
            "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
        }  # fmt: skip
        checkpoint = open_checkpoint(parts)
        assert all(tuple(checkpoint[name].shape) == checkpoint.entries[name].shape for name in checkpoint)

    return folder / "state.json", read


GPTQ = gptq_matrix(matrix(16, 64), 4, 32)[0]
FLOAT8 = {"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
MLX = {
    "a.weight": torch.zeros(8, 8, dtype=torch.uint32),
    "a.scales": torch.ones(8, 2),
    "a.biases": torch.ones(8, 2),
}


def _adapter(folder):
    base = open_checkpoint({f"layer.{i}.weight": torch.ones(6, 4) for i in range(2)})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {r"layer\.(0|2)+": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    factors = {}
    for i in range(2):
        factors[f"base_model.model.layer.{i}.lora_A.weight"] = torch.randn(2, 4)
        factors[f"base_model.model.layer.{i}.lora_B.weight"] = torch.randn(6, 2)
    save_file(factors, folder / "adapter_model.safetensors")
    return lambda: dict(open_tuned(folder, base))


def adapter_config(folder):
    return folder / "adapter_config.json", _adapter(folder)


def adapter_weights(folder):
    return folder / "adapter_model.safetensors", _adapter(folder)


def _table(name, content):
    def table(folder):
        (folder / name).write_bytes(content)
        return folder / name, lambda: list(read_table(folder / name, ["text", "label"]))

    return table


def parquet_table(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "t.parquet"
    pq.write_table(pa.table({"text": ["good", "bad"] * 20, "label": [1, 0] * 20}), path)
    return path, lambda: list(read_table(path, ["text", "label"]))


def scores(folder):
    (folder / "s.csv").write_text("pair,accuracy\na,0.5\nb,0.75\n")
    return folder / "s.csv", lambda: read_scores(folder / "s.csv")


def experiments(folder):
    row = {"cell": {"a": 1}, "values": {"x": 0.5}, "seconds": 1.0, "written": "2026", "commit": None}
    (folder / "rows.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    (folder / "manifest.json").write_text(json.dumps({"cells": 1, "config": {}, "runs": []}))
    return folder / "rows.jsonl", lambda: read_experiments(folder)


def manifest(folder):
    about = {"tuned": {"source": "t"}, "matrices": ["w"], "notes": [], "skipped": []}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "config": {"base": "x"}, "pairs": {"t": about}}))
    return folder / "manifest.json", lambda: load(folder).manifest["pairs"]


READERS = (
    _quantised_parts(GPTQ, quantization_config={"quant_method": "gptq", "bits": 4}), _state,
    _quantised_parts(FLOAT8), _quantised_parts(MLX, quantization={"group_size": 32, "bits": 4}),
    npz, safetensors, archive, bare_pickle, index, config, onnx, onnx_outside, gguf, gguf_quantised, adapter_config,
    adapter_weights, parquet_table, scores, experiments, manifest,
    _table("t.csv", b"text,label\n" + 10 * b'"a, b",1\nplain,0\n'),
    _table("t.tsv", b"text\tlabel\n" + 10 * b"a b\t1\nplain\t0\n"),
    _table("t.jsonl", 10 * b'{"text": "a", "label": 1}\n'),
    _table("t.json", b'[{"text": "a", "label": 1}, {"text": "b", "label": 0}]'),
)  # fmt: skip
NAMES = [f"{reader.__name__} {i}" for i, reader in enumerate(READERS)]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("mutations", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS, ids=NAMES)
def test_mutated_files_are_read_or_refused(tmp_path, reader, mutations):
    path, read = reader(tmp_path)
    content = path.read_bytes()
    with suppress(InputError):  # quantised
        read()
    refused = 0
    with little_memory():
        for seed in range(mutations):
            path.write_bytes(mutated(content, random.Random(seed)))
            try:
                read()
            except InputError as error:
                refused += 1
                assert "\n" not in str(error), seed  # noqa: PT017
            except BaseException as error:
                error.add_note(f"mutation {seed}")
                raise
    assert refused > mutations // 20 or reader is config  # which is ignored with a note where it is none
