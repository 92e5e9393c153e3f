"""Pairwise reward loss of 65536 pairs, forward and backward, CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from harness import bench_inputs, compare, with_gradient
from rlhf_kernels import pairwise_reward_loss
from rlhf_kernels.pairwise_reward_loss import SPEC


def plain(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -logsigmoid(chosen - rejected).mean()


def test_pairwise_reward_loss_forward_backward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        with_gradient(lambda **x: pairwise_reward_loss(**x)[0], "chosen", "rejected"),
        {
            "eager plain": with_gradient(plain, "chosen", "rejected"),
            "compile plain": with_gradient(
                torch.compile(plain, dynamic=False), "chosen", "rejected"
            ),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
