"""What the losses share in Triton: blocks of tokens, sums per sequence, denominator, backward.

Token sums run over the flat tokens in aligned blocks. Where sequences matter the blocks are cut
from the start of each sequence, so that what is summed over one has the same bits in every batch.
Blocks write partial sums, which one program adds up in float64, in fixed order. No per-token
weight, ratio or index exists; sums per sequence take one more read of the mask (and of 2N) before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import aggregation, checks, triton_common

# Tokens of a block, and of a tile: four a thread, which is 16 bytes in float32; two a thread where
# the start is not aligned, so that loads are not wide anyway.
FLAT, FLAT_TILE, FLAT_WARPS = 4096, 1024, 8  # of the flat tokens
CHUNK, CHUNK_TILE, CHUNK_WARPS = 1024, 256, 4  # of a sequence
TOKEN_SUM = tl.constexpr(aggregation.AGGREGATIONS.index("token-sum"))
SEQ_MEAN_TOKEN_MEAN = aggregation.AGGREGATIONS.index("seq-mean-token-mean")


class Blocks(NamedTuple):
    """How the tokens of a call are cut: blocks of up to ``size`` tokens, one a program."""

    programs: int
    size: int
    tile: int  # tokens at a time
    num_warps: int
    tokens: int
    offsets: Tensor | None  # where packed sequences start; None: rows of ``length`` tokens
    sequences: int
    length: int
    by_sequence: bool  # else blocks of the flat tokens

    def arguments(self) -> tuple[Tensor | None, int, int, int, int]:
        """What the kernels take to find their tokens (``find_tokens``)."""
        return self.offsets, self.sequences, self.length, self.tokens, self.programs


def cut(x: Tensor, cu_seqlens: Tensor | None, code: int, by_sequence: bool = False) -> Blocks:
    """The blocks of x for aggregation number ``code``, or where a term is one per sequence."""
    n = x.numel()
    if cu_seqlens is not None:
        checks.offset_values("cu_seqlens", cu_seqlens, n)
    if not by_sequence and code <= TOKEN_SUM.value:
        return Blocks(triton.cdiv(n, FLAT), FLAT, FLAT_TILE, FLAT_WARPS, n, None, 0, 0, False)
    if cu_seqlens is None:
        sequences, length = x.shape
        count = sequences * triton.cdiv(length, CHUNK)
        return Blocks(count, CHUNK, CHUNK_TILE, CHUNK_WARPS, n, None, sequences, length, True)
    sequences = cu_seqlens.numel() - 1
    count = n // CHUNK + sequences if sequences else 0
    offsets = triton_common.dense(cu_seqlens)
    return Blocks(count, CHUNK, CHUNK_TILE, CHUNK_WARPS, n, offsets, sequences, 0, True)


@triton.jit
def offset_of(sequence, offsets, n):
    """Where a packed sequence starts; inside [0, n] whatever the offsets are."""
    return tl.minimum(tl.maximum(tl.load(offsets + sequence).to(tl.int64), 0), n)


@triton.jit
def first_block(sequence, offsets, length, n, BLOCK: tl.constexpr):
    """The first block of a sequence.

    Packed it is start // BLOCK + sequence: the blocks up to the next one's are enough for every
    length, and no prefix sum over the sequences is needed to know them.
    """
    if offsets is None:
        first = sequence * ((length + BLOCK - 1) // BLOCK)
    else:
        first = offset_of(sequence, offsets, n) // BLOCK + sequence
    return first


@triton.jit
def find_tokens(block, offsets, sequences, length, n, BLOCK: tl.constexpr):
    """(sequence, begin, end) of a block: it holds the tokens from begin, to end at the most."""
    if offsets is None:
        blocks = (length + BLOCK - 1) // BLOCK
        sequence = block // blocks
        begin = sequence * length + block % blocks * BLOCK
        end = (sequence + 1) * length
    else:
        sequence, high = block * 0, sequences
        while high - sequence > 1:
            middle = (sequence + high) // 2
            before = first_block(middle, offsets, length, n, BLOCK) <= block
            sequence = tl.where(before, middle, sequence)
            high = tl.where(before, high, middle)
        within = tl.maximum(block - first_block(sequence, offsets, length, n, BLOCK), 0)
        begin = offset_of(sequence, offsets, n) + within * BLOCK
        end = offset_of(sequence + 1, offsets, n)
    return sequence, begin, end


@triton.jit
def load_tokens(x, begin, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The tokens of a block, 0 from end on. WHOLE: none is missing; 16 bytes at a time."""
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        y = tl.load(x + begin + lanes)
    else:
        y = tl.load(x + begin + lanes, mask=lanes < end - begin, other=0)
    return y


@triton.jit
def valid_tokens(mask, begin, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    if mask is not None:
        valid = load_tokens(mask, begin, end, BLOCK, WHOLE) != 0
    elif WHOLE:
        valid = tl.full([BLOCK], 1, tl.int1)
    else:
        valid = tl.arange(0, BLOCK) < end - begin
    return valid


@triton.jit
def load_valid(x, begin, end, valid, TYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The tokens of a block in TYPE, 0 where they are not valid; 0 where x is None."""
    if x is None:
        y = tl.zeros([BLOCK], TYPE)
    else:
        y = tl.where(valid, load_tokens(x, begin, end, BLOCK, WHOLE).to(TYPE), 0.0)
    return y


@triton.jit
def store_tokens(x, begin, end, y, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(x + begin + lanes, y)
    else:
        tl.store(x + begin + lanes, y, mask=lanes < end - begin)


@triton.jit
def sum_wide(x, BLOCK: tl.constexpr):
    """The sum of a block in float64; four neighbours, which one thread holds, in their own type."""
    return tl.sum(tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1).to(tl.float64), 0)


@triton.jit
def sum_range(partials, begin, end, TILE: tl.constexpr):
    """The sum of partials[begin:end], in an order that depends on its length alone."""
    lanes = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    for at in range(begin, end, TILE):
        total += tl.load(partials + at + lanes, mask=lanes < end - at, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_partials(
    partials, blocks, K: tl.constexpr, ROWS: tl.constexpr, MAXIMUM: tl.constexpr, TILE: tl.constexpr
):
    """The sums of the K rows of partials (K, blocks), as [ROWS]. With MAXIMUM the last row holds
    numbers >= 0 and gives its maximum, or NaN if the row before has one."""
    rows, lanes = tl.arange(0, ROWS), tl.arange(0, TILE)
    sums, most = tl.zeros([ROWS, TILE], tl.float64), tl.zeros([TILE], tl.float64)
    places = partials + rows[:, None] * blocks + lanes[None, :]
    last = partials + (K - 1) * blocks + lanes
    for at in range(0, blocks, TILE):
        inside = lanes < blocks - at
        sums += tl.load(places + at, mask=(rows < K)[:, None] & inside[None, :], other=0.0)
        if MAXIMUM:
            most = tl.maximum(most, tl.load(last + at, mask=inside, other=0.0))
    totals = tl.sum(sums, 1)
    if MAXIMUM:
        before = tl.sum(tl.where(rows == K - 2, totals, 0.0), 0)
        maximum = tl.where(before == before, tl.max(most, 0), before)
        totals = tl.where(rows == K - 1, maximum, totals)
    return totals


@triton.jit(do_not_specialize=["sequences", "length", "n", "blocks"])
def token_sums_kernel(
    mask,
    x,
    y,
    partials,
    offsets,
    sequences: tl.int64,
    length: tl.int64,
    n: tl.int64,
    blocks: tl.int64,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials (2, blocks): how many tokens of a block are valid, and x - y summed over them."""
    block = tl.program_id(0).to(tl.int64)
    sequences, length, n = sequences.to(tl.int64), length.to(tl.int64), n.to(tl.int64)
    _, begin, end = find_tokens(block, offsets, sequences, length, n, BLOCK)
    valid = valid_tokens(mask, begin, end, BLOCK, False)
    tl.store(partials + block, tl.sum(valid.to(tl.int32), 0).to(tl.float64))
    if y is not None:
        difference = load_valid(x, begin, end, valid, TYPE, BLOCK, False)
        difference -= load_valid(y, begin, end, valid, TYPE, BLOCK, False)
        tl.store(partials + blocks.to(tl.int64) + block, sum_wide(difference, BLOCK))


@triton.jit(do_not_specialize=["sequences", "length", "n", "blocks", "clamp"])
def sequence_sums_kernel(
    partials,
    out,
    offsets,
    sequences: tl.int64,
    length: tl.int64,
    n: tl.int64,
    blocks: tl.int64,
    clamp: tl.float64,
    MEAN: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """out (4, sequences): the valid tokens of a sequence, what one weighs, the sequence's ratio,
    and what a token gets of the sum of the slopes in the log-ratio (0 where that is clamped)."""
    sequence = tl.program_id(0).to(tl.int64)
    sequences, length, n = sequences.to(tl.int64), length.to(tl.int64), n.to(tl.int64)
    begin = first_block(sequence, offsets, length, n, BLOCK)
    end = first_block(sequence + 1, offsets, length, n, BLOCK)
    count = sum_range(partials, begin, end, TILE)
    inverse = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
    weight = inverse if MEAN else tl.full([], 1.0, tl.float64)
    out += sequence
    tl.store(out, count)
    tl.store(out + sequences, weight)
    if RATIO:
        total = sum_range(partials + blocks.to(tl.int64), begin, end, TILE)
        x, bound = total * inverse, triton_common.number(clamp, tl.float64)
        tl.store(out + 2 * sequences, tl.exp(clamped(x, bound)))
        tl.store(out + 3 * sequences, tl.where(tl.abs(x) > bound, 0.0, weight * inverse))


@triton.jit
def clamped(x, bound):
    """x, bounded to +-bound; a NaN stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


def sequence_sums(
    blocks: Blocks,
    code: int,
    mask: Tensor | None,
    x: Tensor,
    y: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    clamp: float = 0.0,
) -> Tensor | None:
    """``sequence_sums_kernel`` for the log-ratios x - y; without y nothing is said of ratios.

    None where the blocks are those of the flat tokens.
    """
    if not blocks.by_sequence:
        return None
    partials = x.new_empty((2, blocks.programs), dtype=torch.float64)
    out = x.new_empty((4, blocks.sequences), dtype=torch.float64)
    triton_common.launch(
        token_sums_kernel,
        blocks.programs,
        mask,
        x,
        y,
        partials,
        *blocks.arguments(),
        num_warps=blocks.num_warps,
        TYPE=triton_common.TYPES[dtype],
        BLOCK=blocks.size,
    )
    triton_common.launch(
        sequence_sums_kernel,
        blocks.sequences,
        partials,
        out,
        *blocks.arguments(),
        clamp,
        MEAN=code == SEQ_MEAN_TOKEN_MEAN,
        RATIO=y is not None,
        BLOCK=blocks.size,
        TILE=256,
    )
    return out


@triton.jit(do_not_specialize=["blocks", "sequences", "normalizer_value", "max_length"])
def finish_kernel(
    partials,
    per_sequence,
    normalizer,
    loss,
    totals,
    blocks: tl.int64,
    sequences: tl.int64,
    normalizer_value: tl.float64,
    max_length: tl.int64,
    CODE: tl.constexpr,
    K: tl.constexpr,
    MAXIMUM: tl.constexpr,
    TILE: tl.constexpr,
):
    """loss: row 0 of partials (K, blocks), added up, over the denominator; totals: the other rows,
    of which row 1 counts the valid tokens, then 1 / denominator (0: of nothing)."""
    ROWS: tl.constexpr = 8
    rows, lanes = tl.arange(0, ROWS), tl.arange(0, TILE)
    sums = sum_partials(partials, blocks.to(tl.int64), K, ROWS, MAXIMUM, TILE)
    tl.store(totals + rows - 1, sums, mask=(rows > 0) & (rows < K))

    count = tl.sum(tl.where(rows == 1, sums, 0.0), 0)
    if CODE == TOKEN_SUM:
        count = tl.full([], 1.0, tl.float64)
    elif CODE > TOKEN_SUM:
        filled = tl.zeros([TILE], tl.float64)
        sequences = sequences.to(tl.int64)
        for at in range(0, sequences, TILE):
            tokens = tl.load(per_sequence + at + lanes, mask=lanes < sequences - at, other=0.0)
            filled += (tokens > 0).to(tl.float64)
        count = tl.sum(filled, 0)
    if normalizer is not None:
        count = tl.load(normalizer).to(tl.float64)
    else:
        value = triton_common.number(normalizer_value, tl.float64)
        count = tl.where(value >= 0, value, count)
    scaled = count * max_length.to(tl.float64)
    inverse = tl.where(count == 0, 0.0, 1.0 / tl.where(count == 0, 1.0, scaled))
    total = tl.sum(tl.where(rows == 0, sums, 0.0), 0)
    tl.store(loss, tl.where(inverse == 0, 0.0, total * inverse))
    tl.store(totals + K - 1, inverse)


def finish(
    partials: Tensor,
    rows: int,
    per_sequence: Tensor | None,
    reduction: aggregation.Reduction,
    dtype: torch.dtype,
    maximum: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, totals) from the first ``rows`` of the partial sums."""
    loss = partials.new_empty((), dtype=dtype)
    totals = partials.new_empty(rows)
    triton_common.launch(
        finish_kernel,
        1,
        partials,
        per_sequence,
        reduction.normalizer,
        loss,
        totals,
        partials.shape[1],
        0 if per_sequence is None else per_sequence.shape[1],
        reduction.normalizer_value,
        reduction.max_length,
        num_warps=16,
        CODE=reduction.aggregation,
        K=rows,
        MAXIMUM=maximum,
        TILE=1024,
    )
    return loss, totals


@triton.jit
def scale_block(factor, coefficient, out, begin, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    x = load_tokens(coefficient, begin, end, BLOCK, WHOLE)
    store_tokens(out, begin, end, x * factor.to(x.dtype), BLOCK, WHOLE)


@triton.jit(do_not_specialize=["n"])
def scale_kernel(
    grad, totals, coefficient, out, n: tl.int64, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    begin, n = tl.program_id(0).to(tl.int64) * BLOCK, n.to(tl.int64)
    factor = tl.load(grad).to(tl.float64) * tl.load(totals + LAST)
    if begin + BLOCK <= n:
        scale_block(factor, coefficient, out, begin, n, BLOCK, True)
    else:
        scale_block(factor, coefficient, out, begin, n, BLOCK, False)


def scale_coefficient(grad: Tensor, totals: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * grad * (last of totals): the backward of every loss, 8 bytes a token."""
    coefficient = coefficient.contiguous()
    out, n = torch.empty_like(coefficient), coefficient.numel()
    triton_common.launch(
        scale_kernel,
        triton.cdiv(n, FLAT),
        grad,
        totals,
        coefficient,
        out,
        n,
        num_warps=FLAT_WARPS,
        LAST=totals.numel() - 1,
        BLOCK=FLAT,
    )
    return out
