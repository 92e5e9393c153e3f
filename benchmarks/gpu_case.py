"""A line of the gate's table: the record that the lists of cases are made of, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.opspec import Inputs, OpSpec
from rlhf_kernels.specs import SPECS

SPEC: dict[str, OpSpec] = {spec.name: spec for spec in SPECS}
Function = Callable[..., Any]


class Draw:
    """Random tensors made on the device itself; sizes shrink in a dry run."""

    def __init__(self, device: str, dry: bool, seed: int):
        self.device, self.dry = device, dry
        self.generator = torch.Generator(device).manual_seed(seed)

    def size(self, full: int) -> int:
        return min(full, 24) if self.dry else full

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.mul_(scale).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) < 0.8


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: operator, what is timed, shape, dtype.
        op: name of the public function.
        mode: what is timed: the forward without gradients; the backward alone; both; or the forward
            inside a CUDA graph.
        inputs: makes the keyword arguments of one call.
        plain: peers' names -> the formula as trainers write it. Each runs eagerly and compiled.
        least_bytes: the traffic of what is timed that cannot be avoided.
        leaves: the arguments whose gradients are taken; of the first output, weighted by random
            numbers in the shape of the argument ``upstream`` (None: a scalar, weighted by 1).
        options: further arguments, for our backends alone. In place each call has its own logits.
        output: picks what is compared from what the operator returns; from the formula's likewise.
        sampled: the reference checks some rows: in float64 all would not fit into memory.
        reference: the specification, where the operator's own reference is too large.
        eager, compiled: whether the formula runs in this way.
        one_call: the operator that writes the gradient in the forward, which takes part too.
    """

    name: str
    op: str
    mode: Literal["forward", "backward", "both", "graph"]
    inputs: Callable[[Draw], Inputs]
    plain: dict[str, Function]
    least_bytes: Callable[[Inputs], int]
    leaves: tuple[str, ...] = ()
    upstream: str | None = None
    options: Inputs = field(default_factory=dict)
    output: Callable[[Any], Any] = lambda result: result
    sampled: bool = False
    reference: Function | None = None
    eager: bool = True
    compiled: tuple[str, ...] | None = None
    one_call: str = ""


def first(result: Any) -> Any:
    """The loss without the statistics beside it."""
    return result[0] if isinstance(result, tuple) else result
