"""What the Triton kernels share: how they are launched, dense inputs, numbers.

Conventions of every ``<op>_triton.py``: grids have one dimension; offsets are int64 from the first
product on; sizes and numbers are not specialised, so nothing recompiles when they change; numbers
come as float64 and are rounded in the kernel; an optional tensor is None, which the compiler folds;
nothing is contracted to a fused multiply-add that is not written as one (``enable_fp_fusion``), so
that an expression has the same bits in every kernel.
"""

from __future__ import annotations

import os
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run ``programs`` programs of a kernel, in one dimension."""
    if programs > 0:
        kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


def architecture(device: torch.device) -> str:
    """What a kernel's tiles are chosen by: ``"sm_90"``, ``"gfx942"``, or ``"interpreter"``."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@overload
def dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def dense(x: None, dtype: torch.dtype | None = None) -> None: ...
@overload
def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...
def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A contiguous tensor of ``dtype`` from a multiple of 16 bytes on, as wide loads want it.

    For (B, T)-sized tensors, which may be copied, never a vocabulary-sized one.
    """
    if x is None:
        return None
    x = x.to(dtype or x.dtype).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def check_tokens(tokens: Tensor, vocab: int, ignore_index: int) -> None:
    """With RLHF_KERNELS_CHECK=1: raise for a token out of range. It waits for the device."""
    if os.environ.get("RLHF_KERNELS_CHECK") != "1":
        return
    wrong = ((tokens < 0) | (tokens >= vocab)) & (tokens != ignore_index)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"tokens: expected a value in [0, {vocab}) or ignore_index, got {int(tokens[at])} at "
            f"position {at[0] if len(at) == 1 else at}"
        )


@triton.jit
def number(x, TYPE: tl.constexpr):
    """A float64 argument, rounded to TYPE (the interpreter passes a Python float)."""
    return tl.full([], x, TYPE)
