"""The gate for GPU machines, without one: a dry run through all of it, and what it says when
something of ours is wrong, breaks the process or hangs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_kernels.backend import INTERPRETING, why_not
from rlhf_kernels.specs import SPECS

ROOT = Path(__file__).resolve().parents[1]
GATE = ROOT / "benchmarks" / "gpu_gate.py"
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the dry run times the CPU backends")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def gate(out: Path, *options: str) -> tuple[int, str, dict]:
    command = [sys.executable, GATE, "--out", out, "--dry-run", "--stall=600", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads((out / "gpu_gate.json").read_text())


def test_gpu_gate_dry_run(tmp_path):
    status, printed, result = gate(tmp_path / "out", "--skip-tests", "--commit=abc")
    assert status == 0, printed
    assert result["failed"] == [] and result["dry_run"]
    assert result["machine"]["torch"] and result["commit"]
    assert result["ceilings"]["copy_bytes_per_second"] > 0
    assert result["ceilings"]["matmul_flops_per_second"] > 0
    operators = {spec.name for spec in SPECS} - {"linear_logprob", "linear_token_loss"}  # not yet
    first = [case["op"] for case in result["cases"][: len(operators)]]
    assert len(first) == len(operators) and set(first) == operators  # each before further shapes
    assert {case["mode"] for case in result["cases"]} == {"forward", "backward", "both", "graph"}
    ours = {name for name in ("reference", "cpu") if why_not("gae", name) is None}
    for case in result["cases"]:
        figures = case["contestants"]
        fused = "forward + gradient" in case["name"]
        mine = ours | {f"{name}, in one call" for name in ours if fused}
        assert {name for name, figure in figures.items() if figure["ours"]} == mine, case["name"]
        assert figures[case["best_compiled"]]["ms"] > 0
        for name, figure in figures.items():
            assert figure["ms"] > 0 and figure["error_of_allowed"] <= 1
            assert figure["share_of_copy"] == pytest.approx(
                1e3
                * case["least_bytes"]
                / figure["ms"]
                / result["ceilings"]["copy_bytes_per_second"]
            )
            assert figure["ours"] == (name in mine)
        assert case["name"][:57] in printed
    assert result["skipped"] == []
    assert sum("forward + gradient" in case["name"] for case in result["cases"]) == 2


def test_gpu_gate_records_the_tests(tmp_path):
    options = (
        "--only=kl_estimate",
        "--tests",
        "tests/test_main.py::test_every_cpu_kernel_is_built",
    )
    status, printed, result = gate(tmp_path, *options)
    assert status == 0, printed
    assert result["tests"]["counts"] == {"passed": 1} and result["tests"]["failed"] is None
    assert [case["op"] for case in result["cases"]] == ["kl_estimate"]


def test_gpu_gate_records_failing_tests(benchmarks, tmp_path):
    import gpu_gate

    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    record = gpu_gate.test(tmp_path, [str(tmp_path / "test_two.py")], 120.0)
    assert record["counts"] == {"failed": 1, "passed": 1}
    assert record["failed"].startswith("exit status") and len(record["failures"]) == 1
    record = gpu_gate.test(tmp_path, [str(tmp_path / "test_two.py")], 0.2)
    assert record["failed"] == "stopped after 0 s" and record["counts"] == {}


def test_gpu_gate_lists_what_did_not_fit(tmp_path):
    status, printed, result = gate(tmp_path, "--skip-tests", "--budget=0")
    assert status == 0 and result["cases"] == []
    assert "the time budget ended" in printed


@pytest.mark.parametrize("error", ["value", "gradient", "nan", "exception"])
def test_gpu_gate_prints_no_number_for_a_wrong_result(benchmarks, monkeypatch, error):
    import gpu_cases
    import gpu_measure

    spec = gpu_cases.SPEC["token_logprob"]

    def wrong(*, backend: str, **inputs):
        out = spec.function(**inputs, backend=backend)
        if backend != "cpu":
            return out
        if error == "exception":
            raise RuntimeError("on purpose")
        change = {"value": 1e-3, "gradient": 0.05 * (out - out.detach()), "nan": float("nan")}
        return out + change[error]

    monkeypatch.setitem(gpu_cases.SPEC, "token_logprob", dataclasses.replace(spec, function=wrong))
    case = next(c for c in gpu_cases.all_cases() if c.name.startswith("token_logprob forward + "))
    machine = gpu_measure.Cpu()
    backends = ("reference", "cpu")
    out = gpu_measure.measure(machine, case, backends, 1e9, True, lambda name: None, {})
    assert "reference" in out["contestants"] and "cpu" not in out["contestants"]
    text = {"nan": "not finite", "exception": "RuntimeError: on purpose"}.get(error, "allowed")
    assert list(out["failed"]) == ["cpu"] and text in out["failed"]["cpu"]


WORKER = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1].split("=", 1)[1])
lines = [json.loads(line) for line in path.read_text().splitlines()]
crashed = {line["contestant"] for line in lines if line["kind"] == "crash"}
def say(**line):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\\n")
say(kind="plan", cases=["a", "b"])
for name, ending in (("triton", os.abort), ("cuda", lambda: time.sleep(60))):
    if name not in crashed:
        say(kind="begin", case="a", contestant=name)
        print("an illegal access", flush=True)
        ending()
say(kind="case", name="a", failed={x["contestant"]: x["reason"] for x in lines if "reason" in x})
say(kind="done")
"""


def test_gpu_gate_survives_a_crash_and_a_hang(benchmarks, monkeypatch, tmp_path):
    import gpu_gate

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(gpu_gate, "WORKER", [sys.executable, str(script)])
    arguments = ["gpu_gate.py", "--out", str(tmp_path), "--dry-run", "--skip-tests", "--stall=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(gpu_gate.signal, "signal", lambda *_: None)
    assert gpu_gate.main() == 1
    result = json.loads((tmp_path / "gpu_gate.json").read_text())
    reasons = {x["contestant"]: x["reason"] for x in result["failed"]}
    assert reasons == {
        "triton": "exit status -6: an illegal access",
        "cuda": "no sign of life for 1 s",
    }
    assert [x["case"] for x in result["skipped"]] == ["b"]
