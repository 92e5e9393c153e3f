"""logprob_kl in Triton: log-probabilities, exact KL and entropy in one read of both logits.

Nothing of the size of the logits is written but the gradient. The policy's sums are taken by the
steps of token_logprob: its log-probability and entropy have the same bits. Forward: 2 N*V read.
Backward: 2 N*V read, N*V written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import checks, softmax_triton, triton_common
from rlhf_kernels.softmax_triton import (
    LN_2,
    LOG2_E,
    before,
    expm1,
    load_tile,
    log1p,
    merge,
    moved,
    places,
    rest_of_lanes,
    row_start,
    softmax_step,
    temperature_of,
    to_common,
)

ROWS = 64  # of a program of the second kernel
SCALARS = ["first", "inner", "outer_stride", "inner_stride"]
SCALARS += ["ref_first", "ref_inner", "ref_outer_stride", "ref_inner_stride"]
SCALARS += ["vocab", "chunks", "ignore_index", "temperature_value"]


@triton.jit(do_not_specialize=SCALARS)
def logprob_kl_sums_kernel(
    logits,
    first: tl.int64,
    offsets,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ref_logits,
    ref_first: tl.int64,
    ref_offsets,
    ref_inner: tl.int64,
    ref_outer_stride: tl.int64,
    ref_inner_stride: tl.int64,
    tokens,
    temperature,
    sums,  # (rows, chunks, 6): maximum, rest, dot; reference's maximum, rest; cross
    vocab: tl.int64,
    chunks: tl.int64,
    ignore_index: tl.int64,
    temperature_value: tl.float64,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    if tl.load(tokens + row) != ignore_index:  # else it is not read
        at = row_start(row, first, offsets, inner, outer_stride, inner_stride)
        ref_at = row_start(
            row, ref_first, ref_offsets, ref_inner, ref_outer_stride, ref_inner_stride
        )
        if ALIGNED:  # says so to the compiler
            at, ref_at = at // G * G, ref_at // G * G
        scale = (1.0 / temperature_of(row, temperature, temperature_value) * LOG2_E).to(TYPE)
        top = tl.full([TILE // G], -float("inf"), TYPE)
        total = tl.zeros([TILE // G], TYPE)
        dot = tl.zeros([TILE // G], TYPE)
        ref_top, ref_total, cross = top, total, dot
        size = vocab.to(tl.int32)
        begin = chunk.to(tl.int32) * CHUNK
        end = tl.minimum(begin + CHUNK, size)
        # Not hoisted out of the loop: without 16-byte loads each element has an address of its own,
        # and what reads a lane again below would keep them in registers.
        for column in tl.range(begin, end, TILE, disable_licm=True):
            z = load_tile(logits + at, column, size, TILE, G, ALIGNED, TYPE)
            ref_z = load_tile(ref_logits + ref_at, column, size, TILE, G, ALIGNED, TYPE)
            earlier = total
            top, total, dot, s, e, down = softmax_step(z, top, total, dot, scale, True)
            ref_top, ref_total, _, ref_s, _, ref_down = softmax_step(
                ref_z, ref_top, ref_total, dot, scale, False
            )
            # p = 0: the term is 0, also where the reference has probability 0 too (inf - inf)
            here = tl.sum(tl.where(e == 0.0, 0.0, e * (s - ref_s)), 1)
            cross = moved(cross, earlier, down - ref_down, tl.exp2(down)) + here
        earlier = total
        highest, total, all_dot, down = to_common(top, total, dot, scale, True)
        ref_highest, ref_total, _, ref_down = to_common(ref_top, ref_total, dot, scale, False)
        all_cross = tl.sum(moved(cross, earlier, down - ref_down, tl.exp2(down)), 0)
        rest = rest_of_lanes(
            logits + at, begin, size, top, highest, total, scale, TILE, G, CHUNK, TYPE
        )
        ref_at = ref_logits + ref_at
        ref_rest = rest_of_lanes(
            ref_at, begin, size, ref_top, ref_highest, ref_total, scale, TILE, G, CHUNK, TYPE
        )
        tl.store(sums + program * 6, highest)
        tl.store(sums + program * 6 + 1, rest)
        tl.store(sums + program * 6 + 2, all_dot)
        tl.store(sums + program * 6 + 3, ref_highest)
        tl.store(sums + program * 6 + 4, ref_rest)
        tl.store(sums + program * 6 + 5, all_cross)


@triton.jit
def of_token(logits, at, token, top, log_total, inverse, known):
    z = tl.load(logits + at + token, mask=known, other=float("nan"))
    return (z.to(tl.float64) - top) * inverse - log_total


@triton.jit(do_not_specialize=["rows", *SCALARS])
def logprob_kl_fwd_kernel(
    logits,
    first: tl.int64,
    offsets,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ref_logits,
    ref_first: tl.int64,
    ref_offsets,
    ref_inner: tl.int64,
    ref_outer_stride: tl.int64,
    ref_inner_stride: tl.int64,
    tokens,
    temperature,
    sums,
    logprob,
    ref_logprob,
    kl,
    entropy,
    row_max,
    log_sum,
    ref_row_max,
    ref_log_sum,
    rows: tl.int64,
    vocab: tl.int64,
    chunks: tl.int64,
    ignore_index: tl.int64,
    temperature_value: tl.float64,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    row = tl.where(here, row, 0)
    inverse = 1.0 / temperature_of(row, temperature, temperature_value)
    scale = inverse * LOG2_E
    top = tl.full([ROWS], -float("inf"), tl.float64)
    rest, dot = tl.full([ROWS], -1.0, tl.float64), tl.zeros([ROWS], tl.float64)
    ref_top, ref_rest, cross = top, rest, dot
    for chunk in range(chunks):
        part = sums + (row * chunks + chunk) * 6
        p_top, p_rest = tl.load(part).to(tl.float64), tl.load(part + 1).to(tl.float64)
        p_dot, p_cross = tl.load(part + 2).to(tl.float64), tl.load(part + 5).to(tl.float64)
        r_top, r_rest = tl.load(part + 3).to(tl.float64), tl.load(part + 4).to(tl.float64)
        earlier = 1.0 + rest
        top, rest, dot, down, p_down = merge(top, rest, dot, p_top, p_rest, p_dot, scale)
        ref_top, ref_rest, _, ref_down, r_down = merge(
            ref_top, ref_rest, dot, r_top, r_rest, p_dot, scale
        )
        cross = moved(cross, earlier, down - ref_down, tl.exp2(down))
        cross += moved(p_cross, 1.0 + p_rest, p_down - r_down, tl.exp2(p_down))
    log_total, ref_log_total = log1p(rest), log1p(ref_rest)
    divergence = cross / (1.0 + rest) * LN_2 - log_total + ref_log_total
    divergence = tl.where(divergence < 0.0, 0.0, divergence)  # but for rounding
    token = tl.load(tokens + row)
    scored = token != ignore_index
    known = here & scored & (token >= 0) & (token < vocab)
    at = row_start(row, first, offsets, inner, outer_stride, inner_stride)
    value = of_token(logits, at, token, top, log_total, inverse, known)
    at = row_start(row, ref_first, ref_offsets, ref_inner, ref_outer_stride, ref_inner_stride)
    ref_value = of_token(ref_logits, at, token, ref_top, ref_log_total, inverse, known)
    tl.store(logprob + row, tl.where(scored, value, 0.0), mask=here)
    tl.store(ref_logprob + row, tl.where(scored, ref_value, 0.0), mask=here)
    tl.store(kl + row, tl.where(scored, divergence, 0.0), mask=here)
    h = log_total - dot / (1.0 + rest) * LN_2
    tl.store(entropy + row, tl.where(scored, h, 0.0), mask=here)
    tl.store(row_max + row, tl.where(scored, top, 0.0), mask=here)
    tl.store(log_sum + row, tl.where(scored, log_total, 0.0), mask=here)
    tl.store(ref_row_max + row, tl.where(scored, ref_top, 0.0), mask=here)
    tl.store(ref_log_sum + row, tl.where(scored, ref_log_total, 0.0), mask=here)


@triton.jit(do_not_specialize=SCALARS)
def logprob_kl_bwd_kernel(
    logits,
    first: tl.int64,
    offsets,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ref_logits,
    ref_first: tl.int64,
    ref_offsets,
    ref_inner: tl.int64,
    ref_outer_stride: tl.int64,
    ref_inner_stride: tl.int64,
    grad_logits,  # contiguous
    grad_logprob,  # None: no gradient from it
    grad_kl,
    grad_entropy,
    tokens,
    temperature,
    kl,
    entropy,
    row_max,
    log_sum,
    ref_row_max,
    ref_log_sum,
    vocab: tl.int64,
    chunks: tl.int64,
    ignore_index: tl.int64,
    temperature_value: tl.float64,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    at = row_start(row, first, offsets, inner, outer_stride, inner_stride)
    ref_at = row_start(row, ref_first, ref_offsets, ref_inner, ref_outer_stride, ref_inner_stride)
    to = row * vocab
    if ALIGNED:
        at, ref_at, to = at // G * G, ref_at // G * G, to // G * G
    token = tl.load(tokens + row)
    seen = token != ignore_index
    own = tl.full([], 0.0, TYPE)
    if grad_logprob is not None:
        known = seen & (token >= 0) & (token < vocab)
        own = tl.load(grad_logprob + row, mask=known, other=0.0).to(TYPE)
    inverse = 1.0 / temperature_of(row, temperature, temperature_value)
    scale, inverse = (inverse * LOG2_E).to(TYPE), inverse.to(TYPE)
    top, log2_sum = tl.load(row_max + row), tl.load(log_sum + row) * LOG2_E
    size = vocab.to(tl.int32)
    readable = tl.where(seen, size, 0)
    begin = chunk.to(tl.int32) * CHUNK
    for column in range(begin, tl.minimum(begin + CHUNK, size), TILE):
        place = places(column, TILE, G)
        z = load_tile(logits + at, column, readable, TILE, G, ALIGNED, TYPE)
        log2_p = (z - top) * scale - log2_sum
        p = tl.exp2(log2_p)
        grad = -p * own
        if (token >= column) & (token < column + TILE):  # onehot - p would cancel where p is near 1
            target = (place == token) & (z != -float("inf"))  # a banned logit is a constant
            grad = tl.where(target, -own * expm1(log2_p * LN_2, p), grad)
        if grad_entropy is not None:
            h = tl.load(grad_entropy + row).to(TYPE)
            grad -= h * p * (tl.maximum(log2_p * LN_2, -1000.0) + tl.load(entropy + row))
        if grad_kl is not None:
            ref_z = load_tile(ref_logits + ref_at, column, readable, TILE, G, ALIGNED, TYPE)
            log2_q = (ref_z - tl.load(ref_row_max + row)) * scale
            log2_q -= tl.load(ref_log_sum + row) * LOG2_E
            slope = p * ((log2_p - log2_q) * LN_2 - tl.load(kl + row))
            grad += tl.load(grad_kl + row).to(TYPE) * tl.where(p == 0.0, 0.0, slope)
        grad = tl.where(seen, grad * inverse, 0.0)
        inside = before(column, size, TILE, G, ALIGNED)
        tl.store(grad_logits + to + place, grad.to(grad_logits.dtype.element_ty), mask=inside)


def logprob_kl_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    dtype = checks.accumulation_dtype(logits)
    rows, vocab = tokens.numel(), logits.shape[-1]
    chunks = softmax_triton.chunks_of(vocab)
    triton_common.check_tokens(tokens, vocab, ignore_index)
    sums = logits.new_empty((rows, chunks, 6), dtype=dtype)
    out = tuple(logits.new_empty(tokens.shape, dtype=dtype) for _ in range(8))
    places = (*softmax_triton.find_rows(logits), *softmax_triton.find_rows(ref_logits))
    inputs = (*places, tokens.contiguous(), temperature, sums)
    degrees = softmax_triton.number_in(temperature_value, logits)
    scalars = (vocab, chunks, ignore_index, degrees)
    triton_common.launch(
        logprob_kl_sums_kernel,
        rows * chunks,
        *(*inputs, *scalars),
        ALIGNED=softmax_triton.aligned(logits, ref_logits),
        **softmax_triton.layout(logits),
    )
    triton_common.launch(
        logprob_kl_fwd_kernel,
        triton.cdiv(rows, ROWS),
        *(*inputs, *out, rows, *scalars),
        ROWS=ROWS,
        num_warps=2,
    )
    return out


def logprob_kl_bwd(
    grad_logprob: Tensor | None,
    grad_kl: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int,
    *saved: Tensor,
) -> Tensor:
    rows, vocab = tokens.numel(), logits.shape[-1]
    chunks = softmax_triton.chunks_of(vocab)
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grads = (triton_common.dense(g) for g in (grad_logprob, grad_kl, grad_entropy))
    triton_common.launch(
        logprob_kl_bwd_kernel,
        rows * chunks,
        *(*softmax_triton.find_rows(logits), *softmax_triton.find_rows(ref_logits), grad_logits),
        *(*grads, tokens.contiguous(), temperature, *saved),
        *(vocab, chunks, ignore_index, softmax_triton.number_in(temperature_value, logits)),
        ALIGNED=softmax_triton.aligned(logits, ref_logits, grad_logits),
        **softmax_triton.layout(logits),
    )
    return grad_logits
