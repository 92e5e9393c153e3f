"""kl_estimate in Triton: k1, k2, k3 and their derivative, element by element.

The formulas of csrc/math/kl.h, for the other kernels as well. Nothing but the result is written:
forward reads 2N and writes N, backward reads 3N and writes N, or 2N with the reference's gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import triton_common
from rlhf_kernels.triton_common import number

BLOCK = 2048  # elements of a program
# 1/2!, 1/3!, ...: 10 of them reach the last place of float32 for |x| <= 1, 18 that of float64.
INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(k + 2) for k in range(18)))


@triton.jit
def exp(x, TYPE: tl.constexpr):
    """e^x within 1.1 units of the last place: of tl.exp's 2 to 3 sums of ratios keep a trace."""
    if TYPE.is_fp64():
        y = tl.exp(x)
    else:
        x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))  # inf and 0 from there on
        power = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = tl.fma(power, number(-0.693359375, TYPE), x)  # ln 2 in two parts, the first exact
        rest = tl.fma(power, number(2.12194440e-4, TYPE), rest)
        series = tl.full(x.shape, INVERSE_FACTORIALS[5], TYPE)
        for k in tl.static_range(2, 7):
            series = tl.fma(series, rest, number(INVERSE_FACTORIALS[6 - k], TYPE))
        # power is up to 128, and 2^128 is infinite
        y = (2.0 + 2.0 * tl.fma(rest * rest, series, rest)) * tl.exp2(power - 1.0)
    return y


@triton.jit
def exp_remainder(x, exp_x, TYPE: tl.constexpr):
    """e^x - 1 - x, with e^x given; near 0, where that cancels, x^2 (1/2! + x/3! + x^2/4! + ...)."""
    terms: tl.constexpr = 18 if TYPE.is_fp64() else 10
    series = tl.full(x.shape, INVERSE_FACTORIALS[terms - 1], TYPE)
    for k in tl.static_range(2, terms + 1):
        series = tl.fma(series, x, number(INVERSE_FACTORIALS[terms - k], TYPE))
    return tl.where(tl.abs(x) < 1.0, x * x * series, exp_x - 1.0 - x)


@triton.jit
def kl_term(d, clamp, KIND: tl.constexpr, TYPE: tl.constexpr):
    """Estimate number KIND of KINDS of the log-ratio d, bounded to +-clamp, and its slope in d.

    The slope is 0 beyond the clamp. Without one (inf) k3 is inf where e^-d is, and its slope -inf.
    """
    inside = ~(tl.abs(d) > clamp)
    d = tl.where(d < -clamp, -clamp, tl.where(d > clamp, clamp, d))  # a NaN stays
    if KIND == 0:
        value, slope = d, tl.full(d.shape, 1.0, TYPE)
    elif KIND == 1:
        value, slope = d * d * 0.5, d
    else:
        exp_x = exp(-d, TYPE)
        value = exp_remainder(-d, exp_x, TYPE)
        slope = tl.where(tl.abs(d) < 1.0, d - value, 1.0 - exp_x)
    return value, tl.where(inside, slope, 0.0)


@triton.jit
def _log_ratio(logprob, ref_logprob, at, inside, TYPE: tl.constexpr):
    p = tl.load(logprob + at, mask=inside).to(TYPE)
    return p - tl.load(ref_logprob + at, mask=inside).to(TYPE)


@triton.jit
def _forward(logprob, ref_logprob, kl, at, inside, clamp, KIND: tl.constexpr, TYPE: tl.constexpr):
    d = _log_ratio(logprob, ref_logprob, at, inside, TYPE)
    value, _ = kl_term(d, clamp, KIND, TYPE)
    tl.store(kl + at, value, mask=inside)


@triton.jit
def _backward(
    grad,
    logprob,
    ref_logprob,
    to,
    to_ref,
    at,
    inside,
    clamp,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
):
    _, slope = kl_term(_log_ratio(logprob, ref_logprob, at, inside, TYPE), clamp, KIND, TYPE)
    slope = slope * tl.load(grad + at, mask=inside).to(TYPE)
    tl.store(to + at, slope, mask=inside)
    if to_ref is not None:
        tl.store(to_ref + at, -slope, mask=inside)


@triton.jit(do_not_specialize=["n", "clamp"])
def kl_estimate_fwd_kernel(
    logprob,
    ref_logprob,
    kl,
    n: tl.int64,
    clamp: tl.float64,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    bound = number(clamp, TYPE)
    if first + BLOCK <= n:  # without a mask: 16 bytes at a time
        _forward(logprob, ref_logprob, kl, at, None, bound, KIND, TYPE)
    else:
        _forward(logprob, ref_logprob, kl, at, at < n, bound, KIND, TYPE)


@triton.jit(do_not_specialize=["n", "clamp"])
def kl_estimate_bwd_kernel(
    grad,
    logprob,
    ref_logprob,
    to,
    to_ref,
    n: tl.int64,
    clamp: tl.float64,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    bound = number(clamp, TYPE)
    if first + BLOCK <= n:
        _backward(grad, logprob, ref_logprob, to, to_ref, at, None, bound, KIND, TYPE)
    else:
        _backward(grad, logprob, ref_logprob, to, to_ref, at, at < n, bound, KIND, TYPE)


def kl_estimate_fwd(logprob: Tensor, ref_logprob: Tensor, kind: int, clamp: float) -> Tensor:
    kl = torch.empty(logprob.shape, dtype=logprob.dtype, device=logprob.device)
    triton_common.launch(
        kl_estimate_fwd_kernel,
        triton.cdiv(kl.numel(), BLOCK),
        triton_common.dense(logprob),
        triton_common.dense(ref_logprob),
        kl,
        kl.numel(),
        clamp,
        num_warps=8,
        KIND=kind,
        TYPE=triton_common.TYPES[kl.dtype],
        BLOCK=BLOCK,
    )
    return kl


def kl_estimate_bwd(
    grad: Tensor, logprob: Tensor, ref_logprob: Tensor, kind: int, clamp: float, need_ref: bool
) -> tuple[Tensor, Tensor]:
    to = torch.empty(logprob.shape, dtype=logprob.dtype, device=logprob.device)
    to_ref = torch.empty_like(to) if need_ref else to.new_empty(0)
    triton_common.launch(
        kl_estimate_bwd_kernel,
        triton.cdiv(to.numel(), BLOCK),
        triton_common.dense(grad),
        triton_common.dense(logprob),
        triton_common.dense(ref_logprob),
        to,
        to_ref if need_ref else None,
        to.numel(),
        clamp,
        num_warps=8,
        KIND=kind,
        TYPE=triton_common.TYPES[to.dtype],
        BLOCK=BLOCK,
    )
    return to, to_ref
