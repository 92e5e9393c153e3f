"""What every operator has to pass, driven by its OpSpec: a new one is tested because it exists.

Numerics against float64, gradients, opcheck, gradcheck, torch.compile, determinism, layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compare import assert_close_to_truth
from rlhf_kernels.backend import INTERPRETING
from rlhf_kernels.opspec import Maker, OpSpec, Sample, in_float64, outputs
from rlhf_kernels.specs import SPECS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
each_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def samples(spec: OpSpec, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from spec.samples(Maker(device, dtype))


def run(spec: OpSpec, inputs: dict[str, Any], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the differentiable arguments under fixed random weights."""
    inputs = dict(inputs)
    leaves = []
    for name in spec.leaves(inputs):
        inputs[name] = inputs[name].detach().clone().requires_grad_()
        leaves.append(inputs[name])
    found = outputs(spec.function(**inputs, backend=backend))
    if not leaves:
        return found, []
    generator = torch.Generator().manual_seed(1)
    scalar = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for out in found:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        if out.requires_grad:
            scalar = scalar + (out * weight).sum()
    grads = torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True)
    return [out.detach() for out in found], list(grads)


@each_dtype
@each_op
def test_error_is_at_most_twice_that_of_the_plain_formula(spec, dtype, device, backend):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name}: its own tests look at each token")
    atol = 1e-12 if dtype == torch.float64 else spec.atol
    for sample in samples(spec, device, dtype):
        got, got_grads = run(spec, sample.inputs, backend)
        plain, plain_grads = run(spec, sample.inputs, "reference")
        truth, true_grads = run(spec, in_float64(sample.inputs), "reference")
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        for i, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
            if i - len(got) in spec.in_input_dtype:
                assert a.dtype == dtype, sample.why
            else:
                assert a.dtype in (accumulation, torch.float64, torch.int64), sample.why
            assert_close_to_truth(a, b, t, atol, f"{spec.name}, {sample.why}, output {i}")
        for i, (a, b, t) in enumerate(zip(got_grads, plain_grads, true_grads, strict=True)):
            assert a.dtype == dtype, sample.why
            assert_close_to_truth(a, b, t, atol, f"{spec.name}, {sample.why}, gradient {i}")


@each_op
def test_same_call_gives_the_same_bits(spec, device, backend):
    if backend == "reference" and device == "cuda":
        pytest.skip("PyTorch's own atomic additions")
    for sample in samples(spec, device, torch.float32):
        first = [x for part in run(spec, sample.inputs, backend) for x in part]
        for _ in range(1 if INTERPRETING else 3):  # one program after another: no race to find
            again = [x for part in run(spec, sample.inputs, backend) for x in part]
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), sample.why


@each_op
def test_number_of_threads_changes_no_bit(spec, backend):
    if INTERPRETING:
        pytest.skip("the interpreter has one thread")
    threads = torch.get_num_threads()
    for sample in samples(spec, "cpu", torch.float32):
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([x for part in run(spec, sample.inputs, backend) for x in part])
        torch.set_num_threads(threads)
        if backend == "reference" or not spec.own_matmul:
            continue  # torch's own sums may be split by threads
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), sample.why


@each_op
def test_gradcheck_in_float64(spec, device, backend):
    if not spec.differentiable:
        pytest.skip(f"{spec.name} returns constants")
    if spec.one_backward and backend != "reference":
        pytest.skip(f"{spec.name} has one backward a call: its own tests take differences")
    checked = 0
    for sample in samples(spec, device, torch.float64):
        names = spec.leaves(sample.inputs)
        size = sum(sample.inputs[n].numel() for n in names)
        if not 0 < size <= 2048 or not spec.smooth(sample.inputs):
            continue

        def function(*leaves, names=names, sample=sample):
            inputs = {**sample.inputs, **dict(zip(names, leaves, strict=True))}
            found = outputs(spec.function(**inputs, backend=backend))
            return tuple(x for x in found if x.requires_grad)

        leaves = [sample.inputs[n].detach().clone().requires_grad_() for n in names]
        # PyTorch's own atomic additions need not give the same bits twice.
        again = 1e-12 if backend == "reference" else 0.0
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=again), (
            sample.why
        )
        checked += 1
    assert checked >= 2


@each_op
def test_second_derivative_raises(spec, device, backend):
    """Not silently zero, as torch's once_differentiable leaves it where upstream is a constant."""
    if backend == "reference" or not spec.differentiable:
        pytest.skip("the reference has second derivatives, and constants have none")
    inputs = dict(next(samples(spec, device, torch.float32)).inputs)
    name = spec.differentiable[0]
    leaf = inputs[name].detach().clone().requires_grad_()
    out = outputs(spec.function(**{**inputs, name: leaf * 1.0}, backend=backend))[0]
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative; backend='reference'"):
        (gradient.square().sum() + leaf.square().sum()).backward()


class _Dispatch(TorchDispatchMode):
    """Keeps the calls of this library's torch operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("rlhf_kernels"):
            copy = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.calls.append((func, tuple(copy), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@each_op
def test_opcheck(spec, device, backend):
    """opcheck on the forward and backward operators, with the arguments of real calls."""
    if backend == "reference" or INTERPRETING:
        pytest.skip("the reference calls no operator; opcheck takes the interpreter minutes")
    seen = set()
    for sample in samples(spec, device, torch.float32):
        with _Dispatch() as dispatch:
            run(spec, sample.inputs, backend)
        for func, args, kwargs in dispatch.calls:
            torch.library.opcheck(func, args, kwargs)
            seen.add(func._schema.name.split("::")[1])
    assert seen, f"{spec.name} calls no operator of this library"


@each_op
def test_torch_compile_without_a_graph_break(spec, device, backend):
    if not spec.compiles:
        pytest.skip(f"{spec.name} runs the caller's code")

    def function(inputs):
        return spec.function(**inputs, backend=backend)

    for sample in samples(spec, device, torch.float32):
        torch._dynamo.reset()  # each sample has other options: not one function compiled often
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        inputs = dict(sample.inputs)
        for name in spec.leaves(inputs):
            inputs[name] = inputs[name].detach().clone().requires_grad_()
        eager, graph = outputs(function(inputs)), outputs(compiled(inputs))
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        if leaves and eager[0].requires_grad:
            grads = [
                torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
                for out in (eager[0], graph[0])
            ]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    torch._dynamo.reset()


@each_op
def test_layout_of_the_inputs_changes_nothing(spec, device, backend):
    """Inputs that are slices with a gap between the rows give the same bits as dense ones."""
    for sample in samples(spec, device, torch.float32):
        spread = {}
        for name, x in sample.inputs.items():
            if isinstance(x, Tensor) and x.dim() >= 2:
                wide = (
                    torch.cat([x, x.roll(1, -2)], -2)
                    if x.dtype == torch.bool
                    else torch.cat([x, torch.full_like(x, 7)], -2)
                )
                x = wide[..., : x.shape[-2], :]
            spread[name] = x
        expected = outputs(spec.function(**sample.inputs, backend=backend))
        got = outputs(spec.function(**spread, backend=backend))
        for a, b in zip(expected, got, strict=True):
            if backend == "reference":
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
            else:
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), sample.why


@each_op
def test_unknown_backend_and_wrong_type_raise(spec):
    inputs = next(samples(spec, "cpu", torch.float32)).inputs
    with pytest.raises(ValueError, match="backend: expected one of"):
        spec.function(**inputs, backend="fastest")
    first = next(iter(name for name, x in inputs.items() if isinstance(x, Tensor)))
    with pytest.raises(TypeError, match=f"{first}: expected a tensor, got list"):
        spec.function(**{**inputs, first: [1.0]})


def test_every_public_operator_has_a_record():
    import rlhf_kernels

    operators = {
        name
        for name in rlhf_kernels.__all__
        if name.islower() and name not in ("build_info", "full_weight", "__version__")
    }
    assert operators == {spec.name for spec in SPECS}


def test_cpu_kernels_are_registered_for_the_cpu_key():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rlhf_kernels::")]
    assert len(names) >= len(SPECS)
    assert [n for n in names if not has(n, "CPU")] == []
    assert [n for n in names if has(n, "CompositeImplicitAutograd")] == []
