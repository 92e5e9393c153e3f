"""The whole weight of a head that is spread over data-parallel ranks: FSDP2, DeepSpeed's ZeRO-3."""

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


class _OfZero3(torch.autograd.Function):
    """What is gathered now stays with the view, when the parameter lets go of it."""

    @staticmethod
    def forward(ctx: Any, weight, factor):
        ctx.weight, ctx.factor = weight, factor
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        if ctx.weight.numel() == 0:
            _lend_shape(ctx.weight)
        return (grad if ctx.factor == 1 else grad * ctx.factor), None


def _lend_shape(weight: Any) -> None:
    """Until its gradient is accumulated: that looks at the parameter's shape, not at its data, and
    to gather the data once more would cost a transfer. DeepSpeed's hooks run before ours."""
    empty, stand_in = weight.data, weight.data.new_empty(1).expand(weight.ds_shape)

    def give_back(parameter: Any) -> None:
        handle.remove()
        if parameter.data.data_ptr() == stand_in.data_ptr():  # not gathered by a tied embedding
            parameter.data = empty

    weight.data = stand_in
    handle = weight.register_post_accumulate_grad_hook(give_back)


def full_weight(weight: Tensor, *, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """Gather a sharded parameter; its gradient is reduced over the ranks and sharded again.

    Each rank has its own tokens, as in data parallelism. ``linear_logprob`` and
    ``linear_token_loss`` do this themselves; call it to use one gathered weight several times, or
    to have the sum. The whole weight lives until the backward is done.

    Args:
        weight: DTensor, such as a parameter of a module after ``fully_shard`` (outside of the
            module's own forward), or a parameter that DeepSpeed has partitioned (ZeRO-3); any other
            tensor is returned as it is.
        reduce: the gradient is the mean over the ranks, as FSDP2 and DeepSpeed have it, or the sum.

    Returns:
        The whole weight on this rank. All ranks have to call, and to run the backward.

    Raises:
        ValueError: another ``reduce``.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected mean or sum, got {reduce!r}")
    if hasattr(weight, "ds_id"):
        import deepspeed

        # Where a module holds it gathered, that module lets go of it.
        here = weight.numel() == 0
        with deepspeed.zero.GatheredParameters([weight], enabled=here):
            group: Any = getattr(weight, "ds_process_group")  # noqa: B009
            ranks = 1 if reduce == "mean" else torch.distributed.get_world_size(group)
            return _OfZero3.apply(weight, ranks)
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    mesh, shards = weight.device_mesh, weight
    if reduce == "mean":
        shards = _ScaleGradient.apply(weight, 1 / mesh.size())
    return shards.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
