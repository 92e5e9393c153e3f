"""kl_shaped_rewards in Triton: one pass over each sequence, one program per sequence.

The tiles of a sequence are walked from the last to the first, so the first valid token that is met
gets the score. The KL is never written on its own: read 2N (and the mask), write N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import checks, triton_common
from rlhf_kernels.gae_triton import sequence_bounds
from rlhf_kernels.kl_estimate_triton import kl_term

TILE = tl.constexpr(1024)


@triton.jit
def _shape_tile(
    logprob,
    ref_logprob,
    mask,
    rewards,
    at,
    inside,
    coefficient,
    score,
    waiting,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The tokens from ``at`` on. Returns whether the score still waits for a valid token."""
    lane = tl.arange(0, TILE)
    d = tl.load(logprob + at + lane, mask=inside).to(TYPE)
    d -= tl.load(ref_logprob + at + lane, mask=inside).to(TYPE)
    kl, _ = kl_term(d, float("inf"), KIND, TYPE)
    valid = lane < TILE if inside is None else inside
    if mask is not None:
        valid = valid & tl.load(mask + at + lane, mask=inside)
    reward = tl.where(valid, coefficient * kl, 0.0)
    if waiting:
        last = tl.max(tl.where(valid, lane, -1), 0)
        reward = tl.where(lane == last, reward + score, reward)
        waiting = last < 0
    tl.store(rewards + at + lane, reward, mask=inside)
    return waiting


@triton.jit(do_not_specialize=["length", "total", "kl_coef", "clip_score"])
def kl_shaped_rewards_kernel(
    scores,
    logprob,
    ref_logprob,
    mask,
    cu_seqlens,
    coef,
    rewards,
    length: tl.int64,
    total: tl.int64,
    kl_coef: tl.float64,
    clip_score: tl.float64,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start, tokens = sequence_bounds(s, cu_seqlens, length, total)
    coefficient = -triton_common.number(kl_coef, TYPE)
    if coef is not None:
        coefficient = -tl.load(coef).to(TYPE)
    bound = triton_common.number(clip_score, TYPE)
    score = tl.load(scores + s).to(TYPE)
    score = tl.where(score < -bound, -bound, tl.where(score > bound, bound, score))  # a NaN stays
    waiting = tokens > 0
    first = tl.cdiv(tokens, TILE) * TILE - TILE
    while first >= 0:
        at, left = start + first, tokens - first
        if (left >= TILE) & (at % 16 == 0):  # 16 bytes at a time
            waiting = _shape_tile(
                logprob,
                ref_logprob,
                mask,
                rewards,
                at // 16 * 16,
                None,
                coefficient,
                score,
                waiting,
                KIND,
                TYPE,
            )
        else:
            waiting = _shape_tile(
                logprob,
                ref_logprob,
                mask,
                rewards,
                at,
                tl.arange(0, TILE) < left,
                coefficient,
                score,
                waiting,
                KIND,
                TYPE,
            )
        first -= TILE


def kl_shaped_rewards(
    scores: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_kind: int,
    clip_score: float,
    coef: Tensor | None,
) -> Tensor:
    dtype = checks.accumulation_dtype(scores, logprob, ref_logprob)
    rewards = torch.empty(logprob.shape, dtype=dtype, device=logprob.device)
    if cu_seqlens is not None:
        checks.offset_values("cu_seqlens", cu_seqlens, logprob.shape[0])
    triton_common.launch(
        kl_shaped_rewards_kernel,
        scores.shape[0],
        triton_common.dense(scores),
        triton_common.dense(logprob),
        triton_common.dense(ref_logprob),
        triton_common.dense(mask, torch.bool),
        triton_common.dense(cu_seqlens),
        coef,
        rewards,
        logprob.shape[-1],
        logprob.numel(),
        kl_coef,
        clip_score,
        KIND=kl_kind,
        TYPE=triton_common.TYPES[dtype],
    )
    return rewards
