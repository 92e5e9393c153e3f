"""Statistics of the losses add up: with ``+`` and with ``sum``, and with nothing else."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk


def _stats(op: str, seed: int, backend: str = "reference"):
    x, y, z = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    if op == "policy_loss":
        return rk.policy_loss(x, y, z, backend=backend)[1]
    if op == "value_loss":
        return rk.value_loss(x, y, z, backend=backend)[1]
    if op == "pairwise_reward_loss":
        return rk.pairwise_reward_loss(x, y, backend=backend)[1]
    offsets = torch.arange(5) * 5
    return rk.ranking_reward_loss(x.flatten(), y.flatten(), offsets, backend=backend)[1]


OPS = ("policy_loss", "value_loss", "pairwise_reward_loss", "ranking_reward_loss")


@pytest.mark.parametrize("op", OPS)
def test_stats_add_up_with_sum(op, backend):
    parts = [_stats(op, seed, backend) for seed in range(3)]
    total = sum(parts)
    assert type(total) is type(parts[0])
    assert total == parts[0] + parts[1] + parts[2]
    for name, got, *each in zip(total._fields, total, *parts, strict=True):
        merge = max if name.endswith("_max") else sum
        assert got.item() == pytest.approx(merge(x.item() for x in each), rel=1e-12), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("other", [0, 1, 0.0, (1, 2), None, "a tuple of as many fields"])
def test_stats_add_up_with_nothing_else(op, other):
    """A named tuple is a tuple: plain ``+`` would make a longer one."""
    stats = _stats(op, 0)
    other = tuple(stats) if isinstance(other, str) else other
    kind = type(stats).__name__
    with pytest.raises(TypeError, match=f"expected a {kind} to add to a {kind}, got"):
        stats + other
    if not (type(other) is int and other == 0):  # which is where sum starts
        with pytest.raises(TypeError, match=f"expected a {kind} to add to a {kind}, got"):
            other + stats


def test_stats_of_two_losses_do_not_add_up():
    with pytest.raises(TypeError, match="expected a PolicyStats to add to a PolicyStats, got Val"):
        _stats("policy_loss", 0) + _stats("value_loss", 0)
    with pytest.raises(TypeError, match="expected a RewardStats to add to a RewardStats, got Pol"):
        _stats("ranking_reward_loss", 0) + _stats("policy_loss", 0)
