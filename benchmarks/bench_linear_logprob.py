"""linear_logprob at 1024 x 512 x 32000, CPU, over its bare products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import bench_token_logprob
from bench_token_logprob import DTYPES, each_dtype
from harness import compare, eager_and_compiled, with_gradient
from rlhf_kernels import linear_chunks, linear_logprob
from rlhf_kernels.linear_logprob import SPEC
from rlhf_kernels.opspec import Inputs, Maker


def log_softmax_gather(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return bench_token_logprob.log_softmax_gather(linear(hidden, weight), tokens)


def with_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return bench_token_logprob.with_entropy(linear(hidden, weight), tokens)


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    result = linear_logprob(hidden, weight, tokens)
    assert isinstance(result, Tensor)
    return result


def make_inputs(dtype: str) -> list[Inputs]:
    return [next(SPEC.bench(Maker("cpu", DTYPES[dtype], seed))).inputs for seed in range(2)]


@torch.no_grad()
@each_dtype
def test_linear_logprob_forward(benchmark, dtype):
    inputs = make_inputs(dtype)
    compare(
        benchmark,
        lambda x: ours(**x),
        eager_and_compiled(logits=lambda x: log_softmax_gather(**x)),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=2e-2 if dtype == "bf16" else 1e-5,
        floor=lambda x: linear(x["hidden"], x["weight"]),
        rounds=15,
    )


@torch.no_grad()
def test_linear_logprob_large_vocabulary(benchmark, monkeypatch):
    """1024 x 256 x 128256 with the weight in blocks and as a whole; which of them serves depends on
    the CPU."""
    make = Maker("cpu", torch.float32, 0)
    hidden, weight = make.randn(1024, 256), make.randn(128256, 256, scale=0.05)
    inputs = {"hidden": hidden, "weight": weight, "tokens": make.integers(128256, 1024)}

    def by(blocks: bool):
        def call(x):
            monkeypatch.setattr(linear_chunks, "_cpu_takes_blocks", lambda: blocks)
            return ours(**x)

        return call

    compare(
        benchmark,
        by(True),
        {"the weight as a whole": by(False)},
        [inputs],
        least_bytes=SPEC.bytes_forward(inputs),
        tolerance=1e-5,
        floor=lambda x: linear(x["hidden"], x["weight"]),
        rounds=15,
    )


@each_dtype
def test_linear_logprob_forward_backward(benchmark, dtype):
    inputs = make_inputs(dtype)
    compiled = torch.compile(log_softmax_gather, dynamic=False)
    gradient = torch.randn(1024, 32000).to(DTYPES[dtype])

    @torch.no_grad()
    def bare(x):  # the logits once for the value, and once more for their gradient
        logits = [x["hidden"] @ x["weight"].t() for _ in range(2)]
        return *logits, gradient @ x["weight"], gradient.t() @ x["hidden"]

    compare(
        benchmark,
        with_gradient(ours, "hidden", "weight"),
        {
            "eager logits": with_gradient(log_softmax_gather, "hidden", "weight"),
            "compile logits": with_gradient(compiled, "hidden", "weight"),
        },
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=2e-2 if dtype == "bf16" else 1e-4,
        floor=bare,
        rounds=15,
    )
