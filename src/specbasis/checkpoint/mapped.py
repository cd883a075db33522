"""Tensors whose memory is mapped from a file: a copy that outlives the file, and that does not end the process."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specbasis.core.errors import InputError


class _Range(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


@cache
def _process_vm_readv() -> Callable[..., int] | None:
    """The system call that copies memory of a process, here of this one; None where the system has none."""
    try:
        call: Any = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (AttributeError, OSError, TypeError):  # macOS; musl; Windows
        return None
    ranges = (ctypes.POINTER(_Range), ctypes.c_ulong)
    call.restype = ctypes.c_ssize_t
    call.argtypes = (ctypes.c_int, *ranges, *ranges, ctypes.c_ulong)
    return call  # type: ignore[no-any-return]


def copied(tensor: Tensor, name: str) -> Tensor:
    """A strided tensor on the CPU in memory of its own, equal to the given one.

    A page of a mapped file that is gone, as the file was cut off, ends a process that reads it by SIGBUS. The copy
    is therefore left to the kernel, which fails instead. Where the system has no such call, or forbids it, this is
    `Tensor.clone`.

    Raises:
        InputError: a page is gone; `name` says of what.
    """
    call = _process_vm_readv()
    if call is None or not tensor.numel() or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_conj():
        return tensor.clone()
    spread = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    copy = torch.empty(spread, dtype=tensor.dtype)
    done, size = 0, spread * tensor.element_size()
    while done < size:  # one call copies 2 GB at most
        target, source = (_Range(X.data_ptr() + done, size - done) for X in (copy, tensor))
        count = call(os.getpid(), ctypes.byref(target), 1, ctypes.byref(source), 1, 0)
        if count <= 0:
            if ctypes.get_errno() != errno.EFAULT:
                return tensor.clone()
            raise InputError(
                f"{name}: its file was cut off while it was being read; run again when nothing writes to it"
            )
        done += count
    return copy.as_strided(tensor.shape, tensor.stride())
