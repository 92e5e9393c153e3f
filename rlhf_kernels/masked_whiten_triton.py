"""masked_whiten in Triton: squared deviations, the result, and the gradient from two sums.

The mean is a float64 number; its deviations are taken in float32 with the mean in two parts, which
rounds them as float64 would. Neither deviations nor a selected copy of x are written. Forward reads
N twice after masked_mean_fwd and writes N, backward reads 2N twice and writes N; all read the mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import triton_common
from rlhf_kernels.aggregation_triton import (
    load_valid,
    store_tokens,
    sum_wide,
    valid_tokens,
)
from rlhf_kernels.checks import accumulation_dtype
from rlhf_kernels.masked_mean_triton import BLOCK, WARPS, add_up


@triton.jit
def mean_parts(sums, TYPE: tl.constexpr):
    """(count, at least 1; the mean in TYPE; what is left of it)."""
    count = tl.maximum(tl.load(sums + 1), 1.0)
    mean = tl.load(sums) / count
    return count, mean.to(TYPE), (mean - mean.to(TYPE).to(tl.float64)).to(TYPE)


@triton.jit
def inverse_deviation(squares, count, eps, UNBIASED: tl.constexpr, TYPE: tl.constexpr):
    """(1 / sqrt(variance + eps), the divisor of the variance)."""
    divisor = count
    if UNBIASED:
        divisor = tl.where(count > 1.0, count - 1.0, count)
    divisor = divisor.to(TYPE)
    variance = tl.load(squares).to(TYPE) / divisor
    return 1.0 / tl.sqrt(variance + triton_common.number(eps, TYPE)), divisor


@triton.jit
def masked_whiten_sums_block(
    x, grad, mask, partials, stride, begin, end, mean, rest, TYPE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    valid = valid_tokens(mask, begin, end, BLOCK, WHOLE)
    d = load_valid(x, begin, end, valid, TYPE, BLOCK, WHOLE) - mean - rest
    if grad is None:
        tl.store(partials, sum_wide(tl.where(valid, d * d, 0.0), BLOCK))
    else:
        g = load_valid(grad, begin, end, valid, TYPE, BLOCK, WHOLE)
        tl.store(partials, sum_wide(g, BLOCK))
        tl.store(partials + stride, sum_wide(g * d, BLOCK))


@triton.jit(do_not_specialize=["n", "blocks"])
def masked_whiten_sums_kernel(
    x,
    grad,
    mask,
    sums,
    partials,
    n: tl.int64,
    blocks: tl.int64,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of (x - mean)^2; with grad, of grad and of grad (x - mean)."""
    block, n, stride = tl.program_id(0).to(tl.int64), n.to(tl.int64), blocks.to(tl.int64)
    begin = block * BLOCK
    _, mean, rest = mean_parts(sums, TYPE)
    out = partials + block
    if begin + BLOCK <= n:
        masked_whiten_sums_block(
            x, grad, mask, out, stride, begin, n, mean, rest, TYPE, BLOCK, True
        )
    else:
        masked_whiten_sums_block(
            x, grad, mask, out, stride, begin, n, mean, rest, TYPE, BLOCK, False
        )


def masked_whiten_sums(x: Tensor, grad: Tensor | None, mask: Tensor, sums: Tensor) -> Tensor:
    n = x.numel()
    partials = sums.new_empty((1 if grad is None else 2, triton.cdiv(n, BLOCK)))
    triton_common.launch(
        masked_whiten_sums_kernel,
        partials.shape[1],
        triton_common.dense(x),
        triton_common.dense(grad),
        triton_common.dense(mask, torch.bool),
        sums,
        partials,
        n,
        partials.shape[1],
        num_warps=WARPS,
        TYPE=triton_common.TYPES[accumulation_dtype(x)],
        BLOCK=BLOCK,
    )
    return add_up(partials)


def masked_whiten_squares(x: Tensor, mask: Tensor, sums: Tensor) -> Tensor:
    """The sum of (x - mean)^2, as (1,)."""
    return masked_whiten_sums(x, None, mask, sums)


def masked_whiten_bwd_sums(grad: Tensor, x: Tensor, mask: Tensor, sums: Tensor) -> Tensor:
    """The sums of grad and of grad (x - mean), as (2,)."""
    return masked_whiten_sums(x, grad, mask, sums)


@triton.jit
def masked_whiten_block(
    x, grad, mask, out, begin, end, mean, rest, scale, slope, shift, SHIFT_MEAN: tl.constexpr,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    valid = valid_tokens(mask, begin, end, BLOCK, WHOLE)
    y = (load_valid(x, begin, end, valid, TYPE, BLOCK, WHOLE) - mean - rest) * scale
    if grad is not None:
        g = load_valid(grad, begin, end, valid, TYPE, BLOCK, WHOLE)
        y = (g - y * slope) * scale - shift
    elif not SHIFT_MEAN:
        y = y + rest + mean
    store_tokens(out, begin, end, tl.where(valid, y, 0.0), BLOCK, WHOLE)


@triton.jit(do_not_specialize=["eps", "n"])
def masked_whiten_kernel(
    x,
    grad,
    mask,
    sums,
    squares,
    grad_sums,
    out,
    eps: tl.float64,
    n: tl.int64,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The result, or with grad the gradient, both of them linear in y = (x - mean) scale:

    (g - y scale sum(g d) / D) scale - sum(g) / n (scale - (0 if SHIFT_MEAN else 1)).
    """
    begin, n = tl.program_id(0).to(tl.int64) * BLOCK, n.to(tl.int64)
    count, mean, rest = mean_parts(sums, TYPE)
    scale, divisor = inverse_deviation(squares, count, eps, UNBIASED, TYPE)
    slope, shift = scale, scale
    if grad is not None:
        slope = tl.load(grad_sums + 1).to(TYPE) * scale / divisor
        shift = (tl.load(grad_sums) / count).to(TYPE) * (scale if SHIFT_MEAN else scale - 1.0)
    if begin + BLOCK <= n:
        masked_whiten_block(
            x, grad, mask, out, begin, n, mean, rest, scale, slope, shift,
            SHIFT_MEAN, TYPE, BLOCK, True,
        )  # fmt: skip
    else:
        masked_whiten_block(
            x, grad, mask, out, begin, n, mean, rest, scale, slope, shift,
            SHIFT_MEAN, TYPE, BLOCK, False,
        )  # fmt: skip


def masked_whiten_fwd(
    x: Tensor,
    mask: Tensor,
    sums: Tensor,
    squares: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    """(x - mean) / sqrt(var + eps), and the mean added back without shift_mean; 0 where masked."""
    return _apply(x, None, mask, sums, squares, None, shift_mean, unbiased, eps)


def masked_whiten_bwd(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    sums: Tensor,
    squares: Tensor,
    grad_sums: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    """The gradient of x: the formula in masked_whiten.py."""
    return _apply(x, grad, mask, sums, squares, grad_sums, shift_mean, unbiased, eps)


def _apply(
    x: Tensor,
    grad: Tensor | None,
    mask: Tensor,
    sums: Tensor,
    squares: Tensor,
    grad_sums: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    dtype, n = accumulation_dtype(x), x.numel()
    out = x.new_empty(x.shape, dtype=dtype)
    triton_common.launch(
        masked_whiten_kernel,
        triton.cdiv(n, BLOCK),
        triton_common.dense(x),
        triton_common.dense(grad),
        triton_common.dense(mask, torch.bool),
        sums,
        squares,
        grad_sums,
        out,
        eps,
        n,
        num_warps=WARPS,
        SHIFT_MEAN=shift_mean,
        UNBIASED=unbiased,
        TYPE=triton_common.TYPES[dtype],
        BLOCK=BLOCK,
    )
    return out
