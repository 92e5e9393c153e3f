"""How long an iteration of PPO will take, from a trial of seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.config import PPOConfig
from rlhf_trainer.progress import duration
from rlhf_trainer.sampling import sample

TRIAL = 1.0  # seconds that each part of the trial may take, about
STEPS = 4  # tokens sampled in it


def forecast(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    config: PPOConfig,
    judged: bool,
    iterations: int,
) -> str:
    """A line on the time that iterations with such prompts take where no response ends early.

    `judged`: by a reward model, which the trial takes to be as large as the policy. No random state
    changes.
    """
    with torch.random.fork_rng(devices=[]):
        body, head = seconds_per_token(policy, prompts, config)
        sampling = sampling_seconds(policy, tokenizer, prompts, config, body + head)
    length = max(map(len, prompts)) + config.max_response_tokens
    # Policy, reference, value function and judge once, then two with gradients, which take three
    # passes; the heads of the first two for log-probs and for the KL, of the policy with gradients.
    bodies = (3 + judged + 6 * config.inner_epochs) * body * length
    heads = (4 + 3 * config.inner_epochs) * head * config.max_response_tokens
    learning = len(prompts) * (bodies + heads)
    whole = sampling + learning
    return (
        f"ppo: an iteration of {config.batch_size} episodes of up to {config.max_response_tokens} "
        f"tokens takes up to about {duration(whole)} here ({duration(sampling)} of sampling, "
        f"{duration(learning)} of scoring and learning), all {iterations} of them "
        f"{duration(whole * iterations)}"
    )


def seconds_per_token(
    policy: PreTrainedModel, prompts: Sequence[list[int]], config: PPOConfig
) -> tuple[float, float]:
    """Of a forward pass without its head, and of the head, in micro-batches or in what of one fits
    the trial."""
    length = max(map(len, prompts)) + config.max_response_tokens

    @torch.no_grad()
    def forward(model: torch.nn.Module, rows: int, columns: int) -> float:
        ids = torch.full((rows, columns), prompts[0][0], device=policy.device)
        return _seconds(lambda: model(input_ids=ids, use_cache=False)) / ids.numel()

    columns = min(length, 16)
    forward(policy, 1, columns)  # the first pass of a process pays for more than itself
    rough = forward(policy, 1, columns)
    columns = min(length, max(int(TRIAL / rough), columns))
    rows = min(config.micro_batch_size, max(int(TRIAL / (rough * columns)), 1))
    body, whole = (forward(model, rows, columns) for model in (policy.base_model, policy))
    return body, max(whole - body, 0.0)


def sampling_seconds(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    config: PPOConfig,
    token: float,
) -> float:
    """Of all prompts' responses: some tokens are sampled where the responses are half done."""
    width, response = max(map(len, prompts)), config.max_response_tokens
    at_once = min(len(prompts), config.rollout_batch_size)
    rows = min(at_once, max(int(TRIAL / token), 1))
    columns = min(width + response // 2, max(int(TRIAL / (token * rows)), 1))
    begun = [[prompts[0][0]] * columns] * rows

    def seconds(tokens: int) -> tuple[float, int]:
        """What sampling so many takes, and how many it were."""
        drawn: list[int] = []
        time_taken = _seconds(
            lambda: sample(
                policy,
                tokenizer,
                begun,
                max_response_tokens=tokens,
                temperature=config.temperature,
                batch_size=rows,
                on_token=drawn.append,
            )
        )
        return time_taken, len(drawn)

    (first, _), (more, count) = seconds(1), seconds(1 + STEPS)
    step = max(more - first, 0.0) / max(count - 1, 1) * at_once / rows
    return math.ceil(len(prompts) / at_once) * response * step + token * len(prompts) * width


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
