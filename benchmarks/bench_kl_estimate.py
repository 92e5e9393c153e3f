"""k3 estimate of the KL, forward and backward at 64 x 1024, CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import bench_inputs, compare, with_gradient
from rlhf_kernels import kl_estimate
from rlhf_kernels.kl_estimate import SPEC


def plain(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    difference = ref_logprob - logprob
    return difference.exp() - 1 - difference


def test_kl_estimate_forward_backward(benchmark):
    inputs = bench_inputs(SPEC)
    compare(
        benchmark,
        with_gradient(kl_estimate, "logprob", "ref_logprob"),
        {
            "eager plain": with_gradient(plain, "logprob", "ref_logprob"),
            "compile plain": with_gradient(
                torch.compile(plain, dynamic=False), "logprob", "ref_logprob"
            ),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-5,
        rounds=501,
    )
