"""Bugs that kernels and trainers of this field have shipped, one test each, on every backend.

The docstring names the public threads that reported it; the number is the order of appearance in
our list of pitfalls.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import rlhf_kernels as rk
from compare import assert_close_to_truth
from rlhf_kernels.opspec import Maker
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
    if backend == "reference":
        pytest.skip("the reference has no in-place backward")
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
    if backend == "reference":
        pytest.skip("the reference has no in-place backward")
    leaf = random(2, 5, 60, device=device).requires_grad_()
    tokens = random_tokens(60, 2, 4, device=device)
    expected = torch.autograd.grad(
        rk.token_logprob(leaf[:, :-1], tokens, backend=backend).sum(), leaf
    )
    whole = leaf * 1.0
    rk.token_logprob(whole[:, :-1], tokens, inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(leaf.grad, expected[0])
    assert torch.equal(whole[:, -1], leaf[:, -1])


def test_int32_overflow_of_offsets(device, backend):
    """11. Row offsets of 2^31 elements and more. triton 1058, fla 1082, CCE 37, Liger 1294"""
    if backend == "reference":
        pytest.skip("PyTorch's own indexing")
    vocab, stride = 300, 2**31 + 64
    # Only the two rows are touched: the gap between them is never written, so it costs no memory.
    storage = torch.empty(stride + vocab, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((2, vocab), (stride, 1))
    logits[0], logits[1] = random(vocab, device=device), random(vocab, seed=1, device=device)
    tokens = random_tokens(vocab, 2, device=device)
    got = rk.token_logprob(logits, tokens, backend=backend)
    assert torch.equal(got, rk.token_logprob(logits.contiguous(), tokens, backend=backend))


def test_int32_overflow_of_the_grid(device, backend):
    """11. More rows than 65535, the limit of a second grid dimension. fla 1082"""
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
def test_out_of_range_label(backend, value):
    """14. Uninitialised output for labels outside [0, V). verl's linear cross entropy"""
    tokens = random_tokens(300, 2, 3)
    tokens[1, 2] = value
    expected = rf"expected a value in \[0, 300\) .* got {value} at position \(1, 2\)"
    with pytest.raises(IndexError, match=expected):
        rk.token_logprob(random(2, 3, 300), tokens, backend=backend)
    with pytest.raises(IndexError, match=expected):
        rk.logprob_kl(random(2, 3, 300), random(2, 3, 300), tokens, backend=backend)


def test_target_logit_precision(device, backend):
    """15. Target logit rounded to fp16 or bf16: up to 0.008 nats. Liger FSLCE"""
    logits = torch.zeros(1, 64, device=device)
    logits[0, 3] = 10.0 + 2**-9  # not a bf16 number
    got = rk.token_logprob(logits, torch.tensor([3], device=device), backend=backend)
    expected = logits.double().log_softmax(-1)[0, 3].item()
    assert got.item() == pytest.approx(expected, abs=1e-9, rel=1e-3)  # -2.9e-3


def test_recompile_per_length(device, backend):
    """16. Length and temperature as compile-time constants. Liger GRPO, TRL kernels"""
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=count)
    def function(logits, tokens, temperature):
        return rk.token_logprob(logits, tokens, temperature=temperature, backend=backend)

    for i in range(8):
        logits = random(5 + i, 64, device=device)
        tokens = random_tokens(64, 5 + i, device=device)
        temperature = 0.5 + i / 8
        got = function(logits, tokens, temperature)
        expected = rk.token_logprob(logits, tokens, temperature=temperature, backend=backend)
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    assert len(compilations) <= 3  # first call, length becomes symbolic, temperature too


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

    Fake tensors have no values: whatever wants to read one raises.
    """
    for spec in SPECS:
        for sample in spec.samples(Maker()):
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                inputs = {
                    name: mode.from_tensor(x) if isinstance(x, Tensor) else x
                    for name, x in sample.inputs.items()
                }
                for name in spec.differentiable:
                    if isinstance(inputs.get(name), Tensor):
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
