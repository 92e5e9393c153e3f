"""linear_logprob: the logits path as the specification, chunks, precision, what is left out."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from compare import assert_close_to_truth
from rlhf_kernels import linear_chunks, linear_logprob, linear_token_loss, token_logprob
from rlhf_kernels.linear_chunks import NOTHING_IGNORED
from rlhf_kernels.linear_logprob import backward_sweep, forward_sweep


def inputs(rows=37, width=24, vocab=301, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 0.5
    tokens = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), tokens.to(device)


def test_linear_logprob_by_hand(device, backend):
    """One hidden unit: logits 0, 1 and 2 times the hidden state."""
    hidden = torch.tensor([[1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[0.0], [1.0], [2.0]], device=device, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.tensor([1], device=device), backend=backend)
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert out.item() == pytest.approx(p[1].log().item(), rel=1e-6)
    out.backward()
    assert hidden.grad.item() == pytest.approx((1 - p[1] - 2 * p[2]).item(), rel=1e-5)
    expected = [-p[0].item(), 1 - p[1].item(), -p[2].item()]
    assert weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 1000])
def test_chunks_change_nothing_but_roundings(device, backend, chunk_tokens):
    hidden, weight, tokens = inputs(device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    whole = linear_logprob(hidden, weight, tokens, with_entropy=True, backend="reference")
    options = {"with_entropy": True, "chunk_tokens": chunk_tokens, "backend": backend}
    parts = linear_logprob(hidden, weight, tokens, **options)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)
    scalars = [out.logprob.sum() + (out.entropy**2).sum() for out in (parts, whole)]
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in scalars), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("likely", [False, True], ids=["random targets", "likely targets"])
def test_target_and_sum_are_refined(dtype, likely, device, backend):
    """16-bit logits: more exact than both rounded, which is better than an exact target alone."""
    hidden, weight, tokens = inputs(400, 32, 200, dtype, device)
    hidden = hidden * (3 if likely else 1)
    logits = hidden.double() @ weight.double().t()
    if likely:
        tokens = logits.argmax(-1)
    truth = token_logprob(logits, tokens, backend="reference")
    rounded = hidden @ weight.t()
    both = token_logprob(rounded, tokens, backend="reference").double()
    exact = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    target_alone = exact - rounded.double().logsumexp(-1)
    got = linear_logprob(hidden, weight, tokens, backend=backend).double()
    if backend == "reference":
        pytest.skip("the specification rounds the logits")
    errors = [(x - truth).square().mean().sqrt() for x in (got, both, target_alone)]
    assert errors[0] < 0.9 * errors[1]
    if likely:
        assert errors[1] < errors[2]
    assert_close_to_truth(got, both, truth, 1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_refinement_is_no_worse_at_any_temperature(dtype, temperature, device, backend):
    """The other logits stay rounded: where that decides, an exact target alone would be worse."""
    hidden, weight, _ = inputs(400, 32, 200, dtype, device)
    hidden, weight = hidden * 2, weight * 2
    logits = hidden.double() @ weight.double().t()
    tokens = logits.argmax(-1)
    options = {"temperature": temperature, "backend": backend}
    truth = token_logprob(logits, tokens, temperature=temperature, backend="reference")
    plain = token_logprob(hidden @ weight.t(), tokens, temperature=temperature, backend="reference")
    got = linear_logprob(hidden, weight, tokens, **options).double()
    rms = [(x - truth).square().mean().sqrt() for x in (got, plain)]
    assert (got <= 0).all() and rms[0] <= 1.05 * rms[1] + 1e-6
    assert (got - truth).abs().max() <= (plain - truth).abs().max() + 0.5


def test_what_is_frozen_has_no_gradient(device, backend):
    hidden, weight, tokens = inputs(device=device)
    for frozen in (hidden, weight):
        leaf = (weight if frozen is hidden else hidden).clone().requires_grad_()
        args = (hidden, leaf) if frozen is hidden else (leaf, weight)
        linear_logprob(*args, tokens, backend=backend).sum().backward()
        assert leaf.grad is not None and frozen.grad is None


def test_ignored_positions_reach_no_product(device, backend):
    """NaN hidden states of prompts and padding reach neither result nor weight."""
    hidden, weight, tokens = inputs(device=device)
    clean = hidden.clone().requires_grad_()
    dirty = hidden.clone()
    tokens[::3] = -100
    dirty[::3] = torch.nan
    dirty.requires_grad_()
    results = []
    for leaf in (clean, dirty):
        w = weight.clone().requires_grad_()
        out = linear_logprob(leaf, w, tokens, chunk_tokens=7, backend=backend)
        out.sum().backward()
        results.append((out.detach(), leaf.grad, w.grad))
    if backend == "reference":
        pytest.skip("the specification multiplies them")
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[1][0][::3] == 0).all() and (results[1][1][::3] == 0).all()


def test_nobody_looks_for_what_is_never_ignored():
    """To look would wait for the device; fake tensors have no values to look at."""
    with FakeTensorMode():
        tokens = torch.zeros(3, dtype=torch.int64)
        assert linear_chunks.used_tokens(tokens, linear_chunks.NOTHING_IGNORED) is None
        with pytest.raises(DataDependentOutputException):
            linear_chunks.used_tokens(tokens, -100)


@pytest.mark.parametrize("token", [-100, -1, 7])
def test_without_an_ignored_token_each_one_outside_is_an_error(token):
    hidden, weight = torch.ones(2, 4), torch.ones(7, 4)
    with pytest.raises(IndexError, match=rf"\[0, 7\) or ignore_index, got {token} at"):
        tokens = torch.tensor([3, token])
        linear_logprob(hidden, weight, tokens, ignore_index=linear_chunks.NOTHING_IGNORED)


def test_same_bits_with_and_without_a_gradient(device, backend):
    hidden, weight, tokens = inputs(dtype=torch.bfloat16, device=device)
    options = {"chunk_tokens": 10, "backend": backend}
    with torch.no_grad():
        old = linear_logprob(hidden, weight, tokens, **options)
    new = linear_logprob(hidden, weight.requires_grad_(), tokens, **options)
    entropy = linear_logprob(hidden, weight, tokens, with_entropy=True, **options)
    assert torch.equal(old, new.detach()) and torch.equal(old, entropy.logprob.detach())


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_old_log_probs_come_from_the_chunks_of_the_new_ones(device, backend, dtype, monkeypatch):
    """The last bits of a matrix product depend on its rows: one plan with and without gradients."""
    if backend == "reference":
        pytest.skip("the reference has no chunks")
    monkeypatch.setattr(linear_chunks, "LEAST_TOKENS", 8)
    hidden, weight, tokens = inputs(200, 500, 400, dtype, device)
    made = linear_chunks.products_dtype(hidden).itemsize
    room = 150 * (400 * made + 64)
    if made > hidden.element_size():
        room += 2 * 400 * 500 * made  # two blocks of the weight
    monkeypatch.setitem(linear_chunks.BUDGET, device, room)
    product, rows, seen = torch.mm, [], []
    monkeypatch.setattr(torch, "mm", lambda a, *x, **k: rows.append(len(a)) or product(a, *x, **k))
    with torch.no_grad():
        old = linear_logprob(hidden, weight, tokens, backend=backend)
    planned, weight = list(rows), weight.requires_grad_()

    def loss_fn(logprob, entropy):
        seen.append(logprob.detach())
        return logprob.sum(), None

    linear_token_loss(hidden, weight, tokens, loss_fn, backend=backend)
    assert len(planned) > 1 and planned == [len(x) for x in seen]
    assert torch.equal(old, torch.cat(seen))


def test_autocast_casts_hidden_and_weight(device, backend):
    hidden, weight, tokens = inputs(device=device)
    leaf = weight.clone().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_logprob(hidden, leaf, tokens, backend=backend)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), tokens, backend=backend)
    assert torch.equal(out.detach(), expected)
    out.sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device, backend):
    hidden, weight, tokens = inputs(dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_logprob(hidden, weight, tokens, backend=backend)
    assert torch.equal(out, linear_logprob(hidden, weight, tokens, backend=backend))


def test_memory_of_a_chunk(monkeypatch):
    """It follows the budget, but is never so small that the matrix products starve."""
    head = linear_chunks.Head(torch.empty(64000, 64), None, None, 1.0, 1.0, 0.0, -100)
    hidden = torch.empty(4096, 64)
    size = linear_chunks.tokens_of_chunk(hidden, head, None)
    assert size * 64000 * 4 <= 128 << 20 and size == 512  # of 524 for which there is room
    assert linear_chunks.tokens_of_chunk(hidden[:1100], head, None) == 384  # not 367, thrice
    assert linear_chunks.tokens_of_chunk(hidden[:1040], head, None) == 520  # no room for 640
    assert linear_chunks.tokens_of_chunk(hidden, head, 100) == 100
    large = head._replace(weight=torch.empty(1, 1).expand(10**7, 64))
    assert linear_chunks.tokens_of_chunk(hidden, large, None) == linear_chunks.LEAST_TOKENS
    assert linear_chunks.tokens_of_chunk(hidden[:7], head, None) == 7
    low = head._replace(weight=head.weight.bfloat16())
    for has_products, most in ((True, 768), (False, 456)):  # beside 16 MiB of dW in float32
        monkeypatch.setattr(linear_chunks, "_cpu_multiplies", lambda dtype, has=has_products: has)
        assert linear_chunks.tokens_of_chunk(hidden.bfloat16(), low, None) == most


def test_bad_arguments_are_named(device, backend):
    hidden, weight, tokens = inputs(device=device)

    def call(**options):
        args = {"hidden": hidden, "weight": weight, "tokens": tokens, "backend": backend}
        linear_logprob(**{**args, **options})

    with pytest.raises(ValueError, match=r"weight: expected shape \(V, 24\) to match hidden"):
        call(weight=weight.t())
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32 to match hidden"):
        call(weight=weight.double())
    with pytest.raises(ValueError, match=r"tokens: expected shape \(37,\) or .* to match hidden"):
        call(tokens=tokens[:5])
    with pytest.raises(ValueError, match=r"bias: expected shape \(301,\) to match weight"):
        call(bias=weight[0])
    with pytest.raises(ValueError, match="softcap: expected a finite number > 0"):
        call(softcap=0.0)
    with pytest.raises(ValueError, match="logit_scale: expected a finite number > 0"):
        call(logit_scale=-1.0)
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, H\) with V >= 1, got \(0"):
        call(weight=weight[:0])
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, H\) with H >= 1"):
        call(hidden=hidden[:, :0], weight=weight[:, :0])
    with pytest.raises(ValueError, match=r"temperature / softcap between .* got 1e\+20 / 1e-15"):
        call(temperature=1e20, softcap=1e-15)
    with pytest.raises(ValueError, match="chunk_tokens: expected a finite number >= 1"):
        call(chunk_tokens=0)
    if device == "cpu":
        wrong = tokens.clone()
        wrong[30] = 301
        with pytest.raises(IndexError, match="got 301 at position 30"):
            call(tokens=wrong, chunk_tokens=4)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_watch_sees_every_chunk_of_logits_once(dtype, softcap, device, backend):
    """For statistics that cost no second product: z, with its scaling, and the rows' statistics."""
    if backend == "reference":
        pytest.skip("all its logits exist")
    hidden, weight, tokens = (x.detach() for x in inputs(7, 16, 33, dtype, device))
    seen = []

    def watch(part, z, some, rows, scaling):
        temperature, value, _ = scaling
        assert temperature is None and torch.equal(some, tokens[part])
        x = z.float() / value
        p = (x - (rows.row_max / value + rows.log_sum)[:, None]).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]))
        seen.append(x)

    args = (hidden, weight, None, tokens, None, 0.7, 0.5, softcap or 0.0, NOTHING_IGNORED, 3, True)
    got = forward_sweep(*args, backend, None, watch)
    for x, plain in zip(got, forward_sweep(*args, backend), strict=True):
        assert torch.equal(x, plain)
    assert [len(x) for x in seen] == [3, 3, 1]
    made = linear_chunks.products_dtype(hidden)
    z = (hidden.to(made) @ weight.to(made).t()).float() * 0.5
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / 0.7
    torch.testing.assert_close(torch.cat(seen), z)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("options", [{}, {"with_entropy": True}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_blocks(dtype, options, chunk_tokens, device, backend, monkeypatch):
    """On some CPUs, and for 16 bits in float32: the results are those of float32, rounded last."""
    if backend != "cpu":
        pytest.skip("this is about the products of CPUs")
    monkeypatch.setattr(linear_chunks, "_cpu_multiplies", lambda dtype: False)
    monkeypatch.setattr(linear_chunks, "BLOCK_ROWS", 64)  # 301 rows: five blocks
    hidden, weight, tokens = inputs(9, dtype=dtype)
    tokens[2] = -100
    tensors = [hidden, weight, torch.linspace(-1, 1, len(weight)).to(dtype)]

    monkeypatch.setattr(linear_chunks, "_cpu_takes_blocks", lambda: True)

    def run(tensors, backend):
        leaves = [x.clone().requires_grad_() for x in tensors]
        args = {"bias": leaves[2], "chunk_tokens": chunk_tokens, "backend": backend, **options}
        out = linear_logprob(*leaves[:2], tokens, **args)
        logprob, entropy = out if options.get("with_entropy") else (out, out)
        grads = torch.autograd.grad(logprob.sum() + (0.5 * entropy).sum(), leaves)

        def loss_fn(logprob, entropy):
            return logprob.sum() + (0.5 * (logprob if entropy is None else entropy)).sum(), None

        loss, _ = linear_token_loss(*leaves[:2], tokens, loss_fn, **args)
        return [logprob, entropy, loss, *grads, *torch.autograd.grad(loss, leaves)]

    want = run([x.float() for x in tensors], "reference")
    for x, y in zip(run(tensors, backend), want, strict=True):
        eps = 0 if x.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(x.float(), y.float(), rtol=1e-5 + eps, atol=1e-5 + eps / 10)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
    ids=str,
)
def test_gradients_in_other_dtypes_are_rounded_once(chunk_tokens, dtypes, device, backend):
    """Autocast: products of 16 bits for parameters of 32, whose gradients are not cut to 16."""
    if backend == "reference":
        pytest.skip("autograd's own")
    if device != "cpu" and dtypes[0] != torch.float32:
        pytest.skip("products of 16 bits into float32 alone")
    hidden, weight, tokens = (x.detach() for x in inputs(5, 8, 21, torch.bfloat16, device))
    bias = torch.zeros(21, dtype=torch.bfloat16, device=device)
    head = (hidden, weight, bias, tokens, None, 1.0, 1.0, 0.0, NOTHING_IGNORED, chunk_tokens)
    _, *saved = forward_sweep(*head, False, backend)
    args = (torch.ones(5, device=device), None, *head, *saved, True, True, True, backend)
    wide = backward_sweep(*args, None, dtypes)
    for got, low, dtype in zip(wide, backward_sweep(*args), (*dtypes, dtypes[1]), strict=True):
        assert got.dtype == dtype and low.dtype == torch.bfloat16
        assert not torch.equal(got, got.bfloat16().to(dtype))
        torch.testing.assert_close(got.float(), low.float(), rtol=1e-2, atol=1e-2)
