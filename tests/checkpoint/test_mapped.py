"""Copies of mapped tensors: equal to them, and no end of the process where the file is gone."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from specbasis.checkpoint import mapped

X = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


@given(
    order=st.permutations(range(4)),
    dtype=st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool]),
    first=st.integers(0, 2),
    step=st.integers(1, 3),
)
def test_a_copy_equals_any_view_and_shares_nothing_with_it(order, dtype, first, step):
    view = X.to(dtype).permute(order)[..., first::step]
    copy = mapped.copied(view, "w")
    assert copy.dtype == dtype
    assert torch.equal(copy, view)
    assert not view.numel() or copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


@pytest.mark.parametrize("tensor", [torch.empty(0, 3), torch.tensor(2.0), torch.ones(1).expand(3, 4)])
def test_copies_of_no_number_of_one_and_of_a_repeated_one(tensor):
    assert torch.equal(mapped.copied(tensor, "w"), tensor)


def test_where_the_system_has_no_such_call_it_is_a_clone(monkeypatch):
    monkeypatch.setattr(mapped, "_process_vm_readv", lambda: None)
    assert torch.equal(mapped.copied(X.mT, "w"), X.mT)


def test_where_the_call_is_forbidden_it_is_a_clone(monkeypatch):
    monkeypatch.setattr(mapped, "_process_vm_readv", lambda: lambda *_: -1)
    mapped.ctypes.set_errno(mapped.errno.EPERM)
    assert torch.equal(mapped.copied(X.mT, "w"), X.mT)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's copy is Linux's")
@pytest.mark.parametrize("left", [0, 4096, 40_000])
def test_a_file_that_was_cut_off_is_one_line(tmp_path, left):
    """In a process of its own: reading the page here would end it."""
    path = tmp_path / "w"
    path.write_bytes(bytes(400_000))
    script = (
        "import os, sys, torch\nfrom specbasis.checkpoint.mapped import copied\n"
        "X = torch.from_file(sys.argv[1], shared=False, size=100_000)\nos.truncate(sys.argv[1], int(sys.argv[2]))\n"
        "try:\n    copied(X, 'w')\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, path, str(left)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (
        0,
        "InputError w: its file was cut off while it was being read; run again when nothing writes to it\n",
    ), ran.stderr
