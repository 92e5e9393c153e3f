"""A line of the gate's table: the record that the lists of cases are made of, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

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


class Package(NamedTuple):
    """A peer from another package, which takes part where that is installed."""

    modules: tuple[str, ...]
    function: Function

    def missing(self) -> str | None:
        absent = [name for name in self.modules if find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


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
        variants: names of ours -> further arguments, the backend among them.
        ours: calls the operator, where its arguments are not the inputs.
        output: picks what is compared from what the operator returns; from the formula's likewise.
        sampled: the reference checks some rows: in float64 all would not fit into memory.
        reference: the specification, where the operator's own reference is too large.
        atol: absolute error allowed beside twice the formula's; None: the operator's.
        parts: (inputs, gradients) -> what of the gradients is compared, each by its own scale.
        eager, compiled: whether the formula runs in this way.
        packages: peers' names -> the same from other packages.
        one_call: the operator that writes the gradient in the forward, which takes part too.
        bare: inputs -> a function of inputs, which runs the matrix products that cannot be avoided
            and nothing else: it is timed with the others, as what theirs is a multiple of.
        accumulator: bytes of the float32 gradient that ours adds up beside its workspace.
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
    variants: dict[str, Inputs] = field(default_factory=dict)
    ours: Function | None = None
    output: Callable[[Any], Any] = lambda result: result
    sampled: bool = False
    reference: Function | None = None
    atol: float | None = None
    parts: Callable[[Inputs, list[Tensor]], list[Tensor]] = lambda inputs, gradients: gradients
    eager: bool = True
    compiled: tuple[str, ...] | None = None
    packages: dict[str, Package] = field(default_factory=dict)
    one_call: str = ""
    bare: Callable[[Inputs], Function] | None = None
    accumulator: Callable[[Inputs], int] = lambda inputs: 0


def first(result: Any) -> Any:
    """The loss without the statistics beside it."""
    return result[0] if isinstance(result, tuple) else result
