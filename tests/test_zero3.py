"""Heads partitioned by DeepSpeed's ZeRO-3, over two gloo processes: those of the whole weight.

Run as a script it is one of the processes.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from rlhf_kernels import full_weight, linear_logprob, linear_token_loss
from rlhf_kernels.backend import why_not

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / ".venv" / "deepspeed"  # `make test` puts it there
RANKS, V = 2, 61
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def test_zero3_empty_lm_head(tmp_path):
    """35 of test_known_bugs.py: what is left of a partitioned weight has no elements. trl 3368,
    5676, 7076"""
    if find_spec("deepspeed") is None and not OVERLAY.exists():
        pytest.skip("DeepSpeed is not installed (make test does)")
    if find_spec("transformers") is None or why_not("linear_logprob", "cpu"):
        pytest.skip("needs transformers and the CPU kernels")
    path = os.pathsep.join([str(OVERLAY), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run_ranks(Path(__file__), tmp_path, RANKS, DS_ACCELERATOR="cpu", PYTHONPATH=path)


def make(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=V, tie_word_embeddings=tied, **sizes, **heads)
    return LlamaForCausalLM(config)


def batch(rank: int) -> torch.Tensor:
    return torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(rank))


def by_logprob(model, ids):
    from rlhf_kernels.integrations.transformers import logprob_forward

    return -logprob_forward(model, ids).sum()


def by_token_loss(model, ids):
    from rlhf_kernels.integrations.transformers import hidden_forward

    hidden, head = hidden_forward(model, ids)
    loss_fn = lambda logprob, entropy: (-logprob.sum(), None)  # noqa: E731
    return linear_token_loss(hidden[:, :-1], tokens=ids[:, 1:], loss_fn=loss_fn, **head._asdict())[
        0
    ]


def by_one_gathered_weight(model, ids):
    """Used twice; the sum over the ranks."""
    from rlhf_kernels.integrations.transformers import hidden_forward

    hidden, head = hidden_forward(model, ids)
    weight = full_weight(head.weight, reduce="sum")
    parts = [linear_logprob(hidden[k, :-1], weight, ids[k, 1:]).sum() for k in range(len(ids))]
    return -sum(parts)


def by_logits(model, ids):
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, ids[:, 1:, None]).sum()


def check(case, tied: bool, rank: int) -> None:
    """Losses and gradients of two steps beside those of a model that is whole."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model, whole = make(tied), make(tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=SETTINGS, optimizer=optimizer)
    for _ in range(2):
        whole.zero_grad()
        for other in range(RANKS):
            loss = by_logits(whole, batch(other)) / RANKS
            loss.backward()
            if other == rank:
                expected = loss.detach() * RANKS
        loss = case(engine, batch(rank))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        engine.backward(loss)
        own = dict(model.named_parameters())
        for name, parameter in whole.named_parameters():
            summed = RANKS if case is by_one_gathered_weight and name == "lm_head.weight" else 1
            gradient = safe_get_full_grad(own[name])
            torch.testing.assert_close(gradient, summed * parameter.grad, rtol=1e-4, atol=1e-5)
        engine.step()
        assert all(p.numel() == 0 for p in own.values())  # nothing is left of what was gathered
        # One by one: of several, DeepSpeed 0.19.6 waits only for the last, and gloo keeps no order.
        for name, parameter in whole.named_parameters():
            with deepspeed.zero.GatheredParameters([own[name]]), torch.no_grad():
                assert own[name].grad is None and not torch.equal(parameter, own[name])
                parameter.copy_(own[name])
    engine.destroy()


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=RANKS
    )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles for a minute
    deepspeed.init_distributed("gloo")
    check(by_logprob, False, rank)
    check(by_logprob, True, rank)
    check(by_token_loss, False, rank)
    check(by_token_loss, True, rank)
    check(by_one_gathered_weight, False, rank)
    print("every case passed")


if __name__ == "__main__":
    main()
