"""kl_shaped_rewards against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import kl_shaped_rewards

NAN = math.nan


def test_kl_shaped_rewards_by_hand(device, backend):
    # -0.1 (log p - log q) per token; the scores 3 and -2 on the last valid tokens 2 and 0.
    rewards = kl_shaped_rewards(
        torch.tensor([3.0, -2.0, 7.0], device=device),
        torch.tensor([[-1.0, -2.0, -3.0, NAN], [-1.0, -1.0, -1.0, -1.0], [NAN] * 4], device=device),
        torch.tensor([[-2.0, NAN, -1.0, -1.0], [-3.0, 9.0, 9.0, 9.0], [0.0] * 4], device=device),
        torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], device=device),
        kl_coef=0.1,
        backend=backend,
    )
    expected = [[-0.1, 0.0, 0.2 + 3.0, 0.0], [-0.2 - 2.0, 0.0, 0.0, 0.0], [0.0] * 4]
    torch.testing.assert_close(rewards, torch.tensor(expected, device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "kl"),  # d = log 2, -log 2
    [
        ("k1", (math.log(2), -math.log(2))),
        ("k2", (math.log(2) ** 2 / 2,) * 2),
        ("k3", (math.log(2) - 0.5, 1 - math.log(2))),
    ],
)
def test_kl_shaped_rewards_kinds_and_clip(device, backend, kind, kl):
    rewards = kl_shaped_rewards(
        torch.tensor([9.0, -9.0, 1.0], device=device),
        torch.tensor([[0.5, 0.25]] * 3, device=device).log(),
        torch.tensor([[0.25, 0.5]] * 3, device=device).log(),
        None,
        kl_coef=2.0,
        kl_kind=kind,
        clip_score=5.0,
        backend=backend,
    )
    first, second = -2 * kl[0], -2 * kl[1]
    expected = [[first, second + 5.0], [first, second - 5.0], [first, second + 1.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected, device=device), rtol=1e-6, atol=1e-6)


def test_kl_shaped_rewards_nan_scores(device, backend):
    # A NaN score shows up where it is used, and nowhere when the sequence has no valid token.
    x = torch.zeros(2, 3, device=device)
    mask = torch.tensor([[True, True, False], [False] * 3], device=device)
    scores = torch.full((2,), NAN, device=device)
    rewards = kl_shaped_rewards(scores, x, x, mask, kl_coef=1.0, clip_score=5.0, backend=backend)
    assert rewards.isnan().tolist() == [[False, True, False], [False] * 3]


def test_kl_shaped_rewards_packed_equals_padded(device, backend):
    lengths = [4, 0, 1, 37, 20]
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 37, generator=generator).to(device)
    scores = torch.randn(5, generator=generator).to(device)
    mask = (torch.rand(5, 37, generator=generator) < 0.6).to(device)
    inside = torch.arange(37, device=device) < torch.tensor(lengths, device=device)[:, None]
    offsets = torch.tensor([0, 4, 4, 5, 42, 62], dtype=torch.int32, device=device)
    kwargs = {"kl_coef": 0.3, "kl_kind": "k3", "backend": backend}
    padded = kl_shaped_rewards(scores, p, q, mask & inside, **kwargs)
    packed = kl_shaped_rewards(
        scores, p[inside], q[inside], mask[inside], cu_seqlens=offsets, **kwargs
    )
    torch.testing.assert_close(padded[inside], packed, rtol=1e-6, atol=1e-7)
    if backend != "reference":
        assert torch.equal(padded[inside], packed)
        alone = kl_shaped_rewards(scores[3:4], p[3:4], q[3:4], mask[3:4], **kwargs)
        assert torch.equal(alone, padded[3:4])


def test_kl_shaped_rewards_returns_constants(device, backend):
    x = torch.zeros(2, 3, device=device, requires_grad=True)
    scores = torch.ones(2, device=device, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    rewards = kl_shaped_rewards(scores, x, x, mask, kl_coef=1.0, backend=backend)
    assert not rewards.requires_grad
    half = [t.detach().bfloat16() for t in (scores, x, x)]
    assert kl_shaped_rewards(*half, mask, kl_coef=1.0, backend=backend).dtype == torch.float32
    half[0] = scores.detach().double()
    assert kl_shaped_rewards(*half, mask, kl_coef=1.0, backend=backend).dtype == torch.float64


def test_kl_shaped_rewards_argument_errors(device, backend):
    x, scores = torch.zeros(2, 5, device=device), torch.zeros(2, device=device)

    def raises(error, match, *args, kl_coef=0.1, **kwargs):
        with pytest.raises(error, match=match):
            kl_shaped_rewards(*args, kl_coef=kl_coef, **kwargs, backend=backend)

    raises(ValueError, r"scores: expected shape \(2,\) for one score a sequence", x[0], x, x, None)
    raises(ValueError, r"ref_logprob: expected shape \(2, 5\)", scores, x, x[:1], None)
    raises(ValueError, r"mask: expected shape \(2, 5\)", scores, x, x, x[0])
    raises(ValueError, "kl_kind: expected one of", scores, x, x, None, kl_kind="k0")
    raises(ValueError, "clip_score: expected a finite number > 0", scores, x, x, None, clip_score=0)
    raises(TypeError, "kl_coef: expected a number, got NoneType", scores, x, x, None, kl_coef=None)
    if device == "cpu":  # looking at the offsets would make a GPU wait
        message, offsets = r"cu_seqlens: .* end at 5, got \[0, 3, 4\]", torch.tensor([0, 3, 4])
        raises(ValueError, message, scores, x[0], x[0], None, cu_seqlens=offsets)
