"""logprob_kl at 512 x 50304 against two log_softmax and the sum over the vocabulary, CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from harness import bench_inputs, compare, eager_and_compiled, with_gradient
from rlhf_kernels import logprob_kl
from rlhf_kernels.logprob_kl import SPEC


def plain(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    log_p = log_softmax(logits, -1, dtype=torch.float32)
    log_q = log_softmax(ref_logits, -1, dtype=torch.float32)
    p, index = log_p.exp(), tokens.unsqueeze(-1)
    kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    return log_p.gather(-1, index)[..., 0], log_q.gather(-1, index)[..., 0], kl, entropy


def kl_only(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
    return plain(logits, ref_logits, tokens)[2]


@torch.no_grad()
def test_logprob_kl_forward(benchmark):
    inputs = bench_inputs(SPEC, 2)
    compare(
        benchmark,
        lambda x: logprob_kl(**x),
        eager_and_compiled(plain=lambda x: plain(**x)),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
    )


def test_logprob_kl_forward_backward(benchmark):
    inputs = bench_inputs(SPEC, 2)
    compare(
        benchmark,
        with_gradient(lambda **x: logprob_kl(**x).kl, "logits"),
        {
            "eager plain": with_gradient(kl_only, "logits"),
            "compile plain": with_gradient(torch.compile(kl_only, dynamic=False), "logits"),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-4,
    )
