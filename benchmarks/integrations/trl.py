"""What TRL's functions, and one step of a model, take with and without our kernels.

    python benchmarks/integrations/trl.py --out trl.json

Each pair is first compared, then timed interleaved: the median, and the most bytes that the
allocator held beside what stood before. The step is TRL's fused head over a body of one layer (TRL
1.12: the logits of the model and selective_log_softmax), half of the positions masked, with the
backward. With TRL 1.12 also the functions of PPO beside operators that could take their place.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

import rlhf_kernels
from rlhf_kernels.integrations import trl as adapter

# A script's folder comes first on the path, and trl is not this file.
sys.path[:] = [x for x in sys.path if Path(x).resolve() != Path(__file__).resolve().parent]
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

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


def measure(name: str, dtype: torch.dtype, theirs: Call, ours: Call | None = None) -> dict:
    """Calls return tensors to compare; without ``ours`` it is ``theirs``, patched."""
    calls = {"trl": theirs, "ours": ours or theirs}
    sides: dict[str, Any] = {"trl": contextlib.nullcontext, "ours": contextlib.nullcontext}
    if ours is None:
        sides["ours"] = adapter.patched
    with sides["ours"]():
        got = calls["ours"]()
    for a, b in zip(theirs(), got, strict=True):
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(b.float(), a.float(), rtol=bound, atol=bound)
    del got
    times: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(ROUNDS):
        for who, side in sides.items():
            with side():
                begin = time.perf_counter()
                calls[who]()
                times[who].append(1e3 * (time.perf_counter() - begin))
    row: dict[str, Any] = {"name": name, "dtype": str(dtype).removeprefix("torch.")}
    for who, side in sides.items():
        row[f"{who}_ms"] = round(statistics.median(times[who]), 3)
        with side():
            row[f"{who}_mib"] = round(peak(calls[who]), 1)
    print(
        f"{name:<46}{row['dtype']:<10}"
        f"{row['trl_ms']:>10.2f}{row['ours_ms']:>10.2f} ms"
        f"{row['trl_mib']:>10.1f}{row['ours_mib']:>10.1f} MiB",
        flush=True,
    )
    return row


def with_gradient(function: Callable[..., Any], *tensors: torch.Tensor) -> Call:
    """The results and the gradients of their sum over the first half of the tokens."""

    def call() -> Any:
        inputs = [x.detach().requires_grad_() for x in tensors]
        out = function(*inputs)
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        loss = sum(x.flatten()[: x.numel() // 2].float().sum() for x in outputs if x.requires_grad)
        return *(x.detach() for x in outputs), *torch.autograd.grad(loss, inputs)

    return call


def primitives(dtype: torch.dtype, new: bool) -> Iterator[dict[str, Any]]:
    from trl.trainer import utils

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(dtype)
    tokens = torch.randint(VOCAB, (TOKENS,))

    def head(h: torch.Tensor, w: torch.Tensor, outputs: tuple[str, ...]) -> Any:
        args: tuple[Any, ...] = (h, w, None, tokens) if new else (h, w, tokens)
        args += (0.9, 32768 if new else 8192, None, 1.0)
        return utils._ChunkedLogProbFunction.apply(*args, *((outputs,) if new else ()))

    asked: dict[str, tuple[str, ...]] = {"entropy": ("entropy",)}
    if new:
        asked["SFT's outputs"] = ("entropy", "is_top1")
        asked["all outputs"] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    with torch.no_grad():
        yield measure("head, entropy", dtype, lambda: numbers(head(hidden, weight, ("entropy",))))
    for name, outputs in asked.items():
        call = with_gradient(lambda h, w, x=outputs: head(h, w, x), hidden, weight)
        yield measure(f"head, {name}, backward", dtype, call)
    if new and dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            call = with_gradient(lambda h, w: head(h, w, ("entropy",)), hidden, weight)
            yield measure("head, entropy, autocast, backward", torch.bfloat16, call)
    logits = torch.randn(2, 128, VOCAB).to(dtype)
    index = torch.randint(VOCAB, (2, 128))
    functions: dict[str, Callable[..., Any]] = {
        "selective_log_softmax 256": lambda x: utils.selective_log_softmax(x, index),
        "entropy_from_logits 256": lambda x: utils.entropy_from_logits(x),
    }
    if new:
        functions["selective_log_softmax_and_entropy 256"] = lambda x: (
            utils.selective_log_softmax_and_entropy(x, index, temperature=0.9)
        )
    for name, function in functions.items():

        def call_it(function: Callable[..., Any] = function) -> list[torch.Tensor]:
            return numbers(function(logits))

        with torch.no_grad():
            yield measure(name, dtype, call_it)
        yield measure(f"{name}, backward", dtype, with_gradient(function, logits))


def numbers(out: Any) -> list[torch.Tensor]:
    """The outputs to compare: is_top1 may differ where two logits differ by a rounding."""
    outputs = out if isinstance(out, tuple) else (out,)
    return [x for x in outputs if x is not None and x.is_floating_point()]


def ppo() -> Iterator[dict[str, Any]]:
    """Functions that are left alone; the operators do less there than they have to: NaN of TRL's
    in masked places, and what it leaves in them, would have to be put back."""
    from trl.experimental.ppo import ppo_trainer

    values, mask = torch.randn(64, 1024), torch.rand(64, 1024) < 0.8
    yield measure(
        "masked_mean 64 x 1024",
        torch.float32,
        lambda: (ppo_trainer.masked_mean(values, mask),),
        lambda: (rlhf_kernels.masked_mean(values, mask),),
    )
    yield measure(
        "masked_whiten 64 x 1024",
        torch.float32,
        lambda: (ppo_trainer.masked_whiten(values, mask) * mask,),
        lambda: (rlhf_kernels.masked_whiten(values, mask),),
    )


def step(dtype: torch.dtype, new: bool) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer import utils

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    if new:
        utils.add_fused_lm_head(model, outputs=("entropy", "is_top1"))
    ids = torch.randint(VOCAB, (2, TOKENS // 2))
    labels = ids.clone()
    labels[:, : TOKENS // 4] = -100

    def call() -> list[torch.Tensor]:
        model.zero_grad()
        if new:
            loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
        else:
            logprob = utils.selective_log_softmax(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
            loss = -logprob[:, TOKENS // 4 :].float().mean()
        loss.backward()
        weights = (model.lm_head.weight, model.model.embed_tokens.weight)
        return [loss.detach(), *(w.grad.clone() for w in weights)]

    return measure(f"step, {TOKENS} tokens, half masked", dtype, call)


def machine() -> dict[str, Any]:
    import transformers
    import trl

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    import trl

    new = int(trl.__version__.split(".")[1]) >= 14
    print(f"{'':<56}{'TRL':>10}{'ours':>10}   {'TRL':>10}{'ours':>10}")
    rows = [] if new else list(ppo())
    for dtype in (torch.float32, torch.bfloat16):
        rows += primitives(dtype, new)
        rows.append(step(dtype, new))
    if options.out:
        record = {**machine(), "results": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
