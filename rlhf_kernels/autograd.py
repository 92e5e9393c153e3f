"""What the autograd functions above the compiled operators share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor


class _NotTwice(torch.autograd.Function):
    """The gradients as they are; their own derivatives with respect to ``sources`` raise."""

    @staticmethod
    def forward(ctx: Any, count: int, *gradients_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in gradients_and_sources[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the compiled kernels have no second derivative; backend='reference' has one"
        )


class _Unpacked:
    """Stands for ``ctx``: its saved tensors are unpacked once, as checkpointing asks for."""

    def __init__(self, ctx: Any):
        self.__dict__.update(ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of an autograd function's backward: differentiating its results raises.

    torch's decorator of this name notices only an upstream gradient that requires a gradient. A
    penalty on the gradient (``create_graph=True``) would silently lose what flows to the inputs,
    and where nothing leads to them, no error is met on the way. So the function has to save its
    inputs, or an output of its own, which leads to all of them.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        found = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        with torch.no_grad():
            results = backward(ctx, *grads)
        given = [x.detach() for x in results if x is not None]
        marked = iter(_NotTwice.apply(len(given), *given, *found))
        return tuple(x if x is None else next(marked) for x in results)

    return checked


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether a function has to go through autograd, by the inputs that it is differentiable in.

    While forward-mode derivatives are taken it does: what has none raises there, and the bare
    operator would give 0.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in inputs:  # any() of a generator costs a microsecond
            if x is not None and x.requires_grad:
                return True
    return False


def call_constant(operator: Callable[..., Any], *args: Any) -> Any:
    """The operator's results as constants, whatever its inputs require.

    torch marks the results of an operator without a gradient as requiring one if any input does.
    """
    with torch.no_grad():
        return operator(*args)


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable``, which imports the compiler (a second), once it is in use."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        return torch.compiler.disable(function)(*args)

    return call
