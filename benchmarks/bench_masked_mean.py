"""Masked mean over 64 x 1024, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare, eager_and_compiled
from rlhf_kernels import masked_mean
from rlhf_kernels.masked_mean import SPEC


def plain(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


@torch.no_grad()
def test_masked_mean_forward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        lambda x: masked_mean(**x),
        eager_and_compiled(plain=lambda x: plain(**x)),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
