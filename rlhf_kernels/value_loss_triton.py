"""value_loss in Triton: loss, statistics and d loss / d values in one pass over the tokens.

No error, square or weight tensor exists. The denominator is known after the last token only, so the
coefficient is written without it and the backward is one multiply. Forward 17 bytes a token in
float32 with a mask, backward 8; seq-* aggregations read the mask once more before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import aggregation_triton, triton_common
from rlhf_kernels.aggregation import Reduction
from rlhf_kernels.aggregation_triton import (
    find_tokens,
    load_valid,
    store_tokens,
    valid_tokens,
)
from rlhf_kernels.checks import accumulation_dtype

ROWS = 7  # of the partial sums: loss, count, clipped, error, its square, return, its square


@triton.jit
def value_term(value, old, target, clip):
    """0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2), its slope in v: v - R unless the
    clipped square is the larger, and whether it is. old is None: the plain square."""
    error = value - target
    plain = error * error * 0.5
    if old is None:
        loss, slope, clipped = plain, error, plain > plain
    else:
        inside = tl.where(value < old - clip, old - clip, value)
        inside = tl.where(inside > old + clip, old + clip, inside)
        bounded = tl.where(old == old, inside, old) - target  # inside has no NaN of old
        other = bounded * bounded * 0.5
        loss, slope = tl.where(plain >= other, plain, other), tl.where(plain >= other, error, 0.0)
        clipped = other > plain
    return loss, slope, clipped


@triton.jit
def value_loss_block(
    inputs, coefficient, sums, stride, begin, end, weight, clip,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    values, old_values, returns, mask = inputs
    # Each lane adds up its own tokens: the sums over lanes come once, after the loop. In float64
    # where a variance is a difference of the sums.
    losses = tl.zeros([TILE], TYPE)
    counts, clips = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    errors, error_squares = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    targets, target_squares = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    # A constant count of tiles would be unrolled, and registers spilled.
    for _ in range(0, tl.minimum(end - begin, BLOCK), TILE):
        valid = valid_tokens(mask, begin, end, TILE, WHOLE)
        value = load_valid(values, begin, end, valid, TYPE, TILE, WHOLE)
        target = load_valid(returns, begin, end, valid, TYPE, TILE, WHOLE)
        old = None
        if old_values is not None:
            old = load_valid(old_values, begin, end, valid, TYPE, TILE, WHOLE)
        loss, slope, clipped = value_term(value, old, target, clip)
        if coefficient is not None:
            y = slope if weight is None else slope * weight.to(TYPE)
            store_tokens(coefficient, begin, end, y, TILE, WHOLE)
        losses += loss
        counts += valid.to(tl.int32)
        clips += clipped.to(tl.int32)
        target = target.to(tl.float64)
        error = target - value.to(tl.float64)
        errors += error
        error_squares += error * error
        targets += target
        target_squares += target * target
        begin += TILE

    total = tl.sum(losses.to(tl.float64), 0)
    tl.store(sums, total if weight is None else total * weight)
    tl.store(sums + stride, tl.sum(counts, 0).to(tl.float64))
    tl.store(sums + 2 * stride, tl.sum(clips, 0).to(tl.float64))
    tl.store(sums + 3 * stride, tl.sum(errors, 0))
    tl.store(sums + 4 * stride, tl.sum(error_squares, 0))
    tl.store(sums + 5 * stride, tl.sum(targets, 0))
    tl.store(sums + 6 * stride, tl.sum(target_squares, 0))


@triton.jit(do_not_specialize=["sequences", "length", "n", "blocks", "clip"])
def value_loss_fwd_kernel(
    values,
    old_values,
    returns,
    mask,
    per_sequence,
    coefficient,
    partials,
    offsets,
    sequences: tl.int64,
    length: tl.int64,
    n: tl.int64,
    blocks: tl.int64,
    clip: tl.float64,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    sequences, length, n = sequences.to(tl.int64), length.to(tl.int64), n.to(tl.int64)
    stride, sums = blocks.to(tl.int64), partials + block
    clip = triton_common.number(clip, TYPE)
    inputs = (values, old_values, returns, mask)
    if per_sequence is not None:
        sequence, begin, end = find_tokens(block, offsets, sequences, length, n, BLOCK)
        weight = tl.load(per_sequence + sequences + sequence)
        value_loss_block(
            inputs, coefficient, sums, stride, begin, end, weight, clip, TYPE, BLOCK, TILE, False
        )
    elif (block + 1) * BLOCK <= n:
        value_loss_block(
            inputs, coefficient, sums, stride, block * BLOCK, n, None, clip, TYPE, BLOCK, TILE, True
        )
    else:
        value_loss_block(
            inputs, coefficient, sums, stride, block * BLOCK, n, None, clip, TYPE, BLOCK, TILE,
            False,
        )  # fmt: skip


def value_loss_fwd(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: int,
    normalizer: Tensor | None,
    normalizer_value: float,
    max_length: int,
    clip: float,
    need: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, totals, coefficient): the schema in value_loss.py."""
    dtype = accumulation_dtype(*(x for x in (values, old_values, returns) if x is not None))
    values, returns = triton_common.dense(values), triton_common.dense(returns)
    old_values, mask = triton_common.dense(old_values), triton_common.dense(mask, torch.bool)
    blocks = aggregation_triton.cut(values, cu_seqlens, aggregation)
    per_sequence = aggregation_triton.sequence_sums(blocks, aggregation, mask, values)
    coefficient = values.new_empty(values.shape if need else (0,), dtype=dtype)
    partials = values.new_empty((ROWS, blocks.programs), dtype=torch.float64)
    triton_common.launch(
        value_loss_fwd_kernel,
        blocks.programs,
        values,
        old_values,
        returns,
        mask,
        per_sequence,
        coefficient if need else None,
        partials,
        *blocks.arguments(),
        clip,
        num_warps=blocks.num_warps,
        TYPE=triton_common.TYPES[dtype],
        BLOCK=blocks.size,
        TILE=blocks.tile,
    )
    reduction = Reduction(mask, cu_seqlens, aggregation, normalizer, normalizer_value, max_length)
    loss, totals = aggregation_triton.finish(partials, ROWS, per_sequence, reduction, dtype)
    return loss, totals, coefficient


value_loss_bwd = aggregation_triton.scale_coefficient
