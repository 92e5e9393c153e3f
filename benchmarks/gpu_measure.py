"""The process in which gpu_gate.py measures: checks and times the cases, and says how far it is.

It appends lines of JSON to the progress file, also before each step, so that whoever started it can
tell which contestant broke the process, or hangs, and start it again for the others.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_case import SPEC, Case, Draw
from gpu_cases import all_cases
from rlhf_kernels import build_info, token_logprob_and_grad
from rlhf_kernels.backend import why_not
from rlhf_kernels.opspec import Inputs, in_float64, map_tensors, outputs, total_bytes

CASE_SECONDS = 1.0  # of timed rounds
NEEDED = 12.0  # seconds that a case is expected to take, compilation included
SPIN = 1_000_000  # cycles that the device waits before a timed call: half a millisecond
ROWS = 96  # of the logits that the reference checks


class Cpu:
    """The machine of a dry run: everything but the figures is as on a GPU."""

    device, cache_bytes, rounds, spin = "cpu", 0, (2, 2), 0

    def synchronize(self) -> None:
        pass

    def time(self, call: Callable[[], Any]) -> tuple[float, bool]:
        """Seconds, and whether they are the device's alone."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, True

    def peak(self, call: Callable[[], Any]) -> int:
        """The most memory in bytes that the call holds above what was held before."""
        call()
        return 0

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call

    def facts(self) -> dict[str, Any]:
        return {"device": "cpu"}


class Gpu(Cpu):
    device, rounds = "cuda", (5, 50)

    def __init__(self) -> None:
        self.spin = SPIN
        self.properties = torch.cuda.get_device_properties(0)
        self.cache_bytes = self.properties.L2_cache_size

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def time(self, call: Callable[[], Any]) -> tuple[float, bool]:
        """Between events, behind a wait that lasts until the host has queued the whole call.

        Without it the time until the first launch would count. Where the host was late all the
        same, as it is where the call itself waits for the device, the next wait is longer.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.spin)
        start.record()
        call()
        end.record()
        late = start.query()
        if late:
            self.spin = min(2 * self.spin, 40 * SPIN)
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, not late

    def peak(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The replay of what ``call`` launches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def facts(self) -> dict[str, Any]:
        p = self.properties
        return {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
        }


class Contestant(NamedTuple):
    name: str
    function: Callable[..., Any]
    ours: bool
    inplace: bool = False
    # function(**inputs, upstream) -> (output, gradient), without autograd
    one_call: bool = False


class Set(NamedTuple):
    """The inputs of one call, and what its first output's gradient is weighted by."""

    inputs: Inputs
    upstream: Tensor | None


def versions() -> dict[str, Any]:
    triton = None
    if find_spec("triton"):
        import triton as module

        triton = module.__version__
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "build": build_info(),
    }


def ceilings(machine: Cpu, dry: bool) -> dict[str, Any]:
    """Bytes a second of a copy, reads and writes counted, and flops a second of a bf16 matmul."""
    draw = Draw(machine.device, dry, 0)
    size = 2**12 if dry else 2**30
    if isinstance(machine, Gpu):
        size = min(size, machine.properties.total_memory // 32)  # 4 GiB, twice, if that fits
    source = draw.normal(size)
    target = torch.empty_like(source)
    n = draw.size(8192)
    a, b = (draw.normal(n, n, dtype=torch.bfloat16) for _ in range(2))

    def median(call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        return statistics.median(machine.time(call)[0] for _ in range(2 if dry else 21))

    copy, matmul = median(lambda: target.copy_(source)), median(lambda: a @ b)
    moved = 2 * source.numel() * source.element_size()
    return {
        "copy_bytes": moved,
        "copy_bytes_per_second": moved / copy,
        "matmul_size": n,
        "matmul_flops_per_second": 2 * n**3 / matmul,
    }


def in_one_call(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(logits: Tensor, tokens: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        out = token_logprob_and_grad(logits, tokens, weight=upstream, backend=backend)
        return out.logprob, out.grad_logits

    return call


def contestants(case: Case, backends: Sequence[str], compiler: str) -> tuple[list[Contestant], Any]:
    """Ours, then the peers; and those that cannot run here with the reason."""
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    ours = case.ours or SPEC[case.op].function
    inplace = any(name.startswith("inplace") for name in case.options)
    for name, options in {**{x: {"backend": x} for x in backends}, **case.variants}.items():
        if options["backend"] not in backends:
            continue
        if reason := why_not(case.op, options["backend"]):
            missing[name] = reason
        else:
            function = functools.partial(ours, **case.options, **options)
            found.append(Contestant(name, function, True, inplace))
    for backend in backends if case.one_call else ():
        name = f"{backend}, in one call"
        if reason := why_not(case.one_call, backend):
            missing[name] = reason
        else:
            found.append(Contestant(name, in_one_call(backend), True, one_call=True))
    for name, plain in case.plain.items():
        if case.eager and not (case.compiled and name in case.compiled):
            found.append(Contestant(f"eager {name}", plain, False))
        if case.compiled is None or name in case.compiled:
            compiled = torch.compile(plain, dynamic=False, backend=compiler)
            found.append(Contestant(f"compile {name}", compiled, False))
    for name, package in case.packages.items():
        if reason := package.missing():
            missing[f"package {name}"] = reason
        else:
            found.append(Contestant(f"package {name}", package.function, False))
    return found, missing


def leaves_of(case: Case, x: Inputs, inplace: bool = False) -> dict[str, Tensor]:
    leaves = {name: x[name].detach().requires_grad_() for name in case.leaves}
    # In place: the logits are to be computed by autograd, and to be overwritten.
    return {name: leaf.clone() for name, leaf in leaves.items()} if inplace else leaves


def inputs_of(contestant: Contestant, data: Set) -> Inputs:
    """Of a call without gradients; in place: with logits that may be overwritten."""
    x = data.inputs
    return {**x, "logits": x["logits"].clone()} if contestant.inplace else x


def forward(case: Case, function: Callable[..., Any], x: Inputs) -> list[Tensor]:
    return outputs(case.output(function(**x)))


def gradients(out: Tensor, leaves: dict[str, Tensor], upstream: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(leaves.values()), upstream))


def results(case: Case, contestant: Contestant, data: Set) -> list[Tensor]:
    """Outputs and gradients of one call."""
    if contestant.one_call:
        return list(contestant.function(**data.inputs, upstream=data.upstream))
    if not case.leaves:
        with torch.no_grad():
            return forward(case, contestant.function, inputs_of(contestant, data))
    leaves = leaves_of(case, data.inputs, contestant.inplace)
    out = forward(case, contestant.function, {**data.inputs, **leaves})
    return [x.detach() for x in out] + gradients(out[0], leaves, data.upstream)


def compared(case: Case, contestant: Contestant, data: Set) -> tuple[list[Tensor], int]:
    """Outputs and parts of the gradients, and how many of them are outputs."""
    found = results(case, contestant, data)
    count = len(found) - len(case.leaves)
    return found[:count] + case.parts(data.inputs, found[count:]), count


def sample(
    machine: Cpu, case: Case, contestant: Contestant, sets: Sequence[Set]
) -> Callable[[int], tuple[float, bool]]:
    """Number of the input set -> a timed call."""

    def plain_call(data: Set) -> Any:
        return contestant.function(**data.inputs)

    def fused_call(data: Set) -> Any:
        return contestant.function(**data.inputs, upstream=data.upstream)

    @torch.no_grad()
    def all_sets() -> None:
        for data in sets:
            plain_call(data)

    def gradient(data: Set) -> tuple[float, bool]:
        leaves = leaves_of(case, data.inputs, contestant.inplace)
        x = {**data.inputs, **leaves}
        if case.mode == "both":
            return machine.time(
                lambda: gradients(forward(case, contestant.function, x)[0], leaves, data.upstream)
            )
        out = forward(case, contestant.function, x)[0]
        return machine.time(lambda: gradients(out, leaves, data.upstream))

    if case.mode == "graph":
        replay = machine.graph(all_sets)

        def timed_replay(number: int) -> tuple[float, bool]:
            seconds, sure = machine.time(replay)
            return seconds / len(sets), sure

        return timed_replay

    def timed(number: int) -> tuple[float, bool]:
        data = sets[number % len(sets)]
        if contestant.one_call:
            return machine.time(lambda: fused_call(data))
        if case.mode != "forward":
            return gradient(data)
        x = inputs_of(contestant, data)
        with torch.no_grad():
            return machine.time(lambda: contestant.function(**x))

    return timed


def peak(machine: Cpu, case: Case, contestant: Contestant, data: Set) -> int:
    """Of forward and backward together where gradients are taken, results included."""
    if not contestant.inplace:
        return machine.peak(lambda: results(case, contestant, data))
    # The logits stand for what a model returned: not counted.
    if not case.leaves:
        x = inputs_of(contestant, data)
        return machine.peak(lambda: contestant.function(**x))
    leaves = leaves_of(case, data.inputs, True)
    x = {**data.inputs, **leaves}
    return machine.peak(
        lambda: gradients(forward(case, contestant.function, x)[0], leaves, data.upstream)
    )


class Check:
    """The reference in float64 on one input set, and how far it is off in the input's dtype."""

    def __init__(self, case: Case, data: Set):
        spec = SPEC[case.op]
        reference = case.reference or (lambda **x: spec.function(**x, backend="reference"))
        options = {"with_entropy": True} if "with_entropy" in case.options else {}
        specification = Contestant("reference", lambda **x: reference(**x, **options), False)
        self.data, self.atol = data, spec.atol if case.atol is None else case.atol
        self.rows: Tensor | None = None
        if case.sampled:
            tokens = data.inputs["tokens"]
            rows = torch.linspace(0, len(tokens) - 1, min(len(tokens), ROWS))
            self.rows = rows.long().to(tokens.device)
            upstream = None if data.upstream is None else self._some(data.upstream)
            data = Set(map_tensors(data.inputs, self._some), upstream)
        upstream = None if data.upstream is None else data.upstream.double()
        exact = Set(in_float64(data.inputs), upstream)
        self.truth, self.outputs = compared(case, specification, exact)
        plain, _ = compared(case, specification, data)
        self.plain = [self.error(a, t) for a, t in zip(plain, self.truth, strict=True)]
        low = any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors_of(data.inputs))
        self.peers = 2e-2 if low else 1e-4

    def _some(self, x: Tensor) -> Tensor:
        return x[self.rows]

    @staticmethod
    def error(got: Tensor, truth: Tensor) -> float:
        worst = float((got.double() - truth).abs().max())
        return worst if math.isfinite(worst) else math.inf

    def __call__(self, case: Case, contestant: Contestant) -> float:
        """The largest error as a share of what is allowed; raises above 1.

        Ours: twice the error of the reference in the input's dtype and the operator's absolute
        term. Peers: near enough to be the same formula in the input's dtype.
        """
        floats = [x for x in tensors_of(self.data.inputs) if x.is_floating_point()]
        poison = [torch.full_like(x, torch.nan) for x in floats]
        del poison  # the results are likely to get this memory: what is not written shows up
        (got, _), worst = compared(case, contestant, self.data), 0.0
        if len(got) != len(self.truth):
            raise AssertionError(f"{len(got)} results, expected {len(self.truth)}")
        for i, (x, truth, plain) in enumerate(zip(got, self.truth, self.plain, strict=True)):
            if not bool(x.isfinite().all()):
                raise AssertionError(f"result {i} is not finite everywhere")
            error = self.error(x if self.rows is None else x[self.rows], truth)
            scale = float(truth.abs().max())
            allowed = max(self.peers * scale, 3 * plain)
            if contestant.ours:  # gradients of means are small: the absolute term shrinks with them
                allowed = 2 * plain + self.atol * (min(1.0, scale) if i >= self.outputs else 1.0)
            if not error <= allowed:
                raise AssertionError(f"result {i}: error {error:.3g}, allowed {allowed:.3g}")
            worst = max(worst, error / allowed if allowed else 0.0)
        return worst


def tensors_of(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.values() if isinstance(x, Tensor)]


def input_sets(machine: Cpu, case: Case, dry: bool) -> list[Set]:
    """Two or more, together more than four times the cache."""
    sets: list[Set] = []
    count = 2
    while len(sets) < count:
        draw = Draw(machine.device, dry, len(sets))
        inputs = case.inputs(draw)
        shape = inputs[case.upstream].shape if case.upstream else ()
        upstream = draw.normal(*shape) if case.upstream else torch.ones((), device=machine.device)
        sets.append(Set(inputs, upstream if case.leaves else None))
        count = max(2, min(512, math.ceil(4 * machine.cache_bytes / total_bytes(inputs))))
    return sets


def measure(
    machine: Cpu,
    case: Case,
    backends: Sequence[str],
    copy_rate: float,
    dry: bool,
    begin: Callable[[str], None],
    crashed: dict[str, str],
) -> dict[str, Any]:
    """Check every contestant, then time those that passed: a call of each per round."""
    begin("")
    out: dict[str, Any] = {"name": case.name, "op": case.op, "mode": case.mode}
    sets = input_sets(machine, case, dry)
    out |= {"least_bytes": case.least_bytes(sets[0].inputs), "input_sets": len(sets)}
    found, out["skipped"] = contestants(case, backends, "eager" if dry else "inductor")
    figures: dict[str, dict[str, Any]] = {}
    out |= {"contestants": figures, "failed": dict(crashed)}
    accumulator = case.accumulator(sets[0].inputs)
    check = Check(case, sets[0])
    samples: dict[str, Callable[[int], tuple[float, bool]]] = {}
    for contestant in found:
        if contestant.name in crashed:
            continue
        begin(contestant.name)
        try:
            error = check(case, contestant)
            returned = sum(x.nbytes for x in results(case, contestant, sets[1]))
            memory = peak(machine, case, contestant, sets[1])
            run = sample(machine, case, contestant, sets)
            run(0), run(1)
        except Exception as failure:  # is reported; the others are still measured
            out["failed"][contestant.name] = f"{type(failure).__name__}: {failure}"[:600]
        else:
            samples[contestant.name] = run
            figures[contestant.name] = {
                "ours": contestant.ours,
                "error_of_allowed": error,
                "peak_extra_bytes": memory,
                "returned_bytes": returned,
                "accumulator_bytes": accumulator if contestant.ours else 0,
            }
        machine.synchronize()  # raises where the failure broke the device: this process ends
        gc.collect()
        if isinstance(machine, Gpu):
            torch.cuda.empty_cache()
    begin("")
    timed = dict(figures)
    if case.bare:
        products, timed["bare"] = case.bare(sets[0].inputs), out.setdefault("bare", {})
        samples["bare"] = lambda i: machine.time(lambda: products(**sets[i % len(sets)].inputs))
        samples["bare"](0), samples["bare"](1)
    time_rounds(machine, samples, timed)
    for figure in figures.values():
        if case.bare:
            figure["over_bare"] = figure["ms"] / out["bare"]["ms"]
        seconds = figure["ms"] / 1e3
        figure["bytes_per_second"] = out["least_bytes"] / seconds
        figure["share_of_copy"] = figure["bytes_per_second"] / copy_rate
    peers = {name: f["ms"] for name, f in figures.items() if not f["ours"]}
    compiled = {name: ms for name, ms in peers.items() if name.startswith("compile ")}
    for key, group in (("best_peer", peers), ("best_compiled", compiled)):
        out[key] = min(group, key=group.__getitem__) if group else None
        for figure in figures.values():
            if figure["ours"] and group:
                figure[f"speedup_over_{key}"] = group[out[key]] / figure["ms"]
    return out


def time_rounds(
    machine: Cpu,
    samples: dict[str, Callable[[int], tuple[float, bool]]],
    figures: dict[str, dict[str, Any]],
) -> None:
    machine.spin = SPIN
    start = time.perf_counter()
    for run in samples.values():
        run(0)
    least, most = machine.rounds
    rounds = int(CASE_SECONDS / max(time.perf_counter() - start, 1e-9))
    rounds = max(least, min(most, rounds))
    taken: dict[str, list[tuple[float, bool]]] = {name: [] for name in samples}
    for number in range(rounds):
        for name, run in samples.items():
            taken[name].append(run(number))
    for name, times in taken.items():
        device_only = [seconds for seconds, sure in times if sure]
        host_bound = len(device_only) < max(1, rounds // 3)
        used = sorted([seconds for seconds, _ in times] if host_bound else device_only)
        figures[name] |= {
            "ms": 1e3 * statistics.median(used),
            "ms_least": 1e3 * used[0],
            "ms_most": 1e3 * used[-1],
            "rounds": len(used),
            "host_bound": host_bound,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.progress.read_text().splitlines()]
    known = {line["kind"]: line for line in lines}
    done = {line["name"] for line in lines if line["kind"] == "case"}
    crashes = [line for line in lines if line["kind"] == "crash"]

    def say(kind: str, **fields: Any) -> None:
        with args.progress.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def begin(case: str, contestant: str) -> None:
        say("begin", case=case, contestant=contestant)

    machine = Cpu() if args.dry_run else Gpu()
    backends = ("reference", "cpu") if args.dry_run else ("triton", "cuda")
    cases = [case for case in all_cases(args.dry_run) if args.only in case.name]
    if "plan" not in known:
        say("plan", cases=[case.name for case in cases])
        say("machine", **machine.facts(), **versions())
    if "ceilings" not in known:
        known["ceilings"] = ceilings(machine, args.dry_run)
        say("ceilings", **known["ceilings"])
    copy_rate = known["ceilings"]["copy_bytes_per_second"]
    for case in cases:
        if case.name in done:
            continue
        if not args.dry_run and time.time() + NEEDED > args.deadline:
            break  # the rest is listed as skipped
        crashed = {x["contestant"]: x["reason"] for x in crashes if x["case"] == case.name}
        try:
            if "" in crashed:
                raise RuntimeError(crashed[""])
            result = measure(
                machine,
                case,
                backends,
                copy_rate,
                args.dry_run,
                functools.partial(begin, case.name),
                crashed,
            )
        except Exception as failure:  # is reported; the other cases are still measured
            reason = f"{type(failure).__name__}: {failure}"[:600]
            result = {"name": case.name, "op": case.op, "failed": {"": reason}}
            machine.synchronize()
        say("case", **result)
        torch.compiler.reset()
        gc.collect()
        if not args.dry_run:
            torch.cuda.empty_cache()
    say("done")


if __name__ == "__main__":
    main()
