"""What the autograd functions above the compiled operators share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the compiled kernels have no second derivative; backend='reference' has one"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of an autograd function's backward: differentiating its results raises.

    torch's decorator of this name notices only an upstream gradient that requires a gradient. A
    penalty on the gradient (``create_graph=True``) would silently lose what flows to the inputs.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return results
        return tuple(
            x if x is None else _NotTwice.apply(x.detach().requires_grad_()) for x in results
        )

    return checked


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable``, which imports the compiler (a second), once it is in use."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        return torch.compiler.disable(function)(*args)

    return call
