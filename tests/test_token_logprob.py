"""token_logprob against numbers worked out by hand, and what it promises beyond the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import TokenLogprob, token_logprob


def test_token_logprob_by_hand(device, backend):
    # Row 0: p = (1, 2, 4, 1) / 8; token 2: log 1/2; entropy = 3/4 log 8 - ... = 1.75 log 2.
    # Row 1: p uniform over 4: log 1/4 and log 4.
    rows = [[0.0, math.log(2), math.log(4), 0.0], [3.0, 3.0, 3.0, 3.0]]
    logits = torch.tensor(rows, device=device)
    out = token_logprob(
        logits, torch.tensor([2, 1], device=device), with_entropy=True, backend=backend
    )
    assert isinstance(out, TokenLogprob)
    log2 = math.log(2)
    expected = torch.tensor([-log2, -2 * log2], device=device)
    torch.testing.assert_close(out.logprob, expected, rtol=1e-6, atol=0)
    expected = torch.tensor([1.75 * log2, 2 * log2], device=device)
    torch.testing.assert_close(out.entropy, expected, rtol=1e-6, atol=0)


def test_token_logprob_temperature_by_hand(device, backend):
    # At temperature 2 the logits (0, 2 log 3) give p = (1, 3) / 4.
    logits = torch.tensor([[0.0, 2 * math.log(3)]] * 2, device=device)
    tokens = torch.tensor([0, 1], device=device)
    expected = torch.tensor([math.log(1 / 4), math.log(3 / 4)], device=device)
    for temperature in (
        2.0,
        torch.tensor(2.0, device=device),
        torch.full((2,), 2.0, device=device),
    ):
        got = token_logprob(logits, tokens, temperature=temperature, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        if backend != "reference":
            number = token_logprob(logits, tokens, temperature=2.0, backend=backend)
            assert torch.equal(got, number)


def test_token_logprob_gradient_by_hand(device, backend):
    # p = (1, 3) / 4, token 1, upstream 2, temperature 1/2: 2 (onehot - p) / (1/2) = (-1, 1).
    # Entropy: dH/dz_v = -p_v (log p_v + H) / temperature.
    logits = torch.tensor([[0.0, math.log(3) / 2]], device=device, requires_grad=True)
    out = token_logprob(
        logits,
        torch.tensor([1], device=device),
        temperature=0.5,
        with_entropy=True,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(2 * out.logprob.sum(), logits, retain_graph=True)
    expected = torch.tensor([[-1.0, 1.0]], device=device)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    p = [1 / 4, 3 / 4]
    entropy = -sum(x * math.log(x) for x in p)
    expected = torch.tensor([[-x * (math.log(x) + entropy) / 0.5 for x in p]], device=device)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def test_token_logprob_many_tokens_equal_one_by_one(device, backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=generator).to(device).requires_grad_()
    tokens = torch.randint(300, (5, 4), generator=generator).to(device)
    tokens[0, 1] = tokens[0, 0]  # scored twice
    tokens[1, 2] = -100
    weight = torch.randn(5, 4, generator=generator).to(device)
    together = token_logprob(logits, tokens, with_entropy=True, backend=backend)
    (grad,) = torch.autograd.grad((together.logprob * weight).sum(), logits)
    total = torch.zeros_like(logits)
    for k in range(4):
        one = token_logprob(logits, tokens[:, k], backend=backend)
        assert torch.equal(one, together.logprob[:, k])
        total += torch.autograd.grad((one * weight[:, k]).sum(), logits)[0]
    torch.testing.assert_close(grad, total, rtol=1e-5, atol=1e-6)


def test_token_logprob_entropy_changes_no_bit(device, backend):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(7, 5003, generator=generator) * 4).to(device, dtype)
        tokens = torch.randint(5003, (7,), generator=generator).to(device)
        alone = token_logprob(logits, tokens, backend=backend)
        beside = token_logprob(logits, tokens, with_entropy=True, backend=backend)
        assert torch.equal(alone, beside.logprob)


def test_token_logprob_is_batch_invariant(device, backend):
    """A row has the same bits, forward and backward, whatever other rows are in the call."""
    if backend == "reference":
        pytest.skip("the reference is batch invariant to rounding only")
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(37, 5003, generator=generator) * 3).to(device)
    tokens = torch.randint(5003, (37,), generator=generator).to(device)

    def grads(x, t):
        x = x.detach().requires_grad_()
        out = token_logprob(x, t, with_entropy=True, backend=backend)
        (out.logprob.sum() * 0.3 + out.entropy.sum()).backward()
        return out.logprob.detach(), out.entropy.detach(), x.grad

    whole = grads(logits, tokens)
    for start, end in ((0, 1), (5, 6), (36, 37), (3, 20)):
        part = grads(logits[start:end], tokens[start:end])
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[start:end], b)


def test_token_logprob_ignored_rows_are_not_read(device, backend):
    logits = torch.full((3, 1000), torch.nan, device=device)
    logits[1] = 0.0
    logits.requires_grad_()
    tokens = torch.tensor([-100, 5, -100], device=device)
    out = token_logprob(logits, tokens, with_entropy=True, backend=backend)
    (out.logprob + out.entropy).sum().backward()
    for x in (out.logprob, out.entropy):
        assert x[0] == 0 and x[2] == 0 and x.isfinite().all()
    assert (logits.grad[[0, 2]] == 0).all() and logits.grad.isfinite().all()
    assert logits.grad[1].abs().sum() > 0.5


def test_token_logprob_nan_and_infinite_rows_stay_visible(device, backend):
    """An error in the logits must not be smoothed over: the row is NaN, its neighbours are not."""
    logits = torch.zeros(4, 5000, device=device)
    logits[0, 4999] = torch.nan
    logits[1, 3000] = torch.inf
    logits[2] = -torch.inf
    out = token_logprob(
        logits, torch.zeros(4, dtype=torch.int64, device=device), with_entropy=True, backend=backend
    )
    assert out.logprob[:3].isnan().all() and out.entropy[:3].isnan().all()
    torch.testing.assert_close(out.logprob[3].item(), -math.log(5000), rtol=1e-6, atol=0)


def test_token_logprob_banned_target(device, backend):
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], device=device, requires_grad=True)
    out = token_logprob(
        logits, torch.tensor([1], device=device), with_entropy=True, backend=backend
    )
    assert out.logprob.item() == -torch.inf
    torch.testing.assert_close(out.entropy.item(), math.log(2), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(out.logprob.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0.0, -0.5]], device=device))


def test_token_logprob_inplace_backward_writes_the_gradient_into_the_logits(device, backend):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(6, 500, generator=generator).to(device).requires_grad_()
    tokens = torch.randint(500, (6,), generator=generator).to(device)
    expected = torch.autograd.grad(token_logprob(leaf, tokens, backend=backend).sum(), leaf)[0]

    logits = leaf * 1.0
    logits.retain_grad()
    out = token_logprob(logits, tokens, inplace_backward=True, backend=backend)
    before = logits._version
    out.sum().backward()
    assert logits._version > before
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(logits.detach(), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "logits: expected bfloat16"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected shape \(\.\.\., V\)"),
        ({"logits": torch.zeros(3, 2).T}, ValueError, "logits: expected stride 1"),
        ({"tokens": torch.zeros(2, dtype=torch.int32)}, TypeError, "tokens: expected int64"),
        (
            {"tokens": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"tokens: expected shape \(2,\) or \(2, 'K'\) to match logits \(2, 3\) .* got \(3,\)",
        ),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number > 0"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature: expected .*\(2,\), got \(5,\)"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_token_logprob_argument_errors(backend, change, error, message):
    good = {"logits": torch.zeros(2, 3), "tokens": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        token_logprob(**{**good, **change}, backend=backend)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_token_logprob_temperature_tensor_must_be_positive_on_the_cpu(backend, wrong):
    if backend not in ("reference", "cpu"):
        pytest.skip("looking at the values would make the GPU wait")
    arguments = {"temperature": torch.tensor([1.0, wrong]), "backend": backend}
    with pytest.raises(
        ValueError, match=rf"temperature: expected finite numbers > 0, got {wrong:f} in row 1"
    ):
        token_logprob(torch.zeros(2, 3), torch.tensor([0, 1]), **arguments)
    got = token_logprob(torch.zeros(2, 3), torch.tensor([0, -100]), **arguments)  # is not read
    torch.testing.assert_close(got, torch.tensor([-math.log(3), 0.0]))


@pytest.mark.parametrize("number", [1e39, 1e-39])
def test_token_logprob_temperature_must_be_a_number_of_the_accumulation_dtype(backend, number):
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        token_logprob(torch.zeros(1, 3), torch.tensor([0]), temperature=number, backend=backend)
    wide = torch.zeros(1, 3, dtype=torch.float64)
    got = token_logprob(wide, torch.tensor([0]), temperature=number, backend=backend)
    assert got.item() == pytest.approx(-math.log(3))
