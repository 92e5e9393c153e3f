"""Rows of a softmax in Triton: where a row starts, and its sums in one read.

Columns go to lanes in groups of G, the elements of a 16-byte load, and every lane keeps sums of its
own to the end: nothing waits inside the loop. A row is cut into chunks of CHUNK columns, a program
each, so that few rows still fill a GPU; float64 puts the chunks together. Which lane and chunk a
column belongs to depends on the column alone: a row's sums have the same bits in every batch.

Of a row's total 1 belongs to its maximum. Where that is nearly all, what counts is the rest, which
a float32 total would lose: log p = -log1p(rest). So a part of a row hands over the rest, which is
total - 1 with all its digits, and -1 where the part has no finite logit. Lanes keep totals, as that
is cheaper: the one lane that holds the maximum is read again (``rest_of_lanes``).

Exponents are powers of 2: s = (z - max) * log2(e) / temperature. The maximum is subtracted before
the product is taken: at an offset of 1e4 a fused multiply-add would lose the digits that matter.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
CHUNK = 32768  # columns of a program, a multiple of every TILE
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """Where the rows of a (..., V) tensor are."""

    storage: Tensor  # from its first element on, which is aligned
    first: int
    offsets: Tensor | None  # of each row; None: the two strides say it
    inner: int  # row i starts at first + i // inner * outer_stride + i % inner * inner_stride
    outer_stride: int
    inner_stride: int


def find_rows(x: Tensor) -> Rows:
    """The leading dimensions of x, neighbours that step alike merged; x is not copied."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size != 1 and dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size != 1:
            dims.append((size, stride))
    offsets = None
    if len(dims) > 2:
        offsets = torch.zeros((), dtype=torch.int64, device=x.device)
        for size, stride in dims:
            offsets = offsets.unsqueeze(-1) + torch.arange(size, device=x.device) * stride
        offsets = offsets.flatten()
    (_, outer_stride), (inner, inner_stride) = ([(1, 0), (1, 0), *dims])[-2:]
    storage = x.as_strided((1,), (1,), 0) if x.numel() else x
    return Rows(storage, int(x.storage_offset()), offsets, inner, outer_stride, inner_stride)


def number_in(value: float, logits: Tensor) -> float:
    """The number as the C++ kernels take it, and as torch.compile hands it over in a tensor."""
    return value if logits.dtype == torch.float64 else ctypes.c_float(value).value


def aligned(*tensors: Tensor) -> bool:
    """Whether every row begins and ends at a multiple of 16 bytes, so that loads are that wide."""
    return all(
        step * x.element_size() % 16 == 0
        for x in tensors
        for step in (x.data_ptr() // x.element_size(), x.shape[-1], *x.stride()[:-1])
    )


def chunks_of(vocab: int) -> int:
    return triton.cdiv(vocab, CHUNK)


def layout(x: Tensor) -> dict[str, Any]:
    """The constants of a kernel that walks over rows like those of x."""
    double = x.dtype == torch.float64
    return {
        "TILE": 512 if double else 2048,  # columns between two looks at the maxima
        "G": 16 // x.element_size(),
        "CHUNK": CHUNK,
        "TYPE": tl.float64 if double else tl.float32,
        "num_warps": WARPS,
    }


@triton.jit
def row_start(row, first, offsets, inner, outer_stride, inner_stride):
    """The element of the storage where ``row`` (a number or several) starts."""
    if offsets is not None:
        at = first + tl.load(offsets + row)
    else:
        at = first + row // inner * outer_stride + row % inner * inner_stride
    return at


@triton.jit
def load_tile(
    row,
    column,
    end,
    TILE: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,
):
    """(TILE / G, G) logits from ``column`` on, -inf from ``end`` on; ``row`` points to column 0."""
    inside = before(column, end, TILE, G, ALIGNED)
    return tl.load(row + places(column, TILE, G), mask=inside, other=-float("inf")).to(TYPE)


@triton.jit
def places(column, TILE: tl.constexpr, G: tl.constexpr):
    """The columns of a tile."""
    return column + tl.arange(0, TILE // G)[:, None] * G + tl.arange(0, G)[None, :]


@triton.jit
def before(column, end, TILE: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr):
    """Which columns of a tile are before ``end``."""
    if ALIGNED:  # a whole group is, or is not: the compiler has to see that
        place = column + tl.arange(0, TILE // G)[:, None] * G + tl.zeros([1, G], tl.int32)
    else:
        place = places(column, TILE, G)
    return place < end


@triton.jit
def moved(dot, total, down, factor):
    """sum w 2^s after w has moved by ``down`` and s by log2 of ``factor``; total = sum 2^s.

    Where nothing is left it is 0: a finite maximum may be so low that its distance is infinite.
    """
    return tl.where(total * factor == 0.0, 0.0, (dot + total * down) * factor)


@triton.jit
def softmax_step(z, top, total, dot, scale, WITH_DOT: tl.constexpr):
    """Add a tile to the sums of the lanes: total = sum 2^s, dot = sum s 2^s, s relative to top.

    ``scale``: a number, or one a lane.
    Returns top, total, dot; s and 2^s of the tile; and by how much s of earlier tiles has moved.
    """
    new = tl.maximum(top, tl.max(z, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # all banned so far
    s = (z - base[:, None]) * tl.expand_dims(scale, -1)
    e = tl.exp2(s)
    down = tl.where(top == -float("inf"), 0.0, (top - base) * scale)
    factor = tl.exp2(down)
    if WITH_DOT:  # 2^s = 0: the term is 0
        dot = moved(dot, total, down, factor) + tl.sum(e * tl.maximum(s, -1000.0), 1)
    total = total * factor + tl.sum(e, 1)
    return new, total, dot, s, e, down


@triton.jit
def all_but_one(e):
    """The sum of e <= 1 over the last axis but for one 1, if there is any, with all its digits."""
    total = tl.sum(e, -1)
    return tl.where(total >= 2.0, total - 1.0, tl.sum(tl.where(e == 1.0, 0.0, e), -1))


@triton.jit
def rest_step(e, rest, down, grown):
    """Add a tile's e = 2^s to the rest; ``grown``: where it has a new maximum, which is left out.

    ``down``: by how much s of earlier tiles has moved.
    """
    return tl.where(grown, (1.0 + rest) * tl.exp2(down) + all_but_one(e), rest + tl.sum(e, 1))


@triton.jit
def to_common(top, total, dot, scale, WITH_DOT: tl.constexpr):
    """Parts relative to one maximum: that, their totals, their dots' sum; how much s has moved."""
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    down = tl.where(top == -float("inf"), 0.0, (top - base) * scale)
    factor = tl.exp2(down)
    all_dot = tl.sum(moved(dot, total, down, factor), 0) if WITH_DOT else 0.0
    return highest, total * factor, all_dot, down


@triton.jit
def rest_of_parts(top, rest, highest, total):
    """The rest of them all; ``total``: relative to ``highest``."""
    leads = top == highest
    others = tl.sum(leads.to(rest.dtype), 0) - 1.0  # each has a maximum of its own
    return tl.sum(tl.where(leads, rest, total), 0) + others


@triton.jit
def rest_of_lanes(
    row,
    begin,
    end,
    top,
    highest,
    total,
    scale,
    TILE: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The rest of a chunk, whose columns are from ``begin`` on and before ``end``.

    ``total`` of the lanes is relative to ``highest``. A lane that holds the maximum is read again:
    its CHUNK / TILE groups are in a cache yet. ``row`` points to column 0.
    """
    lane = tl.argmax(top, 0)
    i = tl.arange(0, CHUNK // TILE * G)
    column = begin + i // G * TILE + lane * G + i % G
    z = tl.load(row + column, mask=column < end, other=-float("inf")).to(TYPE)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    rest = all_but_one(tl.exp2((z - base) * scale))
    rest += tl.sum(tl.where(tl.arange(0, TILE // G) == lane, 0.0, total), 0)
    return rest - tl.where(highest == -float("inf"), 1.0, 0.0)


@triton.jit
def merge(top, rest, dot, other_top, other_rest, other_dot, scale):
    """The sums of two parts of a row, in float64; and by how much s of each has moved."""
    highest = tl.maximum(top, other_top)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    down = tl.where(top == -float("inf"), 0.0, (top - base) * scale)
    other_down = tl.where(other_top == -float("inf"), 0.0, (other_top - base) * scale)
    factor, other_factor = tl.exp2(down), tl.exp2(other_down)
    total, other_total = 1.0 + rest, 1.0 + other_rest
    dot = moved(dot, total, down, factor) + moved(other_dot, other_total, other_down, other_factor)
    rest = tl.where(
        top >= other_top, rest + other_total * other_factor, other_rest + total * factor
    )
    return highest, rest, dot, down, other_down


@triton.jit
def temperature_of(row, temperature, value):
    """In float64."""
    if temperature is not None:
        degrees = tl.load(temperature + row).to(tl.float64)
    else:
        degrees = tl.full([], value, tl.float64)
    return degrees


@triton.jit
def expm1(x, exp_x):
    """e^x - 1 for x <= 0: near 0 the difference would cancel."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for n in tl.static_range(14, 1, -1):
        series = 1.0 + series * (x / n)
    return tl.where(x > -0.5, x * series, exp_x - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): the logarithm of the rounded sum, times what the rounding has changed."""
    total = 1.0 + x
    return tl.where(total == 1.0, x, tl.log(total) * (x / (total - 1.0)))
