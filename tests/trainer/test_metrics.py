"""Metrics and the kernel clock."""

from __future__ import annotations

import json

import pytest
import torch

import rlhf_kernels as rk
from rlhf_trainer.metrics import KernelClock, MetricsLog


def test_metrics_are_one_flushed_line_a_step(tmp_path):
    seen: list[dict] = []
    log = MetricsLog(tmp_path, "sft", [], seen.append)
    log.write(1, loss=2.0, nothing=float("nan"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == log.history == seen
    assert rows == [{"stage": "sft", "step": 1, "loss": 2.0, "nothing": None}]
    log.close()


def test_resumed_metrics_keep_the_lines_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = [{"stage": "sft", "step": k, "loss": 1.0} for k in (1, 2, 3)]
    path.write_text("\n".join(map(json.dumps, history)) + '\n{"stage": "s')  # killed in a line
    log = MetricsLog(tmp_path, "sft", history[:2], None)
    log.write(3, loss=0.5)
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert rows == log.history


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kernel_clock(backend):
    if backend == "cpu" and "error" in rk.build_info():
        pytest.skip(f"no CPU kernels: {rk.build_info()['error']}")
    clock = KernelClock(2, [backend], torch.device("cpu"))
    logits, tokens = torch.randn(64, 5000), torch.zeros(64, dtype=torch.long)
    for _ in range(5):
        with clock.step():
            torch.randn(256, 256) @ torch.randn(256, 256)
            with clock.kernels():
                rk.token_logprob(logits, tokens, backend=backend)
    report = clock.report()
    assert report["backend"] == backend
    assert report["steps"] == 2
    assert report["step_ms"] > 0
    if backend == "reference":
        assert report["ops"] == {}
        assert "no rlhf_kernels ops" in report["note"]
    else:
        (name,) = report["ops"]
        assert name.startswith("rlhf_kernels::token_logprob")
        assert 0 < report["ops"][name]["share"] < 1
        assert report["share"] == pytest.approx(report["ops"][name]["share"])
        expected = report["ops"][name]["share"] * report["step_ms"]
        assert report["ops"][name]["ms_per_step"] == pytest.approx(expected)


def test_kernel_clock_counts_no_time_twice():
    """Of an op inside another one: the outer one's time is what is left."""
    if "error" in rk.build_info():
        pytest.skip(f"no CPU kernels: {rk.build_info()['error']}")
    clock = KernelClock(1, ["cpu"], torch.device("cpu"))
    hidden, weight = torch.randn(256, 64), torch.randn(20000, 64)
    tokens = torch.zeros(256, dtype=torch.long)
    for _ in range(2):
        with clock.step(), clock.kernels():
            rk.linear_logprob(hidden, weight, tokens, backend="cpu")
    report = clock.report()
    names = {"rlhf_kernels::linear_logprob_fwd", "rlhf_kernels::token_logprob_fwd"}
    assert report["ops"].keys() == names
    assert all(op["ms_per_step"] > 0 for op in report["ops"].values())
    assert 0 < report["share"] < 1


def test_kernel_clock_without_samples():
    report = KernelClock(0, ["cpu", "reference"], torch.device("cpu")).report()
    assert report["backend"] == "cpu, reference"
    assert report["ops"] == {}
    assert report["note"] == "no step was sampled"
