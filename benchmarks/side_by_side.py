"""A host trainer's functions and steps with and without our kernels: time and peak memory.

The two are compared first, then timed in turn: in bfloat16 ours may not be farther from the host's
float32 than the host itself is by more than a quarter, where that is more than 1 % (under autocast
than 1 % from the host's own). Memory is the
most that the allocator held beyond what stood before, in a run of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlhf_kernels.__main__ import versions

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
Call = Callable[[], Sequence[Tensor]]


class SideBySide:
    """The rows of one host.

    Args:
        host: the name of its distribution.
        patched: the context in which its functions are ours.
    """

    def __init__(self, host: str, patched: Callable[[], AbstractContextManager[Any]]):
        self.host = host
        self.contexts: dict[str, Callable[[], AbstractContextManager[Any]]]
        self.contexts = {"host": nullcontext, "ours": patched}
        self.rows: list[dict[str, Any]] = []
        self.exact: dict[str, Sequence[Tensor]] = {}  # the host's results in float32

    def measure(self, name: str, dtype: torch.dtype, call: Call, ours: Call | None = None) -> None:
        """``call`` returns tensors to compare, and looks the host's functions up when it runs;
        ``ours`` is what stands for it where the host has nothing to replace. A median of five, of
        three where one takes seconds, of one where it takes a minute."""
        calls = {"host": call, "ours": ours or call}
        begin = time.perf_counter()
        expected = call()
        took = time.perf_counter() - begin
        rounds = 5 if took < 2 else 3 if took < 60 else 1
        with self.contexts["ours"]():
            got = calls["ours"]()
        if dtype == torch.float32:
            self.exact[name] = expected
        for e, g, exact in zip(expected, got, self.exact.get(name, expected), strict=True):
            off, bound = distance(g, exact), max(TOLERANCE[dtype], 1.25 * distance(e, exact))
            if not off <= bound:
                raise AssertionError(f"{name}, {dtype}: ours is off by {off:.2g}, over {bound:.2g}")
        del expected, got
        times: dict[str, list[float]] = {who: [] for who in calls}
        for _ in range(rounds):
            for who, context in self.contexts.items():
                with context():
                    begin = time.perf_counter()
                    calls[who]()
                    times[who].append(1e3 * (time.perf_counter() - begin))
        row: dict[str, Any] = {"name": name, "dtype": str(dtype).removeprefix("torch.")}
        for who, context in self.contexts.items():
            row[f"{who}_ms"] = round(statistics.median(times[who]), 3)
            with context():
                row[f"{who}_mib"] = round(peak(calls[who]) / 2**20, 1)
        if not self.rows:
            print(f"{'':<58}{self.host:>10}{'ours':>10}   {self.host:>10}{'ours':>10}")
        self.rows.append(row)
        print(
            f"{name:<48}{row['dtype']:<10}{row['host_ms']:>10.2f}{row['ours_ms']:>10.2f} ms"
            f"{row['host_mib']:>10.1f}{row['ours_mib']:>10.1f} MiB",
            flush=True,
        )

    def write(self, path: Path) -> None:
        root = Path(__file__).parents[1]
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True
        )
        record = dict(versions())
        for name in (self.host, "transformers"):
            record[name] = importlib.metadata.version(name)
        record["commit"] = commit.stdout.strip()
        path.write_text(json.dumps({**record, "results": self.rows}, indent=1) + "\n")


def distance(a: Tensor, b: Tensor) -> float:
    """In the norm, relative to that of ``b``; of choices the part that differs."""
    if not b.is_floating_point():
        return float((a != b).double().mean())
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def peak(call: Call) -> int:
    """Bytes that the allocator held at most, beyond the start, to which it has to come back."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports that it starts and stops
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = cast(Any, profiler.profiler).kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = list(accumulate((size for _, size in sorted(changes, key=itemgetter(0))), initial=0))
    if abs(held[-1]) > 2**20:  # gradients of an earlier call, say: a peak would be too low
        raise ValueError(f"call: expected what leaves nothing behind, got {held[-1]} bytes more")
    return max(held)


def with_gradient(
    function: Callable[..., Any], *tensors: Tensor, fraction: float = 1.0
) -> Callable[[], list[Tensor]]:
    """The results, and the gradients of the sum over the first ``fraction`` of each."""

    def call() -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors]
        outputs = tensors_of(function(*inputs))
        ends = [int(x.numel() * fraction) for x in outputs]
        sums = [x.flatten()[:n].float().sum() for x, n in zip(outputs, ends, strict=True)]
        loss = torch.stack([x for x in sums if x.requires_grad]).sum()
        return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, inputs)]

    return call


def tensors_of(out: Any) -> list[Tensor]:
    """One tensor, or what is there of several."""
    outputs = out if isinstance(out, tuple) else (out,)
    return [x for x in outputs if x is not None]


def tiny_llama(vocab: int, width: int, dtype: torch.dtype) -> Any:
    """A body of one layer, so that a step is its head and its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes))
    return model.to(dtype)


def options(description: str | None) -> argparse.Namespace:
    """``out`` and ``dtypes`` of the command line."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--no-bfloat16",
        dest="dtypes",
        action="store_const",
        const=[torch.float32],
        default=[torch.float32, torch.bfloat16],
        help="leave out bfloat16, of which CPUs without instructions for it take minutes a call",
    )
    return parser.parse_args()
