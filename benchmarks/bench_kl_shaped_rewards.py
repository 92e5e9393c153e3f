"""KL-shaped rewards at 64 x 1024, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare, eager_and_compiled
from rlhf_kernels import kl_shaped_rewards
from rlhf_kernels.kl_shaped_rewards import SPEC


def plain(
    scores: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    rewards = torch.where(mask, -kl_coef * (logprob - ref_logprob), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.unsqueeze(1))


@torch.no_grad()
def test_kl_shaped_rewards_forward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        lambda x: kl_shaped_rewards(**x),
        eager_and_compiled(plain=lambda x: plain(**x)),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
