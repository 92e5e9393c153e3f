"""masked_whiten: zero mean and unit variance over the valid elements, optionally over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.masked_mean import AllReduceSum, all_reduce, masked_mean_reference
from rlhf_kernels.opspec import Maker, OpSpec, Sample


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the valid elements; 0 elsewhere.

    The variance is the mean squared deviation from the mean, in two passes: E[x^2] - mean^2 loses
    all digits at a large offset. A single valid element has variance 0 and becomes 0 (plus mean).

    Args:
        x: any shape; bf16, fp16, fp32 or fp64.
        mask: the same shape, non-zero where valid; x is not read elsewhere.
        shift_mean: False adds the mean back, so that only the scale changes.
        unbiased: divide the squared deviations by n - 1 instead of n.
        eps: number > 0, added to the variance.
        process_group: mean and variance over the elements of all its ranks, whose shards may differ
            in size or be empty. Every rank has to call, and to run the backward if one does: it
            gives the gradient of the sum of the ranks' losses, which is what frameworks that
            average gradients over ranks expect.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        The shape of x, float32 (float64 for float64 input), differentiable with respect to x (also
        through mean and variance).

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("x", x)
    checks.mask("mask", mask, x.shape, "to match x", x.device)
    checks.number("eps", eps, 0.0, open_low=True)
    chosen = _backend.select("masked_whiten", x.device.type, backend)
    x = x.to(checks.accumulation_dtype(x))
    if chosen == "reference":
        (eps,) = checks.graph_numbers(x, x.dtype, eps)
        return masked_whiten_reference(x, mask, shift_mean, unbiased, eps, process_group)
    (eps,), numbers = checks.separated(float(eps))
    whitened: Tensor = _MaskedWhiten.apply(
        chosen, x, mask.detach(), shift_mean, unbiased, eps, numbers, process_group
    )
    return whitened


def masked_whiten_reference(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    valid = mask.bool()
    mean = masked_mean_reference(x, valid, process_group)
    deviation = torch.where(valid, torch.where(valid, x, 0.0) - mean, 0.0)
    squares, count = AllReduceSum.apply(
        torch.stack([(deviation * deviation).sum(), valid.sum().to(x.dtype)]), process_group
    ).unbind()
    variance = squares / (count - int(unbiased)).clamp(min=1.0)
    whitened = deviation * torch.rsqrt(variance + eps)
    return torch.where(valid, whitened if shift_mean else whitened + mean, 0.0)


# sums = (sum of x, count) comes from masked_mean_fwd. Forward: read N three times (sum, squares,
# result), write N. Backward: read 2N twice, write N, with d = x - mean, s = sqrt(var + eps), D the
# divisor of the variance:
#   grad_x = g / s - d sum(g d) / (D s^3) - (1 / s - (0 if shift_mean else 1)) sum(g) / n
_FLAGS = "bool shift_mean, bool unbiased, float eps"
_backend.define(
    "masked_whiten",
    {
        "masked_whiten_squares": (
            "(Tensor x, Tensor mask, Tensor sums) -> Tensor",
            lambda x, mask, sums: sums.new_empty((1,)),
        ),
        "masked_whiten_fwd": (
            f"(Tensor x, Tensor mask, Tensor sums, Tensor squares, {_FLAGS}) -> Tensor",
            lambda x, *rest: x.new_empty(x.shape),
        ),
        "masked_whiten_bwd_sums": (
            "(Tensor grad, Tensor x, Tensor mask, Tensor sums) -> Tensor",
            lambda grad, x, mask, sums: sums.new_empty((2,)),
        ),
        "masked_whiten_bwd": (
            "(Tensor grad, Tensor x, Tensor mask, Tensor sums, Tensor squares, Tensor grad_sums, "
            f"{_FLAGS}) -> Tensor",
            lambda grad, x, *rest: x.new_empty(x.shape),
        ),
    },
)


class _MaskedWhiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, x, mask, shift_mean, unbiased, eps, numbers, group):
        ctx.ops = ops = _backend.operators[backend]
        sums = all_reduce(ops.masked_mean_fwd(x, mask)[1], group)
        squares = all_reduce(ops.masked_whiten_squares(x, mask, sums), group)
        ctx.save_for_backward(x, mask, sums, squares, numbers)
        ctx.backend, ctx.scalars = backend, (shift_mean, unbiased, eps)
        ctx.group = group
        ctx.set_materialize_grads(False)
        arguments = (numbers, x, mask, sums, squares, *ctx.scalars)
        return _backend.call(backend, "masked_whiten_fwd", *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        if grad is None:
            return (None,) * 8
        x, mask, sums, squares, numbers = ctx.saved_tensors
        grad_sums = all_reduce(ctx.ops.masked_whiten_bwd_sums(grad, x, mask, sums), ctx.group)
        arguments = (numbers, grad, x, mask, sums, squares, grad_sums, *ctx.scalars)
        grad_x = _backend.call(ctx.backend, "masked_whiten_bwd", *arguments)
        return None, grad_x, *(None,) * 6


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, **extra: Any) -> Sample:
        return Sample({"x": make.randn(*shape), "mask": make.mask(*shape), **extra}, why)

    for shift_mean in (True, False):
        for unbiased in (True, False):
            flags = {"shift_mean": shift_mean, "unbiased": unbiased}
            yield case("37: two vectors and a rest", 37, **flags)
    yield case("9001: several blocks and a rest", 9001)
    yield case("three dimensions, large eps", 3, 5, 7, eps=0.1)
    yield case("two numbers", 2, mask=make.tensor([True, True], torch.bool))
    yield case("nothing", 0, 4)
    yield case("nothing valid", 2, 5, mask=torch.zeros_like(make.mask(2, 5)), shift_mean=False)
    yield case("integer mask", 4, 9, mask=make.integers(3, 4, 9))
    yield case("transposed", 6, 5, x=make.randn(5, 6).T)


def _bench(make: Maker) -> Iterator[Sample]:
    yield Sample({"x": make.randn(64, 1024), "mask": make.mask(64, 1024)}, "64 x 1024")


SPEC = OpSpec(
    name="masked_whiten",
    function=masked_whiten,
    samples=_samples,
    bench=_bench,
    differentiable=("x",),
)
