"""kl_estimate: per-token estimates k1, k2, k3 of KL(p || q) from two log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.opspec import Maker, OpSpec, Sample

KINDS = ("k1", "k2", "k3")


def kl_estimate(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    kind: str = "k3",
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Estimate KL(p || q) at tokens drawn from p, with d = log p - log q (Schulman 2020).

    k1 = d: unbiased, of either sign; its gradient is zero in expectation, so as a term of a loss it
    teaches nothing. k2 = d^2 / 2: biased, but its gradient is that of KL(p || q) in expectation.
    k3 = expm1(-d) + d: unbiased and never negative; its own gradient is that of KL(q || p).

    Without ``clamp`` k3 overflows where q is much more likely than p: for d < -88.7 in float32
    (-709.7 in float64) it is +inf with an infinite gradient. ``clamp=10`` bounds it by 22016.

    Args:
        logprob: log p of each token under the policy that drew it, in nats; any shape.
        ref_logprob: log q of the same tokens under the reference; the same shape.
        kind: k1 | k2 | k3.
        clamp: number > 0; d is bounded to [-clamp, clamp] before use, and has no gradient outside.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        The estimate in nats, in the same shape; float32 (float64 if an input is float64).
        Differentiable with respect to both log-probabilities.

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("logprob", logprob)
    checks.floating("ref_logprob", ref_logprob, logprob.device)
    checks.shape("ref_logprob", ref_logprob, logprob.shape, "to match logprob")
    checks.choice("kind", kind, KINDS)
    if clamp is not None:
        checks.number("clamp", clamp, 0.0, open_low=True)
    chosen = _backend.select("kl_estimate", logprob.device.type, backend)
    dtype = checks.accumulation_dtype(logprob, ref_logprob)
    logprob, ref_logprob = logprob.to(dtype), ref_logprob.to(dtype)
    if chosen == "reference":
        if clamp is not None:
            (clamp,) = checks.graph_numbers(logprob, dtype, clamp)
        return kl_estimate_reference(logprob, ref_logprob, kind, clamp)
    (bound,), numbers = checks.separated(torch.inf if clamp is None else float(clamp))
    scalars = (KINDS.index(kind), bound)
    kl: Tensor = _KlEstimate.apply(chosen, logprob, ref_logprob, *scalars, numbers)
    return kl


def kl_estimate_reference(
    logprob: Tensor, ref_logprob: Tensor, kind: str, clamp: float | None
) -> Tensor:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    d = logprob - ref_logprob
    if clamp is not None:
        d = d.clamp(-clamp, clamp)
    if kind == "k1":
        return d
    return 0.5 * d * d if kind == "k2" else torch.expm1(-d) + d


# kind is the index into KINDS; clamp is inf for none. Forward: read 2N, write N. Backward: read 3N,
# write N, or 2N where the reference's log-probability wants its gradient as well (the negative).
_ARGUMENTS = "Tensor logprob, Tensor ref_logprob, int kind, float clamp"
_backend.define(
    "kl_estimate",
    {
        "kl_estimate_fwd": (
            f"({_ARGUMENTS}) -> Tensor",
            lambda logprob, *rest: logprob.new_empty(logprob.shape),
        ),
        "kl_estimate_bwd": (
            f"(Tensor grad, {_ARGUMENTS}, bool need_ref) -> (Tensor logprob, Tensor ref_logprob)",
            lambda grad, logprob, ref_logprob, kind, clamp, need_ref: (
                logprob.new_empty(logprob.shape),
                logprob.new_empty(logprob.shape if need_ref else (0,)),
            ),
        ),
    },
)


class _KlEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, logprob, ref_logprob, kind, clamp, numbers):
        ctx.save_for_backward(logprob, ref_logprob, numbers)
        ctx.scalars = (backend, kind, clamp)
        ctx.set_materialize_grads(False)
        arguments = (numbers, logprob, ref_logprob, kind, clamp)
        return _backend.call(backend, "kl_estimate_fwd", *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        if grad is None:
            return (None,) * 6
        need, need_ref = ctx.needs_input_grad[1:3]
        logprob, ref_logprob, numbers = ctx.saved_tensors
        backend, *scalars = ctx.scalars
        arguments = (numbers, grad, logprob, ref_logprob, *scalars, need_ref)
        grad_logprob, grad_ref = _backend.call(backend, "kl_estimate_bwd", *arguments)
        grads = (grad_logprob if need else None, grad_ref if need_ref else None)
        return None, *grads, None, None, None


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, scale: float = 1.0, **extra: Any) -> Sample:
        tensors = {name: make.randn(*shape, scale=scale) for name in ("logprob", "ref_logprob")}
        return Sample({**tensors, **extra}, why)

    for kind in KINDS:
        yield case("37: two vectors and a rest", 37, kind=kind)
        yield case("differences beyond the clamp", 5, 9, scale=3.0, kind=kind, clamp=2.0)
    yield case("one number, without dimensions")
    yield case("nothing", 0, 4)
    yield case("9000: more than one block of a thread", 9000, scale=1e-3)
    strided = {"logprob": make.randn(6, 5).T, "ref_logprob": make.randn(5, 12)[:, ::2]}
    yield Sample(strided, "transposed, and every other column")


def _bench(make: Maker) -> Iterator[Sample]:
    tensors = {name: make.randn(64, 1024) for name in ("logprob", "ref_logprob")}
    yield Sample(tensors, "64 x 1024")


SPEC = OpSpec(
    name="kl_estimate",
    function=kl_estimate,
    samples=_samples,
    bench=_bench,
    differentiable=("logprob", "ref_logprob"),
)
