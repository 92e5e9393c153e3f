"""kl_shaped_rewards: per-token KL penalty, plus the score on the last valid token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import call_constant
from rlhf_kernels.gae import check_sequences, sequence_offsets
from rlhf_kernels.kl_estimate import KINDS, kl_estimate_reference
from rlhf_kernels.opspec import Maker, OpSpec, Sample


def kl_shaped_rewards(
    scores: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    mask: Tensor | None,
    *,
    kl_coef: float,
    kl_kind: str = "k1",
    clip_score: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rewards of PPO on text (InstructGPT, equation 2, without the pretraining term), per token:

        reward_t = -kl_coef KL_t + (t is the last valid token) score

    KL_t is ``kl_estimate(logprob, ref_logprob, kind=kl_kind)``. The last valid token is found from
    the mask alone, so a missing EOS or one equal to the padding makes no difference; a sequence
    without a valid token gets no score. The results are targets: no gradient flows.

    Args:
        scores: (B,), or (S,) with ``cu_seqlens``: one per sequence, e.g. of the reward model.
        logprob: (B, T), or packed (N,) with ``cu_seqlens``, in nats, of the policy that sampled.
        ref_logprob: the same shape, of the reference model.
        mask: the same shape, non-zero at response tokens; None: everywhere.
        kl_coef: beta, a number.
        kl_kind: k1 | k2 | k3.
        clip_score: number > 0; the score is bounded to [-clip_score, clip_score].
        cu_seqlens: (S + 1,) int32 or int64, where the packed sequences start, and N at the end.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        Rewards in the shape of ``logprob``, 0 at masked places; float32 (float64 if an input is
        float64).

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("logprob", logprob)
    sequences = check_sequences("logprob", logprob, cu_seqlens)
    checks.floating("ref_logprob", ref_logprob, logprob.device)
    checks.shape("ref_logprob", ref_logprob, logprob.shape, "to match logprob")
    checks.floating("scores", scores, logprob.device)
    checks.shape("scores", scores, (sequences,), "for one score a sequence")
    if mask is not None:
        checks.mask("mask", mask, logprob.shape, "to match logprob", logprob.device)
    checks.number("kl_coef", kl_coef)
    checks.choice("kl_kind", kl_kind, KINDS)
    if clip_score is not None:
        checks.number("clip_score", clip_score, 0.0, open_low=True)
    chosen = _backend.select("kl_shaped_rewards", logprob.device.type, backend)
    tensors = (scores, logprob, ref_logprob, mask, cu_seqlens)
    clip = torch.inf if clip_score is None else float(clip_score)
    rewards: Tensor
    if chosen == "reference":
        kl_coef, clip = checks.graph_numbers(logprob, torch.float64, float(kl_coef), clip)
        arguments = (*tensors, kl_coef, kl_kind, clip)
        rewards = call_constant(kl_shaped_rewards_reference, *arguments)
    else:
        coef = None
        if torch.compiler.is_compiling():
            coef, kl_coef = checks.as_tensor(kl_coef, logprob, torch.float64), 0.0
        (kl_coef, clip), numbers = checks.separated(float(kl_coef), clip)
        options = (kl_coef, KINDS.index(kl_kind), clip, coef)
        operator = (_backend.call, chosen, "kl_shaped_rewards")
        rewards = call_constant(*operator, numbers, *tensors, *options)
    return rewards


def kl_shaped_rewards_reference(
    scores: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    clip_score: float,
) -> Tensor:
    """The specification: plain PyTorch."""
    dtype = checks.accumulation_dtype(scores, logprob, ref_logprob)
    offsets = sequence_offsets(logprob, cu_seqlens)
    valid = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    p = torch.where(valid, logprob.to(dtype), 0.0).flatten()
    q = torch.where(valid, ref_logprob.to(dtype), 0.0).flatten()
    rewards = -kl_coef * kl_estimate_reference(p, q, kl_kind, None)
    rewards = torch.where(valid.flatten(), rewards, 0.0)
    at = torch.arange(rewards.shape[0], device=rewards.device)
    sequence = torch.searchsorted(offsets, at, right=True) - 1
    candidates = torch.where(valid.flatten(), at, -1)
    last = torch.full_like(offsets[:-1], -1).scatter_reduce(0, sequence, candidates, "amax")
    score = scores.to(dtype).clamp(-clip_score, clip_score)[sequence]
    return (rewards + torch.where(at == last[sequence], score, 0.0)).view(logprob.shape)


def _fake(scores, logprob, ref_logprob, *rest):
    dtype = checks.accumulation_dtype(scores, logprob, ref_logprob)
    return logprob.new_empty(logprob.shape, dtype=dtype)


# One pass: read 2N (and the mask), write N. kl_kind: index into KINDS; clip_score: inf for none;
# coef holds kl_coef where it is not a number.
_backend.define(
    "kl_shaped_rewards",
    {
        "kl_shaped_rewards": (
            "(Tensor scores, Tensor logprob, Tensor ref_logprob, Tensor? mask, "
            "Tensor? cu_seqlens, float kl_coef, int kl_kind, float clip_score, "
            "Tensor? coef) -> Tensor",
            _fake,
        )
    },
)


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, sequences: int, *shape: int, **extra: Any) -> Sample:
        tensors = {name: make.randn(*shape) for name in ("logprob", "ref_logprob")}
        scores = make.randn(sequences, scale=5.0)
        return Sample({"scores": scores, **tensors, "mask": None, "kl_coef": 0.05, **extra}, why)

    offsets = make.tensor([0, 20, 20, 21, 47], torch.int32)
    yield case("all valid", 2, 2, 5)
    for kind in KINDS:
        mask = make.mask(5, 37, keep=0.5)
        mask[2] = False
        yield case("gaps, one row masked", 5, 5, 37, mask=mask, kl_kind=kind)
    yield case("clipped scores", 9, 9, 3, clip_score=2.0, mask=make.mask(9, 3))
    yield case("packed, one sequence empty", 4, 47, cu_seqlens=offsets, mask=make.mask(47))
    yield case("no sequences", 0, 0, 3)
    yield case("no tokens", 2, 2, 0)
    strided = {"logprob": make.randn(9, 4).T, "ref_logprob": make.randn(4, 12)[:, 2:11]}
    yield case("transposed, and a slice of columns", 4, 4, 9, **strided)


def _bench(make: Maker) -> Iterator[Sample]:
    tensors = {name: make.randn(64, 1024) for name in ("logprob", "ref_logprob")}
    mask = make.mask(64, 1024)
    yield Sample({"scores": make.randn(64), **tensors, "mask": mask, "kl_coef": 0.05}, "64 x 1024")


SPEC = OpSpec(
    name="kl_shaped_rewards",
    function=kl_shaped_rewards,
    samples=_samples,
    bench=_bench,
)
