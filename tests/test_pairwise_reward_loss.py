"""pairwise_reward_loss against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import RewardStats, pairwise_reward_loss

LOG3 = math.log(3)


@pytest.mark.parametrize(
    ("kwargs", "loss", "grad_chosen", "grad_rejected"),
    # chosen - rejected = log 3, so sigmoid is 3/4, and the slope of -log sigmoid is -1/4.
    [
        ({}, math.log(4 / 3), -0.25, 0.25),
        ({"margin": LOG3}, math.log(2), -0.5, 0.5),  # z = 0
        ({"margin": 2 * LOG3}, math.log(4), -0.75, 0.75),  # z = -log 3
        # -0.8 log 3/4 - 0.2 log 1/4; slope -0.8 / 4 + 0.2 * 3/4 = -0.05
        ({"label_smoothing": 0.2}, 0.8 * math.log(4 / 3) + 0.2 * math.log(4), -0.05, 0.05),
        # chosen + rejected = 3 log 3: 0.1 * 9 log^2 3, slope 0.2 * 3 log 3 for both
        (
            {"center_coef": 0.1},
            math.log(4 / 3) + 0.9 * LOG3**2,
            -0.25 + 0.6 * LOG3,
            0.25 + 0.6 * LOG3,
        ),
    ],
)
def test_pairwise_reward_loss_by_hand(device, backend, kwargs, loss, grad_chosen, grad_rejected):
    chosen = torch.tensor([2 * LOG3] * 3, device=device, requires_grad=True)
    rejected = torch.tensor([LOG3] * 3, device=device, requires_grad=True)
    got, stats = pairwise_reward_loss(chosen, rejected, **kwargs, backend=backend)
    assert got.item() == pytest.approx(loss, rel=1e-6)
    (grad, other) = torch.autograd.grad(6 * got, (chosen, rejected))  # a mean over 3, times 6
    assert grad.tolist() == pytest.approx([2 * grad_chosen] * 3, rel=1e-5)
    assert other.tolist() == pytest.approx([2 * grad_rejected] * 3, rel=1e-5)
    assert (stats.accuracy.item(), stats.pair_count.item()) == (1.0, 3.0)
    assert stats.margin.item() == pytest.approx(LOG3, rel=1e-6)


def test_pairwise_reward_loss_far_apart(device, backend):
    # -log sigmoid(z) is -z far below 0 and e^-z far above; log(1 + e^200) is inf in float32.
    chosen = torch.tensor([0.0, 200.0, 20.0], device=device, requires_grad=True)
    rejected = torch.tensor([200.0, 0.0, 0.0], device=device)
    loss, stats = pairwise_reward_loss(chosen, rejected, backend=backend)
    assert loss.item() == pytest.approx(200 / 3, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, chosen)
    assert (3 * grad).tolist() == pytest.approx([-1.0, 0.0, -math.exp(-20)], rel=1e-5, abs=1e-30)
    alone, _ = pairwise_reward_loss(chosen[2:], rejected[2:], backend=backend)
    assert alone.item() == pytest.approx(math.exp(-20), rel=1e-5)  # not 0
    assert stats.correct_count.item() == 2


def test_pairwise_reward_loss_margins(device, backend):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 4, 5, generator=generator).to(device)
    margin = torch.rand(4, 1, generator=generator).to(device).requires_grad_()
    chosen.requires_grad_()
    loss, stats = pairwise_reward_loss(chosen, rejected, margin=margin, backend=backend)
    shifted, _ = pairwise_reward_loss(chosen, rejected + margin.detach(), backend=backend)
    torch.testing.assert_close(loss, shifted, rtol=1e-6, atol=0)
    grad, none = torch.autograd.grad(loss, (chosen, margin), allow_unused=True)
    assert none is None and grad.isfinite().all()  # a constant, as documented
    right = (chosen > rejected).double().mean()  # the margin left out
    assert stats.accuracy.item() == pytest.approx(right.item(), abs=1e-12)


def test_pairwise_reward_loss_stats_add_up(device, backend):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 50, generator=generator).to(device)
    chosen[7] = rejected[7]  # a tie is not correct
    _, whole = pairwise_reward_loss(chosen, rejected, backend=backend)
    _, first = pairwise_reward_loss(chosen[:20], rejected[:20], backend=backend)
    _, second = pairwise_reward_loss(chosen[20:], rejected[20:], backend=backend)
    both = first + second
    assert isinstance(both, RewardStats)
    for a, b in zip(whole, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert whole.accuracy.item() == (chosen > rejected).sum().item() / 50
    expected = (chosen - rejected).double().mean()
    torch.testing.assert_close(whole.margin, expected, rtol=1e-6, atol=0)
    assert not any(x.requires_grad for x in whole)


def test_pairwise_reward_loss_without_pairs(device, backend):
    x = torch.zeros(0, device=device, requires_grad=True)
    loss, stats = pairwise_reward_loss(x, x, center_coef=1.0, backend=backend)
    assert (loss.item(), stats.accuracy.item(), stats.margin.item()) == (0.0, 0.0, 0.0)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.shape == (0,)


def test_pairwise_reward_loss_dtypes(device, backend):
    chosen = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, device=device, requires_grad=True)
    rejected = torch.zeros(2, dtype=torch.float16, device=device, requires_grad=True)
    loss, stats = pairwise_reward_loss(chosen, rejected, backend=backend)
    loss.backward()
    assert (loss.dtype, chosen.grad.dtype) == (torch.float32, torch.bfloat16)
    assert rejected.grad.dtype == torch.float16 and stats.pair_count.dtype == torch.float64
    assert (
        pairwise_reward_loss(chosen.double(), rejected, backend=backend)[0].dtype == torch.float64
    )


def test_pairwise_reward_loss_argument_errors(device, backend):
    x = torch.zeros(4, device=device)

    def raises(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            pairwise_reward_loss(*args, **kwargs, backend=backend)

    raises(ValueError, r"rejected: expected shape \(4,\) to match chosen, got \(3,\)", x, x[1:])
    raises(
        ValueError, r"margin: .* broadcastable to \(4,\) of chosen, got \(3,\)", x, x, margin=x[1:]
    )
    raises(TypeError, "margin: expected a number, got str", x, x, margin="1")
    raises(ValueError, "label_smoothing: expected a finite number >= 0", x, x, label_smoothing=2)
    raises(ValueError, "center_coef: expected a finite number >= 0, got -1", x, x, center_coef=-1)
