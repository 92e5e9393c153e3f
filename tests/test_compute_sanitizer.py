"""tools/compute_sanitizer.sh without a GPU: what it says, what it runs and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "compute_sanitizer.sh"
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True)


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """compute-sanitizer that notes how it is called and finds an error under racecheck; a Python
    that finds all in order."""
    for name, body in {
        "compute-sanitizer": f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {tmp_path}/calls\n'
        'case "$*" in *racecheck*) exit 1 ;; esac',
        "python": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_unknown_tool_is_named():
    done = run("memcheck", "leakcheck")
    assert done.returncode == 2 and "synccheck or initcheck, got leakcheck" in done.stderr


def test_missing_sanitizer_is_named(tmp_path):
    path = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not Path(folder, "compute-sanitizer").exists()
    )
    done = run(CUDA_HOME=str(tmp_path), PATH=path)
    assert done.returncode == 2
    assert f"there is no compute-sanitizer in PATH, nor {tmp_path}/bin" in done.stderr


def test_missing_gpu_is_named(toolkit):
    done = run()
    assert done.returncode == 2 and "there is no GPU" in done.stderr
    assert not (toolkit / "calls").exists()


def test_an_error_under_one_tool_fails_the_whole(toolkit):
    done = run(PYTHON=str(toolkit / "python"))
    calls = (toolkit / "calls").read_text().splitlines()
    assert [call.split("--tool ")[1].split()[0] for call in calls] == TOOLS
    assert [call.startswith("1 ") for call in calls] == [True, False, False, True]
    assert done.returncode == 1 and done.stdout.endswith("errors under: racecheck\n")
    done = run("synccheck", PYTHON=str(toolkit / "python"))
    assert done.returncode == 0 and done.stdout.endswith("clean under: synccheck\n")
