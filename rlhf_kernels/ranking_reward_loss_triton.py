"""ranking_reward_loss in Triton: tiles of pairs of each group, which live in registers alone.

A program owns rows of ROWS completions of a group and meets all completions of the group, COLUMNS
at a time: so each score's gradient is summed over its partners in fixed order, whatever other
groups there are. Read M scores and ranks, and K / ROWS times again from the cache; write M slopes.
One program then takes the mean over the groups, and the slopes become gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import checks, triton_common
from rlhf_kernels.pairwise_reward_loss_triton import neg_log_sigmoid, reward_loss_bwd

ROWS = tl.constexpr(16)
COLUMNS = tl.constexpr(32)
SLOTS = tl.constexpr(16)  # programs of a group: each takes every sixteenth of its tiles of rows
GROUPS = tl.constexpr(16)  # groups that are added up at once
# The sums of a program, in float64: losses, pairs, pairs in the right order, score differences,
# ranked completions and their squares.
SUMS = tl.constexpr(6)


@triton.jit
def _find_rows(group_offsets, total):
    """(start and stop of the program's group, its first row, group); within [0, total]."""
    program = tl.program_id(0).to(tl.int64)
    group = program // SLOTS
    start = tl.maximum(tl.load(group_offsets + group).to(tl.int64), 0)
    stop = tl.minimum(tl.load(group_offsets + group + 1).to(tl.int64), total)
    return start, stop, start + program % SLOTS * ROWS, group


@triton.jit
def _completions(scores, ranks, at, stop, TYPE: tl.constexpr):
    """Scores, ranks (float64 or int64), and which are ranked: not those from stop on, nor NaN."""
    score = tl.load(scores + at, mask=at < stop, other=0.0).to(TYPE)
    rank = tl.load(ranks + at, mask=at < stop, other=0)
    return score, rank, (at < stop) & (rank == rank)


@triton.jit(do_not_specialize=["total"])
def ranking_reward_loss_fwd_kernel(
    scores, ranks, group_offsets, slopes, sums, total: tl.int64, TYPE: tl.constexpr
):
    start, stop, first, _ = _find_rows(group_offsets, total)
    zero = tl.full([], 0.0, tl.float64)
    losses, pairs, correct, apart, ranked, squares = zero, zero, zero, zero, zero, zero
    while first < stop:
        at = first + tl.arange(0, ROWS)
        score, rank, ranked_here = _completions(scores, ranks, at, stop, TYPE)
        loss, slope = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
        better = tl.zeros([ROWS, COLUMNS], tl.int32)  # of how many partners, and so on
        worse, right = better, better
        column = start
        while column < stop:
            partners = column + tl.arange(0, COLUMNS)
            other, other_rank, ranked_there = _completions(scores, ranks, partners, stop, TYPE)
            both = ranked_here[:, None] & ranked_there[None, :]
            wins = both & (rank[:, None] < other_rank[None, :])
            loses = both & (rank[:, None] > other_rank[None, :])
            z = score[:, None] - other[None, :]
            z = tl.where(wins, z, tl.where(loses, -z, 0.0))
            value, step = neg_log_sigmoid(z, TYPE)
            loss += tl.sum(tl.where(wins, value, 0.0), 1).to(tl.float64)
            step = tl.where(wins, step, tl.where(loses, -step, 0.0))
            slope += tl.sum(step, 1).to(tl.float64)
            better += wins.to(tl.int32)
            worse += loses.to(tl.int32)
            right += (wins & (z > 0)).to(tl.int32)
            column += COLUMNS
        if slopes is not None:
            tl.store(slopes + at, slope, mask=at < stop)
        wide = tl.where(ranked_here, score, 0.0).to(tl.float64)
        balance = tl.sum(better - worse, 1)
        losses += tl.sum(loss, 0)
        pairs += tl.sum(tl.sum(better, 1).to(tl.float64), 0)
        correct += tl.sum(tl.sum(right, 1).to(tl.float64), 0)
        apart += tl.sum(tl.where(balance == 0, 0.0, wide * balance.to(tl.float64)), 0)
        ranked += tl.sum(ranked_here.to(tl.float64), 0)
        squares += tl.sum(wide * wide, 0)
        first += SLOTS * ROWS
    to = sums + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(to, losses)
    tl.store(to + 1, pairs)
    tl.store(to + 2, correct)
    tl.store(to + 3, apart)
    tl.store(to + 4, ranked)
    tl.store(to + 5, squares)


@triton.jit
def _sum_slots(sums, first, groups, k):
    """Sum number k of the groups from ``first`` on."""
    group, slot = tl.arange(0, GROUPS)[:, None], tl.arange(0, SLOTS)[None, :]
    at = ((first + group) * SLOTS + slot) * SUMS + k
    return tl.sum(tl.load(sums + at, mask=group < groups - first, other=0.0), 1)


@triton.jit(do_not_specialize=["groups", "center_coef"])
def ranking_reward_loss_mean_kernel(
    sums,
    loss,
    pair_count,
    correct_count,
    margin_sum,
    unpaired_count,
    factors,
    groups: tl.int64,
    center_coef: tl.float64,
    TYPE: tl.constexpr,
):
    """Loss and statistics; factors: what the mean slope of a group, and a score, count for."""
    means = tl.zeros([GROUPS], tl.float64)
    used, pairs, correct, apart, ranked, squares = means, means, means, means, means, means
    first = tl.full([], 0, tl.int64)
    while first < groups:
        own = _sum_slots(sums, first, groups, 1)
        means += _sum_slots(sums, first, groups, 0) / tl.maximum(own, 1.0)
        used += (own > 0).to(tl.float64)
        pairs += own
        correct += _sum_slots(sums, first, groups, 2)
        apart += _sum_slots(sums, first, groups, 3)
        ranked += _sum_slots(sums, first, groups, 4)
        squares += _sum_slots(sums, first, groups, 5)
        first += GROUPS
    share = 1.0 / tl.maximum(tl.sum(used, 0), 1.0)
    center = triton_common.number(center_coef, tl.float64) / tl.maximum(tl.sum(ranked, 0), 1.0)
    tl.store(loss, (tl.sum(means, 0) * share + center * tl.sum(squares, 0)).to(TYPE))
    tl.store(pair_count, tl.sum(pairs, 0))
    tl.store(correct_count, tl.sum(correct, 0))
    tl.store(margin_sum, tl.sum(apart, 0))
    tl.store(unpaired_count, groups - tl.sum(used, 0))
    tl.store(factors, share)
    tl.store(factors + 1, 2.0 * center)


@triton.jit(do_not_specialize=["total"])
def ranking_reward_loss_grad_kernel(
    scores, ranks, group_offsets, slopes, sums, factors, grad, total: tl.int64, TYPE: tl.constexpr
):
    _, stop, first, group = _find_rows(group_offsets, total)
    slots = (group * SLOTS + tl.arange(0, SLOTS)) * SUMS
    pairs = tl.maximum(tl.sum(tl.load(sums + slots + 1), 0), 1.0)
    share, pull = tl.load(factors), tl.load(factors + 1)
    while first < stop:
        at = first + tl.arange(0, ROWS)
        score, _rank, ranked_here = _completions(scores, ranks, at, stop, TYPE)
        slope = tl.load(slopes + at, mask=at < stop, other=0.0)
        own = slope / pairs * share + pull * score.to(tl.float64)
        tl.store(grad + at, tl.where(ranked_here, own, 0.0).to(TYPE), mask=at < stop)
        first += SLOTS * ROWS


def ranking_reward_loss_fwd(
    scores: Tensor, ranks: Tensor, group_offsets: Tensor, center_coef: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.offset_values("group_offsets", group_offsets, scores.shape[0])
    total, groups = scores.shape[0], group_offsets.shape[0] - 1
    programs, TYPE = groups * SLOTS.value, triton_common.TYPES[scores.dtype]
    inputs = (
        triton_common.dense(scores),
        triton_common.dense(ranks),
        triton_common.dense(group_offsets),
    )
    sums = scores.new_empty(programs * SUMS.value, dtype=torch.float64)
    slopes = scores.new_empty(total, dtype=torch.float64) if with_grad else None
    factors = scores.new_empty(2, dtype=torch.float64)
    loss, grad = scores.new_empty(()), scores.new_empty(total if with_grad else 0)
    pairs, correct, apart, unpaired = (scores.new_empty((), dtype=torch.float64) for _ in range(4))
    triton_common.launch(
        ranking_reward_loss_fwd_kernel,
        programs,
        *inputs,
        slopes,
        sums,
        total,
        num_warps=scores.element_size(),  # 4, or 8 for float64
        TYPE=TYPE,
    )
    triton_common.launch(
        ranking_reward_loss_mean_kernel,
        1,
        sums,
        loss,
        pairs,
        correct,
        apart,
        unpaired,
        factors,
        groups,
        center_coef,
        TYPE=TYPE,
    )
    if with_grad:
        triton_common.launch(
            ranking_reward_loss_grad_kernel,
            programs,
            *inputs,
            slopes,
            sums,
            factors,
            grad,
            total,
            TYPE=TYPE,
        )
    return loss, pairs, correct, apart, unpaired, grad


def ranking_reward_loss_bwd(grad: Tensor, grad_scores: Tensor) -> Tensor:
    return reward_loss_bwd(grad, grad_scores, None)[0]
