"""One benchmark: ours and its peers, interleaved round by round in one run, checked before timed.

pytest-benchmark times ours; the peers run in its set-up step, so every round holds one call of
each contestant on the same inputs, and a change of clock or a busy neighbour hits all of them.
Inputs rotate so that no cache flatters. The report (conftest.py) prints medians, the speed-up over
the best peer, and the share of the read bandwidth measured at the start of the same run.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_kernels.opspec import Maker, OpSpec, outputs

ROUNDS = 31
WARMUP = 4
SLOW = 120.0  # seconds: a peer in 16 bits on a CPU without products of 16 bits takes minutes a call

Call = Callable[[Any], Any]


@functools.cache
def read_bandwidth() -> float:
    """Bytes a second that all threads together read: the best of 15 sums over 512 MiB."""
    x = torch.ones(128 * 2**20)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.numel() * x.element_size() / min(times)


def compare(
    benchmark: Any,
    ours: Call,
    peers: dict[str, Call],
    inputs: Sequence[Any],
    *,
    least_bytes: int,
    tolerance: float,
    floor: Call | None = None,
    prepare: Callable[[Any], Any] = lambda x: x,
    rounds: int = ROUNDS,
) -> None:
    """Check ``ours`` against every peer, then time all of them, a call of each per round.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: called with one element of ``inputs``; returns a tensor or a tuple of tensors.
        peers: name -> the same, as the frameworks do it.
        inputs: several, used in turn.
        least_bytes: the traffic that cannot be avoided: what the bandwidth share is a share of.
        floor: work that cannot be avoided (bare matrix products), timed beside the others.
        tolerance: largest difference to a peer, relative to the peer's largest value.
        prepare: run before each timed call, untimed (restores what an in-place call overwrote).
        rounds: timed calls of each contestant; one where a call of each takes longer than SLOW.
    """
    for name, peer in peers.items():
        expected, got = peer(prepare(inputs[0])), ours(prepare(inputs[0]))
        for a, b in zip(outputs(expected), outputs(got), strict=True):
            error = (a.double() - b.double()).abs().max()
            scale = a.double().abs().max().clamp(min=1e-12)
            assert error <= tolerance * scale, f"differs from {name} by {error / scale:.2g}"

    order = itertools.cycle(inputs)
    others = peers if floor is None else {**peers, "floor": floor}
    times: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(WARMUP):
        begin = time.perf_counter()
        for call in (*others.values(), ours):
            call(prepare(next(order)))
        if time.perf_counter() - begin > SLOW:
            rounds = 1
            break

    def peers_first():
        x = next(order)
        for name, peer in others.items():
            y = prepare(x)
            start = time.perf_counter()
            peer(y)
            times[name].append(time.perf_counter() - start)
        return (prepare(x),), {}

    benchmark.pedantic(ours, setup=peers_first, rounds=rounds, iterations=1)
    medians = {name: statistics.median(t) for name, t in times.items()}
    bare = medians.pop("floor", None)
    best = min(medians, key=medians.__getitem__)
    own = benchmark.stats.stats.median
    if bare is not None:
        benchmark.extra_info.update(floor_ms=1e3 * bare, over_floor=own / bare)
    benchmark.extra_info.update(
        peers_ms={name: 1e3 * t for name, t in medians.items()},
        best_peer=best,
        speedup=medians[best] / own,
        least_bytes=least_bytes,
        read_bandwidth=read_bandwidth(),
        share_of_read_bandwidth=least_bytes / own / read_bandwidth(),
        threads=torch.get_num_threads(),
    )


def eager_and_compiled(**functions: Call) -> dict[str, Call]:
    """Each function as it is and under torch.compile (compiled during the check)."""
    out: dict[str, Call] = {}
    for name, function in functions.items():
        out[f"eager {name}"] = function
        out[f"compile {name}"] = torch.compile(function, dynamic=False)
    return out


def with_gradient(function: Callable[..., torch.Tensor], *names: str) -> Call:
    """A call that runs ``function(**inputs)`` and takes its gradient for the named inputs."""

    def call(inputs: dict[str, Any]) -> Any:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        out = function(**{**inputs, **leaves})
        scalar = out if out.dim() == 0 else out.sum()
        return (scalar.detach(), *torch.autograd.grad(scalar, list(leaves.values())))

    return call


def bench_inputs(spec: OpSpec, count: int = 8, case: int = 0) -> list[dict[str, Any]]:
    """The operator's benchmark case number ``case`` under ``count`` seeds, float32 on the CPU."""
    makers = (Maker("cpu", torch.float32, seed) for seed in range(count))
    return [list(spec.bench(maker))[case].inputs for maker in makers]
