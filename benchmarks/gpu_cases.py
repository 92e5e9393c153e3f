"""What gpu_gate.py times: every operator at the sizes that matter, and the formulas of trainers.

Every operator once, then their other modes and shapes, the most important first: what does not fit
into the time budget is the end of the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

import bench_gae
import bench_kl_estimate
import bench_kl_shaped_rewards
import bench_logprob_kl
import bench_masked_mean
import bench_masked_whiten
import bench_pairwise_reward_loss
import bench_policy_loss
import bench_ranking_reward_loss
import bench_token_logprob
import bench_value_loss
import gpu_linear_cases
from gpu_case import SPEC, Case, Draw, Function, first
from rlhf_kernels import ClippedSurrogate
from rlhf_kernels.opspec import Inputs, total_bytes

MAIN = (151936, torch.bfloat16)


def logits_inputs(rows: int, vocab: int, dtype: torch.dtype, *names: str) -> Function:
    def make(draw: Draw) -> Inputs:
        n, v = draw.size(rows), draw.size(vocab)
        logits = {name: draw.normal(n, v, scale=2.0, dtype=dtype) for name in names}
        return {**logits, "tokens": draw.integers(v, n)}

    return make


def token_logprob_cases(rows: int, vocab: int, dtype: torch.dtype, name: str) -> dict[str, Case]:
    spec, peers = SPEC["token_logprob"], bench_token_logprob.PEERS
    if (vocab, dtype) != MAIN:  # compilations are what takes the time: the faster one alone
        peers = {"gather - logsumexp": bench_token_logprob.gather_logsumexp}
    forward, backward = spec.bytes_forward, spec.bytes_backward
    common: dict[str, Any] = {
        "op": "token_logprob",
        "inputs": logits_inputs(rows, vocab, dtype, "logits"),
        "sampled": True,
    }
    gradient = {"leaves": ("logits",), "upstream": "tokens", "plain": peers, **common}
    shape = f"{rows} x {vocab} {name}"

    def backward_alone(x: Inputs) -> int:
        return backward(x) - forward(x)

    return {
        "forward": Case(
            name=f"token_logprob forward {shape}",
            mode="forward",
            plain=peers,
            least_bytes=forward,
            **common,
        ),
        "entropy": Case(
            name=f"token_logprob forward with entropy {shape}",
            mode="forward",
            plain={"log_softmax, entropy": bench_token_logprob.with_entropy},
            least_bytes=forward,
            options={"with_entropy": True},
            **common,
        ),
        "backward": Case(
            name=f"token_logprob backward {shape}",
            mode="backward",
            least_bytes=backward_alone,
            **gradient,
        ),
        "inplace": Case(
            name=f"token_logprob in-place backward {shape}",
            mode="backward",
            least_bytes=backward_alone,
            options={"inplace_backward": True},
            **gradient,
        ),
        # Least bytes: one read and one write, what the one-read kernel needs.
        "both": Case(
            name=f"token_logprob forward + gradient {shape}",
            mode="both",
            least_bytes=lambda x: 2 * forward(x),
            one_call="token_logprob_and_grad",
            **gradient,
        ),
    }


def surrogate_gradient(
    logits: Tensor, tokens: Tensor, surrogate: ClippedSurrogate
) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradient of the sum of the clipped surrogate."""
    log_p = bench_token_logprob.log_softmax(logits, -1, dtype=torch.float32)
    index, advantages = tokens.unsqueeze(-1), surrogate.advantages
    logprob = log_p.gather(-1, index).squeeze(-1)
    ratio = (logprob - surrogate.old_logprob).exp()
    clipped = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    slope = torch.where(clipped, 0.0, -advantages * ratio).unsqueeze(-1)
    return logprob, (-slope * log_p.exp()).scatter_add(-1, index, slope).to(logits.dtype)


def surrogate_case(rows: int, vocab: int) -> Case:
    plain = logits_inputs(rows, vocab, torch.bfloat16, "logits")

    def make(draw: Draw) -> Inputs:
        inputs = plain(draw)
        logits, tokens = inputs["logits"], inputs["tokens"]
        # Of normal logits of deviation 2 the log-sum-exp is near log V + 2: ratios near 1.
        target = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
        noise, advantages = (draw.normal(len(tokens), scale=scale) for scale in (0.2, 1.0))
        old = target - math.log(logits.shape[-1]) - 2 + noise
        return {**inputs, "surrogate": ClippedSurrogate(old, advantages)}

    return Case(
        name=f"token_logprob_and_grad surrogate, in place {rows} x {vocab} bf16",
        op="token_logprob_and_grad",
        mode="forward",
        inputs=make,
        plain={"formula": surrogate_gradient},
        least_bytes=SPEC["token_logprob_and_grad"].bytes_forward,
        options={"inplace": True},
        output=lambda result: (result[0], result[-1]),
        sampled=True,
    )


def logprob_kl_cases(rows: int, vocab: int) -> Iterator[Case]:
    spec = SPEC["logprob_kl"]
    common: dict[str, Any] = {
        "op": "logprob_kl",
        "inputs": logits_inputs(rows, vocab, torch.bfloat16, "logits", "ref_logits"),
        "sampled": True,
    }
    yield Case(
        name=f"logprob_kl forward {rows} x {vocab} bf16",
        mode="forward",
        plain={"two log_softmax": bench_logprob_kl.plain},
        least_bytes=spec.bytes_forward,
        **common,
    )
    yield Case(
        name=f"logprob_kl backward {rows} x {vocab} bf16",
        mode="backward",
        plain={"two log_softmax": bench_logprob_kl.kl_only},
        least_bytes=lambda x: spec.bytes_backward(x) - spec.bytes_forward(x),
        leaves=("logits",),
        upstream="tokens",
        output=lambda result: getattr(result, "kl", result),
        **common,
    )


def deltas(rewards: Tensor, values: Tensor) -> Tensor:
    return rewards + torch.nn.functional.pad(values[:, 1:], (0, 1)) - values


def gae_scan(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """With PyTorch's prototype of a parallel scan; the time loop itself is too long to compile."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(a: Any, b: Any) -> Any:
        return a[0] * b[0], b[0] * a[1] + b[1]

    delta = deltas(rewards, values)
    mode = "pointwise" if rewards.is_cuda else "generic"
    decay = torch.full_like(delta, 0.95)
    scanned = associative_scan(combine, (decay, delta), 1, reverse=True, combine_mode=mode)
    return scanned[1], scanned[1] + values


def gae_matmul(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As a product with the triangle of the powers of lambda."""
    t = torch.arange(rewards.shape[1], device=rewards.device)
    later = t[:, None] - t
    powers = torch.where(later >= 0, 0.95 ** later.clamp(min=0).float(), 0.0)
    advantages = deltas(rewards, values) @ powers
    return advantages, advantages + values


def gae_case(rows: int, steps: int, mode: Literal["forward", "graph"]) -> Case:
    def make(draw: Draw) -> Inputs:
        shape = (draw.size(rows), draw.size(steps))
        return {"rewards": draw.normal(*shape), "values": draw.normal(*shape)}

    return Case(
        name=f"gae {mode} {rows} x {steps} fp32",
        op="gae",
        mode=mode,
        inputs=make,
        plain={"time loop": bench_gae.time_loop, "scan": gae_scan, "matmul": gae_matmul},
        least_bytes=SPEC["gae"].bytes_forward,  # 4 floats a step without a mask
        eager=mode == "forward",
        compiled=("scan", "matmul"),
    )


def token_loss_cases(rows: int, steps: int) -> Iterator[Case]:
    """policy_loss and value_loss: 25 bytes a token, the coefficient written and read in float32."""

    def policy(draw: Draw) -> Inputs:
        shape = (draw.size(rows), draw.size(steps))
        old = draw.normal(*shape)
        tensors = {"logprob": old + draw.normal(*shape, scale=0.1), "old_logprob": old}
        return {**tensors, "advantages": draw.normal(*shape), "mask": draw.mask(*shape)}

    def value(draw: Draw) -> Inputs:
        shape = (draw.size(rows), draw.size(steps))
        names = ("values", "old_values", "returns")
        return {**{name: draw.normal(*shape) for name in names}, "mask": draw.mask(*shape)}

    for op, make, leaf, plain in (
        ("policy_loss", policy, "logprob", bench_policy_loss.plain),
        ("value_loss", value, "values", bench_value_loss.plain),
    ):
        yield Case(
            name=f"{op} forward + backward {rows} x {steps} fp32",
            op=op,
            mode="both",
            inputs=make,
            plain={"formula": plain},
            least_bytes=SPEC[op].bytes_backward,
            leaves=(leaf,),
            output=first,
        )


def masked_cases(rows: int, steps: int) -> Iterator[Case]:
    def make(draw: Draw) -> Inputs:
        shape = (draw.size(rows), draw.size(steps))
        return {"x": 1 + draw.normal(*shape), "mask": draw.mask(*shape)}

    yield Case(
        name=f"masked_mean forward {rows} x {steps} fp32",
        op="masked_mean",
        mode="forward",
        inputs=make,
        plain={"formula": bench_masked_mean.plain},
        least_bytes=SPEC["masked_mean"].bytes_forward,
    )
    yield Case(
        name=f"masked_whiten forward {rows} x {steps} fp32",
        op="masked_whiten",
        mode="forward",
        inputs=make,
        plain={"formula": bench_masked_whiten.plain},
        # Too large to keep on the chip: read for the moments, read again, written. The operator's
        # record counts the inputs alone.
        least_bytes=lambda x: 2 * total_bytes(x) + 4 * x["x"].numel(),
    )


def small_cases(rows: int, steps: int) -> Iterator[Case]:
    """2^20 elements. The operators' records count the inputs alone, these the results as well."""

    def pair(draw: Draw, a: str, b: str) -> Inputs:
        shape = (draw.size(rows), draw.size(steps))
        return {a: draw.normal(*shape), b: draw.normal(*shape)}

    def shaped(draw: Draw) -> Inputs:
        tensors = pair(draw, "logprob", "ref_logprob")
        shape = tensors["logprob"].shape
        scores = draw.normal(shape[0])
        return {**tensors, "scores": scores, "mask": draw.mask(*shape), "kl_coef": 0.05}

    yield Case(
        name=f"kl_shaped_rewards forward {rows} x {steps} fp32",
        op="kl_shaped_rewards",
        mode="forward",
        inputs=shaped,
        plain={"formula": bench_kl_shaped_rewards.plain},
        least_bytes=lambda x: total_bytes(x) + 4 * x["logprob"].numel(),
    )
    yield Case(
        name=f"kl_estimate forward + backward {rows} x {steps} fp32",
        op="kl_estimate",
        mode="both",
        inputs=lambda draw: pair(draw, "logprob", "ref_logprob"),
        plain={"formula": bench_kl_estimate.plain},
        # forward: read two, write one; backward: read the upstream gradient and two, write two
        least_bytes=lambda x: 32 * x["logprob"].numel(),
        leaves=("logprob", "ref_logprob"),
        upstream="logprob",
    )
    yield Case(
        name=f"pairwise_reward_loss forward + backward {rows * steps} pairs fp32",
        op="pairwise_reward_loss",
        mode="both",
        inputs=lambda draw: {
            name: x.flatten() for name, x in pair(draw, "chosen", "rejected").items()
        },
        plain={"formula": bench_pairwise_reward_loss.plain},
        # forward: read two; backward: read two, write two (or keep the one coefficient of both)
        least_bytes=lambda x: 24 * x["chosen"].numel(),
        leaves=("chosen", "rejected"),
        output=first,
    )


def ranking_by_groups(scores: Tensor, ranks: Tensor, group_offsets: Tensor) -> Tensor:
    """The mean of the reference over parts of the prompts: it writes all scores x all scores."""
    prompts = group_offsets.shape[0] - 1
    size = scores.shape[0] // prompts
    step = max(1, 1024 // size)
    function, total = SPEC["ranking_reward_loss"].function, scores.new_zeros(())
    for begin in range(0, prompts, step):
        count = min(step, prompts - begin)
        part = slice(begin * size, (begin + count) * size)
        offsets = group_offsets[: count + 1]  # groups are of one size
        total = total + count * function(scores[part], ranks[part], offsets, backend="reference")[0]
    return total / prompts


def ranking_case(groups: int, completions: int) -> Case:
    def make(draw: Draw) -> Inputs:
        prompts, size = draw.size(groups), draw.size(completions)
        scores, ranks = draw.normal(prompts * size), draw.integers(size, prompts * size)
        offsets = torch.arange(prompts + 1, device=draw.device) * size
        return {"scores": scores, "ranks": ranks, "group_offsets": offsets}

    return Case(
        name=f"ranking_reward_loss forward + backward {groups} groups of {completions} fp32",
        op="ranking_reward_loss",
        mode="both",
        inputs=make,
        plain={"cube of pairs": bench_ranking_reward_loss.plain},
        # Read scores and ranks, write and read the coefficient, write the gradient; the arithmetic
        # of the pairs, not traffic, bounds it.
        least_bytes=lambda x: 24 * x["scores"].numel(),
        leaves=("scores",),
        output=first,
        reference=ranking_by_groups,
    )


def all_cases(dry: bool = False) -> list[Case]:
    main = token_logprob_cases(8192, *MAIN, "bf16")
    others = [
        token_logprob_cases(8192, 128256, torch.bfloat16, "bf16"),
        token_logprob_cases(16384, 50257, torch.bfloat16, "bf16"),  # odd: rows are not aligned
        token_logprob_cases(4096, 151936, torch.float32, "fp32"),
    ]
    others = others[-1:] if dry else others  # shapes alone make no difference there
    kl_forward, kl_backward = logprob_kl_cases(4096, 151936)
    cases = [main["forward"], *gpu_linear_cases.main_cases(), surrogate_case(8192, 151936)]
    cases += [gae_case(8192, 2048, "forward"), *token_loss_cases(8192, 2048), kl_forward]
    cases += [*masked_cases(8192, 2048), *small_cases(512, 2048), ranking_case(4096, 16)]
    cases += [main["both"], main["backward"], gae_case(512, 1024, "graph")]
    cases += gpu_linear_cases.further_cases()
    cases += [main["entropy"], main["inplace"], kl_backward]
    cases += [other[what] for what in ("forward", "backward") for other in others]
    cases += gpu_linear_cases.other_shapes()
    cases += [ranking_case(64, 1024), gae_case(512, 1024, "forward")]
    cases += [other[what] for what in ("both", "entropy", "inplace") for other in others]
    return cases
