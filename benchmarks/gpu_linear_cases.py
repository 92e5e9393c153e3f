"""The gate's cases of linear_logprob and linear_token_loss, their peers, and their bare products.

Hidden states of 4096 in bf16; the logits have a deviation of 2. A step is the forward and the
gradients of hidden states and weight. What the products with nothing else take is measured in the
same rounds. On an H200 (780 TFLOP/s in bf16), by the operations: 20 ms for the three of 4096 tokens
and a vocabulary of 151936, 6.5 ms for the first of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

import bench_linear_logprob
from gpu_case import SPEC, Case, Draw, Function, Package, first
from rlhf_kernels import linear_logprob, policy_loss
from rlhf_kernels.linear_chunks import Head, tokens_of_chunk
from rlhf_kernels.opspec import Inputs

HIDDEN = 4096
VOCABULARIES = (151936, 128256)  # Qwen 2.5 and 3, Llama 3
TOKENS = 4096  # of the cases with every peer
OTHER_TOKENS = (8192, 16384, 1024)
REFERENCE_TOKENS = 1024  # whose logits the reference holds in float64


def head_inputs(tokens: int, vocab: int) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        n, v, width = draw.size(tokens), draw.size(vocab), draw.size(HIDDEN)
        hidden = draw.normal(n, width, dtype=torch.bfloat16)
        weight = draw.normal(v, width, scale=2 / width**0.5, dtype=torch.bfloat16)
        return {"hidden": hidden, "weight": weight, "tokens": draw.integers(v, n)}

    return make


def policy_inputs(tokens: int, vocab: int) -> Callable[[Draw], Inputs]:
    """Inputs of a policy loss that rounding does not decide on.

    Ratios are near 2/3, 1 and 3/2, none of them near the clip, and the loss is not near 0.
    """
    plain = head_inputs(tokens, vocab)

    def make(draw: Draw) -> Inputs:
        inputs = plain(draw)
        with torch.no_grad():
            logprob = reference_logprob(**inputs)
        moved = 0.4 * (draw.integers(3, len(logprob)) - 1)
        advantages = 1 + draw.normal(len(logprob))
        return {**inputs, "old_logprob": logprob + moved, "advantages": advantages}

    return make


def reference_logprob(
    hidden: Tensor, weight: Tensor, tokens: Tensor, with_entropy: bool = False
) -> Any:
    """The operator's reference in chunks, made again for the backward: fits into memory in float64.

    With 16 bits it is the plain formula all the same: dW is added up in float32.
    """
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()

    def part(h: Tensor, w: Tensor, t: Tensor) -> Any:
        return linear_logprob(h, w.to(h.dtype), t, with_entropy=True, backend="reference")

    chunks = zip(hidden.split(REFERENCE_TOKENS), tokens.split(REFERENCE_TOKENS), strict=True)
    parts = [checkpoint(part, h, wide, t, use_reentrant=False) for h, t in chunks]
    logprob, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    return (logprob, entropy) if with_entropy else logprob


def clipped_surrogate(logprob: Tensor, old_logprob: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def minus_mean(logprob: Tensor) -> Tensor:
    return -logprob.mean()


def loss_of(logprob: Function, loss: Function) -> Function:
    """A step's forward from a function that gives the log-probabilities."""

    def call(hidden: Tensor, weight: Tensor, tokens: Tensor, **per_token: Tensor) -> Tensor:
        return loss(logprob(hidden, weight, tokens), **per_token)

    return call


def policy_step(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    chunks: int | None = None,
    **options: Any,
) -> Any:
    loss = functools.partial(policy_loss, normalizer=len(tokens))
    per_token = {"old_logprob": old_logprob, "advantages": advantages}
    options["chunk_tokens"] = chunk_tokens(tokens, chunks)
    return SPEC["linear_token_loss"].function(hidden, weight, tokens, loss, per_token, **options)


def chunk_tokens(tokens: Tensor, chunks: int | None) -> int | None:
    return None if chunks is None else -(-len(tokens) // chunks)


def sft_step(hidden: Tensor, weight: Tensor, tokens: Tensor, **options: Any) -> Any:
    def loss(logprob: Tensor, entropy: None) -> tuple[Tensor, None]:
        return -logprob.sum() / len(tokens), None

    return SPEC["linear_token_loss"].function(hidden, weight, tokens, loss, **options)


def logits_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).float(), tokens)


def torch_chunked(hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without: the formula with all logits
    function = torch.nn.functional.linear_cross_entropy
    return function(hidden, weight, tokens, reduction=reduction, options=options)


def liger(hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    return function(hidden, weight, tokens, reduction=reduction)


def liger_sm90(hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    """In CuTe: for tokens in multiples of 128 and vocabularies in multiples of 256."""
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as module

    function = module.liger_fused_linear_cross_entropy_sm90
    return function(hidden, weight, tokens, reduction=reduction)


def liger_scaled(
    hidden: Tensor, weight: Tensor, tokens: Tensor, return_entropy: bool = False
) -> Any:
    """Made for policy losses; in CuTe on compute capability 9.0, else a loop in PyTorch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return Scaled.apply(hidden, weight, tokens, return_entropy=return_entropy)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, tokens, reduction=reduction)


def quack(hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, tokens, reduction=reduction)


def minus(function: Function, **options: Any) -> Function:
    """Log-probabilities from a function that gives their negatives."""
    return lambda hidden, weight, tokens: -function(hidden, weight, tokens, **options)


def liger_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    loss, entropy = liger_scaled(hidden, weight, tokens, return_entropy=True)
    return -loss, entropy


TORCH_CHUNKED = ("torch.nn.modules.linear_cross_entropy",)  # torch 2.13
LIGER_CUTE = ("liger_kernel", "cutlass")
LOGPROB = {
    "torch linear_cross_entropy": Package(TORCH_CHUNKED, minus(torch_chunked, reduction="none")),
    "Liger": Package(("liger_kernel",), minus(liger, reduction="none")),
    "Liger scaled": Package(("liger_kernel",), minus(liger_scaled)),
    "CCE": Package(("cut_cross_entropy",), minus(cut_cross_entropy, reduction="none")),
}
MEAN = {
    name: Package(modules, functools.partial(function, reduction="mean"))
    for name, modules, function in (
        ("torch linear_cross_entropy", TORCH_CHUNKED, torch_chunked),
        ("Liger", ("liger_kernel",), liger),
        ("Liger sm90", LIGER_CUTE, liger_sm90),
        ("CCE", ("cut_cross_entropy",), cut_cross_entropy),
        ("QuACK", ("quack",), quack),
    )
}
POLICY = {
    name: Package(modules, loss_of(function, clipped_surrogate))
    for name, (modules, function) in LOGPROB.items()
}
LOGITS = {"logits": bench_linear_logprob.log_softmax_gather}


def bare_products(logits: int, gradients: bool) -> Callable[[Inputs], Function]:
    """The products of so many forwards, and of both gradients, of all tokens at once."""

    def prepare(x: Inputs) -> Function:
        z = x["hidden"].new_empty(len(x["hidden"]), len(x["weight"]))
        grad_hidden, grad_weight = (torch.empty_like(x[name]) for name in ("hidden", "weight"))

        def run(hidden: Tensor, weight: Tensor, **others: Tensor) -> None:
            for _ in range(logits):
                torch.mm(hidden, weight.t(), out=z)
            if gradients:
                torch.mm(z, weight, out=grad_hidden)
                torch.mm(z.t(), hidden, out=grad_weight)

        return run

    return prepare


def accumulator(chunks: int | None) -> Callable[[Inputs], int]:
    def count(x: Inputs) -> int:
        head = Head(x["weight"], None, None, 1.0, 1.0, 0.0, -100)
        size = tokens_of_chunk(x["hidden"], head, chunk_tokens(x["tokens"], chunks))
        return 4 * x["weight"].numel() if size < len(x["tokens"]) else 0

    return count


def by_target(inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """dW apart for the tokens that occur: the others, which have shares of p alone, are small."""
    grad_hidden, grad_weight = gradients
    occurs = torch.zeros(len(grad_weight), dtype=torch.bool, device=grad_weight.device)
    occurs[inputs["tokens"]] = True
    return [grad_hidden, grad_weight[occurs], grad_weight[~occurs]]


def forward_case(tokens: int, vocab: int, **changes: Any) -> Case:
    fields: dict[str, Any] = {
        "name": f"linear_logprob forward {tokens} x {vocab} bf16",
        "op": "linear_logprob",
        "mode": "forward",
        "inputs": head_inputs(tokens, vocab),
        "plain": LOGITS,
        "packages": LOGPROB,
        "least_bytes": SPEC["linear_logprob"].bytes_forward,
        "variants": {"triton fast": {"backend": "triton", "fast": True}},
        "reference": reference_logprob,
        "compiled": None if tokens == TOKENS else (),
        "bare": bare_products(1, False),
    }
    return Case(**{**fields, **changes})


def entropy_case(tokens: int, vocab: int) -> Case:
    return forward_case(
        tokens,
        vocab,
        name=f"linear_logprob forward with entropy {tokens} x {vocab} bf16",
        plain={"logits, entropy": bench_linear_logprob.with_entropy},
        packages={"Liger scaled": Package(("liger_kernel",), liger_entropy)},
        options={"with_entropy": True},
    )


def step_case(tokens: int, vocab: int, chunks: int | None = None, **changes: Any) -> Case:
    fields: dict[str, Any] = {
        "name": f"linear_token_loss policy step {tokens} x {vocab} bf16",
        "op": "linear_token_loss",
        "mode": "both",
        "inputs": policy_inputs(tokens, vocab),
        "plain": {"logits": loss_of(bench_linear_logprob.log_softmax_gather, clipped_surrogate)},
        "packages": POLICY,
        "least_bytes": SPEC["linear_token_loss"].bytes_backward,
        "leaves": ("hidden", "weight"),
        "ours": functools.partial(policy_step, chunks=chunks),
        "output": first,
        "reference": loss_of(reference_logprob, clipped_surrogate),
        "atol": 1e-4,  # a sum: the formula's error in bf16 may be small by luck
        "parts": by_target,
        "compiled": None if tokens == TOKENS else (),
        "bare": bare_products(1, True),
        "accumulator": accumulator(chunks),
    }
    return Case(**{**fields, **changes})


def small_case(tokens: int, vocab: int) -> Case:
    """The logits in 512 MiB, in chunks of equal size."""
    name = f"linear_token_loss step, 512 MiB {tokens} x {vocab} bf16"
    chunks = -(-tokens * vocab * 2 // 2**29)
    return step_case(tokens, vocab, chunks, name=name, plain={}, packages={})


def sft_case(tokens: int, vocab: int) -> Case:
    return step_case(
        tokens,
        vocab,
        name=f"linear_token_loss SFT step {tokens} x {vocab} bf16",
        inputs=head_inputs(tokens, vocab),
        plain={"logits, cross_entropy": logits_cross_entropy},
        packages=MEAN,
        ours=sft_step,
        reference=loss_of(reference_logprob, minus_mean),
    )


def two_pass_case(tokens: int, vocab: int) -> Case:
    """linear_logprob makes the logits again for the backward: four products."""
    return forward_case(
        tokens,
        vocab,
        name=f"linear_logprob forward + backward {tokens} x {vocab} bf16",
        mode="both",
        least_bytes=SPEC["linear_logprob"].bytes_backward,
        leaves=("hidden", "weight"),
        upstream="tokens",
        variants={},
        parts=by_target,
        bare=bare_products(2, True),
        accumulator=accumulator(None),
    )


def main_cases() -> list[Case]:
    """One of each operator."""
    return [step_case(TOKENS, VOCABULARIES[0]), forward_case(TOKENS, VOCABULARIES[0])]


def further_cases() -> list[Case]:
    """What else is asked of them at this size."""
    main, other = VOCABULARIES
    cases = [small_case(TOKENS, main), sft_case(TOKENS, main)]
    cases += [step_case(TOKENS, other), forward_case(TOKENS, other)]
    cases += [small_case(TOKENS, other), sft_case(TOKENS, other)]
    return [*cases, entropy_case(TOKENS, main), two_pass_case(TOKENS, main)]


def other_shapes() -> list[Case]:
    shapes = [(tokens, vocab) for tokens in OTHER_TOKENS for vocab in VOCABULARIES]
    return [make(*shape) for shape in shapes for make in (step_case, forward_case)]
