"""linear_token_loss: gradients of linear_logprob, chunk by chunk, under the caller's own loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compare import assert_close_to_truth
from rlhf_kernels import linear_logprob, linear_token_loss, policy_loss
from rlhf_kernels.backend import why_not
from test_linear_logprob import inputs


def ppo(device, rows=37, seed=3):
    """policy_loss as a sum over tokens, and the tensors that it takes."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        "old_logprob": -torch.rand(rows, generator=generator).to(device) * 8,
        "advantages": torch.randn(rows, generator=generator).to(device),
    }

    def loss_fn(logprob, entropy, old_logprob, advantages):
        return policy_loss(logprob, old_logprob, advantages, normalizer=float(rows))

    return loss_fn, vectors


@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_policy_loss_of_chunks_is_that_of_all_tokens(device, backend, chunk_tokens):
    hidden, weight, tokens = inputs(device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss_fn, vectors = ppo(device)
    options = {"chunk_tokens": chunk_tokens, "backend": backend}
    loss, stats = linear_token_loss(hidden, weight, tokens, loss_fn, vectors, **options)
    logprob = linear_logprob(hidden, weight, tokens, backend="reference")
    expected, expected_stats = loss_fn(logprob, None, **vectors)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
        assert not a.requires_grad
    grads = torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(expected * 3, leaves)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("entropy_coef", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_are_as_exact_as_those_of_the_logits(device, backend, dtype, entropy_coef):
    """Each gradient element within twice the plain formula's error; several chunks."""
    hidden, weight, tokens = inputs(200, 32, 300, dtype, device)
    coefficient = torch.linspace(-1, 2, 200, device=device) / 200

    def loss_fn(logprob, entropy, coefficient):
        bonus = 0.0 if entropy is None else entropy_coef * (entropy * coefficient).sum()
        return -(logprob * coefficient).sum() - bonus, None

    def run(dtype, **options):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        per_token = {"coefficient": coefficient.to(torch.promote_types(dtype, torch.float32))}
        options |= {"with_entropy": entropy_coef != 0}
        loss, _ = linear_token_loss(*leaves, tokens, loss_fn, per_token, **options)
        return torch.autograd.grad(loss, leaves)

    got = run(dtype, chunk_tokens=33, backend=backend)
    plain, truth = run(dtype, backend="reference"), run(torch.float64, backend="reference")
    for a, b, t in zip(got, plain, truth, strict=True):
        assert a.dtype == dtype
        assert_close_to_truth(a, b, t, 1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("factor", [65536.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loss_scale_need_not_fit_the_dtype(device, backend, dtype, factor):
    """A gradient scaler's 65536 is infinite in fp16; its product with a small gradient is not."""
    hidden, weight, tokens = inputs(device=device, dtype=dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss_fn(logprob, entropy):
        return -logprob.sum() * 1e-3, None

    loss, _ = linear_token_loss(hidden, weight, tokens, loss_fn, backend=backend)
    got = torch.autograd.grad(loss * factor, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss, _ = linear_token_loss(*exact, tokens, loss_fn, backend="reference")
    for a, t in zip(got, torch.autograd.grad(loss * factor, exact), strict=True):
        error = (a.double() - t).abs().max() / t.abs().max()
        assert error < 2 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize(
    "options", [{}, {"with_entropy": True}, {"softcap": 3.0}, {"bias": True}], ids=str
)
def test_float16_waits_for_the_loss_scale(device, backend, options, chunk_tokens):
    """The mean over 262144 tokens leaves fp16 few bits or none, until it is times 65536."""
    hidden, weight, tokens = inputs(device=device, dtype=torch.float16)
    tokens[::5] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in options:
        bias = torch.zeros(weight.shape[0], dtype=torch.float16, device=device)
        leaves.append(bias.requires_grad_())
        options = {}
    coefficient = torch.logspace(-2, 0, len(tokens), device=device) / 262144

    def loss_fn(logprob, entropy, coefficient):
        gained = logprob if entropy is None else logprob + 0.1 * entropy
        return -(gained * coefficient).sum(), None

    def gradients(leaves, **rest):
        bias = leaves[2] if len(leaves) == 3 else None
        per_token = {"coefficient": coefficient}
        args = (*leaves[:2], tokens, loss_fn, per_token)
        loss, _ = linear_token_loss(*args, bias=bias, **options, **rest)
        return torch.autograd.grad(loss * 65536, leaves)

    got = gradients(leaves, chunk_tokens=chunk_tokens, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for a, t in zip(got, gradients(exact, backend="reference"), strict=True):
        assert a.dtype == torch.float16
        error = (a.double() - t).norm() / t.norm()
        assert error < 2 * torch.finfo(torch.float16).eps


def test_loss_fn_sees_chunks_of_the_scored_tokens(device, backend):
    hidden, weight, tokens = inputs(device=device)
    tokens[::2] = -100
    places = torch.arange(37, device=device)
    seen = []

    def loss_fn(logprob, entropy, place):
        assert entropy is None and logprob.shape == place.shape and logprob.dim() == 1
        seen.append((place.clone(), logprob.detach().clone()))
        return logprob.sum(), {"count": (logprob != 0).sum()}

    options = {"chunk_tokens": 4, "backend": backend}
    _, stats = linear_token_loss(hidden, weight, tokens, loss_fn, {"place": places}, **options)
    place, logprob = (torch.cat(x) for x in zip(*seen, strict=True))
    expected = linear_logprob(hidden, weight, tokens, backend=backend)
    assert stats["count"].item() == 18
    torch.testing.assert_close(logprob, expected.detach()[place])
    if backend != "reference":
        assert len(seen) == 5 and (place % 2 == 1).all()


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_made(device, backend, where):
    hidden, weight, tokens = inputs(device=device)
    weight = torch.nn.Parameter(weight)

    def loss_fn(logprob, entropy):
        assert backend == "reference" or not logprob.requires_grad
        return -logprob.sum(), None

    with where(), FlopCounterMode(display=False) as counter:
        linear_token_loss(hidden, weight, tokens, loss_fn, backend=backend)
    assert counter.get_total_flops() == 2 * hidden.numel() * weight.shape[0]


def test_a_bias_alone_takes_no_product_of_the_weight(device, backend):
    hidden, weight, tokens = inputs(device=device)
    bias = torch.zeros(301, device=device, requires_grad=True)

    def loss_fn(logprob, entropy):
        return -logprob.sum(), None

    with FlopCounterMode(display=False) as counter:
        loss, _ = linear_token_loss(hidden, weight, tokens, loss_fn, bias=bias, backend=backend)
        (grad,) = torch.autograd.grad(loss, bias)
    product = 2 * hidden.numel() * weight.shape[0]
    assert counter.get_total_flops() <= product + 2 * 37 * 301  # the logits, and g^T 1
    p = (hidden @ weight.t()).softmax(-1)
    onehot = torch.nn.functional.one_hot(tokens, 301)
    torch.testing.assert_close(grad, (p - onehot).sum(0), rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(
        -linear_logprob(hidden, weight, tokens, bias=bias, backend=backend).sum(), bias
    )
    torch.testing.assert_close(grad, (p - onehot).sum(0), rtol=1e-4, atol=1e-5)


def test_statistics_of_chunks_add_up(device, backend):
    hidden, weight, tokens = inputs(device=device)
    tree = {"a": {"count": torch.ones(())}, "b": torch.tensor([1.0, 2.0])}
    _, stats = linear_token_loss(
        *(hidden, weight, tokens, lambda logprob, entropy: (logprob.sum(), tree)),
        chunk_tokens=10,
        backend=backend,
    )
    calls = 1 if backend == "reference" else 4
    assert stats["a"]["count"] == calls and stats["b"].tolist() == [calls, 2 * calls]
    with pytest.raises(TypeError, match=r"loss_fn: expected its statistics to be .* a tuple"):
        linear_token_loss(
            *(hidden, weight, tokens, lambda logprob, entropy: (logprob.sum(), (1, 2))),
            backend=backend,
        )


def test_without_gradients_the_loss_is_the_same(device, backend):
    hidden, weight, tokens = inputs(device=device)
    loss_fn, vectors = ppo(device)
    with torch.no_grad():
        loss, _ = linear_token_loss(hidden, weight, tokens, loss_fn, vectors, backend=backend)
    assert not loss.requires_grad
    leaf = weight.clone().requires_grad_()
    other, _ = linear_token_loss(hidden, leaf, tokens, loss_fn, vectors, backend=backend)
    torch.testing.assert_close(loss, other.detach(), rtol=1e-6, atol=1e-7)


def test_two_heads_on_the_same_hidden_states(device, backend):
    hidden, weight, tokens = inputs(device=device)
    loss_fn, vectors = ppo(device)
    leaf = hidden.clone().requires_grad_()
    total = sum(
        linear_token_loss(leaf, w, tokens, loss_fn, vectors, backend=backend)[0]
        for w in (weight, weight.flip(0))
    )
    total.backward()
    expected = torch.zeros_like(hidden)
    for w in (weight, weight.flip(0)):
        one = hidden.clone().requires_grad_()
        linear_token_loss(one, w, tokens, loss_fn, vectors, backend=backend)[0].backward()
        expected += one.grad
    torch.testing.assert_close(leaf.grad, expected)


def test_activation_checkpointing(device, backend):
    hidden, weight, tokens = inputs(device=device)
    loss_fn, vectors = ppo(device)

    def head(x):
        return linear_token_loss(x, weight, tokens, loss_fn, vectors, backend=backend)[0]

    grads = []
    for function in (
        head,
        lambda x: torch.utils.checkpoint.checkpoint(head, x, use_reentrant=False),
    ):
        leaf = hidden.clone().requires_grad_()
        function(leaf * 1.0).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_one_backward_a_call(device, backend):
    if backend == "reference":
        pytest.skip("plain autograd goes back as often as it is asked to")
    hidden, weight, tokens = inputs(device=device)
    loss_fn, vectors = ppo(device)
    loss, _ = linear_token_loss(hidden, weight.requires_grad_(), tokens, loss_fn, vectors)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away by the first backward"):
        loss.backward()


def test_bad_loss_functions_are_named(device, backend):
    hidden, weight, tokens = inputs(device=device)

    def call(loss_fn, **per_token):
        linear_token_loss(hidden, weight, tokens, loss_fn, per_token, backend=backend)

    with pytest.raises(TypeError, match="loss_fn: expected a function, got float"):
        call(1.0)
    with pytest.raises(TypeError, match=r"loss_fn: expected it to return \(loss, statistics\)"):
        call(lambda logprob, entropy: logprob.sum())
    with pytest.raises(ValueError, match=r"loss without dimensions, got \(37,\)"):
        call(lambda logprob, entropy: (logprob, None))
    with pytest.raises(ValueError, match=r"per_token\['x'\]: expected shape \(37,\)"):
        call(lambda logprob, entropy, x: (logprob.sum(), None), x=tokens[:3])
    with pytest.raises(ValueError, match=r"per_token\['x'\]: expected a constant"):
        x = torch.ones(37, device=device, requires_grad=True)
        call(lambda logprob, entropy, x: (logprob.sum(), None), x=x)
    with pytest.raises(ValueError, match=r"per_token\['entropy'\]: the name is taken"):
        call(lambda **kwargs: None, entropy=tokens)


MEMORY = """
import re, torch
from rlhf_kernels import linear_token_loss

def peak(what):
    with open("/proc/self/status") as file:
        return int(re.search(what + r":\\s+(\\d+) kB", file.read())[1]) << 10

hidden = torch.randn(4096, 64, requires_grad=True)
weight = torch.randn(64000, 64, requires_grad=True)
tokens = torch.randint(64000, (4096,))
def loss_fn(logprob, entropy):
    return -logprob.sum(), None
linear_token_loss(hidden[:8], weight, tokens[:8], loss_fn)[0].backward()  # libraries' own buffers
hidden.grad = weight.grad = None
before = peak("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
linear_token_loss(hidden, weight, tokens, loss_fn)[0].backward()
print(peak("VmHWM") - before)
"""


def test_memory_is_a_chunk_of_logits():
    """4096 x 64 x 64000: 1 GiB of float32 logits; 128 MiB of them, and the gradients, exist."""
    if not Path("/proc/self/clear_refs").exists() or why_not("linear_token_loss", "cpu"):
        pytest.skip("needs Linux, and the compiled kernels")
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 260 << 20
