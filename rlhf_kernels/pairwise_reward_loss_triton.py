"""pairwise_reward_loss in Triton: loss, statistics and the gradient of the loss in one pass.

Blocks of pairs write three partial sums, which one program adds up in float64, in fixed order; the
differences and losses of the pairs are never written. Forward reads 2N (3N with a margin) and
writes the 2N gradients when they are wanted; backward reads and writes 2N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import triton_common

BLOCK = tl.constexpr(1024)  # pairs of a program, and partial sums that are read at once


@triton.jit
def log1p(x, TYPE: tl.constexpr):
    """log(1 + x) for 0 <= x <= 1: 2 artanh(s), s = x / (2 + x) <= 1/3, a series without a loss."""
    terms: tl.constexpr = 17 if TYPE.is_fp64() else 8
    s = x / (x + 2.0)
    square = s * s
    series = tl.full(x.shape, 1 / (2 * terms - 1), TYPE)
    for k in tl.static_range(2, terms + 1):
        inverse = triton_common.number(1 / (2 * (terms - k) + 1), TYPE)
        series = tl.fma(series, square, inverse)
    return 2.0 * s * series


@triton.jit
def neg_log_sigmoid(z, TYPE: tl.constexpr):
    """-log sigmoid(z) = max(-z, 0) + log1p(e^-|z|), and its slope, as in csrc/math/reward.h."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z > 0, 0.0, -z) + log1p(e, TYPE), -tl.where(z > 0, e, 1.0) / (e + 1.0)


@triton.jit
def _pairs(
    chosen,
    rejected,
    margin,
    grad_chosen,
    grad_rejected,
    sums,
    first,
    inside,
    margin_value,
    center,
    smoothing,
    share,
    TYPE: tl.constexpr,
):
    """The pairs from ``first`` on: their gradients, and into sums the sums over them."""
    lane = tl.arange(0, BLOCK)
    c = tl.load(chosen + first + lane, mask=inside).to(TYPE)
    r = tl.load(rejected + first + lane, mask=inside).to(TYPE)
    apart, pull = c - r, center * (c + r)
    z = apart - margin_value
    if margin is not None:
        z = apart - tl.load(margin + first + lane, mask=inside).to(TYPE)
    loss, slope = neg_log_sigmoid(z, TYPE)
    loss = tl.where(smoothing == 0, loss, tl.fma(smoothing, z, loss))  # not 0 * inf
    loss = tl.fma(pull, c + r, loss)
    if grad_chosen is not None:
        slope = slope + smoothing
        tl.store(grad_chosen + first + lane, (pull + pull + slope) * share, mask=inside)
        tl.store(grad_rejected + first + lane, (pull + pull - slope) * share, mask=inside)
    correct = apart > 0
    if inside is not None:
        loss, apart = tl.where(inside, loss, 0.0), tl.where(inside, apart, 0.0)
        correct = correct & inside
    tl.store(sums, tl.sum(loss.to(tl.float64), 0))
    tl.store(sums + 1, tl.sum(correct.to(tl.int32), 0).to(tl.float64))
    tl.store(sums + 2, tl.sum(apart.to(tl.float64), 0))


_NUMBERS = ["n", "margin_value", "center_coef", "label_smoothing", "share"]


@triton.jit(do_not_specialize=_NUMBERS)
def pairwise_reward_loss_fwd_kernel(
    chosen,
    rejected,
    margin,
    grad_chosen,
    grad_rejected,
    sums,
    n: tl.int64,
    margin_value: tl.float64,
    center_coef: tl.float64,
    label_smoothing: tl.float64,
    share: tl.float64,
    TYPE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    margin_number = triton_common.number(margin_value, TYPE)
    center = triton_common.number(center_coef, TYPE)
    smoothing = triton_common.number(label_smoothing, TYPE)
    part = triton_common.number(share, TYPE)
    if first + BLOCK <= n:  # without a mask: 16 bytes at a time
        _pairs(
            chosen,
            rejected,
            margin,
            grad_chosen,
            grad_rejected,
            sums + 3 * block,
            first,
            None,
            margin_number,
            center,
            smoothing,
            part,
            TYPE,
        )
    else:
        _pairs(
            chosen,
            rejected,
            margin,
            grad_chosen,
            grad_rejected,
            sums + 3 * block,
            first,
            tl.arange(0, BLOCK) < n - first,
            margin_number,
            center,
            smoothing,
            part,
            TYPE,
        )


@triton.jit(do_not_specialize=["n"])
def pairwise_reward_loss_sum_kernel(
    sums, loss, pair_count, correct_count, margin_sum, n: tl.int64, TYPE: tl.constexpr
):
    lane = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float64)
    correct, apart = losses, losses
    pairs = tl.full([], n, tl.int64)
    blocks, first = tl.cdiv(pairs, BLOCK), tl.full([], 0, tl.int64)
    while first < blocks:
        inside = lane < blocks - first
        at = sums + 3 * (first + lane)
        losses += tl.load(at, mask=inside, other=0.0)
        correct += tl.load(at + 1, mask=inside, other=0.0)
        apart += tl.load(at + 2, mask=inside, other=0.0)
        first += BLOCK
    count = pairs.to(tl.float64)
    tl.store(loss, (tl.sum(losses, 0) / tl.maximum(count, 1.0)).to(TYPE))
    tl.store(pair_count, count)
    tl.store(correct_count, tl.sum(correct, 0))
    tl.store(margin_sum, tl.sum(apart, 0))


@triton.jit
def scale_block(x, to, factor, first, inside):
    """Stores a block of factor * x; nothing where x is None."""
    if x is not None:
        at = first + tl.arange(0, BLOCK)
        tl.store(to + at, factor * tl.load(x + at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["n"])
def reward_loss_bwd_kernel(grad, x, y, to_x, to_y, n: tl.int64, TYPE: tl.constexpr):
    """The gradients x and y (or None) of the loss, times the upstream gradient."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    factor = tl.load(grad).to(TYPE)
    if first + BLOCK <= n:
        scale_block(x, to_x, factor, first, None)
        scale_block(y, to_y, factor, first, None)
    else:
        scale_block(x, to_x, factor, first, tl.arange(0, BLOCK) < n - first)
        scale_block(y, to_y, factor, first, tl.arange(0, BLOCK) < n - first)


def pairwise_reward_loss_fwd(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    margin_value: float,
    center_coef: float,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, TYPE = chosen.numel(), triton_common.TYPES[chosen.dtype]
    blocks = triton.cdiv(n, BLOCK.value)
    grad_chosen = torch.empty(
        chosen.shape if with_grad else 0, dtype=chosen.dtype, device=chosen.device
    )
    grad_rejected = torch.empty_like(grad_chosen)
    loss = chosen.new_empty(())
    pairs, correct, apart = (chosen.new_empty((), dtype=torch.float64) for _ in range(3))
    sums = chosen.new_empty(3 * blocks, dtype=torch.float64)
    triton_common.launch(
        pairwise_reward_loss_fwd_kernel,
        blocks,
        triton_common.dense(chosen),
        triton_common.dense(rejected),
        triton_common.dense(margin),
        grad_chosen if with_grad else None,
        grad_rejected if with_grad else None,
        sums,
        n,
        margin_value,
        center_coef,
        label_smoothing,
        1 / max(n, 1),
        num_warps=chosen.element_size(),  # 4, or 8 for float64
        TYPE=TYPE,
    )
    triton_common.launch(
        pairwise_reward_loss_sum_kernel, 1, sums, loss, pairs, correct, apart, n, TYPE=TYPE
    )
    return loss, pairs, correct, apart, grad_chosen, grad_rejected


def reward_loss_bwd(grad: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and y, the gradients of a loss, times its upstream gradient, one number."""
    to_x, to_y = torch.empty_like(x), None if y is None else torch.empty_like(y)
    triton_common.launch(
        reward_loss_bwd_kernel,
        triton.cdiv(x.numel(), BLOCK.value),
        grad,
        triton_common.dense(x),
        triton_common.dense(y),
        to_x,
        to_y,
        x.numel(),
        TYPE=triton_common.TYPES[x.dtype],
    )
    return to_x, to_y


pairwise_reward_loss_bwd = reward_loss_bwd
