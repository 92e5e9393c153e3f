"""Every Triton kernel, compiled ahead of time for GPUs that need not be there.

The operators run on CPU tensors with the launches recorded instead of executed; each different
launch (types, alignment, constants, warps) is compiled for a target, and what it uses is read from
the result. Run as a script, it prints one JSON line per kernel and target.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhf_kernels import backend, triton_common
from rlhf_kernels.opspec import Maker, OpSpec
from rlhf_kernels.specs import SPECS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Variant(NamedTuple):
    """A kernel as it is launched: what the compiler sees of the arguments."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments whose address is a multiple of 16
    num_warps: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def describe(self) -> str:
        inputs = " ".join(kind for _, kind in self.signature if kind.startswith("*"))
        constants = " ".join(f"{k}={v}" for k, v in self.constants if v is not None)
        return f"{self.name}({inputs}) {constants}"


def variant(kernel: Any, args: Iterable[Any], num_warps: int, constants: dict[str, Any]) -> Variant:
    names = [p.name for p in kernel.params]
    given = {**dict(zip(names, args, strict=False)), **constants}
    signature, folded, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            folded.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, _NAMES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(i)
        else:
            assert parameter.annotation_type in ("i64", "fp64"), f"{kernel}: {parameter.name}"
            assert parameter.do_not_specialize, f"{kernel}: {parameter.name} is specialised"
            signature.append((parameter.name, parameter.annotation_type))
    return Variant(kernel, tuple(signature), tuple(folded), tuple(aligned), num_warps)


def record(spec: OpSpec, dtypes: Iterable[torch.dtype], target: str) -> list[Variant]:
    """The different launches of an operator, forward and backward, over samples and benchmarks.

    Tiles are those of ``target``.
    """
    found: dict[Variant, None] = {}

    def launch(kernel, programs, *args, num_warps=4, **constants):
        if programs > 0:
            found[variant(kernel, args, num_warps, constants)] = None

    saved = triton_common.launch, backend.select, backend.operators["triton"]
    architecture = triton_common.architecture
    launchers = vars(saved[2]) | {
        name: functools.partial(backend.launch_triton, name)
        for name in vars(saved[2])
        if name in backend._triton_modules
    }
    triton_common.launch = launch
    triton_common.architecture = lambda device: target
    backend.select = lambda *_: "triton"
    backend.operators["triton"] = types.SimpleNamespace(**launchers)
    try:
        for dtype in dtypes:
            for inputs in _inputs(spec, dtype):
                _run(spec, inputs)
    finally:
        triton_common.launch, backend.select, backend.operators["triton"] = saved
        triton_common.architecture = architecture
    return list(found)


def _inputs(spec: OpSpec, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for sample in (*spec.samples(Maker("cpu", dtype)), *spec.bench(Maker("cpu", dtype))):
        yield dict(sample.inputs)


def _run(spec: OpSpec, inputs: dict[str, Any]) -> None:
    for name in spec.leaves(inputs):
        inputs[name] = inputs[name].detach().requires_grad_()
    out = spec.function(**inputs)
    flat = [out] if isinstance(out, torch.Tensor) else list(out)
    scalars = [x.sum() for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    if scalars:
        sum(scalars).backward()


def compile_for(target: str, v: Variant) -> dict[str, Any]:
    """What the binary uses: registers, stack and shared memory in bytes, and the widest load."""
    source = ASTSource(
        fn=v.kernel,
        signature=dict(v.signature),
        constexprs=dict(v.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in v.aligned},
    )
    options = {"num_warps": v.num_warps, "enable_fp_fusion": False}
    binary = triton.compile(source, target=TARGETS[target], options=options)
    use: dict[str, Any] = {"target": target, "kernel": v.describe()}
    use |= {"shared": binary.metadata.shared, "num_warps": v.num_warps}
    if "cubin" in binary.asm:
        use |= _resources(binary.asm["cubin"])
        use["divides_float64"] = "div.rn.f64" in binary.asm["ptx"]
        loads = re.findall(r"ld\.global[^ ]*?(?:\.v(\d))?\.[bfu](\d+)", binary.asm["ptx"])
        sizes = [int(n or 1) * int(bits) // 8 for n, bits in loads]
        found = re.findall(r"cp\.async\.c\w\.shared\.global [^;]*?\], (\w+)", binary.asm["ptx"])
        copies = [int(size, 0) for size in found]  # to shared memory, of factors of a product
        use["widest_load"] = max((*sizes, *copies), default=0)
        use["narrowest_copy"] = min(copies, default=16)
    else:
        text = binary.asm["amdgcn"]
        use["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        use["stack"] = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
    return use


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--op", choices=[spec.name for spec in SPECS], action="append")
    parser.add_argument("--dtype", choices=[str(d)[6:] for d in DTYPES], action="append")
    options = parser.parse_args()
    dtypes = [d for d in DTYPES if not options.dtype or str(d)[6:] in options.dtype]
    for spec in SPECS:
        if options.op and spec.name not in options.op:
            continue
        for target in options.target or TARGETS:
            for v in record(spec, dtypes, target):
                use = {"triton": triton.__version__, "op": spec.name, **compile_for(target, v)}
                print(json.dumps(use), flush=True)


if __name__ == "__main__":
    sys.exit(main())
