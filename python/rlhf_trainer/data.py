"""Data files, tokens and batches.

Every line of a file is checked before training starts. Masks and labels come from lengths, never
from token ids, so a tokenizer whose pad token is its end-of-sequence token still teaches the model
to stop.
"""

from __future__ import annotations

import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.config import DataError

IGNORE = -100  # the ignore_index of rlhf_kernels
TURN = "\n\nAssistant:"  # what opens the assistant's turn in an HH-RLHF transcript
ERRORS_SHOWN = 5
LARGEST_RANK = torch.finfo(torch.float32).max

Example = TypeVar("Example")
Messages = list[dict[str, str]]


class Prompt(str):
    """A prompt that knows its file and line: whether a tokenizer finds tokens in it shows later."""

    where: str = ""

    @classmethod
    def at(cls, text: str, where: str) -> Prompt:
        prompt = cls(text)
        prompt.where = where
        return prompt


@dataclass(frozen=True)
class Demonstration:
    prompt: str
    response: str


@dataclass(frozen=True)
class Ranking:
    """Completions of one prompt and their ranks: lower is better, equal ranks are ties."""

    prompt: str
    completions: tuple[str, ...]
    ranks: tuple[float, ...]


def comparison(prompt: str, chosen: str, rejected: str) -> Ranking:
    """The ranking of two completions."""
    return Ranking(prompt, (chosen, rejected), (0.0, 1.0))


# --- files ----------------------------------------------------------------------------------------


def read_demonstrations(
    path: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Demonstration]:
    """Read {"prompt", "response"} or {"messages"} lines; the tokenizer's chat template renders
    messages.

    Raises DataError that lists the first bad lines.
    """

    def parse(row: dict[str, Any], where: str) -> Demonstration:
        if "messages" in row:
            messages = _messages(row)
            if messages[-1]["role"] != "assistant":
                raise ValueError(
                    "messages: expected the last one from the assistant, "
                    f"got one from {messages[-1]['role']!r}"
                )
            if not messages[-1]["content"].strip():
                raise ValueError(
                    f"messages[{len(messages) - 1}].content: expected an answer, got blank text"
                )
            prompt = render(messages[:-1], tokenizer)
            whole = render(messages, tokenizer)
            if not whole.startswith(prompt):
                raise ValueError(
                    "messages: the chat template changes the prompt when the answer is added"
                )
            return Demonstration(Prompt.at(prompt, where), whole[len(prompt) :])
        return Demonstration(Prompt.at(_text(row, "prompt"), where), _text(row, "response"))

    return _read(path, parse)


def read_rankings(path: Path) -> list[Ranking]:
    """Read {"prompt", "chosen", "rejected"}, {"prompt", "completions", "ranks"} or HH-RLHF
    {"chosen", "rejected"} lines.

    Raises DataError that lists the first bad lines.
    """

    def parse(row: dict[str, Any], where: str) -> Ranking:
        if "completions" in row:
            return _ranking(row, where)
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if "prompt" in row:
            return comparison(Prompt.at(_text(row, "prompt"), where), chosen, rejected)
        # What the two share may run on into the answers: the cut is at the last turn they both
        # open.
        pairs = enumerate(zip(chosen, rejected, strict=False))
        shared = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
        start = chosen.rfind(TURN, 0, shared)
        if start < 0:
            raise ValueError(
                f"chosen, rejected: expected transcripts that share a prefix up to {TURN!r}"
            )
        cut = start + len(TURN)
        return comparison(Prompt.at(chosen[:cut], where), chosen[cut:], rejected[cut:])

    return _read(path, parse)


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Read {"prompt"} lines, or {"messages"} that end before the assistant's turn.

    Raises DataError that lists the first bad lines.
    """

    def parse(row: dict[str, Any], where: str) -> str:
        if "messages" not in row:
            return Prompt.at(_text(row, "prompt"), where)
        messages = _messages(row)
        if messages[-1]["role"] == "assistant":
            raise ValueError("messages: expected the last one before the assistant's turn")
        return Prompt.at(render(messages, tokenizer), where)

    return _read(path, parse)


def _read(path: Path, parse: Callable[[dict[str, Any], str], Example]) -> list[Example]:
    examples, errors = [], []
    for number, line in _lines(Path(path)):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            examples.append(parse(row, f"{path}:{number}"))
        except json.JSONDecodeError as error:
            errors.append(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            errors.append(f"{path}:{number}: not valid JSON: too many brackets in one another")
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
    _raise_first(errors)
    if not examples:
        raise DataError(f"{path}: no examples")
    return examples


def _raise_first(errors: list[str]) -> None:
    """Raise DataError that lists the first errors, if there are any."""
    if errors:
        more = len(errors) - ERRORS_SHOWN
        tail = [f"and {more} more bad lines"] if more > 0 else []
        raise DataError("\n".join(errors[:ERRORS_SHOWN] + tail))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from error


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"missing key {key!r}; the line has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key}: expected a string, got {type(row[key]).__name__}")
    if not row[key]:
        raise ValueError(f"{key}: expected text, got an empty string")
    return _unicode(row[key], key)


def _unicode(text: str, name: str) -> str:
    """The text; JSON can write half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{name}: expected Unicode text, got the lone surrogate {half!r}"
        ) from None
    return text


def _ranking(row: dict[str, Any], where: str) -> Ranking:
    prompt, completions, ranks = _text(row, "prompt"), row["completions"], row.get("ranks")
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("completions: expected a list of two or more strings")
    for k, completion in enumerate(completions):
        if not isinstance(completion, str) or not completion:
            raise ValueError(f"completions[{k}]: expected text, got {completion!r}")
        _unicode(completion, f"completions[{k}]")
    if not isinstance(ranks, list) or len(ranks) != len(completions):
        raise ValueError(f"ranks: expected a list of {len(completions)} numbers, got {ranks!r}")
    for k, rank in enumerate(ranks):
        number = isinstance(rank, int | float) and not isinstance(rank, bool)
        if not number or not abs(rank) <= LARGEST_RANK:
            raise ValueError(
                f"ranks[{k}]: expected a number that float32 holds, got {reprlib.repr(rank)}"
            )
    return Ranking(Prompt.at(prompt, where), tuple(completions), tuple(ranks))


def _messages(row: dict[str, Any]) -> Messages:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list of one or more messages")
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{k}]: expected an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"messages[{k}].{key}: expected a string, got {message.get(key)!r}"
                )
            _unicode(message[key], f"messages[{k}].{key}")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(
                f"messages[{k}].role: expected system, user or assistant, got {message['role']!r}"
            )
    return messages


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat as text: by the tokenizer's chat template, or as an HH-RLHF transcript where it has
    none.

    A chat that does not end with the assistant's message ends with what opens its turn.
    """
    open_turn = not messages or messages[-1]["role"] != "assistant"
    if tokenizer is not None and tokenizer.chat_template is not None:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        return str(text)
    opening = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": f"{TURN} "}
    text = "".join(opening[message["role"]] + message["content"] for message in messages)
    return text + TURN if open_turn else text


# --- tokens ---------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """One prompt and one of its responses as token ids; the response ends with eos unless it was
    cut."""

    prompt: list[int]
    response: list[int]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, opened as the tokenizer opens a text and never closed.

    Raises DataError that lists the first prompts without tokens.
    """
    encoded, errors = [], []
    for text, ids in zip(texts, _ids(tokenizer, texts, True), strict=True):
        bos = tokenizer.bos_token
        if bos and text.startswith(
            bos
        ):  # a chat template wrote it: the tokenizer must not add another
            (ids,) = _ids(tokenizer, [text], False)
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            name = f"{text.where}: prompt" if isinstance(text, Prompt) else "prompt"
            errors.append(f"{name}: expected text with tokens, got {text!r}")
        encoded.append(ids)
    _raise_first(list(dict.fromkeys(errors)))  # a ranking's prompt comes once a completion
    return encoded


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, eos: bool = True
) -> list[list[int]]:
    """Token ids of responses, closed with one eos (unless eos=False), then cut to max_tokens."""
    close = [tokenizer.eos_token_id] if eos else []
    # A chat template closes its turn itself, often with a newline behind it.
    closed = str(tokenizer.eos_token)
    texts = [text.rstrip() if text.rstrip().endswith(closed) else text for text in texts]
    encoded = _ids(tokenizer, texts, False)
    return [(ids if ids[-1:] == close else ids + close)[:max_tokens] for ids in encoded]


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool
) -> list[list[int]]:
    if not texts:  # which tokenizers do not take
        return []
    return tokenizer(list(texts), add_special_tokens=special).input_ids


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Demonstration], max_tokens: int
) -> list[Encoded]:
    """Demonstrations as token ids; every response is cut to max_tokens."""
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    responses = encode_responses(tokenizer, [example.response for example in examples], max_tokens)
    return [Encoded(*row) for row in zip(prompts, responses, strict=True)]


class EncodedRanking(NamedTuple):
    """The completions of one prompt, best first, and their ranks."""

    rows: list[Encoded]
    ranks: list[float]


def encode_rankings(
    tokenizer: PreTrainedTokenizerBase, rankings: Sequence[Ranking], max_tokens: int
) -> list[EncodedRanking]:
    """Rankings as token ids, best completion first; every completion is cut to max_tokens."""
    examples, ranks = [], []
    for ranking in rankings:
        order = sorted(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k])
        examples += [Demonstration(ranking.prompt, ranking.completions[k]) for k in order]
        ranks.append([ranking.ranks[k] for k in order])
    rows = iter(encode_demonstrations(tokenizer, examples, max_tokens))
    return [EncodedRanking([next(rows) for _ in group], group) for group in ranks]


def left_pad(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, P) with the rows at the right edge, where generation continues
    them."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Positions (B, T) that count valid tokens from 0: padding on the left shifts nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Batch(NamedTuple):
    """Right-padded sequences. `labels[b, j]` is the token that position `columns[j]` has to
    predict, or IGNORE."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    columns: Tensor  # (C,) positions whose logits some row needs; only these reach the head
    labels: Tensor  # (B, C)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))

    def inputs(self) -> dict[str, Tensor]:
        """What a transformers model takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": positions(self.attention_mask),
        }


def collate(rows: Sequence[Encoded], pad: int) -> Batch:
    """One batch whose labels are the response tokens, eos included."""
    width = max(len(row.prompt) + len(row.response) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        length = len(row.prompt) + len(row.response)
        ids[b, :length] = torch.tensor(row.prompt + row.response)
        mask[b, :length] = 1
    first = min(len(row.prompt) for row in rows) - 1
    columns = torch.arange(first, width - 1)
    labels = ids[:, 1:][:, first:].clone()
    ends = mask.sum(1, keepdim=True) - 1
    starts = torch.tensor([[len(row.prompt) - 1] for row in rows])
    labels[(columns < starts) | (columns >= ends)] = IGNORE
    return Batch(ids, mask, columns, labels)


def micro_batches(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# --- order and splits -----------------------------------------------------------------------------


def shuffled(n: int, seed: int, epoch: int, stream: str) -> list[int]:
    """A permutation of range(n) that is a function of its arguments, so a step count is the whole
    data position."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {stream}".encode()))
    return torch.randperm(n, generator=generator).tolist()


def split(
    examples: Sequence[Example], prompts: Sequence[str], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) with about `share` of the prompts held out; no prompt is on both
    sides."""
    unique = sorted(set(prompts))
    count = min(math.ceil(len(unique) * share), len(unique) - 1)
    held = {unique[k] for k in shuffled(len(unique), seed, 0, "split")[:count]}
    return (
        [e for e, p in zip(examples, prompts, strict=True) if p not in held],
        [e for e, p in zip(examples, prompts, strict=True) if p in held],
    )


def fingerprint(examples: object) -> int:
    """A checksum by which a resumed run notices that its data changed."""
    return zlib.crc32(repr(examples).encode())
