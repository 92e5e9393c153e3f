"""What verl's functions, and one actor step, take with and without our kernels.

    python benchmarks/integrations/verl.py --out verl.json

The step is verl's fused head over a body of one layer, or the logits of its head, then its
log-probs, entropies and policy loss, and the backward.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A script's folder comes first on the path, and verl is not this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf_kernels.integrations import verl as adapter  # noqa: E402
from side_by_side import SideBySide, options, tiny_llama, with_gradient  # noqa: E402

VOCAB, TOKENS, WIDTH = 128256, 1024, 256


def primitives(table: SideBySide, dtype: torch.dtype) -> None:
    from verl.utils import torch_functional as functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    torch.manual_seed(0)
    logits = torch.randn(256, VOCAB).to(dtype)
    tokens = torch.randint(VOCAB, (256,))
    for name, function in {
        "logprobs_from_logits 256": lambda x: functional.logprobs_from_logits(x, tokens),
        "entropy_from_logits 256": lambda x: functional.entropy_from_logits(x),
        "entropy_from_logits_with_chunking 256": lambda x: (
            functional.entropy_from_logits_with_chunking(x, 64)
        ),
    }.items():

        def alone(function: Callable[..., torch.Tensor] = function) -> list[torch.Tensor]:
            return [function(logits)]

        with torch.no_grad():
            table.measure(name, dtype, alone)
        table.measure(f"{name}, backward", dtype, with_gradient(function, logits))
    hidden = torch.randn(TOKENS, WIDTH).to(dtype)
    weight = (0.05 * torch.randn(VOCAB, WIDTH)).to(dtype)
    tokens = torch.randint(VOCAB, (TOKENS,))
    head = FusedLinearForPPO()
    name = "FusedLinearForPPO 1024 x 256"

    def fused(h: torch.Tensor, w: torch.Tensor) -> Any:
        return head.forward(h, w, tokens, 0.9)

    with torch.no_grad():
        table.measure(name, dtype, lambda: fused(hidden, weight))
    table.measure(f"{name}, backward", dtype, with_gradient(fused, hidden, weight))


def statistics_of_tokens(table: SideBySide) -> None:
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional as functional
    from verl.workers.config import ActorConfig

    torch.manual_seed(0)
    dtype = torch.float32
    x, y, z = (torch.randn(64, 1024) for _ in range(3))
    mask = torch.rand(64, 1024) < 0.7
    near = y + 0.1 * x

    def gae() -> Any:
        return core_algos.compute_gae_advantage_return(x, y, mask.long(), 0.99, 0.95)

    table.measure("compute_gae_advantage_return 64 x 1024", dtype, gae)
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
        table.measure(name, dtype, with_gradient(function, *tensors))
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2)
    registry = core_algos.POLICY_LOSS_REGISTRY

    def loss(v: torch.Tensor) -> Any:
        policy_loss = registry.get("rlhf_kernels", registry["vanilla"])
        return policy_loss(y, v, z, mask, "token-mean", config)[0]

    table.measure("policy loss 64 x 1024, backward", dtype, with_gradient(loss, near))


def step(table: SideBySide, dtype: torch.dtype) -> None:
    """Forward and backward of an actor through verl's fused head, and through its logits."""
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional as functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig

    torch.manual_seed(0)
    model = tiny_llama(VOCAB, WIDTH, dtype)
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
        return logprob.detach(), entropy.detach(), *grads

    table.measure("step, fused head, 1024 tokens", dtype, lambda: run(True))
    table.measure("step, logits, 1024 tokens", dtype, lambda: run(False))


def main() -> None:
    given = options(__doc__)
    logging.disable(logging.WARNING)
    table = SideBySide("verl", adapter.patched)
    statistics_of_tokens(table)
    for dtype in given.dtypes:
        primitives(table, dtype)
        step(table, dtype)
    if given.out:
        table.write(given.out)


if __name__ == "__main__":
    main()
