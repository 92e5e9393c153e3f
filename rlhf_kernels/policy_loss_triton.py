"""policy_loss in Triton: loss, statistics and d loss / d logprob in one pass over the tokens.

No ratio, KL or weight tensor exists. The denominator is known after the last token only, so the
coefficient is written without it and the backward is one multiply. Forward 17 bytes a token in
float32 with a mask, backward 8. Sequences take a pass before (their lengths; log-ratios), and
sequence ratios one after, as their slope is known after the last token of the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import aggregation_triton, triton_common
from rlhf_kernels.aggregation import Reduction
from rlhf_kernels.aggregation_triton import (
    clamped,
    find_tokens,
    first_block,
    load_tokens,
    load_valid,
    store_tokens,
    sum_range,
    valid_tokens,
)
from rlhf_kernels.checks import accumulation_dtype
from rlhf_kernels.kl_estimate_triton import exp, exp_remainder, kl_term
from rlhf_kernels.policy_loss import OBJECTIVES
from rlhf_kernels.triton_common import number

PPO = tl.constexpr(OBJECTIVES.index("ppo"))
CISPO = tl.constexpr(OBJECTIVES.index("cispo"))
REINFORCE = tl.constexpr(OBJECTIVES.index("reinforce"))
ROWS = 6  # of the partial sums: loss, count, clipped, KL, ratio, largest ratio
SLOPE = tl.constexpr(ROWS)  # the row behind them: slopes in the ratio of the block's sequence


@triton.jit
def policy_term(advantage, ratio, logprob, low, high, dual, OBJECTIVE: tl.constexpr):
    """Objective of a token, and its slope in log r (ppo) or logprob, as in csrc/math/policy.h."""
    if OBJECTIVE == PPO:
        # -A r, with r bounded on the side that the sign of A gives. On a bound the slope is the
        # unclipped one; beyond it r may be inf.
        negative = advantage < 0.0
        least, most = tl.where(negative, low, 0.0), tl.where(negative, dual, high)
        below, above = ratio < least, ratio > most
        loss = -advantage * tl.where(below, least, tl.where(above, most, ratio))
        slope = tl.where(below | above, 0.0, loss)
    elif OBJECTIVE == CISPO:
        slope = -advantage * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        loss = slope * logprob
    else:
        slope = -advantage
        loss = slope * logprob
    return loss, slope


@triton.jit
def policy_loss_block(
    inputs, outputs, numbers, sums, stride, begin, end, ratio_of_sequence, weight,
    OBJECTIVE: tl.constexpr, KL_KIND: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    logprob, entropy, old_logprob, advantages, importance_weight, ref_logprob, mask = inputs
    coefficient, entropy_coefficient = outputs
    low, high, dual, clamp, kl_coef, entropy_coef = numbers
    factor = number(1.0, TYPE) if weight is None else weight.to(TYPE)
    # Each lane adds up its own tokens: the sums over lanes come once, after the loop.
    losses, slopes, most = tl.zeros([TILE], TYPE), tl.zeros([TILE], TYPE), tl.zeros([TILE], TYPE)
    counts, clips = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    kls, excesses = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    # A constant count of tiles would be unrolled, and registers spilled.
    for _ in range(0, tl.minimum(end - begin, BLOCK), TILE):
        valid = valid_tokens(mask, begin, end, TILE, WHOLE)
        new = load_valid(logprob, begin, end, valid, TYPE, TILE, WHOLE)
        advantage = load_valid(advantages, begin, end, valid, TYPE, TILE, WHOLE)
        raw = tl.zeros([TILE], TYPE)
        if old_logprob is not None:
            raw = new - load_valid(old_logprob, begin, end, valid, TYPE, TILE, WHOLE)
        x = clamped(raw, clamp)
        ratio = exp(x, TYPE)
        kl = exp_remainder(x, ratio, TYPE)  # 0 where not valid, as x is
        excess = tl.where(tl.abs(x) < 1.0, kl + x, ratio - 1.0)  # r - 1, without r's rounding
        if ratio_of_sequence is not None:
            ratio = tl.zeros([TILE], TYPE) + ratio_of_sequence.to(TYPE)
        loss, slope = policy_term(advantage, ratio, new, low, high, dual, OBJECTIVE)
        if OBJECTIVE == PPO and ratio_of_sequence is None:
            slope = tl.where(tl.abs(raw) > clamp, 0.0, slope)
        if importance_weight is not None:
            importance = load_valid(importance_weight, begin, end, valid, TYPE, TILE, WHOLE)
            loss, slope = loss * importance, slope * importance
        if OBJECTIVE == PPO and ratio_of_sequence is not None:
            slopes += tl.where(valid, slope, 0.0)
            slope = tl.zeros([TILE], TYPE)
        if ref_logprob is not None:
            d = new - load_valid(ref_logprob, begin, end, valid, TYPE, TILE, WHOLE)
            estimate, kl_slope = kl_term(d, number(float("inf"), TYPE), KL_KIND, TYPE)
            loss, slope = loss + kl_coef * estimate, slope + kl_coef * kl_slope
        if entropy is not None:
            loss -= entropy_coef * load_valid(entropy, begin, end, valid, TYPE, TILE, WHOLE)
        if coefficient is not None:
            y = tl.where(valid, factor * slope, 0.0)
            store_tokens(coefficient, begin, end, y, TILE, WHOLE)
        if entropy_coefficient is not None:
            y = tl.where(valid, -factor * entropy_coef, 0.0)
            store_tokens(entropy_coefficient, begin, end, y, TILE, WHOLE)
        losses += tl.where(valid, loss, 0.0)  # 0 * a sequence's infinite ratio
        counts += valid.to(tl.int32)
        if OBJECTIVE != REINFORCE:
            binds = (advantage > 0.0) & (ratio > high) | (advantage < 0.0) & (ratio < low)
            clips += binds.to(tl.int32)
        kls += kl.to(tl.float64)
        excesses += excess.to(tl.float64)
        most = tl.maximum(most, tl.where(valid, ratio, 0.0))
        begin += TILE

    total, count = tl.sum(losses.to(tl.float64), 0), tl.sum(counts, 0).to(tl.float64)
    if ratio_of_sequence is None:
        ratios = count + tl.sum(excesses, 0)
    else:
        ratios = tl.where(count > 0.0, ratio_of_sequence * count, 0.0)
        tl.store(sums + SLOPE * stride, tl.sum(slopes.to(tl.float64), 0))
    tl.store(sums, total if weight is None else total * weight)
    tl.store(sums + stride, count)
    tl.store(sums + 2 * stride, tl.sum(clips, 0).to(tl.float64))
    tl.store(sums + 3 * stride, tl.sum(kls, 0))
    tl.store(sums + 4 * stride, ratios)
    tl.store(sums + 5 * stride, tl.max(most, 0).to(tl.float64))


NUMBERS = ["low", "high", "dual", "clamp", "kl_coef", "entropy_coef"]


@triton.jit(do_not_specialize=["sequences", "length", "n", "blocks", *NUMBERS])
def policy_loss_fwd_kernel(
    logprob, entropy, old_logprob, advantages, importance_weight, ref_logprob, mask, coefs,
    per_sequence, coefficient, entropy_coefficient, partials, offsets,
    sequences: tl.int64, length: tl.int64, n: tl.int64, blocks: tl.int64,
    low: tl.float64, high: tl.float64, dual: tl.float64, clamp: tl.float64, kl_coef: tl.float64,
    entropy_coef: tl.float64,
    BY_SEQUENCE: tl.constexpr, OBJECTIVE: tl.constexpr, KL_KIND: tl.constexpr, TYPE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    sequences, length, n = sequences.to(tl.int64), length.to(tl.int64), n.to(tl.int64)
    stride, sums = blocks.to(tl.int64), partials + block
    kl_coef, entropy_coef = number(kl_coef, TYPE), number(entropy_coef, TYPE)
    if coefs is not None:
        kl_coef, entropy_coef = tl.load(coefs).to(TYPE), tl.load(coefs + 1).to(TYPE)
    low, high, dual = number(low, TYPE), number(high, TYPE), number(dual, TYPE)
    numbers = (low, high, dual, number(clamp, TYPE), kl_coef, entropy_coef)
    inputs = (
        logprob, entropy, old_logprob, advantages, importance_weight, ref_logprob, mask
    )  # fmt: skip
    outputs = (coefficient, entropy_coefficient)
    if per_sequence is not None:
        sequence, begin, end = find_tokens(block, offsets, sequences, length, n, BLOCK)
        weight = tl.load(per_sequence + sequences + sequence)
        ratio = None
        if BY_SEQUENCE:
            ratio = tl.load(per_sequence + 2 * sequences + sequence)
        policy_loss_block(
            inputs, outputs, numbers, sums, stride, begin, end, ratio, weight,
            OBJECTIVE, KL_KIND, TYPE, BLOCK, TILE, False,
        )  # fmt: skip
    elif (block + 1) * BLOCK <= n:
        policy_loss_block(
            inputs, outputs, numbers, sums, stride, block * BLOCK, n, None, None,
            OBJECTIVE, KL_KIND, TYPE, BLOCK, TILE, True,
        )  # fmt: skip
    else:
        policy_loss_block(
            inputs, outputs, numbers, sums, stride, block * BLOCK, n, None, None,
            OBJECTIVE, KL_KIND, TYPE, BLOCK, TILE, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["sequences", "length", "n", "blocks"])
def sequence_slopes_kernel(
    partials,
    per_sequence,
    offsets,
    sequences: tl.int64,
    length: tl.int64,
    n: tl.int64,
    blocks: tl.int64,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Row 3 of per_sequence, what a token gets of its sequence's slopes, times their sum."""
    sequence = tl.program_id(0).to(tl.int64)
    sequences, length, n = sequences.to(tl.int64), length.to(tl.int64), n.to(tl.int64)
    begin = first_block(sequence, offsets, length, n, BLOCK)
    end = first_block(sequence + 1, offsets, length, n, BLOCK)
    slope = sum_range(partials + SLOPE * blocks.to(tl.int64), begin, end, TILE)
    share = per_sequence + 3 * sequences + sequence
    tl.store(share, tl.where(tl.load(share) == 0.0, 0.0, tl.load(share) * slope))


@triton.jit(do_not_specialize=["sequences", "length", "n", "blocks"])
def policy_loss_add_kernel(
    coefficient,
    mask,
    per_sequence,
    offsets,
    sequences: tl.int64,
    length: tl.int64,
    n: tl.int64,
    blocks: tl.int64,
    BLOCK: tl.constexpr,
):
    """coefficient += what the sequence's ratio adds to each of its valid tokens."""
    block = tl.program_id(0).to(tl.int64)
    sequences, length, n = sequences.to(tl.int64), length.to(tl.int64), n.to(tl.int64)
    sequence, begin, end = find_tokens(block, offsets, sequences, length, n, BLOCK)
    added = tl.load(per_sequence + 3 * sequences + sequence)
    valid = valid_tokens(mask, begin, end, BLOCK, False)
    x = load_tokens(coefficient, begin, end, BLOCK, False)
    store_tokens(coefficient, begin, end, tl.where(valid, x + added.to(x.dtype), x), BLOCK, False)


def policy_loss_fwd(
    logprob: Tensor,
    entropy: Tensor | None,
    old_logprob: Tensor | None,
    advantages: Tensor,
    importance_weight: Tensor | None,
    ref_logprob: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: int,
    normalizer: Tensor | None,
    normalizer_value: float,
    max_length: int,
    objective: int,
    by_sequence: bool,
    low: float,
    high: float,
    dual: float,
    clamp: float,
    kl_kind: int,
    kl_coef: float,
    entropy_coef: float,
    coefs: Tensor | None,
    need: bool,
    need_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, totals, coefficient, entropy_coefficient): the schema in policy_loss.py."""
    dense = triton_common.dense
    logprob, old_logprob, mask = (
        triton_common.dense(logprob),
        dense(old_logprob),
        dense(mask, torch.bool),
    )
    others = (dense(x) for x in (advantages, importance_weight, ref_logprob))
    inputs = (logprob, dense(entropy), old_logprob, *others)
    dtype = accumulation_dtype(*(x for x in inputs if x is not None))
    blocks = aggregation_triton.cut(logprob, cu_seqlens, aggregation, by_sequence)
    per_sequence = aggregation_triton.sequence_sums(
        blocks, aggregation, mask, logprob, old_logprob if by_sequence else None, dtype, clamp
    )
    coefficient = logprob.new_empty(logprob.shape if need else (0,), dtype=dtype)
    entropy_coefficient = logprob.new_empty(logprob.shape if need_entropy else (0,), dtype=dtype)
    partials = logprob.new_empty((ROWS + 1, blocks.programs), dtype=torch.float64)
    triton_common.launch(
        policy_loss_fwd_kernel,
        blocks.programs,
        *inputs,
        mask,
        coefs,
        per_sequence,
        coefficient if need else None,
        entropy_coefficient if need_entropy else None,
        partials,
        *blocks.arguments(),
        low,
        high,
        dual,
        clamp,
        kl_coef,
        entropy_coef,
        num_warps=blocks.num_warps,
        BY_SEQUENCE=by_sequence,
        OBJECTIVE=objective,
        KL_KIND=kl_kind,
        TYPE=triton_common.TYPES[dtype],
        BLOCK=blocks.size,
        TILE=blocks.tile,
    )
    if by_sequence and need and OBJECTIVES[objective] == "ppo":
        place, size = blocks.arguments(), blocks.size
        triton_common.launch(
            sequence_slopes_kernel,
            blocks.sequences,
            partials,
            per_sequence,
            *place,
            BLOCK=size,
            TILE=256,
        )
        triton_common.launch(
            policy_loss_add_kernel,
            blocks.programs,
            coefficient,
            mask,
            per_sequence,
            *place,
            num_warps=blocks.num_warps,
            BLOCK=size,
        )
    reduction = Reduction(mask, cu_seqlens, aggregation, normalizer, normalizer_value, max_length)
    loss, totals = aggregation_triton.finish(
        partials, ROWS, per_sequence, reduction, dtype, maximum=True
    )
    return loss, totals, coefficient, entropy_coefficient


policy_loss_bwd = aggregation_triton.scale_coefficient
