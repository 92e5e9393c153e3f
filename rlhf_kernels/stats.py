"""Statistics as named tuples of sums, counts and maxima: parts of a batch add up with ``+``."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Stats = TypeVar("Stats", bound=tuple[torch.Tensor, ...])


def merge(one: Stats, other: Stats) -> Stats:
    """``one + other``: the larger of each field whose name ends in ``_max``, the sum of the others.

    Raises:
        TypeError: ``other`` has another type. A tuple would be put behind it without a word.
    """
    kind: Any = type(one)
    if not isinstance(other, kind):
        raise TypeError(
            f"+: expected a {kind.__name__} to add to a {kind.__name__}, got {type(other).__name__}"
        )
    pairs = zip(kind._fields, one, other, strict=True)
    merged: Stats = kind._make(
        torch.maximum(a, b) if name.endswith("_max") else a + b for name, a, b in pairs
    )
    return merged


def merge_from_zero(one: Stats, start: Any) -> Stats:
    """``start + one``, where ``sum`` starts from the number 0."""
    return one if type(start) is int and start == 0 else merge(one, start)
