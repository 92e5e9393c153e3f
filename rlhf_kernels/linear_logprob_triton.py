"""linear_logprob without gradients in Triton: the head's product with the softmax in its epilogue.

No logit is ever written but those of the scored tokens: a program multiplies a block of tokens with
its split of the vocabulary, tile by tile, and keeps three float32 sums a token. A second, small
kernel puts the splits together in float64. Fused into the product: bias, scale, softcap, softmax,
the tokens' logits. 2*N*V*H flops; 12 bytes written and read for each token and split.

Tiles and splits follow from the vocabulary, the dtype and the GPU, never from the number of tokens:
a token's result has the same bits in every batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import linear_chunks, softmax_triton, triton_common
from rlhf_kernels.softmax_triton import (
    LN_2,
    LOG2_E,
    log1p,
    merge,
    rest_of_parts,
    rest_step,
    softmax_step,
    temperature_of,
    to_common,
)

SPLITS = 256  # of the vocabulary, at least, where it has as many tiles: they fill a GPU
GROUP = 16  # blocks of tokens that go through the whole vocabulary before the next ones do
ROWS, PARTS = 16, 32  # of a program of the second kernel: tokens, splits at a time


class Tiles(NamedTuple):
    """Of the product: tokens, columns, hidden units; warps; tiles of hidden units in flight."""

    n: int
    v: int
    h: int
    warps: int
    stages: int


# By architecture, as shared memory goes: 163 KiB (8.0), 227 (9.0, 10.0), 64 (gfx942), else 99.
LOW = {
    "sm_80": Tiles(128, 128, 64, 8, 4),
    "sm_90": Tiles(128, 256, 64, 8, 4),
    "sm_100": Tiles(128, 128, 64, 8, 4),
    "gfx942": Tiles(128, 64, 64, 8, 2),
}
LOW_ELSE = Tiles(128, 128, 32, 8, 4)
LOW_UNALIGNED = Tiles(64, 64, 16, 8, 2)  # without 16-byte loads
FLOAT32 = Tiles(128, 64, 16, 8, 3)  # multiplied without tensor cores
INTERPRETER = Tiles(16, 32, 16, 4, 1)


def tiles_of(weight: Tensor) -> Tiles:
    architecture = triton_common.architecture(weight.device)
    if architecture == "interpreter":
        return INTERPRETER
    if weight.element_size() == 4:
        return FLOAT32
    if not softmax_triton.aligned(weight):
        return LOW_UNALIGNED
    return LOW.get(architecture, LOW_ELSE)


def columns_of_split(vocab: int, tile: int) -> int:
    return max(triton.cdiv(vocab, tile) // SPLITS, 1) * tile


@triton.jit
def block_and_split(program, blocks, splits, GROUP: tl.constexpr):
    """Neighbours share a split: a tile of the weight is read once for GROUP blocks of tokens.

    The hidden states of those blocks, read again for each tile, have to stay in the L2 cache.
    """
    first = program // (GROUP * splits) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inner = program - first * splits
    return first + inner % size, inner // size


@triton.jit
def products(
    x,
    w,
    width,
    ALIGNED: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x w^T in float32; ``x`` (BLOCK_N,) and ``w`` (BLOCK_V,) point to rows of ``width``."""
    if ALIGNED:
        width = width // G * G  # says so to the compiler
    unit = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for h in tl.range(0, width, BLOCK_H, num_stages=STAGES):
        inside = h + unit < width
        a = tl.load(x[:, None] + (h + unit)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(w[None, :] + (h + unit)[:, None], mask=inside[:, None], other=0.0)
        if INTERPRETED:  # the interpreter would multiply the bits of bf16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def tanh(x):
    """Within 2 units of the last place: x + x^3 P(x^2) near 0, where the other form cancels."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = 1.0 - 2.0 * e / (1.0 + e)
    s = x * x
    series = -0.006282471586018801 * s + 0.021077757701277733
    series = (series * s - 0.05385385826230049) * s + 0.13332602381706238
    near = x + x * (s * (series * s - 0.33333319425582886))
    return tl.where(s > 0.3, tl.where(x < 0, -far, far), near)


# Both take a column for a group and a place in it: as one number, the numbers of a thread's columns
# would not change from tile to tile, and the compiler keeps those in registers across the product.
@triton.jit
def column_of(z, column, LANES: tl.constexpr = 32):
    """(N,) elements of z (N, V), each from the ``column`` (N,) of its row."""
    N: tl.constexpr = z.shape[0]
    GROUPS: tl.constexpr = z.shape[1] // LANES
    group, lane = column // LANES, column % LANES
    z = tl.reshape(z, [N, GROUPS, LANES])
    z = tl.sum(tl.where(tl.arange(0, GROUPS)[None, :, None] == group[:, None, None], z, 0.0), 1)
    return tl.sum(tl.where(tl.arange(0, LANES)[None, :] == lane[:, None], z, 0.0), 1)


@triton.jit
def columns_before(z, end, LANES: tl.constexpr = 32):
    """z (N, V), -inf from the column ``end`` on."""
    N: tl.constexpr = z.shape[0]
    V: tl.constexpr = z.shape[1]
    left = end - tl.arange(0, V // LANES) * LANES
    inside = tl.arange(0, LANES)[None, :] < left[:, None]
    grouped = tl.reshape(z, [N, V // LANES, LANES])
    return tl.reshape(tl.where(inside[None, :, :], grouped, -float("inf")), [N, V])


SIZES = ["rows", "vocab", "splits", "count"]
NUMBERS = ["hidden_stride", "weight_stride", "width", "span", "factor", "cap", "scale_value"]


@triton.jit(do_not_specialize=[*NUMBERS, *SIZES])
def linear_logprob_sums_kernel(
    hidden,
    weight,
    bias,  # None: none
    tokens,
    scales,  # (rows,) log2(e) / temperature; None: the same for all
    sums,  # (splits, 3, rows): maximum, rest, dot
    picked,  # (rows, count): the tokens' logits
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    width: tl.int64,
    span: tl.int64,  # columns of a split
    factor: tl.float64,
    cap: tl.float64,
    scale_value: tl.float64,
    rows: tl.int64,
    vocab: tl.int64,
    splits: tl.int64,
    count: tl.int64,
    WITH_ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    blocks = (rows + BLOCK_N - 1) // BLOCK_N
    block, split = block_and_split(tl.program_id(0).to(tl.int64), blocks, splits, GROUP)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = row < rows
    row = tl.minimum(row, rows - 1)  # rows and columns beyond the last repeat it, and are left out
    if ALIGNED:
        hidden_stride, weight_stride = hidden_stride // G * G, weight_stride // G * G
    if scales is not None:
        scale = tl.load(scales + row)
    else:
        scale = tl.full([BLOCK_N], scale_value, tl.float32)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    rest = tl.full([BLOCK_N], -1.0, tl.float32)
    dot = tl.zeros([BLOCK_N], tl.float32)
    unit = tl.arange(0, BLOCK_V)
    size, units = vocab.to(tl.int32), width.to(tl.int32)
    begin = (split * span).to(tl.int32)
    for column in range(begin, tl.minimum(begin + span.to(tl.int32), size), BLOCK_V):
        place = tl.minimum(column + unit, size - 1)
        x, w = hidden + row * hidden_stride, weight + place.to(tl.int64) * weight_stride
        z = products(x, w, units, ALIGNED, G, BLOCK_N, BLOCK_V, BLOCK_H, STAGES, INTERPRETED)
        if bias is not None:
            z += tl.load(bias + place).to(tl.float32)[None, :]
        z *= triton_common.number(factor, tl.float32)
        if CAPPED:
            z = tanh(z) * triton_common.number(cap, tl.float32)
        for i in range(count):
            token = tl.load(tokens + row * count + i)
            hit = (token >= column) & (token < tl.minimum(column + BLOCK_V, size))
            if tl.max(hit.to(tl.int32), 0) > 0:
                own = tl.where(hit, token - column, 0).to(tl.int32)
                tl.store(picked + row * count + i, column_of(z, own), mask=here & hit)
        z = columns_before(z, size - column)
        new, _, dot, _, e, down = softmax_step(z, top, 1.0 + rest, dot, scale, WITH_ENTROPY)
        rest = rest_step(e, rest, down, new > top)
        top = new
    part = sums + split * 3 * rows + row
    tl.store(part, top, mask=here)
    tl.store(part + rows, rest, mask=here)
    tl.store(part + 2 * rows, dot, mask=here)


@triton.jit(do_not_specialize=["ignore_index", "temperature_value", *SIZES])
def linear_logprob_fwd_kernel(
    tokens,
    temperature,
    sums,
    picked,
    logprob,
    entropy,  # None: not wanted
    ignore_index: tl.int64,
    temperature_value: tl.float64,
    rows: tl.int64,
    vocab: tl.int64,
    splits: tl.int64,
    count: tl.int64,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    row = tl.where(here, row, 0)
    inverse = 1.0 / temperature_of(row, temperature, temperature_value)
    scale = inverse * LOG2_E
    top = tl.full([ROWS], -float("inf"), tl.float64)
    rest = tl.full([ROWS], -1.0, tl.float64)
    dot = tl.zeros([ROWS], tl.float64)
    for first in range(0, splits, PARTS):
        split = (first + tl.arange(0, PARTS))[:, None]
        part, inside = sums + split * 3 * rows + row[None, :], split < splits
        part_top = tl.load(part, mask=inside, other=-float("inf")).to(tl.float64)
        part_rest = tl.load(part + rows, mask=inside, other=-1.0).to(tl.float64)
        part_dot = tl.load(part + 2 * rows, mask=inside, other=0.0).to(tl.float64)
        highest, total, dot_sum, _ = to_common(part_top, 1.0 + part_rest, part_dot, scale, True)
        rest_sum = rest_of_parts(part_top, part_rest, highest, total)
        top, rest, dot, _, _ = merge(top, rest, dot, highest, rest_sum, dot_sum, scale)
    log_total = log1p(rest)
    seen = row < 0
    for i in range(count):
        token = tl.load(tokens + row * count + i)
        scored = token != ignore_index
        known = (token >= 0) & (token < vocab)
        z = tl.load(picked + row * count + i, mask=here & scored & known, other=float("nan"))
        value = (z.to(tl.float64) - top) * inverse - log_total
        tl.store(logprob + row * count + i, tl.where(scored, value, 0.0), mask=here)
        seen = seen | scored
    if entropy is not None:
        h = log_total - dot / (1.0 + rest) * LN_2
        tl.store(entropy + row, tl.where(seen, h, 0.0), mask=here)


def linear_logprob_fast(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """logprob and entropy of (N, H) hidden states; rows of the weight have to be dense, each."""
    triton_common.check_tokens(tokens, weight.shape[0], ignore_index)
    index = linear_chunks.used_tokens(tokens, ignore_index)
    logprob, entropy = _launch(
        linear_chunks.take(hidden, index),
        linear_chunks.take(tokens, index),
        linear_chunks.take(temperature, index),
        weight,
        None if bias is None else bias.contiguous(),
        *(temperature_value, logit_scale, softcap, ignore_index, with_entropy),
    )
    if index is not None:
        logprob = logprob.new_zeros(tokens.shape).index_copy_(0, index, logprob)
        if with_entropy:
            entropy = entropy.new_zeros(tokens.shape[:1]).index_copy_(0, index, entropy)
    return logprob, entropy


def _launch(
    hidden: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    temperature_value: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    aligned = softmax_triton.aligned(weight)
    if hidden.stride(-1) != 1 or (aligned and not softmax_triton.aligned(hidden)):
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    tokens = tokens.contiguous()
    (rows, width), vocab = hidden.shape, weight.shape[0]
    tiles = tiles_of(weight)
    span = columns_of_split(vocab, tiles.v)
    splits = triton.cdiv(vocab, span)
    sums = hidden.new_empty((splits, 3, rows), dtype=torch.float32)
    logprob = torch.empty_like(tokens, dtype=torch.float32)
    picked = torch.empty_like(logprob)
    entropy = logprob.new_empty((rows if with_entropy else 0,))
    sizes = (rows, vocab, splits, tokens.numel() // max(rows, 1))
    scales = None if temperature is None else (LOG2_E.value / temperature.double()).float()
    triton_common.launch(
        linear_logprob_sums_kernel,
        triton.cdiv(rows, tiles.n) * splits,
        *(hidden, weight, bias, tokens, scales, sums, picked),
        *(hidden.stride(0), weight.stride(0), width, span),
        *(logit_scale / (softcap or 1.0), softcap, LOG2_E.value / temperature_value, *sizes),
        WITH_ENTROPY=with_entropy,
        CAPPED=softcap != 0.0,
        ALIGNED=aligned,
        G=16 // hidden.element_size(),
        BLOCK_N=tiles.n,
        BLOCK_V=tiles.v,
        BLOCK_H=tiles.h,
        STAGES=tiles.stages,
        GROUP=GROUP,
        INTERPRETED=triton_common.architecture(hidden.device) == "interpreter",
        num_warps=tiles.warps,
    )
    triton_common.launch(
        linear_logprob_fwd_kernel,
        triton.cdiv(rows, ROWS),
        *(tokens, temperature, sums, picked, logprob, entropy if with_entropy else None),
        *(ignore_index, temperature_value, *sizes),
        ROWS=ROWS,
        PARTS=PARTS,
    )
    return logprob, entropy
