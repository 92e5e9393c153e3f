"""``python -m rlhf_kernels``: what runs on this machine, why the rest does not, and a self-check.

The self-check runs every operator on every backend that is available, on its float32 samples,
forward and gradient, against the reference in float64, in seconds. Exit status 1: an error is above
twice that of the plain formula (the reference in float32) plus the operator's absolute term; or a
library is built and does not load. It also calls the adapters of the libraries that are installed
beside this one, which it imports.

``python -m rlhf_kernels integrations``: what the adapters would replace in the trainers that are
installed beside this package, and what they leave alone and why. It imports these trainers.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels import __version__, build_info
from rlhf_kernels.backend import BACKENDS, LOADED, faulty, why_not
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, in_float64, outputs
from rlhf_kernels.specs import SPECS

ADAPTERS = ("trl", "verl", "openrlhf")
DEVICE = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def versions() -> list[tuple[str, str]]:
    """Name and value of everything that a bug report should say."""
    lines = [("rlhf_kernels", __version__), ("python", platform.python_version())]
    lines.append(("torch", torch.__version__))
    if importlib.util.find_spec("triton"):
        lines.append(("triton", importlib.import_module("triton").__version__))
    lines.append(("processor", f"{_processor()}, {torch.get_num_threads()} threads"))
    for index in range(torch.cuda.device_count()):
        lines.append((f"cuda:{index}", torch.cuda.get_device_name(index)))
    lines += [(f"build {name}", str(value) or "none") for name, value in build_info().items()]
    names = ("RLHF_KERNELS_BACKEND", "RLHF_KERNELS_SIMD")
    return lines + [(name, os.environ[name]) for name in names if name in os.environ]


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def availability() -> list[str]:
    """Operator x backend: "yes", or "no" or "loaded" with the number of the reason below."""
    notes: list[str] = []
    rows = [["operator", *BACKENDS]]
    for spec in SPECS:
        cells = [spec.name]
        for reason in (why_not(spec.name, backend) for backend in BACKENDS):
            word = "loaded" if reason == LOADED else "no"
            cells.append(_noted(word, reason, notes) if reason else "yes")
        rows.append(cells)
    return _columns(rows) + _numbered(notes)


def self_check() -> tuple[list[str], bool]:
    """Operator x backend: the largest error; and whether all are as small as they must be."""
    notes: list[str] = []
    backends = [b for b in BACKENDS if any(why_not(spec.name, b) is None for spec in SPECS)]
    rows = [["operator", *backends]]
    for spec in SPECS:
        cells = [spec.name]
        for backend in backends:
            if why_not(spec.name, backend):
                cells.append("-")
                continue
            worst, failure = _check(spec, backend)
            cells.append(_noted("FAILED", failure, notes) if failure else f"ok {worst:.1e}")
        rows.append(cells)
    return _columns(rows) + _numbered(notes), not notes


def _check(spec: OpSpec, backend: str) -> tuple[float, str]:
    """The largest error over the samples, and what went wrong, if anything."""
    worst = 0.0
    for sample in spec.samples(Maker(DEVICE[backend])):
        case = f"{spec.name}, {backend}, {sample.why!r}"
        try:
            got = _run(spec, sample.inputs, backend)
            plain = _run(spec, sample.inputs, "reference")
            truth = _run(spec, in_float64(sample.inputs), "reference")
        except Exception as failure:  # is reported; the other operators are still checked
            return worst, f"{case}: {type(failure).__name__}: {failure}"
        for i, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
            error, plain_error = _error(a, t), _error(b, t)
            allowed = spec.atol + (2 * plain_error if math.isfinite(plain_error) else 0.0)
            worst = max(worst, error)
            if not error <= allowed:
                return worst, f"{case}, result {i}: error {error:.2e}, allowed {allowed:.2e}"
    return worst, ""


def _run(spec: OpSpec, inputs: Inputs, backend: str) -> list[Tensor]:
    """Outputs of one call, then the gradients of the first output, weighted unevenly."""
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in spec.leaves(inputs)}
    found = outputs(spec.function(**{**inputs, **leaves}, backend=backend))
    first, results = found[0], [out.detach() for out in found]
    if not first.requires_grad:
        return results
    weight = torch.linspace(-1, 2, first.numel()).to(first).reshape(first.shape)
    wanted = list(leaves.values())
    return results + list(
        torch.autograd.grad(first, wanted, weight, allow_unused=True, materialize_grads=True)
    )


def _error(got: Tensor, truth: Tensor) -> float:
    """Largest difference; infinite where NaN or infinities stand in different places."""
    rounded = truth.to(got.dtype)  # what is too large for float32 is infinite there
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    error = torch.where(same, 0.0, torch.inf)
    error = torch.where(got.isfinite() & rounded.isfinite(), (got - truth.double()).abs(), error)
    return float(error.max()) if error.numel() else 0.0


def _noted(text: str, note: str, notes: list[str]) -> str:
    if note not in notes:
        notes.append(note)
    return f"{text} [{notes.index(note) + 1}]"


def _numbered(notes: Sequence[str]) -> list[str]:
    return [f"  [{number}] {note}" for number, note in enumerate(notes, 1)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [f"  {line}".rstrip() for line in lines]


def check_adapters() -> tuple[list[str], bool]:
    """Library x what its adapter finds there; and whether none of them is broken."""
    rows, good = [], True
    for name in ("transformers", *ADAPTERS):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # nothing, or a mere folder of that name
            rows.append([name, "not installed"])
            continue
        try:
            said = importlib.import_module(f"rlhf_kernels.integrations.{name}").check()
        except Exception as error:  # is reported; the other adapters are still checked
            said, good = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}", False
        rows.append([name, said])
    return _columns(rows), good


def integrations() -> int:
    for name in ADAPTERS:
        adapter = importlib.import_module(f"rlhf_kernels.integrations.{name}")
        print(adapter.survey(), "", sep="\n")
    return 0


def main(arguments: Sequence[str] = ()) -> int:
    if list(arguments) == ["integrations"]:
        return integrations()
    if arguments:
        print(f"expected nothing, or integrations, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    print(*_columns(versions()), "", sep="\n")
    print("Which backend runs which operator:", *availability(), "", sep="\n")
    lines, good = self_check()
    if faulty:  # what is not there cannot be checked, and is no success
        lines, good = [*lines, *faulty], False
    print("Self-check, largest error against float64 (float32, forward and gradient):")
    print(*lines, "", sep="\n")
    lines, sound = check_adapters()
    print("Adapters, in the libraries that are installed beside this one:", *lines, "", sep="\n")
    print("all checks passed" if good and sound else "a check FAILED")
    return 0 if good and sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
