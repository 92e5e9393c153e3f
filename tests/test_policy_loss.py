"""policy_loss against numbers worked out by hand, and what it promises beyond the numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from rlhf_kernels import PolicyStats, kl_estimate, policy_loss
from rlhf_kernels.aggregation import AGGREGATIONS

LOG2 = math.log(2)


def row(*values: float, device: str = "cpu") -> Tensor:
    return torch.tensor([values], device=device)


def leaf(*values: float, device: str = "cpu") -> Tensor:
    return row(*values, device=device).requires_grad_()


def of_ratios(logprob: Tensor, *ratios: float) -> Tensor:
    """The old log-probabilities that give these ratios."""
    return logprob.detach() - torch.tensor([ratios], device=logprob.device).log()


def case(batch: int, length: int, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Random tensors with every term of the loss switched on."""
    g = torch.Generator().manual_seed(seed)
    logprob, a, b, advantages = torch.randn(4, batch, length, generator=g)
    return {
        "logprob": logprob.to(device),
        "old_logprob": (logprob + 0.2 * a).to(device),
        "advantages": advantages.to(device),
        "mask": (torch.rand(batch, length, generator=g) < 0.7).to(device),
        "importance_weight": (2 * torch.rand(batch, length, generator=g)).to(device),
        "ref_logprob": (logprob + 0.3 * b).to(device),
        "entropy": (3 * torch.rand(batch, length, generator=g)).to(device),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }


def grads(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, PolicyStats, Tensor, Tensor]:
    logprob = inputs["logprob"].clone().requires_grad_()
    entropy = inputs["entropy"].clone().requires_grad_()
    loss, stats = policy_loss(**{**inputs, "logprob": logprob, "entropy": entropy}, **options)
    loss.backward()
    return loss.detach(), stats, logprob.grad, entropy.grad


def test_ppo_by_hand(device, backend):
    # A     1     -1    1    -1    2     -2
    # r     1.5   1.5   0.5  0.5   1.1   1.1
    # loss  -1.2  1.5  -0.5  0.8  -2.2   2.2     clip 0.2 binds in the first and the fourth
    logprob = leaf(-1.0, -2.0, -0.5, -3.0, -0.1, -0.7, device=device)
    old = of_ratios(logprob, 1.5, 1.5, 0.5, 0.5, 1.1, 1.1)
    advantages = row(1.0, -1.0, 1.0, -1.0, 2.0, -2.0, device=device)
    loss, stats = policy_loss(logprob, old, advantages, backend=backend)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.6 / 6, abs=1e-6)
    loss.backward()
    expected = row(0.0, 1.5, -0.5, 0.0, -2.2, 2.2, device=device) / 6  # -A r, or 0 where clipped
    torch.testing.assert_close(logprob.grad, expected, rtol=1e-5, atol=1e-6)
    assert stats.token_count.item() == 6 and stats.clip_count.item() == 2
    assert stats.clip_frac.item() == pytest.approx(2 / 6)
    assert stats.ratio_mean.item() == pytest.approx(6.2 / 6, rel=1e-6)
    assert stats.ratio_max.item() == pytest.approx(1.5, rel=1e-6)
    # mean of r - 1 - log r
    assert stats.approx_kl.item() == pytest.approx((0.2 - 2 * math.log(0.825)) / 6, rel=1e-5)


def test_clip_higher_and_dual_clip_by_hand(device, backend):
    # A    1      -1   -1   -1    1
    # r    1.25   4    2    0.5   4     low 0.2, high 0.28, c = 3
    # loss -1.25  3    2    0.8  -1.28
    logprob = leaf(-1.0, -2.0, -0.5, -3.0, -0.1, device=device)
    old = of_ratios(logprob, 1.25, 4.0, 2.0, 0.5, 4.0)
    advantages = row(1.0, -1.0, -1.0, -1.0, 1.0, device=device)
    loss, stats = policy_loss(
        logprob, old, advantages, clip_high=0.28, dual_clip=3.0, backend=backend
    )
    assert loss.item() == pytest.approx((-1.25 + 3 + 2 + 0.8 - 1.28) / 5, abs=1e-6)
    loss.backward()
    expected = row(-1.25, 0.0, 2.0, 0.0, 0.0, device=device) / 5
    torch.testing.assert_close(logprob.grad, expected, rtol=1e-5, atol=1e-6)
    assert stats.clip_count.item() == 2  # dual clip is not counted


def test_cispo_by_hand(device, backend):
    # -min(r, 1.2) A logprob; slope -min(r, 1.2) A
    logprob = leaf(-1.0, -2.0, -0.5, device=device)
    old = of_ratios(logprob, 1.5, 0.5, 1.1)
    advantages = row(1.0, -1.0, 2.0, device=device)
    options = {"objective": "cispo", "clip_low": None, "clip_high": 0.2, "backend": backend}
    loss, _ = policy_loss(logprob, old, advantages, **options)
    assert loss.item() == pytest.approx((1.2 * 1 - 0.5 * 2 + 1.1 * 2 * 0.5) / 3, abs=1e-6)
    loss.backward()
    expected = row(-1.2, 0.5, -2.2, device=device) / 3
    torch.testing.assert_close(logprob.grad, expected, rtol=1e-5, atol=1e-6)
    # with a lower bound 1 - 0.2 the second weight is 0.8
    loss, _ = policy_loss(logprob, old, advantages, **{**options, "clip_low": 0.2})
    assert loss.item() == pytest.approx((1.2 * 1 - 0.8 * 2 + 1.1 * 2 * 0.5) / 3, abs=1e-6)


def test_reinforce_by_hand(device, backend):
    logprob = leaf(-1.0, -2.0, -0.5, device=device)
    advantages = row(1.0, -1.0, 2.0, device=device)
    loss, stats = policy_loss(logprob, None, advantages, objective="reinforce", backend=backend)
    assert loss.item() == pytest.approx((1 - 2 + 1) / 3, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(logprob.grad, row(-1.0, 1.0, -2.0, device=device) / 3)
    found = (stats.ratio_mean, stats.ratio_max, stats.approx_kl, stats.clip_frac)
    assert [x.item() for x in found] == [1, 1, 0, 0]
    old = of_ratios(logprob, 1.5, 0.5, 1.1)  # for the statistics alone; nothing is clipped
    again, stats = policy_loss(logprob, old, advantages, objective="reinforce", backend=backend)
    assert again.item() == loss.item() and stats.clip_frac.item() == 0
    assert stats.ratio_max.item() == pytest.approx(1.5, rel=1e-6)


def test_sequence_ratio_by_hand(device, backend):
    # Log-ratios (log 4, 0): mean log 2, so both tokens have r = 2; A = -1: loss 2 each, mean 2.
    # Slope of each: mean over tokens of -A r = 2, times d mean / d logprob = 1/2.
    logprob = leaf(-1.0, 9.0, -2.0, device=device)
    old = of_ratios(logprob, 4.0, 100.0, 1.0)
    advantages = row(-1.0, 5.0, -1.0, device=device)
    mask = torch.tensor([[True, False, True]], device=device)
    options = {"ratio_level": "sequence", "backend": backend}
    loss, stats = policy_loss(logprob, old, advantages, mask, **options)
    assert loss.item() == pytest.approx(2.0, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(logprob.grad, row(1.0, 0.0, 1.0, device=device))
    assert stats.ratio_mean.item() == pytest.approx(2.0, rel=1e-6)
    # token by token: (4 - 1 - log 4, 0)
    assert stats.approx_kl.item() == pytest.approx((3 - 2 * LOG2) / 2, rel=1e-6)
    # bounded after the mean: exp(0.5), and no gradient
    logprob.grad = None
    loss, stats = policy_loss(logprob, old, advantages, mask, log_ratio_clamp=0.5, **options)
    assert loss.item() == pytest.approx(math.exp(0.5), rel=1e-6)
    loss.backward()
    assert not logprob.grad.any()


def test_log_ratio_clamp_by_hand(device, backend):
    # log r = (1, -1, 0.25) bounded to +-0.5; A = -1 and no clip: loss r
    logprob = leaf(-1.0, -2.0, -0.5, device=device)
    old = logprob.detach() - row(1.0, -1.0, 0.25, device=device)
    advantages = -torch.ones_like(old)
    options = {"clip_low": None, "log_ratio_clamp": 0.5, "backend": backend}
    loss, stats = policy_loss(logprob, old, advantages, **options)
    ratios = [math.exp(0.5), math.exp(-0.5), math.exp(0.25)]
    assert loss.item() == pytest.approx(sum(ratios) / 3, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(logprob.grad, row(0.0, 0.0, ratios[2] / 3, device=device))
    assert stats.ratio_max.item() == pytest.approx(ratios[0], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "values", "slopes"),
    [  # d = log 2 and -log 2: e^-d = 1/2 and 2
        ("k1", (LOG2, -LOG2), (1.0, 1.0)),
        ("k2", (LOG2**2 / 2, LOG2**2 / 2), (LOG2, -LOG2)),
        ("k3", (LOG2 - 0.5, 1 - LOG2), (0.5, -1.0)),
    ],
)
def test_terms_by_hand(device, backend, kind, values, slopes):
    # reinforce with A = (1, 2), weights (3, 0.5), plus 0.1 KL, minus 0.2 entropy
    logprob, entropy = leaf(-1.0, -2.0, device=device), leaf(1.5, 0.5, device=device)
    ref = logprob.detach() - row(LOG2, -LOG2, device=device)
    loss, _ = policy_loss(
        logprob,
        None,
        row(1.0, 2.0, device=device),
        objective="reinforce",
        importance_weight=row(3.0, 0.5, device=device),
        ref_logprob=ref,
        kl_coef=0.1,
        kl_kind=kind,
        entropy=entropy,
        entropy_coef=0.2,
        backend=backend,
    )
    expected = (3 * 1 + 0.5 * 4 + 0.1 * sum(values) - 0.2 * (1.5 + 0.5)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (3 * loss).backward()  # an upstream gradient of its own
    expected_grad = row(-3 + 0.1 * slopes[0], -1 + 0.1 * slopes[1], device=device) * 1.5
    torch.testing.assert_close(logprob.grad, expected_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.grad, row(-0.3, -0.3, device=device))


# Token losses 1, 3 | 8 | nothing valid; T = 4. reinforce gives them with A = loss, logprob = -1.
SUMS = {
    "token-mean": 12 / 3,
    "token-sum": 12.0,
    "seq-mean-token-sum": (4 + 8) / 2,
    "seq-mean-token-mean": (2 + 8) / 2,
    "seq-mean-token-sum-norm": (4 + 8) / (2 * 4),
}


# What a token of the first and of the second sequence weighs: its gradient is -A times that.
WEIGHTS = {
    "token-mean": (1 / 3, 1 / 3),
    "token-sum": (1.0, 1.0),
    "seq-mean-token-sum": (1 / 2, 1 / 2),
    "seq-mean-token-mean": (1 / 4, 1 / 2),
    "seq-mean-token-sum-norm": (1 / 8, 1 / 8),
}


def padded_and_packed(device: str) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    padded = torch.tensor([[1.0, 3, 9, 9], [9, 8, 9, 9], [9, 9, 9, 9]], device=device)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], device=device)
    packed = torch.tensor([1.0, 3, 9, 8, 9], device=device)
    offsets = torch.tensor([0, 3, 4, 5], dtype=torch.int32, device=device)
    kept = torch.tensor([1.0, 1, 0, 1, 0], device=device)
    return [
        (padded, mask, {}),
        (packed, kept, {"cu_seqlens": offsets, "max_length": 4}),
    ]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand(device, backend, aggregation):
    options = {"objective": "reinforce", "aggregation": aggregation, "backend": backend}
    for losses, mask, layout in padded_and_packed(device):
        logprob = -torch.ones_like(losses)
        logprob.requires_grad_()
        entropy = torch.zeros_like(losses).requires_grad_()
        terms = {"entropy": entropy, "entropy_coef": 0.5}
        loss, _ = policy_loss(logprob, None, losses, mask, **options, **layout, **terms)
        assert loss.item() == pytest.approx(SUMS[aggregation], rel=1e-6)
        loss.backward()
        first, second = WEIGHTS[aggregation]
        weights = torch.tensor([first, first, second], device=device)
        valid = mask.bool()
        torch.testing.assert_close(logprob.grad[valid], -losses[valid] * weights)
        torch.testing.assert_close(entropy.grad[valid], -0.5 * weights)
        assert not logprob.grad[~valid].any() and not entropy.grad[~valid].any()
        logprob = logprob.detach()
        # A normaliser takes the place of the count of tokens or sequences.
        count = {"token-mean": 3, "token-sum": 1}.get(aggregation, 2)
        for normalizer in (5, torch.tensor([5], device=device), torch.tensor(5.0, device=device)):
            options_n = {**options, **layout, "normalizer": normalizer}
            loss, _ = policy_loss(logprob, None, losses, mask, **options_n)
            assert loss.item() == pytest.approx(SUMS[aggregation] * count / 5, rel=1e-6)
        logprob.requires_grad_()
        loss, _ = policy_loss(logprob, None, losses, mask, **options, **layout, normalizer=0)
        loss.backward()
        assert loss.item() == 0 and not logprob.grad.any()
    if aggregation == "seq-mean-token-sum-norm":
        losses, mask, _ = padded_and_packed(device)[0]
        loss, _ = policy_loss(-torch.ones_like(losses), None, losses, mask, **options, max_length=6)
        assert loss.item() == pytest.approx(12 / (2 * 6), rel=1e-6)


def test_packed_tokens_need_no_offsets_for_token_sums(device, backend):
    losses = torch.arange(1.0, 6.0, device=device)
    loss, _ = policy_loss(
        -torch.ones_like(losses), None, losses, objective="reinforce", backend=backend
    )
    assert loss.item() == pytest.approx(3.0)


def test_gradient_on_a_bound_is_the_unclipped_one(device, backend):
    """Bounds of 0: r = 1 stands on both, at every token of a first step."""
    logprob = leaf(-1.0, -2.0, -3.0, device=device)
    advantages = row(1.0, -2.0, 0.5, device=device)
    loss, stats = policy_loss(logprob, logprob.detach(), advantages, clip_low=0.0, backend=backend)
    loss.backward()
    torch.testing.assert_close(logprob.grad, -advantages / 3, rtol=1e-6, atol=0)
    assert stats.clip_count.item() == 0 and stats.ratio_max.item() == 1
    assert stats.kl_sum.item() == 0


def test_without_bounds_nothing_is_clipped(device, backend):
    logprob = leaf(-1.0, -2.0, device=device)
    old = of_ratios(logprob, 3.0, 0.25)
    loss, stats = policy_loss(
        logprob, old, row(1.0, -1.0, device=device), clip_low=None, backend=backend
    )
    assert loss.item() == pytest.approx((-3 + 0.25) / 2, rel=1e-6)
    assert stats.clip_count.item() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(device, backend, dtype):
    inputs = case(3, 40, device=device)
    expected = grads(inputs, backend=backend)
    got = grads({**inputs, "mask": inputs["mask"].to(dtype) * 2}, backend=backend)
    for a, b in zip(expected, got, strict=True):
        assert (
            all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            if a is expected[1]
            else (torch.equal(a, b))
        )


def test_constants_get_no_gradient(device, backend):
    inputs = case(2, 8, device=device)
    inputs["normalizer"] = torch.tensor(3.0, device=device)
    constants = ("old_logprob", "advantages", "ref_logprob", "importance_weight", "normalizer")
    for name in constants:
        inputs[name] = inputs[name].clone().requires_grad_()
    inputs["logprob"].requires_grad_()
    loss, stats = policy_loss(**inputs, backend=backend)
    loss.backward()
    assert all(inputs[name].grad is None for name in constants)
    assert not any(x.requires_grad for x in stats)


def test_kl_term_is_kl_estimate(device, backend):
    inputs = case(3, 50, device=device)
    logprob, ref = inputs["logprob"], inputs["ref_logprob"]
    for kind in ("k1", "k2", "k3"):
        loss, _ = policy_loss(
            logprob,
            None,
            torch.zeros_like(logprob),
            objective="reinforce",
            ref_logprob=ref,
            kl_coef=1.0,
            kl_kind=kind,
            backend=backend,
        )
        expected = kl_estimate(logprob, ref, kind=kind, backend=backend).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_stats_of_parts_add_up(device, backend, level):
    inputs = case(6, 700, device=device)
    options = {"ratio_level": level, "clip_low": 0.005, "backend": backend}
    _, whole, *_ = grads(inputs, **options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        parts.append(grads(part, **options)[1])
    total = parts[0] + parts[1] + parts[2]
    assert isinstance(total, PolicyStats)
    for name, a, b in zip(PolicyStats._fields, total, whole, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-9), name
    for name in ("clip_frac", "approx_kl", "ratio_mean", "ratio_max"):
        assert getattr(total, name).item() == pytest.approx(getattr(whole, name).item(), rel=1e-9)
    assert 0 < whole.clip_frac.item() < 1 and whole.ratio_max.item() > whole.ratio_mean.item()


@pytest.mark.parametrize("objective", ["ppo", "cispo", "reinforce"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_of_a_row_has_the_same_bits_in_any_batch(device, backend, objective, level):
    if backend == "reference":
        pytest.skip("promised for compiled backends")
    options = {
        "objective": objective,
        "ratio_level": level,
        "aggregation": "seq-mean-token-mean",
        "normalizer": 7,
        "backend": backend,
    }
    # 1037 tokens: two blocks, the last with a rest, and rows that start at odd addresses
    inputs = case(5, 1037, device=device)
    _, _, grad, grad_entropy = grads(inputs, **options)
    for i in range(5):
        alone = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        _, _, one, one_entropy = grads(alone, **options)
        assert torch.equal(one[0], grad[i]) and torch.equal(one_entropy[0], grad_entropy[i])
    packed = {k: v.flatten() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    offsets = torch.arange(6, device=device) * 1037
    _, _, flat, _ = grads(packed, **options, cu_seqlens=offsets)
    assert torch.equal(flat.view(5, 1037), grad)


def test_no_grad_gives_the_same_loss(device, backend):
    inputs = case(4, 600, device=device)
    loss, stats, *_ = grads(inputs, backend=backend)
    again, again_stats = policy_loss(**inputs, backend=backend)
    assert not again.requires_grad and torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(stats, again_stats, strict=True))


def test_coefficients_do_not_recompile(device, backend):
    """An adaptive KL coefficient or a count of tokens changes in each step."""
    count = CompileCounter()

    @torch.compile(backend=count, fullgraph=True)
    def step(inputs, kl_coef, normalizer):
        return policy_loss(**inputs, kl_coef=kl_coef, normalizer=normalizer, backend=backend)[0]

    torch._dynamo.reset()
    inputs = case(2, 8, device=device)
    del inputs["kl_coef"]
    for i in range(6):
        step(inputs, 0.1 + 0.01 * i, 10.0 + i)
    # one for the first values, and one when they are seen to change
    assert count.frame_count <= 2
    torch._dynamo.reset()


ok = torch.zeros(2, 3)
flat = torch.zeros(6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprob": ok.long()}, TypeError, "logprob: expected bfloat16, .* got torch.int64"),
        ({"logprob": torch.zeros(1, 2, 3)}, ValueError, r"\(1, 2, 3\)"),
        ({"old_logprob": None}, ValueError, "old_logprob: expected a tensor with objective='ppo'"),
        ({"old_logprob": ok.T}, ValueError, r"old_logprob: expected shape \(2, 3\) to match"),
        ({"advantages": None}, TypeError, "advantages: expected a tensor, got NoneType"),
        ({"advantages": ok[:, :1]}, ValueError, r"advantages: .* got \(2, 1\)"),
        ({"mask": ok[0]}, ValueError, r"mask: expected shape \(2, 3\) to match logprob"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected a finite number >= 0, got -0.1"),
        ({"clip_high": math.inf}, ValueError, "clip_high: expected a finite number"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a finite number > 1, got 1"),
        ({"log_ratio_clamp": 0}, ValueError, "log_ratio_clamp: expected a finite number > 0"),
        ({"objective": "grpo"}, ValueError, "objective: expected one of ppo, cispo, reinforce"),
        ({"ratio_level": "row"}, ValueError, "ratio_level: expected one of token, sequence"),
        ({"kl_kind": "k4"}, ValueError, "kl_kind: expected one of k1, k2, k3, got 'k4'"),
        ({"aggregation": "mean"}, ValueError, "aggregation: expected one of token-mean"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprob: expected a tensor with kl_coef=0.1, got None"),
        ({"entropy_coef": 1}, ValueError, "entropy: expected a tensor with entropy_coef=1"),
        ({"kl_coef": "0.1"}, TypeError, "kl_coef: expected a number, got str"),
        ({"importance_weight": flat}, ValueError, r"importance_weight: .* got \(6,\)"),
        ({"normalizer": -1}, ValueError, "normalizer: expected a finite number >= 0, got -1"),
        ({"normalizer": flat}, ValueError, r"normalizer: .* one element, got shape \(6,\)"),
        ({"max_length": 0}, ValueError, "max_length: expected a finite number >= 1, got 0"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens: expected None with"),
        ({"backend": "cuda"}, (ValueError, RuntimeError), "backend: 'cuda'"),
    ],
)
def test_argument_errors(changes, error, message):
    inputs = {"logprob": ok, "old_logprob": ok, "advantages": ok, **changes}
    with pytest.raises(error, match=message):
        policy_loss(**inputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ratio_level": "sequence"}, ValueError, "packed logprob with ratio_level='sequence'"),
        (
            {"aggregation": "seq-mean-token-sum"},
            ValueError,
            "cu_seqlens: expected offsets .* aggregation='seq-mean-token-sum', got None",
        ),
        (
            {"aggregation": "seq-mean-token-sum-norm", "cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "max_length: expected a number for packed logprob, got None",
        ),
        ({"cu_seqlens": torch.tensor([0.0, 6])}, TypeError, "cu_seqlens: expected int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"end at 6, got \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, r"start at 0, .* got \[1, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "never fall"),
    ],
)
def test_argument_errors_of_packed_tokens(backend, changes, error, message):
    inputs = {"logprob": flat, "old_logprob": flat, "advantages": flat, **changes}
    with pytest.raises(error, match=message):
        policy_loss(**inputs, backend=backend)


def test_policy_loss_statistics_of_infinite_and_nan_ratios(backend, device):
    """A sequence's infinite ratio beside a block without a valid token, and a NaN."""
    logprob = torch.full((1, 1024), 1000.0, device=device)
    mask = torch.arange(1024, device=device)[None] < 512
    zeros = torch.zeros_like(logprob)
    _, stats = policy_loss(logprob, zeros, zeros - 1, mask, ratio_level="sequence", backend=backend)
    assert stats.ratio_mean.item() == stats.ratio_max.item() == math.inf
    bad = torch.tensor([[math.nan, 0.0]], device=device)
    _, stats = policy_loss(bad, zeros[:, :2], zeros[:, :2] + 1, backend=backend)
    assert math.isnan(stats.ratio_mean.item()) and math.isnan(stats.ratio_max.item())
