"""Under torch.compile a number may take any value: a schedule compiles nothing anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rlhf_kernels as rk
from rlhf_kernels.backend import INTERPRETING, operators
from rlhf_kernels.opspec import outputs

VALUES = [0.2 + 0.01 * i for i in range(12)]  # more than torch.compile's limit of 8
Case = tuple[Callable[..., Any], dict[str, Any]]


def _rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _policy(**options: Any) -> Case:
    x = {name: _rows(i, 3, 9) for i, name in enumerate(("logprob", "old_logprob", "advantages"))}
    return rk.policy_loss, {**x, **options}


def _linear(op: Callable[..., Any] = rk.linear_logprob, **options: Any) -> Case:
    tokens = torch.tensor([3, 0, -100, 8, 2])
    return op, {"hidden": _rows(0, 5, 6), "weight": _rows(1, 9, 6), "tokens": tokens, **options}


def _one_read(logits: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, **x: Any) -> Any:
    bounds = {name: x.pop(name) for name in ("clip_low", "clip_high", "dual_clip") if name in x}
    surrogate = rk.ClippedSurrogate(old, advantages, **bounds)
    return rk.token_logprob_and_grad(logits, tokens, surrogate=surrogate, **x)


def _token_logprob_and_grad() -> Case:
    inputs = {"logits": _rows(0, 4, 7), "tokens": torch.tensor([1, 2, 0, 6])}
    return _one_read, {**inputs, "old": -_rows(1, 4).abs(), "advantages": _rows(2, 4)}


def _rewards(**options: Any) -> Case:
    x = {"scores": _rows(0, 3), "logprob": _rows(1, 3, 5), "ref_logprob": _rows(2, 3, 5)}
    return rk.kl_shaped_rewards, {**x, "mask": None, "kl_coef": 0.1, **options}


def _three(op: Callable[..., Any], *names: str, **options: Any) -> Case:
    return op, {**{name: _rows(i, 3, 9) for i, name in enumerate(names)}, **options}


def _ranking() -> Case:
    groups = {"ranks": _rows(1, 9), "group_offsets": torch.tensor([0, 4, 9])}
    return rk.ranking_reward_loss, {"scores": _rows(0, 9), **groups}


_VALUES = ("values", "old_values", "returns")
_PAIR = ("chosen", "rejected")
_LOGPROBS = ("logprob", "ref_logprob")
# name of the number -> the other arguments, and what is added to VALUES
CASES: dict[str, tuple[str, Case, float]] = {
    "policy clip_low": ("clip_low", _policy(), 0.0),
    "policy clip_high": ("clip_high", _policy(), 0.0),
    "policy clip_low, by sequence": ("clip_low", _policy(ratio_level="sequence"), 0.0),
    "policy clip_high, cispo": ("clip_high", _policy(objective="cispo", clip_low=None), 0.0),
    "policy dual_clip": ("dual_clip", _policy(), 1.0),
    "policy log_ratio_clamp": ("log_ratio_clamp", _policy(), 0.0),
    "policy kl_coef": ("kl_coef", _policy(ref_logprob=_rows(7, 3, 9)), 0.0),
    "policy entropy_coef": ("entropy_coef", _policy(entropy=_rows(7, 3, 9).abs()), 0.0),
    "policy normalizer": ("normalizer", _policy(), 5.0),
    "value clip": ("clip", _three(rk.value_loss, *_VALUES), 0.0),
    "value normalizer": ("normalizer", _three(rk.value_loss, *_VALUES), 5.0),
    "gae gamma": ("gamma", _three(rk.gae, "rewards", "values"), 0.0),
    "gae lam": ("lam", _three(rk.gae, "rewards", "values"), 0.0),
    "rewards kl_coef": ("kl_coef", _rewards(), 0.0),
    "rewards clip_score": ("clip_score", _rewards(), 0.0),
    "kl clamp": ("clamp", _three(rk.kl_estimate, *_LOGPROBS), 0.0),
    "kl clamp, k2": ("clamp", _three(rk.kl_estimate, *_LOGPROBS, kind="k2"), 0.0),
    "whiten eps": ("eps", _three(rk.masked_whiten, "x", mask=torch.ones(3, 9)), 0.0),
    "pairwise margin": ("margin", _three(rk.pairwise_reward_loss, *_PAIR), 0.0),
    "pairwise center_coef": ("center_coef", _three(rk.pairwise_reward_loss, *_PAIR), 0.0),
    "pairwise label_smoothing": ("label_smoothing", _three(rk.pairwise_reward_loss, *_PAIR), 0.0),
    "ranking center_coef": ("center_coef", _ranking(), 0.0),
    "logprob temperature": (
        "temperature",
        (rk.token_logprob, {"logits": _rows(0, 4, 7), "tokens": torch.tensor([1, 2, -100, 6])}),
        0.0,
    ),
    "logprob_kl temperature": (
        "temperature",
        (
            rk.logprob_kl,
            {
                "logits": _rows(0, 3, 7),
                "ref_logits": _rows(1, 3, 7),
                "tokens": torch.tensor([1, 2, 6]),
            },
        ),
        0.0,
    ),
    "one read clip_low": ("clip_low", _token_logprob_and_grad(), 0.0),
    "one read clip_high": ("clip_high", _token_logprob_and_grad(), 0.0),
    "one read dual_clip": ("dual_clip", _token_logprob_and_grad(), 1.0),
    "one read temperature": ("temperature", _token_logprob_and_grad(), 0.0),
    "linear temperature": ("temperature", _linear(), 0.0),
    "linear logit_scale": ("logit_scale", _linear(), 0.0),
    "linear softcap": ("softcap", _linear(with_entropy=True), 2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_compiles_nothing_anew(device, backend, case):
    """One graph for the first value and one for all others, with the eager results and bits."""
    name, (op, inputs), offset = CASES[case]
    inputs = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    first = next(iter(inputs))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(leaf: Tensor, number: float) -> Any:
        return op(**{**inputs, first: leaf, name: number}, backend=backend)

    for value in VALUES:
        value += offset
        leaf, other = (inputs[first].detach().clone().requires_grad_() for _ in range(2))
        got = outputs(step(leaf, value))
        expected = outputs(op(**{**inputs, first: other, name: value}, backend=backend))
        compared = list(zip(got, expected, strict=True))
        if expected[0].requires_grad:
            got[0].sum().backward()
            expected[0].sum().backward()
            compared.append((leaf.grad, other.grad))
        for a, b in compared:
            if backend == "reference" or op is rk.linear_logprob:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(a, b)
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times"
    torch._dynamo.reset()


def test_operators_with_numbers_in_a_tensor_pass_opcheck(device, backend):
    """And have the bits of the operators whose numbers are arguments."""
    if backend == "reference" or INTERPRETING:
        pytest.skip("the reference calls no operator; opcheck takes the interpreter minutes")
    values, old, returns = (_rows(i, 3, 9).to(device) for i in range(3))
    ops = operators[backend]
    arguments = (values, old, returns, None, None, 0, None)
    zeros = (*arguments, 0.0, 1, 0.0, True, torch.tensor([30.0, 0.1], dtype=torch.float64))
    torch.library.opcheck(ops.value_loss_fwd_of_numbers, zeros)
    got, expected = (
        ops.value_loss_fwd_of_numbers(*zeros),
        ops.value_loss_fwd(*arguments, 30.0, 1, 0.1, True),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
