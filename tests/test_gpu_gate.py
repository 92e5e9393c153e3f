"""The gate for GPU machines, without one: a dry run through all of it, and what it says when
something of ours is wrong, breaks the process or hangs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def is_package(x: dict) -> bool:
    """A peer that another package brings, or does not."""
    return x["contestant"].startswith("package ")


def test_gpu_gate_dry_run(tmp_path):
    status, printed, result = gate(tmp_path / "out", "--skip-tests", "--commit=abc")
    assert status == 0, printed
    assert result["dry_run"] and not [x for x in result["failed"] if not is_package(x)]
    assert result["machine"]["torch"] and result["commit"]
    assert result["ceilings"]["copy_bytes_per_second"] > 0
    assert result["ceilings"]["matmul_flops_per_second"] > 0
    operators = {spec.name for spec in SPECS}
    first = [case["op"] for case in result["cases"][: len(operators)]]
    assert len(first) == len(operators) and set(first) == operators  # each before further shapes
    assert {case["mode"] for case in result["cases"]} == {"forward", "backward", "both", "graph"}
    ours = {name for name in ("reference", "cpu") if why_not("gae", name) is None}
    for case in result["cases"]:
        figures = case["contestants"]
        fused = "forward + gradient" in case["name"]
        mine = ours | {f"{name}, in one call" for name in ours if fused}
        assert {name for name, figure in figures.items() if figure["ours"]} == mine, case["name"]
        if any(name.startswith("compile ") for name in figures):
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
    assert all(x["reason"].startswith("not installed: ") for x in result["skipped"])
    assert all(is_package(x) for x in result["skipped"])
    assert sum("forward + gradient" in case["name"] for case in result["cases"]) == 2
    linear = [case for case in result["cases"] if case["op"].startswith("linear_")]
    assert {x["name"] for x in linear} == {x["name"] for x in result["cases"] if "bare" in x}
    for case in linear:
        step = case["mode"] == "both"
        for figure in case["contestants"].values():
            assert figure["over_bare"] == pytest.approx(figure["ms"] / case["bare"]["ms"])
            assert figure["returned_bytes"] >= (2 * 2 * 24 * 24 if step else 2 * 24)
            several = figure["ours"] and "512 MiB" in case["name"]
            assert figure["accumulator_bytes"] == (4 * 24 * 24 if several else 0)
    assert "x bare" in printed and "dW in float32" in printed


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


def test_gpu_gate_fails_where_a_built_library_does_not_load(benchmarks, monkeypatch, tmp_path):
    import gpu_gate

    assert gpu_gate.faults() is None
    shutil.copytree(
        ROOT / "rlhf_kernels",
        tmp_path / "rlhf_kernels",
        ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.dylib"),
    )
    suffix = "dylib" if sys.platform == "darwin" else "so"
    for name in ("cpu", "cuda"):
        (tmp_path / "rlhf_kernels" / f"librlhf_kernels_{name}.{suffix}").write_bytes(b"no library")
    monkeypatch.setattr(gpu_gate, "ROOT", tmp_path)
    record = gpu_gate.build(tmp_path, "9.0", 1.0)
    assert record["cuda"] == "was there" and "does not load" in record["failed"]
    assert not gpu_gate.good({"build": record, "tests": {}, "failed": []})


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


def linear_step(**changes):
    """The case of the policy step, smaller still: without the peers in PyTorch."""
    import gpu_linear_cases

    case = gpu_linear_cases.main_cases()[0]
    return dataclasses.replace(case, **{"plain": {}, "packages": {}, **changes})


@pytest.mark.parametrize("rows", ["all", "tokens that occur", "tokens that do not occur"])
def test_gpu_gate_sees_a_wrong_gradient_of_a_head(benchmarks, monkeypatch, rows):
    import gpu_case
    import gpu_measure

    spec = gpu_case.SPEC["linear_token_loss"]

    def wrong(hidden, weight, tokens, *args, backend: str, **options):
        if backend == "cpu":
            occurs = torch.zeros(len(weight), dtype=torch.bool).index_fill(0, tokens, True)
            chosen = {"all": occurs | True, "tokens that occur": occurs}.get(rows, ~occurs)
            factor = torch.where(chosen, 1.05, 1.0).to(weight.dtype).unsqueeze(-1)
            weight = weight.detach() + factor * (weight - weight.detach())
        return spec.function(hidden, weight, tokens, *args, backend=backend, **options)

    monkeypatch.setitem(gpu_case.SPEC, spec.name, dataclasses.replace(spec, function=wrong))
    machine, backends = gpu_measure.Cpu(), ("reference", "cpu")
    out = gpu_measure.measure(machine, linear_step(), backends, 1e9, True, lambda name: None, {})
    assert list(out["contestants"]) == ["reference"]
    assert list(out["failed"]) == ["cpu"] and "allowed" in out["failed"]["cpu"]


def test_gpu_gate_checks_packages_and_lists_what_they_lack(benchmarks):
    import gpu_case
    import gpu_gate
    import gpu_linear_cases
    import gpu_measure

    right = gpu_linear_cases.loss_of(
        gpu_linear_cases.reference_logprob, gpu_linear_cases.clipped_surrogate
    )
    packages = {
        "right": gpu_case.Package(("torch",), right),
        "wrong": gpu_case.Package(("torch",), lambda **x: 1.1 * right(**x)),
        "absent": gpu_case.Package(("torch", "no_such_module"), right),
    }
    case = linear_step(packages=packages, variants={"another of ours": {"backend": "cpu"}})
    out = gpu_measure.measure(gpu_measure.Cpu(), case, ("cpu",), 1e9, True, lambda name: None, {})
    assert list(out["contestants"]) == ["cpu", "another of ours", "package right"]
    assert [f["ours"] for f in out["contestants"].values()] == [True, True, False]
    assert out["best_peer"] == "package right"
    assert "allowed" in out["failed"]["package wrong"] and len(out["failed"]) == 1
    assert out["skipped"] == {"package absent": "not installed: no_such_module"}
    result = {"build": {}, "tests": {}, "failed": [{"contestant": "package wrong"}]}
    assert gpu_gate.good(result)
    assert not gpu_gate.good({**result, "failed": [{"contestant": "another of ours"}]})


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
