"""What autograd makes of every operator beyond a first gradient, driven by the OpSpecs.

Second derivatives raise on compiled backends, and are right on the reference; constants give no
result a gradient.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from rlhf_kernels.backend import INTERPRETING
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, map_tensors, outputs
from rlhf_kernels.specs import SPECS

DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]
each_differentiable = pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
NO_SECOND = "the compiled kernels have no second derivative; backend='reference' has one"

Scalar = Callable[..., Tensor]


def calls(
    spec: OpSpec, device: str, backend: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Scalar, tuple[Tensor, ...]]]:
    """(why, a number as a function of the differentiable inputs, these) of each small sample."""
    for sample in spec.samples(Maker(device, dtype)):
        names = spec.leaves(sample.inputs)
        leaves = tuple(sample.inputs[name].detach().clone() for name in names)
        if not leaves or not 0 < sum(x.numel() for x in leaves) <= 3000:
            continue
        if leaves[0].numel() == 0 or not spec.smooth(sample.inputs):
            continue

        def number(*leaves: Tensor, names=names, inputs=sample.inputs) -> Tensor:
            inputs = {**inputs, **dict(zip(names, leaves, strict=True))}
            found = outputs(spec.function(**inputs, backend=backend))
            return sum(x.double().sum() for x in found if x.requires_grad)

        yield sample.why, number, leaves
        if INTERPRETING:
            return


@each_differentiable
def test_second_derivatives_of_compiled_backends_raise(spec, device, backend):
    """Every way of asking: none of them may give zeros or None."""
    if backend == "reference":
        pytest.skip("the reference has second derivatives")
    for why, number, leaves in calls(spec, device, backend):
        with pytest.raises(RuntimeError, match=NO_SECOND):
            hessian(number, leaves)
        with pytest.raises(RuntimeError, match=NO_SECOND):
            hvp(number, leaves, leaves)
        inputs = [x.clone().requires_grad_() for x in leaves]
        grads = torch.autograd.grad(number(*inputs), inputs, create_graph=True)
        penalty = sum((g * g).sum() for g in grads)
        for i, x in enumerate(inputs):
            with pytest.raises(RuntimeError, match=NO_SECOND):
                torch.autograd.grad(penalty, x, allow_unused=True, retain_graph=True)
            assert torch.equal(grads[i], grads[i].detach())
        with pytest.raises(RuntimeError, match=NO_SECOND):
            penalty.backward()
        assert all(x.grad is None for x in inputs), why


@each_differentiable
def test_forward_mode_of_compiled_backends_raises(spec, device, backend):
    """The bare operators would drop the tangent: a derivative of 0."""
    if backend == "reference":
        pytest.skip("the reference has forward-mode derivatives")
    for _, number, leaves in calls(spec, device, backend):
        tangents = tuple(torch.ones_like(x) for x in leaves)
        with pytest.raises(RuntimeError), forward_ad.dual_level():
            number(*map(forward_ad.make_dual, leaves, tangents))
        with pytest.raises(RuntimeError):
            torch.func.jvp(number, leaves, tangents)


@each_differentiable
def test_second_derivatives_of_the_reference(spec, device):
    for why, number, leaves in calls(spec, device, "reference", torch.float64):
        if sum(x.numel() for x in leaves) > 120:
            continue
        if spec.name == "policy_loss" and "sequence" not in why and "reinforce" not in why:
            continue  # finite differences of a gradient see the clip as a step
        if spec.name == "value_loss" and why != "plain":
            continue
        inputs = tuple(x.clone().requires_grad_() for x in leaves)
        assert torch.autograd.gradgradcheck(number, inputs, raise_exception=False), why


def test_first_derivatives_go_on_where_a_graph_is_made(device, backend):
    """create_graph=True with a penalty on what is not ours: the rest is as without."""
    x = torch.randn(4, 6, device=device, requires_grad=True)
    w = torch.randn(6, 9, device=device, requires_grad=True)
    tokens = torch.tensor([1, 2, 3, 4], device=device)

    def loss(x: Tensor) -> Tensor:
        return rk.token_logprob(x @ w, tokens, backend=backend).sum()

    plain = torch.autograd.grad(loss(x), (x, w))
    graph = torch.autograd.grad(loss(x), (x, w), create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert torch.equal(a, b)
    unrelated = (x**3).sum()
    (second,) = torch.autograd.grad(unrelated + graph[0].detach().sum(), x)
    assert torch.equal(second, 3 * x.detach() ** 2)


def test_upstream_gradients_that_require_one_raise(device, backend):
    """With respect to the upstream gradient a backward is linear; the kernels do not say so."""
    if backend == "reference":
        pytest.skip("the reference has second derivatives")
    x = torch.randn(3, 5, device=device, requires_grad=True)
    out = rk.kl_estimate(x, torch.zeros_like(x), backend=backend)
    up = torch.ones_like(out, requires_grad=True)
    (g,) = torch.autograd.grad(out, x, up, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        torch.autograd.grad(g.sum(), up, allow_unused=True)


def test_a_graph_of_the_gradient_within_a_checkpoint(device, backend):
    """Checkpointing lets a saved tensor be unpacked once."""
    x = torch.randn(3, 5, device=device, requires_grad=True)
    ones = torch.ones_like(x)

    def loss(x: Tensor) -> Tensor:
        return rk.value_loss(x * 2, ones, -ones, backend=backend)[0]

    expected = torch.autograd.grad(loss(x), x)[0]
    out = checkpoint(loss, x, use_reentrant=False)
    got = torch.autograd.grad(out, x, create_graph=True)[0]
    assert torch.equal(got, expected)


@each_differentiable
def test_nothing_is_kept_alive_by_what_leads_to_the_inputs(spec, device, backend):
    """Once the result is gone so are the inputs and the graph, without the garbage collector."""
    for why, number, leaves in calls(spec, device, backend):
        inputs = [x.clone().requires_grad_() for x in leaves]
        alive = [weakref.ref(x) for x in inputs]
        gc.disable()
        try:
            out = number(*inputs)
            grads = torch.autograd.grad(out, inputs, create_graph=True)
            del out, grads, inputs
            assert [x() for x in alive] == [None] * len(alive), why
        finally:
            gc.enable()


# ---- Constants ------------------------------------------------------------------------------


def constants_that_require_a_gradient(inputs: Inputs, differentiable: list[str]) -> Inputs:
    """The inputs with every floating tensor that is a constant requiring a gradient."""

    def ask(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_() if x.is_floating_point() else x

    asking = map_tensors(inputs, ask)
    mask = inputs.get("mask")
    if mask is not None:
        asking["mask"] = mask.float().requires_grad_()
    return {name: inputs[name] if name in differentiable else x for name, x in asking.items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_constants_that_require_a_gradient_give_no_result_one(spec, device, backend):
    """A loss of constants alone has no gradient, so that its backward says so."""
    for sample in spec.samples(Maker(device)):
        inputs = dict(sample.inputs)
        names = [n for n in spec.differentiable if isinstance(inputs.get(n), Tensor)]
        asking = constants_that_require_a_gradient(inputs, names)
        if "per_token" in asking:
            asking["per_token"] = inputs["per_token"]  # refused by name
        found = outputs(spec.function(**asking, backend=backend))
        assert not any(x.requires_grad for x in found), sample.why
        if found[0].dim() == 0:
            with pytest.raises(RuntimeError, match="does not require grad"):
                found[0].backward()
        for name in names:  # one at a time: the others are constants, too
            inputs_of_one = {**asking, name: inputs[name].detach().clone().requires_grad_()}
            found = outputs(spec.function(**inputs_of_one, backend=backend))
            used = found[0].requires_grad
            assert used == gives_a_gradient(spec, inputs, name), f"{sample.why}: {name}"
            if used:
                total = sum(x.double().sum() for x in found if x.requires_grad)
                total.backward()
            others = [asking[n] for n in asking if n != name and isinstance(asking[n], Tensor)]
            assert all(x.grad is None for x in others), f"{sample.why}: {name}"
        if INTERPRETING:
            return


def gives_a_gradient(spec: OpSpec, inputs: Inputs, name: str) -> bool:
    """All that is differentiable is used, but for the entropy, which may have no coefficient."""
    return name != "entropy" or inputs.get("entropy_coef", 0) != 0


def test_no_gradient_for_what_a_loss_function_uses_beside_constants(device, backend):
    """On every backend: hidden, weight and bias are constants, and so is the loss."""
    hidden, weight = torch.randn(4, 8, device=device), torch.randn(9, 8, device=device)
    scale = torch.ones((), device=device, requires_grad=True)

    def loss_fn(logprob: Tensor, entropy: Any) -> Any:
        return (scale * logprob).sum(), {"mean": scale * logprob.mean()}

    tokens = torch.tensor([1, 2, -100, 3], device=device)
    loss, stats = rk.linear_token_loss(hidden, weight, tokens, loss_fn, backend=backend)
    assert not loss.requires_grad and not stats["mean"].requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
