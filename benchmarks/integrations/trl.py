"""What TRL's functions, and one step of a model, take with and without our kernels.

    python benchmarks/integrations/trl.py --out trl.json

The step is TRL's fused head over a body of one layer (TRL 1.12: the logits of the model and
selective_log_softmax), half of the positions masked, with the backward. With TRL 1.12 also the
functions of PPO beside operators that could take their place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A script's folder comes first on the path, and trl is not this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import rlhf_kernels  # noqa: E402
from rlhf_kernels.integrations import trl as adapter  # noqa: E402
from side_by_side import (  # noqa: E402
    SideBySide,
    options,
    tensors_of,
    tiny_llama,
    with_gradient,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
VOCAB, TOKENS, WIDTH = 128256, 1024, 256


def head(table: SideBySide, dtype: torch.dtype, new: bool) -> None:
    call_of = head_calls(TOKENS, WIDTH, dtype, new)
    entropy, *inputs = call_of(("entropy",))
    with torch.no_grad():
        table.measure("head, entropy", dtype, lambda: tensors_of(entropy(*inputs)))
    asked: dict[str, tuple[str, ...]] = {"entropy": ("entropy",)}
    if new:
        asked["SFT's outputs"] = ("entropy", "is_top1")
        asked["all outputs"] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for name, outputs in asked.items():
        call = with_gradient(*call_of(outputs), fraction=0.5)
        table.measure(f"head, {name}, backward", dtype, call)


def wide_head(table: SideBySide) -> None:
    """As under a trainer with bf16=True, at a width where the products count."""
    entropy, *inputs = head_calls(256, 2048, torch.float32, True)(("entropy",))
    with torch.autocast("cpu", torch.bfloat16):
        name = "head 256 x 2048, entropy, autocast"
        with torch.no_grad():
            table.measure(name, torch.bfloat16, lambda: tensors_of(entropy(*inputs)))
        call = with_gradient(entropy, *inputs, fraction=0.5)
        table.measure(f"{name}, backward", torch.bfloat16, call)


def head_calls(tokens: int, width: int, dtype: torch.dtype, new: bool) -> Callable[..., Any]:
    """(the head with some outputs, hidden, weight)."""
    from trl.trainer import utils

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(VOCAB, width) / width**0.5).to(dtype)
    targets = torch.randint(VOCAB, (tokens,))

    def of(outputs: tuple[str, ...]) -> Any:
        def head(h: torch.Tensor, w: torch.Tensor) -> Any:
            args: tuple[Any, ...] = (h, w, None, targets) if new else (h, w, targets)
            args += (0.9, 32768 if new else 8192, None, 1.0)
            args += (outputs,) if new else ()
            return utils._ChunkedLogProbFunction.apply(*args)

        return head, hidden, weight

    return of


def of_logits(table: SideBySide, dtype: torch.dtype, new: bool) -> None:
    from trl.trainer import utils

    torch.manual_seed(0)
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

        def alone(function: Callable[..., Any] = function) -> list[torch.Tensor]:
            return tensors_of(function(logits))

        with torch.no_grad():
            table.measure(name, dtype, alone)
        table.measure(f"{name}, backward", dtype, with_gradient(function, logits))


def ppo(table: SideBySide) -> None:
    """Functions that are left alone; the operators do less there than they have to: NaN of TRL's
    in masked places, and what it leaves in them, would have to be put back."""
    from trl.experimental.ppo import ppo_trainer

    values, mask = torch.randn(64, 1024), torch.rand(64, 1024) < 0.8
    table.measure(
        "masked_mean 64 x 1024",
        torch.float32,
        lambda: (ppo_trainer.masked_mean(values, mask),),
        lambda: (rlhf_kernels.masked_mean(values, mask),),
    )
    table.measure(
        "masked_whiten 64 x 1024",
        torch.float32,
        lambda: (ppo_trainer.masked_whiten(values, mask) * mask,),
        lambda: (rlhf_kernels.masked_whiten(values, mask),),
    )


def step(table: SideBySide, dtype: torch.dtype, new: bool) -> None:
    from trl.trainer import utils

    torch.manual_seed(0)
    model = tiny_llama(VOCAB, WIDTH, dtype)
    if new:
        utils.add_fused_lm_head(model, outputs=("entropy", "is_top1"))
    ids = torch.randint(VOCAB, (2, TOKENS // 2))
    labels = ids.clone()
    labels[:, : TOKENS // 4] = -100

    def call() -> list[torch.Tensor]:
        if new:
            loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
        else:
            logprob = utils.selective_log_softmax(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
            loss = -logprob[:, TOKENS // 4 :].float().mean()
        weights = (model.lm_head.weight, model.model.embed_tokens.weight)
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    table.measure(f"step, {TOKENS} tokens, half masked", dtype, call)


def main() -> None:
    given = options(__doc__)
    import trl

    new = tuple(map(int, trl.__version__.split(".")[:2])) >= (1, 14)
    table = SideBySide("trl", adapter.patched)
    if not new:
        ppo(table)
    for dtype in given.dtypes:
        head(table, dtype, new)
        of_logits(table, dtype, new)
        step(table, dtype, new)
    if new and torch.bfloat16 in given.dtypes:
        wide_head(table)
    if given.out:
        table.write(given.out)


if __name__ == "__main__":
    main()
