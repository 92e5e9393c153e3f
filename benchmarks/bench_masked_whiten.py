"""Masked whitening of 64 x 1024, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare, eager_and_compiled
from rlhf_kernels import masked_whiten
from rlhf_kernels.masked_whiten import SPEC


def plain(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = (((x - mean) ** 2) * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


@torch.no_grad()
def test_masked_whiten_forward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        lambda x: masked_whiten(**x),
        eager_and_compiled(plain=lambda x: plain(**x)),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
