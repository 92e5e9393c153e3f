"""linear_logprob with fast=True: the kernel that multiplies and sums up at once, and when it runs.

Its logits are float32, so its errors are held against the plain formula in float32 of the same
inputs. Small tiles and splits make small shapes have several of each.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compare import assert_close_to_truth
from rlhf_kernels import backend as rk_backend
from rlhf_kernels import linear_logprob
from rlhf_kernels.backend import operators
from rlhf_kernels.opspec import in_float64, map_tensors, outputs
from test_linear_logprob import inputs
from test_ops import _Dispatch

LOW = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", (*LOW, torch.float32), ids=lambda x: str(x)[6:])
fast_logprob = functools.partial(linear_logprob, fast=True)


@pytest.fixture
def splits(backend, monkeypatch):
    """The kernel with several tiles in each of a few splits, and groups of two blocks of tokens."""
    if backend != "triton":
        pytest.skip("the kernel is Triton's")
    from rlhf_kernels import linear_logprob_triton

    monkeypatch.setattr(linear_logprob_triton, "SPLITS", 3)
    monkeypatch.setattr(linear_logprob_triton, "GROUP", 2)


def in_float32(x):
    return x.float() if x.is_floating_point() else x


def check(hidden, weight, tokens, **options):
    """Against float64, beside the plain formula in float32; returns the results."""
    given = {"hidden": hidden, "weight": weight, "tokens": tokens, **options}
    got = outputs(fast_logprob(**given, backend="triton"))
    plain = outputs(linear_logprob(**map_tensors(given, in_float32), backend="reference"))
    truth = outputs(linear_logprob(**in_float64(given), backend="reference"))
    for i, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert a.dtype == torch.float32
        assert_close_to_truth(a, b, t, 1e-6, f"result {i}")
    return got


OPTIONS = {
    "alone": {},
    "temperature": {"temperature": 0.6},
    "entropy": {"with_entropy": True, "temperature": 1.7, "biased": True},
    "scale": {"logit_scale": 0.3, "with_entropy": True},
    "softcap": {"softcap": 4.0, "logit_scale": 1.5, "temperature": 0.8, "biased": True},
}


@each_dtype
@pytest.mark.parametrize("options", OPTIONS)
def test_fast_against_float64(dtype, options, device, backend, splits):
    """41 rows: the second group has one block, which is not full; 301 columns: a ragged tile."""
    hidden, weight, tokens = inputs(41, 40, 301, dtype, device)
    given = dict(OPTIONS[options])
    if given.pop("biased", False):
        given["bias"] = (weight * 3)[:, 0]  # strided, too
    check(hidden, weight, tokens, **given)


# 16: one tile; 15, 17: none that 16-byte loads divide; 72: the last of 64 on a GPU is not full.
@pytest.mark.parametrize("width", [1, 15, 16, 17, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
def test_fast_of_any_width(width, dtype, device, backend, splits):
    hidden, weight, tokens = inputs(19, width, 130, dtype, device)
    check(hidden, weight, tokens, with_entropy=True)


# 32: one tile exactly; 33: one column in the second; 288: three splits of three whole tiles.
@pytest.mark.parametrize("vocab", [1, 2, 32, 33, 288, 400])
def test_fast_of_any_vocabulary(vocab, device, backend, splits):
    hidden, weight, _ = inputs(5, 24, vocab, torch.bfloat16, device)
    ends = torch.tensor([0, vocab - 1, vocab // 2, min(31, vocab - 1), vocab // 3], device=device)
    check(hidden, weight, ends, with_entropy=True)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
def test_softcap_is_exact_near_zero_and_far_from_it(softcap, device, backend, splits):
    """tanh from 1e-4 of its range to where it is 1; a cancellation near 0 is 1e4 as large here."""
    hidden, weight, tokens = inputs(64, 16, 40, torch.float32, device)
    hidden = hidden * torch.logspace(-1.5, 1.5, 64, device=device).unsqueeze(-1)
    check(hidden, weight, tokens, softcap=softcap, with_entropy=True)


def test_fast_with_temperatures_and_several_tokens(device, backend, splits):
    hidden, weight, _ = inputs(6 * 7, 24, 301, torch.bfloat16, device)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(301, (6, 7, 3), generator=generator).to(device)
    tokens[..., 2] = tokens[..., 0]  # scored twice
    tokens[::2, ::3, 1], tokens[1, 2] = -100, -100  # one of several, and all of them
    temperature = torch.linspace(0.4, 2.0, 7, device=device).reshape(1, 7, 1)
    options = {"temperature": temperature, "with_entropy": True}
    logprob, entropy = check(hidden.view(6, 7, -1), weight, tokens, **options)
    assert (logprob[tokens == -100] == 0).all() and entropy[1, 2] == 0
    options = {"temperature": temperature[..., 0], "backend": backend}
    one = fast_logprob(hidden.view(6, 7, -1), weight, tokens[..., 0], **options)
    assert torch.equal(logprob[..., 0], one)


def test_fast_of_a_shifted_row(device, backend, splits):
    """A common offset of 1e4 costs the rounding of the logits to float32, and nothing else."""
    hidden, weight, tokens = inputs(9, 8, 301, torch.float32, device)
    hidden[:, 0], weight[:, 0] = 100.0, 100.0
    check(hidden.round(decimals=1), weight.round(decimals=1), tokens, with_entropy=True)


@each_dtype
@pytest.mark.parametrize("size", [1, 7, 17])
def test_fast_is_batch_invariant(dtype, size, device, backend, splits):
    """A row's bits in any batch, beside ignored rows, and at any place in a block."""
    hidden, weight, tokens = inputs(20, 40, 130, dtype, device)
    if device == "cpu":
        # The interpreter multiplies with NumPy's BLAS, which on some CPUs adds up the last rows of
        # a block in another order. Sixteenths: the products are exact, and any order does.
        hidden, weight = (x.mul(16).round().div(16) for x in (hidden, weight))
    options = {"temperature": 0.7, "with_entropy": True, "backend": backend}
    whole = fast_logprob(hidden, weight, tokens, **options)
    parts = [
        fast_logprob(h, weight, t, **options)
        for h, t in zip(hidden.split(size), tokens.split(size), strict=True)
    ]
    some = tokens.clone()
    some[:: size + 1] = -100
    kept = some != -100
    ignored = fast_logprob(hidden, weight, some, **options)
    for i, x in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), x)
        assert torch.equal(ignored[i], torch.where(kept, x, 0.0))


def test_layout_of_the_hidden_states_changes_no_bit(device, backend, splits):
    """Rows on odd addresses, with gaps, and columns side by side; strided rows of the weight."""
    hidden, weight, tokens = inputs(20, 24, 130, torch.bfloat16, device)
    expected = fast_logprob(hidden, weight, tokens, backend=backend)
    wide, tall = hidden.new_full((20, 30), torch.nan), weight.new_full((260, 24), torch.nan)
    wide[:, 3:27], tall[::2] = hidden, weight
    for h, w in [
        (wide[:, 3:27], weight),
        (hidden.t().contiguous().t(), weight),
        (hidden, tall[::2]),
    ]:
        assert torch.equal(fast_logprob(h, w, tokens, backend=backend), expected)


def test_nan_of_a_row_stays_in_it(device, backend, splits):
    """Of an ignored row in the operator's own product, too: there its block is multiplied."""
    hidden, weight, tokens = inputs(20, 24, 130, torch.bfloat16, device)
    expected = fast_logprob(hidden, weight, tokens, backend=backend)
    hidden[3], hidden[7] = torch.nan, torch.nan
    tokens[7] = -100
    got = fast_logprob(hidden, weight, tokens, backend=backend)
    assert got[3].isnan() and got[7] == 0
    others = torch.arange(20, device=device)
    others = others[(others != 3) & (others != 7)]
    assert torch.equal(got[others], expected[others])


def test_fast_with_banned_tokens(device, backend, splits):
    """A bias of -inf, also of a whole split; a target that is banned; and nothing but banned."""
    hidden, weight, tokens = inputs(20, 24, 301, torch.float32, device)
    bias = torch.zeros(301, device=device)
    bias[:120] = -torch.inf
    bias[200] = -torch.inf
    tokens[:3] = torch.tensor([0, 200, 250], device=device)
    logprob, _ = check(hidden, weight, tokens, bias=bias, with_entropy=True)
    assert (logprob[:2] == -torch.inf).all() and logprob[2].isfinite()
    nothing = torch.full_like(bias, -torch.inf)
    got = fast_logprob(hidden, weight, tokens, bias=nothing, with_entropy=True, backend=backend)
    plain = linear_logprob(hidden, weight, tokens, bias=nothing, with_entropy=True, backend=backend)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_fast_with_a_token_out_of_range(device, backend, splits, monkeypatch):
    """In the operator itself: on the CPU the public function looks before."""
    hidden, weight, tokens = inputs(20, 24, 130, torch.bfloat16, device)
    args = (None, 1.0, 1.0, 0.0, -100, False)

    def call(tokens):
        return operators["triton"].linear_logprob_fast(hidden, weight, None, tokens, *args)[0]

    expected = call(tokens)
    wrong = tokens.clone()
    wrong[2], wrong[5], wrong[6] = 130, -1, 2**40
    got = call(wrong)
    assert got[[2, 5, 6]].isnan().all()
    assert torch.equal(torch.where(wrong == tokens, got, expected), expected)
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"got 130 at position 2"):
        call(wrong)


def test_an_ignore_index_that_is_a_token(device, backend, splits):
    hidden, weight, tokens = inputs(20, 24, 130, torch.bfloat16, device)
    tokens[4] = 7
    got = fast_logprob(hidden, weight, tokens, ignore_index=7, backend=backend)
    assert got[4] == 0
    kept = tokens != 7
    expected = fast_logprob(hidden, weight, tokens, backend=backend)
    assert torch.equal(got[kept], expected[kept])


@pytest.mark.parametrize("rows", [0, 3])
def test_fast_without_a_scored_token(rows, device, backend):
    hidden, weight, tokens = inputs(rows, 24, 130, torch.bfloat16, device)
    out = fast_logprob(hidden, weight, tokens * 0 - 100, with_entropy=True, backend=backend)
    assert out.logprob.shape == out.entropy.shape == (rows,)
    assert not out.logprob.any() and not out.entropy.any()


# ---- When it runs ---------------------------------------------------------------------------


def test_without_the_kernel_fast_changes_nothing(device, backend):
    """With gradients, in float64, with scattered columns, and on every other backend."""
    hidden, weight, tokens = inputs(5, 24, 60, torch.bfloat16, device)
    leaf = weight.clone().requires_grad_()
    options = {"with_entropy": True, "chunk_tokens": 3, "backend": backend}
    cases = [(hidden, leaf), (hidden.double(), weight.double())]
    cases += [(hidden, weight.t().contiguous().t())]
    if backend != "triton":
        cases.append((hidden, weight))
    for h, w in cases:
        with _Dispatch() as dispatch:
            got = fast_logprob(h, w, tokens, **options)
        assert "linear_logprob_fast" not in str(dispatch.calls)
        for a, b in zip(got, linear_logprob(h, w, tokens, **options), strict=True):
            assert torch.equal(a, b)
            assert a.requires_grad == w.requires_grad


def test_kernel_runs_where_no_gradient_is_needed(device, backend, splits):
    hidden, weight, tokens = inputs(dtype=torch.bfloat16, device=device)
    leaf = weight.clone().requires_grad_()
    results = []
    for w, enabled in ((weight, True), (leaf, False)):
        with _Dispatch() as dispatch, torch.set_grad_enabled(enabled):
            results.append(fast_logprob(hidden, w, tokens, backend=backend))
        assert [f._schema.name for f, *_ in dispatch.calls] == [
            "rlhf_kernels_triton::linear_logprob_fast"
        ]
    assert torch.equal(*results)


@pytest.mark.parametrize("asked", [None, "triton", "cuda", "environment"])
def test_a_recorded_backend_does_not_stand_for_the_kernel(asked, monkeypatch):
    """On CUDA tensors: the kernel serves unless the caller, or the environment, wants cuda."""
    monkeypatch.setattr(rk_backend, "_reasons", dict.fromkeys(rk_backend._reasons, None))
    row = rk_backend.Fastest("token_logprob", torch.bfloat16, 0, "cuda", "x.json")
    monkeypatch.setattr(rk_backend, "FASTEST", (row,))
    if asked == "environment":
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", "cuda")
    with FakeTensorMode(), _Dispatch() as dispatch:
        hidden, weight = (torch.empty(n, 24, dtype=torch.bfloat16, device="cuda") for n in (5, 301))
        tokens = torch.empty(5, dtype=torch.int64, device="cuda")
        fast_logprob(hidden, weight, tokens, backend=None if asked == "environment" else asked)
    names = [f._schema.name for f, *_ in dispatch.calls]
    kernel = "rlhf_kernels_triton::linear_logprob_fast"
    assert names == [kernel if asked in (None, "triton") else "rlhf_kernels::linear_logprob_fwd"]
