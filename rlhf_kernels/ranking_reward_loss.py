"""ranking_reward_loss: the reward-model loss over all ordered pairs of completions of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.opspec import Maker, OpSpec, Sample
from rlhf_kernels.pairwise_reward_loss import RewardStats, fake_stats


def ranking_reward_loss(
    scores: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
    *,
    center_coef: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, RewardStats]:
    """Loss of K ranked completions per prompt (InstructGPT, equation 1):

        mean over prompts of the mean over its pairs w before l of -log sigmoid(s_w - s_l)
        + center_coef * mean over completions of s^2

    Ties are no pairs, and a prompt without a pair is left out of the mean, so all pairs of a prompt
    weigh as one element of the batch. The pairs are never written out.

    Args:
        scores: (M,), the completions of a prompt side by side; bf16, fp16, fp32 or fp64.
        ranks: (M,) integer or floating, lower is better, compared within a prompt, without
            rounding; a completion with rank NaN is left out of everything.
        group_offsets: (P + 1,) int32 or int64, where the prompts start, and M at the end. Groups
            may be empty or differ in size.
        center_coef: number >= 0; pulls the scores towards 0.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        loss: one number, float32 (float64 for float64 scores), differentiable with respect to
            scores; without any pair only the centering term.
        stats: ``RewardStats`` over all pairs, each counted once; unpaired_count are the prompts
            without one, empty ones too.

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores: expected shape (M,), got {tuple(scores.shape)}")
    if not isinstance(ranks, Tensor):
        raise TypeError(f"ranks: expected a tensor, got {type(ranks).__name__}")
    if ranks.is_complex() or ranks.dtype == torch.bool:
        raise TypeError(f"ranks: expected an integer or floating dtype, got {ranks.dtype}")
    checks.same_device("ranks", ranks, scores.device)
    checks.shape("ranks", ranks, scores.shape, "to match scores")
    checks.offsets("group_offsets", group_offsets, scores.device)
    checks.number("center_coef", center_coef, 0.0)
    chosen = _backend.select("ranking_reward_loss", scores.device.type, backend)
    scores = scores.to(checks.accumulation_dtype(scores))
    ranks = _comparable(ranks.detach())
    if chosen == "reference":
        return ranking_reward_loss_reference(scores, ranks, group_offsets, float(center_coef))
    (coef,), numbers = checks.separated(float(center_coef))
    loss, *stats = _RankingRewardLoss.apply(chosen, numbers, scores, ranks, group_offsets, coef)
    return loss, RewardStats(*stats)


def _comparable(ranks: Tensor) -> Tensor:
    """The same order in float64 or int64: neither holds all numbers of the other."""
    if ranks.is_floating_point():
        return ranks.double()
    if ranks.dtype == torch.uint64:
        return ranks.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return ranks.long()


def ranking_reward_loss_reference(
    scores: Tensor, ranks: Tensor, group_offsets: Tensor, center_coef: float
) -> tuple[Tensor, RewardStats]:
    """The specification: plain PyTorch, differentiated by plain autograd; writes M x M pairs."""
    checks.offset_values("group_offsets", group_offsets, scores.shape[0])
    offsets, at = group_offsets.long(), torch.arange(scores.shape[0], device=scores.device)
    group = torch.searchsorted(offsets, at, right=True) - 1
    ranked = ~ranks.isnan()
    scores = torch.where(ranked, scores, 0.0)
    pair = (group[:, None] == group) & (ranks[:, None] < ranks)
    difference = torch.where(pair, scores[:, None] - scores, 0.0)
    losses = torch.where(pair, -logsigmoid(difference), 0.0).sum(1)
    per_prompt = scores.new_zeros(offsets.shape[0] - 1)
    pairs = per_prompt.index_add(0, group, pair.sum(1).to(scores.dtype))
    means = per_prompt.index_add(0, group, losses) / pairs.clamp(min=1.0)
    used = (pairs > 0).sum()
    loss = means.sum() / used.clamp(min=1)
    loss = loss + center_coef * (scores * scores).sum() / ranked.sum().clamp(min=1)
    apart = difference.detach().double()
    counts = (pair.sum(), (apart > 0).sum(), apart.sum(), pairs.shape[0] - used)
    return loss, RewardStats(*(x.double() for x in counts))


def _forward_fake(scores, ranks, group_offsets, center_coef, with_grad):
    grad = scores.new_empty(scores.shape if with_grad else (0,))
    return scores.new_empty(()), *fake_stats(scores, 4), grad


# Forward: read M scores and ranks, and for the pairs K/2 times again from the cache; write the
# gradient of the loss when it is wanted. Backward: times the upstream gradient.
_backend.define(
    "ranking_reward_loss",
    {
        "ranking_reward_loss_fwd": (
            "(Tensor scores, Tensor ranks, Tensor group_offsets, float center_coef, "
            "bool with_grad) -> (Tensor loss, Tensor pair_count, Tensor correct_count, "
            "Tensor margin_sum, Tensor unpaired_count, Tensor grad_scores)",
            _forward_fake,
        ),
        "ranking_reward_loss_bwd": (
            "(Tensor grad, Tensor grad_scores) -> Tensor",
            lambda grad, grad_scores: torch.empty_like(grad_scores),
        ),
    },
)


class _RankingRewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, numbers, *arguments):
        ctx.ops = _backend.operators[backend]
        loss, *stats, grad_scores = _backend.call(
            backend, "ranking_reward_loss_fwd", numbers, *arguments, ctx.needs_input_grad[2]
        )
        ctx.save_for_backward(loss, grad_scores)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad, *_):
        if grad is None:
            return (None,) * 6
        grad_scores = ctx.ops.ranking_reward_loss_bwd(grad, *ctx.saved_tensors[1:])
        return None, None, grad_scores, None, None, None


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *sizes: int, high: int = 9, **extra: Any) -> Sample:
        total = sum(sizes)
        offsets = make.tensor([sum(sizes[:i]) for i in range(len(sizes) + 1)], torch.int64)
        inputs = {"scores": make.randn(total), "ranks": make.integers(high, total), **extra}
        return Sample({**inputs, "group_offsets": offsets}, why)

    yield case("two prompts", 4, 3)
    yield case("empty and single groups; ties", 0, 1, 5, 0, 9, 1, 2, high=3, center_coef=0.1)
    yield case("70: several vectors of pairs and a rest", 70, 33, high=1000)
    yield case("all tied: no pair", 4, 2, high=1)
    yield case("no completions", 0, 0, center_coef=0.1)
    yield case("float ranks, one NaN", 5, ranks=make.tensor([0.5, torch.nan, 0.25, 3.0, -1.0]))
    yield case("200 apart and more", 4, scores=make.tensor([200.0, -200.0, 0.0, 30000.0]))


def _bench(make: Maker) -> Iterator[Sample]:
    prompts, completions = 64, 9
    offsets = make.tensor([i * completions for i in range(prompts + 1)], torch.int64)
    yield Sample(
        {
            "scores": make.randn(prompts * completions),
            "ranks": make.integers(completions, prompts * completions),
            "group_offsets": offsets,
        },
        "64 prompts of 9 completions",
    )


SPEC = OpSpec(
    name="ranking_reward_loss",
    function=ranking_reward_loss,
    samples=_samples,
    bench=_bench,
    differentiable=("scores",),
)
