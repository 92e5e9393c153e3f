"""pairwise_reward_loss: -log sigmoid(chosen - rejected - margin), the Bradley-Terry loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.opspec import Maker, OpSpec, Sample
from rlhf_kernels.stats import merge, merge_from_zero


class RewardStats(NamedTuple):
    """Sums over pairs, each a float64 tensor of one element; ``+`` merges two of them.

    A pair of equal scores is in pair_count alone: a model that scores all the same is never right.
    """

    pair_count: Tensor
    correct_count: Tensor  # the better completion has the strictly higher score
    margin_sum: Tensor  # score of the better completion minus that of the worse
    unpaired_count: Tensor  # prompts without a pair of different ranks, which the loss leaves out

    def __add__(self, other: RewardStats) -> RewardStats:  # type: ignore[override]
        return merge(self, other)

    def __radd__(self, start: Any) -> RewardStats:
        return merge_from_zero(self, start)

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs in the right order; 0 without pairs."""
        return self.correct_count / self.pair_count.clamp(min=1)

    @property
    def margin(self) -> Tensor:
        """Mean score difference, better minus worse; 0 without pairs."""
        return self.margin_sum / self.pair_count.clamp(min=1)


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, RewardStats]:
    """Mean over pairs of the Bradley-Terry loss (Stiennon et al. 2020, section 3.4), with
    z = chosen - rejected - margin:

        -(1 - e) log sigmoid(z) - e log sigmoid(-z) + center_coef (chosen + rejected)^2

    e is ``label_smoothing``, the share of labels taken to be flipped. log sigmoid(z) is computed as
    min(z, 0) - log1p(exp(-|z|)): exact where log(1 + exp(-z)) would overflow.

    Args:
        chosen: scores of the preferred completions; any shape.
        rejected: scores of the others; the same shape.
        margin: number, or tensor broadcastable to ``chosen``: by how much chosen has to win. A
            constant: no gradient flows to it.
        center_coef: number >= 0; pulls the scores towards 0.
        label_smoothing: e in [0, 1].
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        loss: one number, float32 (float64 if an input is float64), differentiable with respect to
            chosen and rejected; 0 without pairs.
        stats: ``RewardStats``; accuracy is chosen > rejected, the margin left out, and
            unpaired_count 0.

    Raises:
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    checks.floating("chosen", chosen)
    checks.floating("rejected", rejected, chosen.device)
    checks.shape("rejected", rejected, chosen.shape, "to match chosen")
    checks.number("center_coef", center_coef, 0.0)
    checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    backend = _backend.select("pairwise_reward_loss", chosen.device.type, backend)
    dtype = checks.accumulation_dtype(chosen, rejected)
    margin_tensor, margin_value = None, 0.0
    if isinstance(margin, Tensor):
        margin_tensor = _expand_margin(margin, chosen, dtype)
    elif margin is not None:
        checks.number("margin", margin)
        margin_value = float(margin)
    tensors = (chosen.to(dtype), rejected.to(dtype), margin_tensor)
    scalars = (margin_value, float(center_coef), float(label_smoothing))
    if backend == "reference":
        scalars = checks.graph_numbers(chosen, dtype, *scalars)
        return pairwise_reward_loss_reference(*tensors, *scalars)
    scalars, numbers = checks.separated(*scalars)
    loss, *stats = _PairwiseRewardLoss.apply(backend, numbers, *tensors, *scalars)
    return loss, RewardStats._make([*stats, torch.zeros_like(stats[0])])


def _expand_margin(margin: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    checks.same_device("margin", margin, chosen.device)
    try:
        return margin.detach().to(dtype).expand(chosen.shape)
    except RuntimeError:
        raise ValueError(
            f"margin: expected a number or a shape broadcastable to {tuple(chosen.shape)} "
            f"of chosen, got {tuple(margin.shape)}"
        ) from None


def pairwise_reward_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    margin_value: float,
    center_coef: float,
    label_smoothing: float,
) -> tuple[Tensor, RewardStats]:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    difference = chosen - rejected
    z = difference - (margin_value if margin is None else margin)
    loss = -(1.0 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
    loss = loss + center_coef * (chosen + rejected) ** 2
    apart = difference.detach().double()
    pairs = torch.ones_like(apart).sum()
    correct = (apart > 0).sum().double()
    stats = RewardStats(pairs, correct, apart.sum(), torch.zeros_like(pairs))
    return loss.sum() / max(apart.numel(), 1), stats


def _forward_fake(chosen, rejected, margin, margin_value, center_coef, smoothing, with_grad):
    grad = chosen.new_empty(chosen.shape if with_grad else (0,))
    return chosen.new_empty(()), *fake_stats(chosen, 3), grad, torch.empty_like(grad)


def fake_stats(like: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty((), dtype=torch.float64) for _ in range(count))


# Forward: read 2N (3N with a margin), write the 2N gradients of the loss when they are wanted.
# Backward: times the upstream gradient, read 2N, write 2N.
_backend.define(
    "pairwise_reward_loss",
    {
        "pairwise_reward_loss_fwd": (
            "(Tensor chosen, Tensor rejected, Tensor? margin, float margin_value, "
            "float center_coef, float label_smoothing, bool with_grad) -> (Tensor loss, "
            "Tensor pair_count, Tensor correct_count, Tensor margin_sum, Tensor grad_chosen, "
            "Tensor grad_rejected)",
            _forward_fake,
        ),
        "pairwise_reward_loss_bwd": (
            "(Tensor grad, Tensor grad_chosen, Tensor grad_rejected) -> (Tensor, Tensor)",
            lambda grad, chosen, rejected: (torch.empty_like(chosen), torch.empty_like(rejected)),
        ),
    },
)


class _PairwiseRewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, numbers, *arguments):
        ctx.ops = _backend.operators[backend]
        with_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        loss, *stats, grad_chosen, grad_rejected = _backend.call(
            backend, "pairwise_reward_loss_fwd", numbers, *arguments, with_grad
        )
        ctx.save_for_backward(loss, grad_chosen, grad_rejected)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad, *_):
        if grad is None:
            return (None,) * 8
        _, *saved = ctx.saved_tensors
        grad_chosen, grad_rejected = ctx.ops.pairwise_reward_loss_bwd(grad, *saved)
        need, need_rejected = ctx.needs_input_grad[2:4]
        return (
            None,
            None,
            grad_chosen if need else None,
            grad_rejected if need_rejected else None,
            *(None,) * 4,
        )


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, **extra: Any) -> Sample:
        return Sample({"chosen": make.randn(*shape), "rejected": make.randn(*shape), **extra}, why)

    yield case("37: two vectors and a rest", 37)
    yield case("9001: several blocks and a rest", 9001)
    yield case("everything", 3, 7, margin=0.5, center_coef=0.01, label_smoothing=0.1)
    yield case("a margin for each", 21, margin=make.uniform(21))
    yield case("a margin per row", 4, 5, margin=make.uniform(4, 1), label_smoothing=0.3)
    yield case("one pair, without dimensions")
    yield case("no pairs", 0, center_coef=0.1)
    far = make.tensor([200.0, -200.0, 0.0, 30000.0])
    yield case("200 apart and more", 4, chosen=far, rejected=-far)
    yield case("every other element", 5, chosen=make.randn(10)[::2])


def _bench(make: Maker) -> Iterator[Sample]:
    tensors = {name: make.randn(65536) for name in ("chosen", "rejected")}
    yield Sample(tensors, "65536 pairs")


SPEC = OpSpec(
    name="pairwise_reward_loss",
    function=pairwise_reward_loss,
    samples=_samples,
    bench=_bench,
    differentiable=("chosen", "rejected"),
)
