"""policy_loss, forward and backward at 64 x 1024, against the formula that trainers write, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare, with_gradient
from rlhf_kernels import policy_loss
from rlhf_kernels.policy_loss import SPEC


def plain(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor):
    """Loss and the three statistics that every trainer logs."""
    log_ratio = logprob - old_logprob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(0.8, 1.2)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    count = mask.sum()
    with torch.no_grad():
        binds = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
        clip_frac = (binds * mask).sum() / count
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum() / count
        ratio_mean = (ratio * mask).sum() / count
    return (losses * mask).sum() / count, (clip_frac, approx_kl, ratio_mean)


def test_policy_loss_forward_backward(benchmark):
    inputs = bench_inputs(SPEC)
    compiled = torch.compile(plain, dynamic=False)
    compare(
        benchmark,
        with_gradient(lambda **x: policy_loss(**x)[0], "logprob"),
        {
            "eager plain": with_gradient(lambda **x: plain(**x)[0], "logprob"),
            "compile plain": with_gradient(lambda **x: compiled(**x)[0], "logprob"),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
