"""OpenRLHF's functions, trainers and own tests, with ours in their place and without."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib.util
import inspect
import os
import pickle
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path
from types import SimpleNamespace

import faces
import pytest
import torch
from torch import nn

from compare import assert_close_to_truth
from ranks import run_ranks

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)

import openrlhf_stubs

from rlhf_kernels.integrations import openrlhf as adapter

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_stubs = openrlhf_stubs.install()
actor_module = pytest.importorskip("openrlhf.models.actor", reason="openrlhf cannot be imported")
import openrlhf.trainer.dpo_trainer as dpo_trainer  # noqa: E402
import openrlhf.trainer.ppo_utils.experience_maker as experience_maker  # noqa: E402
import openrlhf.trainer.ray.ppo_actor as ppo_actor  # noqa: E402
import openrlhf.trainer.sft_trainer as sft_trainer  # noqa: E402
from openrlhf.models import Actor, ValueLoss  # noqa: E402
from openrlhf.models import utils as models_utils  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402

openrlhf_stubs.remove(_stubs)
HOST = adapter.patch.__self__
MAKERS = {r.name: r for r in HOST.replacements}
LOW = (torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float32, torch.float64)
Maker = experience_maker.RemoteExperienceMaker
ORIGINALS = {
    "Actor.forward": Actor.forward,
    "log_probs_from_logits": models_utils.log_probs_from_logits,
    "compute_entropy": models_utils.compute_entropy,
    "compute_approx_kl": models_utils.compute_approx_kl,
    "RemoteExperienceMaker.get_advantages_and_returns": Maker.get_advantages_and_returns,
    "RemoteExperienceMaker.get_cumulative_returns": Maker.get_cumulative_returns,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads. A test leaves the host as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    adapter.unpatch()
    assert Actor.forward is ORIGINALS["Actor.forward"]


def test_what_is_replaced_looks_as_it_did():
    """25. Types, signatures, names, pickles: what is not called is the host's."""
    faces.assert_host_keeps_its_face(HOST, len(HOST.replacements))


class Never(Exception):
    pass


def pair(name, strict=True, may_fall_back=False):
    """The host's function, and ours, which has to serve the call itself."""
    original = ORIGINALS[name]
    asked = True  # while ours is made

    @functools.wraps(original)
    def never(*args, **kwargs):
        if asked:
            return original(*args, **kwargs)
        raise Never("the call went to the original")

    ours = MAKERS[name].make(never, strict)
    asked = may_fall_back
    return original, ours


def plain(function):
    """What is inside of torch.compile: the formula, without waiting for a compiler."""
    return inspect.unwrap(function)


def outcome(function, *args, **kwargs):
    """The result, or the error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def with_gradient(function, inputs, *args, **kwargs):
    """The result, and the gradient with respect to ``inputs`` of a scalar that weighs every
    element of the result differently."""
    leaf = inputs.detach().clone().requires_grad_()
    out = function(leaf * 1, *args, **kwargs)  # not a leaf: it may be divided in place
    torch.manual_seed(7)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    (grad,) = torch.autograd.grad((out * weights).sum(), leaf)
    assert grad.dtype == inputs.dtype
    return out.detach(), grad


def same_nan(a, b):
    return torch.equal(a.isnan(), b.isnan())


def assert_like_host(got, plain, truth, what):
    """In the host's dtype, and as close to the truth as the host."""
    assert got.dtype == plain.dtype, what
    assert_close_to_truth(got, plain, truth, atol=2e-6, what=what)


# --- log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("shape", [(3, 7, 211), (1, 1, 5), (2, 3, 4, 37), (5, 668)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs(dtype, shape, temperature):
    host, ours = pair("log_probs_from_logits")
    torch.manual_seed(0)
    if len(shape) == 4 and dtype in LOW:
        shape = shape[1:]
    logits = (4 * torch.randn(shape)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1])
    results = [
        with_gradient(function, x, labels, temperature)
        for function, x in ((ours, logits), (host, logits), (host, logits.double()))
    ]
    assert results[0][0].dtype == dtype
    for got, own, truth, what in zip(*results, ("log-probs", "gradient"), strict=True):
        assert_like_host(got, own, truth, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_divide_the_logits_in_place(dtype):
    host, ours = pair("log_probs_from_logits")
    logits, labels = torch.randn(2, 4, 33).to(dtype), torch.randint(33, (2, 4))
    divided = [logits.clone(), logits.clone()]
    ours(divided[0], labels, 0.7), host(divided[1], labels, 0.7)
    assert torch.equal(*divided) and not torch.equal(divided[0], logits)
    ours(divided[0], labels), ours(divided[0], labels, 1.0)
    assert torch.equal(*divided)
    leaf = logits.requires_grad_()
    assert outcome(ours, leaf, labels, 0.7) == outcome(host, leaf, labels, 0.7)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_of_banned_and_nan_logits(dtype, strict):
    host, ours = pair("log_probs_from_logits", strict)
    torch.manual_seed(0)
    logits = torch.randn(6, 1, 40).to(dtype)
    logits[0, 0, 3:30] = -torch.inf  # among them its label
    logits[1, 0, 30:] = -torch.inf
    logits[2, 0, 11] = torch.nan
    logits[3] += 1e4
    logits[4] = -torch.inf
    labels = torch.full((6, 1), 7)
    (got, grad), (want, host_grad) = (with_gradient(f, logits, labels) for f in (ours, host))
    assert same_nan(got, want) and got[0] == want[0] == -torch.inf
    finite = want.isfinite().squeeze(1)
    atol = 4e-2 if dtype in LOW else 2e-3  # the host's, at an offset of 1e4
    torch.testing.assert_close(got[finite], want[finite], atol=atol, rtol=0)
    assert same_nan(grad[finite], host_grad[finite]) and (grad[1, 0, 30:] == 0).all()


def test_log_probs_of_strided_logits():
    host, ours = pair("log_probs_from_logits")
    logits = torch.randn(3, 6, 50)[:, :-1, 4:]
    labels = torch.randint(46, (3, 6))[:, 1:]
    torch.testing.assert_close(ours(logits, labels), host(logits, labels), atol=2e-6, rtol=2e-6)


def cases_of_log_probs():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(2, 3, 7).to(dtype)
        yield "label -100", logits, labels - 100
        yield "label V", logits, labels + 7
        yield "no rows", logits[:0], labels[:0]
        yield "no columns", logits[:, :0], labels[:, :0]
        yield "no words", logits[..., :0], labels
        yield "one row", logits[0, 0], labels[0, 0]
        yield "fewer labels", logits, labels[:, :2]
        yield "fewer rows of labels", logits, labels[:1]
        yield "labels of 32 bits", logits, labels.int()
        yield "labels of floats", logits, labels.float()
        yield "words far apart", torch.randn(2, 7, 3).to(dtype).mT, labels
        yield "whole numbers", logits.long(), labels
        yield "K labels", logits, torch.zeros(2, 3, 2, dtype=torch.int64)


@pytest.mark.parametrize("case", list(cases_of_log_probs()), ids=lambda case: case[0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_at_the_edges(case, temperature):
    host, ours = pair("log_probs_from_logits", may_fall_back=True)
    _, logits, labels = case
    got, want = (outcome(f, logits.clone(), labels, temperature) for f in (ours, host))
    if isinstance(want, str):
        assert got == want
    else:
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


# --- entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy(dtype, strict):
    host, ours = pair("compute_entropy", strict)
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 5, 300)).to(dtype)
    results = [
        with_gradient(function, x)
        for function, x in (
            (ours, logits),
            (plain(host), logits),
            (plain(host), logits.double()),
        )
    ]
    for got, own, truth, what in zip(*results, ("entropy", "gradient"), strict=True):
        assert_like_host(got, own, truth, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_of_banned_logits(dtype):
    host, ours = pair("compute_entropy")
    logits = torch.randn(4, 1, 40).to(dtype)
    logits[0, 0, 3], logits[1, 0, 5] = -torch.inf, torch.nan
    logits[2] = -torch.inf
    results = [with_gradient(f, logits) for f in (ours, plain(host))]
    for got, want in zip(*results, strict=True):
        assert same_nan(got, want)
    entropy, grad = with_gradient(pair("compute_entropy", strict=False)[1], logits)
    assert entropy[[0, 3]].isfinite().all() and grad[[0, 3]].isfinite().all()
    assert entropy[1].isnan()
    p = logits[0].double().softmax(-1)
    torch.testing.assert_close(entropy[0].double(), -torch.xlogy(p, p).sum(-1), atol=2e-2, rtol=0)


def test_entropy_beside_the_compiled_one():
    host, ours = pair("compute_entropy")
    logits = torch.randn(2, 6, 97)
    for x in (logits, logits.bfloat16()):
        (got, grad), (want, host_grad) = (with_gradient(f, x) for f in (ours, host))
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=1e-5)
        torch.testing.assert_close(grad.float(), host_grad.float(), atol=2e-2, rtol=1e-5)


# --- KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6.0, 40.0])
def test_k3(scale, dtype, strict):
    host, ours = pair("compute_approx_kl", strict)
    torch.manual_seed(0)
    p, q = (scale * torch.randn(2, 5, 300)).to(dtype).unbind()

    def truth(p, q):
        d = (p - q).clamp(min=-10)
        return (torch.expm1(-d) + d).clamp(-10, 10)

    results = [
        with_gradient(f, x, y, kl_estimator="k3") for f, x, y in ((ours, p, q), (host, p, q))
    ]
    exact = with_gradient(truth, p.double(), q.double())
    (got, grad), (own, host_grad) = results
    assert got.dtype == own.dtype == torch.float32
    assert_close_to_truth(got, own, exact[0], atol=1e-9)
    assert_close_to_truth(grad, host_grad, exact[1], atol=1e-6)


def test_k3_where_clamps_bind():
    host, ours = pair("compute_approx_kl")
    d = [
        0.0,
        1e-7,
        -2.6,
        -2.62,
        -9.9,
        -10.0,
        -10.1,
        -19.9,
        -20.1,
        -90.0,
        9.9,
        10.5,
        10.9,
        11.1,
        25.0,
    ]
    d = torch.tensor([*d, torch.inf, -torch.inf, torch.nan])
    results = [with_gradient(f, d, torch.zeros(18), kl_estimator="k3") for f in (ours, host)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6, equal_nan=True)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k4"])
def test_kl_that_is_the_original(estimator, unbiased):
    host, ours = pair("compute_approx_kl", may_fall_back=True)
    p, q, old = torch.randn(3, 4, 6).unbind()
    for args in ((p, q), (p, q, old), (p, q[:1]), (p, 0 * q.long()), (p[:0], q[:0])):
        given = {"kl_estimator": estimator, "unbiased_gradient": unbiased}
        got, want = (outcome(f, *args, **given) for f in (ours, host))
        if isinstance(want, str):
            assert got == want
        else:
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
            assert torch.equal(got, want) or (estimator == "k3" and not unbiased)


# --- advantages -----------------------------------------------------------------------------------


def masks(rows, length):
    """None, and masks with interior gaps, nothing valid, left and right padding."""
    mask = torch.rand(rows, length) > 0.4
    if rows > 1:
        mask[0], mask[1] = False, True
    yield None
    yield mask
    yield mask.long()
    yield mask.float()
    yield mask.bfloat16()


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (1, 0.95), (0.9, 0.0), (0.0, 1)])
@pytest.mark.parametrize("shape", [(4, 23), (1, 1), (0, 5), (17, 9), (3, 300)])
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)])
def test_advantages(dtypes, shape, gamma, lam):
    torch.manual_seed(0)
    values, rewards = (torch.randn(shape).to(dtype) for dtype in dtypes)
    for mask in masks(*shape):
        host, ours = pair("RemoteExperienceMaker.get_advantages_and_returns")
        got, own = (f(None, values, rewards, mask, gamma, lam) for f in (ours, host))
        truth = host(None, values.double(), rewards.double(), mask, gamma, lam)
        for x, y, z in zip(got, own, truth, strict=True):
            assert_like_host(x, y, z, f"advantages with a mask of {mask is None or mask.dtype}")
            assert not x.requires_grad
        host, ours = pair("RemoteExperienceMaker.get_cumulative_returns")
        got, own = (f(None, rewards, mask, gamma) for f in (ours, host))
        assert_like_host(got, own, host(None, rewards.double(), mask, gamma), "returns")


def test_advantages_are_not_carried_across_gaps():
    _, ours = pair("RemoteExperienceMaker.get_advantages_and_returns")
    mask = torch.tensor([[1, 0, 1]])
    values, rewards = torch.tensor([[1.0, 50.0, 2.0]]), torch.tensor([[0.5, 70.0, 3.0]])
    advantages, returns = ours(None, values, rewards, mask, 0.5, 0.5)
    # at 2: 3 - 2 = 1; at 1: 0.5 * 2 - 0 + 0.25 * 1 = 1.25; at 0: 0.5 - 1 + 0.25 * 1.25
    torch.testing.assert_close(advantages, torch.tensor([[-0.1875, 1.25, 1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.8125, 1.25, 3.0]]))


def test_advantages_of_nan_and_of_what_requires_gradients():
    host, ours = pair("RemoteExperienceMaker.get_advantages_and_returns")
    values, rewards = torch.randn(2, 3, 6).unbind()
    values[0, 2], rewards[1, 3] = torch.nan, torch.nan
    values.requires_grad_(), rewards.requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]])
    for x, y in zip(*(f(None, values, rewards, mask, 0.9, 0.8) for f in (ours, host)), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
        assert not x.requires_grad and not y.requires_grad
    host, ours = pair("RemoteExperienceMaker.get_cumulative_returns")
    x, y = (f(None, rewards, mask, 0.9) for f in (ours, host))
    torch.testing.assert_close(x, y, equal_nan=True)
    assert not x.requires_grad


def test_advantages_at_the_edges():
    x, mask = torch.randn(3, 4), torch.ones(3, 4)
    for args in (
        (x[:, :0], x[:, :0], mask[:, :0], 0.9, 0.9),
        (x, x, mask, 1.5, 0.9),
        (x, x, mask, torch.tensor(0.9), 0.9),
        (x, x, mask[:, :1], 0.9, 0.9),
        (x, x[:, :3], None, 0.9, 0.9),
        (x[:1], x, None, 0.9, 0.9),
        (x, x, mask[:2], 0.9, 0.9),
        (x.long(), x, mask, 0.9, 0.9),
        (x, x.long(), mask, 0.9, 0.9),
        (x[0], x[0], mask[0], 0.9, 0.9),
    ):
        for name, given in (
            ("RemoteExperienceMaker.get_advantages_and_returns", args),
            ("RemoteExperienceMaker.get_cumulative_returns", args[1:4]),
        ):
            host, ours = pair(name, may_fall_back=True)
            got, want = (outcome(f, None, *given) for f in (ours, host))
            if isinstance(want, str):
                assert got == want
            else:
                torch.testing.assert_close(got, want)


# --- Actor ----------------------------------------------------------------------------------------

V = 101
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def language_model(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # logits of some size
    return model


def make_actor(
    family="llama", temperature=1.0, dtype=torch.float32, seed=0, packing=False, **changes
):
    actor = Actor(language_model(family, seed, **changes).to(dtype), temperature=temperature)
    actor.packing_samples = packing
    return actor


def batch(rows=3, length=9, actions=4, seed=1, left=2):
    """Sequences, action mask and attention mask: a padding on the left, one on the right, a gap."""
    torch.manual_seed(seed)
    sequences, attention = torch.randint(3, V, (rows, length)), torch.ones(rows, length).long()
    attention[0, :left], attention[1, -2:] = 0, 0
    mask = torch.ones(rows, actions).long()
    mask[1, -2:], mask[-1, 1] = 0, 0
    return sequences.masked_fill(attention == 0, 0), mask, attention


class Served(list):
    autocast = False


@pytest.fixture
def served(monkeypatch):
    """The shapes of tokens that went through linear_logprob, and whether under autocast."""
    seen = Served()
    linear_logprob = adapter.linear_logprob

    def spy(hidden, **kwargs):
        seen.append(tuple(kwargs["tokens"].shape))
        seen.autocast = torch.is_autocast_enabled("cpu")
        return linear_logprob(hidden, **kwargs)

    monkeypatch.setattr(adapter, "linear_logprob", spy)
    return seen


CALLS = {
    "actions": lambda s, m, a: ((s, m, a), {}),
    "actions and output": lambda s, m, a: ((s, m, a), {"return_output": True}),
    "actions, output and entropy": lambda s, m, a: (
        (s, m),
        {"attention_mask": a, "return_output": True, "return_entropy": True},
    ),
    "mask of booleans": lambda s, m, a: ((s, m.bool(), a.bool()), {"packed_seq_lens": [3]}),
    "mask of floats": lambda s, m, a: ((s, m * 0.5, a), {"allgather_logits": True}),
    "all actions": lambda s, m, a: ((s, a[:, 1:], a), {}),
    "actions of nobody": lambda s, m, a: ((s, 0 * m, a), {}),
    "all log-probs": lambda s, m, a: ((s, None, a), {"return_logprobs": True}),
    "actions, though all are asked for": lambda s, m, a: ((s, m, a), {"return_logprobs": True}),
    "all log-probs and output": lambda s, m, a: (
        (s,),
        {"attention_mask": a, "return_logprobs": True, "return_output": True},
    ),
    "all of it": lambda s, m, a: (
        (s,),
        {
            "attention_mask": a,
            "return_logprobs": True,
            "return_output": True,
            "return_entropy": True,
        },
    ),
}


def gradients(actor, result):
    """By name, of a scalar that weighs all that is differentiable in a result of an Actor."""
    outputs = result if isinstance(result, tuple) else (result,)
    tensors = [outputs[0]]
    if len(outputs) == 2:
        tensors += [getattr(outputs[1], n, None) for n in ("entropy", "aux_loss")]
    torch.manual_seed(2)
    scalar = sum((x * torch.randn(x.shape)).sum() for x in tensors if x is not None)
    actor.zero_grad()
    scalar.backward()
    return {n: p.grad.clone() for n, p in actor.named_parameters() if p.grad is not None}


def assert_same_result(got, want, atol, rtol=1e-5):
    if isinstance(want, tuple):
        assert isinstance(got, tuple) and len(got) == len(want) == 2
        (got, output), (want, own) = got, want
        assert isinstance(output, type(own)) and list(output) == list(own)
        assert hasattr(output, "entropy") == hasattr(own, "entropy")
        if hasattr(own, "entropy"):
            assert output.entropy.dtype == own.entropy.dtype and output.entropy.requires_grad
            torch.testing.assert_close(output.entropy, own.entropy, atol=atol, rtol=rtol)
    assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("packing", [False, True])
def test_actor(call, temperature, strict, packing, served):
    actor, given = make_actor(temperature=temperature, packing=packing), batch()
    args, kwargs = CALLS[call](*given)
    want = actor(*args, **kwargs)
    host_gradients = gradients(actor, want)
    assert not served
    with adapter.patched(strict=strict):
        got = actor(*args, **kwargs)
        assert len(served) == 1
        assert_same_result(got, want, atol=2e-5)
        ours = gradients(actor, got)
    assert ours.keys() == host_gradients.keys()
    for name, gradient in host_gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    if call == "actions" and not packing:
        assert served == [(3, 4)]  # the prompt does not reach the head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("call", ["actions", "all of it"])
@pytest.mark.parametrize("packing", [False, True])
def test_actor_of_other_dtypes(call, dtype, packing, served):
    actor = make_actor(temperature=0.6, dtype=dtype, packing=packing)
    given = batch(8, 30, 20, left=0)
    exact = copy.deepcopy(actor).double()
    args, kwargs = CALLS[call](*given)

    def run(a):
        result = a(*args, **kwargs)
        grads = gradients(a, result)
        first, output = result if isinstance(result, tuple) else (result, None)
        return first, getattr(output, "entropy", first), grads["model.lm_head.weight"]

    host, truth = run(actor), run(exact)
    with adapter.patched():
        ours = run(actor)
    assert served and ours[0].dtype == host[0].dtype == torch.float32
    for got, own, exactly in zip(ours, host, truth, strict=True):
        assert got.dtype == own.dtype
        assert_close_to_truth(got, own, exactly, atol=1e-5)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
        ("cohere", {"logit_scale": 0.0625}),
        ("phi", {"num_key_value_heads": 2}),  # a bias
        ("mixtral", {"num_local_experts": 2, "output_router_logits": True}),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_actor_of_other_families(family, changes, packing, served):
    actor, given = make_actor(family, temperature=0.8, packing=packing, **changes), batch()
    actor.eval()
    args, kwargs = CALLS["all of it"](*given)
    want = actor(*args, **kwargs)
    own = gradients(actor, want)
    with adapter.patched():
        got = actor(*args, **kwargs)
        ours = gradients(actor, got)
        assert served
        assert_same_result(got, want, atol=2e-5)
        torch.testing.assert_close(got[1].logits, want[1].logits)
    for name, gradient in own.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    if family == "mixtral":
        torch.testing.assert_close(got[1].aux_loss, want[1].aux_loss)


def looked_at():
    yield "attribute", lambda output: output.logits
    yield "key", lambda output: output["logits"]
    yield "position", lambda output: output[0]
    yield "slice", lambda output: output[:1][0]
    yield "tuple", lambda output: output.to_tuple()[0]
    yield "get", lambda output: output.get("logits")
    yield "items", lambda output: dict(output.items())["logits"]
    yield "values", lambda output: next(iter(output.values()))
    yield "dict", lambda output: dict(output)["logits"]
    yield "keywords", lambda output: (lambda logits, **rest: logits)(**output)
    yield "copy", lambda output: copy.copy(output).logits
    yield "replace", lambda output: type(output)(**output).logits
    yield "pytree", lambda output: torch.utils._pytree.tree_leaves(output)[0]


@pytest.mark.parametrize(
    "how, look", list(looked_at()), ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("temperature, packing", [(1.0, False), (0.6, False), (0.6, True)])
def test_logits_are_there_when_looked_at(how, look, temperature, packing):
    actor = make_actor(temperature=temperature, packing=packing)
    sequences, mask, attention = batch()
    with adapter.patched():
        _, output = actor(sequences, mask, attention, return_output=True)
    _, own = actor(sequences, mask, attention, return_output=True)
    assert "logits" in output and len(output) == len(own) and "made" not in str(output.keys())
    assert type(output) is not type(own)  # not yet
    logits = look(output)
    assert logits.dtype == torch.float32 and logits.requires_grad
    torch.testing.assert_close(logits, own.logits)
    if how != "keywords":
        assert output.logits is output["logits"] and type(output) is type(own)
    grads = []
    for z in (logits, own.logits):
        actor.zero_grad()
        z.square().sum().backward()
        grads.append(actor.model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_an_output_goes_with_its_last_user():
    """Not with the next collection of garbage: it has the hidden states, and they their graph."""
    actor, given = make_actor(), batch()
    with adapter.patched():
        logprob, output = actor(*given, return_output=True)
    gone = weakref.ref(output)
    gc.disable()
    try:
        del logprob, output
        assert gone() is None
    finally:
        gc.enable()


def test_outputs_without_logits_are_outputs_else():
    actor, (sequences, mask, attention) = make_actor(), batch()
    with adapter.patched(), torch.no_grad():
        _, output = actor(sequences, mask, attention, return_output=True)
        _, written = actor(sequences, mask, attention, return_output=True)
    kind = transformers.modeling_outputs.CausalLMOutputWithPast
    assert isinstance(output, kind) and output.past_key_values is not None
    assert output.get("aux_loss") is None and output.get("none", 3) == 3
    assert output["past_key_values"] is output.past_key_values is output.get("past_key_values")
    held = {name: getattr(output, name) for name in output if name != "logits"}
    assert held and all(output[name] is output.get(name) is x for name, x in held.items())
    assert "past_key_values" in output and "nothing" not in output
    assert type(output) is not kind  # none of it has asked for logits
    with pytest.raises(KeyError):
        output["aux_loss"]
    logits = torch.zeros(2)
    written["logits"] = logits
    assert type(written) is kind and written.logits is logits is written[0]
    output.past_key_values = None  # which can be pickled
    again = pickle.loads(pickle.dumps(output.copy()))
    assert torch.equal(again.logits, output.logits) and not output.logits.requires_grad


def test_keys_that_were_renamed_are_found_without_logits():
    """As of transformers 5.24, where past_key_values is an old name of cache."""

    @dataclasses.dataclass
    class Renamed(transformers.utils.ModelOutput):
        logits: torch.Tensor | None = None
        now: torch.Tensor | None = None

        def __getitem__(self, key):
            return super().__getitem__("now" if key == "before" else key)

    output, made = Renamed(torch.zeros(3), now=torch.ones(2)), torch.ones(3)
    vars(output).pop("logits")
    output.__class__ = adapter._later(Renamed)
    output.make_logits = lambda: made
    assert output["before"] is output["now"] is output.get("before") is output.now
    assert type(output) is not Renamed and output["logits"] is made and type(output) is Renamed


def test_actor_without_actions_and_log_probs_is_the_original(served):
    actor, (sequences, _, attention) = make_actor(temperature=0.6), batch()
    want = actor(sequences, attention_mask=attention, return_output=True, return_entropy=True)
    with adapter.patched():
        got = actor(sequences, attention_mask=attention, return_output=True, return_entropy=True)
    assert not served and torch.equal(got.logits, want.logits) and type(got) is type(want)
    torch.testing.assert_close(got.entropy, want.entropy)


class TableLM(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V))

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.table[input_ids])


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


def of_no_transformers(actor):
    actor.model = TableLM()


def without_packing_samples(actor):
    del actor.packing_samples


def with_a_head_of_its_own(actor):
    actor.model.lm_head.__class__ = Shifted


def with_lora_on_the_head(actor):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    actor.model = peft.get_peft_model(actor.model, config)


def with_a_temperature_that_is_a_tensor(actor):
    actor.temperature = torch.tensor(0.6)


def with_images(actor):
    actor.is_vlm = True


@pytest.mark.parametrize(
    "change",
    [
        of_no_transformers,
        without_packing_samples,
        with_a_head_of_its_own,
        with_lora_on_the_head,
        with_a_temperature_that_is_a_tensor,
        with_images,
    ],
)
def test_actor_that_is_the_original(change, served):
    actor, given = make_actor(), batch()
    change(actor)
    want = outcome(actor, *given)
    with adapter.patched():
        got = outcome(actor, *given), outcome(actor, *given)
    assert not served
    if isinstance(want, str):
        assert got == (want, want)
    else:
        for x in got:
            torch.testing.assert_close(x, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, m, a: ((s, m), {}),
        lambda s, m, a: ((s, m, a[:, :-1]), {}),
        lambda s, m, a: ((s, m[:, :0], a), {}),
        lambda s, m, a: ((s, torch.ones(3, 9), a), {}),
        lambda s, m, a: ((s, m[:1], a), {}),
        lambda s, m, a: ((s[:, :1], m[:, :1], a[:, :1]), {}),
        lambda s, m, a: ((s[:0], m[:0], a[:0]), {}),
        lambda s, m, a: ((s.int(), m, a), {}),
        lambda s, m, a: ((s, m, a), {"return_entropy": True}),
        lambda s, m, a: ((s, None, a), {}),
        lambda s, m, a: ((s + V, m, a), {}),
        lambda s, m, a: ((s, m, a), {"output_attentions": True}),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_actor_calls_that_are_the_original(change, packing, served):
    actor = make_actor(packing=packing)
    args, kwargs = change(*batch())
    want = outcome(actor, *args, **kwargs)
    with adapter.patched():
        got = outcome(actor, *args, **kwargs)
    assert not served and type(got) is type(want)
    if isinstance(want, str):
        assert got == want
    else:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_a_group_says_nothing_where_nothing_is_packed(served):
    actor, given = make_actor(), batch()
    want = actor(*given, ring_attn_group="a group")
    with adapter.patched():
        torch.testing.assert_close(actor(*given, ring_attn_group="a group"), want)
    assert served


def test_packing_that_is_not_known_is_the_original(served, monkeypatch):
    actor, given = make_actor(packing=True), batch()
    monkeypatch.delattr(actor_module, "gather_and_pad_tensor")
    want = outcome(actor, *given)
    with adapter.patched():
        assert outcome(actor, *given) == want
    assert not served and want.startswith("NameError")


def test_a_head_that_cannot_be_expressed_is_tried_once(served, monkeypatch):
    """With dropout, so that a run in vain would show in the random numbers."""
    actor, given = make_actor(attention_dropout=0.5), batch()
    inner = actor.model.forward
    runs = []

    def forward(*args, **kwargs):
        runs.append(1)
        output = inner(*args, **kwargs)
        output.logits = output.logits + output.logits.flip(-1)
        return output

    actor.model.forward = forward
    actor.train()
    torch.manual_seed(3)
    want = [actor(*given) for _ in range(2)]
    with (
        adapter.patched(),
        pytest.warns(RuntimeWarning, match="makes its logits: .*cannot be expressed") as told,
    ):
        torch.manual_seed(3)
        got = [actor(*given) for _ in range(2)]
    assert not served and len(runs) == 2 + 3 and len(told) == 1
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_an_error_of_the_model_says_nothing_of_its_head(served, monkeypatch):
    actor, given = make_actor(), batch()
    layer = actor.model.model.layers[0]
    with adapter.patched():
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", lambda *args, **kwargs: 1 + "1")
            assert outcome(actor, *given).startswith("TypeError: unsupported operand")
        actor(*given)
    assert len(served) == 1


@pytest.mark.parametrize("packing", [False, True])
def test_actor_of_a_head_that_bans_tokens_under_a_softcap(packing, served):
    """Where nothing is banned: the logit is -softcap."""
    actor = make_actor("gemma2", final_logit_softcapping=2.0, head_dim=16, packing=packing)
    actor.model.lm_head.bias = nn.Parameter(torch.zeros(V))
    with torch.no_grad():
        actor.model.lm_head.bias[3] = -torch.inf
    call = {"return_output": True, "return_entropy": True}
    want = actor(*batch(), **call)[1].entropy
    with adapter.patched():
        got = actor(*batch(), **call)[1].entropy
    assert served and want.isfinite().all()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_padding_may_be_the_last_label_of_what_is_packed(served):
    """Which no embedding has looked up."""
    actor, (sequences, mask, attention) = make_actor(packing=True), batch()
    mask[1] = 1  # that of the last token before the padding too
    for pad in (0, V, -1, -100):
        given = sequences.masked_fill(attention == 0, pad), mask, attention
        want = outcome(actor, *given)
        with adapter.patched():
            got = outcome(actor, *given)
        assert type(got) is type(want)
        if isinstance(want, str):
            assert got == want
        else:
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert served


def test_actor_of_a_head_that_bans_tokens(served):
    actor, given = make_actor(), batch()
    head = actor.model.lm_head
    head.bias = nn.Parameter(torch.zeros(V))
    call = {"return_output": True, "return_entropy": True}
    with torch.no_grad():
        head.bias[3] = -torch.inf
    want = actor(*given, **call)[1].entropy
    with adapter.patched():
        got = actor(*given, **call)[1].entropy
    assert served and want.isnan().all() and got.isnan().all()
    with adapter.patched(strict=False):
        assert actor(*given, **call)[1].entropy.isfinite().all()


def test_entropies_may_be_written_to(served):
    """As the host's: the backward does not read them there."""
    actor, given = make_actor(), batch()
    logits = torch.randn(2, 5, 40)

    def run():
        actor.zero_grad()
        _, output = actor(*given, return_output=True, return_entropy=True)
        z = logits.clone().requires_grad_()
        entropy = models_utils.compute_entropy(z)
        (output.entropy.mul_(3).sum() + entropy.mul_(2).sum()).backward()
        return actor.model.lm_head.weight.grad, z.grad

    want = run()
    with adapter.patched():
        got = run()
    assert served
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_beyond_the_head_are_the_host_s_error(packing):
    actor, (sequences, mask, attention) = make_actor(packing=packing), batch()
    actor.model.lm_head = nn.Linear(32, V - 1, bias=False)
    sequences[1, 6] = V - 1
    want = outcome(actor, sequences, mask, attention)
    with adapter.patched():
        assert outcome(actor, sequences, mask, attention) == want
    assert want.startswith("RuntimeError")


@pytest.mark.parametrize("packing", [False, True])
def test_actor_that_is_compiled(packing, served):
    actor, given = make_actor(temperature=0.6, packing=packing), batch()
    want = actor(*given)
    with adapter.patched():
        got = torch.compile(actor, backend="eager")(*given)
    assert served
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_actor_with_dropout_draws_the_same(served):
    actor, given = make_actor(attention_dropout=0.5), batch()
    actor.train()
    torch.manual_seed(3)
    want = actor(*given)
    with adapter.patched():
        torch.manual_seed(3)
        torch.testing.assert_close(actor(*given), want, atol=2e-5, rtol=1e-5)
    assert served


@pytest.mark.parametrize("packing", [False, True])
def test_actor_keeps_nan_where_the_host_has_it(packing, served):
    actor, (sequences, mask, attention) = make_actor(packing=packing), batch()
    with torch.no_grad():
        if packing:  # there is no padding, but a masked action
            sequences[2, -2] = 0
        actor.model.model.embed_tokens.weight[0] = torch.nan
    want = actor(sequences, mask, attention)
    with adapter.patched():
        got = actor(sequences, mask, attention)
    assert same_nan(got, want) and want.isnan().any()
    with adapter.patched(strict=False):
        got = actor(sequences, mask, attention)
    assert (got[mask == 0] == 0).all()


class Engine(nn.Module):
    """A wrapper that hands calls on, and has autocast inside of its own forward only."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*args, **kwargs)


@pytest.mark.parametrize("call", ["actions", "all of it"])
@pytest.mark.parametrize("packing", [False, True])
def test_actor_of_an_engine_with_autocast(call, packing, served):
    actor, given = make_actor(temperature=0.6, packing=packing), batch(8, 30, 20, left=0)
    args, kwargs = CALLS[call](*given)
    exact = actor(*args, **kwargs)
    actor.model = Engine(actor.model)
    want = actor(*args, **kwargs)
    host_gradients = gradients(actor, want)
    with adapter.patched():
        got = actor(*args, **kwargs)
        ours = gradients(actor, got)
    assert served and served.autocast and ours.keys() == host_gradients.keys()
    for name, gradient in host_gradients.items():
        assert ours[name].dtype == gradient.dtype
        assert (ours[name] - gradient).norm() < 0.03 * gradient.norm(), name
    if call == "all of it":
        torch.testing.assert_close(got[1].logits, want[1].logits, atol=0, rtol=0)
        got, want, exact = got[0], want[0], exact[0]
    assert not torch.equal(want, exact)  # in 16 bits
    assert_close_to_truth(got, want, exact, atol=1e-4)


RING = """
import os, sys
import torch
import openrlhf_stubs

rank = int(os.environ["RANK"])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2
)
from torch.distributed.nn import all_gather

openrlhf_stubs.FACES["flash_attn.utils.distributed"]["all_gather"] = (
    lambda x, group: torch.cat(all_gather(x.contiguous(), group))
)
import test_openrlhf as tests
from openrlhf.models import ring_attn_utils

ring_attn_utils.update_ring_attn_params = lambda cu_seqlens: None  # each rank sees its own slice
tests.actor_module.compute_entropy = tests.plain(tests.actor_module.compute_entropy)
group = {"ring_attn_group": torch.distributed.group.WORLD}
for length, strict in (9, True), (10, False):  # 23 tokens, which are padded, and 26
    for name, call in tests.CALLS.items():
        actor = tests.make_actor(temperature=0.6, packing=True)
        args, kwargs = call(*tests.batch(length=length))
        want = actor(*args, **kwargs, **group)
        own = tests.gradients(actor, want)
        with tests.adapter.patched(strict=strict):
            tests.adapter.token_logprob = None  # the kernels of logits are not called
            got = actor(*args, **kwargs, **group)
            tests.assert_same_result(got, want, atol=2e-5)
            ours = tests.gradients(actor, got)
        for n, gradient in own.items():
            torch.testing.assert_close(ours[n], gradient, rtol=1e-4, atol=1e-4, msg=n)
        if isinstance(want, tuple):
            torch.testing.assert_close(got[1].logits, want[1].logits)
print("every case passed")
"""


def test_actor_with_ring_attention(tmp_path):
    """Each rank has the head of a slice. The attention itself is not here: it wants GPUs."""
    program = tmp_path / "process.py"
    program.write_text(RING)
    run_ranks(program, tmp_path, 2, PYTHONPATH=environment()["PYTHONPATH"])


@pytest.mark.parametrize("packing", [False, True])
def test_actor_makes_no_logits(packing):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x._base is None and x.shape[-1:] == (V,):
                    self.size = max(self.size, x.numel())
            return out

    actor, given = make_actor(packing=packing), batch()
    with Largest() as host:
        actor(*given, return_output=True)
    with adapter.patched(), Largest() as ours:
        actor(*given, return_output=True)
    # Where samples are packed there is no padding to score: two actions less.
    tokens, actions = (3 * 9 - 4, 3 * 4 - 2) if packing else (3 * 9, 3 * 4)
    assert host.size >= tokens * V and ours.size <= actions * V
    with adapter.patched(strict=False), Largest() as ours:
        actor(*given)
    assert ours.size <= 9 * V  # nor what the mask leaves out


# --- the patch ------------------------------------------------------------------------------------


def test_everything_is_replaced_by_name_and_put_back():
    before = {n: f for n, f in vars(actor_module).items() if callable(f)}
    adapter.patch()
    entries = {e.path.partition(":")[2]: e for e in adapter.report()}
    for name in ORIGINALS:
        assert entries[name].status == "replaced", entries[name]
    assert set(entries["log_probs_from_logits"].modules) == {
        "openrlhf.models.utils.log_probs_from_logits",
        "openrlhf.models.actor.log_probs_from_logits",
    }
    assert set(entries["compute_approx_kl"].modules) == {
        "openrlhf.models.utils.compute_approx_kl",
        "openrlhf.trainer.ray.ppo_actor.compute_approx_kl",
        "openrlhf.trainer.ppo_utils.experience_maker.compute_approx_kl",
    }
    assert actor_module.compute_entropy is models_utils.compute_entropy
    for name, entry in entries.items():
        assert entry.status == ("replaced" if name in ORIGINALS else "left alone") and entry.reason
        assert patching_finds(entry.path), f"there is no {entry.path}"
    assert models_utils.compute_entropy is not ORIGINALS["compute_entropy"]
    adapter.unpatch()
    assert {n: f for n, f in vars(actor_module).items() if callable(f)} == before
    assert (
        Maker.get_advantages_and_returns
        is ORIGINALS["RemoteExperienceMaker.get_advantages_and_returns"]
    )


def patching_finds(path):
    module, _, name = path.partition(":")
    from rlhf_kernels.integrations.patching import _find

    return _find(importlib.import_module(module), name)


def test_an_unknown_version_is_replaced_where_both_agree(monkeypatch):
    monkeypatch.setattr(HOST, "tested", ((0, 1),))
    with pytest.warns(RuntimeWarning, match="not among the versions"):
        adapter.patch()
    assert [e.path for e in adapter.report() if e.status == "replaced"] == [
        r.path for r in HOST.replacements
    ]


def older_kl(log_probs, log_probs_base, kl_estimator="k1"):
    """As up to OpenRLHF 0.11.0: another signature, and an exponential that overflows."""
    d = log_probs.float() - log_probs_base.float()
    value = {"k1": lambda: d, "k2": lambda: d**2 / 2, "k3": lambda: (-d).exp() - 1 + d}
    return value[kl_estimator]().clamp(min=-10, max=10)


def kl_that_overflows(
    log_probs, log_probs_base, log_probs_old=None, kl_estimator="k1", unbiased_gradient=False
):
    """As OpenRLHF 0.11.1."""
    return older_kl(log_probs, log_probs_base, kl_estimator)


@pytest.mark.parametrize("own", [older_kl, kl_that_overflows], ids=lambda f: f.__name__)
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_k3_of_older_versions(monkeypatch, own, needs_gradient):
    """Also where its value or its gradient is NaN; and small values without cancellation."""
    own = types.FunctionType(own.__code__, globals(), own.__name__, own.__defaults__)
    monkeypatch.setattr(models_utils, "compute_approx_kl", own)
    monkeypatch.setattr(HOST, "replacements", [MAKERS["compute_approx_kl"]])
    d = torch.tensor([0.0, 1e-4, -2.6, -10.1, -88.0, -89.0, -500.0, 9.9, 12.0, 25.0])
    d = torch.cat([d, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    monkeypatch.setattr(HOST, "tested", ((0, 1),))
    results = []
    with pytest.warns(RuntimeWarning, match="not among the versions"), adapter.patched():
        ours = models_utils.compute_approx_kl
        assert ours is not own
        for function in (ours, own):
            p, q = d.clone().requires_grad_(needs_gradient), torch.zeros(len(d))
            kl = function(p, q, kl_estimator="k3")
            if needs_gradient:
                kl.sum().backward()
            results.append([kl.detach(), p.grad])
            for other in ("k1", "k2"):
                assert torch.equal(
                    function(d[:9], q[:9], kl_estimator=other),
                    own(d[:9], q[:9], kl_estimator=other),
                )
    (got, gradient), (want, host_gradient) = results
    assert want.isnan().tolist() == [False] * 11 + [True] * 2
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert got[1].item() == pytest.approx(5e-9, rel=1e-3)
    if needs_gradient:
        assert host_gradient.isnan().nonzero().flatten().tolist() == [5, 6, 11, 12]
        torch.testing.assert_close(gradient, host_gradient, rtol=2e-6, atol=2e-6, equal_nan=True)


def forward_that_scales_last(
    self,
    sequences,
    action_mask=None,
    attention_mask=None,
    return_output=False,
    allgather_logits=False,
    return_logprobs=False,
    ring_attn_group=None,
    packed_seq_lens=None,
    return_entropy=False,
):
    """As up to OpenRLHF 0.9; up to 0.11.1 it takes images besides."""
    position_ids = attention_mask.long().cumsum(-1) - 1
    position_ids.masked_fill_(attention_mask == 0, 1)
    output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
    output["logits"] = logits = output["logits"].float()
    if return_entropy:
        output.entropy = models_utils.compute_entropy(logits)[:, :-1]
    labels = sequences.roll(-1, 1)
    log_probs = models_utils.log_probs_from_logits(logits.clone(), labels, self.temperature)
    output["logits"] = logits / self.temperature
    log_probs = log_probs[:, :-1]
    if action_mask is not None:
        log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
    return (log_probs, output) if return_output else log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_actor_that_divides_after_its_entropy(monkeypatch, served, temperature):
    """Up to OpenRLHF 0.11.1 the temperature is in the log-probs and not in the entropy."""
    monkeypatch.setattr(Actor, "forward", forward_that_scales_last)
    actor, given = make_actor(temperature=temperature), batch()

    def run():
        log_probs, output = actor(*given, return_output=True, return_entropy=True)
        found = gradients(actor, log_probs.sum() + output.entropy.square().sum())
        return [log_probs.detach(), output.entropy.detach(), output.logits.detach()], found

    want, host_gradients = run()
    monkeypatch.setattr(HOST, "tested", ((0, 1),))
    with pytest.warns(RuntimeWarning, match="not among the versions"), adapter.patched():
        assert Actor.forward is not forward_that_scales_last
        del served[:]
        got, ours = run()
    assert len(served) == (1 if temperature == 1 else 2)
    for a, b in zip([*got, *ours.values()], [*want, *host_gradients.values()], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_an_actor_with_another_entropy_is_noticed(monkeypatch):
    """Small calls ask for the entropy as well."""

    @functools.wraps(Actor.forward)
    def other(*args, **kwargs):
        result = ORIGINALS["Actor.forward"](*args, **kwargs)
        if kwargs.get("return_entropy"):
            result[1].entropy = 1.5 * result[1].entropy
        return result

    monkeypatch.setattr(Actor, "forward", other)
    monkeypatch.setattr(HOST, "tested", ((0, 1),))
    with pytest.warns(RuntimeWarning, match="not among the versions"), adapter.patched():
        assert Actor.forward is other


def test_an_unknown_version_without_gradients_keeps_its_actor(monkeypatch):
    forward = Actor.forward

    @functools.wraps(forward)
    def detached(*args, **kwargs):
        with torch.no_grad():
            return forward(*args, **kwargs)

    monkeypatch.setattr(Actor, "forward", detached)
    monkeypatch.setattr(HOST, "tested", ((0, 1),))
    with pytest.warns(RuntimeWarning, match="not among the versions"), adapter.patched():
        assert Actor.forward is detached
        (entry,) = [e for e in adapter.report() if e.path.endswith("Actor.forward")]
        assert "the two give different numbers" in entry.reason


def test_transforms_of_torch_func_are_the_hosts():
    logits, labels = torch.randn(2, 5, 40), torch.randint(40, (2, 5))
    base = torch.randn(2, 5)

    def gradients():
        return [
            torch.func.grad(lambda x: models_utils.log_probs_from_logits(x, labels).sum())(logits),
            torch.func.grad(
                lambda x: models_utils.compute_approx_kl(x, base, kl_estimator="k3").sum()
            )(base * 0.5),
        ]

    want = gradients()
    with adapter.patched():
        got = gradients()
    torch.testing.assert_close(got, want)


def test_actor_of_a_model_that_knows_no_cache(served):
    actor, given = make_actor(), batch()

    class Narrow(type(actor.model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, return_dict=None):
            return super().forward(input_ids, attention_mask, position_ids)

    want = actor(*given)
    actor.model.__class__ = Narrow
    torch.testing.assert_close(actor(*given), want)
    with adapter.patched():
        torch.testing.assert_close(actor(*given), want, atol=2e-5, rtol=1e-5)
    assert served


def test_patch_before_the_import():
    code = """
import sys
import openrlhf_stubs
openrlhf_stubs.install()
from rlhf_kernels.integrations import openrlhf
openrlhf.patch()
assert "openrlhf" not in sys.modules
import openrlhf.trainer.ray.ppo_actor as ppo_actor, openrlhf.models.actor as actor
from rlhf_kernels.integrations import openrlhf as adapter
print(*sorted(e.status + " " + m for e in adapter.report() for m in e.modules), sep="\\n")
print(ppo_actor.compute_approx_kl.__code__.co_filename == adapter.__file__)
"""
    lines = run_python(code).splitlines()
    assert lines[-1] == "True"
    assert "replaced openrlhf.trainer.ray.ppo_actor.compute_approx_kl" in lines
    assert "replaced openrlhf.models.actor.compute_entropy" in lines
    assert "replaced openrlhf.models.actor.Actor.forward" in lines or any(
        line.startswith("replaced") and "Actor" in line for line in lines
    )


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(**more):
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def test_the_reference_backend_is_the_original(monkeypatch, served):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    actor, given = make_actor(), batch()
    want = actor(*given)
    with adapter.patched():
        assert torch.equal(actor(*given), want) and not served


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_compile():
    logits, labels = torch.randn(2, 5, 40), torch.randint(40, (2, 5))

    def step(logits, labels):
        z = logits * 1.5
        logprob = models_utils.log_probs_from_logits(z, labels, 0.7)
        entropy = models_utils.compute_entropy(z)
        return logprob, entropy, models_utils.compute_approx_kl(logprob, logprob * 1.1, None, "k3")

    with adapter.patched():
        expected = step(logits, labels)
        traced = []

        def backend(graph, inputs):
            traced.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        got = torch.compile(step, fullgraph=True, backend=backend)(logits, labels)
        torch.testing.assert_close(got, expected)
        assert sum("rlhf_kernels.token_logprob" in name for name in traced) == 2, traced
        alone = torch.compile(models_utils.compute_entropy, backend="aot_eager")(logits * 1.5 / 0.7)
        torch.testing.assert_close(alone, expected[1])


# --- its trainers ---------------------------------------------------------------------------------


@pytest.fixture
def saved_model(tmp_path):
    """The folder of a tiny Llama; an Actor of it has 16 bits, which the tests undo."""
    language_model().save_pretrained(tmp_path)
    return str(tmp_path)


def actor_of(folder, **options):
    actor = Actor(folder, attn_implementation="eager", param_dtype="bf16", **options)
    return actor.float()


class Strategy:
    """DeepSpeed's place: an optimizer, and one step for each backward."""

    ring_attn_group = None
    accumulated_gradient = 1

    def __init__(self, args):
        self.args = args

    def is_rank_0(self):
        return False

    def all_reduce(self, value):
        return value

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name=None):
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model):
        return 0.0


def digest(module):
    """A number that changes when any weight does."""
    return float(sum(p.detach().double().abs().sum() for p in module.parameters()))


def assert_same_numbers(run, spied):
    """``run`` gives rows of numbers; the same with and without the patch, and through ours."""
    want = run()
    assert not any(spied.values())
    with adapter.patched():
        got = run()
    assert all(spied.values()), spied
    assert len(got) == len(want) > 1
    for row, own in zip(got, want, strict=True):
        assert row == pytest.approx(own, rel=1e-4, abs=1e-5)


@pytest.fixture
def spied(monkeypatch):
    """Called with names of our operators: how often the adapter calls each."""
    counts = {}

    def watch(*names):
        for name in names:
            counts[name] = 0
            monkeypatch.setattr(adapter, name, counting(name, getattr(adapter, name)))
        return counts

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    return watch


def run_ppo(folder, monkeypatch, estimator, kl, use_loss, packing=False):
    """Experience and training steps of PPO as the host has them; no Ray, no vLLM, no DeepSpeed."""
    torch.manual_seed(0)
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.95, no_std_norm=False)
    kl = SimpleNamespace(
        estimator=kl, use_loss=use_loss, init_coef=0.05, unbiased_gradient=kl == "k2"
    )
    penalties = {"overlong_buffer_len": None, "stop_properly_penalty_coef": None}
    flags = dict.fromkeys(
        "colocate_all colocate_actor_ref colocate_critic_reward dynamic_batch_enable".split(), False
    )
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage, kl=kl),
        reward=SimpleNamespace(clip_range=(-10, 10), **penalties),
        rollout=SimpleNamespace(n_samples_per_prompt=2),
        ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1, packing_samples=packing),
        train=SimpleNamespace(**flags),
        actor=SimpleNamespace(entropy_coef=0.01, aux_loss_coef=0),
    )
    options = {"temperature": 0.9, "packing_samples": packing}
    actor, reference = (actor_of(folder, **options) for _ in range(2))
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(0.9)
    critic = nn.Linear(V, 1)
    maker = Maker.__new__(Maker)
    maker.args, maker.strategy, maker.advantage_estimator = args, Strategy(args), estimator
    maker.kl_ctl = SimpleNamespace(value=0.05)
    maker.actor_model_group, maker.initial_model_group = actor, reference
    maker.critic_model_group = lambda s, m, a: critic(nn.functional.one_hot(s, V).float()).squeeze(
        -1
    )[:, -m.shape[1] - 1 : -1]
    maker.reward_model_group = None
    maker._dispatch_forward = lambda group, sync, **given: [
        group(*each)
        for each in zip(
            given["sequences"], given["action_mask"], given["attention_mask"], strict=True
        )
    ]
    maker._flatten_results = lambda results, factor: results
    monkeypatch.setattr(experience_maker, "ray", SimpleNamespace(put=lambda x: x))
    optimizer = torch.optim.Adam(actor.parameters(), 1e-3)
    trainer = ppo_actor.ActorPPOTrainer.__new__(ppo_actor.ActorPPOTrainer)
    trainer.strategy, trainer.args, trainer.actor = Strategy(args), args, actor
    trainer.actor_loss_fn = ppo_actor.PolicyLoss(dual_clip=3.0)
    trainer.actor_optim, trainer.actor_scheduler = (
        optimizer,
        SimpleNamespace(get_last_lr=lambda: [1e-3]),
    )
    trainer.ema_model, trainer.aux_loss, trainer.replay_buffer = None, False, None
    value_loss = ValueLoss(0.2)
    rows = []
    for step in range(2):
        samples = []
        for i in (0, 2):
            sequences, mask, attention = batch(rows=2, length=12, actions=6, seed=step + i, left=1)
            if i:
                mask[0, 2:4] = 0  # an interior gap
            samples.append(
                Experience(
                    sequences=sequences,
                    attention_mask=attention,
                    action_mask=mask.bool(),
                    rewards=torch.rand(2),
                    index=[i, i + 1],
                    info={},
                    response_length=mask.sum(1),
                    truncated=torch.zeros(2),
                )
            )
        samples = maker.compute_advantages_and_returns(maker.make_experience(samples))
        for sample in samples:
            status = trainer.training_step(sample, kl_ctl=0.05, step=0)["metrics"]
            row = {n: float(x.float().mean()) for n, x in status.items() if torch.is_tensor(x)}
            row["advantages"] = float(sample.advantages.abs().sum())
            row["returns"] = float(sample.returns.abs().sum())
            if sample.values is not None:
                row["value_loss"] = float(
                    value_loss(
                        sample.values * 1.1, sample.values, sample.returns, sample.action_mask
                    )
                )
            rows.append(row)
    return [*rows, {"weights": digest(actor)}]


@pytest.mark.parametrize(
    "estimator, kl, use_loss, packing, operators",
    [
        ("gae", "k1", False, False, ("linear_logprob", "gae")),
        ("gae", "k1", False, True, ("linear_logprob", "gae")),
        ("reinforce_baseline", "k3", True, False, ("linear_logprob", "gae", "kl_estimate")),
        ("group_norm", "k2", True, False, ("linear_logprob", "gae")),
    ],
)
def test_ppo(saved_model, monkeypatch, spied, estimator, kl, use_loss, packing, operators):
    assert_same_numbers(
        lambda: run_ppo(saved_model, monkeypatch, estimator, kl, use_loss, packing),
        spied(*operators),
    )


@pytest.mark.parametrize(
    "gradient_checkpointing, packing", [(True, False), (False, False), (False, True)]
)
def test_sft(saved_model, spied, gradient_checkpointing, packing):
    def run():
        torch.manual_seed(0)
        samples = []
        for length in (5, 9, 7, 8, 6, 11):
            ids = torch.randint(3, V, (1, length))
            mask = torch.ones(1, length)
            mask[0, :2], mask[0, -1] = 0, 0
            samples.append((ids, torch.ones_like(ids), mask))
        args = SimpleNamespace(
            train=SimpleNamespace(batch_size=1),
            model=SimpleNamespace(aux_loss_coef=0.0),
            eval=SimpleNamespace(steps=2),
            ckpt=SimpleNamespace(save_steps=-1, path=None),
            logger=SimpleNamespace(
                wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1
            ),
            ds=SimpleNamespace(packing_samples=packing),
        )
        actor = actor_of(saved_model, packing_samples=packing)
        if gradient_checkpointing:
            actor.gradient_checkpointing_enable()
        actor.model.global_steps = 0  # of DeepSpeed's engine
        trainer = sft_trainer.SFTTrainer(
            actor,
            Strategy(args),
            torch.optim.Adam(actor.parameters(), 1e-3),
            samples,
            samples[:2],
            SimpleNamespace(get_last_lr=lambda: [1e-3]),
            max_epochs=1,
        )
        rows = []

        def log(args, step, bar, logs, states):
            rows.append({n: float(x) for n, x in logs.items()})
            actor.model.global_steps += 1

        trainer.save_logs_and_checkpoints = log
        trainer.train_dataloader = Loader(samples)
        trainer.fit(args)
        losses = []
        loss_fn = trainer.loss_fn
        trainer.loss_fn = lambda *a, **k: losses.append(loss_fn(*a, **k)) or losses[-1]
        trainer.evaluate(samples[:2])
        return [*rows, {"evaluation": float(sum(losses)), "weights": digest(actor)}]

    assert_same_numbers(run, spied("linear_logprob"))


class Loader(list):
    sampler = None


@pytest.mark.parametrize("packing", [False, True])
def test_dpo(saved_model, spied, packing):
    def run():
        torch.manual_seed(0)
        policy, reference = (actor_of(saved_model, packing_samples=packing) for _ in range(2))
        reference.requires_grad_(False)
        with torch.no_grad():
            reference.model.lm_head.weight.mul_(0.9)
        trainer = dpo_trainer.DPOTrainer.__new__(dpo_trainer.DPOTrainer)
        trainer.strategy, trainer.tokenizer = Strategy(None), SimpleNamespace(pad_token_id=0)
        loss_fn = dpo_trainer.DPOLoss(0.1)
        optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
        rows = []
        for _ in range(3):
            chosen, rejected = torch.randint(3, V, (2, 9)), torch.randint(3, V, (2, 7))
            given = chosen, torch.ones_like(chosen), rejected, torch.ones_like(rejected), [3, 2]
            win, lose, aux, nll = trainer.concatenated_forward(policy, *given)
            with torch.no_grad():
                ref_win, ref_lose, _, _ = trainer.concatenated_forward(reference, *given)
            loss, chosen_reward, rejected_reward = loss_fn(win, lose, ref_win, ref_lose)
            assert aux == []
            (loss + 0.1 * nll).backward()
            optimizer.step(), optimizer.zero_grad()
            numbers = (loss, nll, chosen_reward.mean(), rejected_reward.mean())
            rows.append([float(x) for x in numbers])
        return [*rows, [digest(policy)]]

    assert_same_numbers(run, spied("linear_logprob"))


# --- its own tests --------------------------------------------------------------------------------


def host_tests():
    folder = Path(importlib.util.find_spec("openrlhf").origin).parents[1] / "tests"
    return folder if (folder / "test_kl_estimator_gradient.py").exists() else None


FILES = (
    "actor_entropy_temperature kl_estimator_gradient loss_aggregation reward_shaping sft_trainer"
)


@pytest.mark.skipif(host_tests() is None, reason="openrlhf's tests are not beside it")
def test_the_tests_of_the_host(tmp_path):
    """Its tests of what is replaced: as many pass with the patch as without."""
    files = [str(host_tests() / f"test_{name}.py") for name in FILES.split()]
    options = ["-q", "-p", "openrlhf_stubs", "-p", "no:cacheprovider", "-c", os.devnull]
    calls = tmp_path / "calls"
    counts = []
    for patched in ({}, {"OPENRLHF_CALLS": str(calls)}):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "--rootdir", str(host_tests()), *files],
            env=environment(OPENRLHF_TESTS="1", **patched),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        counts.append(re.search(r"(\d+) passed", done.stdout).group(1))
    assert counts[0] == counts[1] and int(counts[0]) > 80
    called = set(calls.read_text().split())
    assert called >= {
        "Actor.forward",
        "log_probs_from_logits",
        "compute_entropy",
        "compute_approx_kl",
        "RemoteExperienceMaker.get_advantages_and_returns",
        "RemoteExperienceMaker.get_cumulative_returns",
    }
