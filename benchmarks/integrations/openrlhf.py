"""What OpenRLHF's functions, and steps of its Actor, take with and without our kernels.

python benchmarks/integrations/openrlhf.py --out openrlhf.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

# A script's folder comes first on the path, and openrlhf is not this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "integrations"))

import openrlhf_stubs  # noqa: E402

from rlhf_kernels.integrations import openrlhf as adapter  # noqa: E402
from side_by_side import SideBySide, options, tiny_llama, with_gradient  # noqa: E402

VOCAB, WIDTH = 128256, 256
ROWS, LENGTH, ACTIONS = 4, 256, 192  # 1024 tokens


def of_time(table: SideBySide) -> None:
    from openrlhf.models import utils
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker

    torch.manual_seed(0)
    values, rewards = torch.randn(2, 64, 1024).unbind()
    mask = torch.rand(64, 1024) > 0.3

    def k3(logprob: Tensor) -> Tensor:
        return utils.compute_approx_kl(logprob, rewards, kl_estimator="k3")

    def advantages() -> tuple[Tensor, ...]:
        return Maker.get_advantages_and_returns(None, values, rewards, mask, 1.0, 0.95)

    def returns() -> tuple[Tensor, ...]:
        return (Maker.get_cumulative_returns(None, rewards, mask, 1.0),)

    dtype = torch.float32
    table.measure("get_advantages_and_returns 64 x 1024", dtype, advantages)
    table.measure("get_cumulative_returns 64 x 1024", dtype, returns)
    table.measure("compute_approx_kl k3 64 x 1024", dtype, lambda: (k3(values),))
    table.measure("compute_approx_kl k3 64 x 1024, backward", dtype, with_gradient(k3, values))


def of_logits(table: SideBySide, dtype: torch.dtype) -> None:
    from openrlhf.models import utils

    torch.manual_seed(0)
    logits = (2 * torch.randn(2, 128, VOCAB)).to(dtype)
    labels = torch.randint(VOCAB, (2, 128))
    for name, function in {
        "log_probs_from_logits 256": lambda x: utils.log_probs_from_logits(x, labels),
        "compute_entropy 256": lambda x: utils.compute_entropy(x),
    }.items():
        table.measure(f"{name}, backward", dtype, with_gradient(function, logits))


def steps(table: SideBySide, dtype: torch.dtype) -> None:
    from openrlhf.models import Actor, PolicyLoss, SFTLoss

    torch.manual_seed(0)
    actor = Actor(tiny_llama(VOCAB, WIDTH, dtype), temperature=0.9)
    actor.packing_samples = False
    sequences = torch.randint(VOCAB, (ROWS, LENGTH))
    attention, mask = torch.ones_like(sequences), torch.ones(ROWS, ACTIONS)
    advantages = torch.randn(ROWS, ACTIONS)

    def scored() -> list[Tensor]:
        with torch.no_grad():
            return [actor(sequences, mask, attention)]

    old = scored()[0] + 0.1 * torch.randn(ROWS, ACTIONS)

    weights = (actor.model.lm_head.weight, actor.model.model.embed_tokens.weight)

    def backward(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    def ppo(entropy: bool = False) -> list[Tensor]:
        logprob, output = actor(
            sequences, mask, attention, return_output=True, return_entropy=entropy
        )
        loss = PolicyLoss()(logprob, old, advantages, mask)[0]
        return backward(loss - 0.01 * output.entropy[:, -ACTIONS:].mean() if entropy else loss)

    def sft() -> list[Tensor]:
        logprob, _ = actor(sequences, None, attention, return_output=True, return_logprobs=True)
        return backward(SFTLoss()(logprob, attention[:, 1:]))

    table.measure("Actor without gradients, 1024 tokens", dtype, scored)
    table.measure("PPO step, 1024 tokens", dtype, ppo)
    table.measure("PPO step with entropy, 1024 tokens", dtype, lambda: ppo(True))
    table.measure("SFT step, 1024 tokens", dtype, sft)
    actor.packing_samples, actor.model.config.use_cache = True, False
    table.measure("PPO step, packed samples, 1024 tokens", dtype, ppo)


def main() -> None:
    given = options(__doc__)
    openrlhf_stubs.install()
    import openrlhf.trainer.ppo_utils.experience_maker  # noqa: F401

    table = SideBySide("openrlhf", adapter.patched)
    of_time(table)
    for dtype in given.dtypes:
        of_logits(table, dtype)
        steps(table, dtype)
    if given.out:
        table.write(given.out)


if __name__ == "__main__":
    main()
