"""Metrics, and the kernel clock: the share of a step that each rlhf_kernels op takes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_trainer.checkpoint import write_text

OnStep = Callable[[dict[str, Any]], None]
METRICS, CURVES, KERNELS = "metrics.jsonl", "curves.png", "kernels.json"
OURS = "rlhf_kernels::"


class MetricsLog:
    """One JSON line a step, flushed, and the same lines in memory.

    A resumed run begins with the lines of its checkpoint, `history`; what the interrupted run wrote
    after it is run again.
    """

    def __init__(
        self, folder: Path, stage: str, history: list[dict[str, Any]], on_step: OnStep | None
    ) -> None:
        path = folder / METRICS
        self.stage = stage
        self.on_step = on_step
        self.history = history
        write_text(path, "".join(json.dumps(row) + "\n" for row in history))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> dict[str, Any]:
        """Write one line; values that are not finite become null."""
        row = {"stage": self.stage, "step": step}
        for key, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[key] = value if finite else None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.history.append(row)
        if self.on_step is not None:
            self.on_step(row)
        return row

    def close(self) -> None:
        self._file.close()


class KernelClock:
    """Profiles a few steps and sums the time of the rlhf_kernels ops in them.

    Steps 2, 4, 8, ... of this process are sampled: the first one pays for warm-up, and the others
    should be spread over a run. Inside a step only the part under `kernels()` runs under the
    profiler, which costs time for every op that it sees: generation, which calls no op of the
    library, stays outside.
    """

    def __init__(self, steps: int, backends: Sequence[str], device: torch.device) -> None:
        # The profiler's library logs each start and stop to stderr; levels up to 5 let that
        # through.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self.left = steps
        self.backends = backends
        self.device = device
        self.seen = 0
        self.sampling = False
        self.walls: list[float] = []
        self.totals: dict[str, float] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a whole step."""
        self.seen += 1
        power_of_two = self.seen & (self.seen - 1) == 0
        self.sampling = self.left > 0 and self.seen > 1 and power_of_two
        if not self.sampling:
            yield
            return
        self.left -= 1
        self._synchronize()
        begin = time.perf_counter()
        self.overhead = 0.0
        yield
        self._synchronize()
        self.walls.append(time.perf_counter() - begin - self.overhead)
        self.sampling = False

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Around the part of a step that calls rlhf_kernels."""
        if not self.sampling:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        begin = time.perf_counter()
        with profile(activities=activities) as profiler:
            self.overhead += time.perf_counter() - begin
            yield
            self._synchronize()
            begin = time.perf_counter()
        for name, milliseconds in self._op_times(profiler):
            self.totals[name] = self.totals.get(name, 0.0) + milliseconds
        self.overhead += time.perf_counter() - begin

    def report(self) -> dict[str, Any]:
        """{"backend", "steps", "step_ms", "share", "ops": {op: {"ms_per_step", "share"}}}, and a
        "note" without ops. The backend is the one that ran; of several, their names with commas.

        Shares are of the sampled steps' wall time; on CUDA ms_per_step is the time on the device.
        """
        steps = len(self.walls)
        wall = 1000 * sum(self.walls)
        ops = {
            name: {"ms_per_step": total / steps, "share": total / wall}
            for name, total in sorted(self.totals.items(), key=lambda item: -item[1])
        }
        result: dict[str, Any] = {
            "backend": ", ".join(self.backends),
            "steps": steps,
            "step_ms": wall / steps if steps else None,
            "share": sum(op["share"] for op in ops.values()),
            "ops": ops,
        }
        if not steps:
            result["note"] = "no step was sampled"
        elif not ops:
            result["note"] = (
                "the reference backend is plain PyTorch: it has no rlhf_kernels ops to time"
            )
        return result

    def _op_times(self, profiler: profile) -> Iterator[tuple[str, float]]:
        """Name and milliseconds of every op call seen, on the device that the run is on. The time
        of a call inside another one is taken off the outer one."""
        if self.device.type == "cuda":
            for event in profiler.events() or ():
                if event.name.startswith(OURS):
                    milliseconds, parent = event.device_time_total / 1e3, event.cpu_parent
                    while parent is not None and not parent.name.startswith(OURS):
                        parent = parent.cpu_parent
                    if parent is not None:
                        yield parent.name, -milliseconds
                    yield event.name, milliseconds
            return
        # The raw events: profiler.events() builds a tree of all ops first, which takes seconds.
        raw = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        calls = [call for call in raw if call.name().startswith(OURS)]
        open_calls: dict[int, list[tuple[int, str]]] = {}  # ends and names, by thread
        for call in sorted(calls, key=lambda call: (call.start_ns(), -call.duration_ns())):
            around = open_calls.setdefault(call.start_thread_id(), [])
            while around and around[-1][0] <= call.start_ns():
                around.pop()
            milliseconds = call.duration_ns() / 1e6
            if around:
                yield around[-1][1], -milliseconds
            yield call.name(), milliseconds
            around.append((call.start_ns() + call.duration_ns(), call.name()))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
