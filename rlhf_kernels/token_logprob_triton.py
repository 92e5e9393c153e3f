"""token_logprob in Triton: log-probability and entropy in one read of the logits, and the gradient.

Nothing of the size of the logits is written but the gradient. Forward: N*V read, and per row and
chunk three sums; a second, small kernel puts them together and picks the tokens. Backward: N*V read
and N*V written, which may be the same memory.
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
    places,
    rest_of_lanes,
    row_start,
    softmax_step,
    temperature_of,
    to_common,
)

ROWS = 64  # of a program of the second kernel


@triton.jit
def wanted(row, tokens, count, ignore_index):
    """Whether any of a row's tokens is scored."""
    seen = tl.full([], 0, tl.int1)
    for i in range(count):
        seen = seen | (tl.load(tokens + row * count + i) != ignore_index)
    return seen


SCALARS = ["first", "inner", "outer_stride", "inner_stride", "vocab", "chunks", "count"]
SCALARS += ["ignore_index", "temperature_value"]


@triton.jit(do_not_specialize=SCALARS)
def token_logprob_sums_kernel(
    logits,
    first: tl.int64,
    offsets,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    tokens,
    temperature,
    sums,  # (rows, chunks, 3): maximum, rest, dot
    vocab: tl.int64,
    chunks: tl.int64,
    count: tl.int64,
    ignore_index: tl.int64,
    temperature_value: tl.float64,
    WITH_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    if wanted(row, tokens, count, ignore_index):  # else it is not read
        at = row_start(row, first, offsets, inner, outer_stride, inner_stride)
        if ALIGNED:
            at = at // G * G  # says so to the compiler
        scale = (1.0 / temperature_of(row, temperature, temperature_value) * LOG2_E).to(TYPE)
        top = tl.full([TILE // G], -float("inf"), TYPE)
        total = tl.zeros([TILE // G], TYPE)
        dot = tl.zeros([TILE // G], TYPE)
        size = vocab.to(tl.int32)
        begin = chunk.to(tl.int32) * CHUNK
        for column in range(begin, tl.minimum(begin + CHUNK, size), TILE):
            z = load_tile(logits + at, column, size, TILE, G, ALIGNED, TYPE)
            top, total, dot, _, _, _ = softmax_step(z, top, total, dot, scale, WITH_ENTROPY)
        highest, total, dot_sum, _ = to_common(top, total, dot, scale, WITH_ENTROPY)
        rest = rest_of_lanes(
            logits + at, begin, size, top, highest, total, scale, TILE, G, CHUNK, TYPE
        )
        tl.store(sums + program * 3, highest)
        tl.store(sums + program * 3 + 1, rest)
        tl.store(sums + program * 3 + 2, dot_sum)


@triton.jit(do_not_specialize=["rows", *SCALARS])
def token_logprob_fwd_kernel(
    logits,
    first: tl.int64,
    offsets,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    tokens,
    temperature,
    sums,
    logprob,
    entropy,  # None: not wanted
    row_max,
    log_sum,
    rows: tl.int64,
    vocab: tl.int64,
    chunks: tl.int64,
    count: tl.int64,
    ignore_index: tl.int64,
    temperature_value: tl.float64,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    row = tl.where(here, row, 0)
    inverse = 1.0 / temperature_of(row, temperature, temperature_value)
    top = tl.full([ROWS], -float("inf"), tl.float64)
    rest = tl.full([ROWS], -1.0, tl.float64)
    dot = tl.zeros([ROWS], tl.float64)
    for chunk in range(chunks):
        part = sums + (row * chunks + chunk) * 3
        part_top, part_rest = tl.load(part).to(tl.float64), tl.load(part + 1).to(tl.float64)
        part_dot = tl.load(part + 2).to(tl.float64)
        top, rest, dot, _, _ = merge(
            top, rest, dot, part_top, part_rest, part_dot, inverse * LOG2_E
        )
    log_total = log1p(rest)
    at = row_start(row, first, offsets, inner, outer_stride, inner_stride)
    seen = row < 0
    for i in range(count):
        token = tl.load(tokens + row * count + i)
        scored = token != ignore_index
        known = (token >= 0) & (token < vocab)
        z = tl.load(logits + at + token, mask=here & scored & known, other=float("nan"))
        value = (z.to(tl.float64) - top) * inverse - log_total
        tl.store(logprob + row * count + i, tl.where(scored, value, 0.0), mask=here)
        seen = seen | scored
    tl.store(row_max + row, tl.where(seen, top, 0.0), mask=here)
    tl.store(log_sum + row, tl.where(seen, log_total, 0.0), mask=here)
    if entropy is not None:
        h = log_total - dot / (1.0 + rest) * LN_2
        tl.store(entropy + row, tl.where(seen, h, 0.0), mask=here)


@triton.jit(do_not_specialize=["to_first", "to_inner", "to_outer", "to_stride", *SCALARS])
def token_logprob_bwd_kernel(
    logits,
    first: tl.int64,
    offsets,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_logits,
    to_first: tl.int64,
    to_offsets,
    to_inner: tl.int64,
    to_outer: tl.int64,
    to_stride: tl.int64,
    grad_logprob,  # None: no gradient from it
    grad_entropy,
    tokens,
    temperature,
    entropy,
    row_max,
    log_sum,
    vocab: tl.int64,
    chunks: tl.int64,
    count: tl.int64,
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
    to = row_start(row, to_first, to_offsets, to_inner, to_outer, to_stride)
    if ALIGNED:
        at, to = at // G * G, to // G * G
    seen = wanted(row, tokens, count, ignore_index)
    # A token out of range has no gradient: the row's sum G is over the others.
    all_grads = tl.full([], 0.0, TYPE)
    if grad_logprob is not None:
        for i in range(count):
            token = tl.load(tokens + row * count + i)
            known = (token != ignore_index) & (token >= 0) & (token < vocab)
            all_grads += tl.load(grad_logprob + row * count + i, mask=known, other=0.0).to(TYPE)
    inverse = 1.0 / temperature_of(row, temperature, temperature_value)
    scale, inverse = (inverse * LOG2_E).to(TYPE), inverse.to(TYPE)
    top = tl.load(row_max + row)
    log2_sum = tl.load(log_sum + row) * LOG2_E
    size = vocab.to(tl.int32)
    readable = tl.where(seen, size, 0)
    begin = chunk.to(tl.int32) * CHUNK
    for column in range(begin, tl.minimum(begin + CHUNK, size), TILE):
        place = places(column, TILE, G)
        z = load_tile(logits + at, column, readable, TILE, G, ALIGNED, TYPE)
        log2_p = (z - top) * scale - log2_sum
        p = tl.exp2(log2_p)
        grad = -p * all_grads
        if grad_logprob is not None:
            hit = tl.full([], 0, tl.int1)
            for i in range(count):
                token = tl.load(tokens + row * count + i)
                hit = hit | ((token != ignore_index) & (token >= column) & (token < column + TILE))
            if hit & seen:  # onehot - p would cancel where p is near 1
                own = tl.zeros([TILE // G, G], TYPE)
                for i in range(count):
                    token = tl.load(tokens + row * count + i)
                    g = tl.load(grad_logprob + row * count + i).to(TYPE)
                    own += tl.where((place == token) & (token != ignore_index), g, 0.0)
                own = tl.where(z == -float("inf"), 0.0, own)  # a banned logit is a constant
                grad = -own * expm1(log2_p * LN_2, p) - (all_grads - own) * p
        if grad_entropy is not None:
            h = tl.load(grad_entropy + row).to(TYPE)
            grad -= h * p * (tl.maximum(log2_p * LN_2, -1000.0) + tl.load(entropy + row))
        grad = tl.where(seen, grad * inverse, 0.0)
        inside = before(column, size, TILE, G, ALIGNED)
        tl.store(grad_logits + to + place, grad.to(grad_logits.dtype.element_ty), mask=inside)


def token_logprob_fwd(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = checks.accumulation_dtype(logits)
    rows, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    chunks = softmax_triton.chunks_of(vocab)
    tokens = tokens.contiguous()
    count = tokens.numel() // max(rows, 1)
    triton_common.check_tokens(tokens, vocab, ignore_index)
    sums = logits.new_empty((rows, chunks, 3), dtype=dtype)
    logprob = torch.empty_like(tokens, dtype=dtype)
    row_max, log_sum = (logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(2))
    entropy = torch.empty_like(row_max) if with_entropy else logits.new_empty(0, dtype=dtype)
    places = softmax_triton.find_rows(logits)
    degrees = softmax_triton.number_in(temperature_value, logits)
    scalars = (vocab, chunks, count, ignore_index, degrees)
    triton_common.launch(
        token_logprob_sums_kernel,
        rows * chunks,
        *(*places, tokens, temperature, sums, *scalars),
        WITH_ENTROPY=with_entropy,
        ALIGNED=softmax_triton.aligned(logits),
        **softmax_triton.layout(logits),
    )
    triton_common.launch(
        token_logprob_fwd_kernel,
        triton.cdiv(rows, ROWS),
        *(*places, tokens, temperature, sums, logprob, entropy if with_entropy else None),
        *(row_max, log_sum, rows, *scalars),
        ROWS=ROWS,
        num_warps=2,
    )
    return logprob, entropy, row_max, log_sum


def token_logprob_bwd(
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved
) -> Tensor:
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward(grad_logprob, grad_entropy, logits, grad_logits, *saved)
    return grad_logits


def token_logprob_bwd_(
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved
) -> None:
    _backward(grad_logprob, grad_entropy, logits, logits, *saved)


def _backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    grad_logits: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> None:
    rows, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    chunks = softmax_triton.chunks_of(vocab)
    tokens = tokens.contiguous()
    if entropy.numel() == 0:  # not asked for: torch.compile hands over its empty gradient
        grad_entropy = None
    grads = (triton_common.dense(grad_logprob), triton_common.dense(grad_entropy))
    triton_common.launch(
        token_logprob_bwd_kernel,
        rows * chunks,
        *(*softmax_triton.find_rows(logits), *softmax_triton.find_rows(grad_logits), *grads),
        *(tokens, temperature, entropy, row_max, log_sum),
        *(vocab, chunks, tokens.numel() // max(rows, 1), ignore_index),
        softmax_triton.number_in(temperature_value, logits),
        ALIGNED=softmax_triton.aligned(logits, grad_logits),
        **softmax_triton.layout(logits),
    )
