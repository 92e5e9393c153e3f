"""Whether our kernels can serve a call of a host's function: what all adapters ask first."""

from __future__ import annotations

import os

import torch

from rlhf_kernels import backend


def has_kernels(op: str, device: str) -> bool:
    """Compiled kernels run ``op`` on this type of device, and no other backend is asked for."""
    names = {"cpu": ("cpu", "triton")[: 1 + backend.INTERPRETING], "cuda": ("triton", "cuda")}
    asked = os.environ.get("RLHF_KERNELS_BACKEND")
    return any(
        asked in (None, "", name) and backend.why_not(op, name) is None
        for name in names.get(device, ())
    )


def in_torch_func() -> bool:
    """Inside of a transform of torch.func (grad, vmap), unknown to our autograd functions."""
    if torch.compiler.is_compiling():  # which traces the transform as well
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None
