"""The single rule that chooses which implementation of an operator runs.

Order: the argument ``backend=``, then the environment variable ``RLHF_KERNELS_BACKEND``, then
automatic (CPU tensor: ``cpu`` if built, else ``reference``; CUDA tensor: the kernel recorded as the
fastest, else ``reference``). An explicit request that cannot run raises and says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
_FOLDER = Path(__file__).parent
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
faulty: list[str] = []  # which libraries are built and do not load here, and why


def _load_library(name: str) -> str | None:
    """Load ``lib<name>`` so that its kernels register themselves; the reason if that fails.

    One that is built and does not load is a fault of the installation, and warned of at once.
    """
    path = _FOLDER / f"lib{name}{_SUFFIX}"
    if not path.exists():
        return (
            f"{path.name} is not built (run `make venv`, or `pip install --no-build-isolation .`)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause: BaseException = error  # torch says which file; what it was raised from says why
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{path.name} does not load: {cause}"
        warnings.warn(f"{reason}; its kernels are left out", RuntimeWarning, stacklevel=2)
        faulty.append(reason)
        return reason
    return None


def _load_module() -> types.ModuleType | str:
    """The pybind11 module ``_C``, or the reason why it is missing (the kernels work without it)."""
    try:
        return importlib.import_module("rlhf_kernels._C")
    except ImportError as error:
        return str(error)


# Under Triton's interpreter the triton backend runs on CPU tensors too (to be tested there).
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not INTERPRETING and not torch.cuda.is_available():
        return "there is no GPU, and TRITON_INTERPRET is not 1"
    return None


def _cuda_problem() -> str | None:
    if torch.version.cuda is None:  # the library links what only a torch with CUDA defines
        return f"torch {torch.__version__} is built without CUDA"
    return _load_library("rlhf_kernels_cuda")


# torch.ops entries are found through a name, so nothing below holds a handle of the libraries.
_library_problem = {
    "cpu": _load_library("rlhf_kernels_cpu"),
    "triton": _triton_problem(),
    "cuda": _cuda_problem(),
}
# A torch with CUDA on a machine without a GPU is common: a laptop, a login node, CI.
LOADED = "the kernels are built and loaded, but there is no GPU to run them"
_device_problem = {"cpu": None, "cuda": None if torch.cuda.is_available() else LOADED}
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
    return None if backend == "reference" else _reasons[_rows_of.get(op, op), backend]


# backend -> its torch operators as attributes: overloads, as a packet resolves its name per call.
operators = {name: types.SimpleNamespace() for name in BACKENDS[1:]}
# (op, backend) -> why it cannot run. Filled once by define(): torch.compile traces plain look-ups.
_reasons: dict[tuple[str, str], str | None] = {}
_rows_of: dict[str, str] = {}  # op -> the operator whose kernels it runs on
_warned: set[str] = set()
_triton_modules: dict[str, str] = {}  # torch operator name -> module


_NUMBERS = "_of_numbers"  # ends the name of an operator whose numbers are in a tensor
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(op: str, schemas: dict[str, tuple[str, Callable[..., Any]]]) -> None:
    """Define the torch operators behind the public function ``op``.

    ``rlhf_kernels::name`` is what the compiled libraries implement, for the keys CPU and CUDA;
    ``rlhf_kernels_triton::name`` is the function ``name`` of ``rlhf_kernels/<op>_triton.py``.

    Args:
        op: name of the public function.
        schemas: torch operator name -> (schema without the name, fake implementation). The
            operators exist without any implementation.
    """
    for name, (schema, fake) in schemas.items():
        torch.library.define(f"rlhf_kernels::{name}", schema, tags=_TAGS)
        torch.library.register_fake(f"rlhf_kernels::{name}", fake)
        compiled = getattr(torch.ops.rlhf_kernels, name).default
        setattr(operators["cpu"], name, compiled)
        setattr(operators["cuda"], name, compiled)
        _define_of_numbers("rlhf_kernels", name, schema, fake, ("cpu", "cuda"))
    define_triton(op, schemas)
    for backend, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        missing = [name for name in schemas if not has(f"rlhf_kernels::{name}", key)]
        reason = f"no {key} kernel is registered for {', '.join(missing)}" if missing else None
        _reasons[op, backend] = _library_problem[backend] or reason or _device_problem[backend]
    file = f"{op}_triton.py"
    missing_file = None if (_FOLDER / file).exists() else f"there is no {file}"
    _reasons[op, "triton"] = _library_problem["triton"] or missing_file


def define_triton(op: str, schemas: dict[str, tuple[str, Callable[..., Any]]]) -> None:
    """The Triton side of ``define``; alone, for torch operators that no compiled library has."""
    for name, (schema, fake) in schemas.items():
        _triton_modules[name] = f"rlhf_kernels.{op}_triton"
        torch.library.define(f"rlhf_kernels_triton::{name}", schema, tags=_TAGS)
        torch.library.register_fake(f"rlhf_kernels_triton::{name}", fake)
        if _library_problem["triton"] is None:
            keys = ("CPU", "CUDA") if INTERPRETING else "CUDA"
            function = functools.partial(launch_triton, name)
            torch.library.impl(f"rlhf_kernels_triton::{name}", keys, function)
        setattr(operators["triton"], name, getattr(torch.ops.rlhf_kernels_triton, name).default)
        _define_of_numbers("rlhf_kernels_triton", name, schema, fake, ("triton",))


def _define_of_numbers(
    namespace: str, name: str, schema: str, fake: Callable[..., Any], backends: tuple[str, ...]
) -> None:
    """The operator once more, with a float64 tensor behind its arguments: its ``float`` ones.

    torch.compile makes a constant of a ``float`` argument, and a graph of its own for each value.
    """
    arguments, results = schema[1:].split(") -> ")
    at = [i for i, x in enumerate(arguments.split(", ")) if x.startswith("float ")]
    if not at or name.endswith("_"):
        return
    plain = getattr(getattr(torch.ops, namespace), name).default

    def of_numbers(*args: Any) -> Any:
        *given, numbers = args
        for i, x in zip(at, numbers.tolist(), strict=True):
            given[i] = x
        return plain(*given)

    full = f"{namespace}::{name}{_NUMBERS}"
    torch.library.define(full, f"({arguments}, Tensor numbers) -> {results}", tags=_TAGS)
    torch.library.register_fake(full, lambda *args: fake(*args[:-1]))
    torch.library.impl(full, ("CPU", "CUDA"), of_numbers)
    for backend in backends:
        overload = getattr(getattr(torch.ops, namespace), name + _NUMBERS).default
        setattr(operators[backend], name + _NUMBERS, overload)


def call(backend: str, name: str, numbers: torch.Tensor | None, *args: Any) -> Any:
    """Call a torch operator of ``backend``; ``numbers``, if any, are its float arguments."""
    if numbers is None:
        return getattr(operators[backend], name)(*args)
    return getattr(operators[backend], name + _NUMBERS)(*args, numbers)


def define_composed(
    op: str, rows: str, schemas: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]]
) -> None:
    """Define torch operators made of matrix products and the kernels of another operator.

    Args:
        op: name of the public function.
        rows: the operator whose kernels run inside, on whatever backend it has.
        schemas: torch operator name -> (schema without the name, implementation, fake).
    """
    for name, (schema, function, fake) in schemas.items():
        torch.library.define(f"rlhf_kernels::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"rlhf_kernels::{name}", fake)
        torch.library.impl(f"rlhf_kernels::{name}", ("CPU", "CUDA"), function)
        backends = ("cpu", "triton", "cuda")
        for backend in backends:
            setattr(operators[backend], name, getattr(torch.ops.rlhf_kernels, name).default)
        _define_of_numbers("rlhf_kernels", name, schema, fake, backends)
    follow(op, rows)


def follow(op: str, rows: str) -> None:
    """``op`` runs wherever the kernels of ``rows`` do."""
    _rows_of[op] = rows


def launch_triton(name: str, *args: Any) -> Any:
    """The Triton side of the torch operator ``name``; it, and Triton, are imported on first use."""
    launcher = getattr(importlib.import_module(_triton_modules[name]), name)
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    if device.type == "cpu":
        return launcher(*args)
    with torch.cuda.device(device):
        return launcher(*args)


class Fastest(NamedTuple):
    """A measurement that lets another backend than Triton serve CUDA tensors."""

    op: str  # public function; token_logprob's row serves whatever runs on its kernels
    dtype: torch.dtype
    size: int  # from this V (gae: T) on, up to the next row's
    backend: str
    result: str  # file under benchmarks/results


# By op, dtype and size. What is not here is served by Triton: no GPU run has been recorded yet.
FASTEST: tuple[Fastest, ...] = ()


def requested(backend: str | None) -> str | None:
    """The backend that the caller or the environment insists on; None: it is chosen."""
    return backend or os.environ.get("RLHF_KERNELS_BACKEND") or None


def select(
    op: str,
    device_type: str,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    size: int = 0,
) -> str:
    """The backend that runs ``op`` on tensors of ``device_type`` (module docstring: the order).

    Args:
        op: name of the public function.
        device_type: of the tensors.
        backend: what the caller asks for.
        dtype: of the main input, and
        size: of its last dimension: by these the fastest of several GPU kernels is looked up.

    Raises:
        ValueError: unknown backend, or a backend for another device.
        RuntimeError: the backend was asked for and cannot run here; the message says why.
    """
    asked = requested(backend)
    if asked is None:
        return _automatic(op, device_type, dtype, size)
    source = "backend" if backend else "RLHF_KERNELS_BACKEND"
    if asked not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {asked!r}")
    if reason := why_not(op, asked):
        raise RuntimeError(f"{source}: {asked!r} cannot run {op}: {reason}")
    needs = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}.get(asked, device_type)
    if asked == "triton" and INTERPRETING:
        needs = device_type
    if needs != device_type:
        raise ValueError(f"{source}: {asked!r} needs {needs} tensors, got {device_type} tensors")
    return asked


def _automatic(op: str, device_type: str, dtype: torch.dtype, size: int) -> str:
    candidates = {"cpu": ["cpu"], "cuda": [_fastest(op, dtype, size), "triton", "cuda"]}
    reason: str | None = f"no {device_type} kernels"
    for candidate in candidates.get(device_type, ()):
        reason = why_not(op, candidate)
        if reason is None:
            return candidate
    if op not in _warned and not torch.compiler.is_compiling():
        _warned.add(op)
        text = f"{op} runs on the plain PyTorch reference for {device_type} tensors: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return "reference"


# One backend for both, so that the ratio of new to old log-probability is exactly 1 at first.
_SAME_BITS = {"token_logprob_and_grad": "token_logprob"}


def _fastest(op: str, dtype: torch.dtype, size: int) -> str:
    op = _rows_of.get(op, op)
    op = _SAME_BITS.get(op, op)
    rows = [x for x in FASTEST if x.op == op and x.dtype == dtype and x.size <= size]
    return max(rows, key=lambda x: x.size).backend if rows else "triton"
