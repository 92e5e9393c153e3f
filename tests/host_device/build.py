"""Compiles csrc/cuda/*.cu for the CPU (csrc/cuda/device.h) and registers it as a torch library."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import torch

from rlhf_kernels import backend

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas")
NAMESPACE = "rlhf_kernels_host"


def compiler() -> str | None:
    """A C++ compiler that knows ucontext and C++20; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def compile_library(folder: Path) -> Path:
    """The shared library of all .cu files, with fibers for threads."""
    here, csrc = Path(__file__).parent, ROOT / "csrc"
    flags = [*FLAGS, "-DRK_HOST_DEVICE", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{here}", "-isystem", str(TORCH / "include")]
    sources = [*sorted((csrc / "cuda").glob("*.cu")), here / "host_device.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        command = [compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
    library = folder / "libhost_device.so"
    link = [compiler(), "-shared", *map(str, objects), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*link, "-o", str(library)], check=True)
    return library


@functools.cache
def load() -> tuple[ctypes.CDLL, types.SimpleNamespace]:
    """The library, and its operators as the attributes that ``backend.operators`` has."""
    operators = types.SimpleNamespace()
    schemas: dict[str, str] = {}
    for full in torch._C._dispatch_get_all_op_names():
        space, name = full.split("::")
        if space == "rlhf_kernels" and "." not in name:
            schema = str(getattr(torch.ops.rlhf_kernels, name).default._schema)
            schemas[name] = schema.split("::", 1)[1][len(name) :]
    for name, schema in schemas.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
        setattr(operators, name, getattr(getattr(torch.ops, NAMESPACE), name).default)
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(Path(folder))
        torch.ops.load_library(library)
        return ctypes.CDLL(str(library)), operators


def registered(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def use(monkeypatch, operators: types.SimpleNamespace) -> None:
    """Lets the public functions run these operators on CPU tensors, under backend="cuda"."""
    select = backend.select
    monkeypatch.setitem(backend.operators, "cuda", operators)
    monkeypatch.setattr(
        backend,
        "select",
        lambda op, device, asked=None, *rest: (
            "cuda" if asked == "cuda" else select(op, device, asked, *rest)
        ),
    )
