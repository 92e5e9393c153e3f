"""How per-token losses become one number: mask, sequences and denominator, once for all losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import checks

AGGREGATIONS = (  # the order of enum Aggregation in csrc/cpu/aggregation.h
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


class Reduction(NamedTuple):
    """The checked arguments of an aggregation, in the order of the operators' schemas (SCHEMA)."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    aggregation: int  # index into AGGREGATIONS
    normalizer: Tensor | None  # one float64, or
    normalizer_value: float  # a number >= 0; negative: count what is valid
    max_length: int  # 1 where the aggregation does not use it


SCHEMA = (
    "Tensor? mask, Tensor? cu_seqlens, int aggregation, Tensor? normalizer, "
    "float normalizer_value, SymInt max_length"
)


def check_reduction(
    name: str,
    x: Tensor,
    mask: Any,
    aggregation: str,
    normalizer: Any,
    max_length: Any,
    cu_seqlens: Any,
    needs_sequences: bool = False,
) -> Reduction:
    """Check what the losses share; ``x`` is the argument ``name``, (B, T) or packed (N,).

    Args:
        needs_sequences: another argument asks for sequences, so that packed tokens need cu_seqlens.
    """
    if x.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape (B, T) or packed (N,), got {tuple(x.shape)}")
    if mask is not None:
        checks.mask("mask", mask, x.shape, f"to match {name}", x.device)
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    if cu_seqlens is not None:
        checks.offsets("cu_seqlens", cu_seqlens, x.device)
        if x.dim() == 2:
            raise ValueError(
                f"cu_seqlens: expected None with {name} of shape (B, T), whose rows are the "
                f"sequences, got a tensor of shape {tuple(cu_seqlens.shape)}"
            )
    elif x.dim() == 1 and (needs_sequences or aggregation.startswith("seq")):
        asks = "ratio_level='sequence'" if needs_sequences else f"aggregation={aggregation!r}"
        raise ValueError(f"cu_seqlens: expected offsets for packed {name} with {asks}, got None")
    if max_length is not None:
        if isinstance(max_length, float):
            raise TypeError("max_length: expected an int, got float")
        checks.number("max_length", max_length, 1)
    elif aggregation == "seq-mean-token-sum-norm" and x.dim() == 1:
        raise ValueError(f"max_length: expected a number for packed {name}, got None")
    value = -1.0
    if isinstance(normalizer, Tensor):
        checks.same_device("normalizer", normalizer, x.device)
        if normalizer.numel() != 1:
            shape = tuple(normalizer.shape)
            raise ValueError(f"normalizer: expected a number or one element, got shape {shape}")
        normalizer = normalizer.detach().double()
    elif normalizer is not None:
        checks.number("normalizer", normalizer, 0.0)
        if torch.compiler.is_compiling():
            normalizer = checks.as_tensor(normalizer, x, torch.float64)
        else:
            normalizer, value = None, float(normalizer)
    length = 1
    if aggregation == "seq-mean-token-sum-norm":
        length = (x.shape[1] or 1) if max_length is None else max_length
    return Reduction(mask, cu_seqlens, AGGREGATIONS.index(aggregation), normalizer, value, length)


def valid_tokens(x: Tensor, reduction: Reduction) -> Tensor:
    """The mask as bool; checks the values of the offsets (compiled kernels do it themselves)."""
    if reduction.cu_seqlens is not None:
        checks.offset_values("cu_seqlens", reduction.cu_seqlens, x.shape[0])
    mask = reduction.mask
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()


def segment_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums over the sequences: of (B, T) over T; of packed (N,) by ``cu_seqlens``."""
    if cu_seqlens is None:
        return x.sum(-1)
    sums = x.new_zeros(cu_seqlens.shape[0] - 1)
    return sums.index_add(0, _sequences(x, cu_seqlens), x)  # segment_reduce: no second derivative


def _sequences(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sequence of each token of packed x."""
    tokens = torch.arange(x.shape[0], device=x.device)
    return torch.searchsorted(cu_seqlens.long()[1:], tokens, right=True)


def spread(per_sequence: Tensor, cu_seqlens: Tensor | None, like: Tensor) -> Tensor:
    """Give each token the number of its sequence, in the shape of ``like``."""
    if cu_seqlens is None:
        return per_sequence.unsqueeze(-1).expand_as(like)
    return per_sequence[_sequences(like, cu_seqlens)]


def aggregate_reference(losses: Tensor, valid: Tensor, reduction: Reduction) -> Tensor:
    """The specification; ``losses`` are 0 where not ``valid``."""
    kind = AGGREGATIONS[reduction.aggregation]
    count = valid.sum()
    if kind.startswith("seq"):
        lengths = segment_sum(valid.to(losses.dtype), reduction.cu_seqlens)
        losses = segment_sum(losses, reduction.cu_seqlens)
        count = (lengths > 0).sum()
        if kind == "seq-mean-token-mean":
            losses = losses / lengths.clamp(min=1)
    losses = losses / reduction.max_length
    if reduction.normalizer is not None:
        count = reduction.normalizer.reshape(())
    elif reduction.normalizer_value >= 0:
        count = losses.new_full((), reduction.normalizer_value)
    elif kind == "token-sum":
        count = torch.ones_like(count)
    empty = count == 0
    return torch.where(empty, 0.0, losses.sum() / torch.where(empty, 1, count).to(losses.dtype))
