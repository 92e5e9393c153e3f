"""value_loss, forward and backward at 64 x 1024, against the formula that trainers write, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare, with_gradient
from rlhf_kernels import value_loss
from rlhf_kernels.value_loss import SPEC


def plain(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor):
    """Loss, and the share of tokens whose clipped error is the larger one."""
    clipped = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    squares, clipped_squares = (values - returns) ** 2, (clipped - returns) ** 2
    count = mask.sum()
    with torch.no_grad():
        clip_frac = ((clipped_squares > squares) * mask).sum() / count
    return 0.5 * (torch.maximum(squares, clipped_squares) * mask).sum() / count, clip_frac


def test_value_loss_forward_backward(benchmark):
    inputs = bench_inputs(SPEC)
    compiled = torch.compile(plain, dynamic=False)
    compare(
        benchmark,
        with_gradient(lambda **x: value_loss(**x)[0], "values"),
        {
            "eager plain": with_gradient(lambda **x: plain(**x)[0], "values"),
            "compile plain": with_gradient(lambda **x: compiled(**x)[0], "values"),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
