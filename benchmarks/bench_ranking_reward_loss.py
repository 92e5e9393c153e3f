"""K-wise reward loss, 64 prompts of 9 completions, forward and backward, CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from harness import bench_inputs, compare, with_gradient
from rlhf_kernels import ranking_reward_loss
from rlhf_kernels.ranking_reward_loss import SPEC


def plain(scores: Tensor, ranks: Tensor, group_offsets: Tensor) -> Tensor:
    """All pairs of all prompts as one cube: possible because all prompts have as many."""
    prompts = group_offsets.shape[0] - 1
    s, r = scores.view(prompts, -1), ranks.view(prompts, -1)
    better = r.unsqueeze(2) < r.unsqueeze(1)
    losses = -logsigmoid(s.unsqueeze(2) - s.unsqueeze(1)) * better
    count = better.sum((1, 2))
    return (losses.sum((1, 2)) / count.clamp(min=1)).sum() / (count > 0).sum()


def test_ranking_reward_loss_forward_backward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        with_gradient(lambda **x: ranking_reward_loss(**x)[0], "scores"),
        {
            "eager plain": with_gradient(plain, "scores"),
            "compile plain": with_gradient(torch.compile(plain, dynamic=False), "scores"),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
