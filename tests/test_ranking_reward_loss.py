"""ranking_reward_loss against numbers worked out by hand, and against a loop over the pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_kernels import pairwise_reward_loss, ranking_reward_loss

LOG2 = math.log(2)


def loss_of(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def loop(scores, ranks, offsets) -> tuple[float, list[float], int, int, float]:
    """Loss, gradient, pairs, pairs in the right order and margin, pair by pair in Python."""
    losses, correct, margin, count = [], 0, 0.0, 0
    grads = [0.0] * len(scores)
    for start, stop in itertools.pairwise(offsets):
        inside = range(start, stop)
        pairs = [(i, j) for i in inside for j in inside if ranks[i] < ranks[j]]
        if not pairs:
            continue
        losses.append(sum(loss_of(scores[i] - scores[j]) for i, j in pairs) / len(pairs))
        for i, j in pairs:
            slope = -1 / (1 + math.exp(scores[i] - scores[j])) / len(pairs)
            grads[i], grads[j] = grads[i] + slope, grads[j] - slope
            correct += scores[i] > scores[j]
            margin += scores[i] - scores[j]
        count += len(pairs)
    prompts = max(len(losses), 1)
    return sum(losses) / prompts, [g / prompts for g in grads], count, correct, margin


def test_ranking_reward_loss_by_hand(device, backend):
    # First prompt: ranks 2, 1, 1, the two first ones tied: the pairs (1, 0) and (2, 0) with
    # differences -log 2 and 0: -log sigmoid is log 3 and log 2, the slopes -2/3 and -1/2.
    # Second prompt: one completion, no pair. Third: ranks 0, 5: one pair with difference log 2:
    # log 3/2, slope -1/3. Mean over the two prompts that have pairs.
    scores = torch.tensor([LOG2, 0.0, LOG2, 9.0, LOG2, 0.0], device=device, requires_grad=True)
    ranks = torch.tensor([2, 1, 1, 0, 0, 5], device=device)
    offsets = torch.tensor([0, 3, 4, 6], dtype=torch.int32, device=device)
    loss, stats = ranking_reward_loss(scores, ranks, offsets, backend=backend)
    expected = ((math.log(3) + LOG2) / 2 + math.log(3 / 2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(2 * loss, scores)
    expected = [7 / 12, -1 / 3, -1 / 4, 0.0, -1 / 3, 1 / 3]
    assert grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert [x.item() for x in stats[:2]] == [3.0, 1.0]  # a score difference of 0 is not correct
    assert stats.margin_sum.item() == pytest.approx(0.0, abs=1e-6)
    loss, _ = ranking_reward_loss(scores, ranks, offsets, center_coef=6.0, backend=backend)
    expected = ((math.log(3) + LOG2) / 2 + math.log(3 / 2)) / 2 + 3 * LOG2**2 + 81
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # mean(s^2) = (3 log^2 2 + 81) / 6


@pytest.mark.parametrize(
    ("sizes", "levels"),
    [
        ((2,), 9),
        ((1, 4, 0, 9, 2, 7, 1), 4),  # InstructGPT's 4..9, with single and empty ones
        ((17, 16, 15, 33), 100),  # around one and two vectors
        ((40,), 1),  # all tied
        ((200, 3), 1000),
    ],
)
def test_ranking_reward_loss_agrees_with_a_loop(device, backend, sizes, levels):
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = torch.randn(sum(sizes), generator=generator).to(device).requires_grad_()
    ranks = torch.randint(levels, (sum(sizes),), generator=generator).to(device)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], device=device)
    loss, stats = ranking_reward_loss(scores, ranks, offsets, backend=backend)
    expected, grads, pairs, correct, margin = loop(
        scores.tolist(), ranks.tolist(), offsets.tolist()
    )
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    (grad,) = torch.autograd.grad(loss, scores)
    expected = torch.tensor(grads, device=device)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=2e-7)
    assert (stats.pair_count.item(), stats.correct_count.item()) == (pairs, correct)
    assert stats.margin_sum.item() == pytest.approx(margin, rel=1e-5, abs=1e-4)


def test_ranking_reward_loss_1024_completions(device, backend):
    # Every pair has the difference 0: log 2 each, and a slope of -1/2 towards each worse one.
    size = 1024
    scores = torch.zeros(size, device=device, requires_grad=True)
    ranks = torch.arange(size, device=device).flip(0)
    offsets = torch.tensor([0, size], device=device)
    loss, stats = ranking_reward_loss(scores, ranks, offsets, backend=backend)
    assert loss.item() == pytest.approx(LOG2, rel=1e-6)
    assert stats.pair_count.item() == size * (size - 1) / 2
    (grad,) = torch.autograd.grad(loss, scores)
    worse = ranks.flip(0)  # completion i has i completions ranked below it
    expected = ((size - 1 - worse) - worse).double() / 2 / (size * (size - 1) / 2)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-9)


def test_ranking_reward_loss_of_pairs_is_the_pairwise_loss(device, backend):
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = torch.randn(2, 30, generator=generator).to(device)
    scores = torch.stack([rejected, chosen], 1).flatten()
    ranks = torch.tensor([2.5, -1.0], device=device).repeat(30)
    offsets = torch.arange(31, device=device) * 2
    loss, stats = ranking_reward_loss(scores, ranks, offsets, backend=backend)
    expected, expected_stats = pairwise_reward_loss(chosen, rejected, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_ranking_reward_loss_unranked_completions(device, backend):
    """A rank of NaN leaves the completion out, whatever its score; centering over the other two."""
    scores = torch.tensor([0.0, math.nan, LOG2, 5.0], device=device, requires_grad=True)
    ranks = torch.tensor([1.0, math.nan, 0.0, math.nan], device=device)
    offsets = torch.tensor([0, 4], device=device)
    loss, stats = ranking_reward_loss(scores, ranks, offsets, center_coef=4.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(3 / 2) + 2 * LOG2**2, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, scores)
    assert grad.tolist() == pytest.approx([1 / 3, 0.0, -1 / 3 + 4 * LOG2, 0.0], rel=1e-6)
    assert stats.pair_count.item() == 1


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [0, 1, 2, 3]])
def test_ranking_reward_loss_without_pairs(device, backend, offsets):
    scores = torch.ones(offsets[-1], device=device, requires_grad=True)
    ranks = torch.arange(offsets[-1], device=device)
    at = torch.tensor(offsets, device=device)
    loss, stats = ranking_reward_loss(scores, ranks, at, backend=backend)
    assert (loss.item(), stats.accuracy.item(), stats.margin.item()) == (0.0, 0.0, 0.0)
    (grad,) = torch.autograd.grad(loss, scores)
    assert (grad == 0).all()


def test_ranking_reward_loss_prompt_alone_equals_prompt_in_batch(device, backend):
    """Bit for bit: in a batch of four prompts the gradient is a quarter, which is exact."""
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 9, 40, 3]
    scores = torch.randn(57, generator=generator).to(device).requires_grad_()
    ranks = torch.rand(57, generator=generator).to(device)
    offsets = [0, *itertools.accumulate(sizes)]
    loss, _ = ranking_reward_loss(
        scores, ranks, torch.tensor(offsets, device=device), backend=backend
    )
    (grad,) = torch.autograd.grad(4 * loss, scores)
    for start, stop in itertools.pairwise(offsets):
        own = scores.detach()[start:stop].requires_grad_()
        at = torch.tensor([0, stop - start], device=device)
        alone, _ = ranking_reward_loss(own, ranks[start:stop], at, backend=backend)
        (expected,) = torch.autograd.grad(alone, own)
        if backend == "reference":
            torch.testing.assert_close(grad[start:stop], expected, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(grad[start:stop], expected)


def test_ranking_reward_loss_argument_errors(device, backend):
    x, offsets = torch.zeros(4, device=device), torch.tensor([0, 4], device=device)

    def raises(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            ranking_reward_loss(*args, **kwargs, backend=backend)

    raises(ValueError, r"scores: expected shape \(M,\), got \(2, 2\)", x.view(2, 2), x, offsets)
    raises(
        ValueError, r"ranks: expected shape \(4,\) to match scores, got \(3,\)", x, x[1:], offsets
    )
    raises(TypeError, "ranks: expected an integer or floating dtype", x, x.bool(), offsets)
    raises(TypeError, "group_offsets: expected int32 or int64, got torch.float32", x, x, x)
    wrong = torch.tensor([0, 3, 2, 4], device=device)
    if device == "cpu":
        raises(ValueError, r"group_offsets: .* end at 4, got \[0, 3, 2, 4\]", x, x, wrong)


@pytest.mark.parametrize(
    "ranks",
    [
        torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64),
        torch.tensor([2**24, 2**24 + 1, 2**24 + 2]),
        torch.tensor([2**60, 2**60 + 1, 2**60 + 2]),
        torch.tensor([-(2**62), -(2**62) + 1, -(2**62) + 2]),
        torch.tensor([2**63 - 1, 2**63, 2**63 + 1], dtype=torch.uint64),
        torch.tensor([-1, 0, 1], dtype=torch.int8),
    ],
    ids=["float64", "beyond float32", "beyond float64", "negative", "uint64", "int8"],
)
def test_ranking_reward_loss_does_not_round_ranks(device, backend, ranks):
    """Three ordered completions, and the same ranks in one group with more than a tile of them."""
    scores, offsets = torch.tensor([2.0, 0.0, 1.0]).to(device), torch.tensor([0, 3]).to(device)
    loss, stats = ranking_reward_loss(scores, ranks.to(device), offsets, backend=backend)
    assert (stats.pair_count.item(), stats.correct_count.item()) == (3, 2)
    assert loss.item() == pytest.approx((loss_of(2) + loss_of(1) + loss_of(-1)) / 3, rel=1e-6)
    many = ranks.to(device)[[0] * 20 + [1] * 20 + [2]]
    _, stats = ranking_reward_loss(
        torch.zeros(41, device=device), many, torch.tensor([0, 41]).to(device), backend=backend
    )
    assert stats.pair_count.item() == 20 * 20 + 20 + 20


def test_ranking_reward_loss_counts_prompts_without_a_pair(device, backend):
    """Ties, NaN, one completion, none: none of them is a pair, and the loss leaves them out."""
    nan = math.nan
    ranks = torch.tensor([0.0, 1.0, 3.0, 3.0, 0.0, 1.0, nan, nan, nan], device=device)
    offsets = torch.tensor([0, 2, 4, 4, 5, 7, 9], device=device)
    scores = torch.zeros(9, device=device)
    loss, stats = ranking_reward_loss(scores, ranks, offsets, backend=backend)
    assert (stats.pair_count.item(), stats.unpaired_count.item()) == (1, 5)
    assert stats.unpaired_count.dtype == torch.float64
    assert loss.item() == pytest.approx(LOG2, rel=1e-6)
    none = ranking_reward_loss(scores[:0], ranks[:0], offsets[:1], backend=backend)[1]
    assert none.unpaired_count.item() == 0
    assert (stats + stats + none).unpaired_count.item() == 10
    pairwise = pairwise_reward_loss(scores, scores, backend=backend)[1]
    assert (pairwise.unpaired_count.item(), pairwise.accuracy.item()) == (0, 0)
    assert (pairwise + stats).unpaired_count.item() == 5
