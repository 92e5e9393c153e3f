"""gae in Triton: a parallel scan back in time, one program per sequence.

A_t = delta_t + c A_{t+1} is a composition of maps A -> a A + b, where a masked step is A -> A. A
tile is scanned at once; tiles are counted from the start of the sequence and walked from the last
to the first. A thread holds four steps side by side, which it goes through one by one; these groups
lie latest first, so the scan over them runs forward. Only the results are written: 4N floats moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import checks, triton_common

# Groups of four steps scanned at once. They set the order of the sums, so they depend on nothing.
GROUPS = tl.constexpr(256)
TILE = tl.constexpr(1024)


@triton.jit
def sequence_bounds(s, cu_seqlens, length, total):
    """Where sequence s starts, and how long it is: within [0, total) whatever the offsets hold."""
    if cu_seqlens is None:
        start, stop = s * length, (s + 1) * length
    else:
        start = tl.maximum(tl.load(cu_seqlens + s).to(tl.int64), 0)
        stop = tl.load(cu_seqlens + s + 1).to(tl.int64)
    return start, tl.minimum(stop, total) - start


@triton.jit
def _split(x):
    """The four steps of each group."""
    even, odd = tl.split(tl.reshape(x, [GROUPS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join(x0, x1, x2, x3):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [GROUPS, 4])


@triton.jit
def _step(reward, value, next_value, valid, discount, decay):
    """The map of a step, as (a, b)."""
    delta = tl.fma(discount, next_value, reward - value)
    return tl.where(valid, decay, 1.0), tl.where(valid, delta, 0.0)


@triton.jit
def _compose(a, b, earlier_a, earlier_b):
    """The map of the later steps, and then that of the earlier ones."""
    return earlier_a * a, tl.fma(earlier_a, b, earlier_b)


@triton.jit
def _compose_groups(a, b, before_a, before_b, earlier_a, earlier_b, last_a, last_b):
    """Also the map without the last group: what goes into that one."""
    all_a, all_b = _compose(a, b, earlier_a, earlier_b)
    into_a, into_b = _compose(a, b, last_a, last_b)
    return all_a, all_b, into_a, into_b


@triton.jit
def _nearest(has, value, earlier_has, earlier_value):
    return has | earlier_has, tl.where(earlier_has != 0, earlier_value, value)


@triton.jit
def _nearest_groups(has, value, before, before_value, earlier, earlier_value, last, last_value):
    all_has, all_value = _nearest(has, value, earlier, earlier_value)
    into, into_value = _nearest(has, value, last, last_value)
    return all_has, all_value, into, into_value


@triton.jit
def _at_start(x):
    """Of numbers per group, that of the first one in time."""
    return tl.sum(tl.where(tl.arange(0, GROUPS) == GROUPS - 1, x, 0), 0)


@triton.jit
def _next_values(value, valid, next_value):
    """The value of the valid step after each group, and that of the first one in the tile."""
    v0, v1, v2, v3 = _split(value)
    m0, m1, m2, m3 = _split(valid)
    has = (m0 | m1 | m2 | m3).to(tl.int32)
    first = tl.where(m0, v0, tl.where(m1, v1, tl.where(m2, v2, tl.where(m3, v3, 0.0))))
    has, first, into, into_value = tl.associative_scan(
        (has, first, tl.zeros_like(has), tl.zeros_like(first)), 0, _nearest_groups
    )
    first_value = tl.where(_at_start(has) != 0, _at_start(first), next_value)
    return tl.where(into != 0, into_value, next_value), first_value


@triton.jit
def _advantages(reward, value, valid, n3, advantage, discount, decay, TYPE: tl.constexpr):
    """Advantages of a tile, and that of its first step; n3: the value after each group."""
    r0, r1, r2, r3 = _split(reward)
    v0, v1, v2, v3 = _split(value)
    m0, m1, m2, m3 = _split(valid)
    n2 = tl.where(m3, v3, n3)
    n1 = tl.where(m2, v2, n2)
    n0 = tl.where(m1, v1, n1)
    a0, b0 = _step(r0, v0, n0, m0, discount, decay)
    a1, b1 = _step(r1, v1, n1, m1, discount, decay)
    a2, b2 = _step(r2, v2, n2, m2, discount, decay)
    a3, b3 = _step(r3, v3, n3, m3, discount, decay)
    a, b = _compose(a3, b3, a2, b2)
    a, b = _compose(a, b, a1, b1)
    a, b = _compose(a, b, a0, b0)
    same_a, same_b = tl.full([GROUPS], 1.0, TYPE), tl.zeros([GROUPS], TYPE)  # A -> A
    a, b, into_a, into_b = tl.associative_scan((a, b, same_a, same_b), 0, _compose_groups)
    b3 = tl.fma(a3, tl.fma(into_a, advantage.to(TYPE), into_b), b3)
    b2 = tl.fma(a2, b3, b2)
    b1 = tl.fma(a1, b2, b1)
    b0 = tl.fma(a0, b1, b0)
    return _join(b0, b1, b2, b3), _at_start(a) * advantage + _at_start(b)


@triton.jit(do_not_specialize=["length", "total", "gamma", "gamma_lambda"])
def gae_kernel(
    rewards,
    values,
    mask,
    cu_seqlens,
    last_value,
    advantages,
    returns,
    length: tl.int64,
    total: tl.int64,
    gamma: tl.float64,
    gamma_lambda: tl.float64,
    TYPE: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start, steps = sequence_bounds(s, cu_seqlens, length, total)
    group = 4 * (GROUPS - 1 - tl.arange(0, GROUPS))
    lane = group[:, None] + tl.arange(0, 4)[None, :]
    discount, decay = triton_common.number(gamma, TYPE), triton_common.number(gamma_lambda, TYPE)
    next_value = triton_common.number(0.0, TYPE)  # of the next valid step after the tile
    if last_value is not None:
        next_value = tl.load(last_value + s).to(TYPE)
    advantage = triton_common.number(0.0, tl.float64)  # the same step's
    first = tl.cdiv(steps, TILE) * TILE - TILE
    while first >= 0:
        at, limit = start + first, tl.minimum(steps - first, TILE).to(tl.int32)
        inside = lane < limit
        whole = (limit == TILE) & (at % 16 == 0)  # then 16 bytes at a time
        if whole:
            base = at // 16 * 16
            reward, value = tl.load(rewards + base + lane), tl.load(values + base + lane)
        else:
            reward = tl.load(rewards + at + lane, mask=inside, other=0.0)
            value = tl.load(values + at + lane, mask=inside, other=0.0)
        value = value.to(TYPE)
        if mask is None:
            valid, more = inside, group + 4 < limit
            n3 = tl.load(values + at + group + 4, mask=more, other=0.0).to(TYPE)
            n3 = tl.where(more, n3, next_value)
            next_value = tl.load(values + at).to(TYPE)
        else:
            valid = tl.load(mask + at + lane, mask=inside, other=False)
            n3, next_value = _next_values(value, valid, next_value)
        result, advantage = _advantages(
            reward.to(TYPE), value, valid, n3, advantage, discount, decay, TYPE
        )
        total_return = tl.where(valid, result + value, 0.0)
        result = tl.where(valid, result, 0.0)
        if whole:
            base = at // 16 * 16
            tl.store(advantages + base + lane, result)
            tl.store(returns + base + lane, total_return)
        else:
            tl.store(advantages + at + lane, result, mask=inside)
            tl.store(returns + at + lane, total_return, mask=inside)
        first -= TILE


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    last_value: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulation_dtype(
        rewards, values, *([] if last_value is None else [last_value])
    )
    advantages = torch.empty(values.shape, dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    if cu_seqlens is not None:
        checks.offset_values("cu_seqlens", cu_seqlens, values.shape[0])
    triton_common.launch(
        gae_kernel,
        values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        triton_common.dense(rewards),
        triton_common.dense(values),
        triton_common.dense(mask, torch.bool),
        triton_common.dense(cu_seqlens),
        triton_common.dense(last_value),
        advantages,
        returns,
        values.shape[-1],
        values.numel(),
        gamma,
        gamma * lam,
        num_warps=dtype.itemsize,  # 4, or 8 for float64: half as many steps a thread
        TYPE=triton_common.TYPES[dtype],
    )
    return advantages, returns
