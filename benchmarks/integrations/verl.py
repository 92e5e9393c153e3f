"""What verl's functions, and one actor step, take with and without our kernels.

    python benchmarks/integrations/verl.py --out verl.json

Each pair is first compared, then timed interleaved: the median, and the most bytes that the
allocator held beside what stood before. The step is verl's fused head over a body of one layer,
its log-probs, entropies and policy loss, and the backward.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_kernels.integrations import verl as adapter

# A script's folder comes first on the path, and verl is not this file.
sys.path[:] = [x for x in sys.path if Path(x).resolve() != Path(__file__).resolve().parent]

VOCAB, TOKENS, WIDTH = 128256, 1024, 256
ROUNDS = 5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Call = Callable[[], Any]


def peak(call: Call) -> float:
    """MiB that the allocator held at most, beyond the start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = cast(Any, profiler.profiler).kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    sizes = (size for _, size in sorted(changes, key=itemgetter(0)))
    return float(max(accumulate(sizes, initial=0))) / 2**20


def measure(name: str, dtype: torch.dtype, call: Call) -> dict[str, Any]:
    """``call`` returns tensors to compare; verl's functions are looked up when it runs."""

    sides: dict[str, Callable[[], Any]] = {"verl": contextlib.nullcontext, "ours": adapter.patched}
    expected = call()
    with adapter.patched():
        got = call()
    for a, b in zip(expected, got, strict=True):
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(b.float(), a.float(), rtol=bound, atol=bound)
    del expected, got
    times: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(ROUNDS):
        for who, side in sides.items():
            with side():
                begin = time.perf_counter()
                call()
                times[who].append(1e3 * (time.perf_counter() - begin))
    row: dict[str, Any] = {"name": name, "dtype": str(dtype).removeprefix("torch.")}
    for who, side in sides.items():
        row[f"{who}_ms"] = round(statistics.median(times[who]), 3)
        with side():
            row[f"{who}_mib"] = round(peak(call), 1)
    print(
        f"{name:<46}{row['dtype']:<10}"
        f"{row['verl_ms']:>10.2f}{row['ours_ms']:>10.2f} ms"
        f"{row['verl_mib']:>10.1f}{row['ours_mib']:>10.1f} MiB",
        flush=True,
    )
    return row


def with_gradient(function: Callable[..., Any], *tensors: torch.Tensor) -> Call:
    """The results and the gradients of their sum."""

    def call() -> Any:
        inputs = [x.detach().requires_grad_() for x in tensors]
        out = function(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        loss = sum(x.float().sum() for x in outputs)
        return *(x.detach() for x in outputs), *torch.autograd.grad(loss, inputs)

    return call


def without_gradient(function: Callable[..., torch.Tensor], x: torch.Tensor) -> Call:
    return lambda: (function(x),)


def primitives(dtype: torch.dtype) -> list[dict[str, Any]]:
    from verl.utils import torch_functional as functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    torch.manual_seed(0)
    rows = []
    logits = torch.randn(256, VOCAB).to(dtype)
    tokens = torch.randint(VOCAB, (256,))
    for name, function in {
        "logprobs_from_logits 256": lambda x: functional.logprobs_from_logits(x, tokens),
        "entropy_from_logits 256": lambda x: functional.entropy_from_logits(x),
        "entropy_from_logits_with_chunking 256": lambda x: (
            functional.entropy_from_logits_with_chunking(x, 64)
        ),
    }.items():
        with torch.no_grad():
            rows.append(measure(name, dtype, without_gradient(function, logits)))
        rows.append(measure(f"{name}, backward", dtype, with_gradient(function, logits)))
    hidden = torch.randn(TOKENS, WIDTH).to(dtype)
    weight = (0.05 * torch.randn(VOCAB, WIDTH)).to(dtype)
    tokens = torch.randint(VOCAB, (TOKENS,))
    head = FusedLinearForPPO()
    name = "FusedLinearForPPO 1024 x 256"

    def fused(h: torch.Tensor, w: torch.Tensor) -> Any:
        return head.forward(h, w, tokens, 0.9)

    with torch.no_grad():
        rows.append(measure(name, dtype, lambda: fused(hidden, weight)))
    rows.append(measure(f"{name}, backward", dtype, with_gradient(fused, hidden, weight)))
    return rows


def statistics_of_tokens() -> list[dict[str, Any]]:
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional as functional
    from verl.workers.config import ActorConfig

    torch.manual_seed(0)
    rows, dtype = [], torch.float32
    x, y, z = (torch.randn(64, 1024) for _ in range(3))
    mask = torch.rand(64, 1024) < 0.7
    near = y + 0.1 * x

    def gae() -> Any:
        return core_algos.compute_gae_advantage_return(x, y, mask.long(), 0.99, 0.95)

    rows.append(measure("compute_gae_advantage_return 64 x 1024", dtype, gae))
    for name, function, tensors in (
        ("masked_mean 64 x 1024, backward", lambda v: functional.masked_mean(v, mask), [x]),
        ("masked_whiten 64 x 1024, backward", lambda v: functional.masked_whiten(v, mask), [x]),
        ("kl_penalty k3 64 x 1024, backward", lambda v: core_algos.kl_penalty(v, y, "k3"), [near]),
        (
            "kl_penalty k3+ 64 x 1024, backward",
            lambda v: core_algos.kl_penalty(v, y, "k3+"),
            [near],
        ),
    ):
        rows.append(measure(name, dtype, with_gradient(function, *tensors)))
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2)
    registry = core_algos.POLICY_LOSS_REGISTRY

    def loss(v: torch.Tensor) -> Any:
        policy_loss = registry.get("rlhf_kernels", registry["vanilla"])
        return policy_loss(y, v, z, mask, "token-mean", config)[0]

    rows.append(measure("policy loss 64 x 1024, backward", dtype, with_gradient(loss, near)))
    return rows


def step(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of an actor through verl's fused head, and through its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional as functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=1
    )
    llama = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    model: Any = LlamaForCausalLM(llama)
    model.to(dtype)
    ids = torch.randint(VOCAB, (4, TOKENS // 4))
    labels = ids.roll(-1, 1)
    advantages = torch.randn(ids.shape)
    mask = torch.rand(ids.shape) < 0.8
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=4)
    registry = core_algos.POLICY_LOSS_REGISTRY
    old = 0.1 * torch.randn(ids.shape) - 11.76  # about -log V

    def run(fused: bool) -> Any:
        hidden = model.model(ids).last_hidden_state
        if fused:
            logprob, entropy = FusedLinearForPPO().forward(hidden, model.lm_head.weight, labels)
        else:
            logits = model.lm_head(hidden)
            logprob = functional.logprobs_from_logits(logits, labels, inplace_backward=False)
            entropy = functional.entropy_from_logits(logits)
        policy_loss = registry.get("rlhf_kernels", registry["vanilla"])
        loss, _ = policy_loss(old, logprob.float(), advantages, mask, "token-mean", config)
        loss = loss - 0.01 * core_algos.agg_loss(entropy, mask, "token-mean")
        grads = torch.autograd.grad(loss, [model.lm_head.weight, model.model.norm.weight])
        return loss.detach(), *grads

    return [
        measure("step, fused head, 1024 tokens", dtype, lambda: run(True)),
        measure("step, logits, 1024 tokens", dtype, lambda: run(False)),
    ]


def machine() -> dict[str, Any]:
    import transformers
    import verl

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "verl": verl.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{'':<56}{'verl':>10}{'ours':>10}   {'verl':>10}{'ours':>10}")
    rows = statistics_of_tokens()
    for dtype in (torch.float32, torch.bfloat16):
        rows += primitives(dtype) + step(dtype)
    if args.out:
        args.out.write_text(json.dumps({**machine(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
