"""Files that change under a reader: one line that names them, in every format, and never the end of the process."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError

W = torch.arange(4096.0).reshape(64, 64)


def save_safetensors(path, tensor):
    save_file({"w": tensor}, path)


def save_zip(path, tensor):
    torch.save({"w": tensor}, path)


def save_pickle(path, tensor):
    torch.save({"w": tensor}, path, _use_new_zipfile_serialization=False)


def save_onnx(path, tensor):
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(tensor.numpy(), "w")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=[weight])), str(path))


def save_gguf(path, tensor):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("w", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FORMATS = [
    pytest.param(save_safetensors, "m.safetensors", id="safetensors"),
    pytest.param(save_zip, "m.pt", id="zip"),
    pytest.param(save_pickle, "m.bin", id="pickle"),
    pytest.param(save_onnx, "m.onnx", id="onnx"),
    pytest.param(save_gguf, "m.gguf", id="gguf"),
]


@pytest.mark.parametrize(("save", "name"), FORMATS)
@pytest.mark.parametrize("how", ["other weights, same size and time", "cut off", "removed", "replaced"])
def test_a_file_that_changed_since_it_was_opened_is_not_read(tmp_path, save, name, how):
    path = tmp_path / name
    save(path, W)
    os.utime(path, (1e9, 1e9))
    size = path.stat().st_size
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint["w"], W)
    if how == "cut off":
        os.truncate(path, 64)
    elif how == "removed":
        path.unlink()
    elif how == "replaced":
        save(tmp_path / "other", W)
        os.utime(tmp_path / "other", (1e9, 1e9))
        (tmp_path / "other").replace(path)
    else:
        save(path, 3 * W)
        os.utime(path, (1e9, 1e9))
        assert path.stat().st_size == size
    with pytest.raises(InputError, match=r"changed while it was being read|cannot be read") as error:
        checkpoint["w"]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["a matrix", "a kernel", "one of a stack"])
def test_numbers_that_were_read_outlive_a_file_that_is_cut_off(tmp_path, how):
    """In a process of its own: a mapped page that is gone ends the process."""
    shape = {"a matrix": (512, 512), "a kernel": (64, 64, 8, 8), "one of a stack": (2, 512, 512)}[how]
    for name, save in (("m.safetensors", save_safetensors), ("m.pt", save_zip)):
        save(tmp_path / name, torch.ones(shape))
        script = (
            "import os, sys\nfrom specbasis.architecture.key import MatrixKey, MatrixRef\n"
            "from specbasis.checkpoint import open_checkpoint\n"
            "stored = open_checkpoint(sys.argv[1])\nexpert = int(sys.argv[2]) if sys.argv[2] else None\n"
            "W = MatrixRef(MatrixKey(None, 'other', 'w'), 'w', (512, 512), expert=expert).read(stored)\n"
            "os.truncate(sys.argv[1], 0)\nprint(float(W.sum()))"
        )
        expert = "1" if how == "one of a stack" else ""
        ran = subprocess.run(
            [sys.executable, "-c", script, tmp_path / name, expert], capture_output=True, text=True, check=False
        )
        assert (ran.returncode, ran.stdout.strip()) == (0, str(float(512 * 512))), ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse such names")
@pytest.mark.parametrize(("save", "name"), FORMATS)
def test_a_name_that_is_not_utf_8_is_said_to_be_that(tmp_path, save, name):
    save(tmp_path / name, W)
    (tmp_path / name).rename(path := tmp_path / f"\udcff{name}")
    with pytest.raises(InputError, match="a name that is not UTF-8"):
        open_checkpoint(path)
