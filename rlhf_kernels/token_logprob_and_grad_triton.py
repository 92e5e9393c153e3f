"""token_logprob_and_grad in Triton: forward, the surrogate's slope, and backward.

Two reads and one write of the logits, as a row does not fit what one program can hold; a chunk that
the forward has just read may still be in the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import triton_common
from rlhf_kernels.kl_estimate_triton import exp
from rlhf_kernels.policy_loss_triton import PPO, policy_term
from rlhf_kernels.token_logprob_triton import (
    token_logprob_bwd,
    token_logprob_bwd_,
    token_logprob_fwd,
)
from rlhf_kernels.triton_common import number

BLOCK = 1024  # rows of a program


@triton.jit(do_not_specialize=["rows", "vocab", "ignore_index", "low", "high", "dual"])
def surrogate_kernel(
    logprob,
    tokens,
    weight,  # None: 1
    old_logprob,
    advantages,
    coefficient,
    rows: tl.int64,
    vocab: tl.int64,
    ignore_index: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual: tl.float64,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The upstream gradient of each row from its log-probability; 0 where none is scored."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row, mask=row < rows, other=-1)
    scored = (token != ignore_index) & (token >= 0) & (token < vocab)
    new = tl.load(logprob + row, mask=scored, other=0.0)
    old = tl.load(old_logprob + row, mask=scored, other=0.0)
    advantage = tl.load(advantages + row, mask=scored, other=0.0)
    ratio = exp(new - old, TYPE)
    bounds = (number(low, TYPE), number(high, TYPE), number(dual, TYPE))
    _, slope = policy_term(advantage, ratio, new, bounds[0], bounds[1], bounds[2], PPO)
    if weight is not None:
        factor = tl.load(weight + row, mask=scored, other=0.0)
        slope = tl.where(factor == 0.0, 0.0, factor * slope)  # a choice: no 0 * inf
    tl.store(coefficient + row, tl.where(scored, slope, 0.0), mask=row < rows)


def token_logprob_and_grad(
    logits: Tensor, *arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results, coefficient, saved = _forward(logits, *arguments)
    return *results, token_logprob_bwd(coefficient, None, logits, *saved)


def token_logprob_and_grad_(logits: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results, coefficient, saved = _forward(logits, *arguments)
    token_logprob_bwd_(coefficient, None, logits, *saved)
    return results


def _forward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int,
    weight: Tensor | None,
    old_logprob: Tensor | None,
    advantages: Tensor | None,
    low: float,
    high: float,
    dual: float,
    with_entropy: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, tuple]:
    """The results, the gradient of each log-probability, and what the backward takes after it."""
    tokens = tokens.contiguous()
    scaling = (temperature, temperature_value, ignore_index)
    results = token_logprob_fwd(logits, tokens, *scaling, with_entropy)
    logprob, entropy, row_max, log_sum = results
    dtype = logprob.dtype
    weight = triton_common.dense(weight, dtype)
    if advantages is None:
        coefficient = torch.ones_like(logprob) if weight is None else weight
    else:
        coefficient = torch.empty_like(logprob)
        triton_common.launch(
            surrogate_kernel,
            triton.cdiv(logprob.numel(), BLOCK),
            *(logprob, tokens, weight),
            *(triton_common.dense(x, dtype) for x in (old_logprob, advantages)),
            *(coefficient, logprob.numel(), logits.shape[-1], ignore_index, low, high, dual),
            TYPE=triton_common.TYPES[dtype],
            BLOCK=BLOCK,
        )
    return results, coefficient, (tokens, *scaling, entropy, row_max, log_sum)
