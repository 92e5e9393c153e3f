"""gae: generalised advantage estimates and returns, in one reverse scan per sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import call_constant
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, Sample


class GAE(NamedTuple):
    """Advantages, and returns = advantages + values; both 0 at masked places."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    last_value: Tensor | None = None,
    backend: str | None = None,
) -> GAE:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        R_t     = A_t + V_t

    t + 1 is the next *valid* step: value and advantage are carried across masked positions, at the
    end and in interior gaps alike, and what stands there is not read. After the last valid step
    come V = last_value (0 without it) and A = 0. The results are targets: no gradient flows.

    Args:
        rewards: (B, T), or packed (N,) with ``cu_seqlens``; bf16, fp16, fp32 or fp64.
        values: V_t, the same shape.
        mask: the same shape, non-zero where a step is valid; None: everywhere.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1].
        cu_seqlens: (S + 1,) int32 or int64, where the packed sequences start, and N at the end.
        last_value: (B,) or (S,), the value after the last valid step of a truncated episode.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        ``GAE(advantages, returns)`` in the shape of ``values``; float32 (float64 if an input is
        float64). A sequence without a valid step gives 0.

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("rewards", rewards)
    sequences = check_sequences("rewards", rewards, cu_seqlens)
    checks.floating("values", values, rewards.device)
    checks.shape("values", values, rewards.shape, "to match rewards")
    if mask is not None:
        checks.mask("mask", mask, rewards.shape, "to match rewards", rewards.device)
    checks.number("gamma", gamma, 0.0, 1.0)
    checks.number("lam", lam, 0.0, 1.0)
    if last_value is not None:
        checks.floating("last_value", last_value, rewards.device)
        checks.shape("last_value", last_value, (sequences,), "for one value a sequence")
    chosen = _backend.select("gae", rewards.device.type, backend, rewards.dtype, rewards.shape[-1])
    tensors = (rewards, values, mask, cu_seqlens, last_value)
    if chosen == "reference":
        factors = checks.graph_numbers(values, torch.float64, float(gamma), float(lam))
        return GAE(*call_constant(gae_reference, *tensors, *factors))
    factors, numbers = checks.separated(float(gamma), float(lam))
    return GAE(*call_constant(_backend.call, chosen, "gae", numbers, *tensors, *factors))


def check_sequences(name: str, x: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in x: (B, T), or packed (N,) with ``cu_seqlens``."""
    if cu_seqlens is not None:
        checks.offsets("cu_seqlens", cu_seqlens, x.device)
    wanted = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
    if x.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequence_offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where the sequences of x.flatten() start, and its end: (S + 1,) int64."""
    if cu_seqlens is None:
        return torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    checks.offset_values("cu_seqlens", cu_seqlens, x.shape[0])
    return cu_seqlens.long()


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    last_value: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The specification: plain PyTorch, one step back in all sequences at a time."""
    dtype = _dtype(rewards, values, last_value)
    offsets = sequence_offsets(values, cu_seqlens)
    starts, ends = offsets[:-1], offsets[1:]
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    r = torch.where(valid, rewards.to(dtype), 0.0).flatten()
    v = torch.where(valid, values.to(dtype), 0.0).flatten()
    advantages, advantage = torch.zeros_like(v), v.new_zeros(starts.shape)
    value = v.new_zeros(starts.shape) if last_value is None else last_value.to(dtype)
    for back in range(1, _longest(values, cu_seqlens) + 1):
        at = (ends - back).clamp(min=0)
        here = (ends - back >= starts) & valid.flatten()[at]
        delta = r[at] + gamma * value - v[at]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        value = torch.where(here, v[at], value)
        advantages = advantages.index_add(0, at, torch.where(here, advantage, 0.0))
    advantages = advantages.view(values.shape)
    return advantages, torch.where(valid, advantages + v.view(values.shape), 0.0)


def _longest(values: Tensor, cu_seqlens: Tensor | None) -> int:
    """A bound on the length of the sequences; the exact one where it is known without a sync."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return values.shape[-1]
    return int(cu_seqlens.diff().amax()) if cu_seqlens.shape[0] > 1 else 0


def _dtype(rewards: Tensor, values: Tensor, last_value: Tensor | None) -> torch.dtype:
    tensors = (rewards, values) if last_value is None else (rewards, values, last_value)
    return checks.accumulation_dtype(*tensors)


def _fake(rewards, values, mask, cu_seqlens, last_value, gamma, lam):
    dtype = _dtype(rewards, values, last_value)
    return values.new_empty(values.shape, dtype=dtype), values.new_empty(values.shape, dtype=dtype)


# One pass: read rewards, values (and the mask), write advantages and returns: 4N floats.
_backend.define(
    "gae",
    {
        "gae": (
            "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? last_value, "
            "float gamma, float lam) -> (Tensor advantages, Tensor returns)",
            _fake,
        )
    },
)


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, **extra: Any) -> Sample:
        return Sample({"rewards": make.randn(*shape), "values": make.randn(*shape), **extra}, why)

    offsets = make.tensor([0, 5, 5, 6, 23], torch.int32)
    yield case("21: a vector and a rest", 2, 21)
    yield case("one step", 3, 1, last_value=make.randn(3))
    yield case("masked ends and gaps", 5, 17, mask=make.mask(5, 17), gamma=0.9, lam=0.8)
    mask = make.mask(13, 9, keep=0.5)
    yield case("many short rows", 13, 9, mask=mask)
    yield case("packed, one sequence empty", 23, cu_seqlens=offsets, gamma=0.99)
    packed = {"cu_seqlens": offsets.long(), "mask": make.mask(23), "last_value": make.randn(4)}
    yield case("packed, masked, bootstrapped", 23, **packed)
    yield case("no sequences", 0, 7)
    yield case("no steps", 3, 0)


def _bench(make: Maker) -> Iterator[Sample]:
    tensors: Inputs = {name: make.randn(64, 1024) for name in ("rewards", "values")}
    yield Sample(tensors, "64 x 1024")
    ends = make.integers(1024, 64, 1)
    mask = torch.arange(1024, device=ends.device) <= ends
    yield Sample({**tensors, "mask": mask}, "64 x 1024, half of it padding")


SPEC = OpSpec(
    name="gae",
    function=gae,
    samples=_samples,
    bench=_bench,
    # read rewards and values, write advantages and returns
    bytes_forward=lambda inputs: sum(
        2 * inputs[name].numel() * inputs[name].element_size() for name in ("rewards", "values")
    ),
)
