"""kl_estimate against numbers worked out by hand, and against the KL that it estimates."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import kl_estimate

KINDS = ("k1", "k2", "k3")
LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    # p = 1/2, q = 1/4: d = log 2. k3 = q/p - 1 + d = 1/2 - 1 + log 2, its slope 1 - q/p = 1/2.
    # p = 1/4, q = 1/2: d = -log 2. k3 = 2 - 1 - log 2, slope 1 - 2 = -1.
    [
        ("k1", (LOG2, -LOG2), (1.0, 1.0)),
        ("k2", (LOG2**2 / 2, LOG2**2 / 2), (LOG2, -LOG2)),
        ("k3", (LOG2 - 0.5, 1 - LOG2), (0.5, -1.0)),
    ],
)
def test_kl_estimate_by_hand(device, backend, kind, value, slope):
    logprob = torch.tensor([0.5, 0.25], device=device).log().requires_grad_()
    ref_logprob = torch.tensor([0.25, 0.5], device=device).log().requires_grad_()
    kl = kl_estimate(logprob, ref_logprob, kind=kind, backend=backend)
    torch.testing.assert_close(kl, torch.tensor(value, device=device), rtol=1e-6, atol=1e-7)
    grad, grad_ref = torch.autograd.grad(kl.sum(), (logprob, ref_logprob))
    expected = torch.tensor(slope, device=device)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad_ref, -expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimate_clamp(device, backend, kind):
    # Beyond the clamp: the value at the clamp, and no gradient. On it the gradient still flows.
    d = torch.tensor([-5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0], device=device, requires_grad=True)
    zero = torch.zeros(7, device=device)
    kl = kl_estimate(d, zero, kind=kind, clamp=2.0, backend=backend)
    (grad,) = torch.autograd.grad(kl.sum(), d)
    inside = kl_estimate(d.detach().clamp(-2, 2), zero, kind=kind, backend=backend)
    assert torch.equal(kl, inside)
    slope = {"k1": lambda x: 1.0, "k2": lambda x: x, "k3": lambda x: 1 - math.exp(-x)}[kind]
    expected = [0.0, *(slope(x) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)), 0.0]
    torch.testing.assert_close(grad, torch.tensor(expected, device=device), rtol=1e-6, atol=1e-6)


def test_kl_estimate_in_expectation(device, backend):
    """With all tokens weighted by p: k1 and k3 give the KL itself; of the gradients, that of k1 is
    zero, that of k2 is the KL's, and that of k3 is the KL's the other way round."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 7, generator=generator, dtype=torch.float64).to(device)
    logits.requires_grad_()
    q = ref.log_softmax(0)

    def gradient(y):
        return torch.autograd.grad(y, logits, retain_graph=True)[0]

    p = logits.log_softmax(0)
    forward_kl, reverse_kl = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    expected = {
        "k1": torch.zeros_like(gradient(forward_kl)),
        "k2": gradient(forward_kl),
        "k3": gradient(reverse_kl),
    }
    for kind in KINDS:
        mean = (p.exp().detach() * kl_estimate(p, q, kind=kind, backend=backend)).sum()
        torch.testing.assert_close(gradient(mean), expected[kind], rtol=1e-10, atol=1e-14)
        if kind != "k2":
            torch.testing.assert_close(mean, forward_kl, rtol=1e-12, atol=0)


def test_kl_estimate_of_small_differences(device, backend):
    """exp(-d) - 1 + d in float32 would be rounding alone: steps of 6e-8 around 5e-9."""
    logprob = torch.tensor([1e-4, -1e-4, 3e-3, 0.0], device=device)
    kl = kl_estimate(logprob, torch.zeros(4, device=device), backend=backend)
    d = logprob.double()
    truth = d * d / 2 - d**3 / 6 + d**4 / 24
    torch.testing.assert_close(kl.double(), truth, rtol=3e-3, atol=0)


def test_kl_estimate_layouts_and_dtypes(device, backend):
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 6, 9, generator=generator).to(device)
    expected = kl_estimate(p, q, backend=backend)
    got = kl_estimate(p.T.contiguous().T, torch.stack([q, q], -1)[..., 0], backend=backend)
    assert torch.equal(got, expected)
    row = kl_estimate(p[2:3, 1:], q[2:3, 1:], backend=backend)
    if backend != "reference":
        assert torch.equal(row, expected[2:3, 1:])
    mixed = kl_estimate(p.bfloat16().requires_grad_(), q.double(), backend=backend)
    assert mixed.dtype == torch.float64
    leaf = p.bfloat16().requires_grad_()
    kl_estimate(leaf, q.half(), backend=backend).sum().backward()  # an expanded upstream gradient
    assert leaf.grad.dtype == torch.bfloat16
    expected = 1 - torch.exp(q.half().float() - leaf.detach().float())
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2**-8, atol=1e-6)


def test_kl_estimate_gradient_only_where_wanted(device, backend):
    p = torch.zeros(3, device=device)
    q = torch.ones(3, device=device, requires_grad=True)
    assert not kl_estimate(p, q.detach(), backend=backend).requires_grad
    (grad,) = torch.autograd.grad(kl_estimate(p, q, kind="k1", backend=backend).sum(), q)
    assert (grad == -1).all()


def test_kl_estimate_argument_errors(device, backend):
    x = torch.zeros(3, device=device)

    def raises(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            kl_estimate(*args, **kwargs, backend=backend)

    raises(TypeError, "logprob: expected a tensor, got float", 1.0, x)
    raises(ValueError, r"ref_logprob: expected shape \(3,\) to match logprob, got \(2,\)", x, x[1:])
    raises(ValueError, "kind: expected one of k1, k2, k3, got 'k4'", x, x, kind="k4")
    raises(ValueError, "clamp: expected a finite number > 0, got 0", x, x, clamp=0)
