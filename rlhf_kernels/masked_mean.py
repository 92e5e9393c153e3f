"""masked_mean: mean over the valid elements, optionally over all ranks of a process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.opspec import Maker, OpSpec, Sample


def masked_mean(
    x: Tensor,
    mask: Tensor,
    *,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean of x where the mask is set; 0 when nothing is.

    Args:
        x: any shape; bf16, fp16, fp32 or fp64.
        mask: the same shape, non-zero where valid; x is not read elsewhere.
        process_group: take the mean over the elements of all its ranks: sum and count are reduced,
            so shards may differ in size or be empty. Every rank has to call, and to run the
            backward if one does: it gives the gradient of the sum of the ranks' losses, which is
            what frameworks that average gradients over ranks expect.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        One number (a tensor without dimensions), float32 (float64 for float64 input),
        differentiable with respect to x.

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("x", x)
    checks.mask("mask", mask, x.shape, "to match x", x.device)
    chosen = _backend.select("masked_mean", x.device.type, backend)
    if chosen == "reference":
        return masked_mean_reference(x, mask, process_group)
    mean: Tensor = _MaskedMean.apply(
        chosen, x.to(checks.accumulation_dtype(x)), mask.detach(), process_group
    )
    return mean


def masked_mean_reference(
    x: Tensor, mask: Tensor, process_group: dist.ProcessGroup | None
) -> Tensor:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    z = torch.where(mask.bool(), x.to(checks.accumulation_dtype(x)), 0.0)
    sums = torch.stack([z.sum(), mask.bool().sum().to(z.dtype)])
    total, count = AllReduceSum.apply(sums, process_group).unbind()
    return total / count.clamp(min=1.0)


class AllReduceSum(torch.autograd.Function):
    """Sum over the ranks of a process group (None: this process alone), differentiable."""

    @staticmethod
    def forward(ctx: Any, x, group):
        ctx.group = group
        return all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad):
        return AllReduceSum.apply(grad, ctx.group), None


def all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x, summed in place over the ranks; all of them take part, with or without valid elements."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


# sums = (sum of x, count of valid elements) in float64: counts stay exact, and the mean at a large
# offset keeps its digits. Forward: read N (and the mask). Backward: write N.
_backend.define(
    "masked_mean",
    {
        "masked_mean_fwd": (
            "(Tensor x, Tensor mask) -> (Tensor mean, Tensor sums)",
            lambda x, mask: (x.new_empty(()), x.new_empty((2,), dtype=torch.float64)),
        ),
        "masked_mean_bwd": (
            "(Tensor grad, Tensor mask, Tensor sums) -> Tensor",
            lambda grad, mask, sums: grad.new_empty(mask.shape),
        ),
    },
)


class _MaskedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, x, mask, group):
        ctx.ops = _backend.operators[backend]
        mean, sums = ctx.ops.masked_mean_fwd(x, mask)
        if group is not None:
            total, count = all_reduce(sums, group).unbind()
            mean = (total / count.clamp(min=1.0)).to(x.dtype)
        ctx.save_for_backward(mean, mask, sums)
        ctx.group = group
        ctx.set_materialize_grads(False)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        if grad is None:
            return (None,) * 4
        if ctx.group is not None:
            grad = all_reduce(grad.clone(), ctx.group)
        return None, ctx.ops.masked_mean_bwd(grad, *ctx.saved_tensors[1:]), None, None


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, **extra: Any) -> Sample:
        return Sample({"x": make.randn(*shape), "mask": make.mask(*shape), **extra}, why)

    yield case("37: two vectors and a rest", 37)
    yield case("9001: several blocks and a rest", 9001)
    yield case("three dimensions", 3, 5, 7)
    yield case("one number", mask=make.tensor(True, torch.bool))
    yield case("nothing", 0, 4)
    yield case("nothing valid", 2, 5, mask=torch.zeros_like(make.mask(2, 5)))
    yield case("integer mask", 4, 9, mask=make.integers(3, 4, 9))
    yield case("transposed", 6, 5, x=make.randn(5, 6).T)


def _bench(make: Maker) -> Iterator[Sample]:
    yield Sample({"x": make.randn(64, 1024), "mask": make.mask(64, 1024)}, "64 x 1024")


SPEC = OpSpec(
    name="masked_mean",
    function=masked_mean,
    samples=_samples,
    bench=_bench,
    differentiable=("x",),
)
