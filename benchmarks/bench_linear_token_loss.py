"""linear_token_loss at 1024 x 512 x 32000, CPU: value and gradients, over its bare products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench_token_logprob import DTYPES, each_dtype
from harness import compare, with_gradient
from rlhf_kernels import linear_token_loss
from rlhf_kernels.linear_token_loss import SPEC
from rlhf_kernels.opspec import Maker


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor, loss_fn) -> Tensor:
    return linear_token_loss(hidden, weight, tokens, loss_fn)[0]


def logits(hidden: Tensor, weight: Tensor, tokens: Tensor, loss_fn) -> Tensor:
    return cross_entropy((hidden @ weight.t()).float(), tokens, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, loss_fn) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(hidden, weight, tokens, reduction="sum")


@each_dtype
def test_linear_token_loss(benchmark, dtype):
    inputs = [next(SPEC.bench(Maker("cpu", DTYPES[dtype], seed))).inputs for seed in range(2)]
    peers = {"eager logits, cross_entropy": with_gradient(logits, "hidden", "weight")}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
        peers["linear_cross_entropy"] = with_gradient(linear_cross_entropy, "hidden", "weight")
    gradient = torch.randn(1024, 32000).to(DTYPES[dtype])

    @torch.no_grad()
    def bare(x):
        return x["hidden"] @ x["weight"].t(), gradient @ x["weight"], gradient.t() @ x["hidden"]

    compare(
        benchmark,
        with_gradient(ours, "hidden", "weight"),
        peers,
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=2e-2 if dtype == "bf16" else 1e-4,
        floor=bare,
        rounds=25,
    )
