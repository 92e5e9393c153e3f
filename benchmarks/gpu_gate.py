"""The gate for a machine with a GPU: build, test, measure; one command, also without a network.

    python benchmarks/gpu_gate.py --out DIR

Builds the CUDA kernels in place for the machine's own architecture if they are missing, runs the
tests, measures the two ceilings (device copy, bf16 matmul), and checks and times every operator on
each backend against PyTorch (gpu_cases.py, gpu_measure.py).

It ends within the time budget, and what did not fit is listed as skipped: no case begins in the
last 12 s, the estimate of what one takes. By it all 57 need eleven and a half minutes: with
--skip-tests and the kernels built the first 42 fit into 525 s. If the tests take all of their
200 s, the first 26 do; if a build takes its 180 s too, 11, three less than there are operators.
Then run it a second time, with --skip-tests. --only=linear_ measures the 22 cases of heads without
logits, by the same estimate in four and a half minutes: longer where other packages are installed,
which take part as peers (gpu_linear_cases.py).

DIR/gpu_gate.json holds every figure. Exit status 1: something of ours failed. ``--dry-run`` goes
the same way on a CPU, with tiny shapes: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = [sys.executable, str(ROOT / "benchmarks" / "gpu_measure.py")]
BUILD, TESTS, RESERVE = 180.0, 200.0, 10.0  # seconds at most, and seconds kept for the report
NEED_NO_GPU = """trainer test_compute_sanitizer.py test_cuda_compile.py test_cuda_host.py
test_gpu_gate.py test_packaging.py test_triton_compile.py""".split()
BUDGET_ENDED = "the time budget ended"


def run(
    command: Sequence[str],
    log: Path,
    limit: float,
    environment: Mapping[str, str],
    watched: Path | None = None,
    stall: float = 0.0,
) -> str | None:
    """Run a command within ``limit`` seconds, its output into ``log``; what went wrong, or None.

    watched: a file that grows at least every ``stall`` seconds as long as all is well.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **environment}
    end, sign = time.time() + limit, (0, time.time())
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            while (status := process.poll()) is None:
                if time.time() > end:
                    return f"stopped after {limit:.0f} s"
                if watched and watched.stat().st_size != sign[0]:
                    sign = (watched.stat().st_size, time.time())
                if watched and time.time() - sign[1] > stall:
                    return f"no sign of life for {stall:.0f} s"
                time.sleep(0.1)
        finally:  # the whole group: compilers and test processes too
            if process.poll() is None or status != 0:
                kill(process)
    return None if status == 0 else f"exit status {status}: {last_line(log)}"


def kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:600] if lines else "no output"


def answer(*command: str) -> str | None:
    """The first line that a command prints; None where it fails or does not exist."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else None


def provenance(commit: str | None) -> dict[str, Any]:
    git = ("git", "-c", "safe.directory=*")
    found = answer(*git, "rev-parse", "HEAD")
    changes = answer(*git, "status", "--porcelain")
    driver = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": found or commit,
        "clean": None if found is None or changes is None else not changes,
        "driver": driver,
    }


def capability() -> str | None:
    """Of the first GPU, as "9.0"; asked in another process, so that this one never touches it."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    return answer(sys.executable, "-c", code)


def faults() -> str | None:
    """Which native libraries are built and do not load, and why; asked in another process."""
    code = "from rlhf_kernels.backend import faulty; print('; '.join(faulty))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return lines[-1][:600] if lines else None


def build(out: Path, found: str, limit: float) -> dict[str, Any]:
    """The CUDA library for this machine's architecture, or a word on why there is none."""
    folder = ROOT / "rlhf_kernels"
    if any(folder.glob("librlhf_kernels_cuda.*")):
        return {"cuda": "was there", "failed": faults()}
    arch = "9.0a" if found == "9.0" else found
    environment = {"RLHF_KERNELS_CUDA": "1", "RLHF_KERNELS_CUDA_ARCH": arch}
    start = time.time()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    failure = run(command, out / "build.log", limit, environment)
    result = {"cuda": failure or "built", "arch": arch, "seconds": round(time.time() - start, 1)}
    result["failed"] = failure or faults()
    if failure and not any(folder.glob("librlhf_kernels_cpu.*")):  # the tests need it
        again = run(command, out / "build_cpu.log", limit, {"RLHF_KERNELS_CUDA": "0"})
        result["cpu"] = again or "built"
    return result


def test(out: Path, paths: Sequence[str], limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"--ignore=tests/{name}" for name in NEED_NO_GPU]
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses=auto", "--maxprocesses=8", "--dist=worksteal"]
        command += ["-p", "no:benchmark"]
    start, log = time.time(), out / "tests.log"
    failure = run(command, log, limit, {"OMP_NUM_THREADS": "1"})
    text = log.read_text(errors="replace")
    ending = next((x for x in reversed(text.splitlines()) if re.search(r" in [0-9.]+s", x)), "")
    words = re.findall(r"(\d+) (passed|failed|skipped|error|xfailed|xpassed|deselected)", ending)
    return {
        "counts": {word: int(number) for number, word in words},
        "failed": failure,
        "failures": [x[:300] for x in text.splitlines() if re.match(r"(FAILED|ERROR) ", x)],
        "seconds": round(time.time() - start, 1),
    }


def read(progress: Path) -> list[dict[str, Any]]:
    lines = progress.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def measure(out: Path, deadline: float, stall: float, options: Sequence[str]) -> str | None:
    """Run the worker, again without the contestant that broke it; what stopped it, or None."""
    progress = out / "progress.jsonl"
    while (left := deadline - time.time()) > 0:
        command = [*WORKER, f"--progress={progress}", f"--deadline={deadline}", *options]
        failure = run(command, out / "worker.log", left, {}, progress, stall)
        if failure is None:
            return None
        last = (read(progress) or [{"kind": "nothing"}])[-1]
        if last["kind"] != "begin":
            return failure
        if time.time() >= deadline:
            return f"{BUDGET_ENDED}, in {last['case']}, {last['contestant'] or 'timing'}"
        crash = {"case": last["case"], "contestant": last["contestant"], "reason": failure}
        with progress.open("a") as file:
            file.write(json.dumps({"kind": "crash", **crash}) + "\n")
    return BUDGET_ENDED


def report(out: Path, result: dict[str, Any], stopped: str | None) -> dict[str, Any]:
    """All that is known, in the form of the JSON file."""
    lines = read(out / "progress.jsonl")
    first = {line["kind"]: line for line in reversed(lines)}
    cases = [line for line in lines if line["kind"] == "case"]
    done = {case["name"] for case in cases}
    planned = first.get("plan", {}).get("cases", ["every case"])
    why = stopped or BUDGET_ENDED
    skipped = [
        {"case": case["name"], "contestant": name, "reason": reason}
        for case in cases
        for name, reason in case.get("skipped", {}).items()
    ]
    skipped += [{"case": x, "contestant": "", "reason": why} for x in planned if x not in done]
    failed = [
        {"case": case["name"], "contestant": name, "reason": reason}
        for case in cases
        for name, reason in case.get("failed", {}).items()
    ]
    if stopped and not stopped.startswith(BUDGET_ENDED):
        failed.append({"case": "", "contestant": "", "reason": stopped})
    for line in [*cases, *first.values()]:
        line.pop("kind", None)
    return result | {
        "machine": first.get("machine"),
        "ceilings": first.get("ceilings"),
        "cases": cases,
        "skipped": skipped,
        "failed": failed,
    }


def good(result: dict[str, Any]) -> bool:
    """Whether nothing of ours failed; a peer may, and what was skipped is no failure."""
    peers = ("eager ", "compile ", "package ")
    ours = [x for x in result["failed"] if not x["contestant"].startswith(peers)]
    stages = (result["build"], result["tests"])
    return not ours and not any(stage.get("failed") for stage in stages)


def memory(figure: dict[str, Any]) -> str:
    """What the peak is made of."""
    returned, total = figure["returned_bytes"], figure["accumulator_bytes"]
    rest = figure["peak_extra_bytes"] - returned - total
    mib = [round(x / 2**20) for x in (returned, total, rest)]
    return "MiB: {} returned, {} dW in float32, {} workspace".format(*mib)


def table(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["machine"]:
        machine, c = result["machine"], result["ceilings"] or {}
        lines.append(
            f"{machine['device']}, driver {result['driver']}, torch {machine['torch']}, "
            f"triton {machine['triton']}, commit {result['commit']}, clean: {result['clean']}"
        )
        lines.append(
            f"ceilings: copy {c.get('copy_bytes_per_second', 0) / 1e12:.3f} TB/s, "
            f"bf16 matmul {c.get('matmul_flops_per_second', 0) / 1e12:.0f} TFLOP/s"
        )
    lines.append(f"build: {result['build']}")
    lines.append(f"tests: {result['tests']}")
    head = f"{'case':<58}{'ours':<15}{'ms':>9}{'of copy':>13}{'MiB':>7}{'faster':>8}  best peer"
    lines.append(head)
    for case in result["cases"]:
        figures = case.get("contestants", {})
        peer = case.get("best_peer")
        for name, f in figures.items():
            if f["ours"]:
                faster = f.get("speedup_over_best_peer")
                bare = "over_bare" in f
                share = f"{f['over_bare']:.3f}x bare" if bare else f"{f['share_of_copy']:.1%}"
                lines.append(
                    f"{case['name'][:57]:<58}{name:<15}{f['ms']:>9.4f}{share:>13}"
                    f"{f['peak_extra_bytes'] / 2**20:>7.0f}"
                    + (f"{faster:>7.{1 + bare}f}x  {peer}" if faster else f"{'-':>8}")
                    + (" (host-bound)" if f["host_bound"] else "")
                    + (f" ({memory(f)})" if bare else "")
                )
    for kind in ("failed", "skipped"):
        reasons: dict[tuple[str, str], list[str]] = {}
        for x in result[kind]:
            reasons.setdefault((x["contestant"], x["reason"]), []).append(x["case"])
        for (contestant, reason), names in reasons.items():
            which = names[0] if len(names) == 1 else f"{len(names)} cases ({names[0]}, ...)"
            lines.append(f"{kind}: {contestant or 'all'}, {which}: {reason[:160]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the logs")
    parser.add_argument("--budget", type=float, default=525.0, help="seconds in all (525)")
    parser.add_argument("--stall", type=float, default=90.0, help="seconds: longer is hung (90)")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="paths for pytest (tests)")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args()
    deadline = time.time() + args.budget - RESERVE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end and JSON is kept
    found = "cpu" if args.dry_run else capability()
    if found is None:
        parser.error("this Python's torch sees no GPU (--dry-run goes the same way without one)")
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    result: dict[str, Any] = {"dry_run": args.dry_run, **provenance(args.commit)}
    result |= {"budget_seconds": args.budget, "build": {}, "tests": {}}
    (out / "progress.jsonl").write_text("")
    start, stopped = time.time(), "the gate itself was stopped"
    try:
        result["build"] = {"cuda": "dry run"} if args.dry_run else build(out, found, BUILD)
        if args.skip_tests:
            result["tests"] = {"skipped": "--skip-tests"}
        else:
            limit = min(TESTS, deadline - time.time())
            result["tests"] = test(out, args.tests, limit)
        options = [f"--only={args.only}", *(["--dry-run"] if args.dry_run else [])]
        stopped = measure(out, deadline, args.stall, options) or ""
    finally:
        result = report(out, result, stopped or None)
        result["seconds"] = round(time.time() - start, 1)
        (out / "gpu_gate.json").write_text(json.dumps(result, indent=1) + "\n")
        print(*table(result), sep="\n")
    return 0 if good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
