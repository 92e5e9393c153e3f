"""token_logprob at 512 x 50304 (GPT-2's vocabulary, rounded up), CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from harness import compare, eager_and_compiled, with_gradient
from rlhf_kernels import token_logprob
from rlhf_kernels.opspec import Maker
from rlhf_kernels.token_logprob import SPEC

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_inputs(dtype: str) -> list[dict[str, Tensor]]:
    return [next(SPEC.bench(Maker("cpu", DTYPES[dtype], seed))).inputs for seed in range(2)]


def log_softmax_gather(logits: Tensor, tokens: Tensor) -> Tensor:
    log_p = log_softmax(logits, -1, dtype=torch.float32)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def gather_logsumexp(logits: Tensor, tokens: Tensor) -> Tensor:
    target = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
    return target - logits.float().logsumexp(-1)


def with_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    log_p = log_softmax(logits, -1, dtype=torch.float32)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


PEERS = {"log_softmax + gather": log_softmax_gather, "gather - logsumexp": gather_logsumexp}


def peers_of(functions, wrap):
    return eager_and_compiled(**{name: wrap(function) for name, function in functions.items()})


@torch.no_grad()
@each_dtype
def test_token_logprob_forward(benchmark, dtype):
    inputs = make_inputs(dtype)
    compare(
        benchmark,
        lambda x: token_logprob(**x),
        eager_and_compiled(**{k: (lambda x, f=f: f(**x)) for k, f in PEERS.items()}),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
    )


@torch.no_grad()
@each_dtype
def test_token_logprob_forward_with_entropy(benchmark, dtype):
    inputs = make_inputs(dtype)
    compare(
        benchmark,
        lambda x: token_logprob(**x, with_entropy=True),
        eager_and_compiled(entropy=lambda x: with_entropy(**x)),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-5,
    )


def compiled_gradients() -> dict:
    """The peers' forward compiled, so that torch.compile also makes their backward."""
    out = {}
    for name, function in PEERS.items():
        out[f"eager {name}"] = with_gradient(function, "logits")
        out[f"compile {name}"] = with_gradient(torch.compile(function, dynamic=False), "logits")
    return out


@each_dtype
def test_token_logprob_forward_backward(benchmark, dtype):
    inputs = make_inputs(dtype)
    compare(
        benchmark,
        with_gradient(token_logprob, "logits"),
        compiled_gradients(),
        inputs,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-2 if dtype == "bf16" else 1e-5,
    )


class FromModel(torch.autograd.Function):
    """Logits as a model hands them over: computed by autograd, in a buffer of their own."""

    @staticmethod
    def forward(ctx, parameter, buffer):
        return torch.as_strided(buffer, buffer.shape, buffer.stride())

    @staticmethod
    def backward(ctx, grad):
        ctx.grad = grad
        return grad.new_zeros(()), None


@each_dtype
def test_token_logprob_forward_inplace_backward(benchmark, dtype):
    inputs = make_inputs(dtype)
    saved = [x["logits"].clone() for x in inputs]
    originals = {x["logits"].data_ptr(): s for x, s in zip(inputs, saved, strict=True)}

    def restore(x):
        x["logits"].data.copy_(originals[x["logits"].data_ptr()])
        return x

    def ours(x):
        parameter = torch.zeros((), requires_grad=True)
        logits = FromModel.apply(parameter, x["logits"])
        total = token_logprob(logits, x["tokens"], inplace_backward=True).sum()
        total.backward()
        return total.detach(), x["logits"]

    compare(
        benchmark,
        ours,
        compiled_gradients(),
        inputs,
        prepare=restore,
        least_bytes=SPEC.bytes_backward(inputs[0]),
        tolerance=1e-2 if dtype == "bf16" else 1e-5,
    )
