"""One test for each bug that this field has shipped in heads without logits; numbers as in
test_known_bugs.py. Vocabulary-parallel ones (7) are in test_linear_parallel.py, those of models
(35, 36) in integrations/test_transformers.py."""

from __future__ import annotations

import pytest
import torch

from rlhf_kernels import linear_logprob, linear_token_loss, policy_loss
from test_linear_logprob import inputs


def dense(hidden, weight, tokens, grad):
    """Gradients of hidden and weight from float64 logits."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_p = (h @ w.t()).log_softmax(-1)
    logprob = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.autograd.grad((logprob * grad).sum(), (h, w))


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_per_token_upstream_gradient(device, backend, chunk_tokens):
    """5. Every row scaled by the first row's upstream gradient. Liger 968, 1298"""
    hidden, weight, tokens = inputs(device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    grad = torch.linspace(-3, 100, 37, device=device)
    expected = dense(hidden, weight, tokens, grad)
    options = {"chunk_tokens": chunk_tokens, "backend": backend}

    def weighted(logprob, entropy, grad):
        return (logprob * grad).sum(), None

    losses = (
        (linear_logprob(hidden, weight, tokens, **options) * grad).sum(),
        linear_token_loss(hidden, weight, tokens, weighted, {"grad": grad}, **options)[0],
    )
    for loss in losses:
        for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


def test_weight_gradient_accumulates_in_float32(device, backend):
    """6. dW added up in bf16 stands still after some chunks. CCE 14, TransformerEngine 2325"""
    hidden = torch.ones(400, 8, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, device=device).requires_grad_()
    tokens = torch.zeros(400, dtype=torch.int64, device=device)
    options = {"chunk_tokens": 1, "backend": backend}
    linear_logprob(hidden, weight, tokens, **options).sum().backward()
    assert weight.grad[0, 0].item() == pytest.approx(400 * 3 / 4, rel=2**-8)
    assert weight.grad[1, 0].item() == pytest.approx(-400 / 4, rel=2**-8)


@pytest.mark.parametrize("rows", [0, 5])
def test_zero_valid_tokens(device, backend, rows):
    """12. NaN loss or infinite gradient when nothing is scored, or nothing is there. Automodel
    3796, OLMo-core 657, torchtune 2341, unsloth 7677"""
    hidden, weight, _ = inputs(rows, device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    tokens = torch.full((rows,), -100, device=device)
    vectors = {name: torch.zeros(rows, device=device) for name in ("old_logprob", "advantages")}

    def loss_fn(logprob, entropy, **x):
        return policy_loss(logprob, **x, normalizer=0.0)

    loss, stats = linear_token_loss(hidden, weight, tokens, loss_fn, vectors, backend=backend)
    logprob = linear_logprob(hidden, weight, tokens, backend=backend)
    assert loss.item() == 0 and stats.clip_frac.item() == 0 and not logprob.any()
    for scalar in (loss, logprob.sum()):
        for grad in torch.autograd.grad(scalar, leaves):
            assert (grad == 0).all()


def test_nonuniform_upstream_layout(device, backend):
    """13. Expanded (stride 0) or non-contiguous upstream gradients, and hidden states. verl's
    linear cross entropy asserts contiguity"""
    hidden, weight, tokens = inputs(24, device=device)
    hidden = hidden.view(4, 6, 24).transpose(0, 1).requires_grad_()  # (6, 4, H), not contiguous
    tokens = tokens.view(6, 4)
    weight.requires_grad_()
    out = linear_logprob(hidden, weight, tokens, chunk_tokens=5, backend=backend)
    layouts = (torch.ones(4, 6, device=device).t(), torch.ones((), device=device).expand(6, 4))
    leaves = (hidden, weight)
    expected = torch.autograd.grad(out, leaves, torch.ones(6, 4).to(device), retain_graph=True)
    for grad in layouts:
        got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_low_precision_log_softmax(device, backend):
    """20. bf16 in, bf16 softmax: the sums are float32. trl 7084, transformers 31267"""
    hidden = torch.zeros(2, 8, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(1000, 8, dtype=torch.bfloat16, device=device)
    tokens = torch.tensor([0, 999], device=device)
    out = linear_logprob(hidden, weight, tokens, with_entropy=True, backend=backend)
    expected = torch.full((2,), 6.907755279, device=device)
    torch.testing.assert_close(-out.logprob, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out.entropy, expected, rtol=1e-6, atol=0.0)


def test_logits_only_for_loss_tokens(device, backend, monkeypatch):
    """40. Prompts and padding do not reach the head: its products have the scored rows alone."""
    if backend == "reference":
        pytest.skip("the reference multiplies all of them")
    hidden, weight, tokens = inputs(device=device)
    tokens[3:] = -100
    rows = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, *x, **k: rows.append(len(a)) or product(a, *x, **k))
    loss, _ = linear_token_loss(
        *(hidden.requires_grad_(), weight, tokens),
        lambda logprob, entropy: (logprob.sum(), None),
        backend=backend,
    )
    loss.backward()
    assert rows == [3, 3]
