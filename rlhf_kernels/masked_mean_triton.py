"""masked_mean in Triton: sum and count of the valid elements in one pass, in float64.

Blocks write partial sums, which one program adds up in fixed order; no selected copy of x exists.
Forward reads N and the mask, backward reads the mask and writes N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import triton_common
from rlhf_kernels.aggregation_triton import load_valid, store_tokens, sum_partials, valid_tokens
from rlhf_kernels.checks import accumulation_dtype

BLOCK, WARPS = 2048, 8  # elements of a program
TILE = 1024  # partial sums that are read at once


@triton.jit
def masked_mean_block(
    x, mask, sums, stride, begin, end, TYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    valid = valid_tokens(mask, begin, end, BLOCK, WHOLE)
    y = load_valid(x, begin, end, valid, TYPE, BLOCK, WHOLE)
    # In float64 from the start: at a large offset the mean keeps its digits.
    tl.store(sums, tl.sum(y.to(tl.float64), 0))
    tl.store(sums + stride, tl.sum(valid.to(tl.int32), 0).to(tl.float64))


@triton.jit(do_not_specialize=["n", "blocks"])
def masked_mean_fwd_kernel(
    x, mask, partials, n: tl.int64, blocks: tl.int64, TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    block, n, blocks = tl.program_id(0).to(tl.int64), n.to(tl.int64), blocks.to(tl.int64)
    begin, sums = block * BLOCK, partials + block
    if begin + BLOCK <= n:
        masked_mean_block(x, mask, sums, blocks, begin, n, TYPE, BLOCK, True)
    else:
        masked_mean_block(x, mask, sums, blocks, begin, n, TYPE, BLOCK, False)


@triton.jit(do_not_specialize=["blocks"])
def sum_partials_kernel(
    partials, sums, mean, blocks: tl.int64, K: tl.constexpr, TILE: tl.constexpr
):
    """sums (K,): the rows of partials (K, blocks), added up; mean: first / second, 0 for 0 / 0."""
    rows = tl.arange(0, 2)
    total = sum_partials(partials, blocks.to(tl.int64), K, 2, False, TILE)
    tl.store(sums + rows, total, mask=rows < K)
    if mean is not None:
        count = tl.sum(tl.where(rows == 1, total, 0.0), 0)
        first = tl.sum(tl.where(rows == 0, total, 0.0), 0)
        tl.store(mean, tl.where(count > 0.0, first / tl.maximum(count, 1.0), 0.0))


def add_up(partials: Tensor, mean: Tensor | None = None) -> Tensor:
    """The sums of (K, blocks) partial sums over the blocks; ``mean`` as in the kernel."""
    sums = partials.new_empty(partials.shape[0])
    triton_common.launch(
        sum_partials_kernel,
        1,
        partials,
        sums,
        mean,
        partials.shape[1],
        num_warps=8,
        K=partials.shape[0],
        TILE=TILE,
    )
    return sums


def masked_mean_fwd(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sums): the schema in masked_mean.py."""
    dtype, n = accumulation_dtype(x), x.numel()
    partials = x.new_empty((2, triton.cdiv(n, BLOCK)), dtype=torch.float64)
    triton_common.launch(
        masked_mean_fwd_kernel,
        partials.shape[1],
        triton_common.dense(x),
        triton_common.dense(mask, torch.bool),
        partials,
        n,
        partials.shape[1],
        num_warps=WARPS,
        TYPE=triton_common.TYPES[dtype],
        BLOCK=BLOCK,
    )
    mean = x.new_empty((), dtype=dtype)
    return mean, add_up(partials, mean)


@triton.jit
def masked_mean_bwd_block(grad, mask, grad_x, begin, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    valid = valid_tokens(mask, begin, end, BLOCK, WHOLE)
    store_tokens(grad_x, begin, end, tl.where(valid, grad, 0.0), BLOCK, WHOLE)


@triton.jit(do_not_specialize=["n"])
def masked_mean_bwd_kernel(grad, mask, sums, grad_x, n: tl.int64, BLOCK: tl.constexpr):
    begin, n = tl.program_id(0).to(tl.int64) * BLOCK, n.to(tl.int64)
    upstream = tl.load(grad)
    share = upstream.to(tl.float64) / tl.maximum(tl.load(sums + 1), 1.0)
    share = share.to(upstream.dtype)
    if begin + BLOCK <= n:
        masked_mean_bwd_block(share, mask, grad_x, begin, n, BLOCK, True)
    else:
        masked_mean_bwd_block(share, mask, grad_x, begin, n, BLOCK, False)


def masked_mean_bwd(grad: Tensor, mask: Tensor, sums: Tensor) -> Tensor:
    """The upstream gradient over the count, where the mask is set."""
    mask = triton_common.dense(mask, torch.bool)
    grad_x, n = grad.new_empty(mask.shape), mask.numel()
    triton_common.launch(
        masked_mean_bwd_kernel,
        triton.cdiv(n, BLOCK),
        grad,
        mask,
        sums,
        grad_x,
        n,
        num_warps=WARPS,
        BLOCK=BLOCK,
    )
    return grad_x
