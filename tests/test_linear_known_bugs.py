"""One test for each bug that this field has shipped in heads without logits; numbers as in
test_known_bugs.py. Those of several processes (7, 36) are in test_linear_parallel.py; of 35 ZeRO-3
is in test_zero3.py and LoRA in integrations/test_transformers.py; 16 is test_known_bugs.py's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from rlhf_kernels import linear_logprob, linear_token_loss, policy_loss
from rlhf_kernels.backend import why_not
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


@pytest.mark.usefixtures("products")
def test_bf16_target_gradient(device, backend):
    """6. onehot - p cancels in bf16 where a target is likely. Liger 1329, TransformerEngine 3193"""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = torch.zeros(512, 1, dtype=torch.bfloat16, device=device)
    weight[7] = 12
    tokens = torch.tensor([7], device=device)
    linear_logprob(hidden, weight, tokens, backend=backend).sum().backward()
    rest = 511 / (511 + torch.tensor(12.0, dtype=torch.float64).exp().item())  # 0.3 %
    assert hidden.grad.item() == pytest.approx(12 * rest, rel=2**-7)


@pytest.mark.usefixtures("products")
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


@pytest.mark.parametrize("value", [301, -1, 2**40])
def test_out_of_range_label(device, backend, value, monkeypatch):
    """14. Uninitialised output for labels outside [0, V). verl's linear cross entropy"""
    hidden, weight, tokens = inputs(device=device)
    tokens[30] = value
    leaf = hidden.clone().requires_grad_()
    options = {"chunk_tokens": 8, "backend": backend}
    if device == "cuda":  # to look would make a GPU wait
        out = linear_logprob(leaf, weight, tokens, **options)
        assert out.isnan().nonzero().tolist() == [[30]]
        grad = torch.autograd.grad(out.nansum(), leaf)[0]
        assert not grad[30].any() and grad.isfinite().all()
        return
    expected = rf"expected a value in \[0, 301\) .* got {value} at position 30"
    with pytest.raises(IndexError, match=expected):
        linear_logprob(leaf, weight, tokens, **options)
    with pytest.raises(IndexError, match=expected):
        linear_token_loss(leaf, weight, tokens, lambda logprob, entropy: (logprob.sum(), None))


@pytest.mark.usefixtures("products")
def test_target_logit_precision(device, backend):
    """15. Target logit rounded to fp16: up to 0.008 nats. Liger FSLCE"""
    if backend == "reference":
        pytest.skip("the reference rounds the logits")
    hidden = torch.tensor([[1.0, 2**-5]], dtype=torch.float16, device=device)
    weight = torch.tensor([[100.0, 1.0], [100.0, 0.0]], dtype=torch.float16, device=device)
    token = torch.tensor([0], device=device)  # its logit is 100 + 1/32; fp16 has 100 and 100 + 1/16
    expected = torch.tensor([2**-5, 0.0]).log_softmax(0)[0].item()
    got = linear_logprob(hidden, weight, token, backend=backend)
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_frozen_lm_head_skips_dw(device, backend):
    """35. A product for the gradient of a weight that takes none. Liger 1441, torchtune 2856"""
    hidden, weight, tokens = inputs(device=device)

    def flops(**frozen):
        leaves = [x.clone().requires_grad_(name not in frozen) for name, x in named.items()]
        with FlopCounterMode(display=False) as counter:
            loss, _ = linear_token_loss(
                *(*leaves, tokens, lambda logprob, entropy: (logprob.sum(), None)), backend=backend
            )
            loss.backward()
        return counter.get_total_flops()

    named = {"hidden": hidden, "weight": weight}
    product = 2 * hidden.numel() * weight.shape[0]
    assert flops() == 3 * product
    assert flops(weight=True) == flops(hidden=True) == 2 * product


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_dtensor_mix(tmp_path, backend):
    """35. A head of FSDP2 beside plain hidden states: got mixed torch.Tensor and DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    hidden, weight, tokens = inputs()
    plain = weight.clone().requires_grad_()
    linear_logprob(hidden, plain, tokens, backend=backend).sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            sharded = distribute_tensor(weight, mesh, [placement]).requires_grad_()
            linear_logprob(hidden, sharded, tokens, backend=backend).sum().backward()
            assert isinstance(sharded.grad, DTensor) and sharded.grad.placements == (placement,)
            assert torch.equal(sharded.grad.full_tensor(), plain.grad)
        with pytest.raises(TypeError, match=r"hidden: expected a plain .*hidden\.to_local\(\)"):
            linear_logprob(distribute_tensor(hidden, mesh, [Replicate()]), weight, tokens)
    finally:
        dist.destroy_process_group()


ENTROPY = """
import re, sys, torch
from rlhf_kernels import linear_chunks, linear_logprob, linear_token_loss

linear_chunks._cpu_multiplies = lambda dtype: False  # those of 16 bits take minutes on some CPUs
dtype = getattr(torch, sys.argv[1])

def peak(what):
    with open("/proc/self/status") as file:
        return int(re.search(what + r":\\s+(\\d+) kB", file.read())[1]) << 10

hidden = torch.randn(4096, 64, dtype=dtype, requires_grad=True)
weight = torch.randn(64000, 64, dtype=dtype, requires_grad=True)
tokens = torch.randint(64000, (4096,))

def by_logprob(n):
    out = linear_logprob(hidden[:n], weight, tokens[:n], with_entropy=True)
    (out.logprob + 0.01 * out.entropy).sum().backward()

def by_token_loss(n):
    def loss_fn(logprob, entropy):
        return (logprob + 0.01 * entropy).sum(), None
    loss, _ = linear_token_loss(hidden[:n], weight, tokens[:n], loss_fn, with_entropy=True)
    loss.backward()

for step in (by_logprob, by_token_loss):
    step(8)  # libraries' own buffers
    hidden.grad = weight.grad = None
    before = peak("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    step(4096)
    print(peak("VmHWM") - before)
    hidden.grad = weight.grad = None
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entropy_memory_spike(dtype):
    """37. 80 GB where 0.23 GB do: the entropy, with its gradient, takes a chunk of logits as the
    log-probs do, not several tensors of 1 GiB. trl 2799, OpenRLHF 718, verl 1100"""
    if not Path("/proc/self/clear_refs").exists() or why_not("linear_logprob", "cpu"):
        pytest.skip("needs Linux, and the compiled kernels")
    command = [sys.executable, "-c", ENTROPY, dtype]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(int(line) < 260 << 20 for line in result.stdout.split()), result.stdout


@pytest.mark.usefixtures("products")
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


def both_ways(hidden, weight, bias, tokens, of_entropy=0.0, **options):
    """(logprob, entropy or None, gradients of logprob + of_entropy entropy) by either function."""
    found = []

    def total(logprob, entropy):
        return logprob.sum() + (of_entropy * entropy.sum() if of_entropy else 0.0)

    for one_sweep in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves
        if one_sweep:
            seen = []

            def loss_fn(logprob, entropy, seen=seen):
                seen.append((logprob, entropy))
                return total(logprob, entropy), None

            loss, _ = linear_token_loss(h, w, tokens, loss_fn, bias=b, **options)
            logprob, entropy = seen[0]
        else:
            out = linear_logprob(h, w, tokens, bias=b, **options)
            logprob, entropy = out if isinstance(out, tuple) else (out, None)
            loss = total(logprob, entropy)
        loss.backward()
        found.append((logprob, entropy, [x.grad for x in leaves]))
    return found


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_p_near_one(device, backend, dtype, with_entropy):
    """49. log p of a likely token, and 1 - p in the gradients, are 0 where -1e-12 is right. The
    logits are exact in all dtypes."""
    if backend == "reference":
        pytest.skip("only compiled backends promise it: the reference is plain PyTorch")
    low = dtype == torch.bfloat16
    hidden = torch.tensor([[0.25], [0.5], [0.75], [1.0]], dtype=dtype, device=device)
    weight = -(torch.arange(67, device=device).remainder(8) / 4).to(dtype).unsqueeze(-1)
    weight[41] = 40
    tokens = torch.full((4,), 41, device=device)
    bias = torch.zeros(67, dtype=dtype, device=device)
    w = weight.double().cpu().flatten()
    for scale, temperature in ((1.0, 1.0), (0.5, 0.25)):
        beta = scale / temperature
        if beta > 1:
            hidden = hidden / 2
        h = hidden.double().cpu()
        d = h * (w - w[41]) * beta
        e = d.exp().index_fill(1, torch.tensor([41]), 0.0)
        rest = e.sum(1)
        logprob, p = -rest.log1p(), e / (1 + rest[:, None])
        entropy = rest.log1p() - (p * d).sum(1)
        q = rest / (1 + rest)
        grads = (beta * (p * (w[41] - w)).sum(1), beta * (q * h[:, 0]).sum(), beta * q.sum())
        options = {"logit_scale": scale, "temperature": temperature, "backend": backend}
        found = both_ways(hidden, weight, bias, tokens, with_entropy=with_entropy, **options)
        for got, got_entropy, (dh, dw, db) in found:
            torch.testing.assert_close(got.double().cpu(), logprob, rtol=1e-5, atol=0)
            if with_entropy:
                torch.testing.assert_close(got_entropy.double().cpu(), entropy, rtol=1e-5, atol=0)
            for grad, truth in zip((dh[:, 0], dw[41, 0], db[41]), grads, strict=True):
                rtol = 2**-6 if low else 1e-5
                torch.testing.assert_close(grad.double().cpu(), truth, rtol=rtol, atol=0)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    ("scale", "temperature", "softcap"), [(1.0, 0.4, None), (4.0, 1.0, None), (2.0, 0.5, 30.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_huge_mask(device, backend, dtype, scale, temperature, softcap, with_entropy):
    """41. A bias of finfo.min: as without these rows of the weight; under a softcap -softcap."""
    hidden, weight, tokens = inputs(5, 8, 100, dtype, device)
    tokens = tokens.remainder(50)
    bias = torch.zeros(100, dtype=dtype, device=device)
    bias[50:] = torch.finfo(dtype).min
    options = {"logit_scale": scale, "temperature": temperature, "softcap": softcap}
    options |= {"with_entropy": with_entropy, "of_entropy": float(with_entropy)}
    found = both_ways(hidden, weight, bias, tokens, backend=backend, **options)
    kept = 100 if softcap else 50
    rows = [x.double() for x in (hidden, weight[:kept], bias[:kept])]
    truths = both_ways(*rows, tokens, backend="reference", **options)
    low = dtype == torch.bfloat16
    tolerance = {"rtol": 0.05, "atol": 0.05} if low else {"rtol": 1e-4, "atol": 1e-4}
    for (logprob, entropy, grads), (truth, true_entropy, true_grads) in zip(
        found, truths, strict=True
    ):
        torch.testing.assert_close(logprob.double(), truth, **tolerance)
        if with_entropy:
            torch.testing.assert_close(entropy.double(), true_entropy, **tolerance)
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert grad.isfinite().all()
            if len(grad) == 100:
                assert (grad[50:] == 0).all()
                grad, true_grad = grad[:50], true_grad[:50]
            torch.testing.assert_close(grad.double(), true_grad, **tolerance)
