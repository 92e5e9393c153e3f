"""token_logprob_and_grad: hand-computed cases, and the losses whose gradient it has to be."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import (
    ClippedSurrogate,
    policy_loss,
    token_logprob,
    token_logprob_and_grad,
)
from rlhf_kernels.backend import why_not


def test_token_logprob_and_grad_by_hand(device, backend):
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]], device=device)
    token = torch.tensor([1], device=device)
    out = token_logprob_and_grad(logits, token, with_entropy=True, backend=backend)
    p = [1 / 8, 2 / 8, 5 / 8]
    assert out.logprob.item() == pytest.approx(math.log(p[1]), rel=1e-6)
    assert out.entropy.item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-6)
    assert out.row_max.item() == pytest.approx(math.log(5.0), rel=1e-6)
    assert out.log_sum.item() == pytest.approx(math.log(8 / 5), rel=1e-6)
    assert out.grad_logits[0].tolist() == pytest.approx([-1 / 8, 6 / 8, -5 / 8], rel=1e-6)


def test_weight_and_temperature_scale_the_row(device, backend):
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], device=device)
    tokens = torch.tensor([0, 1], device=device)
    weight = torch.tensor([3.0, -2.0], device=device)
    options = {"weight": weight, "temperature": 0.5, "backend": backend}
    grad = token_logprob_and_grad(logits, tokens, **options).grad_logits
    assert grad.tolist() == [[3.0, -3.0], [2.0, -2.0]]


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [
        (2.0, 1.0, -2.0),  # the first step
        (2.0, 1.1, -2.2),
        (2.0, 1.4, 0.0),  # clipped above
        (2.0, 0.5, -1.0),  # below, where the advantage pulls back
        (-2.0, 0.5, 0.0),  # clipped below
        (-2.0, 1.5, 3.0),
        (-2.0, 4.0, 0.0),  # the dual clip
    ],
)
def test_slope_of_the_clipped_surrogate(device, backend, advantage, ratio, slope):
    logits = torch.zeros(1, 2, device=device)
    old = torch.tensor([-math.log(2.0) - math.log(ratio)], device=device)
    advantages = torch.tensor([advantage], device=device)
    surrogate = ClippedSurrogate(old, advantages, 0.2, 0.3, dual_clip=3.0)
    token = torch.tensor([0], device=device)
    out = token_logprob_and_grad(logits, token, surrogate=surrogate, backend=backend)
    assert out.grad_logits[0].tolist() == pytest.approx([slope / 2, -slope / 2], rel=1e-5)


def test_first_step_has_a_ratio_of_exactly_one(device, backend):
    """With the bounds at 1 nothing is clipped, as the recomputed log-probabilities are the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 300, generator=generator).to(device)
    tokens = torch.randint(300, (16,), generator=generator).to(device)
    old = token_logprob(logits, tokens, backend=backend)
    advantages = torch.ones(16, device=device)
    surrogate = ClippedSurrogate(old, advantages, 0.0, 0.0)
    out = token_logprob_and_grad(logits, tokens, surrogate=surrogate, backend=backend)
    plain = token_logprob_and_grad(logits, tokens, weight=-advantages, backend=backend)
    assert torch.equal(out.logprob, old)
    assert torch.equal(out.grad_logits, plain.grad_logits)


def test_gradient_of_policy_loss(device, backend):
    """What policy_loss and token_logprob give by autograd, mask and all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 50, generator=generator).to(device)
    tokens = torch.randint(50, (3, 7), generator=generator).to(device)
    old = (token_logprob(logits, tokens, backend="reference").cpu() * 1.1).to(device)
    advantages = torch.randn(3, 7, generator=generator).to(device)
    mask = (torch.rand(3, 7, generator=generator) < 0.7).to(device)
    leaf = logits.clone().requires_grad_()
    losses = "reference" if why_not("policy_loss", backend) else backend
    logprob = token_logprob(leaf, tokens, temperature=0.8, backend=backend)
    loss, _ = policy_loss(logprob, old, advantages, mask, clip_high=0.3, backend=losses)
    loss.backward()
    old[~mask] = torch.nan
    out = token_logprob_and_grad(
        logits,
        torch.where(mask, tokens, -100),
        weight=mask / mask.sum(),
        surrogate=ClippedSurrogate(old, advantages, clip_high=0.3),
        temperature=0.8,
        backend=backend,
    )
    torch.testing.assert_close(out.grad_logits, leaf.grad, rtol=1e-5, atol=1e-7)


def test_weight_zero_leaves_the_surrogate_out(device, backend):
    """As a mask that is selected: an infinite ratio or a NaN there does not count."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.tensor([1, 2, 3, 4], device=device)
    old = torch.tensor([-2.0, -200.0, torch.nan, -2.0], device=device)
    advantages = torch.tensor([1.0, -1.0, -1.0, torch.nan], device=device)
    weight = torch.tensor([0.5, 0.0, 0.0, 0.0], device=device)
    options = {"surrogate": ClippedSurrogate(old, advantages), "backend": backend}
    grad = token_logprob_and_grad(logits, tokens, weight=weight, **options).grad_logits
    assert (grad[1:] == 0).all() and grad[0].isfinite().all()


def test_edge_of_the_clip_is_that_of_policy_loss(device, backend):
    """On a bound the slope is the unclipped one, in the arithmetic of policy_loss."""
    if reason := why_not("policy_loss", backend):
        pytest.skip(f"whose bits to compare with: {reason}")
    logits = torch.zeros(400, 2, device=device)
    tokens = torch.zeros(400, dtype=torch.int64, device=device)
    leaf = token_logprob(logits, tokens, backend=backend).detach().requires_grad_()
    steps = torch.arange(-200, 200, device=device) * 2.0**-24
    old = leaf.detach() - torch.log(torch.tensor(1.2, device=device)) + steps
    advantages = torch.ones(400, device=device)
    loss, _ = policy_loss(leaf, old, advantages, normalizer=1.0, backend=backend)
    (expected,) = torch.autograd.grad(loss, leaf)
    surrogate = ClippedSurrogate(old, advantages)
    grad = token_logprob_and_grad(logits, tokens, surrogate=surrogate, backend=backend).grad_logits
    kept = expected != 0
    assert 0 < int(kept.sum()) < 400
    assert torch.equal(grad[:, 0] != 0, kept)


def test_gradient_in_place_of_the_logits(device, backend):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(4, 300, generator=generator).to(device).requires_grad_()
    tokens = torch.randint(300, (4,), generator=generator).to(device)
    expected = token_logprob_and_grad(leaf, tokens, backend=backend)
    logits = leaf * 1.0
    kept = logits.exp()
    out = token_logprob_and_grad(logits, tokens, inplace=True, backend=backend)
    assert out.grad_logits.data_ptr() == logits.data_ptr()
    for a, b in zip(out, expected, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert not out.grad_logits.requires_grad and not out.logprob.requires_grad
    kept.sum().backward()  # exp keeps its result, not the logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits = leaf * 1.0
        square = logits.square()
        token_logprob_and_grad(logits, tokens, inplace=True, backend=backend)
        square.sum().backward()
    with pytest.raises(ValueError, match="inplace: expected logits computed by autograd"):
        token_logprob_and_grad(leaf, tokens, inplace=True, backend=backend)
    twice = torch.zeros(1, 300, device=device).expand(4, 300)
    with pytest.raises(ValueError, match="inplace: expected rows that do not overlap"):
        token_logprob_and_grad(twice, tokens, inplace=True, backend=backend)


def clipped(rows, vocab, dtype, device):
    """Logits, tokens and the clipped surrogate of random rows; most ratios are near 1."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 3).to(device, dtype)
    tokens = torch.randint(vocab, (rows,), generator=generator).to(device)
    old = token_logprob(logits, tokens, backend="reference")
    old -= 0.2 * torch.randn(rows, generator=generator).to(device)
    advantages = torch.randn(rows, generator=generator).to(device)
    return logits, tokens, ClippedSurrogate(old, advantages)


def test_long_row_in_place(device, backend):
    """40001: a cluster of blocks; the second row begins and ends on an odd address."""
    logits, tokens, surrogate = clipped(2, 40001, torch.bfloat16, device)
    options = {"surrogate": surrogate, "with_entropy": True, "backend": backend}
    beside = token_logprob_and_grad(logits, tokens, **options)
    plain = token_logprob_and_grad(logits, tokens, **{**options, "backend": "reference"})
    place = logits.clone()
    inside = token_logprob_and_grad(place, tokens, **options, inplace=True)
    assert inside.grad_logits.data_ptr() == place.data_ptr()
    for a, b, c in zip(inside, beside, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(
            a, c, rtol=1e-2 if c.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(5003, torch.float32), (40001, torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_token_logprob_and_grad_is_batch_invariant(device, backend, vocab, dtype):
    """A row has the same bits whatever other rows are in the call."""
    if backend == "reference":
        pytest.skip("the reference is batch invariant to rounding only")
    logits, tokens, surrogate = clipped(37 if vocab < 40001 else 6, vocab, dtype, device)

    def call(part):
        own = surrogate._replace(
            old_logprob=surrogate.old_logprob[part], advantages=surrogate.advantages[part]
        )
        options = {"surrogate": own, "with_entropy": True, "backend": backend}
        return token_logprob_and_grad(logits[part], tokens[part], **options)

    rows = len(tokens)
    whole = call(slice(None))
    for start, end in ((0, 1), (1, 3), (rows - 1, rows), (3, rows)):
        for a, b in zip(whole, call(slice(start, end)), strict=True):
            assert torch.equal(a[start:end], b)


def test_bad_arguments_are_named(device, backend):
    logits = torch.zeros(4, 5, device=device)
    tokens = torch.zeros(4, dtype=torch.int64, device=device)
    vector = torch.zeros(4, device=device)

    def call(**options):
        token_logprob_and_grad(**{"logits": logits, "tokens": tokens, **options}, backend=backend)

    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\) to match tokens"):
        call(weight=vector[:3])
    with pytest.raises(TypeError, match="surrogate: expected a ClippedSurrogate, got tuple"):
        call(surrogate=(vector, vector))
    with pytest.raises(TypeError, match=r"surrogate\.old_logprob: expected a tensor, got NoneType"):
        call(surrogate=ClippedSurrogate(None, vector))
    with pytest.raises(ValueError, match=r"surrogate.advantages: expected shape \(4,\)"):
        call(surrogate=ClippedSurrogate(vector, vector[:1]))
    with pytest.raises(ValueError, match=r"surrogate.clip_low: expected a finite number >= 0"):
        call(surrogate=ClippedSurrogate(vector, vector, -0.1))
    with pytest.raises(ValueError, match=r"surrogate.dual_clip: expected a finite number > 1"):
        call(surrogate=ClippedSurrogate(vector, vector, dual_clip=1.0))
    with pytest.raises(ValueError, match=r"one token a position, with a surrogate"):
        call(tokens=tokens.unsqueeze(-1), surrogate=ClippedSurrogate(vector, vector))
