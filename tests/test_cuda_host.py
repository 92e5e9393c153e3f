"""The CUDA kernels' own source, executed on the CPU: threads are fibers (tests/host_device)."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math

import pytest
import torch

import test_known_bugs
from compare import assert_close_to_truth
from host_device import build
from rlhf_kernels import ClippedSurrogate, gae, token_logprob, token_logprob_and_grad
from rlhf_kernels.opspec import Maker, in_float64
from rlhf_kernels.specs import SPECS
from test_ops import run

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
OPERATORS = {
    "token_logprob": "token_logprob_fwd",
    "token_logprob_and_grad": "token_logprob_and_grad",
    "gae": "gae",
}
ORDERS = {"forward": (0, 0), "backward": (1, 0), "shuffled": (2, 1), "shuffled again": (2, 2)}


OWN_TESTS = {
    f"{name}: {test}": function
    for name in OPERATORS
    for test, function in vars(importlib.import_module(f"test_{name}")).items()
    if test.startswith("test_")
    and [*inspect.signature(function).parameters] == ["device", "backend"]
}


@pytest.fixture
def machine(monkeypatch):
    """The CUDA kernels as backend="cuda" of CPU tensors; ``machine(order)`` sets the schedule."""
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    library, operators = build.load()
    build.use(monkeypatch, operators)

    def set_order(name):
        library.rk_host_order(*(int(x) for x in ORDERS[name]))

    set_order("forward")
    yield set_order
    set_order("forward")


def spec_of(name):
    return next(spec for spec in SPECS if spec.name == name)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered(machine, name):
    assert build.registered(OPERATORS[name])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OPERATORS)
@each_dtype
def test_error_is_at_most_twice_that_of_the_plain_formula(machine, name, dtype, order):
    """Against float64; and the schedule of the threads changes no bit."""
    spec = spec_of(name)
    atol = 1e-12 if dtype == torch.float64 else spec.atol
    for sample in spec.samples(Maker("cpu", dtype)):
        machine("forward")
        first, first_grads = run(spec, sample.inputs, "cuda")
        machine(order)
        got, grads = run(spec, sample.inputs, "cuda")
        for a, b in zip([*first, *first_grads], [*got, *grads], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), sample.why
        plain, plain_grads = run(spec, sample.inputs, "reference")
        truth, true_grads = run(spec, in_float64(sample.inputs), "reference")
        for i, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
            assert_close_to_truth(a, b, t, atol, f"{name}, {sample.why}, output {i}")
        for i, (a, b, t) in enumerate(zip(grads, plain_grads, true_grads, strict=True)):
            assert a.dtype == dtype, sample.why
            assert_close_to_truth(a, b, t, atol, f"{name}, {sample.why}, gradient {i}")


@pytest.mark.parametrize("test", OWN_TESTS)
def test_own_tests_of_the_operator(machine, test):
    machine("shuffled")
    OWN_TESTS[test]("cpu", "cuda")


def both(logits, tokens, **options):
    """Log-prob, entropy and the gradient of a weighted sum of both."""
    leaf = logits.detach().requires_grad_()
    out = token_logprob(leaf, tokens, with_entropy=True, **options)
    (out.logprob.sum() * 0.3 + out.entropy.sum()).backward()
    return out.logprob.detach(), out.entropy.detach(), leaf.grad


# 1, 5: less than a vector. 130, 668: not a multiple of any tile. 8200: a full tile and a rest.
# 40001: two parts in 16 bits, and rows on every 2-byte boundary. 8300: the first half is -inf.
@pytest.mark.parametrize("vocab", [1, 5, 130, 668, 8200, 8300, 40001])
@each_dtype
def test_token_logprob_rows_anywhere_in_memory(machine, dtype, vocab):
    """Any alignment of the rows, in several schedules: the bits of the row alone."""
    generator = torch.Generator().manual_seed(vocab)
    rows = 3 if vocab > 10000 else 6
    wide = torch.full((rows, vocab + 4), torch.nan, dtype=dtype)
    logits = wide[:, 3 : 3 + vocab]
    logits.copy_(torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3)
    if vocab == 8300:
        logits[:, :4200] = -torch.inf
    tokens = torch.randint(vocab // 2, vocab, (rows,), generator=generator)
    expected = both(logits.contiguous(), tokens, backend="cuda")
    truth = both(logits.double(), tokens, backend="reference")
    plain = both(logits, tokens, backend="reference")
    names = ("logprob", "entropy", "gradient")
    atol = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b, t, name in zip(expected, plain, truth, names, strict=True):
        assert_close_to_truth(a, b, t, atol, name)
    for order in ("backward", "shuffled"):
        machine(order)
        got = both(logits, tokens, backend="cuda")
        for a, b, name in zip(got, expected, names, strict=True):
            assert torch.equal(a, b), f"{name}, {order}"
    for row in (0, rows - 1):
        alone = both(logits[row : row + 1], tokens[row : row + 1], backend="cuda")
        for a, b, name in zip(alone, expected, names, strict=True):
            assert torch.equal(a, b[row : row + 1]), f"{name} of row {row}"


@each_dtype
def test_token_logprob_in_place_gives_the_same_gradient(machine, dtype):
    generator = torch.Generator().manual_seed(0)
    for vocab in (5, 1003, 8300):
        leaf = torch.randn(4, vocab, generator=generator).to(dtype).requires_grad_()
        tokens = torch.randint(vocab, (4, 3), generator=generator)
        tokens[0, 1] = tokens[0, 0]
        options = {"with_entropy": True, "backend": "cuda", "temperature": 0.7}
        weight = torch.randn(4, 3, generator=generator)

        def loss(out, weight=weight):
            return (out.logprob * weight).sum() + out.entropy.sum()

        (expected,) = torch.autograd.grad(loss(token_logprob(leaf, tokens, **options)), leaf)
        logits = leaf * 1.0
        machine("backward")
        loss(token_logprob(logits, tokens, inplace_backward=True, **options)).backward()
        assert torch.equal(leaf.grad, expected)
        assert torch.equal(logits.detach(), expected)
        machine("forward")


def test_token_logprob_ignored_rows_are_not_read(machine):
    logits = torch.full((3, 1000), torch.nan)
    logits[1] = 0.0
    tokens = torch.tensor([[-100, -100], [5, -100], [-100, -100]])
    logprob, entropy, grad = both(logits, tokens, backend="cuda")
    assert logprob[1, 0] == pytest.approx(-math.log(1000), rel=1e-6)
    logprob[1, 0] = 0
    assert (logprob == 0).all() and (entropy[[0, 2]] == 0).all()
    assert (grad[[0, 2]] == 0).all() and grad[1].abs().sum() > 0.1


def test_token_logprob_outside_of_the_vocabulary(machine, monkeypatch):
    """NaN, and no gradient from it; with RLHF_KERNELS_CHECK=1 an error that names the place."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[50, 3], [-1, -1], [7, -100]])
    logprob, entropy, grad = both(logits, tokens, backend="cuda")
    assert logprob[0, 0].isnan() and logprob[1].isnan().all() and logprob[2, 1] == 0
    kept = tokens.clone()
    kept[0, 0] = -100
    kept[1] = -100
    expected, entropies, grads = both(logits, kept, backend="cuda")
    assert logprob[0, 1] == expected[0, 1] and logprob[2, 0] == expected[2, 0]
    assert torch.equal(grad[[0, 2]], grads[[0, 2]])
    assert entropy.isfinite().all() and torch.equal(entropy[[0, 2]], entropies[[0, 2]])
    leaf = logits.clone().requires_grad_()
    token_logprob(leaf, tokens, backend="cuda").nansum().backward()
    assert (leaf.grad[1] == 0).all()
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"tokens: .* got 50 at position \(0, 0\)"):
        token_logprob(logits, tokens, backend="cuda")


def test_token_logprob_nan_and_infinite_rows_stay_visible(machine):
    logits = torch.zeros(5, 5000)
    logits[0, 4999] = torch.nan
    logits[1, 3000] = torch.inf
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logprob, entropy, grad = both(logits, torch.zeros(5, dtype=torch.int64), backend="cuda")
    assert logprob[:4].isnan().all() and entropy[:4].isnan().all()
    assert logprob[4].item() == pytest.approx(-math.log(5000), rel=1e-6)
    assert grad[4].isfinite().all()


def test_token_logprob_large_offset_and_wide_range(machine):
    """An offset of 1e4 and logits 1e4 apart: what is left is the rounding of the inputs."""
    generator = torch.Generator().manual_seed(0)
    for logits in (
        torch.randn(4, 9000, generator=generator) + 1e4,
        torch.randn(4, 9000, generator=generator) * 1e4,
        torch.randn(4, 9000, generator=generator).cumsum(-1),
        -torch.randn(4, 9000, generator=generator).abs().cumsum(-1) * 1e30,
    ):
        tokens = logits.argsort(-1)[:, -2:]
        got = both(logits, tokens, backend="cuda")
        plain = both(logits, tokens, backend="reference")
        truth = both(logits.double(), tokens, backend="reference")
        for a, b, t in zip(got, plain, truth, strict=True):
            assert_close_to_truth(a, b, t, 1e-6)


def test_token_logprob_entropy_changes_no_bit(machine):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(3, 5003, generator=generator) * 4).to(dtype)
        tokens = torch.randint(5003, (3,), generator=generator)
        alone = token_logprob(logits, tokens, backend="cuda")
        beside = token_logprob(logits, tokens, with_entropy=True, backend="cuda")
        assert torch.equal(alone, beside.logprob)


# 40001: four parts of a row, in the one-read kernel four blocks of a cluster.
@pytest.mark.parametrize("vocab", [2, 33, 2049, 9000, 40001])
def test_log_p_near_one(machine, vocab):
    machine("shuffled")
    test_known_bugs.test_log_p_near_one("cpu", "cuda", vocab)


def test_log_p_near_one_of_equal_maxima(machine):
    """In two threads, in two parts; and in one thread."""
    test_known_bugs.test_log_p_near_one_of_equal_maxima("cpu", "cuda")
    logits = torch.full((1, 40001), -30.0)
    for places in ((3, 40000), (3, 4), (3, 1027, 20000)):
        logits[0, list(places)] = 5.0
        got = token_logprob(logits, torch.tensor([3]), backend="cuda")
        assert got.item() == pytest.approx(-math.log(len(places)), rel=1e-6)
        logits.fill_(-30.0)


@pytest.mark.parametrize("where", test_known_bugs.MASKS)
@each_dtype
def test_finite_huge_mask(machine, dtype, where):
    for temperature in (1.0, 0.5):
        test_known_bugs.test_finite_huge_mask("cpu", "cuda", dtype, temperature, where)


def steps(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[-1])
    rewards, values = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    return rewards, values, torch.rand(shape, generator=generator) < 0.7


# 1030: two tiles, 2600: three; 1027: rows that begin on every 4-byte boundary.
@pytest.mark.parametrize("length", [1, 4, 130, 1027, 1030, 2600])
@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gae_lengths_and_gaps(machine, dtype, masked, length):
    rewards, values, mask = steps(5, length, dtype=dtype)
    mask[1] = False
    mask[2, length // 3 : length // 3 + 1100] = False  # a gap longer than a tile
    if masked:  # what stands at a masked step is not used
        rewards[~mask], values[~mask] = torch.nan, torch.inf
    options = {"gamma": 0.99, "last_value": torch.arange(5.0).to(dtype)}
    inputs = (rewards, values, mask) if masked else (rewards, values)
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    options64 = {**options, "last_value": options["last_value"].double()}
    plain = gae(*inputs, **options, backend="reference")
    truth = gae(*doubled, **options64, backend="reference")
    expected = gae(*inputs, **options, backend="cuda")
    for got, b, t in zip(expected, plain, truth, strict=True):
        assert_close_to_truth(got, b, t, 1e-12 if dtype == torch.float64 else 1e-6)
    for order in ("backward", "shuffled"):
        machine(order)
        for a, b in zip(gae(*inputs, **options, backend="cuda"), expected, strict=True):
            assert torch.equal(a, b), order
    for row in (0, 3):  # a row alone, and so on another boundary
        one = slice(row, row + 1)
        alone = gae(
            *(x[one].contiguous() for x in inputs),
            gamma=0.99,
            last_value=options["last_value"][one],
            backend="cuda",
        )
        for a, b in zip(alone, expected, strict=True):
            assert torch.equal(a, b[one])


def test_gae_packed_sequences_do_not_see_each_other(machine):
    """The bits of a packed sequence do not depend on where it stands, nor on its neighbours."""
    rewards, values, mask = steps(4000)
    lengths = [3, 0, 1500, 1, 7, 1024, 1465]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert offsets[-1] == 4000
    machine("shuffled")
    together = gae(rewards, values, mask, cu_seqlens=offsets.int(), gamma=0.9, backend="cuda")
    options = {"cu_seqlens": offsets, "gamma": 0.9, "backend": "reference"}
    truth = gae(rewards.double(), values.double(), mask, **options)
    plain = gae(rewards, values, mask, **options)
    for a, b, t in zip(together, plain, truth, strict=True):
        assert_close_to_truth(a, b, t, 1e-6)
    for begin, end in itertools.pairwise(offsets):
        alone = gae(
            *(x[begin:end].clone() for x in (rewards, values, mask)),
            cu_seqlens=torch.tensor([0, end - begin]),
            gamma=0.9,
            backend="cuda",
        )
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[begin:end])


def test_gae_wrong_offsets_stay_inside_and_are_reported(machine, monkeypatch):
    rewards, values, _ = steps(8)
    offsets = torch.tensor([-4, 5, 3, 90])
    advantages, _ = build.load()[1].gae(rewards, values, None, offsets, None, 1.0, 0.95)
    assert advantages.shape == (8,)
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets that start at 0"):
        build.load()[1].gae(rewards, values, None, offsets, None, 1.0, 0.95)


def one_read(logits, tokens, weight=None, temperature=1.0, **options):
    """Everything but the entropy's None, as a list: the gradient is that of sum(weight logprob)."""
    options = {"with_entropy": True, "backend": "cuda", **options}
    out = token_logprob_and_grad(logits, tokens, weight=weight, temperature=temperature, **options)
    return list(out)


# 40001: clusters of 2 (16 bits), 4 (32 bits) and 8 (64 bits); the others: a block a row.
@pytest.mark.parametrize("vocab", [1, 5, 668, 8300, 40001])
@each_dtype
def test_one_read_rows_anywhere_in_memory(machine, dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    rows = 2 if vocab > 10000 else 4
    wide = torch.full((rows, vocab + 4), torch.nan, dtype=dtype)
    logits = wide[:, 3 : 3 + vocab]
    logits.copy_(torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3)
    if vocab == 8300:
        logits[:, :4200] = -torch.inf
    tokens = torch.randint(vocab // 2, vocab, (rows, 3), generator=generator)
    tokens[:, 2] = tokens[:, 0]  # scored twice
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.linspace(0.7, 1.3, rows).to(kind).unsqueeze(-1)
    advantages = torch.randn(rows, generator=generator).to(kind)
    surrogate = ClippedSurrogate(torch.full((rows,), -2.0), advantages, dual_clip=3.0)
    cases = (
        (tokens, torch.randn(rows, 3, generator=generator).to(kind), None),
        (tokens, None, None),
        (tokens[:, 0], torch.rand(rows, generator=generator).to(kind), surrogate),
    )
    for tokens, weight, surrogate in cases:
        scale = temperature if tokens.dim() == 2 else temperature.squeeze(-1)
        inputs = in_float64({"weight": weight, "surrogate": surrogate})
        plain_options = {"backend": "reference", "surrogate": surrogate}
        truth = one_read(
            logits.double(), tokens, temperature=scale.double(), **inputs, backend="reference"
        )
        plain = one_read(logits, tokens, weight, scale, **plain_options)
        expected = one_read(logits.contiguous(), tokens, weight, scale, surrogate=surrogate)
        for i, (a, b, t) in enumerate(zip(expected, plain, truth, strict=True)):
            atol = 1e-12 if dtype == torch.float64 else 1e-6
            assert_close_to_truth(a, b, t, atol, f"output {i}")
        for order in ("backward", "shuffled"):
            machine(order)
            got = one_read(logits, tokens, weight, scale, surrogate=surrogate)
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(a, b), f"output {i}, {order}"
        buffer = wide.clone()
        place = buffer[:, 3 : 3 + vocab]
        overwritten = one_read(place, tokens, weight, scale, surrogate=surrogate, inplace=True)
        assert overwritten[-1].data_ptr() == place.data_ptr()
        for a, b in zip(overwritten, expected, strict=True):
            assert torch.equal(a, b)
        assert buffer[:, :3].isnan().all() and buffer[:, 3 + vocab :].isnan().all()


@pytest.mark.parametrize("vocab", [1, 31, 300, 1003, 5000, 8300, 40001, 151937])
@each_dtype
def test_one_read_and_forward_have_the_same_bits(machine, dtype, vocab):
    """So that a ratio of new to old log-probability is exactly 1 at the first step."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(2, vocab, generator=generator) * 3).to(dtype)
    tokens = torch.randint(vocab, (2,), generator=generator)
    expected = token_logprob(logits, tokens, with_entropy=True, backend="cuda")
    logprob, entropy, *_ = one_read(logits, tokens)
    assert torch.equal(logprob, expected.logprob) and torch.equal(entropy, expected.entropy)


def test_one_read_row_alone_has_the_same_bits(machine):
    logits = torch.randn(4, 40001, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.tensor([5, 39999, 20000, 7])
    surrogate = ClippedSurrogate(torch.full((4,), -11.0), torch.tensor([1.0, -1.0, 2.0, -2.0]))
    together = one_read(logits, tokens, surrogate=surrogate)
    own = ClippedSurrogate(surrogate.old_logprob[-1:], surrogate.advantages[-1:])
    alone = one_read(logits[-1:].clone(), tokens[-1:], surrogate=own)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[-1:])


def test_one_read_ignored_and_wrong_tokens(machine, monkeypatch):
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.nan
    tokens = torch.tensor([[-100, -100], [3, -100], [70, 5], [-1, -1]])
    known = torch.where((tokens < 0) | (tokens > 69), -100, tokens)
    truth = one_read(logits, known, backend="reference")
    for order in ORDERS:
        machine(order)
        logprob, entropy, row_max, log_sum, grad = one_read(logits, tokens)
        assert (logprob[0] == 0).all() and entropy[0] == row_max[0] == log_sum[0] == 0
        assert (grad[[0, 3]] == 0).all()
        assert logprob[2, 0].isnan() and logprob[3].isnan().all()
        torch.testing.assert_close(logprob[1], truth[0][1])
        torch.testing.assert_close(logprob[2, 1], truth[0][2, 1])
        torch.testing.assert_close(entropy[1:3], truth[1][1:3])
        torch.testing.assert_close(grad[1:3], truth[-1][1:3])
        assert entropy[3].isfinite()
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"in \[0, 70\) .* got 70 at position \(2, 0\)"):
        one_read(logits, tokens)


def test_one_read_surrogate_where_no_token_is_scored(machine):
    """What old_logprob, advantages and weight hold there reaches nothing."""
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([-100, 71, 3])
    nothing = torch.tensor([torch.nan, torch.nan, 0.5])
    logprob, *_, grad = one_read(
        logits, tokens, nothing, surrogate=ClippedSurrogate(nothing - 4, nothing)
    )
    assert logprob[0] == 0 and logprob[1].isnan()
    assert (grad[:2] == 0).all() and grad[2].abs().sum() > 0


def test_one_read_reads_twice_where_a_row_does_not_fit(machine):
    logits = torch.randn(2, 30011, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([29000, 7])
    weight = torch.tensor([0.5, -2.0])
    surrogate = ClippedSurrogate(torch.tensor([-10.0, -11.0]), torch.tensor([1.0, -2.0]))
    library = build.load()[0]
    for options in ({}, {"surrogate": surrogate}):
        once = one_read(logits, tokens, weight, **options)
        library.rk_host_limits(1, 99 * 1024)
        try:
            twice = one_read(logits, tokens, weight, **options)
        finally:
            library.rk_host_limits(8, 227 * 1024)
        for a, b in zip(once[:-1], twice[:-1], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(once[-1], twice[-1], rtol=1e-5, atol=1e-6)
