"""The report under the benchmarks, and what a result file must say to be worth keeping."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import rlhf_kernels


@pytest.fixture(autouse=True, scope="session")
def _needs_the_extension():
    info = rlhf_kernels.build_info()
    if "error" in info:
        pytest.exit(f"benchmarks need the compiled kernels: {info['error']}", returncode=1)


def pytest_benchmark_update_machine_info(config, machine_info):
    info = rlhf_kernels.build_info()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["compiler"], machine_info["simd"] = info.get("compiler"), info.get("simd")


def pytest_benchmark_update_commit_info(config, commit_info):
    root = Path(__file__).parents[1]
    state = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    commit_info["clean"] = state.returncode == 0 and not state.stdout.strip()


def pytest_terminal_summary(terminalreporter):
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if b.extra_info] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    bandwidth = rows[0].extra_info["read_bandwidth"] / 1e9
    threads = rows[0].extra_info["threads"]
    terminalreporter.section("ours against the best peer, interleaved in this run")
    write(f"read bandwidth (sum over 512 MiB): {bandwidth:.1f} GB/s with {threads} threads")
    write(
        f"{'benchmark':<46}{'ours ms':>9}{'best ms':>9}{'faster':>8}{'of read bw':>12}  best peer"
    )
    for row in rows:
        info = row.extra_info
        name = row.name.removeprefix("test_")
        share = f"{info['share_of_read_bandwidth']:.0%}"
        if "over_floor" in info:
            share = f"{info['over_floor']:.2f}x bare"  # of its matrix products
        write(
            f"{name:<46}{1e3 * row.stats.median:>9.3f}{info['peers_ms'][info['best_peer']]:>9.3f}"
            f"{info['speedup']:>7.1f}x{share:>12}  {info['best_peer']}"
        )
