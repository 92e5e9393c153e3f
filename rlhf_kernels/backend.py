"""The single rule that chooses which implementation of an operator runs.

Order: the argument ``backend=``, then the environment variable ``RLHF_KERNELS_BACKEND``, then
automatic (CPU tensor: ``cpu`` if built, else ``reference``; CUDA tensor: the kernel recorded as the
fastest, else ``reference``). An explicit request that cannot run raises and says why.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
_FOLDER = Path(__file__).parent
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def _load_library(name: str) -> str | None:
    """Load ``lib<name>`` so that its kernels register themselves; the reason if that fails."""
    path = _FOLDER / f"lib{name}{_SUFFIX}"
    if not path.exists():
        return (
            f"{path.name} is not built (run `make venv`, or `pip install --no-build-isolation .`)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _load_module() -> types.ModuleType | str:
    """The pybind11 module ``_C``, or the reason why it is missing (the kernels work without it)."""
    try:
        return importlib.import_module("rlhf_kernels._C")
    except ImportError as error:
        return str(error)


# torch.ops entries are found through a name, so nothing below holds a handle of the libraries.
_library_problem = {
    "cpu": _load_library("rlhf_kernels_cpu"),
    "triton": "this release has no Triton kernels",
    "cuda": "this release has no CUDA kernels",
}
_module = _load_module()


def build_info() -> dict[str, Any]:
    """How the extension was built and which SIMD level runs; ``{"error": why}`` without it."""
    return {"error": _module} if isinstance(_module, str) else _module.build_info()


def why_not(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run operator ``op`` on this machine; None when it can.

    Args:
        op: name of a public function, e.g. ``"token_logprob"``.
        backend: one of ``reference``, ``cpu``, ``triton``, ``cuda``.
    """
    return None if backend == "reference" else _reasons[op, backend]


# backend -> its torch operators as attributes: overloads, as a packet resolves its name per call.
operators = {name: types.SimpleNamespace() for name in BACKENDS[1:]}
# (op, backend) -> why it cannot run. Filled once by define(): torch.compile traces plain look-ups.
_reasons: dict[tuple[str, str], str | None] = {}
_warned: set[str] = set()


def define(op: str, schemas: dict[str, tuple[str, Callable[..., Any]]]) -> None:
    """Define the torch operators behind the public function ``op``.

    Args:
        op: name of the public function.
        schemas: torch operator name -> (schema without the name, fake implementation). The compiled
            libraries add implementations under these names, so the operators exist without them.
    """
    for name, (schema, fake) in schemas.items():
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        torch.library.define(f"rlhf_kernels::{name}", schema, tags=tags)
        torch.library.register_fake(f"rlhf_kernels::{name}", fake)
        overload = getattr(torch.ops.rlhf_kernels, name).default
        setattr(operators["cpu"], name, overload)
        setattr(operators["cuda"], name, overload)
    for backend, key in (("cpu", "CPU"), ("triton", "CUDA"), ("cuda", "CUDA")):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        missing = [name for name in schemas if not has(f"rlhf_kernels::{name}", key)]
        reason = f"no {key} kernel is registered for {', '.join(missing)}" if missing else None
        _reasons[op, backend] = _library_problem[backend] or reason


def select(op: str, device_type: str, backend: str | None = None) -> str:
    """The backend that runs ``op`` on tensors of ``device_type`` (module docstring: the order).

    Raises:
        ValueError: unknown backend, or a backend for another device.
        RuntimeError: the backend was asked for and cannot run here; the message says why.
    """
    asked = backend or os.environ.get("RLHF_KERNELS_BACKEND") or None
    if asked is None:
        return _automatic(op, device_type)
    source = "backend" if backend else "RLHF_KERNELS_BACKEND"
    if asked not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {asked!r}")
    if reason := why_not(op, asked):
        raise RuntimeError(f"{source}: {asked!r} cannot run {op}: {reason}")
    needs = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}.get(asked, device_type)
    if needs != device_type:
        raise ValueError(f"{source}: {asked!r} needs {needs} tensors, got {device_type} tensors")
    return asked


def _automatic(op: str, device_type: str) -> str:
    reason = why_not(op, "cpu") if device_type == "cpu" else f"no {device_type} kernels"
    if reason is None:
        return "cpu"
    if op not in _warned and not torch.compiler.is_compiling():
        _warned.add(op)
        text = f"{op} runs on the plain PyTorch reference for {device_type} tensors: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return "reference"
