"""One record per operator; it feeds the op tests, opcheck, the benchmarks and ``python -m``.

A new operator is tested and timed because its file ends in ``SPEC = OpSpec(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Keyword arguments of one call of the public function, and why this shape is worth a test."""

    inputs: Inputs
    why: str


class Maker:
    """Makes the tensors of samples: one device, one floating dtype, one seed.

    Values are drawn in float64 and then rounded, so all dtypes and devices see the same case.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self._put(x.to(self.dtype))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return self._put(x.to(self.dtype))

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return self._put(torch.randint(high, shape, generator=self.generator))

    def mask(self, *shape: int, keep: float = 0.8) -> torch.Tensor:
        return self._put(torch.rand(shape, generator=self.generator) < keep)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._put(torch.tensor(values, dtype=dtype or self.dtype))


@dataclass(frozen=True)
class OpSpec:
    """What the tests and benchmarks need to know of one operator.

    Attributes:
        name: the public function's name; also the stem of its files.
        function: the public function. Its ``backend="reference"`` is the specification, and with
            float64 inputs the truth.
        samples: Maker -> small calls that together cover the arguments.
        bench: Maker -> the calls that are timed.
        differentiable: names of the arguments that may require a gradient; the first output is
            differentiated.
        bytes_forward: least traffic of a forward call in bytes: each input read once, each output
            written once. Unless given, the inputs alone: where the outputs are small.
        bytes_backward: least traffic of forward and backward together.
        smooth: whether a call has no kink near its inputs, so that finite differences agree.
        without_gradients: whether a call is about what runs where no gradient is needed.
        in_input_dtype: outputs, counted from the end, in the dtype of the inputs, as gradients are,
            and not in that of the accumulation.
        own_matmul: False where a library multiplies matrices: threads and other rows may change the
            last bits.
        compiles: False where the operator runs code of the caller's: torch.compile leaves it out.
        one_backward: whether a call's gradients can be taken only once.
        dtypes: in which the errors of the outputs can be told from luck.
        atol: absolute error allowed beside twice the error of the plain formula, float32.
    """

    name: str
    function: Callable[..., Any]
    samples: Callable[[Maker], Iterator[Sample]]
    bench: Callable[[Maker], Iterator[Sample]]
    differentiable: tuple[str, ...] = ()
    bytes_forward: Callable[[Inputs], int] = field(default=lambda inputs: total_bytes(inputs))
    bytes_backward: Callable[[Inputs], int] = field(default=lambda inputs: 2 * total_bytes(inputs))
    smooth: Callable[[Inputs], bool] = field(default=lambda inputs: True)
    without_gradients: Callable[[Inputs], bool] = field(default=lambda inputs: False)
    in_input_dtype: tuple[int, ...] = ()
    own_matmul: bool = True
    compiles: bool = True
    one_backward: bool = False
    atol: float = 1e-6
    dtypes: tuple[torch.dtype, ...] = (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    )
    backends: tuple[str, ...] = ("reference", "cpu")

    def leaves(self, inputs: Inputs) -> list[str]:
        """Names of the tensors of a call whose gradients are taken."""
        if self.without_gradients(inputs):
            return []
        return [n for n in self.differentiable if isinstance(inputs.get(n), torch.Tensor)]


def total_bytes(inputs: Inputs) -> int:
    """Bytes of all tensors among the inputs."""
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of what an operator returned, in order; in named tuples, too; not a None."""
    if result is None:
        return []
    if isinstance(result, dict):
        result = tuple(result.values())
    return [result] if isinstance(result, torch.Tensor) else [x for y in result for x in outputs(y)]


def map_tensors(inputs: Inputs, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """The inputs with ``function`` of every tensor, in named tuples, too."""

    def mapped(x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*map(mapped, x))
        if isinstance(x, dict):
            return {name: mapped(value) for name, value in x.items()}
        return function(x) if isinstance(x, torch.Tensor) else x

    return {name: mapped(x) for name, x in inputs.items()}


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""
    return map_tensors(inputs, lambda x: x.double() if x.is_floating_point() else x)
