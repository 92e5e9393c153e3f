"""gae at 64 x 1024 against the loop over time that trainers use, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare
from rlhf_kernels import gae
from rlhf_kernels.gae import SPEC


def time_loop(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95):
    """The usual loop, without a mask: the least that a trainer's loop does."""
    advantage, reversed_advantages = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


@torch.no_grad()
def test_gae_forward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        lambda x: gae(**x),
        {"eager time loop": lambda x: time_loop(**x)},
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
    )


@torch.no_grad()
def test_gae_forward_masked(benchmark):
    """Half of it padding; the loop pays for selecting at every step."""

    def masked_loop(rewards: Tensor, values: Tensor, mask: Tensor):
        value, advantage, out = torch.zeros(64), torch.zeros(64), []
        for t in reversed(range(rewards.shape[1])):
            valid = mask[:, t]
            delta = rewards[:, t] + value - values[:, t]
            advantage = torch.where(valid, delta + 0.95 * advantage, advantage)
            value = torch.where(valid, values[:, t], value)
            out.append(torch.where(valid, advantage, 0.0))
        advantages = torch.stack(out[::-1], dim=1)
        return advantages, torch.where(mask, advantages + values, 0.0)

    inputs = bench_inputs(SPEC, case=1)
    compare(
        benchmark,
        lambda x: gae(**x),
        {"eager time loop": lambda x: masked_loop(**x)},
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
    )
