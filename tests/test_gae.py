"""gae against numbers worked out by hand, and against a plain loop over Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from rlhf_kernels import GAE, gae

NAN = math.nan


def loop(rewards, values, mask, gamma, lam, last_value=0.0) -> tuple[list[float], list[float]]:
    """One sequence in Python's float64; what is masked is left out before anything is computed."""
    steps = [t for t in range(len(mask)) if mask[t]]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    advantage = 0.0
    for here, following in reversed(list(zip(steps, [*steps[1:], None], strict=True))):
        next_value = last_value if following is None else values[following]
        advantage = rewards[here] + gamma * next_value - values[here] + gamma * lam * advantage
        advantages[here], returns[here] = advantage, advantage + values[here]
    return advantages, returns


def random_case(sequences: int, steps: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sequences * steps)
    rewards, values = torch.randn(2, sequences, steps, generator=generator).to(device)
    mask = (torch.rand(sequences, steps, generator=generator) < 0.7).to(device)
    return rewards, values, mask, torch.randn(sequences, generator=generator).to(device)


def test_gae_by_hand(device, backend):
    # gamma 0.9, lam 0.5, so gamma lam = 0.45; after the last step V = 2.
    # delta_2 = 3 + 0.9 * 2   - 1.5 = 3.3     A_2 = 3.3
    # delta_1 = 2 + 0.9 * 1.5 - 1   = 2.35    A_1 = 2.35 + 0.45 * 3.3   = 3.835
    # delta_0 = 1 + 0.9 * 1   - 0.5 = 1.4     A_0 = 1.4  + 0.45 * 3.835 = 3.12575
    out = gae(
        torch.tensor([[1.0, 2.0, 3.0]], device=device),
        torch.tensor([[0.5, 1.0, 1.5]], device=device),
        gamma=0.9,
        lam=0.5,
        last_value=torch.tensor([2.0], device=device),
        backend=backend,
    )
    assert isinstance(out, GAE)
    expected = torch.tensor([[3.12575, 3.835, 3.3]], device=device)
    torch.testing.assert_close(out.advantages, expected, rtol=1e-6, atol=0)
    expected = torch.tensor([[3.62575, 4.835, 4.8]], device=device)
    torch.testing.assert_close(out.returns, expected, rtol=1e-6, atol=0)


def test_gae_masked_steps_by_hand(device, backend):
    # The three steps above, with a gap and an end that hold garbage; a row with nothing valid.
    nothing = [NAN, math.inf, 100.0, -100.0, 5.0]
    out = gae(
        torch.tensor([[1.0, NAN, 2.0, 3.0, 100.0], nothing], device=device),
        torch.tensor([[0.5, 100.0, 1.0, 1.5, NAN], nothing], device=device),
        torch.tensor([[1, 0, 1, 1, 0], [0] * 5], device=device),
        gamma=0.9,
        lam=0.5,
        last_value=torch.tensor([2.0, NAN], device=device),
        backend=backend,
    )
    expected = torch.tensor([[3.12575, 0.0, 3.835, 3.3, 0.0], [0.0] * 5], device=device)
    torch.testing.assert_close(out.advantages, expected, rtol=1e-6, atol=0)
    expected = torch.tensor([[3.62575, 0.0, 4.835, 4.8, 0.0], [0.0] * 5], device=device)
    torch.testing.assert_close(out.returns, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(
    ("sequences", "steps"),
    [(1, 1), (3, 7), (4, 16), (9, 64)],
)
def test_gae_agrees_with_a_loop(device, backend, sequences, steps, bootstrap):
    rewards, values, mask, last = random_case(sequences, steps, device)
    out = gae(
        rewards,
        values,
        mask,
        gamma=0.97,
        lam=0.9,
        last_value=last if bootstrap else None,
        backend=backend,
    )
    for row in range(sequences):
        advantages, returns = loop(
            rewards[row].tolist(),
            values[row].tolist(),
            mask[row].tolist(),
            0.97,
            0.9,
            last[row].item() if bootstrap else 0.0,
        )
        expected = torch.tensor(advantages, device=device)
        torch.testing.assert_close(out.advantages[row], expected, rtol=2e-6, atol=2e-6)
        expected = torch.tensor(returns, device=device)
        torch.testing.assert_close(out.returns[row], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("gap", [1, 9])
def test_gae_runs_of_valid_steps(device, backend, gap):
    """Runs just below, at and above the lengths of a vector (4, 8, 16) and of a chunk (512)."""
    mask = []
    for run in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 511, 512, 513, 528):
        mask += [True] * run + [False] * gap
    rewards, values, _, last = random_case(1, len(mask), device)
    valid = torch.tensor([mask], device=device)
    out = gae(rewards, values, valid, gamma=0.99, last_value=last, backend=backend)
    advantages, returns = loop(*rewards.tolist(), *values.tolist(), mask, 0.99, 0.95, last.item())
    expected = torch.tensor([advantages], device=device)
    torch.testing.assert_close(out.advantages, expected, rtol=2e-6, atol=4e-6)
    expected = torch.tensor([returns], device=device)
    torch.testing.assert_close(out.returns, expected, rtol=2e-6, atol=4e-6)


def test_gae_ends_of_gamma_and_lambda(device, backend):
    rewards, values, _, _ = random_case(4, 25, device)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1, device=device)], 1)
    one_step = gae(rewards, values, gamma=0.9, lam=0.0, backend=backend)
    expected = rewards + 0.9 * following - values
    torch.testing.assert_close(one_step.advantages, expected, rtol=1e-5, atol=1e-6)
    monte_carlo = gae(rewards, values, gamma=1.0, lam=1.0, backend=backend)
    to_go = rewards.double().flip(1).cumsum(1).flip(1).float()
    torch.testing.assert_close(monte_carlo.returns, to_go, rtol=1e-5, atol=5e-6)
    bandit = gae(rewards, values, gamma=0.0, lam=0.7, backend=backend)
    torch.testing.assert_close(bandit.returns, rewards, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gae_packed_equals_padded(device, backend, dtype):
    lengths = [5, 0, 1, 40, 17, 3, 3]
    rewards, values, mask, last = random_case(len(lengths), max(lengths), device)
    inside = (
        torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    )
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], device=device)
    padded = gae(rewards, values, mask & inside, last_value=last, backend=backend)
    packed = gae(
        rewards[inside],
        values[inside],
        mask[inside],
        cu_seqlens=offsets.to(dtype),
        last_value=last,
        backend=backend,
    )
    for a, b in zip(padded, packed, strict=True):
        assert torch.equal(a[inside], b)
        assert (a[~inside] == 0).all()
    whole = gae(rewards[inside], values[inside], cu_seqlens=offsets, backend=backend)
    alone = gae(rewards[3:4, :40], values[3:4, :40], backend=backend)
    assert torch.equal(whole.advantages[6:46], alone.advantages[0])


def test_gae_row_alone_equals_row_in_batch(device, backend):
    rewards, values, mask, last = random_case(11, 130, device)
    batch = gae(rewards, values, mask, last_value=last, backend=backend)
    for i in range(11):
        row = slice(i, i + 1)
        alone = gae(rewards[row], values[row], mask[row], last_value=last[row], backend=backend)
        for a, b in zip(batch, alone, strict=True):
            assert torch.equal(a[row], b)


def test_gae_layouts_and_dtypes(device, backend):
    rewards, values, mask, last = random_case(6, 20, device)
    expected = gae(rewards, values, mask, last_value=last, backend=backend)
    transposed = [x.T.contiguous().T for x in (rewards, values, mask)]
    got = gae(*transposed, last_value=last.repeat_interleave(2)[::2], backend=backend)
    assert torch.equal(got.advantages, expected.advantages)
    got = gae(rewards, values, mask.float() * 0.5, last_value=last, backend=backend)
    assert torch.equal(got.advantages, expected.advantages)  # any number but 0 is valid
    mixed = gae(rewards.bfloat16(), values.double(), backend=backend)
    assert mixed.advantages.dtype == mixed.returns.dtype == torch.float64
    assert gae(rewards.bfloat16(), values.half(), backend=backend).returns.dtype == torch.float32


def test_gae_returns_constants(device, backend):
    rewards, values, mask, last = random_case(2, 5, device)
    leaves = [x.requires_grad_() for x in (rewards, values, last)]
    out = gae(leaves[0], leaves[1], mask, last_value=leaves[2], backend=backend)
    assert not out.advantages.requires_grad and not out.returns.requires_grad


def test_gae_argument_errors(device, backend):
    x = torch.zeros(2, 5, device=device)
    offsets = torch.tensor([0, 5], device=device)

    def raises(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            gae(*args, **kwargs, backend=backend)

    raises(TypeError, "rewards: expected bfloat16, .* got torch.int64", x.long(), x)
    raises(ValueError, r"rewards: expected shape \(B, T\), got \(5,\)", x[0], x[0])
    raises(
        ValueError, r"rewards: expected shape \(N,\) with cu_seqlens, got", x, x, cu_seqlens=offsets
    )
    raises(
        ValueError, r"values: expected shape \(2, 5\) to match rewards, got \(2, 4\)", x, x[:, 1:]
    )
    raises(ValueError, r"mask: expected shape \(2, 5\) to match rewards, got \(5,\)", x, x, x[0])
    raises(ValueError, "gamma: expected a finite number >= 0 and <= 1, got 1.5", x, x, gamma=1.5)
    raises(TypeError, "lam: expected a number, got str", x, x, lam="0.9")
    raises(ValueError, r"last_value: expected shape \(2,\)", x, x, last_value=x[0])
    raises(TypeError, "cu_seqlens: expected int32 or int64", x[0], x[0], cu_seqlens=x[0])


@pytest.mark.parametrize("offsets", [[0, 3], [1, 5], [0, 4, 3, 5], [0, 6], [0]])
def test_gae_rejects_wrong_offsets(backend, offsets):
    x = torch.zeros(5)
    with pytest.raises(
        ValueError, match="cu_seqlens: expected offsets that start at 0, never fall"
    ):
        gae(x, x, cu_seqlens=torch.tensor(offsets), backend=backend)


def test_gae_long_sequence(device, backend):
    """4.6 s were reported for a time loop over 128K steps; errors must not grow along the way."""
    steps = 20000 if backend != "reference" else 500
    noise = random.Random(0)
    rewards = [noise.gauss(0, 1) for _ in range(steps)]
    values = [noise.gauss(0, 1) for _ in range(steps)]
    rewards, values = (torch.tensor([x], device=device).tolist()[0] for x in (rewards, values))
    out = gae(
        torch.tensor([rewards], device=device),
        torch.tensor([values], device=device),
        lam=1.0,
        backend=backend,
    )
    expected, _ = loop(rewards, values, [True] * steps, 1.0, 1.0)
    scale = max(abs(x) for x in expected)
    torch.testing.assert_close(
        out.advantages[0], torch.tensor(expected, device=device), rtol=0, atol=1e-6 * scale
    )
