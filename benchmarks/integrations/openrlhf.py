"""OpenRLHF's primitives and steps with and without the patch: time and peak memory on the CPU.

    python benchmarks/integrations/openrlhf.py --out openrlhf.json

Both are checked against each other first, then timed in turn. The body of the model is tiny and its
vocabulary that of Llama 3, so a step is its head and its loss.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# This file has the host's name: what is looked up here would be found before the host.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "integrations"))

import openrlhf_stubs  # noqa: E402

from rlhf_kernels.integrations import openrlhf as adapter  # noqa: E402

WORDS = 128_256
ROWS, LENGTH, ACTIONS = 4, 256, 192  # 1024 tokens
Case = tuple[str, Callable[[], tuple[Tensor, ...]], float]  # name, what it gives, tolerance


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that the allocator holds beyond what it held at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events), key=itemgetter(0))
    return max(accumulate((size for _, size in changes), initial=0))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    name, call, tolerance = case

    with adapter.patched():
        ours = call()
    for got, want in zip(ours, call(), strict=True):
        error = float((got - want).norm() / want.norm())
        if got.dtype != want.dtype or not error <= tolerance:
            raise RuntimeError(f"{name}: ours differs by {error:.2g}")
    del ours, got, want
    times: dict[str, list[float]] = {"host": [], "patched": []}
    for _ in range(rounds):
        times["host"].append(milliseconds(call))
        with adapter.patched():
            times["patched"].append(milliseconds(call))
    row: dict[str, Any] = {way: {"ms": statistics.median(x)} for way, x in times.items()}
    row["host"]["peak_bytes"] = peak(call)
    with adapter.patched():
        row["patched"]["peak_bytes"] = peak(call)
    return {"name": name, **row}


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def of_logits(dtype: torch.dtype) -> list[Case]:
    from openrlhf.models import utils

    logits = (2 * torch.randn(2, 128, WORDS)).to(dtype).requires_grad_()
    labels = torch.randint(WORDS, (2, 128))

    def log_probs() -> tuple[Tensor, ...]:
        logprob = utils.log_probs_from_logits(logits, labels)
        return logprob.detach(), *torch.autograd.grad(logprob.sum(), logits)

    def entropy() -> tuple[Tensor, ...]:
        entropy = utils.compute_entropy(logits)
        return entropy.detach(), *torch.autograd.grad(entropy.sum(), logits)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    name = str(dtype).removeprefix("torch.")
    return [
        (f"log_probs_from_logits and backward, 256 x {WORDS}, {name}", log_probs, tolerance),
        (f"compute_entropy and backward, 256 x {WORDS}, {name}", entropy, tolerance),
    ]


def of_time() -> list[Case]:
    from openrlhf.models import utils
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker

    values, rewards = torch.randn(2, 64, 1024).unbind()
    mask = torch.rand(64, 1024) > 0.3
    p = values.clone().requires_grad_()

    def k3() -> tuple[Tensor, ...]:
        kl = utils.compute_approx_kl(p, rewards, kl_estimator="k3")
        return kl.detach(), *torch.autograd.grad(kl.sum(), p)

    def k3_alone() -> tuple[Tensor, ...]:
        return (utils.compute_approx_kl(values, rewards, kl_estimator="k3"),)

    def advantages() -> tuple[Tensor, ...]:
        return Maker.get_advantages_and_returns(None, values, rewards, mask, 1.0, 0.95)

    def returns() -> tuple[Tensor, ...]:
        return (Maker.get_cumulative_returns(None, rewards, mask, 1.0),)

    return [
        ("get_advantages_and_returns, 64 x 1024", advantages, 1e-5),
        ("get_cumulative_returns, 64 x 1024", returns, 1e-5),
        ("compute_approx_kl k3, 64 x 1024", k3_alone, 1e-5),
        ("compute_approx_kl k3 and backward, 64 x 1024", k3, 1e-5),
    ]


def steps(dtype: torch.dtype) -> list[Case]:
    from openrlhf.models import Actor, PolicyLoss, SFTLoss
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config)
    actor = Actor(model.to(dtype), temperature=0.9)
    actor.packing_samples = False
    sequences = torch.randint(WORDS, (ROWS, LENGTH))
    attention, mask = torch.ones_like(sequences), torch.ones(ROWS, ACTIONS)
    advantages = torch.randn(ROWS, ACTIONS)
    head = actor.model.lm_head.weight
    with torch.no_grad():
        old = actor(sequences, mask, attention) + 0.1 * torch.randn(ROWS, ACTIONS)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        actor.zero_grad()
        loss.backward()
        return loss.detach(), head.grad.clone()

    def ppo(entropy: bool = False) -> tuple[Tensor, ...]:
        logprob, output = actor(
            sequences, mask, attention, return_output=True, return_entropy=entropy
        )
        loss = PolicyLoss()(logprob, old, advantages, mask)[0]
        return backward(loss - 0.01 * output.entropy[:, -ACTIONS:].mean() if entropy else loss)

    def sft() -> tuple[Tensor, ...]:
        logprob, _ = actor(sequences, None, attention, return_output=True, return_logprobs=True)
        return backward(SFTLoss()(logprob, attention[:, 1:]))

    def scored() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (actor(sequences, mask, attention),)

    name = str(dtype).removeprefix("torch.")
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return [
        (f"Actor without gradients, {name}", scored, tolerance),
        (f"PPO step, {name}", ppo, tolerance),
        (f"PPO step with entropy, {name}", lambda: ppo(True), tolerance),
        (f"SFT step, {name}", sft, tolerance),
    ]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    openrlhf_stubs.install()
    import openrlhf.trainer.ppo_utils.experience_maker  # noqa: F401

    torch.manual_seed(0)
    rows = []
    print(f"{'':<60}{'host':>18}{'patched':>20}")
    for make in (
        of_time,
        *(
            lambda d=d, f=f: f(d)
            for d in (torch.float32, torch.bfloat16)
            for f in (of_logits, steps)
        ),
    ):
        for case in make():
            row = measure(case, options.rounds)
            rows.append(row)
            cells = [
                f"{row[w]['ms']:>9.2f} ms {row[w]['peak_bytes'] / 2**20:>5.0f} MiB"
                for w in ("host", "patched")
            ]
            print(f"{row['name']:<58}" + "".join(cells), flush=True)
    versions = {n: importlib.metadata.version(n) for n in ("openrlhf", "torch", "transformers")}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    record = {"versions": versions, "commit": commit, **machine, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
