"""logprob_kl against numbers worked out by hand, and what it promises beyond the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import logprob_kl, token_logprob

LOG2, LOG3 = math.log(2), math.log(3)


def test_logprob_kl_by_hand(device, backend):
    # p = (1, 3) / 4, q = (1, 1) / 2: KL(p || q) = 1/4 log 1/2 + 3/4 log 3/2 = 3/4 log 3 - log 2.
    logits = torch.tensor([[5.0, 5.0 + LOG3]], device=device)
    ref_logits = torch.tensor([[-2.0, -2.0]], device=device)
    out = logprob_kl(logits, ref_logits, torch.tensor([1], device=device), backend=backend)
    expected = {
        "logprob": math.log(3 / 4),
        "ref_logprob": -LOG2,
        "kl": 0.75 * LOG3 - LOG2,
        "entropy": 2 * LOG2 - 0.75 * LOG3,
    }
    for name, value in expected.items():
        assert getattr(out, name).item() == pytest.approx(value, rel=2e-6), name


def test_logprob_kl_gradient_by_hand(device, backend):
    # dKL/dz_v = p_v (log p_v - log q_v - KL)
    logits = torch.tensor([[0.0, LOG3]], device=device, requires_grad=True)
    ref_logits = torch.zeros(1, 2, device=device, requires_grad=True)
    out = logprob_kl(logits, ref_logits, torch.tensor([0], device=device), backend=backend)
    out.kl.sum().backward()
    kl = 0.75 * LOG3 - LOG2
    expected = [0.25 * (-LOG2 - kl), 0.75 * (math.log(1.5) - kl)]
    torch.testing.assert_close(logits.grad, torch.tensor([expected], device=device))
    assert ref_logits.grad is None
    assert not out.ref_logprob.requires_grad


def test_logprob_kl_shares_its_bits_with_token_logprob(device, backend):
    if backend == "reference":
        pytest.skip("promised within a compiled backend")
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(9, 6007, generator=generator) * 3).to(device, dtype)
        logits[3] = torch.arange(6007) / 32  # the maximum grows from block to block
        ref_logits = torch.randn(9, 6007, generator=generator).to(device, dtype)
        ref_logits[5, 4000] = 500.0  # the reference is summed again, the policy is not
        tokens = torch.randint(6007, (9,), generator=generator).to(device)
        out = logprob_kl(logits, ref_logits, tokens, temperature=0.7, backend=backend)
        alone = token_logprob(logits, tokens, temperature=0.7, with_entropy=True, backend=backend)
        assert torch.equal(out.logprob, alone.logprob)
        assert torch.equal(out.entropy, alone.entropy)
        reference = token_logprob(ref_logits, tokens, temperature=0.7, backend=backend)
        assert torch.equal(out.ref_logprob, reference)


def test_logprob_kl_where_a_probability_is_zero(device, backend):
    """q = 0 < p: infinite; p = 0: the term is 0, whatever q is."""
    inf = torch.inf
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -inf], [0.0, 0.0, -inf]], device=device)
    ref_logits = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0], [0.0, 0.0, -inf]], device=device)
    logits.requires_grad_()
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    out = logprob_kl(logits, ref_logits, tokens, backend=backend)
    assert out.kl[0].item() == inf
    assert out.kl[1].item() == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert out.kl[2].item() == pytest.approx(0.0, abs=1e-7)
    out.kl[1:].sum().backward()
    assert logits.grad[1:].isfinite().all() and (logits.grad[1:, 2] == 0).all()


def test_logprob_kl_when_the_maxima_grow(device, backend):
    """Maxima that rise along the row, of one tensor or of both: what has been summed is moved."""
    rising = torch.arange(6007, device=device) / 512
    flat = torch.arange(6007, device=device).remainder(7) / 7
    tokens = torch.tensor([3], device=device)
    for logits, ref_logits in ((rising, flat), (flat, rising), (rising, rising * 1.5)):
        out = logprob_kl(logits[None], ref_logits[None], tokens, backend=backend)
        log_p, log_q = logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
        truth = (log_p.exp() * (log_p - log_q)).sum()
        torch.testing.assert_close(out.kl[0].double(), truth, rtol=2e-6, atol=2e-6)


def test_logprob_kl_of_equal_logits_is_zero(device, backend):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(8, 5000, generator=generator) * 5).to(device)
    tokens = torch.zeros(8, dtype=torch.int64, device=device)
    out = logprob_kl(logits, logits + 64.0, tokens, backend=backend)
    assert out.kl.abs().max() < 1e-6  # adding 64 rounds the logits to 2^-18
    if backend != "reference":
        assert (out.kl >= 0).all()


def test_logprob_kl_where_a_probability_underflows(device, backend):
    """p is 0 in float32, and so is its term, also where q is 0: in a block of its own, in the block
    of the maximum, and where p was larger before the maximum came."""
    for vocab, banned in ((3, 1), (5000, 1), (5000, 4999), (5000, 2000)):
        logits = torch.full((1, vocab), -300.0, device=device)
        ref_logits = torch.zeros(1, vocab, device=device)
        logits[0, [0, 2]] = torch.tensor([0.0, -1.0], device=device)
        ref_logits[0, banned] = -torch.inf
        p = logits.double().softmax(-1)[0, [0, 2]]
        q = ref_logits.double().log_softmax(-1)[0, [0, 2]]
        expected = (p * (p.log() - q)).sum().item()
        for flip in (False, True):
            pair = [x.flip(-1) if flip else x for x in (logits, ref_logits)]
            leaf = pair[0].clone().requires_grad_()
            token = torch.tensor([vocab - 1 if flip else 0], device=device)
            out = logprob_kl(leaf, pair[1], token, backend=backend)
            assert out.kl.item() == pytest.approx(expected, rel=1e-5)
            (out.kl + out.entropy).sum().backward()
            assert leaf.grad.isfinite().all()


def test_logprob_kl_of_a_mask_in_the_reference_alone(backend):
    """The distance of a finite mask overflows once it is scaled; its share of the KL does not."""
    if backend != "cpu":
        pytest.skip("the plain formula overflows as well")
    for place in (0, 2500, 4999):
        logits = torch.zeros(1, 5000)
        logits[0, place] = -10.0
        ref_logits = torch.zeros(1, 5000)
        ref_logits[0, place] = torch.finfo(torch.float32).min
        leaf = logits.requires_grad_()
        token = torch.tensor([7])
        out = logprob_kl(leaf, ref_logits, token, temperature=0.5, backend=backend)
        p = (logits.detach().double() / 0.5).softmax(-1)[0, place].item()
        assert out.kl.item() == pytest.approx(-2 * p * torch.finfo(torch.float32).min, rel=1e-5)
        out.kl.sum().backward()
        assert not leaf.grad.isnan().any()


def test_logprob_kl_is_batch_invariant(device, backend):
    if backend == "reference":
        pytest.skip("the reference is batch invariant to rounding only")
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(2, 21, 5003, generator=generator) * 3).to(device)
    tokens = torch.randint(5003, (21,), generator=generator).to(device)

    def run(rows):
        x = logits[rows].detach().requires_grad_()
        out = logprob_kl(x, ref_logits[rows], tokens[rows], backend=backend)
        (out.kl.sum() + 0.5 * out.logprob.sum() - out.entropy.sum()).backward()
        return (*(y.detach() for y in out), x.grad)

    whole = run(slice(0, 21))
    for rows in (slice(0, 1), slice(20, 21), slice(4, 13)):
        for a, b in zip(whole, run(rows), strict=True):
            assert torch.equal(a[rows], b)


def test_logprob_kl_ignored_rows_are_not_read(device, backend):
    logits = torch.full((2, 50), torch.nan, device=device)
    logits[1] = torch.arange(50) / 10
    logits.requires_grad_()
    ref_logits = logits.detach().flip(1)
    out = logprob_kl(logits, ref_logits, torch.tensor([-100, 3], device=device), backend=backend)
    assert all(x[0] == 0 and x[1].isfinite() for x in out)
    (out.kl + out.logprob).sum().backward()
    assert (logits.grad[0] == 0).all() and logits.grad.isfinite().all()
    assert logits.grad[1].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ref_logits": torch.zeros(2, 4)}, ValueError, r"ref_logits: expected shape \(2, 3\)"),
        (
            {"ref_logits": torch.zeros(2, 3).bfloat16()},
            TypeError,
            "ref_logits: expected torch.float32",
        ),
        ({"ref_logits": torch.zeros(3, 2).T}, ValueError, "ref_logits: expected stride 1"),
        (
            {"tokens": torch.zeros(2, 1, dtype=torch.int64)},
            ValueError,
            r"tokens: expected shape \(2,\), got \(2, 1\)",
        ),
    ],
)
def test_logprob_kl_argument_errors(backend, change, error, message):
    good = {
        "logits": torch.zeros(2, 3),
        "ref_logits": torch.zeros(2, 3),
        "tokens": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        logprob_kl(**{**good, **change}, backend=backend)
