"""TRL's functions beside what takes their place: values, gradients, quirks, whole trainers.

TRL comes as an overlay (requirements/hosts/trl.txt, or trl-1.12.txt for PPO): run with its folder
in PYTHONPATH, with "site-packages" somewhere in the path, as ``datasets`` hashes the contents of
modules elsewhere. TRL's own tests are in no package that PyPI has: set TRL_TESTS to the folder
``tests`` of its repository, at the tag of the installed version, to have them run with the patch.
"""

from __future__ import annotations

import importlib
import os
import pickle
import random
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import faces
import pytest
import torch

import test_zero3
from compare import assert_close_to_truth
from ranks import run_ranks
from rlhf_kernels.backend import INTERPRETING, why_not
from rlhf_kernels.linear_chunks import Sweep

for name in ("TRL_EXPERIMENTAL_SILENCE", "HF_HUB_OFFLINE"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    VERSION = tuple(map(int, version("trl").split(".")[:2]))
except PackageNotFoundError:
    pytest.skip("TRL is not installed: see requirements/hosts", allow_module_level=True)
if INTERPRETING or why_not("linear_logprob", "cpu"):
    pytest.skip("needs the CPU kernels", allow_module_level=True)

if VERSION == (1, 15):  # its head is in Triton alone, which has to be interpreted on a CPU
    os.environ["TRITON_INTERPRET"] = "1"

from trl.trainer import utils  # noqa: E402

from rlhf_kernels.integrations import trl as adapter  # noqa: E402

OLD = VERSION < (1, 14)  # functions of logits know no temperature and no mask
NO_BIAS = VERSION < (1, 13)  # in the head, whose entropy has no gradient
PLAIN = VERSION < (1, 15)  # the head gives log-probs and entropies, and no trainer has to use it
new = pytest.mark.skipif(PLAIN, reason="TRL 1.15 and later")
biased = pytest.mark.skipif(NO_BIAS, reason="TRL 1.13 and later")
old = pytest.mark.skipif(not NO_BIAS, reason="TRL 1.12: later versions have no PPO")
ROOT = Path(__file__).parents[2]
HEAD = utils._ChunkedLogProbFunction
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW)
INF = float("inf")


@pytest.fixture
def patched():
    with adapter.patched():
        yield


def close(got, host, truth, dtype, what):
    """As near to the truth as the host is; in float32 and float64 to rounding as the host says.

    With 16 bits the few elements of a small case may be luckier there than here: so one rounding.
    """
    assert got.dtype == host.dtype and got.shape == host.shape, what
    if dtype in LOW:
        one = (
            torch.finfo(dtype).eps / 2 * float(truth.detach().abs().max()) if truth.numel() else 0.0
        )
        assert_close_to_truth(got, host, truth, one, what)
    else:
        torch.testing.assert_close(got, host, rtol=2e-5, atol=2e-6, msg=lambda m: f"{what}: {m}")


# ---- the fused head -----------------------------------------------------------------------------


def apply_head(function, hidden, weight, bias, targets, temperature, cap, scale, outputs=ALL):
    chunk = 128 if VERSION == (1, 15) else 7  # interpreted chunks are slow
    if PLAIN:
        rest = (targets, temperature, chunk, cap, scale)
        rest = rest if NO_BIAS else (bias, *rest)
        return (*function.apply(hidden, weight, *rest), None, None, None)
    args = (hidden, weight, bias, targets, temperature, chunk, cap, scale, outputs)
    return function.apply(*args)


def head_truth(hidden, weight, bias, targets, temperature, cap, scale):
    z = hidden @ weight.t() + (0 if bias is None else bias)
    z = z * scale
    z = (cap * torch.tanh(z / cap) if cap else z) / temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    squares = (2 * logp).logsumexp(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy, squares, z.mean(-1), None


def head_case(seed, dtype, weight_dtype=None):
    """Random sizes, strides and settings; some of the upstream gradients are zero, as where a
    trainer masks."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, width, vocab = pick.choice([1, 5, 33]), pick.choice([4, 24]), pick.choice([3, 67, 300])

    def randn(*shape, dtype=dtype, scale=1.0):
        wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator) * scale
        return (wide if pick.random() < 0.3 else wide.clone())[..., : shape[-1]].to(dtype)

    hidden, weight = randn(rows, width), randn(vocab, width, dtype=weight_dtype or dtype)
    with_bias = not NO_BIAS and pick.random() < 0.5
    bias = randn(vocab, dtype=weight_dtype or dtype) if with_bias else None
    targets = torch.randint(vocab, (rows,), generator=generator)
    cap = pick.choice([None, 2.0, 30.0])
    settings = (pick.choice([1, 0.7, 1.6]), cap, pick.choice([1.0, 0.25]))
    upstream = [torch.randn(rows, generator=generator) for _ in range(2)]
    for g in upstream:
        g[torch.rand(rows, generator=generator) < 0.4] = 0
    return (hidden, weight, bias, targets, *settings), upstream


def head_results(function, case, upstream, frozen=(), dtype=None):
    """Outputs, and gradients of hidden, weight and bias."""
    leaves = [None if x is None else x.detach().clone() for x in case[:3]]
    for k, x in enumerate(leaves):
        if x is not None and k not in frozen:
            x.requires_grad_()
    inputs = [x if dtype is None or x is None else x.to(dtype) for x in leaves]
    outputs = function(*inputs, *case[3:])
    loss = sum((x.double() * g).sum() for x, g in zip(outputs[:2], upstream, strict=True))
    loss.backward()
    return outputs, [None if x is None else x.grad for x in leaves]


def ours_and_host(case, upstream, **options):
    def head(function):
        return head_results(lambda *args: apply_head(function, *args), case, upstream, **options)

    return head(utils._ChunkedLogProbFunction), head(HEAD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_head(seed, dtype, patched, monkeypatch):
    monkeypatch.setattr("rlhf_kernels.linear_chunks.BUDGET", {"cpu": 1 << 12, "cuda": 0})
    monkeypatch.setattr("rlhf_kernels.linear_chunks.LEAST_TOKENS", 4)
    monkeypatch.setattr(adapter, "LOOKED_AT", {"cpu": 700, "cuda": 0})
    case, upstream = head_case(seed, dtype)
    (outputs, grads), (theirs, their_grads) = ours_and_host(case, upstream)
    wide = tuple(
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case
    )
    if NO_BIAS:  # its entropy has no gradient
        upstream = [upstream[0], torch.zeros(())]
    truth, true_grads = head_results(head_truth, wide, upstream)
    for name, *x in zip(("log_probs", *ALL), outputs, theirs, truth, strict=True):
        if name == "is_top1" or x[1] is None:
            continue
        close(*x, dtype, name)
        assert x[0].requires_grad == x[1].requires_grad, name
    for name, *x in zip(("hidden", "weight", "bias"), grads, their_grads, true_grads, strict=True):
        if x[1] is not None:
            close(*x, dtype, f"gradient of {name}")


def keep(ctx, dtype, hidden, weight, bias, targets, temperature, cap, scale):
    """Log-probs and entropies in float32, of products in ``dtype``; and all for the backward."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        ctx.leaves = [
            None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)
        ]
        cast = [None if x is None else x.to(dtype).float() for x in ctx.leaves]
        ctx.results = head_truth(*cast, targets, temperature, cap, scale)[:2]
    return tuple(x.detach() for x in ctx.results)


class HeadOf113(torch.autograd.Function):
    """What TRL 1.13 has in its place."""

    @staticmethod
    def forward(
        ctx,
        last_hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
    ):
        args = (last_hidden, weight, bias, targets, temperature)
        return keep(ctx, last_hidden.dtype, *args, final_logit_softcapping, logit_scale)

    @staticmethod
    def backward(ctx, *upstream):
        leaves = [x for x in ctx.leaves if x is not None]
        found = iter(torch.autograd.grad(ctx.results, leaves, upstream))
        return (*(None if x is None else next(found) for x in ctx.leaves), *(None,) * 5)


class HeadOf114(HeadOf113):
    """It asks autocast for a dtype."""

    @staticmethod
    def forward(
        ctx,
        last_hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
    ):
        dtype = last_hidden.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        args = (last_hidden, weight, bias, targets, temperature)
        return keep(ctx, dtype, *args, final_logit_softcapping, logit_scale)


class HeadOf115(torch.autograd.Function):
    """It runs on GPUs alone."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=ALL,
    ):
        raise RuntimeError("0 active drivers")


@new
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("own", [HeadOf113, HeadOf114], ids=lambda head: head.__name__)
def test_heads_of_older_versions(own, known, monkeypatch):
    """Their two outputs, and all gradients; under autocast too."""
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", own)
    if not known:
        monkeypatch.setattr(adapter._host, "version", lambda: "1.13.9")
    dtypes, forward = [], adapter._Head.forward

    def spy(*args):
        dtypes.append(args[6])
        return forward(*args)

    monkeypatch.setattr(adapter._Head, "forward", staticmethod(spy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched = adapter.patched()
        patched.__enter__()
    try:
        ours = utils._ChunkedLogProbFunction
        assert ours is not own
        for seed in range(6):
            (*inputs, temperature, cap, scale), upstream = head_case(seed, torch.float32)

            def results(function, case=(*inputs, temperature, 7, cap, scale), upstream=upstream):
                return head_results(function.apply, case, upstream)

            (outputs, grads), (theirs, their_grads) = results(ours), results(own)
            assert len(outputs) == 2
            for a, b in zip((*outputs, *grads), (*theirs, *their_grads), strict=True):
                assert a is b is None or a.requires_grad == b.requires_grad
                if b is not None:
                    torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6)
        del dtypes[:]
        with torch.autocast("cpu", torch.bfloat16):
            outputs, _ = results(ours)
            theirs, _ = results(own)
        assert dtypes == [torch.bfloat16 if own is HeadOf114 else torch.float32]
        for a, b in zip(outputs, theirs, strict=True):
            tolerance = 3e-2 if own is HeadOf114 else 2e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    finally:
        patched.__exit__(None, None, None)


@new
def test_a_head_of_gpus_alone_is_served_on_the_cpu(monkeypatch):
    """TRL 1.15.0, which was compared under Triton's interpreter: its trainers run on a CPU."""
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", HeadOf115)
    case, upstream = head_case(3, torch.float32)
    args = (lambda *args: apply_head(HEAD, *args), case, upstream)
    want = head_results(*args)
    monkeypatch.setattr(adapter._host, "version", lambda: "1.15.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapter.patched():
            ours = utils._ChunkedLogProbFunction
            got = head_results(lambda *args: apply_head(ours, *args), case, upstream)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=2e-5, atol=5e-6)
    monkeypatch.setattr(adapter._host, "version", lambda: "1.15.1")
    with pytest.warns(RuntimeWarning, match=r"1\.15\.1 is not among"), adapter.patched():
        assert utils._ChunkedLogProbFunction is HeadOf115
        reason = adapter.report()[0].reason
    assert "some run on GPUs only" in reason and "drivers" not in reason


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@new
def test_the_first_of_several_largest_is_the_top(dtype, seed, patched):
    """Small integers: the logits are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-1, 2, (40, 3), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (9, 3), generator=generator).to(dtype)
    targets = (hidden @ weight.t()).argmax(-1)
    targets[::3] = torch.randint(9, targets[::3].shape, generator=generator)
    args = (hidden, weight, None, targets, 1.0, None, 1.0)
    got = apply_head(utils._ChunkedLogProbFunction, *args)[4]
    host = apply_head(HEAD, *args)[4]
    assert got.dtype == torch.bool and 10 < host.sum() < 40 and torch.equal(got, host)


@new
def test_nan_and_minus_inf_are_never_the_top():
    """Not strict, so that ours looks at them: argmax would take the first NaN."""
    hidden, weight = torch.ones(3, 2), torch.ones(5, 2)
    hidden[1], hidden[2] = float("nan"), -INF
    args = (hidden, weight, None, torch.zeros(3, dtype=torch.int64), 1.0, None, 1.0)
    with adapter.patched(strict=False):
        got = apply_head(utils._ChunkedLogProbFunction, *args)[4]
    assert got.tolist() == apply_head(HEAD, *args)[4].tolist() == [True, False, False]


MIXED = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.skipif(OLD, reason="TRL 1.14 and later: before, the backward takes one dtype alone")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype, weight_dtype", [*MIXED, (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_head_of_mixed_dtypes(seed, dtype, weight_dtype, autocast, patched):
    """Products in the dtype of hidden, or of autocast; gradients in those of the parameters."""
    case, upstream = head_case(seed, dtype, weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (outputs, grads), (theirs, their_grads) = ours_and_host(case, upstream)
    product = torch.bfloat16 if autocast else dtype
    exact = [None if x is None else x.to(product).double() for x in case[:3]]
    truth, true_grads = head_results(head_truth, (*exact, *case[3:]), upstream)
    kind = torch.bfloat16 if torch.bfloat16 in (product, weight_dtype) else torch.float32
    for k in range(2 if PLAIN else 4):
        close(outputs[k], theirs[k], truth[k], kind, f"output {k}")
    for got, host, true in zip(grads, their_grads, true_grads, strict=True):
        if host is not None:
            close(got, host, true, kind, "gradient")
    if autocast:  # the bits of what is cast before
        plain, _ = head_results(
            lambda *args: apply_head(utils._ChunkedLogProbFunction, *args),
            (*(None if x is None else x.bfloat16() for x in case[:3]), *case[3:]),
            upstream,
        )
        for a, b in zip(outputs, plain, strict=True):
            assert a is b is None or torch.equal(a, b)
        for x in grads[:2]:
            if x.dtype == torch.float32:  # not cut to 16 bits on the way
                assert not torch.equal(x, x.bfloat16().float())


@new
@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("entropy",), ("is_top1", "mean_logits")])
def test_head_gives_what_is_asked_for(outputs, patched):
    case, _ = head_case(1, torch.float32)
    got = apply_head(utils._ChunkedLogProbFunction, *case, outputs)
    host = apply_head(HEAD, *case, outputs)
    assert [x is None for x in got] == [x is None for x in host]
    for a, b in zip(got, host, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)


def test_head_without_rows(patched):
    (hidden, weight, bias, targets, *rest), _ = head_case(1, torch.float32)
    case = (hidden[:0], weight, bias, targets[:0], *rest)
    (outputs, grads), (theirs, their_grads) = ours_and_host(case, [torch.zeros(0)] * 2)
    for a, b in zip((*outputs, *grads), (*theirs, *their_grads), strict=True):
        assert b is None if a is None else torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (1, 2), (2,)])
def test_frozen_parameters_of_the_head(frozen, patched):
    case, upstream = head_case(3, torch.float32)
    if NO_BIAS and frozen == (0, 1):
        pytest.skip("TRL 1.12 has no bias")
    bias = None if NO_BIAS else torch.linspace(-1, 1, case[1].shape[0])
    case = (*case[:2], bias, *case[3:])
    (_, grads), (_, theirs) = ours_and_host(case, upstream, frozen=frozen)
    for a, b in zip(grads, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_backward_of_one_output_twice_and_of_none(patched):
    (hidden, weight, bias, *rest), _ = head_case(2, torch.float32)
    for function in (utils._ChunkedLogProbFunction, HEAD):
        leaf = hidden.clone().requires_grad_()
        logprob, entropy, *_ = apply_head(function, leaf, weight, bias, *rest)
        logprob.sum().backward(retain_graph=True)
        first = leaf.grad.clone()
        logprob.sum().backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, 2 * first)
        leaf.grad = None
        entropy.sum().backward(retain_graph=True)
        assert bool(leaf.grad.any()) != NO_BIAS  # in 1.12 the entropy has no gradient
        with pytest.raises(RuntimeError):
            (g,) = torch.autograd.grad(logprob.sum(), leaf, create_graph=True)
            g.sum().backward()


@pytest.mark.parametrize("change", ["-100", "V", "inf", "nan", "bias", "cap", "temperature", "0"])
def test_head_in_the_cases_of_the_host(change, patched):
    """Where we do something else the original is called: the same bits, or the same NaN."""
    case, upstream = head_case(5, torch.float32)
    case = list(case)
    case[0], case[3], case[5] = case[0].clone(), case[3].clone(), None
    if change in ("-100", "V"):
        case[3][0] = -100 if change == "-100" else case[1].shape[0]
    elif change in ("inf", "nan"):
        case[0][0, 0] = float(change)
    elif change == "bias" and not NO_BIAS:
        case[2] = torch.linspace(-1, 1, case[1].shape[0])
        case[2][case[3][0]] = -INF  # the target's gradient as well
    elif change in ("cap", "temperature"):
        case[5 if change == "cap" else 4] = -2.0
    elif change == "0":
        case[6] = 0.0
    (outputs, grads), (theirs, their_grads) = ours_and_host(tuple(case), upstream)
    for a, b in zip((*outputs, *grads), (*theirs, *their_grads), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


@biased
@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_banned_token_makes_entropy_nan_if_strict(cap):
    hidden, weight, bias, *_ = head_case(5, torch.float32)[0]
    bias = torch.zeros(weight.shape[0])
    bias[1] = -INF
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    case, upstream = (hidden, weight, bias, targets, 0.7, cap, 1.0), [torch.ones(len(hidden))] * 2
    for strict in (True, False):
        with adapter.patched(strict=strict):
            (outputs, grads), (theirs, their_grads) = ours_and_host(case, upstream)
        exact = range(5) if strict or cap else (0, 2, 3, 4)
        for k in exact[:1] if PLAIN and not (strict or cap) else exact[: 2 if PLAIN else 5]:
            torch.testing.assert_close(outputs[k], theirs[k], equal_nan=True)
        assert theirs[1].isnan().all() != (cap is not None)
        if strict or cap:
            for a, b in zip(grads, their_grads, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        else:
            assert outputs[1].isfinite().all() and all(x.isfinite().all() for x in grads)


def test_masked_positions_reach_no_product_of_the_backward(patched, monkeypatch):
    case, upstream = head_case(4, torch.float32)
    upstream = [torch.zeros(len(case[0])) for _ in upstream]
    upstream[0][0] = 1.0
    rows, add = [], Sweep.add_products

    def watched(self, part, g, *rest):
        rows.append(len(g))
        return add(self, part, g, *rest)

    monkeypatch.setattr(Sweep, "add_products", watched)
    (_, grads), (_, theirs) = ours_and_host(case, upstream)
    assert rows == [1]
    for a, b in zip(grads, theirs, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- functions of the logits --------------------------------------------------------------------


def logits_case(seed, dtype):
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = pick.choice([(1,), (6,), (2, 3), (3, 0), (2, 2, 3)])
    vocab = pick.choice([1, 7, 300])
    wide = torch.randn(*rows, vocab + 2, generator=generator, dtype=torch.float32) * 3
    logits = wide[..., :vocab] if pick.random() < 0.5 else wide[..., :vocab].clone()
    if logits.dim() == 3 and logits.numel() and pick.random() < 0.5:
        logits = logits.transpose(0, 1)
    shape = logits.shape[:-1] + ((4,) if pick.random() < 0.3 else ())
    index = torch.randint(vocab, shape, generator=generator)
    index = index.int() if pick.random() < 0.2 else index
    mask = torch.rand(shape, generator=generator) < 0.7
    mask = pick.choice([None, mask, mask.int(), mask.float()])
    return logits.to(dtype), index, pick.choice([1.0, 0.7, 2]), mask


def with_gradient(function, logits, *args, **kwargs):
    """Outputs, and the gradient of the logits for random upstream gradients."""
    leaf = logits.detach().clone().requires_grad_()
    outputs = function(leaf, *args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        if x.requires_grad:
            loss = loss + (x.double() * torch.randn(x.shape, generator=generator)).sum()
    loss.backward()
    return (*outputs, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("strict", [True, False])
def test_functions_of_logits(seed, dtype, strict):
    logits, index, temperature, mask = logits_case(seed, dtype)
    options = {} if OLD else {"temperature": temperature, "row_mask": mask}
    one_row = logits.reshape(-1, logits.shape[-1])[:1].squeeze(0)
    calls = [
        ("selective_log_softmax", (logits, index), options),
        ("entropy_from_logits", (logits, 2), {}),
        ("entropy_from_logits", (one_row,), {}),
    ]
    if not OLD and (mask is None or index.dim() < logits.dim()):
        name = "selective_log_softmax_and_entropy"
        calls += [(name, (logits, index, wanted), options) for wanted in (True, False)]
    for name, (x, *args), kwargs in calls:
        theirs = with_gradient(getattr(utils, name), x, *args, **kwargs)
        truth = with_gradient(getattr(utils, name), x.double(), *args, **kwargs)
        with adapter.patched(strict=strict):
            got = with_gradient(getattr(utils, name), x, *args, **kwargs)
        for k, three in enumerate(zip(got, theirs, truth, strict=True)):
            close(*three, dtype, f"{name}, result {k}")
            if strict and dtype in LOW:  # TRL's own tests ask for torch's bits
                assert torch.equal(*three[:2])
            assert three[0].requires_grad == three[1].requires_grad


def outcome(function, *args, **kwargs):
    """What it returns, or what it raises as a string."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return repr(error)


def odd_calls():
    logits = torch.randn(2, 3, 7)
    index = torch.randint(7, (2, 3))
    wrong, low = index.clone(), index.clone()
    wrong[1, 1], low[0, 0] = 7, -100
    yield "token V", (logits, wrong), {}
    yield "token -100", (logits, low), {}
    yield "no first dimension", (logits[:0], index[:0]), {}
    yield "no rows", (logits[:, :0], index[:, :0]), {}
    yield "one row", (logits[0, 0], index[0, 0]), {}
    yield "vocabulary not side by side", (logits.transpose(1, 2), torch.randint(3, (2, 7))), {}
    yield "index of another shape", (logits, index[:, :2]), {}
    yield "no index", (logits, torch.zeros(2, 3, 0, dtype=torch.int64)), {}
    yield "complex", (logits.to(torch.complex64), index), {}
    yield "bool index", (logits, index > 3), {}
    yield "a list", (logits.tolist(), index), {}
    yield "-inf", (logits.masked_fill(logits > 1, -INF), index), {}
    yield "all -inf", (torch.full_like(logits, -INF), index), {}
    yield "inf", (logits.masked_fill(logits > 1.5, INF), index), {}
    yield "nan", (logits.masked_fill(logits > 1.5, float("nan")), index), {}
    if not OLD:
        mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
        yield (
            "mask",
            (logits.masked_fill(mask[..., None] == 0, float("nan")), index),
            {"row_mask": mask},
        )
        yield "mask of another shape", (logits, index), {"row_mask": mask[:, :1]}
        yield "token -100 in the mask", (logits, low.roll(1, 1)), {"row_mask": mask}
        for temperature in (0, -1.0, torch.tensor(0.5), torch.full((2, 1, 1), 2.0), INF):
            yield f"temperature {temperature}", (logits, index), {"temperature": temperature}
        lowest = logits.masked_fill(logits > 1, torch.finfo(torch.float32).min)
        yield "the division makes -inf", (lowest, index), {"temperature": 0.5}


@pytest.mark.parametrize("args, kwargs", [pytest.param(a, k, id=n) for n, a, k in odd_calls()])
def test_odd_calls_are_the_hosts(args, kwargs):
    calls = [("selective_log_softmax", args, kwargs)]
    if not kwargs:
        calls += [("entropy_from_logits", args[:1], {"chunk_size": size}) for size in (0, 4)]
    if not OLD:
        calls.append(("selective_log_softmax_and_entropy", args, kwargs))
    for name, args, kwargs in calls:
        theirs = outcome(getattr(utils, name), *args, **kwargs)
        with adapter.patched():
            got = outcome(getattr(utils, name), *args, **kwargs)
        if isinstance(theirs, str):
            assert got == theirs, name
            continue
        torch.testing.assert_close(got, theirs, equal_nan=True)
        if args[0].is_complex():
            continue
        theirs = with_gradient(getattr(utils, name), *args, **kwargs)[-1]
        with adapter.patched():
            got = with_gradient(getattr(utils, name), *args, **kwargs)[-1]
        torch.testing.assert_close(got, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_not_strict_is_finite_where_ours_are():
    logits = torch.randn(2, 3, 7)
    index = torch.zeros(2, 3, dtype=torch.int64)
    banned = logits.clone()
    banned[..., 3:5] = -INF
    p = logits[..., [0, 1, 2, 5, 6]].softmax(-1)
    truth = -(p * p.log()).sum(-1)
    assert utils.entropy_from_logits(banned).isnan().all()
    with adapter.patched(strict=False):
        entropy, gradient = with_gradient(utils.entropy_from_logits, banned)
        torch.testing.assert_close(entropy, truth)
        assert gradient.isfinite().all()
        if OLD:
            return
        mask = torch.tensor([[True, False, True]] * 2)
        banned[:, 1] = float("nan")
        function = utils.selective_log_softmax_and_entropy
        logprob, entropy, gradient = with_gradient(function, banned, index, row_mask=mask)
        with pytest.raises(RuntimeError, match="index -100 is out of bounds"):
            function(logits, index.index_fill(1, index[0, :1] + 2, -100), row_mask=mask)
    torch.testing.assert_close(entropy, truth * mask)
    assert logprob.isfinite().all() and gradient.isfinite().all()
    assert not gradient[:, 1].any() and not logprob[:, 1].any()


# ---- where they are held, torch.compile ---------------------------------------------------------


def test_report_and_modules_that_import_by_name():
    """Modules loaded before the patch and after it."""
    before = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    original = before.selective_log_softmax
    with adapter.patched():
        sys.modules.pop("trl.experimental.orpo.orpo_trainer", None)
        after = importlib.import_module("trl.experimental.orpo.orpo_trainer")
        for module in (before, after):
            assert module.selective_log_softmax is utils.selective_log_softmax
        entries = {entry.path: entry for entry in adapter.report()}
        held = {
            "_ChunkedLogProbFunction": [] if PLAIN else ["trl.kernels.ChunkedLogProbFunction"],
            "selective_log_softmax": ["trl.experimental.cpo.cpo_trainer.selective_log_softmax"],
            "entropy_from_logits": [],
        }
        for name, others in held.items():
            entry = entries[f"trl.trainer.utils:{name}"]
            assert entry.status == "replaced", entry.reason
            assert {f"trl.trainer.utils.{name}", *others} <= set(entry.modules)
        both = entries["trl.trainer.utils:selective_log_softmax_and_entropy"]
        assert both.status == ("left alone" if OLD else "replaced")
        pair = entries["trl.trainer.reward_trainer:RewardTrainer.compute_loss"]
        assert "no function to replace" in pair.reason
    for module in (before, after, utils):
        assert module.selective_log_softmax is original
    assert utils._ChunkedLogProbFunction is HEAD


def test_a_patch_imports_nothing_and_waits():
    code = """
import sys
from rlhf_kernels.integrations import trl as adapter
adapter.patch()
assert "trl" not in sys.modules
assert [e.status for e in adapter.report()[:4]] == ["waiting"] * 4
from trl.trainer import utils
assert type(utils._ChunkedLogProbFunction).__module__ == adapter.__name__
assert {e.status for e in adapter.report()[:3]} == {"replaced"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_version_is_replaced_where_both_agree(monkeypatch):
    """So a version between those tested, or a later one, gets the replacements as well."""
    monkeypatch.setattr(adapter._host, "tested", ())
    with pytest.warns(RuntimeWarning, match="is not among the versions") as told, adapter.patched():
        entries = {entry.path: entry for entry in adapter.report()}
    names = ["selective_log_softmax", "entropy_from_logits", "_ChunkedLogProbFunction"]
    names += [] if OLD else ["selective_log_softmax_and_entropy"]
    for name in names:
        entry = entries[f"trl.trainer.utils:{name}"]
        assert entry.status == "replaced", entry.reason
    assert told[0].filename == __file__


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_of_torch_func_are_the_hosts(transform, patched):
    logits, index = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    score, entropy = utils.selective_log_softmax, utils.entropy_from_logits
    if transform == "vmap":
        got = torch.func.vmap(score)(logits, index), torch.func.vmap(entropy)(logits)
        want = score(logits, index), entropy(logits)
    else:
        leaf = logits.clone().requires_grad_()
        sums = [lambda x: score(x, index).sum(), lambda x: entropy(x).sum()]
        got = tuple(torch.func.grad(f)(logits) for f in sums)
        want = tuple(torch.autograd.grad(f(leaf), leaf)[0] for f in sums)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_that_are_a_dtensor_are_the_hosts(patched, tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        logits, index = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
        shared = [DTensor.from_local(x, mesh, [Replicate()]) for x in (logits, index)]
        got = utils.selective_log_softmax(*shared).to_local()
        torch.testing.assert_close(got, utils.selective_log_softmax(logits, index))
    finally:
        torch.distributed.destroy_process_group()


def test_entropies_may_be_written_to(patched):
    """As TRL's: the backward does not read them."""
    logits, index = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    functions = {"entropy_from_logits": lambda f: lambda x: f(x)}
    if not OLD:
        functions["selective_log_softmax_and_entropy"] = lambda f: lambda x: f(x, index)[1]
    for name, of in functions.items():
        ours, grads = getattr(utils, name), []
        for function in (of(ours), of(ours.__wrapped__)):
            leaf = logits.clone().requires_grad_()
            function(leaf).mul_(2).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_what_is_replaced_looks_as_it_did():
    """25. Types, signatures, names, pickles, subclasses: what is not called is the host's."""
    faces.assert_host_keeps_its_face(adapter._host, 3 if OLD else 4)


def test_the_public_name_of_the_head_is_a_class(patched):
    """25. ``trl.kernels.ChunkedLogProbFunction`` was an instance while patched."""
    public = (
        utils._ChunkedLogProbFunction
        if PLAIN
        else importlib.import_module("trl.kernels").ChunkedLogProbFunction
    )
    assert isinstance(public, type) and issubclass(public, torch.autograd.Function)
    assert public is utils._ChunkedLogProbFunction

    class Doubled(public):
        """Of somebody who changes what goes in and what comes out."""

        @staticmethod
        def forward(ctx, hidden, *rest):
            return tuple(None if x is None else 2 * x for x in public.forward(ctx, hidden, *rest))

    case, _ = head_case(1, torch.float32)
    for got, once in zip(apply_head(Doubled, *case)[:2], apply_head(HEAD, *case), strict=False):
        torch.testing.assert_close(got, 2 * once)


def test_the_head_is_pickled_by_name(patched):
    ours = utils._ChunkedLogProbFunction
    assert ours is not HEAD and pickle.loads(pickle.dumps(ours)) is ours


def test_a_ban_that_overflows_by_the_temperature(patched):
    """A bias of the least float32 is -inf when divided: NaN, as TRL's 0 * -inf."""
    if NO_BIAS:
        pytest.skip("no bias before TRL 1.13")
    hidden, weight, bias = torch.randn(4, 8), torch.randn(31, 8), torch.zeros(31)
    bias[3] = torch.finfo(torch.float32).min
    for temperature in (1.0, 0.7):
        case = (hidden, weight, bias, torch.arange(4), temperature, None, 1.0)
        got = apply_head(utils._ChunkedLogProbFunction, *case, ("entropy",))
        want = apply_head(HEAD, *case, ("entropy",))
        torch.testing.assert_close(got[:2], want[:2], equal_nan=True)


@pytest.mark.parametrize("name", ["head", "score", "entropy", "both"])
def test_under_compile_no_graph_breaks(name, patched):
    if OLD and name == "both":
        pytest.skip("TRL 1.14 and later")
    leaf, index = torch.randn(2, 3, 8), torch.randint(8, (2, 3))
    weight, bias = torch.randn(31, 8), torch.randn(31)

    def call(x):
        if name == "head":
            case = (x.view(6, 8), weight, bias, index.view(6), 0.7, None, 0.5)
            return apply_head(utils._ChunkedLogProbFunction, *case, ("entropy",))[:2]
        if name == "both":
            return utils.selective_log_softmax_and_entropy(x, index, temperature=0.7)
        if name == "score":
            return (utils.selective_log_softmax(x, index),)
        return (utils.entropy_from_logits(x),)

    traced = []

    def spy(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        traced.extend(str(module.graph) for _, module in graph.named_children())
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=spy)
    for got, eager in zip(with_gradient(compiled, leaf), with_gradient(call, leaf), strict=True):
        torch.testing.assert_close(got, eager)
    assert "rlhf_kernels" in str(traced), traced


@new
def test_under_compile_statistics_break_the_graph_but_are_right(patched):
    case, _ = head_case(1, torch.float32)
    torch.compiler.reset()
    function = torch.compile(
        lambda *args: apply_head(utils._ChunkedLogProbFunction, *args), backend="aot_eager"
    )
    for got, host in zip(function(*case), apply_head(HEAD, *case), strict=True):
        torch.testing.assert_close(got, host)


# ---- trainers -----------------------------------------------------------------------------------

WORDS = "the cat sat on a mat and the dog ran to the sea by way of an old red barn".split()


def text(seed, count=6):
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) for _ in range(count))


def tokenizer(**options):
    """Every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    tokens = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: k for k, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **options)


def llama(seed=0, reward=False):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if reward:
        return LlamaForSequenceClassification(LlamaConfig(**sizes, **heads, **ids, num_labels=1))
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids))


def score(completions, **_):
    return [float(len(set(x))) for x in completions]


def sft(model, options):
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": text(k), "completion": f" {text(k + 100)}"} for k in range(8)]
    return SFTTrainer, (model,), {"args": SFTConfig(**options)}, rows


def dpo(model, options, **more):
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": text(k), "chosen": f" {text(k + 100)}", "rejected": f" {text(k + 200, 4)}"}
        for k in range(8)
    ]
    return DPOTrainer, (model, llama()), {"args": DPOConfig(**options, **more)}, rows


def weighted_dpo(model, options):
    """Asks the head for log sum p^2."""
    return dpo(model, options, use_weighting=True)


def packed_sft(model, options):
    return sft(model, {**options, "packing": True, "max_length": 24})


def checkpointed_sft(model, options):
    more = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    return sft(model, {**options, **more})


def precomputed_dpo(model, options):
    return dpo(model, {**options, "precompute_ref_log_probs": True})


def kto(model, options):
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": text(k), "completion": f" {text(k + 100)}", "label": k % 2 == 0}
        for k in range(8)
    ]
    return KTOTrainer, (model, llama()), {"args": KTOConfig(**options)}, rows


def online(model, options, config, trainer, **more):
    """These load their reference model from a folder."""
    folder = f"{options['output_dir']}/model"
    model.save_pretrained(folder)
    options = {**options, "per_device_train_batch_size": 4, "num_generations": 2}
    options |= {"max_completion_length": 12, "temperature": 0.9}
    rows = [{"prompt": text(k)} for k in range(8)]
    model = type(model).from_pretrained(folder)
    return trainer, (model, score), {"args": config(**options, **more)}, rows


def grpo(model, options):
    from trl import GRPOConfig, GRPOTrainer

    more = {"beta": 0.04, "entropy_coef": 0.01, "num_iterations": 2}
    return online(model, options, GRPOConfig, GRPOTrainer, **more)


def rloo(model, options):
    from trl import RLOOConfig, RLOOTrainer

    return online(model, options, RLOOConfig, RLOOTrainer, beta=0.05)


def reward(_, options):
    from trl import RewardConfig, RewardTrainer

    rows = [{"chosen": text(k), "rejected": text(k + 200, 4)} for k in range(8)]
    return RewardTrainer, (llama(1, reward=True),), {"args": RewardConfig(**options)}, rows


def history(make, tmp_path, monkeypatch, patch, **options):
    """What a short run logs, its weights in the end, and how often our operators were called."""
    from datasets import Dataset
    from transformers import set_seed

    calls = {"head": 0, "token_logprob": 0}
    forward, logprob = adapter._Head.forward, adapter.token_logprob

    def head_spy(*args):
        calls["head"] += 1
        return forward(*args)

    def logprob_spy(*args, **kwargs):
        calls["token_logprob"] += 1
        return logprob(*args, **kwargs)

    monkeypatch.setattr(adapter._Head, "forward", staticmethod(head_spy))
    monkeypatch.setattr(adapter, "token_logprob", logprob_spy)
    options = {
        "output_dir": str(tmp_path / str(patch)),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_steps": 3,
        **options,
    }
    trainer, args, kwargs, rows = make(llama(), options)
    set_seed(0)  # PPO of TRL 1.12 shuffles with numpy
    if patch:
        adapter.patch()
    try:
        made = trainer(
            *args, **kwargs, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        made.train()
    finally:
        adapter.unpatch()
        monkeypatch.undo()
    logs = [
        {
            k: v
            for k, v in row.items()
            if isinstance(v, float) and "time" not in k and "per_sec" not in k
        }
        for row in made.state.log_history
        if "loss" in row or "loss/policy_avg" in row
    ]
    return logs, [p.detach().clone() for p in made.model.parameters()], calls


def same_run(make, tmp_path, monkeypatch, **options):
    logs, weights, calls = history(make, tmp_path, monkeypatch, True, **options)
    host_logs, host_weights, none = history(make, tmp_path, monkeypatch, False, **options)
    assert not any(none.values()) and len(logs) == len(host_logs) >= 2
    return calls, (logs, weights), (host_logs, host_weights)


def assert_same_run(ours, host):
    (logs, weights), (host_logs, host_weights) = ours, host
    for row, theirs in zip(logs, host_logs, strict=True):
        assert row == pytest.approx(theirs, rel=1e-4, abs=2e-5, nan_ok=True)
    for a, b in zip(weights, host_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "make",
    [
        *(sft, packed_sft, checkpointed_sft),
        *(dpo, weighted_dpo, precomputed_dpo),
        *(kto, grpo, rloo),
    ],
    ids=lambda f: f.__name__,
)
@new
def test_a_trainer_logs_the_same(make, tmp_path, monkeypatch):
    calls, ours, host = same_run(make, tmp_path, monkeypatch)
    assert calls["head"] >= 3, calls
    assert_same_run(ours, host)


@pytest.mark.parametrize("make", [dpo, kto, grpo, rloo], ids=lambda f: f.__name__)
@pytest.mark.skipif(not PLAIN, reason="TRL 1.14 and before: no fused head unless asked for")
def test_a_trainer_of_logits_logs_the_same(make, tmp_path, monkeypatch):
    calls, ours, host = same_run(make, tmp_path, monkeypatch)
    assert calls["token_logprob"] >= 3, calls
    assert_same_run(ours, host)


LIGER_KERNELS = "rope rms_norm swiglu cross_entropy fused_linear_cross_entropy"


@pytest.mark.parametrize("make", [dpo, kto, grpo], ids=lambda f: f.__name__)
@pytest.mark.skipif(VERSION != (1, 14), reason="TRL 1.14 has its fused head behind an option")
def test_a_trainer_that_is_asked_for_the_head_logs_the_same(make, tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel", reason="the option is use_liger_kernel")
    none = dict.fromkeys(LIGER_KERNELS.split(), False)  # of the model's layers: they need a GPU
    options = {"use_liger_kernel": True, "liger_kernel_config": none}
    calls, ours, host = same_run(make, tmp_path, monkeypatch, **options)
    assert calls["head"] >= 3, calls
    assert_same_run(ours, host)


@new
def test_sft_with_autocast(tmp_path, monkeypatch):
    """Float32 parameters, products in bfloat16: where rounding differs, losses still agree."""
    calls, (logs, _), (host_logs, _) = same_run(sft, tmp_path, monkeypatch, bf16=True)
    assert calls["head"] >= 3, calls
    for row, host in zip(logs, host_logs, strict=True):
        assert row["loss"] == pytest.approx(host["loss"], rel=2e-3)
        assert row["grad_norm"] == pytest.approx(host["grad_norm"], rel=2e-2)


@new
def test_the_reward_trainer_is_left_alone(tmp_path, monkeypatch):
    calls, ours, host = same_run(reward, tmp_path, monkeypatch)
    assert not any(calls.values()) and ours[0] == host[0]
    assert all(map(torch.equal, ours[1], host[1]))


def ppo(model, options):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    options = {**options, "per_device_train_batch_size": 4}
    del options["max_steps"]
    config = PPOConfig(
        **options,
        total_episodes=16,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=12,
        local_rollout_forward_batch_size=4,
        gradient_accumulation_steps=2,
        whiten_rewards=True,
        num_sample_generations=0,
        temperature=0.9,
        missing_eos_penalty=1.0,
    )
    rows = [{"input_ids": tokenizer()(text(k))["input_ids"]} for k in range(16)]
    models = {"model": model, "ref_model": llama(), "reward_model": llama(1, reward=True)}
    models["value_model"] = llama(2, reward=True)
    return PPOTrainer, (), {"args": config, **models}, rows


@old
def test_ppo_logs_the_same(tmp_path, monkeypatch):
    calls, ours, host = same_run(ppo, tmp_path, monkeypatch)
    assert calls["token_logprob"] >= 8, calls
    assert_same_run(ours, host)


# ---- DeepSpeed's ZeRO-3 -------------------------------------------------------------------------

PROCESS = """
import os, sys
import torch
import test_zero3
from rlhf_kernels.integrations import trl as adapter

calls, forward = [], adapter._Head.forward

def spy(*args):
    calls.append(1)
    return forward(*args)

def head(engine, ids):
    from trl.trainer.utils import add_fused_lm_head

    model = engine.module
    if "forward" not in vars(model):
        add_fused_lm_head(model)
    return -engine(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum()

rank = int(os.environ["RANK"])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=test_zero3.RANKS
)
import deepspeed
from transformers.integrations import HfDeepSpeedConfig

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles for a minute
deepspeed.init_distributed("gloo")
config = HfDeepSpeedConfig(dict(test_zero3.SETTINGS))
adapter._Head.forward = staticmethod(spy)
adapter.patch()
for tied in (False, True):
    test_zero3.check(head, tied, rank)
assert len(calls) == 4

from trl.trainer import utils

with deepspeed.zero.Init(config_dict_or_path=test_zero3.SETTINGS):
    weight = torch.nn.Linear(16, test_zero3.V, bias=False).weight
hidden = torch.randn(5, 16, requires_grad=True)
assert weight.numel() == 0
with deepspeed.zero.GatheredParameters([weight]):
    whole = weight.detach().clone()
    args = (torch.arange(5), 0.7, 32768, None, 1.0, ("entropy",))
    logprob, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, None, *args)
assert weight.numel() == 0 and len(calls) == 5
(gradient,) = torch.autograd.grad(logprob.sum(), hidden)
logp = (hidden @ whole.t() / 0.7).log_softmax(-1)
(truth,) = torch.autograd.grad(logp.gather(-1, args[0][:, None]).sum(), hidden)
torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)
print("every case passed")
"""


@new
def test_a_head_that_zero3_has_partitioned(tmp_path):
    """TRL gathers it around the forward, and again in its own backward."""
    if find_spec("deepspeed") is None and not test_zero3.OVERLAY.exists():
        pytest.skip("DeepSpeed is not installed (make test does)")
    program = tmp_path / "process.py"
    program.write_text(PROCESS)
    path = [test_zero3.OVERLAY, ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    settings = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(map(str, path))}
    run_ranks(program, tmp_path, test_zero3.RANKS, **settings)


# ---- TRL's own tests ----------------------------------------------------------------------------

PLUGIN = """
from rlhf_kernels.integrations import trl

def pytest_configure(config):
    trl.patch()

def pytest_unconfigure(config):
    from trl.trainer import utils
    print(type(utils._ChunkedLogProbFunction).__module__)
    print(trl.report())
"""


@pytest.mark.skipif(
    "TRL_TESTS" not in os.environ, reason="TRL_TESTS names no folder of TRL's tests"
)
def test_tests_of_trl(tmp_path):
    (tmp_path / "with_our_patch.py").write_text(PLUGIN)
    file = Path(os.environ["TRL_TESTS"]) / "test_utils.py"
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    names = "SelectiveLogSoftmax or EntropyFromLogits"
    command = [sys.executable, "-m", "pytest", "-p", "with_our_patch", "-q", "-rs", "-k", names]
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and adapter.__name__ in done.stdout
