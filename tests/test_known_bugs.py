"""Bugs that kernels and trainers of this field have shipped, one test each, on every backend.

The docstring names the public threads that reported it; the number is the order of appearance in
our list of pitfalls.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import rlhf_kernels as rk
from compare import assert_close_to_truth
from rlhf_kernels.aggregation import AGGREGATIONS
from rlhf_kernels.backend import INTERPRETING
from rlhf_kernels.opspec import Maker, map_tensors
from rlhf_kernels.specs import SPECS


def random(*shape: int, scale: float = 1.0, seed: int = 0, device: str = "cpu") -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def random_tokens(vocab: int, *shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(9)).to(device)


# ---- Wrong numbers --------------------------------------------------------------------------


def test_vocab_not_multiple_of_tile(device, backend):
    """1. Padded tile columns leak into the log-sum (log-prob up to +123). verl 2656, 2899"""
    for vocab in (2, 3, 15, 17, 63, 65, 2047, 2049, 4099, 50257):
        logits = random(3, vocab, scale=0.1, device=device) - 200.0  # a leaked 0 would dominate
        tokens = random_tokens(vocab, 3, device=device)
        out = rk.token_logprob(logits, tokens, with_entropy=True, backend=backend)
        truth = logits.double().log_softmax(-1)
        expected = truth.gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(out.logprob.double(), expected, rtol=0, atol=5e-5)
        assert (out.logprob <= 0).all()
        torch.testing.assert_close(
            out.entropy.double(), -(truth.exp() * truth).sum(-1), rtol=0, atol=5e-5
        )


def test_all_strongly_negative_logits(device, backend):
    """2. A running maximum that starts at 0 gives NaN. SkyRL 2141"""
    logits = random(4, 5000, device=device) - 3e4
    tokens = random_tokens(5000, 4, device=device)
    out = rk.token_logprob(logits, tokens, with_entropy=True, backend=backend)
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(out.logprob.double(), expected, rtol=0, atol=2e-6)
    assert out.entropy.isfinite().all()


@pytest.mark.parametrize("where", ["one", "leading block", "all but one"])
def test_minus_inf_logits(device, backend, where):
    """3. Entropy 0 * -inf = NaN, NaN gradients, a whole leading block. flash-attention 1930,
    trl 7221, 7252"""
    logits = random(3, 9000, device=device)
    banned = torch.zeros(9000, dtype=torch.bool, device=device)
    if where == "one":
        banned[17] = True
    elif where == "leading block":
        banned[:4096] = True
    else:
        banned[:8999] = True
    logits[:, banned] = -torch.inf
    logits.requires_grad_()
    tokens = torch.full((3,), 8999, device=device)
    out = rk.token_logprob(logits, tokens, with_entropy=True, backend=backend)
    kept = logits.detach()[:, ~banned].double().log_softmax(-1)
    torch.testing.assert_close(out.logprob.double(), kept[:, -1], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        out.entropy.double(), -(kept.exp() * kept).sum(-1), rtol=0, atol=3e-6
    )
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, banned] == 0).all()


def test_large_common_offset(device, backend):
    """4. Shift invariance. pytorch 195829"""
    steps = torch.arange(3001.0, device=device).remainder(64) / 8  # exact beside 1e4 in float32
    logits = steps.repeat(2, 1)
    logits[1] = logits[1].flip(0)
    tokens = torch.tensor([5, 2900], device=device)
    results = []
    for offset in (0.0, 8192.0, -8192.0):
        x = (logits + offset).requires_grad_()
        out = rk.token_logprob(x, tokens, with_entropy=True, temperature=0.7, backend=backend)
        (out.logprob.sum() + out.entropy.sum()).backward()
        results.append((out.logprob.detach(), out.entropy.detach(), x.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_per_token_upstream_gradient(device, backend):
    """5. Every row scaled by the first row's upstream gradient. Liger 968, 1298"""
    logits = random(6, 700, device=device).requires_grad_()
    tokens = random_tokens(700, 6, device=device)
    weight = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 100.0], device=device)
    rk_grad = torch.autograd.grad(
        (rk.token_logprob(logits, tokens, backend=backend) * weight).sum(), logits
    )[0]
    p = logits.detach().double().softmax(-1)
    onehot = torch.nn.functional.one_hot(tokens, 700)
    expected = weight.double()[:, None] * (onehot - p)
    torch.testing.assert_close(rk_grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_bf16_target_gradient(device, backend):
    """6. onehot - p cancels in bf16. Liger 1329, TransformerEngine 3193, 2325, CCE 14"""
    logits = torch.zeros(1, 512, dtype=torch.bfloat16, device=device)
    logits[0, 7] = 14.0  # p = 0.99957...: 1 - p is 0 in bf16, 4e-4 in truth
    logits.requires_grad_()
    tokens = torch.tensor([7], device=device)
    rk.token_logprob(logits, tokens, backend=backend).sum().backward()
    truth = 511 / (511 + math.exp(14))
    assert logits.grad[0, 7].item() == pytest.approx(truth, rel=2**-8)


def test_kl_direction(device, backend):
    """8. KL(p || q) against KL(q || p). trl 4935"""
    p, q = torch.tensor([0.5, 0.5], device=device), torch.tensor([0.9, 0.1], device=device)
    kl = rk.logprob_kl(
        p.log()[None], q.log()[None], torch.tensor([0], device=device), backend=backend
    ).kl
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.511
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # 0.368
    assert kl.item() == pytest.approx(forward, rel=1e-6)
    assert kl.item() != pytest.approx(reverse, rel=0.1)
    k1 = rk.kl_estimate(p.log(), q.log(), kind="k1", backend=backend)
    torch.testing.assert_close(k1, p.log() - q.log())


def test_inplace_backward_reuse(device, backend):
    """10. Logits used twice, retain_graph, two heads, a leaf. Liger 272, 343, 1251; unsloth 5002;
    Megatron-LM 1594"""
    tokens = random_tokens(300, 4, device=device)

    def head(logits: Tensor) -> Tensor:
        return rk.token_logprob(logits, tokens, inplace_backward=True, backend=backend).sum()

    leaf = random(4, 300, device=device).requires_grad_()
    with pytest.raises(ValueError, match=r"inplace_backward: .*leaf"):
        head(leaf)
    with pytest.raises(ValueError, match=r"inplace_backward: .*view of one"):
        head(leaf[:])
    with torch.no_grad():
        head(leaf)  # nothing will be overwritten

    logits = leaf * 1.0
    loss = head(logits)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    logits = leaf * 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (head(logits) + head(logits)).backward()

    logits = (leaf * 1.0).exp()  # the producer saved its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        head(logits).backward()

    expanded = (random(1, 300, device=device).requires_grad_() * 1.0).expand(4, 300)
    with pytest.raises(ValueError, match="inplace_backward: expected rows that do not overlap"):
        head(expanded)


def test_inplace_backward_of_a_view_leaves_the_rest(device, backend):
    """10. The logits of all but the last position, as trainers slice them. Liger 343"""
    leaf = random(2, 5, 60, device=device).requires_grad_()
    tokens = random_tokens(60, 2, 4, device=device)
    expected = torch.autograd.grad(
        rk.token_logprob(leaf[:, :-1], tokens, backend=backend).sum(), leaf
    )
    whole = leaf * 1.0
    rk.token_logprob(whole[:, :-1], tokens, inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(leaf.grad, expected[0])
    assert torch.equal(whole[:, -1], leaf[:, -1])


def test_int32_overflow_of_offsets(device, backend, gpu_memory):
    """11. Row offsets of 2^31 elements and more. triton 1058, fla 1082, CCE 37, Liger 1294"""
    if backend == "reference":
        pytest.skip("PyTorch's own indexing")
    if device == "cuda":
        gpu_memory(5)
    vocab, stride = 300, 2**31 + 64
    # Only the two rows are touched: on the CPU the gap, which is never written, costs no memory.
    storage = torch.empty(stride + vocab, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((2, vocab), (stride, 1))
    logits[0], logits[1] = random(vocab, device=device), random(vocab, seed=1, device=device)
    tokens = random_tokens(vocab, 2, device=device)
    got = rk.token_logprob(logits, tokens, backend=backend)
    assert torch.equal(got, rk.token_logprob(logits.contiguous(), tokens, backend=backend))


def test_int32_overflow_of_the_grid(device, backend):
    """11. More rows than 65535, the limit of a second grid dimension. fla 1082"""
    if INTERPRETING:
        pytest.skip("so many programs take the interpreter minutes; grids have one dimension there")
    logits = random(70001, 8, device=device)
    tokens = random_tokens(8, 70001, device=device)
    got = rk.token_logprob(logits, tokens, backend=backend)
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)


def test_zero_valid_tokens(device, backend):
    """12. NaN loss or infinite gradient. Automodel 3796, OLMo-core 657, torchtune 2341,
    unsloth 7677, aiter 5165"""
    for rows in (0, 3):
        logits = torch.full((rows, 40), torch.nan, device=device, requires_grad=True)
        ignored = torch.full((rows,), -100, device=device)
        out = rk.token_logprob(logits, ignored, with_entropy=True, backend=backend)
        kl = rk.logprob_kl(logits, logits.detach(), ignored, backend=backend)
        (out.logprob.sum() + out.entropy.sum() + kl.kl.sum() + kl.logprob.sum()).backward()
        assert all((x == 0).all() for x in (*out, *kl))
        assert (logits.grad == 0).all()


def test_nonuniform_upstream_layout(device, backend):
    """13. Expanded (stride 0) or non-contiguous upstream gradients. verl's linear cross entropy
    asserts contiguity"""
    logits = random(4, 6, 90, device=device).requires_grad_()
    tokens = random_tokens(90, 4, 6, device=device)
    dense = torch.ones(4, 6, device=device)
    layouts = {
        "expanded": torch.ones((), device=device).expand(4, 6),
        "transposed": torch.ones(6, 4, device=device).T,
        "strided": torch.ones(4, 12, device=device)[:, ::2],
    }
    out = rk.token_logprob(logits, tokens, with_entropy=True, backend=backend)
    (expected,) = torch.autograd.grad(out, logits, (dense, dense), retain_graph=True)
    for name, grad in layouts.items():
        (got,) = torch.autograd.grad(out, logits, (grad, grad), retain_graph=True)
        assert torch.equal(got, expected), name
    (got,) = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), logits)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [300, -1, -101, 2**40, -(2**62)])
@pytest.mark.parametrize("op", ["token_logprob", "token_logprob_and_grad", "logprob_kl"])
def test_out_of_range_label(device, backend, op, value, monkeypatch):
    """14. Uninitialised output for labels outside [0, V). verl's linear cross entropy"""
    tokens = random_tokens(300, 2, 3, device=device)
    tokens[1, 2] = value
    logits = random(2, 3, 300, device=device).requires_grad_()

    def call() -> tuple[list[Tensor], Tensor]:
        if op == "token_logprob_and_grad":
            out = rk.token_logprob_and_grad(logits, tokens, backend=backend)
            return [out.logprob], out.grad_logits
        if op == "token_logprob":
            found = [rk.token_logprob(logits, tokens, backend=backend)]
        else:
            both = rk.logprob_kl(logits, logits.detach(), tokens, backend=backend)
            found = [both.logprob, both.ref_logprob]
        return found, torch.autograd.grad(found[0].nansum(), logits)[0]

    if backend not in ("reference", "cpu") or device == "cuda":  # to look would make a GPU wait
        found, grad = call()
        for x in found:
            assert x.isnan().nonzero().tolist() == [[1, 2]]
        assert not grad[1, 2].any() and grad.isfinite().all()
        monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    if backend != "reference" or device == "cpu":
        expected = rf"expected a value in \[0, 300\) .* got {value} at position \(1, 2\)"
        with pytest.raises(IndexError, match=expected):
            call()


def test_target_logit_precision(device, backend):
    """15. Target logit rounded to fp16 or bf16: up to 0.008 nats. Liger FSLCE"""
    logits = torch.zeros(1, 64, device=device)
    logits[0, 3] = 10.0 + 2**-9  # not a bf16 number
    got = rk.token_logprob(logits, torch.tensor([3], device=device), backend=backend)
    expected = logits.double().log_softmax(-1)[0, 3].item()
    assert got.item() == pytest.approx(expected, abs=1e-9, rel=1e-3)  # -2.9e-3


def _changing(name: str, device: str, i: int) -> dict[str, Any]:
    """Arguments of call number ``i`` of an operator, of which a length or a number is another."""
    x = random(4, 30 + i, device=device)
    y = random(4, 30 + i, device=device)
    return {
        "temperature": {
            "logits": random(5 + i, 64, device=device),
            "tokens": random_tokens(64, 5 + i, device=device),
            "temperature": 0.5 + i / 8,
        },
        "head": {
            "hidden": random(5 + i, 16, device=device),
            "weight": random(64, 16, device=device),
            "tokens": random_tokens(64, 5 + i, device=device),
            "temperature": 0.5 + i / 8,
        },
        "kl_coef": {
            **{"logprob": x, "old_logprob": y, "advantages": x * y},
            **{"ref_logprob": y, "kl_coef": 0.1 + i / 16, "normalizer": 100.5 + i},
        },
        "length": {
            **{"logprob": x, "old_logprob": y, "advantages": x * y},
            "aggregation": "seq-mean-token-sum-norm",
        },
        "max_length": {
            **{"values": x, "old_values": y, "returns": x * y},
            **{"aggregation": "seq-mean-token-sum-norm", "max_length": 100 + i},
        },
        "reward": {
            **{"scores": x[:, 0], "logprob": x, "ref_logprob": y, "mask": None},
            "kl_coef": 0.1 + i / 16,
        },
    }[name]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("temperature", rk.token_logprob),
        ("head", rk.linear_logprob),
        ("kl_coef", rk.policy_loss),
        ("length", rk.policy_loss),
        ("max_length", rk.value_loss),
        ("reward", rk.kl_shaped_rewards),
    ],
)
def test_recompile_per_length(device, backend, name, function):
    """16. Lengths and numbers as compile-time constants. Liger GRPO, TRL kernels"""
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()  # the whole of AOTAutograd: it makes numbers constant of its own accord
    through_autograd = aot_autograd(fw_compiler=count)
    compiled = torch.compile(
        lambda inputs: function(**inputs, backend=backend),
        fullgraph=True,
        backend=through_autograd,
    )
    for i in range(12):
        inputs = _changing(name, device, i)
        got, expected = compiled(inputs), function(**inputs, backend=backend)
        got, expected = (x[0] if isinstance(x, tuple) else x for x in (got, expected))
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    assert len(compilations) <= 3  # first call, length becomes symbolic, number too


def test_python_float_becomes_fp64_under_the_compiler(device, backend):
    """17. A Python number turns the graph into float64: 24x slower. Liger 1362"""
    dtypes = []

    def inspect(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.dim() > 0:
                dtypes.append(value.dtype)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(rk.token_logprob, fullgraph=True, backend=inspect)
    for temperature in (0.7, 0.8):
        function(
            random(4, 64, device=device),
            random_tokens(64, 4, device=device),
            temperature=temperature,
            backend=backend,
        )
    torch._dynamo.reset()
    assert dtypes and torch.float64 not in dtypes


def test_host_sync():
    """18. .item() and torch.equal in the hot path; breaks CUDA graphs. aiter 5165, Liger

    Fake tensors have no values: whatever wants to read one raises. linear_token_loss looks which
    tokens are ignored before it multiplies, and says so; in linear_logprob an operator does.
    """
    for spec in SPECS:
        if not spec.compiles:
            continue
        for sample in spec.samples(Maker()):
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                inputs = map_tensors(sample.inputs, mode.from_tensor)
                for name in spec.leaves(inputs):
                    inputs[name] = inputs[name].detach().requires_grad_()
                out = spec.function(**inputs, backend="cpu")
                loss = out if isinstance(out, Tensor) else out[0]
                if loss.requires_grad:
                    loss.sum().backward()
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        mode.from_tensor(torch.ones(1)).item()


def test_row_alone_equals_row_in_batch(device, backend):
    """19. Old log-prob != new log-prob when micro-batch sizes differ. verl 6280"""
    logits = random(16, 2500, scale=4.0, device=device)
    tokens = random_tokens(2500, 16, device=device)
    old = rk.token_logprob(logits, tokens, backend=backend)
    for size in (1, 3, 8):
        parts = zip(logits.split(size), tokens.split(size), strict=True)
        new = torch.cat([rk.token_logprob(x, t, backend=backend) for x, t in parts])
        if backend == "reference":
            torch.testing.assert_close(new, old, rtol=0, atol=2e-6)
        else:
            assert torch.equal((new - old).exp(), torch.ones_like(old))


def test_low_precision_log_softmax(device, backend):
    """20. bf16 in, bf16 softmax. trl 7084, transformers 31267"""
    logits = (random(8, 4000, device=device) * 3).bfloat16()
    tokens = random_tokens(4000, 8, device=device)
    out = rk.token_logprob(logits, tokens, with_entropy=True, backend=backend)
    assert out.logprob.dtype == out.entropy.dtype == torch.float32
    truth = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert_close_to_truth(out.logprob, truth.float(), truth, 2e-6)


# ---- Losses ---------------------------------------------------------------------------------

LOSSES = ("policy_loss", "value_loss")
MASK = "mask"


def loss_inputs(op: str, *shape: int, device: str, seed: int = 0) -> dict[str, Any]:
    """All tensors of a loss, with every term switched on, and a random mask."""
    g = torch.Generator().manual_seed(seed)
    x, a, b, c = torch.randn(4, *shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.6
    if op == "value_loss":
        tensors = {"values": x, "old_values": x + 0.3 * a, "returns": b, MASK: mask}
        return {name: t.to(device) for name, t in tensors.items()}
    tensors = {
        "logprob": x,
        "old_logprob": x + 0.3 * a,
        "advantages": b,
        MASK: mask,
        "importance_weight": c.exp(),
        "ref_logprob": x + 0.2 * b,
        "entropy": a.abs(),
    }
    inputs: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
    return inputs | {"kl_coef": 0.1, "entropy_coef": 0.01}


def loss_and_gradients(op: str, inputs: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """The loss, its statistics, and the gradients of the differentiable arguments."""
    names = ("values",) if op == "value_loss" else ("logprob", "entropy")
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    loss, stats = getattr(rk, op)(**{**inputs, **leaves}, **options)
    loss.backward()
    return loss.detach(), stats, [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("op", LOSSES)
def test_zero_valid_tokens_in_a_loss(device, backend, op, aggregation):
    """12. NaN loss or inf gradient. Automodel 3796, OLMo-core 657, torchtune 2341, unsloth 7677"""
    for shape in ((3, 5), (0, 5), (3, 0)):
        inputs = loss_inputs(op, *shape, device=device)
        inputs[MASK] = torch.zeros(shape, dtype=torch.bool, device=device)
        options = {"aggregation": aggregation, "backend": backend}
        loss, stats, grads = loss_and_gradients(op, inputs, **options)
        assert loss.item() == 0
        assert not any(g.any() for g in grads)
        assert not any(x.any() for x in stats)
        assert stats.clip_frac.item() == 0
        rate = stats.explained_variance if op == "value_loss" else stats.approx_kl
        assert rate.item() == 0


@pytest.mark.parametrize("op", LOSSES)
def test_nonuniform_upstream_layout_of_a_loss(device, backend, op):
    """13. Expanded upstream gradients, and leaves that are slices, transposed or expanded."""
    inputs = loss_inputs(op, 4, 6, device=device)
    _, _, expected = loss_and_gradients(op, inputs, backend=backend)
    name = "values" if op == "value_loss" else "logprob"
    leaf = inputs[name].T.contiguous().requires_grad_()  # seen through a transpose
    loss, _ = getattr(rk, op)(**{**inputs, name: leaf.T}, backend=backend)
    loss.expand(5).sum().backward()
    torch.testing.assert_close(leaf.grad, 5 * expected[0].T)
    # One number per sequence, expanded over its tokens: its gradient is the sum over them.
    column = inputs[name][:, :1].clone().requires_grad_()
    loss, _ = getattr(rk, op)(**{**inputs, name: column.expand(4, 6)}, backend=backend)
    loss.backward()
    repeated = {**inputs, name: inputs[name][:, :1].repeat(1, 6)}
    _, _, per_token = loss_and_gradients(op, repeated, backend=backend)
    torch.testing.assert_close(column.grad, per_token[0].sum(1, keepdim=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("op", LOSSES)
def test_mean_over_accumulation(device, backend, op, aggregation):
    """21. Local denominators under accumulation or data parallelism. trl 2617, 2995, 3021, 3138,
    5890, 6024; Liger 802, 1082; verl 593; open-instruct 1161"""
    inputs = loss_inputs(op, 6, 40, device=device)
    inputs[MASK][0, 3:] = False  # micro-batches of very different sizes
    inputs[MASK][4] = False
    options = {"aggregation": aggregation, "backend": backend}
    loss, _, grads = loss_and_gradients(op, inputs, **options)
    tokens = inputs[MASK].sum()
    sequences = inputs[MASK].any(1).sum()
    for as_number in (True, False):
        normalizer: Any = tokens if aggregation.startswith("token") else sequences
        if aggregation == "token-sum":
            normalizer = torch.ones_like(tokens)
        normalizer = normalizer.item() if as_number else normalizer
        total, parts = torch.zeros_like(loss), []
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            one, _, part_grads = loss_and_gradients(op, part, **options, normalizer=normalizer)
            total += one
            parts.append(part_grads)
        torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
        for whole, *pieces in zip(grads, *parts, strict=True):
            torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("op", LOSSES)
def test_packed_equals_padded(device, backend, op, aggregation):
    """22. Aggregation over packed rows. tunix 1662"""
    lengths = [700, 1, 0, 33]
    padded = loss_inputs(op, 4, 700, device=device)
    real = torch.arange(700, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded[MASK] &= real
    packed = {k: v[real] if isinstance(v, Tensor) else v for k, v in padded.items()}
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    levels = ("token",) if op == "value_loss" else ("token", "sequence")
    for level in levels:
        options: dict[str, Any] = {"aggregation": aggregation, "backend": backend}
        if op == "policy_loss":
            options["ratio_level"] = level
        loss, stats, grads = loss_and_gradients(op, padded, **options, max_length=700)
        layout = {"cu_seqlens": offsets, "max_length": 700}
        loss2, stats2, grads2 = loss_and_gradients(op, packed, **options, **layout)
        torch.testing.assert_close(loss2, loss, rtol=1e-5, atol=1e-6)
        for a, b in zip(stats, stats2, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
        for a, b in zip(grads, grads2, strict=True):
            torch.testing.assert_close(b, a[real], rtol=1e-5, atol=1e-7)
            assert not a[~real].any()


def test_explained_variance_cancellation(device, backend):
    """23. E[x^2] - mean^2: a spread of 0.1 around 1e4 is lost in float32. NeMo-RL 4158"""
    g = torch.Generator().manual_seed(0)
    returns = (1e4 + 0.1 * torch.randn(8, 1000, generator=g)).to(device)
    values = (returns + 0.05 * torch.randn(8, 1000, generator=g).to(device)).contiguous()
    halves = [
        rk.value_loss(values[rows], values[rows], returns[rows], backend=backend)[1]
        for rows in (slice(0, 3), slice(3, 8))
    ]
    got = (halves[0] + halves[1]).explained_variance.item()
    errors = returns.double() - values.double()
    expected = 1 - errors.var(correction=0) / returns.double().var(correction=0)
    assert 0.5 < expected < 0.9
    assert got == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("op", LOSSES)
def test_nan_at_masked_slot_of_a_loss(device, backend, op, aggregation):
    """24. NaN * 0. OpenRLHF 1240, AReaL 1347"""
    inputs = loss_inputs(op, 3, 50, device=device)
    poisoned = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and name != MASK:
            for start, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
                spots = torch.zeros_like(inputs[MASK])
                spots[:, start::3] = True
                x = torch.where(spots & ~inputs[MASK], bad, x)
            poisoned[name] = x
    levels = ("token",) if op == "value_loss" else ("token", "sequence")
    for level in levels:
        options: dict[str, Any] = {"aggregation": aggregation, "backend": backend}
        if op == "policy_loss":
            options["ratio_level"] = level
        loss, stats, grads = loss_and_gradients(op, inputs, **options)
        loss2, stats2, grads2 = loss_and_gradients(op, poisoned, **options)
        assert torch.equal(loss, loss2)
        assert all(torch.equal(a, b) for a, b in zip(stats, stats2, strict=True))
        for a, b in zip(grads, grads2, strict=True):
            assert torch.equal(a, b) and not b[~inputs[MASK]].any()


@pytest.mark.parametrize("op", LOSSES)
def test_all_zero_mask_of_one_sequence(device, backend, op):
    """25. A sequence without a valid token is left out of the mean over sequences. NeMo-RL 158"""
    inputs = loss_inputs(op, 4, 30, device=device)
    inputs[MASK][2] = False
    rest = {k: torch.cat([v[:2], v[3:]]) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for aggregation in AGGREGATIONS:
        options = {"aggregation": aggregation, "backend": backend}
        loss, _, grads = loss_and_gradients(op, inputs, **options)
        loss2, _, grads2 = loss_and_gradients(op, rest, **options)
        torch.testing.assert_close(loss, loss2, rtol=1e-6, atol=1e-7)
        for a, b in zip(grads, grads2, strict=True):
            assert not a[2].any()
            torch.testing.assert_close(torch.cat([a[:2], a[3:]]), b, rtol=1e-6, atol=1e-8)


def test_importance_ratio_overflow(device, backend):
    """30. exp(200) is inf in float32: finite where the clip binds, no 0 * inf in the gradient."""
    far = torch.tensor([[200.0, 200.0, 0.0]], device=device)
    advantages = torch.tensor([[1.0, 0.0, 1.0]], device=device)
    for level, expected in (("token", (-1.2 + 0 - 1) / 3), ("sequence", (-1.2 + 0 - 1.2) / 3)):
        logprob = far.clone().requires_grad_()
        old = torch.zeros_like(far)
        options = {"ratio_level": level, "backend": backend}
        loss, _ = rk.policy_loss(logprob, old, advantages, **options)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        slope = -1 / 3 if level == "token" else 0.0
        expected_grad = torch.tensor([[0.0, 0.0, slope]], device=device)
        torch.testing.assert_close(logprob.grad, expected_grad)
    # A < 0 is not bounded by the clip; dual_clip or log_ratio_clamp bound it.
    negative = torch.full_like(far, -1.0)
    loss, _ = rk.policy_loss(far, torch.zeros_like(far), negative, backend=backend)
    assert loss.item() == torch.inf
    for bound, value in (({"dual_clip": 3.0}, 3.0), ({"log_ratio_clamp": 2.0}, 2.718281828**2)):
        logprob = far.clone().requires_grad_()
        loss, _ = rk.policy_loss(logprob, torch.zeros_like(far), negative, backend=backend, **bound)
        loss.backward()
        assert loss.item() == pytest.approx((2 * value + 1) / 3, rel=1e-5)
        expected_grad = torch.tensor([[0.0, 0.0, 1 / 3]], device=device)
        torch.testing.assert_close(logprob.grad, expected_grad)


def test_k3_overflow_in_a_loss(device, backend):
    """30. k3 of a reference far above the policy is inf, not NaN, and stays out of the rest."""
    logprob = torch.tensor([[-120.0, -1.0, -1.0]], device=device, requires_grad=True)
    ref = torch.tensor([[0.0, -1.0, -1.5]], device=device)
    options = {"objective": "reinforce", "kl_coef": 0.1, "backend": backend}
    zero = torch.zeros_like(ref)
    loss, _ = rk.policy_loss(logprob, None, zero, ref_logprob=ref, **options)
    loss.backward()
    assert loss.item() == torch.inf
    assert logprob.grad[0, 0].item() == -torch.inf and logprob.grad[0, 1:].isfinite().all()
    # with kl_coef = 0 it is not computed, masked it does not count
    options["kl_coef"] = 0.0
    assert rk.policy_loss(logprob, None, zero, ref_logprob=ref, **options)[0].item() == 0
    options["kl_coef"] = 0.1
    mask = torch.tensor([[0, 1, 1]], device=device)
    loss, _ = rk.policy_loss(logprob, None, zero, mask, ref_logprob=ref, **options)
    assert loss.item() == pytest.approx(0.1 * (0.6065306597 - 0.5) / 2, rel=1e-5)


def test_k3_in_loss_bias(device, backend):
    """31. The expected gradient of k1 in a loss is zero, that of k2 is the gradient of KL(p || q),
    that of k3 the gradient of KL(q || p). NeMo-RL 2506, trl 4638, 4967, open-instruct 534"""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=g, dtype=torch.float64).to(device).requires_grad_()
    log_q = torch.randn(6, generator=g, dtype=torch.float64).to(device).log_softmax(0)

    def expected_gradient(kind: str) -> Tensor:
        """Over all tokens, each with its probability: exact, not sampled."""
        log_p = logits.log_softmax(0)
        leaf = log_p.detach().requires_grad_()
        loss, _ = rk.policy_loss(
            leaf,
            None,
            torch.zeros_like(leaf),
            objective="reinforce",
            ref_logprob=log_q,
            kl_coef=1.0,
            kl_kind=kind,
            aggregation="token-sum",
            backend=backend,
        )
        loss.backward()
        return torch.autograd.grad((log_p * (log_p.detach().exp() * leaf.grad)).sum(), logits)[0]

    def gradient(divergence: Tensor) -> Tensor:
        return torch.autograd.grad(divergence, logits)[0]

    log_p = logits.log_softmax(0)
    forward = gradient((log_p.exp() * (log_p - log_q)).sum())
    log_p = logits.log_softmax(0)
    reverse = gradient((log_q.exp() * (log_q - log_p)).sum())
    assert (forward - reverse).abs().max() > 1e-2
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros_like(logits))
    torch.testing.assert_close(expected_gradient("k2"), forward)
    torch.testing.assert_close(expected_gradient("k3"), reverse)


def test_negative_entropy(device, backend):
    """33. Padded slots drag the entropy bonus below zero. trl 6121"""
    entropy = torch.tensor([[1.0, 2.0, -7e4, -7e4]], device=device, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0]], device=device)
    zero = torch.zeros(1, 4, device=device)
    loss, _ = rk.policy_loss(
        zero, zero, zero, mask, entropy=entropy, entropy_coef=0.5, backend=backend
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * 1.5)
    torch.testing.assert_close(
        entropy.grad, torch.tensor([[-0.25, -0.25, 0.0, 0.0]], device=device)
    )


# ---- Sequences and rewards ------------------------------------------------------------------


def test_kl_direction_of_kl_estimate(device, backend):
    """8. d is log p - log q with p the policy, not the reverse: weighted by p, k1 and k3 sum to
    KL(p || q). trl 4935"""
    p = torch.tensor([0.7, 0.2, 0.1], device=device)
    q = torch.tensor([0.1, 0.1, 0.8], device=device)
    forward_kl, backward_kl = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    assert abs(forward_kl - backward_kl) > 0.05
    for kind in ("k1", "k3"):
        mean = (p * rk.kl_estimate(p.log(), q.log(), kind=kind, backend=backend)).sum()
        torch.testing.assert_close(mean, forward_kl, rtol=1e-5, atol=1e-6)


def test_zero_valid_tokens_of_sequence_ops(device, backend):
    """12. NaN loss or infinite gradient when nothing is valid, or nothing is there. Automodel 3796,
    OLMo-core 657, torchtune 2341, unsloth 7677, aiter 5165"""
    for shape in ((2, 3), (0, 3), (2, 0)):
        x = torch.ones(shape, device=device, requires_grad=True)
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        scores = torch.ones(shape[0], device=device)
        for op in (rk.masked_mean, rk.masked_whiten):
            out = op(x, mask, backend=backend)
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert (out == 0).all() and (grad == 0).all()
        for out in (
            *rk.gae(x, x, mask, last_value=scores, backend=backend),
            rk.kl_shaped_rewards(scores, x, x, mask, kl_coef=1.0, backend=backend),
        ):
            assert out.shape == shape and (out == 0).all()
    none = torch.zeros(0, device=device, requires_grad=True)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    for loss, stats in (
        rk.pairwise_reward_loss(none, none, center_coef=1.0, backend=backend),
        rk.ranking_reward_loss(none, none, offsets, center_coef=1.0, backend=backend),
    ):
        assert loss == 0 and stats.accuracy == 0 and stats.margin == 0


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_group_std_cancellation(device, backend, offset):
    """23. E[x^2] - mean^2 loses the variance at a large mean. NeMo-RL 4158"""
    x = (random(4096, device=device) * 0.25).round(decimals=2) * 64 + offset
    mask = torch.ones_like(x, dtype=torch.bool)
    truth = x.double()
    truth = (truth - truth.mean()) / truth.std()
    got = rk.masked_whiten(x, mask, backend=backend).double()
    # What the float32 mean of the plain formula can be off by, over the deviation of 16.
    atol = 2e-6 + (2**-24 * abs(offset) / 8 if backend == "reference" else 0)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=atol)
    if offset == 1e4:  # the shortcut, for comparison: its variance is off by more than 1 %
        shortcut = (x * x).mean() - x.mean() ** 2
        assert abs(shortcut.double() / x.double().var() - 1) > 0.01


def test_nan_at_masked_slot_of_sequence_ops(device, backend):
    """24. NaN * 0 is NaN: what stands at a masked place reaches no output and no gradient.
    OpenRLHF 1240, AReaL 1347"""
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[3] = False
    mask = mask.to(device)
    clean = random(6, 50, device=device)
    scores = random(6, seed=1, device=device)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = clean.masked_fill(~mask, garbage)
        for op in (rk.masked_mean, rk.masked_whiten):
            outputs = []
            for x in (clean, dirty):
                leaf = x.clone().requires_grad_()
                out = op(leaf, mask, backend=backend)
                weight = torch.where(mask, clean, 1.0) if out.dim() else 1.0
                (grad,) = torch.autograd.grad((out * weight).sum(), leaf)
                assert (grad[~mask] == 0).all()
                outputs.append((out, grad))
            for a, b in zip(*outputs, strict=True):
                assert torch.equal(a, b)
        for a, b in zip(
            rk.gae(clean, clean, mask, backend=backend),
            rk.gae(dirty, dirty, mask, backend=backend),
            strict=True,
        ):
            assert torch.equal(a, b) and (b[~mask] == 0).all()
        for kind in ("k1", "k2", "k3"):
            kwargs = {"kl_coef": 0.1, "kl_kind": kind, "backend": backend}
            expected = rk.kl_shaped_rewards(scores, clean, 2 * clean, mask, **kwargs)
            got = rk.kl_shaped_rewards(
                scores.masked_fill(~mask.any(1), garbage), dirty, 2 * dirty, mask, **kwargs
            )
            assert torch.equal(got, expected) and (got[~mask] == 0).all()


def test_all_zero_mask_of_sequence_ops(device, backend):
    """25. A sequence without a valid token gives zeros, and leaves the other sequences alone.
    NeMo-RL 158"""
    rewards, values = random(2, 4, 30, device=device)
    scores = random(4, seed=2, device=device)
    mask = torch.ones(4, 30, dtype=torch.bool, device=device)
    mask[1] = False
    others = [0, 2, 3]
    got = [
        *rk.gae(rewards, values, mask, last_value=scores, backend=backend),
        rk.kl_shaped_rewards(scores, rewards, values, mask, kl_coef=0.1, backend=backend),
    ]
    few = (rewards[others], values[others], mask[others])
    expected = [
        *rk.gae(*few, last_value=scores[others], backend=backend),
        rk.kl_shaped_rewards(scores[others], *few, kl_coef=0.1, backend=backend),
    ]
    for a, b in zip(got, expected, strict=True):
        assert (a[1] == 0).all() and torch.equal(a[others], b)
    for op in (rk.masked_mean, rk.masked_whiten):
        whole, part = op(rewards, mask, backend=backend), op(rewards[others], mask[others])
        torch.testing.assert_close(whole[others] if whole.dim() else whole, part)


@pytest.mark.parametrize("garbage", [100.0, -1e30, math.nan])
def test_gae_pad_leak(device, backend, garbage):
    """26. A value at a pad taken for the next value; a pad or an interior gap that ends the
    episode; a mask whose last token is no EOS. ROLL 447, verl 2337, miles 1827, verl 3805"""
    rewards, values = random(2, 1, 6, device=device)
    last = torch.tensor([0.7], device=device)
    expected = rk.gae(rewards, values, gamma=0.9, last_value=last, backend=backend)
    for holes in ([6, 7, 8], [0, 1], [3], [2, 3, 4, 9], [0, 2, 4, 6, 8]):  # in the longer row
        size = 6 + len(holes)
        valid = torch.ones(1, size, dtype=torch.bool, device=device)
        valid[:, holes] = False
        wide = torch.full((2, 1, size), garbage, device=device)
        wide[:, valid] = torch.stack([rewards[0], values[0]])
        got = rk.gae(*wide, valid, gamma=0.9, last_value=last, backend=backend)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[valid], b[0], rtol=1e-5, atol=1e-6)
            assert (a[~valid] == 0).all()


@pytest.mark.parametrize("pads", [0.0, 1e6, math.nan])
def test_whitening_includes_pads(device, backend, pads):
    """27. Mean and variance over the pads too; a single valid element divides by n - 1 = 0. (A hang
    on an empty shard: test_masked_whiten_and_mean_over_two_processes.) SkyRL 1782, slime 1369,
    2235"""
    x = torch.tensor([[1.0, 2.0, pads], [6.0, pads, pads]], device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    got = rk.masked_whiten(x, mask, backend=backend)  # mean 3, variance (4 + 1 + 9) / 2
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]], device=device) / 7**0.5
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert rk.masked_mean(x, mask, backend=backend) == 3
    single = rk.masked_whiten(x[1:], mask[1:], backend=backend)
    assert single.tolist() == [[0.0, 0.0, 0.0]]


def test_k3_overflow_of_kl_estimate(device, backend):
    """30. e^-d of a large difference, and its derivative. As documented: +inf beyond d = -88.7 in
    float32 without a clamp, never NaN; with one the value is bounded and the gradient zero.
    OpenRLHF's own tests"""
    d = torch.tensor([-80.0, -200.0, 200.0], device=device)
    logprob = d.clone().requires_grad_()
    zero = torch.zeros(3, device=device)
    kl = rk.kl_estimate(logprob, zero, backend=backend)
    (grad,) = torch.autograd.grad(kl.sum(), logprob)
    expected = torch.tensor([math.exp(80) - 81, math.inf, 199.0], device=device)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=0)
    expected = torch.tensor([1 - math.exp(80), -math.inf, 1.0], device=device)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=0)
    for kind, bound in (("k1", 10), ("k2", 50), ("k3", math.exp(10) - 11)):
        kl = rk.kl_estimate(logprob, zero, kind=kind, clamp=10.0, backend=backend)
        (grad,) = torch.autograd.grad(kl.sum(), logprob)
        assert (kl.abs() <= bound * (1 + 1e-6)).all() and (grad == 0).all()


def test_reward_position_and_eos(device, backend):
    """32. The score goes to the last valid token, by the mask alone: right and left padding,
    a response that was cut off without an EOS (mask full), an EOS that equals the pad token (masked
    as padding or not), a gap before the end. trl 1893, 3750; DeepSpeedExamples 672"""
    rows = {
        "right padding": ([1, 1, 1, 0, 0], 2),
        "left padding": ([0, 0, 1, 1, 1], 4),
        "cut off": ([1, 1, 1, 1, 1], 4),
        "EOS counted among the pads": ([0, 1, 1, 0, 0], 2),
        "gap before the end": ([1, 1, 0, 0, 1], 4),
        "one token": ([0, 1, 0, 0, 0], 1),
    }
    mask = torch.tensor([row for row, _ in rows.values()], device=device)
    zero = torch.zeros(len(rows), 5, device=device)
    scores = torch.arange(1.0, len(rows) + 1, device=device)
    rewards = rk.kl_shaped_rewards(scores, zero, zero, mask, kl_coef=0.1, backend=backend)
    expected = torch.zeros_like(zero)
    for i, (_, last) in enumerate(rows.values()):
        expected[i, last] = scores[i]
    assert torch.equal(rewards, expected)


def test_logexp_overflow(device, backend):
    """34. log(1 + exp(x)) is inf for x = 200, and its gradient NaN. OpenRLHF LogExpLoss"""
    scores = torch.tensor([-200.0, 0.0, 200.0], device=device)
    chosen = scores.clone().requires_grad_()
    loss, _ = rk.pairwise_reward_loss(chosen, torch.zeros_like(chosen), backend=backend)
    (grad,) = torch.autograd.grad(3 * loss, chosen)
    assert loss.item() == pytest.approx((200 + math.log(2)) / 3, rel=1e-6)
    assert grad.tolist() == pytest.approx([-1.0, -0.5, 0.0], abs=1e-6)
    chosen = scores.clone().requires_grad_()
    offsets = torch.tensor([0, 3], device=device)
    ranks = torch.tensor([0, 1, 2], device=device)  # the wrong way round: differences of -200, -400
    loss, _ = rk.ranking_reward_loss(chosen, ranks, offsets, backend=backend)
    (grad,) = torch.autograd.grad(3 * loss, chosen)
    assert loss.item() == pytest.approx(800 / 3, rel=1e-6)
    assert grad.tolist() == pytest.approx([-2.0, 0.0, 2.0], abs=1e-6)


def test_gae_time_loop(device, backend):
    """39. 4.6 s for a loop over 128K tokens; the cumulative sum that gamma = lam = 1 invites: at
    this length float32 sums of rewards would have lost their digits. NeMo-RL 4156, verl 2132,
    slime 2229"""
    steps = 131072 if backend != "reference" else 512
    rewards, values = random(2, 1, steps, device=device)
    out = rk.gae(rewards, values, gamma=1.0, lam=1.0, backend=backend)
    to_go = rewards.double().flip(1).cumsum(1).flip(1)
    error = (out.returns.double() - to_go).abs().max()
    # The reference carries float32; cpu carries float64; on GPUs it goes from tile to tile of 1024
    # steps, each summed by ten halvings in float32.
    roundings = {"reference": steps, "cpu": 4}.get(backend, 10)
    assert error <= roundings * 2**-24 * to_go.abs().max()


# ---- Temperature, KL, reward ----------------------------------------------------------------


def test_temperature_everywhere(device, backend):
    """29. Policy, old, reference and entropy alike. trl 3029, 4159; OpenRLHF 1319"""
    logits, ref_logits = random(2, 5, 200, scale=2.0, device=device)
    tokens = random_tokens(200, 5, device=device)
    kwargs = {"backend": backend}
    hot = rk.logprob_kl(logits, ref_logits, tokens, temperature=1.7, **kwargs)
    scaled = rk.logprob_kl(logits / 1.7, ref_logits / 1.7, tokens, **kwargs)
    for a, b in zip(hot, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    alone = rk.token_logprob(logits, tokens, temperature=1.7, with_entropy=True, **kwargs)
    torch.testing.assert_close(alone.logprob, hot.logprob)
    torch.testing.assert_close(alone.entropy, hot.entropy)
    assert not torch.allclose(hot.kl, rk.logprob_kl(logits, ref_logits, tokens, **kwargs).kl)


# ---- One token has all of the probability, or none ------------------------------------------

GAPS = (1.0, 8.0, 20.0, 27.625, 50.0, 68.0)  # log p of -1e-12 near 27.6, of -1e-30 near 69


def near_one(vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, tokens, gaps), a row for each gap and place: the token is that far above the rest.

    In the last rows the others rise towards it: each block has a new maximum.
    """
    places = sorted({0, vocab // 2, min(vocab - 1, 2048), vocab - 1})
    rows = [(gap, place) for gap in GAPS for place in [*places, -1]]
    gaps = torch.tensor([gap for gap, _ in rows])
    tokens = torch.tensor([place % vocab for _, place in rows])
    logits = -random(len(rows), vocab).abs().clamp(max=4)
    rising = torch.tensor([place < 0 for _, place in rows])
    logits[rising] = torch.linspace(-4, 0, vocab)
    logits.scatter_(1, tokens[:, None], gaps[:, None])
    return logits.to(device), tokens.to(device), gaps.double()


def near_one_truth(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """log p, 1 - p and the entropy in float64, from the distances of the other tokens alone."""
    z = logits.double().cpu()
    tokens = tokens.cpu()[:, None]
    d = (z - z.gather(1, tokens)) / temperature
    e = d.exp().scatter(1, tokens, 0.0)
    rest = e.sum(1)
    return -rest.log1p(), rest / (1 + rest), rest.log1p() - (e * d).sum(1) / (1 + rest)


def assert_relative(got: Tensor, truth: Tensor, distance: Tensor, what: str) -> None:
    """float32 rounds the distance of two logits a few times: relative to itself, e to its power
    has that as its error."""
    error = ((got.detach().double().cpu() - truth) / truth).abs()
    bound = 2**-23 * (4 + 2 * distance)
    worst = int((error / bound).argmax())
    assert (error <= bound).all(), (
        f"{what}: relative error {error[worst]:.3g} above {bound[worst]:.3g}, got "
        f"{got.flatten()[worst]:.9g}, truth {truth[worst]:.9g}"
    )


def skip_plain_formula(backend: str) -> None:
    if backend == "reference":
        pytest.skip("only compiled backends promise it: the reference is plain PyTorch")


# 2, 33: less than a tile. 2049: a block of the CPU and one more. 9000: several, with a rest.
@pytest.mark.parametrize("vocab", [2, 33, 2049, 9000])
def test_log_p_near_one(device, backend, vocab):
    """49. log p of a likely token and 1 - p in its gradient are 0 beyond 16 nats, where -1e-12 is
    right."""
    skip_plain_formula(backend)
    logits, tokens, gaps = near_one(vocab, device)
    for temperature in (1.0, 1.25):
        options: dict[str, Any] = {"temperature": temperature, "backend": backend}
        logprob, q, entropy = near_one_truth(logits, tokens, temperature)
        distance = gaps / temperature
        leaf = logits.clone().requires_grad_()
        out = rk.token_logprob(leaf, tokens, with_entropy=True, **options)
        assert_relative(out.logprob, logprob, distance, "logprob")
        assert_relative(out.entropy, entropy, distance, "entropy")
        assert torch.equal(out.logprob, rk.token_logprob(logits, tokens, **options))
        grad = torch.autograd.grad(out.logprob.sum(), leaf, retain_graph=True)[0]
        own = grad.gather(1, tokens[:, None]).squeeze(1) * temperature
        assert_relative(own, q, distance, "gradient of logprob")
        # d H / d z_t = -p (log p + H), all of it small: H is the larger one.
        grad = torch.autograd.grad(out.entropy.sum(), leaf)[0]
        own = grad.gather(1, tokens[:, None]).squeeze(1) * temperature
        assert_relative(own, (q - 1) * (logprob + entropy), 2 * distance, "gradient of entropy")
        many = torch.stack((tokens, (tokens + 1) % vocab, tokens), 1)
        assert torch.equal(rk.token_logprob(logits, many, **options)[:, 2], out.logprob)
        both = rk.token_logprob_and_grad(logits, tokens, with_entropy=True, **options)
        assert torch.equal(both.logprob, out.logprob) and torch.equal(both.entropy, out.entropy)
        own = both.grad_logits.gather(1, tokens[:, None]).squeeze(1) * temperature
        assert_relative(own, q, distance, "gradient in one go")
        assert_relative(both.log_sum, -logprob, distance, "log_sum")


@pytest.mark.parametrize("vocab", [2, 33, 2049, 9000])
def test_log_p_near_one_of_logprob_kl(device, backend, vocab):
    """49. Of the policy and of the reference."""
    skip_plain_formula(backend)
    logits, tokens, gaps = near_one(vocab, device)
    ref_logits = logits.flip(0)  # gaps and places in the reverse order
    for temperature in (1.0, 1.25):
        options: dict[str, Any] = {"temperature": temperature, "backend": backend}
        logprob, q, entropy = near_one_truth(logits, tokens, temperature)
        distance = gaps / temperature
        leaf = logits.clone().requires_grad_()
        out = rk.logprob_kl(leaf, ref_logits, tokens, **options)
        assert_relative(out.logprob, logprob, distance, "logprob")
        assert_relative(out.entropy, entropy, distance, "entropy")
        own = torch.autograd.grad(out.logprob.sum(), leaf)[0].gather(1, tokens[:, None])
        assert_relative(own.squeeze(1) * temperature, q, distance, "gradient of logprob")
        swapped = rk.logprob_kl(ref_logits, logits, tokens, **options)
        assert_relative(swapped.ref_logprob, logprob, distance, "ref_logprob")


def test_log_p_near_one_of_equal_maxima(device, backend):
    """49. A maximum that stands there twice is left out of the sum once."""
    for vocab in (2, 2049, 9000):
        for places in ((0, vocab - 1), (vocab // 2, vocab // 2 - 1)):
            logits = torch.full((1, vocab), -30.0, device=device)
            logits[0, list(places)] = 5.0
            tokens = torch.tensor([list(places)], device=device)
            got = rk.token_logprob(logits, tokens, with_entropy=True, backend=backend)
            torch.testing.assert_close(
                got.logprob, torch.full_like(got.logprob, -math.log(2)), rtol=1e-6, atol=0
            )
            assert got.entropy.item() == pytest.approx(math.log(2), rel=1e-6)


MASKS = ("second half", "leading blocks", "all but one", "beside -inf")


def huge_masks(dtype: torch.dtype, where: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, where they are masked, tokens): finfo.min instead of -inf; row 0 is 0 elsewhere."""
    logits = random(3, 4500, device=device).to(dtype)
    logits[0] = 0
    masked = torch.zeros(4500, dtype=torch.bool, device=device)
    masked[2250:] = True
    if where == "leading blocks":
        masked = ~masked
    elif where == "all but one":
        masked[:] = True
        masked[2100] = False
    logits[:, masked] = torch.finfo(dtype).min
    if where == "beside -inf":
        logits[:, 2200:3000] = -torch.inf
        masked[2200:3000] = True
    kept = int((~masked).nonzero()[-1])
    return logits, masked, torch.full((3,), kept, device=device)


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_huge_mask(device, backend, dtype, temperature, where):
    """41. Masks of finfo.min: the scaled distance to the maximum overflows. trl 7221"""
    logits, masked, tokens = huge_masks(dtype, where, device)
    options: dict[str, Any] = {"temperature": temperature, "backend": backend}
    kept = (logits[:, ~masked].double() / temperature).log_softmax(-1)
    entropy = -(kept.exp() * kept).sum(-1)
    tolerance = {"rtol": 2e-6, "atol": 2e-6}
    leaf = logits.clone().requires_grad_()
    out = rk.token_logprob(leaf, tokens, with_entropy=True, **options)
    torch.testing.assert_close(out.logprob.double(), kept[:, -1], **tolerance)
    torch.testing.assert_close(out.entropy.double(), entropy, **tolerance)
    assert out.entropy[0].item() == pytest.approx(math.log(kept.shape[1]), rel=1e-6, abs=1e-6)
    for result in (out.logprob, out.entropy):
        (grad,) = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
        assert grad.isfinite().all() and (grad[:, masked] == 0).all()
    # A token that is masked is as far away as it is, and its gradient is 1.
    far = torch.full_like(tokens, int((logits[0] == torch.finfo(dtype).min).nonzero()[0]))
    beside = rk.token_logprob(leaf, torch.stack((tokens, far), 1), **options)
    z = logits.to(out.logprob.dtype)
    distance = ((z.gather(1, far[:, None]) - z.amax(1, True)) / temperature).squeeze(1)
    torch.testing.assert_close(beside[:, 1], distance, rtol=1e-3, atol=0)
    assert torch.equal(beside[:, 0], out.logprob) or backend == "reference"
    (grad,) = torch.autograd.grad(beside[:, 1].sum(), leaf)
    slope = grad.gather(1, far[:, None]) * temperature
    assert grad.isfinite().all() and (slope == 1).all()
    both = rk.token_logprob_and_grad(logits, tokens, with_entropy=True, **options)
    torch.testing.assert_close(both.entropy.double(), entropy, **tolerance)
    assert both.grad_logits.isfinite().all() and (both.grad_logits[:, masked] == 0).all()


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_huge_mask_of_logprob_kl(device, backend, dtype, temperature, where):
    """41. In both logits, or in the policy's alone."""
    logits, masked, tokens = huge_masks(dtype, where, device)
    open_ref = random(3, 4500, seed=1, device=device).to(dtype)
    masked_ref = torch.where(masked, logits, open_ref)
    p = (logits[:, ~masked].double() / temperature).log_softmax(-1)
    for ref_logits in (masked_ref, open_ref):
        q = ref_logits.double()
        if ref_logits is masked_ref:
            q = q.masked_fill(masked, -torch.inf)
        q = (q / temperature).log_softmax(-1)[:, ~masked]
        leaf = logits.clone().requires_grad_()
        options: dict[str, Any] = {"temperature": temperature, "backend": backend}
        out = rk.logprob_kl(leaf, ref_logits, tokens, **options)
        expected = (p[:, -1], q[:, -1], (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1))
        for got, truth in zip(out, expected, strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=3e-6, atol=3e-6)
        for result in (out.logprob, out.kl, out.entropy):
            (grad,) = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
            assert grad.isfinite().all() and (grad[:, masked] == 0).all()
