"""What only a GPU shows: graphs, streams, several devices, clusters, more than 2^31 elements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from compare import assert_close_to_truth
from rlhf_kernels.backend import INTERPRETING, why_not
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, Sample, in_float64, map_tensors, outputs
from rlhf_kernels.specs import SPECS
from test_ops import each_op

pytestmark = pytest.mark.skipif(
    INTERPRETING or not torch.cuda.is_available(), reason="there is no GPU"
)
CUDA_SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
WAIT = 200_000_000  # cycles that a stream is kept busy: a tenth of a second


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend of CUDA tensors."""
    if reason := why_not("token_logprob", request.param):
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def cases(spec: OpSpec, device: str = "cuda", seed: int = 0) -> Iterator[Sample]:
    """The samples of a test, without those that have no element."""
    for sample in spec.samples(Maker(device, torch.float32, seed)):
        if all(x.numel() for x in tensors_of(sample.inputs)):
            yield sample


def large(spec: OpSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """The arguments that the benchmark calls with."""
    return next(spec.bench(Maker("cuda", dtype, seed))).inputs


def results(spec: OpSpec, inputs: Inputs, backend: str) -> list[Tensor]:
    """Outputs and gradients; unlike ``test_ops.run`` it copies nothing to the device."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in spec.leaves(inputs)}
    found = outputs(spec.function(**{**inputs, **leaves}, backend=backend))
    wanted = [x for x in found if x.requires_grad]
    if not wanted:
        return found
    weights = [
        torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
        for x in wanted
    ]
    grads = torch.autograd.grad(
        wanted, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    return [*(x.detach() for x in found), *grads]


def tensors_of(inputs: Inputs) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(inputs, lambda x: found.append(x) or x)
    return found


def overwrite(inputs: Inputs, others: Inputs) -> None:
    """The values of other inputs of the same shapes, in the same memory."""
    for x, y in zip(tensors_of(inputs), tensors_of(others), strict=True):
        x.copy_(y)


def in_memory_of_its_own(inputs: Inputs) -> Inputs:
    """Copies with the same strides, unless those let elements share memory."""

    def copy(x: Tensor) -> Tensor:
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return x.contiguous()
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    return map_tensors(inputs, copy)


def assert_same_bits(got: list[Tensor], expected: list[Tensor], why: str = "") -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{why}, result {i}"


def test_cuda_kernels_are_registered():
    """The other tests skip an operator without a CUDA kernel; this one says which have theirs."""
    if reason := why_not("token_logprob", "cuda"):
        pytest.skip(reason)
    sources = {path.stem for path in CUDA_SOURCES.glob("*.cu")}
    operators = [spec.name for spec in SPECS if spec.name in sources]
    assert len(operators) >= 2
    assert {op: why_not(op, "cuda") for op in operators} == dict.fromkeys(operators)


# ---- Graphs, streams, devices ---------------------------------------------------------------


def capture(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """What ``call`` returns inside a CUDA graph, and the graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return captured, graph.replay


@each_op
def test_cuda_graph_replays_the_bits_of_the_eager_call(spec, backend):
    """Captured once, forward and backward, and replayed on other values."""
    for sample, other in zip(cases(spec), cases(spec, seed=1), strict=True):
        inputs = in_memory_of_its_own(sample.inputs)
        captured, replay = capture(lambda inputs=inputs: results(spec, inputs, backend))
        for values in (other.inputs, sample.inputs):
            overwrite(inputs, values)
            replay()
            assert_same_bits(captured, results(spec, values, backend), sample.why)


@each_op
def test_no_call_waits_for_the_device(spec, backend):
    for sample in cases(spec):
        results(spec, sample.inputs, backend)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(spec, sample.inputs, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_op
def test_kernels_run_on_the_current_stream(spec, backend):
    """Values written on a stream that is still busy are those that a call on it reads."""
    inputs, others = (in_memory_of_its_own(large(spec, seed=seed)) for seed in (0, 1))
    expected = results(spec, others, backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(WAIT)
        overwrite(inputs, others)
        got = results(spec, inputs, backend)
    torch.cuda.synchronize()
    assert_same_bits(got, expected)


@each_op
def test_two_streams_at_once_change_no_bit(spec, backend):
    inputs = [large(spec, seed=seed) for seed in (0, 1)]
    expected = [results(spec, x, backend) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[], []]
    for _ in range(5):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[number] = results(spec, inputs[number], backend)
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@each_op
def test_device_that_is_not_the_current_one(spec, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    for sample in cases(spec, "cuda:1"):
        with torch.cuda.device(1):
            expected = results(spec, sample.inputs, backend)
        with torch.cuda.device(0):
            got = results(spec, sample.inputs, backend)
            assert torch.cuda.current_device() == 0
        assert all(x.device == torch.device("cuda", 1) for x in got)
        assert_same_bits(got, expected, sample.why)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@each_op
def test_twenty_runs_give_the_same_bits(spec, dtype, backend):
    inputs = large(spec, dtype)
    expected = results(spec, inputs, backend)
    for run in range(20):
        # Memory that the next call is likely to get: what it does not write shows up.
        poison = [torch.full_like(x, torch.nan) for x in expected if x.is_floating_point()]
        del poison
        assert_same_bits(results(spec, inputs, backend), expected, f"run {run}")


# ---- Rows of a cluster ----------------------------------------------------------------------

# Where a GPU has clusters, a row takes one of several blocks; the last is too large for any.
LONG_ROWS = [
    (40001, torch.bfloat16),
    (40001, torch.float32),
    (151936, torch.bfloat16),
    (151936, torch.float32),
    (700001, torch.float32),
]


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
@pytest.mark.parametrize("kind", ["weight", "surrogate", "many tokens"])
@pytest.mark.parametrize(("vocab", "dtype"), LONG_ROWS, ids=lambda x: str(x).removeprefix("torch."))
def test_long_rows_in_one_call(vocab, dtype, kind, inplace, backend):
    """Against float64. Rows begin on odd addresses; nothing is written beside them."""
    generator = torch.Generator("cuda").manual_seed(vocab)
    wide = torch.full((3, vocab + 5), torch.nan, dtype=dtype, device="cuda")
    logits = wide[:, 1 : vocab + 1]
    logits.normal_(0.0, 2.0, generator=generator)
    tokens = torch.randint(vocab, (3, 3), device="cuda", generator=generator)
    tokens[:, 2], tokens[1, 1] = tokens[:, 0], -100  # scored twice, and not at all
    weight = torch.linspace(-1.0, 1.5, 9, device="cuda").reshape(3, 3)
    surrogate = None
    if kind != "many tokens":
        tokens, weight = tokens[:, 0], weight[:, 0]
    if kind == "surrogate":  # at ratios of 0.9, 1.1 and, clipped, 1.5
        ratio, advantages = torch.tensor([[0.9, 1.1, 1.5], [-1.0, 0.7, 1.0]], device="cuda")
        old = rk.token_logprob(logits, tokens, temperature=0.8, backend="reference") - ratio.log()
        surrogate, weight = rk.ClippedSurrogate(old, advantages), weight.abs()
    options = {"weight": weight, "surrogate": surrogate, "temperature": 0.8, "with_entropy": True}
    plain, truth = (
        outputs(rk.token_logprob_and_grad(x, tokens, **given, backend="reference"))
        for x, given in ((logits, options), (logits.double(), in_float64(options)))
    )
    got = rk.token_logprob_and_grad(logits, tokens, **options, inplace=inplace, backend=backend)
    assert (got.grad_logits.data_ptr() == logits.data_ptr()) == inplace
    for i, (a, b, t) in enumerate(zip(outputs(got), plain, truth, strict=True)):
        assert_close_to_truth(a, b, t, 1e-6, f"result {i}")
    assert wide[:, 0].isnan().all() and wide[:, vocab + 1 :].isnan().all()


# ---- The product with its softmax -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
def test_fast_log_probs_of_a_real_head(dtype):
    """Against float64; a row alone, beside ignored rows, and in a graph has the same bits.

    2177 rows: more than a group of blocks, the last not full. 151936 columns: splits of 4 tiles.
    """
    if reason := why_not("linear_logprob", "triton"):
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2177, 1024, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(151936, 1024, device="cuda", generator=generator) / 16).to(dtype)
    tokens = torch.randint(151936, (2177,), device="cuda", generator=generator)
    options = {"temperature": 0.8, "with_entropy": True}
    call = functools.partial(
        rk.linear_logprob, weight=weight, fast=True, backend="triton", **options
    )
    rows = torch.tensor([0, 127, 128, 2048, 2176], device="cuda")
    got = [x[rows] for x in call(hidden, tokens=tokens)]
    for count in (1, 3, 5):
        assert_same_bits(
            [x[:count] for x in got],
            list(call(hidden[rows[:count]], tokens=tokens[rows[:count]])),
            f"{count} rows",
        )
    some = torch.full_like(tokens, -100)
    some[rows] = tokens[rows]
    assert_same_bits([x[rows] for x in call(hidden, tokens=some)], got, "beside ignored rows")
    captured, replay = capture(lambda: list(call(hidden, tokens=some)))
    replay()
    assert_same_bits([x[rows] for x in captured], got, "in a graph")
    assert not captured[0][some == -100].any()
    plain, truth = (
        rk.linear_logprob(
            hidden[rows].to(t), weight.to(t), tokens[rows], **options, backend="reference"
        )
        for t in (torch.float32, torch.float64)
    )
    for i, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert_close_to_truth(a, b, t, 1e-6, f"result {i}")


# ---- More than 2^31 elements ----------------------------------------------------------------


class _Computed(torch.autograd.Function):
    """Logits that autograd takes for computed, without a copy of them or of their gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def log_probs(
    op: str, logits: Tensor, ref_logits: Tensor, tokens: Tensor, weight: Tensor, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Outputs of an operator, and a sum of those with a gradient."""
    if op == "token_logprob":
        out = rk.token_logprob(logits, tokens, with_entropy=True, **options)
        return [x.detach() for x in out], (out.logprob * weight + out.entropy).sum()
    both = rk.logprob_kl(logits, ref_logits, tokens, **options)
    return [x.detach() for x in both], (both.kl * weight + both.logprob).sum()


# Rows, vocabulary, elements from row to row. 65544: the last 8 rows begin beyond 2^31 elements;
# 2^30 + 64: the last of three rows does, and the gaps between them are not touched.
LAYOUTS = {"many rows": (65544, 32768, 32768), "far apart": (3, 32768, 2**30 + 64)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["token_logprob", "logprob_kl"])
def test_logits_of_more_than_2_31_elements(op, layout, backend, gpu_memory):
    """A few rows against float64 of those rows, and the bits of a call on them alone."""
    gpu_memory(22)
    count, vocab, stride = LAYOUTS[layout]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> Tensor:
        storage = torch.empty(count, stride, dtype=torch.bfloat16, device="cuda")
        return storage[:, :vocab].normal_(0.0, 2.0, generator=generator)

    logits, ref_logits = draw(), draw() if op == "logprob_kl" else torch.empty(0)
    tokens = torch.randint(vocab, (count,), device="cuda", generator=generator)
    weight = torch.linspace(0.5, 1.5, count, device="cuda")
    rows = sorted({0, count // 2, count - 2, count - 1})

    def some(x: Tensor) -> Tensor:
        return torch.stack([x[row] for row in rows]) if x.numel() else x

    def alone(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaf = some(logits).to(dtype).requires_grad_()
        others = (some(ref_logits).to(dtype), some(tokens), some(weight))
        found, loss = log_probs(op, leaf, *others, backend=backend)
        return [*found, *torch.autograd.grad(loss, leaf)]

    leaf = logits.detach().requires_grad_()
    found, loss = log_probs(op, leaf, ref_logits, tokens, weight, backend=backend)
    got = [some(x) for x in (*found, *torch.autograd.grad(loss, leaf))]
    assert_same_bits(got, alone(torch.bfloat16, backend))
    plain, truth = alone(torch.bfloat16, "reference"), alone(torch.float64, "reference")
    for i, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert_close_to_truth(a, b, t, 1e-6, f"result {i}")
    if op == "token_logprob":
        one_call = functools.partial(rk.token_logprob_and_grad, backend=backend)
        fused = outputs(one_call(logits, tokens, weight=weight))
        few = outputs(one_call(some(logits), some(tokens), weight=some(weight)))
        assert_same_bits([some(x) for x in fused], few, "in one call")
        computed = _Computed.apply(torch.zeros((), device="cuda", requires_grad=True), logits)
        options = {"backend": backend, "inplace_backward": True}
        log_probs(op, computed, ref_logits, tokens, weight, **options)[1].backward()
        assert_same_bits([some(logits)], got[-1:], "in place")


SHAPE = (65537, 32768)
TOKENS = {
    "gae": ("rewards", "values"),
    "masked_mean": ("x",),
    "policy_loss": ("logprob", "old_logprob", "advantages"),
    "value_loss": ("values", "old_values", "returns"),
}


@pytest.mark.parametrize("op", TOKENS)
def test_more_than_2_31_tokens(op, backend, gpu_memory):
    """Only the last row, beyond 2^31 elements, is valid: the results are those of that row."""
    gpu_memory(60)
    shape = SHAPE
    spec = next(spec for spec in SPECS if spec.name == op)
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        for name in TOKENS[op]
    }
    inputs["mask"] = torch.zeros(shape, dtype=torch.bool, device="cuda")
    inputs["mask"][-1] = True
    alone = results(spec, {name: x[-1:] for name, x in inputs.items()}, backend)
    for i, (a, b) in enumerate(zip(results(spec, inputs, backend), alone, strict=True)):
        if a.dim() == 2:
            assert torch.equal(a[-1:], b) and not a[:-1].any(), f"result {i}"
        else:  # a sum in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
