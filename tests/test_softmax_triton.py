"""What Triton's softmaxes have to carry: the rest beside a row's maximum, and masks of any size.

Over every log-prob operator that sums up in Triton. The expected values are float64 formulas of
their own: the sum over the other tokens, and the softmax over the tokens that are not masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_kernels import linear_logprob, logprob_kl, token_logprob, token_logprob_and_grad

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from rlhf_kernels import linear_logprob_triton, softmax_triton  # noqa: E402

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
OPERATORS = ("token_logprob", "token_logprob_and_grad", "logprob_kl")
each_operator = pytest.mark.parametrize("operator", OPERATORS)
TILE, CHUNK = 256, 512  # columns, here: small rows have several of each


@pytest.fixture(autouse=True)
def _tritons(backend, monkeypatch):
    """Only Triton's kernels, with small tiles; the fused head has splits of several."""
    if backend != "triton":
        pytest.skip("the kernels are Triton's")
    layout = softmax_triton.layout
    monkeypatch.setattr(softmax_triton, "CHUNK", CHUNK)
    monkeypatch.setattr(softmax_triton, "layout", lambda x: {**layout(x), "TILE": TILE})
    monkeypatch.setattr(linear_logprob_triton, "SPLITS", 3)


class Found(NamedTuple):
    """Of rows, in float64; ``grad``: of sum(logprob); ``log_sum``: None where nobody sees it."""

    logprob: Tensor
    entropy: Tensor
    grad: Tensor
    log_sum: Tensor | None = None


def of(operator: str, logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Found:
    """What an operator says of rows."""
    given = {"temperature": temperature, "backend": "triton"}
    leaf = logits.detach().requires_grad_()
    if operator == "token_logprob_and_grad":
        out = token_logprob_and_grad(logits, tokens, with_entropy=True, **given)
        found = (out.logprob, out.entropy, out.grad_logits, out.log_sum)
        return Found(*(x.double() for x in found))
    if operator == "token_logprob":
        out = token_logprob(leaf, tokens, with_entropy=True, **given)
    else:
        out = logprob_kl(leaf, logits, tokens, **given)
        assert torch.equal(out.ref_logprob, out.logprob)
    (grad,) = torch.autograd.grad(out.logprob.sum(), leaf)
    return Found(out.logprob.detach().double(), out.entropy.detach().double(), grad.double())


def of_maxima(logits: Tensor, temperature: float = 1.0) -> Found:
    """The same of each row's first maximum, by the sum over the other tokens."""
    s = logits.double()
    s = (s - s.amax(-1, keepdim=True)) / temperature
    first = s.argmax(-1, keepdim=True)
    others = s.scatter(-1, first, -torch.inf)
    rest = others.exp().sum(-1)
    log_sum = torch.log1p(rest)
    energy = (others.exp() * others.masked_fill(others == -torch.inf, 0.0)).sum(-1)
    share = 1 / (1 + rest)
    grad = -others.exp() * share[:, None]
    grad = grad.scatter(-1, first, (rest * share)[:, None]) / temperature
    return Found(-log_sum, log_sum - energy * share, grad, log_sum)


def assert_relative(found: Found, truth: Found, dtype: torch.dtype, tokens: Tensor) -> None:
    """Each number to 1e-5 of itself (float64: 1e-13); of the gradient the tokens' own."""
    rtol = 1e-13 if dtype == torch.float64 else 1e-5
    close = {"rtol": rtol, "atol": 0.0}
    torch.testing.assert_close(found.logprob, truth.logprob, **close)
    if found.log_sum is not None:
        torch.testing.assert_close(found.log_sum, truth.log_sum, **close)
    torch.testing.assert_close(found.entropy, truth.entropy, **close)
    own, right = (x.grad.gather(-1, tokens[:, None]) for x in (found, truth))
    torch.testing.assert_close(own, right, rtol=max(rtol, torch.finfo(dtype).eps), atol=0.0)


def peaked(vocab: int, places: list[int], gaps: list[float], dtype: torch.dtype) -> Tensor:
    """A row a pair of place and gap: there the logit is so much above the others, about."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(len(places) * len(gaps), vocab, generator=generator, dtype=torch.float64)
    at = torch.tensor(places).repeat_interleave(len(gaps))[:, None]
    return z.scatter(-1, at, torch.tensor(gaps).double().repeat(len(places))[:, None]).to(dtype)


@each_dtype
@each_operator
def test_log_probability_near_0_is_accurate_relative_to_itself(operator, dtype, device, backend):
    """1e-7 in float32 came out as 0. First and last column of a tile, second tile, second chunk."""
    vocab = CHUNK + TILE + 77
    places = [0, TILE - 1, TILE + 9, CHUNK + TILE + 5, vocab - 1]
    z = peaked(vocab, places, [12.0, 40.0], dtype).to(device)
    tokens = z.double().argmax(-1)
    found, truth = of(operator, z, tokens, 0.9), of_maxima(z, 0.9)
    assert truth.logprob.min() < -1e-4 and truth.logprob.max() > -1e-12
    assert_relative(found, truth, dtype, tokens)


@each_dtype
@each_operator
def test_equal_maxima_share_a_row(operator, dtype, device, backend):
    """In a lane's load, in a lane's tiles, in lanes, in chunks: each but one belongs to the rest.

    The last row: no other logit, so that the sum is their number.
    """
    vocab = CHUNK + TILE
    equal = [(8, 9), (8, 9, 11), (8, 8 + TILE), (8, 64), (8, CHUNK + 8), (8, 9, 64, CHUNK + 64)]
    z = peaked(vocab, [8], [5.0] * len(equal), dtype)
    z = torch.cat([z, torch.full_like(z[:1], -torch.inf)])
    for row, places in enumerate([*equal, equal[-1]]):
        z[row, list(places)] = 30.0
    tokens = torch.full((len(z),), 8)
    z, tokens = z.to(device), tokens.to(device)
    found, truth = of(operator, z, tokens), of_maxima(z)
    assert_relative(found, truth, dtype, tokens)
    torch.testing.assert_close(found.logprob[-1].item(), -math.log(4), rtol=1e-6, atol=0.0)


def head_of(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden and weight whose products are the logits, float32: one unit a row."""
    return torch.eye(len(logits), device=logits.device).to(dtype), logits.T.contiguous().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("gap", [12.0, 25.0, 40.0])
def test_fused_head_is_accurate_relative_to_itself(gap, dtype, device, backend):
    """A maximum in the first tile, in the last, at a tile's ends; two of them; rows without one."""
    vocab = 301
    z = peaked(vocab, [0, 31, 32, 170, 300], [gap], dtype).to(device)
    z = torch.cat([z, z[:2], torch.zeros_like(z[:1])])
    z[5, 1] = z[6, 200] = gap
    tokens = z.double().argmax(-1)
    given = {"fast": True, "temperature": 0.9, "backend": "triton"}
    out = linear_logprob(*head_of(z, dtype), tokens, with_entropy=True, **given)
    truth = of_maxima(z, 0.9)
    found = Found(out.logprob.double(), out.entropy.double(), truth.grad)  # it has no gradient
    assert_relative(found, truth, torch.float32, tokens)
    alone = linear_logprob(*head_of(z, dtype), tokens, **given)
    assert torch.equal(alone, out.logprob), "the entropy changed the log-probability"


# ---- Masks -----------------------------------------------------------------------------------


def masks(vocab: int) -> dict[str, Tensor]:
    """Which columns are masked."""
    column = torch.arange(vocab)
    return {
        "half": column >= vocab // 2,
        "first tile": column < TILE,
        "lanes": column % TILE < TILE // 2,
        "first chunk": column < CHUNK,
        "last chunk": column >= CHUNK,
        "all but one": column != 2 * TILE + 3,
    }


def huge(dtype: torch.dtype) -> list[float]:
    """Logits that stand for a mask: the lowest, and one whose distances are numbers."""
    return [torch.finfo(dtype).min, -1e30]


def softmax_of(z: Tensor, kept: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p in float64, -inf where it is not kept; and the entropy."""
    log_p = (z.double() / temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
    return log_p, -(log_p.exp() * log_p.masked_fill(~kept, 0.0)).sum(-1)


def assert_right(got: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    close = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(got.double(), right, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_lowest_number_as_a_mask(dtype, device, backend):
    """The entropy was NaN, and with it the gradient."""
    z = torch.zeros(1, 100, device=device, dtype=dtype)
    z[:, 50:] = torch.finfo(dtype).min
    z.requires_grad_()
    out = token_logprob(z, torch.tensor([3], device=device), with_entropy=True, backend=backend)
    assert out.entropy.item() == pytest.approx(3.912023, abs=1e-6)
    (grad,) = torch.autograd.grad(out.entropy.sum() + out.logprob.sum(), z)
    expected = torch.full_like(z, -1 / 50)
    expected[:, 3] += 1.0
    expected[:, 50:] = 0.0
    torch.testing.assert_close(grad, expected, rtol=0.0, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("where", masks(1))
def test_huge_masks_are_masks(where, dtype, device, backend):
    """Whatever they cover, also among banned tokens: the softmax is that of the others."""
    vocab = CHUNK + TILE + 100
    masked = masks(vocab)[where].to(device)
    z = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    z[:2, masked] = torch.tensor(huge(dtype), device=device, dtype=dtype)[:, None]
    z[2, masked] = z[0, masked]
    z[2, ::2] = torch.where(masked[::2], -torch.inf, z[2, ::2])
    tokens = (~masked).nonzero()[:, 0][[0, -1, -1]]
    check_softmax(z, ~masked.expand_as(z), tokens, 0.5)


def check_softmax(z: Tensor, kept: Tensor, tokens: Tensor, temperature: float) -> None:
    """Two operators against the softmax over ``kept``: results, and the gradient of their sum."""
    dtype = z.dtype
    log_p, h = softmax_of(z, kept, temperature)
    logprob = log_p.gather(-1, tokens[:, None])[:, 0]
    p = log_p.exp()
    grad = torch.nn.functional.one_hot(tokens, z.shape[-1]) - p
    grad = (grad - p * (log_p.masked_fill(~kept, 0.0) + h[:, None])) / temperature
    given = {"temperature": temperature, "backend": "triton"}
    leaf = z.detach().requires_grad_()
    of_both = logprob_kl(leaf, z, tokens, **given)
    for out in (token_logprob(leaf, tokens, with_entropy=True, **given), of_both):
        assert_right(out.logprob, logprob, dtype)
        assert_right(out.entropy, h, dtype)
        (got,) = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), leaf)
        torch.testing.assert_close(got.double(), grad, rtol=torch.finfo(dtype).eps, atol=3e-6)
    assert_right(of_both.ref_logprob, logprob, dtype)
    assert of_both.kl.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
def test_rows_of_huge_logits_alone(dtype, device, backend):
    """Rows that are masked as a whole are uniform; a maximum of 1e38 stands above -3e38 and -inf.

    A masked token's log-probability is its distance from the maximum.
    """
    vocab = TILE + 100
    lowest = torch.finfo(dtype).min
    z = torch.full((4, vocab), lowest, device=device, dtype=dtype)
    z[1, 1::2] = -torch.inf
    z[2] = -3e38
    z[2, TILE + 5] = z[2, 7] = 1e38
    z[3] = 1e38
    kept = z == z.amax(-1, keepdim=True)
    tokens = torch.tensor([9, 8, 7, 9], device=device)
    check_softmax(z, kept, tokens, 1.0)
    check_softmax(z, kept, tokens, 0.5)
    z = torch.zeros(1, vocab, device=device, dtype=dtype)
    z[0, 5:] = -1e30
    out = token_logprob(z, tokens[:1], temperature=0.5, backend="triton")
    right = z[0, 9].double().item() / 0.5 - math.log(5)
    assert out.item() == pytest.approx(right, rel=1e-6)


@each_dtype
@pytest.mark.parametrize("where", masks(1))
def test_divergence_with_huge_masks(where, dtype, device, backend):
    """Masked in both, or in the policy alone: the others decide. In the reference alone: the mask's
    distance times p, or infinite where a lane's sum of the distances is no number."""
    vocab = CHUNK + TILE + 100
    masked = masks(vocab)[where].to(device)
    generator = torch.Generator().manual_seed(2)
    z, ref = (torch.randn(1, vocab, generator=generator).to(device, dtype) for _ in range(2))
    far, near = (ref.masked_fill(masked, value) for value in huge(dtype))
    low = z.masked_fill(masked, huge(dtype)[0])
    policy, reference = torch.cat([low, low, z, z]), torch.cat([far, ref, far, near])
    tokens = (~masked).nonzero()[:1, 0].expand(4)
    got = logprob_kl(policy, reference, tokens, temperature=0.5, backend="triton").kl

    kept = ~masked
    log_p, _ = softmax_of(z, kept, 0.5)
    for i, shared in enumerate([kept, kept | masked]):
        log_q, _ = softmax_of(ref, shared, 0.5)
        term = log_p.exp() * torch.where(masked, 0.0, log_p - log_q)
        assert_right(got[i : i + 1], term.sum(-1), dtype)
    p = softmax_of(z, kept | masked, 0.5)[0].exp()
    expected = (p * -reference[2:].double() / 0.5)[:, masked].sum(-1).tolist()
    assert got[2].item() in (torch.inf, pytest.approx(expected[0], rel=1e-5))
    assert got[3].item() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("value", [torch.finfo(torch.bfloat16).min, -1e30, -1e38])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
def test_fused_head_with_huge_masks(dtype, value, device, backend):
    """In the bias, over a tile, over a split, over all but one; and among banned tokens."""
    vocab = 301
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    column = torch.arange(vocab, device=device)
    tokens = torch.full((4,), 250, device=device)
    for masked in (column < 32, column < 170, column >= 251, column != 250):
        bias = torch.zeros(vocab, device=device, dtype=dtype).masked_fill_(masked, value)
        for banned in (False, True):
            if banned:
                bias[::2] = torch.where(masked[::2], -torch.inf, bias[::2])
            given = {"bias": bias, "fast": True, "with_entropy": True, "temperature": 0.5}
            out = linear_logprob(*head_of(logits, dtype), tokens, **given, backend="triton")
            log_p, h = softmax_of(logits, ~masked.expand_as(logits), 0.5)
            assert_right(out.logprob, log_p[:, 250], dtype)
            assert_right(out.entropy, h, dtype)


# ---- Bits ------------------------------------------------------------------------------------


@each_dtype
def test_same_bits_from_every_operator_and_in_every_batch(dtype, device, backend):
    """Near-certain, masked, tied and NaN rows: the entropy, the divergence, the gradient and the
    other rows change no bit of a log-probability."""
    vocab = CHUNK + TILE + 77
    z = peaked(vocab, [5, TILE + 9, CHUNK + 3], [1.0, 25.0], dtype).to(device)
    z[0, :TILE] = torch.finfo(dtype).min
    z[2, 77] = z[2].max()
    z[4, 33] = torch.nan
    z[5, 44] = torch.inf
    tokens = z.double().nan_to_num(nan=-9.0, posinf=-9.0).argmax(-1)
    one = token_logprob(z, tokens, backend="triton")
    assert one.isnan().tolist() == [False] * 4 + [True] * 2
    found = (
        token_logprob(z, tokens, with_entropy=True, backend="triton").logprob,
        token_logprob_and_grad(z, tokens, backend="triton").logprob,
        logprob_kl(z, z.flip(-1), tokens, backend="triton").logprob,
        logprob_kl(z.flip(-1), z, tokens, backend="triton").ref_logprob,
        torch.cat(
            [token_logprob(z[i : i + 1], tokens[i : i + 1], backend="triton") for i in range(6)]
        ),
    )
    for other in found:
        assert torch.equal(other.nan_to_num(7.0), one.nan_to_num(7.0))


# ---- log1p -----------------------------------------------------------------------------------


@triton.jit
def log1p_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, softmax_triton.log1p(tl.load(x + at)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_log1p_within_a_few_units_of_the_last_place(dtype, device, backend):
    smallest = math.log10(torch.finfo(dtype).smallest_normal)
    x = torch.logspace(smallest, 5.5, 1024, dtype=torch.float64, device=device).to(dtype)
    x[:4] = torch.tensor([0.0, torch.finfo(dtype).eps, 1.0, -0.5])
    out = torch.empty_like(x)
    log1p_kernel[(1,)](x, out, 1024)
    expected = torch.tensor([math.log1p(v) for v in x.tolist()], dtype=torch.float64)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(out.double().cpu(), expected, **close)
    x[:2] = torch.tensor([-1.0, torch.nan])
    log1p_kernel[(1,)](x, out, 1024)
    assert out[0].item() == -torch.inf and out[1].isnan()
