"""Every .cu file compiled for 8.0 and 9.0a: no spills, bounded registers, 128-bit global loads."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")
REGISTERS = 128  # of a thread, of 65536 in a multiprocessor: two blocks of 256 threads fit
# Kernels that read no vector: a few numbers for each row.
SCALAR = ("token_logprob_join_kernel", "surrogate_kernel")


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def flags() -> list[str]:
    """How CMakeLists.txt compiles; the include folders of torch."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (options,) = re.findall(r"target_compile_options\(rlhf_kernels_cuda PRIVATE (-O3[^)]*)\)", text)
    (target,) = re.findall(r"TORCH_TARGET_VERSION=\w+", text)
    include = Path(torch.__file__).parent / "include"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", "-isystem", str(include)]
    return ["-std=c++20", *options.split(), f"-D{target}", *folders]


def usage(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> what ptxas -v says of it."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, architecture, *numbers in re.findall(pattern, report, re.DOTALL):
        keys = ("stack", "stores", "loads", "registers")
        found[name, architecture] = dict(zip(keys, map(int, numbers), strict=True))
    return found


def wide_loads(tool: str, target: Path) -> dict[tuple[str, str], int]:
    """(kernel, architecture) -> its 128-bit loads from global memory, async copies included."""
    sass = subprocess.run([tool, "--dump-sass", str(target)], capture_output=True, text=True)
    assert sass.returncode == 0, sass.stderr
    found, architecture, name = {}, "", ""
    for line in sass.stdout.splitlines():
        if match := re.match(r"\s*code for sm_(\w+)", line):
            architecture = match[1].rstrip("a")
        elif match := re.match(r"\s*Function : (\w+)", line):
            name = match[1]
            found[name, architecture] = 0
        elif re.search(r"\b(LDG|LDGSTS)\.\S*128", line):
            found[name, architecture] += 1
    return found


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def compiled(request, tmp_path_factory) -> tuple[Path, Path, str]:
    """A source, its object file and what ptxas reports."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        pytest.skip("there is no nvcc")
    target = tmp_path_factory.mktemp("cuda") / f"{request.param.stem}.o"
    codes = [f"--generate-code=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, *flags(), *codes, "-Xptxas=-v", "-c", str(request.param), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return request.param, target, result.stdout + result.stderr


def test_cuda_kernels_do_not_spill(compiled):
    source, _, report = compiled
    kernels = usage(report)
    wanted = set(re.findall(r"__global__ void .*?\b(\w+_kernel)\(", source.read_text(), re.DOTALL))
    for architecture in ARCHITECTURES:
        names = [name for name, a in kernels if a == architecture]
        assert wanted and all(any(kernel in name for name in names) for kernel in wanted)
    for key, used in kernels.items():
        assert used["stack"] == used["stores"] == used["loads"] == 0, (key, used)
        assert used["registers"] <= REGISTERS, (key, used)


def test_cuda_kernels_load_16_bytes_at_once(compiled):
    _, target, report = compiled
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump")
    loads = wide_loads(tool, target)
    assert loads.keys() == {(name, a.rstrip("a")) for name, a in usage(report)}
    for (name, architecture), count in loads.items():
        if not any(kernel in name for kernel in SCALAR):
            assert count > 0, f"{name} for {architecture} has no 128-bit load"
