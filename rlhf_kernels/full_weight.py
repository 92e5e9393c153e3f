"""The whole weight of a head whose rows are spread over data-parallel ranks (FSDP2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.autograd import once_differentiable


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        return grad * ctx.factor, None


def full_weight(weight: Tensor, *, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """Gather a sharded parameter; its gradient is reduced over the ranks and sharded again.

    Each rank has its own tokens, as in data parallelism. ``linear_logprob`` and
    ``linear_token_loss`` do this themselves with a DTensor; call it to use one gathered weight
    several times, or to have the sum. The whole weight lives until the backward is done.

    Args:
        weight: DTensor, such as a parameter of a module after ``fully_shard`` (outside of the
            module's own forward); any other tensor is returned as it is.
        reduce: the gradient is the mean over the ranks, as FSDP2 has it, or the sum.

    Returns:
        The whole weight on this rank. All ranks have to call, and to run the backward.

    Raises:
        ValueError: another ``reduce``.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected mean or sum, got {reduce!r}")
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    mesh, shards = weight.device_mesh, weight
    if reduce == "mean":
        shards = _ScaleGradient.apply(weight, 1 / mesh.size())
    return shards.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
