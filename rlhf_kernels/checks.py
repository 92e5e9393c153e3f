"""Argument checks shared by the operators: raised before dispatch, the same for all backends.

Every message has three parts: the name of the argument, what was expected, what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def floating(name: str, x: Any, device: torch.device | None = None) -> None:
    """``x`` is a bf16, fp16, fp32 or fp64 tensor (on ``device``)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {x.dtype}")
    same_device(name, x, device)


def integer(name: str, x: Any, device: torch.device | None = None) -> None:
    """``x`` is an int64 tensor (on ``device``)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {x.dtype}")
    same_device(name, x, device)


def same_device(name: str, x: torch.Tensor, device: torch.device | None) -> None:
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def shape(name: str, x: torch.Tensor, expected: Sequence[int], match: str) -> None:
    """``x`` has the shape ``expected``; ``match`` says in words what it has to agree with."""
    if x.shape != torch.Size(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} {match}, got {tuple(x.shape)}")


def rows(name: str, x: torch.Tensor) -> None:
    """``x`` is (..., V) with V >= 1 side by side in memory; leading strides are free.

    A vocabulary-sized tensor is never copied behind the caller's back, so another layout raises.
    """
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., V) with V >= 1, got {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        stride = x.stride(-1)
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got stride {stride}")


def mask(name: str, x: Any, expected: Sequence[int], match: str, device: torch.device) -> None:
    """``x`` is a mask (bool, or numeric with non-zero meaning valid) of shape ``expected``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    same_device(name, x, device)
    shape(name, x, expected, match)


def number(
    name: str, x: Any, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """``x`` is a finite number with low <= x <= high (low < x when ``open_low``)."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not (low < x if open_low else low <= x) or not x <= high or x in (math.inf, -math.inf):
        left = f"> {low:g}" if open_low else f">= {low:g}"
        bounds = [left] if low != -math.inf else []
        bounds += [f"<= {high:g}"] if high != math.inf else []
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, got {x}")


def as_tensor(number: Any, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor without dimensions, for a graph that is being compiled.

    As a number it would be burnt into the graph: one compilation per value. The product keeps the
    number symbolic; ``new_full`` and ``torch.tensor`` do not.
    """
    return like.new_ones((), dtype=dtype) * number


class AroundOne(NamedTuple):
    """1 + sign * number, still to be computed.

    In arithmetic of its own torch.compile before 2.13 makes a constant of a symbolic number.
    """

    sign: int
    number: Any


def _value(x: Any) -> Any:
    return 1.0 + x.sign * x.number if isinstance(x, AroundOne) else x


def _in_tensor(x: Any, one: torch.Tensor) -> torch.Tensor:
    return one + x.sign * (one * x.number) if isinstance(x, AroundOne) else one * x


def unfixed(*numbers: Any) -> bool:
    """Whether torch.compile keeps one of the numbers symbolic, as it does once it has changed."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    plain = [x.number if isinstance(x, AroundOne) else x for x in numbers]
    return not all([has_static_value(x) for x in plain])


def separated(*numbers: Any) -> tuple[tuple[Any, ...], torch.Tensor | None]:
    """An operator's numbers, all of them, and None; or zeros, and the numbers for ``backend.call``.

    The latter, float64 on the CPU, where one is symbolic.
    """
    if not unfixed(*numbers):
        return tuple(map(_value, numbers)), None
    one = torch.ones((), dtype=torch.float64)
    return (0.0,) * len(numbers), torch.stack([_in_tensor(x, one) for x in numbers])


def graph_numbers(like: torch.Tensor, dtype: torch.dtype, *numbers: Any) -> tuple[Any, ...]:
    """Numbers for plain PyTorch: as they are, or all of them as tensors where one is symbolic."""
    if not unfixed(*numbers):
        return tuple(map(_value, numbers))
    one = like.new_ones((), dtype=dtype)
    return tuple(_in_tensor(x, one) for x in numbers)


def choice(name: str, x: Any, options: Sequence[str]) -> None:
    if x not in options:
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {x!r}")


def offsets(name: str, x: Any, device: torch.device) -> None:
    """``x`` is (S + 1,) int64 or int32 segment offsets; their values are checked by the kernels."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
    same_device(name, x, device)
    if x.dim() != 1 or x.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (segments + 1,), got {tuple(x.shape)}")


def offset_values(name: str, x: torch.Tensor, end: int) -> None:
    """On the CPU, segment offsets start at 0, never fall and end at ``end``.

    For references run eagerly: the compiled kernels check the values themselves.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if x[0] != 0 or x[-1] != end or bool((x.diff() < 0).any()):
        raise ValueError(
            f"{name}: expected offsets that start at 0, never fall and end at {end}, "
            f"got {x.tolist()}"
        )


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Accumulation and outputs are float32, float64 when an input is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
