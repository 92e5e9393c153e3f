"""Sampling: continuations of prompts, from the distribution that the log-probabilities
describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf_trainer.config import DivergedError
from rlhf_trainer.data import encode_prompts, left_pad
from rlhf_trainer.tokens import stop_ids


@dataclass
class Samples:
    """Sampled continuations: left-padded prompts of width P, then responses of width R."""

    input_ids: Tensor  # (B, P + R)
    attention_mask: Tensor  # (B, P + R)
    mask: Tensor  # (B, R) bool: response tokens up to and with the first stop id
    ended: Tensor  # (B,) bool: whether a stop id came

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.mask.shape[1]

    @property
    def tokens(self) -> Tensor:
        """Response tokens (B, R); garbage where the mask is False."""
        return self.input_ids[:, self.prompt_width :]

    def responses(self) -> list[list[int]]:
        """The valid response tokens of each row."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.mask, strict=True)]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The text of each row, without what stopped it and without special tokens."""
        rows = zip(self.responses(), self.ended.tolist(), strict=True)
        said = [row[:-1] if ended else row for row, ended in rows]
        return tokenizer.batch_decode(said, skip_special_tokens=True)


class FiniteScores(LogitsProcessor):
    """Draws from rows of scores that are not finite anything at all, and notes it: multinomial
    fails on them, on a GPU for good. Nothing waits for the device."""

    def __init__(self) -> None:
        self.odd: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        odd = ~scores.amax(-1, keepdim=True).isfinite()  # NaN and inf win; -inf alone is left over
        self.odd = odd.any() if self.odd is None else self.odd | odd.any()
        return scores.masked_fill(odd, 0.0)

    def check(self) -> None:
        """Raise DivergedError where a score was not finite."""
        if self.odd is not None and bool(self.odd):
            raise DivergedError("expected finite logits to sample from, got NaN or infinity")


class Heard(StoppingCriteria):
    """Stops nothing: generate() tells it of every token."""

    def __init__(self, prompt_width: int, on_token: Callable[[int], None]) -> None:
        self.prompt_width, self.on_token = prompt_width, on_token

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.on_token(input_ids.shape[1] - self.prompt_width)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_response_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    on_token: Callable[[int], None] = lambda count: None,
) -> Samples:
    """Sample one continuation of each prompt from the model's whole distribution (temperature 0:
    greedy), up to the first of stop_ids. on_token hears how many tokens each sequence of the batch
    has after every step.

    Raises DivergedError where the model's logits are not finite.
    """
    stops, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id
    prompt_ids, prompt_mask = (t.to(model.device) for t in left_pad(prompts, pad))
    settings = GenerationConfig(
        max_new_tokens=max_response_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        eos_token_id=stops,
        pad_token_id=pad,
    )
    # generate() fills what is unset from the model's own settings: a repetition penalty or top_k
    # there would sample from another distribution than the log-probabilities describe.
    own, model.generation_config = model.generation_config, settings
    training = model.training
    model.eval()
    parts, finite = [], FiniteScores()
    try:
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            output = model.generate(  # type: ignore[operator]
                input_ids=prompt_ids[rows],
                attention_mask=prompt_mask[rows],
                generation_config=settings,
                logits_processor=[finite],
                stopping_criteria=StoppingCriteriaList([Heard(prompt_ids.shape[1], on_token)]),
            )
            parts.append(output[:, prompt_ids.shape[1] :])
    finally:
        model.generation_config = own
        model.train(training)
    finite.check()
    width = max(part.shape[1] for part in parts)
    tokens = torch.cat([nn.functional.pad(p, (0, width - p.shape[1]), value=pad) for p in parts])
    is_stop = torch.isin(tokens, torch.tensor(stops, device=tokens.device))
    mask = is_stop.cumsum(1) - is_stop.long() == 0
    return Samples(
        input_ids=torch.cat([prompt_ids, tokens], 1),
        attention_mask=torch.cat([prompt_mask, mask.long()], 1),
        mask=mask,
        ended=is_stop.any(1),
    )


@dataclass(frozen=True)
class Response:
    """A sampled response: its text without special tokens, its ids (the one that stopped it
    included), whether it ended."""

    text: str
    ids: list[int]
    ended: bool


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_response_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int | None = None,
) -> list[Response]:
    """Sampled answers to prompts given as text. With a seed, torch's random state is left as it
    was."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        samples = sample(
            model,
            tokenizer,
            encode_prompts(tokenizer, prompts),
            max_response_tokens=max_response_tokens,
            temperature=temperature,
            batch_size=batch_size,
        )
    ids = samples.responses()
    ended = samples.ended.tolist()
    return [Response(*row) for row in zip(samples.texts(tokenizer), ids, ended, strict=True)]
