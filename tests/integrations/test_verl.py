"""verl on our kernels: each function against its own, who calls it, the plugin, verl's tests."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import faces
import pytest
import torch

import rlhf_kernels_verl
from compare import assert_close_to_truth

verl = pytest.importorskip("verl", reason="verl is not installed: see requirements/hosts/verl.txt")
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
functional = importlib.import_module("verl.utils.torch_functional")
fused = importlib.import_module("verl.utils.experimental.torch_functional")
linear_cross_entropy_module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")

from rlhf_kernels.integrations import verl as adapter  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = float("nan"), float("inf")


@contextmanager
def spied(monkeypatch, name):
    """Counts the calls of one of our operators by the adapter."""
    calls = []
    operator = getattr(adapter, name)

    def spy(*args, **kwargs):
        calls.append(name)
        return operator(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, name, spy)
        yield calls


def random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 97 * len(shape) + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def random_tokens(vocab, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(vocab, shape, generator=generator)


def random_mask(*shape, seed=0, keep=0.6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) < keep


def leaf(x, dtype=None):
    return x.detach().to(dtype or x.dtype).clone().requires_grad_()


def run(function, tensors, rest, dtype=None):
    """Results and gradients of a loss of them with uneven upstream gradients."""
    inputs = [leaf(x, dtype) if x.is_floating_point() else x for x in tensors]
    out = function(*inputs, *rest)
    outputs = out if isinstance(out, tuple) else (out,)
    loss = sum((x.double() * random(*x.shape, seed=5).double()).sum() for x in outputs)
    wanted = [x for x in inputs if x.is_floating_point()]
    grads = torch.autograd.grad(loss, wanted) if loss.requires_grad else [None] * len(wanted)
    return outputs, grads


def assert_same(host, ours, tensors, *rest, atol=2e-6, truth=None):
    """Values, gradients, dtypes: ours errs at most twice as far from float64 as the host."""
    (a, grads), (b, our_grads) = (run(f, tensors, rest) for f in (host, ours))
    exact, exact_grads = run(truth or host, tensors, rest, torch.float64)
    for x, y, z in zip((*a, *grads), (*b, *our_grads), (*exact, *exact_grads), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape
            assert_close_to_truth(y, x, z, atol + rounding(x.dtype, z))


def rounding(dtype, truth):
    """Of an upstream gradient and of the result, where they have 16 bits."""
    if dtype not in (torch.bfloat16, torch.float16) or truth.numel() == 0:
        return 0.0
    return torch.finfo(dtype).eps * float(truth.nan_to_num().abs().max())


def pair(monkeypatch, module, name):
    """(verl's, ours) of one function."""
    host = getattr(module, name)
    with adapter.patched():
        ours = getattr(module, name)
    assert ours is not host and getattr(module, name) is host
    return host, ours


def both(host, ours, *args, **kwargs):
    """What the two do: the result, or the type of the error and what it says."""
    results = []
    for function in (host, ours):
        try:
            results.append(function(*args, **kwargs))
        except Exception as error:
            results.append((type(error), str(error)))
    return results


# ---- log-probabilities and entropies ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 7)])
@pytest.mark.parametrize("name", ["logprobs_from_logits_v2", "logprobs_from_logits_naive"])
def test_log_probs(monkeypatch, name, shape, dtype):
    host, ours = pair(monkeypatch, functional, name)
    for vocab in (1, 11, 668):
        logits = random(*shape, vocab, scale=3.0, dtype=dtype)
        labels = random_tokens(vocab, *shape)
        with spied(monkeypatch, "token_logprob") as calls:
            assert_same(host, ours, [logits, labels])
        assert calls
        assert_same(host, ours, [random(*shape, vocab + 3).to(dtype)[..., 1:-2], labels])


@pytest.mark.parametrize("name", ["logprobs_from_logits_v2", "logprobs_from_logits_naive"])
def test_log_probs_that_ours_does_not_serve_are_verls(monkeypatch, name):
    host, ours = pair(monkeypatch, functional, name)
    logits, labels = random(2, 3, 7), torch.tensor([[0, 1, 2], [3, 4, 5]])
    with spied(monkeypatch, "token_logprob") as calls:
        for args in (
            (logits[:0], labels[:0]),
            (logits[:, :0], labels[:, :0]),
            (logits, labels.int()),
            (logits, labels[:, :2]),
            (logits.transpose(1, 2).contiguous().transpose(1, 2), labels),
            (logits.long(), labels),
        ):
            expected, got = both(host, ours, *args)
            if isinstance(expected, torch.Tensor):
                assert torch.equal(expected, got)
            else:
                assert expected == got
        assert not calls
    for wrong in (-100, -1, 7):
        expected, got = both(host, ours, logits, labels.clone().fill_(wrong))
        assert expected == got and expected[0] in (IndexError, RuntimeError)


@pytest.mark.parametrize("strict", [True, False])
def test_nan_and_banned_tokens(monkeypatch, strict):
    logits = random(6, 9)
    logits[0, 2] = -INF  # banned
    logits[1, 3] = NAN
    logits[2, :] = -INF
    logits[3, :8] = -INF  # certain
    labels = torch.tensor([2, 1, 1, 8, 0, 3])
    cases = {
        "logprobs_from_logits_v2": (logits, labels),
        "logprobs_from_logits_naive": (logits, labels),
        "entropy_from_logits": (logits,),
        "entropy_from_logits_with_chunking": (logits, 4),
    }
    for name, (x, *rest) in cases.items():
        (expected,), (expected_grad,) = run(getattr(functional, name), [x], rest)
        with adapter.patched(strict=strict):
            (got,), (grad,) = run(getattr(functional, name), [x], rest)
        if strict or name.startswith("logprobs"):
            assert torch.equal(got.isnan(), expected.isnan()), name
            torch.testing.assert_close(got, expected, equal_nan=True)
            assert torch.equal(grad.isnan().any(-1), expected_grad.isnan().any(-1)), name
        else:
            assert got[[0, 3, 4, 5]].isfinite().all() and grad[[0, 3, 4, 5]].isfinite().all()
            assert got[3] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 11, 668])
def test_entropies(monkeypatch, dtype, vocab):
    host, ours = pair(monkeypatch, functional, "entropy_from_logits")
    chunked, our_chunked = pair(monkeypatch, functional, "entropy_from_logits_with_chunking")
    for shape in ((5,), (2, 3)):
        logits = random(*shape, vocab, scale=3.0, dtype=dtype)
        with spied(monkeypatch, "token_logprob") as calls:
            assert_same(host, ours, [logits], atol=1e-5)
        assert calls
    logits = random(5, vocab, scale=3.0, dtype=dtype)
    with spied(monkeypatch, "token_logprob") as calls:
        assert_same(chunked, our_chunked, [logits], 2, atol=1e-5, truth=lambda x, _: host(x))
    assert calls


def test_entropies_that_ours_does_not_serve_are_verls(monkeypatch):
    host, ours = pair(monkeypatch, functional, "entropy_from_logits")
    chunked, our_chunked = pair(monkeypatch, functional, "entropy_from_logits_with_chunking")
    logits = random(2, 3, 7)
    assert torch.equal(host(logits[0, 0]), ours(logits[0, 0]))
    assert ours(logits[:0]).shape == host(logits[:0]).shape
    for args in ((logits,), (logits[0], 0), (logits[0], -1), (logits[0, :0],)):
        expected, got = both(chunked, our_chunked, *args)
        assert type(expected) is type(got)
        assert torch.equal(expected, got) if torch.is_tensor(got) else expected == got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype(monkeypatch, dtype):
    logits, labels = random(4, 9, dtype=dtype), torch.arange(4)
    cases = {
        "logprobs_from_logits_v2": (logits, labels),
        "logprobs_from_logits_naive": (logits, labels),
        "entropy_from_logits": (logits,),
        "entropy_from_logits_with_chunking": (logits,),
    }
    with torch.autocast("cpu", torch.bfloat16):
        for name, args in cases.items():
            host, ours = pair(monkeypatch, functional, name)
            expected, got = host(*args), ours(*args)
            assert expected.dtype == got.dtype
            torch.testing.assert_close(expected, got, rtol=2e-2, atol=2e-2)


def test_entropies_may_be_written_to(monkeypatch, forwards):
    """As verl's: their backward does not read them."""
    logits = random(4, 9)
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        grads = []
        for function in pair(monkeypatch, functional, name):
            x = leaf(logits)
            function(x).mul_(2).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)
    hidden, weight, labels = head((5,), torch.float32)
    grads = []
    for function in forwards:
        x = leaf(hidden)
        function(x, weight, labels)[1].mul_(2).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    with adapter.patched():
        x = leaf(hidden)
        module = linear_cross_entropy_module
        module.linear_cross_entropy(x, weight, labels, 1.0)[1].mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, grads[0])


def test_transforms_of_torch_func_are_verls(monkeypatch):
    logits, labels = random(3, 4, 9), torch.arange(12).view(3, 4) % 9
    cases = {"entropy_from_logits": (), "logprobs_from_logits_v2": (labels,)}
    for name, rest in cases.items():
        host, ours = pair(monkeypatch, functional, name)
        for function in (host, ours):
            mapped = torch.func.vmap(function)(logits, *rest)
            torch.testing.assert_close(mapped, host(logits, *rest))
        grads = [
            torch.func.grad(lambda x, f=f, rest=rest: f(x, *rest).sum())(logits)
            for f in (host, ours)
        ]
        torch.testing.assert_close(*grads)


def test_engines_may_compile_a_head_that_is_made_inside():
    hidden, weight, labels = head((5,), torch.float32)

    def score(hidden, weight):
        return fused.FusedLinearForPPO()(hidden, weight, labels)

    with adapter.patched(), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(hidden, weight), score(hidden, weight), strict=True):
            torch.testing.assert_close(got, want)


def test_engines_may_compile_the_entropy(monkeypatch):
    host, ours = pair(monkeypatch, functional, "entropy_from_logits")
    torch._dynamo.reset()
    compiled = torch.compile(ours, dynamic=True, fullgraph=True)
    for rows in (3, 5):
        assert_same(host, compiled, [random(rows, 40, dtype=torch.bfloat16)], atol=1e-5)
    torch._dynamo.reset()


# ---- heads --------------------------------------------------------------------------------------


def head(shape, dtype, vocab=37, width=16):
    hidden = random(*shape, width, dtype=dtype)
    weight = random(vocab, width, scale=0.7, dtype=dtype)
    return hidden, weight, random_tokens(vocab, *shape)


@pytest.fixture
def forwards(monkeypatch):
    """(verl's, ours) as functions of the forward's arguments."""
    module = fused.FusedLinearForPPO(chunk_size=3)
    host, ours = pair(monkeypatch, fused.FusedLinearForPPO, "forward")
    return (lambda *args: host(module, *args)), (lambda *args: ours(module, *args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 4)])
def test_fused_head(monkeypatch, forwards, shape, dtype):
    def truth(hidden, weight, labels, temperature):
        log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
        chosen = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_p.exp() * log_p).sum(-1)

    for temperature in (1.0, 0.7, 2):
        with spied(monkeypatch, "linear_logprob") as calls:
            tensors = head(shape, dtype)
            assert_same(*forwards, list(tensors), temperature, atol=1e-5, truth=truth)
        assert calls


def test_fused_head_of_int32_tokens_and_frozen_weights(monkeypatch, forwards):
    hidden, weight, labels = head((5,), torch.float32)
    for function in forwards:
        x = leaf(hidden)
        logprob, entropy = function(x, weight, labels.int())
        (logprob.sum() - entropy.sum()).backward()
        assert weight.grad is None and x.grad is not None
        with torch.no_grad():
            assert not function(x, weight, labels)[0].requires_grad


def test_fused_head_that_ours_does_not_serve_is_verls(monkeypatch, forwards):
    hidden, weight, labels = head((2, 3), torch.float32)
    per_token = torch.tensor([[0.5], [2.0], [1.0]])
    with spied(monkeypatch, "linear_logprob") as calls:
        for args in (
            (hidden[0], weight, labels[0], per_token),
            (hidden[0], weight, labels[0], torch.tensor(0.5)),
            (hidden[0], weight, labels[0], 0.0),
            (hidden[0], weight, labels[0], -1.0),
            (hidden[0, :0], weight, labels[0, :0]),
            (hidden[:0], weight, labels[:0]),
            (hidden, weight.bfloat16(), labels),
            (hidden.unsqueeze(0), weight, labels.unsqueeze(0)),
            (hidden, weight, labels.reshape(1, 6)),
        ):
            expected, got = both(*forwards, *args)
            if isinstance(expected[0], torch.Tensor):
                assert all(
                    map(torch.equal, map(torch.nan_to_num, expected), map(torch.nan_to_num, got))
                )
            else:
                assert expected == got
        with torch.autocast("cpu", torch.bfloat16):
            for a, b in zip(*(f(hidden, weight, labels) for f in forwards), strict=True):
                assert torch.equal(a, b)
        assert not calls
    for wrong in (-100, -1, 37):
        expected, got = both(*forwards, hidden, weight, labels.clone().fill_(wrong))
        assert expected == got and expected[0] in (IndexError, RuntimeError)


def test_linear_cross_entropy(monkeypatch):
    """verl's own needs CUDA: against plain PyTorch."""

    def plain(hidden, weight, labels, temperature=1.0, reduction="none", group=None):
        z = (hidden.reshape(-1, hidden.shape[-1]) @ weight.t()).float() / temperature
        log_p = z.log_softmax(-1)
        chosen = log_p.gather(-1, labels.reshape(-1, 1)).squeeze(-1)
        return chosen, -(log_p.exp() * log_p).sum(-1)

    def truth(*args):
        hidden, weight, labels, temperature = args[:4]
        log_p = (hidden.flatten(0, -2) @ weight.t() / temperature).log_softmax(-1)
        chosen = log_p.gather(-1, labels.reshape(-1, 1)).squeeze(-1)
        return chosen, -(log_p.exp() * log_p).sum(-1)

    host, ours = pair(monkeypatch, linear_cross_entropy_module, "linear_cross_entropy")
    for shape in ((7,), (2, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = list(head(shape, dtype))
            with spied(monkeypatch, "linear_logprob") as calls:
                assert_same(plain, ours, tensors, 0.7, "none", None, atol=1e-5, truth=truth)
            assert calls
    hidden, weight, labels = head((7,), torch.float32)
    with spied(monkeypatch, "linear_logprob") as calls:
        for rest in ((1,), (1.0, "sum"), (1.0, "nothing")):
            expected, got = both(host, ours, hidden, weight, labels, *rest)
            assert expected == got and issubclass(expected[0], Exception)
        group = SimpleNamespace(size=lambda: 2)
        expected, got = both(host, ours, hidden, weight, labels, 1.0, "none", group)
        assert expected == got
        assert not calls


# ---- means, whitening, KL, advantages -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_mean(monkeypatch, dtype):
    host, ours = pair(monkeypatch, functional, "masked_mean")
    for shape in ((37,), (3, 5), (2, 3, 4), (6, 0)):
        for keep in (0.6, 1.0, 0.0):
            mask = random_mask(*shape, keep=keep)
            with spied(monkeypatch, "masked_mean") as calls:
                assert_same(host, ours, [random(*shape, dtype=dtype), mask])
            assert calls
    x, mask = random(3, 5, dtype=dtype), random_mask(3, 5)
    nan = x.clone()
    nan[~mask] = NAN
    assert_same(host, ours, [nan, mask])
    with spied(monkeypatch, "masked_mean") as calls:
        for other in (mask.long(), mask.float() * 0.5, mask[:1]):
            assert torch.equal(host(x, other), ours(x, other))
        assert torch.equal(host(x, mask, axis=-1), ours(x, mask, axis=-1))
        assert not calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten(monkeypatch, dtype, shift_mean):
    host, ours = pair(monkeypatch, functional, "masked_whiten")
    for shape in ((37,), (3, 5), (2, 3, 4)):
        for mask in (random_mask(*shape), random_mask(*shape).long(), random_mask(*shape).float()):
            x = random(*shape, scale=2.0, dtype=dtype) + 3
            with spied(monkeypatch, "masked_mean") as calls:
                assert_same(host, ours, [x, mask.bool()], shift_mean, atol=1e-5)
                truth = host(x.double(), mask)
                assert_close_to_truth(
                    ours(x, mask), host(x, mask), truth, 1e-5 + rounding(dtype, truth)
                )
            assert calls
    x = random(3, 5, dtype=dtype)
    for count in (0, 1):
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask.view(-1)[:count] = True
        expected, got = both(host, ours, x, mask)
        assert expected == got and expected[0] is ValueError
    half = torch.full((3, 5), 0.5)
    assert torch.equal(host(x, half), ours(x, half))


@pytest.mark.parametrize("strict", [True, False])
def test_nan_in_a_masked_slot_of_whitening(strict):
    x, mask = random(3, 5), random_mask(3, 5)
    x[~mask] = NAN
    expected = functional.masked_whiten(x, mask)
    with adapter.patched(strict=strict):
        got = functional.masked_whiten(x, mask)
    assert got.isfinite().all() if not strict else torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got[mask], expected[mask])


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("suffix", ["", "+"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_penalty(monkeypatch, kind, suffix, dtype):
    """Through kl_penalty, which looks its estimate up when it is called."""
    host = core_algos.kl_penalty

    def ours(*args):
        with adapter.patched():
            return core_algos.kl_penalty(*args)

    for shape in ((37,), (3, 5), (0, 4)):
        for scale in (0.1, 1.0, 12.0):
            tensors = [
                random(*shape, scale=scale, dtype=dtype),
                random(*shape, seed=1, dtype=dtype),
            ]
            with spied(monkeypatch, "kl_estimate") as calls:
                assert_same(host, ours, tensors, kind + suffix)
            assert bool(calls) == (kind in ("low_var_kl", "k3"))


def test_kl_penalty_of_what_is_infinite(monkeypatch):
    host, ours = pair(monkeypatch, core_algos, "kl_penalty_forward")
    a = torch.tensor([-INF, -1.0, NAN, -INF, -200.0])
    b = torch.tensor([-1.0, -INF, -1.0, -INF, -1.0])
    torch.testing.assert_close(host(a, b, "k3"), ours(a, b, "k3"), equal_nan=True)
    wide = random(3, 1)
    assert torch.equal(host(wide, random(3, 5), "k3"), ours(wide, random(3, 5), "k3"))
    for kind in ("full", "k4"):  # the host has neither: its own error
        expected, got = both(host, ours, a, b, kind)
        assert expected == got and expected[0] is NotImplementedError


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.float32], ids=str)
def test_gae(monkeypatch, dtype, mask_dtype):
    host, ours = pair(monkeypatch, core_algos, "compute_gae_advantage_return")
    for shape in ((1, 2), (3, 5), (13, 21)):
        for keep in (0.5, 0.9, 1.0):
            mask = random_mask(*shape, keep=keep)
            mask[0, :2] = True
            rewards, values = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
            for gamma, lam in ((1.0, 0.95), (0.9, 0.0), (0, 1), (0.99, 1.0)):
                args = (mask.to(mask_dtype), gamma, lam)
                with spied(monkeypatch, "gae") as calls:
                    got = ours(rewards, values, *args)
                assert calls
                plain = host(rewards, values, *args)
                truth = host(rewards.double(), values.double(), *args)
                for a, b, c in zip(got, plain, truth, strict=True):
                    assert a.dtype == b.dtype and not a.requires_grad
                    assert_close_to_truth(a, b, c, atol=1e-5)


def test_gae_that_ours_does_not_serve_is_verls(monkeypatch):
    host, ours = pair(monkeypatch, core_algos, "compute_gae_advantage_return")
    r, v = random(3, 4), random(3, 4, seed=1)
    m = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
    one = torch.zeros_like(m)
    one[0, 0] = 1
    nan = v.clone()
    nan[1, 2] = NAN
    with spied(monkeypatch, "gae") as calls:
        for args in (
            (r, v, m.bool(), 0.9, 0.8),
            (r, v, m * 0, 0.9, 0.8),
            (r, v, one, 0.9, 0.8),
            (r, v, m * 0.5, 0.9, 0.8),
            (r, v, m, torch.tensor(0.9), torch.tensor(0.8)),
            (r, v, m, 1.5, 0.8),
            (r, nan, m, 0.9, 0.8),
            (r[:, :0], v[:, :0], m[:, :0], 0.9, 0.8),
        ):
            expected, got = both(host, ours, *args)
            if torch.is_tensor(expected[0]):
                for a, b in zip(expected, got, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert expected == got
        assert not calls
    with adapter.patched(strict=False):
        clean = core_algos.compute_gae_advantage_return(
            r, v.masked_fill(nan.isnan(), 0), m, 0.9, 0.8
        )
        for a, b in zip(
            core_algos.compute_gae_advantage_return(r, nan, m, 0.9, 0.8), clean, strict=True
        ):
            assert torch.equal(a, b)


# ---- the policy loss ----------------------------------------------------------------------------

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
MODES += ["seq-mean-token-mean"]
if "token-sum" not in inspect.getsource(core_algos.agg_loss):  # since verl 0.9
    MODES.remove("token-sum")


def actor_config(**options):
    from verl.workers.config import ActorConfig

    info = options.pop("info", {})
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, **options)
    config.global_batch_info.update(info)
    return config


def policy_tensors(dtype=torch.float32, seed=0):
    """Ratios on both sides of both clips, of the dual clip and of the clamp; a row all masked."""
    old, log_ratio = random(5, 9, seed=seed), random(5, 9, seed=seed + 1, scale=0.5)
    log_ratio[0, :4] = torch.tensor([30.0, -30.0, 2.0, -2.0])
    mask = random_mask(5, 9, seed=seed)
    mask[0], mask[3] = True, False
    advantages = random(5, 9, seed=seed + 2)
    advantages[0, :4] = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    return old.to(dtype), (old + log_ratio).to(dtype), advantages.to(dtype), mask


def policy_losses(strict=True):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    with adapter.patched(strict=strict):
        ours = get_policy_loss_fn("rlhf_kernels")
    return get_policy_loss_fn("vanilla"), ours


INFOS = [
    {},
    {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8, "loss_scale_factor": 100},
    {"dp_size": 2, "batch_num_tokens": torch.tensor(40), "global_batch_size": 8},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", INFOS, ids=["local", "global", "tensor"])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss_is_the_vanilla_one(monkeypatch, mode, info, weighted):
    vanilla, ours = policy_losses()
    options = ({}, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5})
    for dtype, more in zip((torch.float32, torch.float64), options, strict=True):
        old, new, advantages, mask = policy_tensors(dtype)
        weights = random(5, 9, seed=8, dtype=dtype).abs() if weighted else None
        config, results = actor_config(info=info, **more), []
        with spied(monkeypatch, "policy_loss") as calls:
            for function in (vanilla, ours):
                x = leaf(new)
                loss, metrics = function(old, x, advantages, mask, mode, config, weights)
                results.append((loss.detach(), torch.autograd.grad(loss, x)[0], metrics))
        assert len(calls) == 1
        (a, grad_a, metrics_a), (b, grad_b, metrics_b) = results
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_a, grad_b, rtol=1e-5, atol=1e-6)
        assert metrics_a.keys() == metrics_b.keys()
        assert metrics_b == pytest.approx(metrics_a, rel=1e-5, abs=1e-7)
        assert metrics_b["actor/pg_clipfrac_lower"] > 0 and metrics_b["actor/pg_clipfrac"] > 0


def test_policy_loss_that_ours_does_not_serve_is_vanilla(monkeypatch):
    vanilla, ours = policy_losses()
    old, new, advantages, mask = policy_tensors()
    nan = new.clone()
    nan[~mask] = NAN
    config = actor_config()
    with spied(monkeypatch, "policy_loss") as calls:
        for args in (
            (old, new, advantages, mask.float(), "token-mean", config),
            (old, new, advantages[:, :1], mask, "token-mean", config),
            (old.bfloat16(), new.bfloat16(), advantages.bfloat16(), mask, "token-mean", config),
            (old, nan, advantages, mask, "seq-mean-token-sum", config),
            (old, nan, advantages, mask, "token-mean", config),
            (old, new, advantages, mask, "other", config),
            (old, new, advantages, mask, "token-mean", None),
            (old, new, advantages, mask, "token-mean", actor_config(info={"dp_size": 2})),
            (old, new, advantages, mask, "token-mean", actor_config(clip_ratio_c=0.5)),
        ):
            expected, got = both(vanilla, ours, *args)
            if torch.is_tensor(expected[0]):
                torch.testing.assert_close(expected[0], got[0], rtol=0, atol=0, equal_nan=True)
                assert repr(expected[1]) == repr(got[1])
            else:
                assert expected == got
        assert not calls
    x = leaf(new)
    loss, _ = ours(old, x, advantages, mask & False, "token-mean", config)
    assert loss.isnan()  # 0 / 0
    _, free = policy_losses(strict=False)
    for values, where in ((nan, mask), (new, mask & False)):
        x = leaf(values)
        loss, metrics = free(old, x, advantages, where, "seq-mean-token-sum", config)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and grad.isfinite().all()
        assert torch.tensor(list(metrics.values())).isfinite().all()


def test_policy_loss_is_registered_while_patched():
    with adapter.patched():
        assert "rlhf_kernels" in core_algos.POLICY_LOSS_REGISTRY
    assert "rlhf_kernels" not in core_algos.POLICY_LOSS_REGISTRY


def test_a_policy_loss_of_that_name_stays(monkeypatch):
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "rlhf_kernels", functional.masked_mean)
    with adapter.patched():
        (entry,) = [e for e in adapter.report() if "REGISTRY" in e.path]
        assert entry.status == "left alone" and "is registered already" in entry.reason
    assert core_algos.POLICY_LOSS_REGISTRY["rlhf_kernels"] is functional.masked_mean


@contextmanager
def of_an_unknown_version(monkeypatch):
    """Patched as a version that nobody has tested: what is replaced has passed its small calls."""
    monkeypatch.setattr(adapter._host, "tested", ((0, 1),))
    with pytest.warns(RuntimeWarning, match="not among the versions"):
        adapter.patch()
    try:
        yield {entry.path: entry for entry in adapter.report()}
    finally:
        adapter.unpatch()


def test_an_unknown_version_is_replaced_where_both_agree(monkeypatch):
    """linear_cross_entropy too, which verl cannot run on a CPU."""
    with of_an_unknown_version(monkeypatch) as entries:
        for path in entries.keys() - adapter._host.left_alone.keys():
            assert entries[path].status in ("replaced", "added"), entries[path]


@pytest.mark.parametrize("computes", ["nothing on a CPU", "the same", "nats of another base"])
def test_linear_cross_entropy_that_is_no_autograd_function(monkeypatch, computes):
    """As in verl after 0.9; where it runs on a CPU its numbers count."""

    def linear_cross_entropy(
        hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        if computes == "nothing on a CPU":
            raise RuntimeError("NVTX functions not installed")
        log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
        log_p = log_p if computes == "the same" else log_p / 2
        chosen = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_p.exp() * log_p).sum(-1)

    module = linear_cross_entropy_module
    monkeypatch.setattr(module, "linear_cross_entropy", linear_cross_entropy)
    with of_an_unknown_version(monkeypatch) as entries:
        entry = entries[f"{module.__name__}:linear_cross_entropy"]
        served = module.linear_cross_entropy is not linear_cross_entropy
    assert served == (computes != "nats of another base")
    assert served or entry.reason.endswith("the two give different numbers")
    assert "NVTX" not in entry.reason


@pytest.mark.parametrize("rounds", [True, False], ids=["0.7", "0.8 and 0.9.0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_heads_of_older_versions(monkeypatch, rounds, dtype):
    """Before 0.9.1 they know of no impl_backend; up to 0.7 log-probs have the dtype of hidden."""
    inner = fused.FusedLinearForPPO

    class Older(torch.nn.Module):
        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            args = (hidden_states, vocab_weights, input_ids, temperature)
            logprob, entropy = inner.forward(adapter._TorchBackend(), *args)
            return logprob.to(hidden_states.dtype) if rounds else logprob, entropy

    Older.__module__ = fused.__name__
    monkeypatch.setattr(fused, "FusedLinearForPPO", Older)
    tensors, older = head((2, 4), dtype), Older()
    want = older(*tensors, 0.7)
    with of_an_unknown_version(monkeypatch) as entries:
        assert entries[f"{fused.__name__}:FusedLinearForPPO.forward"].status == "replaced"
        with spied(monkeypatch, "linear_logprob") as calls:
            got = older(*tensors, 0.7)
    assert calls
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_policy_loss_that_divides_otherwise_in_one_mode_is_noticed(monkeypatch):
    """As verl 0.7.0 with seq-mean-token-sum-norm: by the horizon, not by the sequences too."""
    inner = core_algos.agg_loss

    def agg_loss(loss_mat, loss_mask, loss_agg_mode, **info):
        loss = inner(loss_mat, loss_mask, loss_agg_mode, **info)
        return loss * (3 if loss_agg_mode == "seq-mean-token-sum-norm" else 1)

    monkeypatch.setattr(core_algos, "agg_loss", agg_loss)
    with of_an_unknown_version(monkeypatch) as entries:
        (entry,) = [entry for path, entry in entries.items() if "REGISTRY" in path]
    assert entry.status == "left alone" and "different numbers" in entry.reason


@pytest.mark.parametrize("wrong", ["values", "gradients"])
def test_an_unknown_version_with_another_policy_loss_gets_none(monkeypatch, wrong):
    vanilla = core_algos.compute_policy_loss_vanilla

    def other(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        args = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config)
        loss, metrics = vanilla(*args)
        return 1.1 * loss if wrong == "values" else 1.1 * loss - 0.1 * loss.detach(), metrics

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", other)
    monkeypatch.setattr(adapter._host, "tested", ((0, 1),))
    with pytest.warns(RuntimeWarning, match="not among the versions"), adapter.patched():
        assert "rlhf_kernels" not in core_algos.POLICY_LOSS_REGISTRY


# ---- where it is called from --------------------------------------------------------------------


def test_what_is_replaced_looks_as_it_did():
    """25. Types, signatures, names, pickles: what is not called is the host's."""
    faces.assert_host_keeps_its_face(adapter._host, len(adapter._host.replacements))


IMPORTERS = [
    "verl.trainer.ppo.ray_trainer",
    "verl.trainer.ppo.prefix_grouper_utils",
    "verl.workers.engine.fsdp.transformer_impl",
    "verl.workers.utils.losses",
]


@contextmanager
def loaded(*names):
    """Modules of verl, or a skip where one of them does not import here."""
    for name in names:
        pytest.importorskip(name, exc_type=ImportError)
    yield


def test_every_holder_of_a_function_has_ours_and_gets_verls_back():
    with loaded(*IMPORTERS):
        before = {
            (name, key): value
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "verl" and module is not None
            for key, value in vars(module).items()
            if callable(value)
        }
        before_forward = fused.FusedLinearForPPO.forward
        with adapter.patched():
            entries = {entry.path.partition(":")[2]: entry for entry in adapter.report()}
            assert {e.status for e in entries.values()} == {"replaced", "added", "left alone"}
            holders = entries["masked_mean"].modules
            for name in ("verl.trainer.ppo.ray_trainer", "verl.workers.utils.losses"):
                assert f"{name}.masked_mean" in holders
                assert sys.modules[name].masked_mean is functional.masked_mean
            for entry in entries.values():
                function = entry.path.partition(":")[2]
                if entry.status == "replaced" and "." not in function:
                    original = before[tuple(entry.path.split(":"))]
                    holds = [at for at, value in before.items() if value is original]
                    assert sorted(".".join(at) for at in holds) == sorted(entry.modules)
                    assert all(vars(sys.modules[m])[key] is not original for m, key in holds)
        for (name, key), value in before.items():
            assert vars(sys.modules[name])[key] is value, (name, key)
        assert fused.FusedLinearForPPO.forward is before_forward


def test_importers_of_what_hands_on_reach_ours(monkeypatch):
    name = "verl.workers.engine.fsdp.transformer_impl"
    with loaded(name):
        if functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
            pytest.skip("flash-attn is installed: log-probs are its kernel's")
        engine = sys.modules[name]
        logits, labels = random(4, 9), torch.arange(4)
        x = leaf(logits)
        with adapter.patched(), spied(monkeypatch, "token_logprob") as calls:
            engine.logprobs_from_logits(x, labels, inplace_backward=True).sum().backward()
        assert calls and torch.equal(x.detach(), logits)


def python(code, *paths, **environment):
    """What a process of its own prints; it runs in the first of the paths, not in ours."""
    paths = [*paths, *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=paths[0],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


REPORT = """
import verl
import verl.trainer.ppo.core_algos as algos
from rlhf_kernels.integrations import verl as adapter
print(sorted({entry.status for entry in adapter.report()}))
print("rlhf_kernels" in algos.POLICY_LOSS_REGISTRY,
      hasattr(algos.compute_gae_advantage_return, "__wrapped__"))
"""


@pytest.fixture
def entry_point(tmp_path):
    """A folder with the metadata that an installation would leave, from our pyproject.toml."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = text.partition('[project.entry-points."verl.plugins"]')[2].partition("\n[")[0]
    name, _, module = group.strip().splitlines()[0].partition(" = ")
    info = tmp_path / "rlhf_kernels_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rlhf-kernels-plugin\nVersion: 1\n")
    line = f"{name} = {module.strip().strip(chr(34))}\n"
    (info / "entry_points.txt").write_text("[verl.plugins]\n" + line)
    return tmp_path


def test_plugin_patches_a_process_that_imports_verl(entry_point):
    said = python(REPORT, entry_point, RLHF_KERNELS_VERL="1")
    assert "'added'" in said and "'replaced'" in said and "True True" in said


def test_plugin_leaves_our_package_unimported_where_nobody_asks(entry_point):
    code = (
        "import sys, verl; print('rlhf_kernels' in sys.modules, 'rlhf_kernels_verl' in sys.modules)"
    )
    assert python(code, entry_point, RLHF_KERNELS_VERL="").splitlines()[0] == "False True"


def test_plugin_says_that_our_package_is_broken(entry_point):
    """verl itself hides what a plugin raises."""
    (entry_point / "rlhf_kernels").mkdir()
    (entry_point / "rlhf_kernels" / "__init__.py").write_text("raise OSError('no library')")
    said = python("import verl; print('went on')", entry_point, RLHF_KERNELS_VERL="1")
    assert "verl runs without rlhf_kernels" in said and "no library" in said and "went on" in said


def test_plugin_acts_only_where_the_environment_asks_for_it(monkeypatch, caplog):
    for asked in ("", "0", "true"):
        monkeypatch.setenv("RLHF_KERNELS_VERL", asked)
        rlhf_kernels_verl.plugin()
        assert bool(caplog.text) == (asked == "true")
        assert {entry.status for entry in adapter.report()} == {"not patched", "left alone"}
    monkeypatch.setenv("RLHF_KERNELS_VERL", "1")
    rlhf_kernels_verl.plugin()
    try:
        assert "rlhf_kernels" in core_algos.POLICY_LOSS_REGISTRY
    finally:
        adapter.unpatch()


def test_plugin_says_what_went_wrong(monkeypatch, caplog):
    def broken():
        raise RuntimeError("no kernels today")

    monkeypatch.setattr(adapter, "patch", broken)
    monkeypatch.setenv("RLHF_KERNELS_VERL", "1")
    rlhf_kernels_verl.plugin()
    assert "verl runs without rlhf_kernels" in caplog.text and "no kernels today" in caplog.text


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture
def engines(monkeypatch):
    """verl's FSDP engines around a tiny Llama in this process: their inputs, outputs and losses.

    Left out are FSDP's wrapping and Ray, which want a process group of accelerators.
    """
    name = "verl.workers.engine.fsdp.transformer_impl"
    pytest.importorskip(name, exc_type=ImportError)
    pytest.importorskip("transformers")
    implementation = sys.modules[name]
    monkeypatch.setattr(implementation, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(implementation, "get_device_name", lambda: "cpu")

    def make(kind, model, entropy):
        engine = object.__new__(getattr(implementation, kind))
        engine.module, engine._autocast_dtype = model, torch.float32
        engine.use_ulysses_sp = engine.pad_to_length = False
        engine.engine_config = SimpleNamespace(
            entropy_checkpointing=False,
            entropy_from_logits_with_chunking=entropy.endswith("chunking"),
            entropy_from_logits_chunk_size=4,
        )
        engine.compute_entropy_from_logits = getattr(functional, entropy)
        engine._get_packed_pad_size = lambda count: 0
        engine.get_data_parallel_group = lambda: None
        return engine

    return make


def train(make, *, padded=False, use_fused=False, entropy="entropy_from_logits", loss="vanilla"):
    """Two batches of PPO with GAE, two epochs each: the losses and metrics, and the weights."""
    from tensordict import TensorDict
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
    from verl import DataProto
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
    from verl.utils import tensordict_utils
    from verl.workers.config import CriticConfig
    from verl.workers.utils.losses import ppo_loss, value_loss
    from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    llama = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    policy, reference = LlamaForCausalLM(llama), LlamaForCausalLM(llama)
    llama.num_labels = 1
    critic_model = LlamaForTokenClassification(llama)
    if use_fused:
        patch_forward_with_backends(policy, True, "torch")
    actor = make("FSDPEngineWithLMHead", policy, entropy)
    ref = make("FSDPEngineWithLMHead", reference, entropy)
    critic = make("FSDPEngineWithValueHead", critic_model, entropy)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic_model.parameters()], 1e-3)
    config = actor_config(
        ppo_mini_batch_size=4,
        use_kl_loss=True,
        kl_loss_type="low_var_kl",
        kl_loss_coef=0.01,
        entropy_coeff=0.01,
        policy_loss={"loss_mode": loss},
    )
    critic_config = CriticConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=2, loss_agg_mode="token-mean"
    )

    def micro(batch, fused_head=False, with_entropy=False):
        data = TensorDict({k: v.clone() for k, v in batch.items()}, batch_size=[4])
        data = left_right_2_no_padding(data)
        tensordict_utils.assign_non_tensor(
            data,
            use_remove_padding=not padded,
            use_fused_kernels=use_fused and fused_head,
            calculate_entropy=with_entropy,
            temperature=0.9,
            batch_num_tokens=int(batch["response_mask"].sum()),
            global_batch_size=4,
            dp_size=1,
        )
        return data

    def predicted(engine, batch, name, **options):
        data = micro(batch, **options)
        with torch.no_grad():
            _, out = engine.forward_step(data, None, True)
        return no_padding_2_padding(out["model_output"][name], data).float()

    record = []
    for _ in range(2):
        prompts, responses = torch.randint(4, 300, (4, 6)), torch.randint(4, 300, (4, 8))
        ids = torch.cat([prompts, responses], 1)
        attention = torch.ones_like(ids)
        attention[0, :2], attention[1, 11:] = 0, 0  # padding on the left, a short answer
        mask = attention[:, 6:].clone()
        mask[2, 2:4] = 0  # what a tool said
        batch = {
            "input_ids": ids,
            "prompts": prompts,
            "responses": responses,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "response_mask": mask,
        }
        scores = torch.zeros(4, 8)
        scores[torch.arange(4), 7 - mask.flip(1).argmax(1)] = torch.rand(4)
        data = DataProto.from_dict(
            {
                **batch,
                "old_log_probs": predicted(actor, batch, "log_probs", fused_head=True),
                "ref_log_prob": predicted(ref, batch, "log_probs", fused_head=True),
                "values": predicted(critic, batch, "values"),
                "token_level_scores": scores,
            }
        )
        controller = core_algos.FixedKLController(0.05)
        data, _ = apply_kl_penalty(data, controller, "low_var_kl")
        data = compute_advantage(data, "gae", gamma=1.0, lam=0.95, config={})
        names = ("old_log_probs", "ref_log_prob", "advantages", "values", "returns")
        full = {**batch, **{name: data.batch[name] for name in names}}
        for _ in range(2):
            step = micro(full, fused_head=True, with_entropy=True)
            loss_a, out_a = actor.forward_step(step, partial(ppo_loss, config), False)
            loss_c, out_c = critic.forward_step(
                micro(full), partial(value_loss, critic_config), False
            )
            optimizer.zero_grad()
            (loss_a + loss_c).backward()
            optimizer.step()
            record += [loss_a.item(), loss_c.item()]
            for _, value in sorted({**out_a["metrics"], **out_c["metrics"]}.items()):
                record.append(float(value.aggregate() if hasattr(value, "aggregate") else value))
    weights = [*policy.parameters(), *critic_model.parameters()]
    record.append(float(sum(x.detach().double().abs().sum() for x in weights)))
    return record


@pytest.mark.parametrize(
    "options, operators",
    [
        ({}, ["token_logprob", "gae", "kl_estimate", "masked_mean"]),
        ({"padded": True, "entropy": "entropy_from_logits_with_chunking"}, ["token_logprob"]),
        ({"use_fused": True}, ["linear_logprob", "gae"]),
        ({"loss": "rlhf_kernels", "use_fused": True}, ["policy_loss", "linear_logprob"]),
    ],
    ids=["packed", "padded", "fused head", "our policy loss"],
)
def test_training_is_the_same(monkeypatch, engines, options, operators):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    expected = train(engines, **{**options, "loss": "vanilla"})
    with ExitStack() as stack:
        stack.enter_context(adapter.patched())
        spies = {x: stack.enter_context(spied(monkeypatch, x)) for x in operators}
        got = train(engines, **options)
    assert all(spies.values()), {name: len(calls) for name, calls in spies.items()}
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


# ---- verl's own tests ---------------------------------------------------------------------------

OWN_TESTS = [
    "trainer/ppo/test_core_algos_on_cpu.py",
    "trainer/ppo/test_loss_aggregation_on_cpu.py",
    "trainer/ppo/test_value_loss_normalization_on_cpu.py",
    "trainer/ppo/test_reinforce_pp_multiturn_on_cpu.py",
    "trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
    "trainer/ppo/test_metric_utils_on_cpu.py",
    "trainer/ppo/test_rollout_corr.py",
]


def test_verls_own_tests_pass(tmp_path):
    """Its wheel has them; VERL_TESTS may name the folder of another copy."""
    own = Path(inspect.getfile(verl)).parents[1] / "tests"
    folder = Path(os.environ.get("VERL_TESTS", own))
    if not all((folder / test).exists() for test in OWN_TESTS):
        pytest.skip("this installation of verl has no tests")
    (tmp_path / "patch_verl.py").write_text(
        "from rlhf_kernels.integrations import verl\nverl.patch()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    options = ["-q", "-p", "patch_verl", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *OWN_TESTS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
