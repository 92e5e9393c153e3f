"""Every Triton kernel compiles ahead of time: no spills, bounded registers, 16-byte loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_kernels.backend import INTERPRETING
from rlhf_kernels.specs import SPECS

if find_spec("triton") is None or INTERPRETING:
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)

from triton_compile import DTYPES, TARGETS, compile_for, record

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".venv" / "triton-3.6"
# KiB of shared memory that a program may have.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# Warps x registers of a thread with which a multiprocessor runs two programs at once: it has 65536
# registers, and a warp 32 threads; AMD: twice as many of both.
TWO_PROGRAMS = 1024
# Where one program takes more: kernel, what its name says, registers at most.
LARGER = (
    ("finish_kernel", "", 128),  # 16 warps; a call has one program
    ("gae_kernel", "TYPE=fp64", 144),
    ("linear_logprob_sums_kernel", "", 255),  # a tile of logits, and a pipeline in shared memory
    ("policy_loss_fwd_kernel", "TYPE=fp64", 208),
)
# In bf16 and fp32 without a mask.
LARGER_IN_OLDEST = (("policy_loss_fwd_kernel", "BY_SEQUENCE=False OBJECTIVE=0 KL_KIND=0", 176),)
each_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def check(use: dict, spilled: int = 0, larger: tuple = LARGER) -> None:
    """Of one kernel for one target; ``spilled``: the bytes of registers that may be spilled."""
    print(use)
    # NVIDIA divides float64 by a call, around which one register may be kept on the stack.
    allowed = max(spilled, 8 if use.get("divides_float64") else 0)
    assert use["stack"] <= allowed, "spills registers"
    assert use["shared"] <= SHARED[use["target"]] << 10
    kernel = use["kernel"]
    limits = [n for name, text, n in larger if kernel.startswith(name) and text in kernel]
    assert use["registers"] <= max([TWO_PROGRAMS // use["num_warps"], *limits])
    if "ALIGNED=True" in use["kernel"] and use["target"].startswith("sm_"):
        assert min(use["widest_load"], use["narrowest_copy"]) >= 16


@pytest.mark.parametrize("target", TARGETS)
@each_op
def test_triton_kernels_compile(spec, target):
    everywhere = target in ("sm_80", "sm_90")
    variants = record(spec, DTYPES if everywhere else (torch.bfloat16, torch.float32), target)
    assert variants
    for variant in variants:
        check(compile_for(target, variant))


@each_op
def test_triton_kernels_compile_with_the_oldest_version(spec):
    if not OLDEST.exists():
        pytest.skip("Triton 3.6 is not installed (make test does)")
    script = [sys.executable, str(ROOT / "tests" / "triton_compile.py"), "--op", spec.name]
    targets = [f"--target={name}" for name in TARGETS]
    targets += ["--dtype=bfloat16", "--dtype=float32"]
    path = os.pathsep.join([str(OLDEST), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*script, *targets],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    uses = [json.loads(line) for line in result.stdout.splitlines()]
    assert uses and uses[0]["triton"].startswith("3.6")
    for use in uses:
        # Its assembler keeps one register of two of the sequence losses' variants on the stack.
        spilled = 8 if use["target"] in ("sm_80", "sm_120") else 0
        check(use, spilled, (*LARGER, *LARGER_IN_OLDEST))
