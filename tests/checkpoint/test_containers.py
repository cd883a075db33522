"""Containers beside the usual ones: NumPy archives are read, shares of processes refused with a command."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError


def refused(source, match):
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_archives(tmp_path, save):
    random = np.random.default_rng(0)
    W = random.normal(size=(6, 4)).astype(np.float32)
    arrays = {
        "a.weight": W, "turned": np.asfortranarray(W), "swapped": W.astype(">f4"), "half": W.astype(np.float16),
        "step": np.int64(7), "words": np.array(["a", "b"]),
    }  # fmt: skip
    save(tmp_path / "m.npz", **arrays)
    for source in (tmp_path, tmp_path / "m.npz"):
        checkpoint = open_checkpoint(source)
        for name in ("a.weight", "turned", "swapped", "half"):
            assert checkpoint.entries[name].is_float
            assert checkpoint.entries[name].shape == (6, 4)
            assert np.array_equal(checkpoint[name].numpy(), arrays[name])
        assert checkpoint["step"] == torch.tensor(7)
        assert not checkpoint.entries["words"].is_float
        with pytest.raises(InputError, match="not numbers"):
            checkpoint["words"]


def test_pickled_objects_in_a_numpy_archive_are_not_loaded(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.ones((2, 2)), b=np.array([print], dtype=object))
    checkpoint = open_checkpoint(tmp_path / "m.npz")
    assert checkpoint.entries["a"].is_float
    with pytest.raises(InputError, match="not numbers"):
        checkpoint["b"]


def test_numpy_archives_that_lie(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros((10_000, 1000), np.float32))
    refused(tmp_path / "bomb.npz", "unpacks to more than")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.npz", "truncated or corrupted")
    np.savez(tmp_path / "m.npz", a=np.ones((2, 2), np.float32))
    content = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "m.npz").write_bytes(content.replace(b"(2, 2)", b"(9, 9)"))
    refused(tmp_path / "m.npz", "truncated or corrupted")


SHARES = {
    "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt": "zero_to_fp32.py",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "zero_to_fp32.py",
    "__0_0.distcp": "dcp_to_torch",
    "pytorch_model_fsdp_0/__0_0.distcp": "dcp_to_torch",
    "manifest.ocdbt": "save_fil",
    "model.keras": "numpy.savez",
}


@pytest.mark.parametrize("share", SHARES)
def test_shares_of_processes_are_refused_with_the_command_that_joins_them(tmp_path, share):
    path = tmp_path / share
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"PK and more")
    if path.parent == tmp_path:
        torch.save({"module": {"a.weight": torch.ones(2, 2)}}, tmp_path / "mp_rank_00_model_states.pt")
    refused(tmp_path, re.escape(SHARES[share]))


def test_whole_weights_beside_such_shares_are_read(tmp_path):
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path)) == ["a.weight"]


@pytest.mark.parametrize(
    "names",
    [
        (
            "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight",
        ),
        ("unet.down_blocks.0.to_q.lora.down.weight", "unet.down_blocks.0.to_q.lora.up.weight"),
        ("unet.processor.to_q_lora.down.weight", "unet.processor.to_q_lora.up.weight"),
    ],
)
def test_loras_without_a_configuration_are_refused(tmp_path, names):
    module = names[0].partition(".")[0]
    factors = {names[0]: torch.ones(2, 8), names[1]: torch.ones(8, 2), f"{module}.alpha": torch.tensor(2.0)}
    save_file(factors, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", r"factors of a LoRA .*fuse_lora")
    save_file(factors | {"a.weight": torch.ones(8, 8)}, tmp_path / "lora.safetensors")
    assert "a.weight" in open_checkpoint(tmp_path / "lora.safetensors")
