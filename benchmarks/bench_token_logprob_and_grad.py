"""token_logprob_and_grad at 512 x 50304, CPU, against plain formulas and their gradients."""

from __future__ import annotations

from bench_token_logprob import compiled_gradients, each_dtype, make_inputs
from harness import compare
from rlhf_kernels import token_logprob_and_grad
from rlhf_kernels.token_logprob_and_grad import SPEC


@each_dtype
def test_token_logprob_and_grad(benchmark, dtype):
    inputs = make_inputs(dtype)

    def ours(x):
        out = token_logprob_and_grad(**x)
        return out.logprob.sum(), out.grad_logits

    compare(
        benchmark,
        ours,
        compiled_gradients(),
        inputs,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-2 if dtype == "bf16" else 1e-5,
    )


@each_dtype
def test_token_logprob_and_grad_in_place(benchmark, dtype):
    inputs = make_inputs(dtype)
    originals = {x["logits"].data_ptr(): x["logits"].clone() for x in inputs}

    def restore(x):
        x["logits"].copy_(originals[x["logits"].data_ptr()])
        return x

    def ours(x):
        out = token_logprob_and_grad(**x, inplace=True)
        return out.logprob.sum(), out.grad_logits

    compare(
        benchmark,
        ours,
        compiled_gradients(),
        inputs,
        prepare=restore,
        least_bytes=SPEC.bytes_forward(inputs[0]),
        tolerance=1e-2 if dtype == "bf16" else 1e-5,
    )
