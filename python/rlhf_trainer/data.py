"""Data files, tokens and batches.

Every line of a file is checked before training starts. Masks and labels come from lengths, never
from token ids, so a tokenizer whose pad token is its end-of-sequence token still teaches the model
to stop.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import reprlib
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.chat import (
    TURN,
    Messages,
    check_answer,
    check_question,
    check_unicode,
    read_transcript,
    render,
    render_turn,
)
from rlhf_trainer.config import DataError, OnBadLine
from rlhf_trainer.tokens import closing_ids

IGNORE = -100  # the ignore_index of rlhf_kernels
ERRORS_SHOWN = 5
LARGEST_RANK = torch.finfo(torch.float32).max

Example = TypeVar("Example")
# A file, or examples in memory: of the reader's own kind, or dicts that hold what a line holds.
Source = Path | str | Iterable[Any]


class Prompt(str):
    """A prompt that knows its file and line: whether a tokenizer finds tokens in it shows later.

    `columns` are what else a line of prompts held; a reward function may ask for them.
    """

    where: str = ""
    columns: Mapping[str, Any] = types.MappingProxyType({})

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
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str = "examples",
    on_bad_line: OnBadLine = "error",
) -> list[Demonstration]:
    """Read {"prompt", "response"} or {"messages"} lines; chats are rendered as chat.py says.

    Raises DataError that lists the first bad lines.
    """

    def parse(row: dict[str, Any], where: str) -> Demonstration:
        if "messages" in row and "response" not in row:
            messages = check_answer(row["messages"], "messages")
            prompt, response = render_turn(messages[:-1], messages[-1:], tokenizer)
        else:
            prompt, (response,) = _answers(row, {"response": _given(row, "response")}, tokenizer)
        return Demonstration(Prompt.at(prompt, where), response)

    return _read(source, parse, Demonstration, name, on_bad_line)


def read_rankings(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str = "examples",
    on_bad_line: OnBadLine = "error",
) -> list[Ranking]:
    """Read {"prompt", "chosen", "rejected"} or {"prompt", "completions", "ranks"} lines, with
    "messages" in place of "prompt" for chats, or whole chats {"chosen", "rejected"}, as messages or
    as HH-RLHF's transcripts.

    Raises DataError that lists the first bad lines.
    """

    def parse(row: dict[str, Any], where: str) -> Ranking:
        if "completions" in row:
            named, ranks = _ranked(row)
            prompt, completions = _answers(row, named, tokenizer)
            return Ranking(Prompt.at(prompt, where), tuple(completions), ranks)
        named = {key: _given(row, key) for key in ("chosen", "rejected")}
        whole = all(isinstance(chat, list) for chat in named.values())
        asked = "messages" in row or isinstance(row.get("prompt"), list)
        if asked or ("prompt" in row and not whole):
            prompt, completions = _answers(row, named, tokenizer)
        else:  # a plain prompt beside whole chats is in them
            prompt, completions = _chats(named, tokenizer)
        return comparison(Prompt.at(prompt, where), *completions)

    return _read(source, parse, Ranking, name, on_bad_line)


def read_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str = "prompts",
    on_bad_line: OnBadLine = "error",
) -> list[str]:
    """Read {"prompt"} lines, or {"messages"} that end before the assistant's turn. What else a line
    holds becomes the prompt's `columns`.

    Raises DataError that lists the first bad lines.
    """

    def parse(row: dict[str, Any], where: str) -> str:
        question = _question(row)
        text = question if isinstance(question, str) else render(question, tokenizer)
        return Prompt.at(text, where)

    def parse_all(row: dict[str, Any], where: str) -> Prompt:
        prompt = Prompt.at(parse(row, where), where)
        prompt.columns = {k: v for k, v in row.items() if k not in ("prompt", "messages")}
        return prompt

    return _read(source, parse_all, str, name, on_bad_line)


def _question(row: dict[str, Any]) -> str | Messages:
    """What an answer follows: a line's "messages", or its "prompt", which may hold messages too."""
    key = "messages" if "messages" in row else "prompt"
    if key == "messages" or isinstance(row.get(key), list):
        return check_question(row[key], key)
    return _text(row, key)


def _answers(
    row: dict[str, Any], named: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, list[str]]:
    """(prompt, responses) as text: a plain prompt takes plain responses as they are, messages take
    text or messages."""
    question = _question(row)
    if isinstance(question, str):
        return question, [_text(named, name) for name in named]
    turns = []
    for name, answer in named.items():
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": _text(named, name)}]
        turns.append(render_turn(question, check_answer(answer, name), tokenizer))
    return turns[0][0], [response for _, response in turns]


def _chats(
    named: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, list[str]]:
    """(prompt, responses) of two whole chats, cut at the last turn of the assistant that both
    open."""
    if not any(isinstance(chat, list) for chat in named.values()):
        texts = [_text(named, name) for name in named]
        if tokenizer is None or tokenizer.chat_template is None:
            return _cut_transcripts(*texts)
        named = {name: read_transcript(text, name) for name, text in named.items()}
    one, two = (check_answer(chat, name) for name, chat in named.items())
    pairs = enumerate(zip(one, two, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(one), len(two)) - 1)
    while shared >= 0 and not one[shared]["role"] == two[shared]["role"] == "assistant":
        shared -= 1
    if shared <= 0:  # answers alone: a plain prompt beside them would be lost
        raise ValueError("chosen, rejected: expected chats that share what comes before an answer")
    turns = [render_turn(one[:shared], chat[shared:], tokenizer) for chat in (one, two)]
    return turns[0][0], [response for _, response in turns]


def _cut_transcripts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    # What the two share may run on into the answers: the cut is at the last turn they both open.
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    start = chosen.rfind(TURN, 0, shared)
    if start < 0:
        raise ValueError(
            f"chosen, rejected: expected transcripts that share a prefix up to {TURN!r}"
        )
    cut = start + len(TURN)
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _read(
    source: Source,
    parse: Callable[[dict[str, Any], str], Example],
    kind: type[Example],
    name: str,
    on_bad_line: OnBadLine,
) -> list[Example]:
    examples: list[Example] = []
    errors, count = [], 0
    where_all = str(source) if isinstance(source, str | Path) else name
    for where, item in _items(source, name):
        count += 1
        try:
            if not isinstance(item, kind):
                row = json.loads(item) if isinstance(item, bytes) else item
                if not isinstance(row, dict):
                    expected = "JSON object" if isinstance(item, bytes) else "dict"
                    raise ValueError(f"expected a {expected}, got {type(row).__name__}")
                item = parse(row, where)
                _check_answers(item, row)
            examples.append(item)
        except json.JSONDecodeError as error:
            errors.append(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            errors.append(f"{where}: not valid JSON: too many brackets in one another")
        except ValueError as error:
            errors.append(f"{where}: {error}")
    hint = ["(--on-bad-line skip leaves them out and counts them)"] if examples else []
    policy = on_bad_line if examples else "error"
    _settle(errors, policy, f"of {count} examples of {where_all}", hint)
    if not examples and (isinstance(source, str | Path) or name != "heldout"):
        raise DataError(f"{where_all}: no examples")
    return examples


def _items(source: Source, name: str) -> Iterator[tuple[str, Any]]:
    """The lines of a file, as bytes, or the examples in memory, and where each of them is."""
    if isinstance(source, str | Path):
        for number, line in _lines(Path(os.path.expanduser(source))):
            yield f"{source}:{number}", line
    else:
        for k, item in enumerate(source):
            yield f"{name}[{k}]", item


def _check_answers(example: object, row: dict[str, Any]) -> None:
    """Raise ValueError for a blank answer, and for one text of which two ranks are claimed."""
    answers: tuple[str, ...] = ()
    ranks: tuple[float, ...] = ()
    if isinstance(example, Demonstration):
        answers, ranks, names = (example.response,), (0.0,), ["response"]
    elif isinstance(example, Ranking):
        answers, ranks, names = example.completions, example.ranks, ["chosen", "rejected"]
        if "completions" in row:
            names = [f"completions[{k}]" for k in range(len(answers))]
    seen: dict[str, int] = {}
    for k, answer in enumerate(answers):
        if not answer.strip():
            raise ValueError(f"{names[k]}: expected an answer, got blank text")
        first = seen.setdefault(answer, k)
        if ranks[first] != ranks[k]:
            raise ValueError(
                f"{names[first]}, {names[k]}: expected different answers where one is better, "
                f"got the same text: {reprlib.repr(answer)}"
            )


def _settle(
    errors: Sequence[str], on_bad_line: OnBadLine, among: str, hint: Sequence[str] = ()
) -> None:
    """Raise DataError that lists the first errors, if there are any; or, where the run skips bad
    lines, say how many there were."""
    if errors and on_bad_line == "skip":
        print(f"skipped {len(errors)} {among}; the first: {errors[0]}")
    elif errors:
        more = len(errors) - ERRORS_SHOWN
        tail = [f"and {more} more bad lines"] if more > 0 else []
        raise DataError("\n".join([*errors[:ERRORS_SHOWN], *tail, *hint]))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        where = f" after line {number}" if number else ""
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read{where}: {reason}") from error


def _given(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"missing key {key!r}; the line has {', '.join(map(repr, row)) or 'none'}")
    return row[key]


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(_given(row, key), str):
        raise ValueError(f"{key}: expected a string, got {type(row[key]).__name__}")
    if not row[key]:
        raise ValueError(f"{key}: expected text, got an empty string")
    return check_unicode(row[key], key)


def _ranked(row: dict[str, Any]) -> tuple[dict[str, Any], tuple[float, ...]]:
    """The completions by the names that errors give them, and their ranks."""
    completions, ranks = row["completions"], row.get("ranks")
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("completions: expected a list of two or more answers")
    if not isinstance(ranks, list) or len(ranks) != len(completions):
        raise ValueError(f"ranks: expected a list of {len(completions)} numbers, got {ranks!r}")
    for k, rank in enumerate(ranks):
        number = isinstance(rank, int | float) and not isinstance(rank, bool)
        if not number or not abs(rank) <= LARGEST_RANK:
            raise ValueError(
                f"ranks[{k}]: expected a number that float32 holds, got {reprlib.repr(rank)}"
            )
    named = {f"completions[{k}]": completion for k, completion in enumerate(completions)}
    return named, tuple(ranks)


# --- tokens ---------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """One prompt and one of its responses as token ids; the response ends with eos unless it was
    cut."""

    prompt: list[int]
    response: list[int]
    cut: bool = False


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], on_bad_line: OnBadLine = "error"
) -> list[list[int]]:
    """Token ids of prompts, opened as the tokenizer opens a text and never closed.

    Raises DataError that lists the first prompts without tokens; with on_bad_line skip they come
    out empty.
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
    errors = list(dict.fromkeys(errors))  # a ranking's prompt comes once a completion
    _settle(errors, on_bad_line, f"of {len(set(texts))} prompts")
    return encoded


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int | None,
    eos: bool = True,
) -> list[list[int]]:
    """Token ids of responses, closed with one eos unless eos=False or their chat template closed
    them, then cut to max_tokens."""
    closing = closing_ids(tokenizer)
    # A chat template closes its turn itself, often with a newline behind it.
    closed = tuple(tokenizer.convert_ids_to_tokens(closing))
    texts = [text.rstrip() if text.rstrip().endswith(closed) else text for text in texts]
    encoded = _ids(tokenizer, texts, False)
    if eos:
        close = [tokenizer.eos_token_id]
        encoded = [ids if ids and ids[-1] in closing else ids + close for ids in encoded]
    return [ids[:max_tokens] for ids in encoded]


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool
) -> list[list[int]]:
    if not texts:  # which tokenizers do not take
        return []
    return tokenizer(list(texts), add_special_tokens=special).input_ids


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Demonstration],
    max_tokens: int,
    on_bad_line: OnBadLine = "error",
) -> list[Encoded]:
    """Demonstrations as token ids; every response is cut to max_tokens. Prompts without tokens are
    left as encode_prompts leaves them."""
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples], on_bad_line)
    responses = encode_responses(tokenizer, [example.response for example in examples], None)
    return [
        Encoded(prompt, response[:max_tokens], len(response) > max_tokens)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def count_cut(rows: Iterable[Encoded]) -> int:
    """How many responses were cut, and so do not teach where to end."""
    return sum(row.cut for row in rows)


class EncodedRanking(NamedTuple):
    """The completions of one prompt, best first, and their ranks."""

    rows: list[Encoded]
    ranks: list[float]

    @property
    def teaches(self) -> bool:
        """Whether two completions differ in rank, and in tokens: the cut to a length may leave the
        same."""
        first = self.rows[0].response
        return len(set(self.ranks)) > 1 and any(row.response != first for row in self.rows)


def encode_rankings(
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    max_tokens: int,
    on_bad_line: OnBadLine = "error",
) -> list[EncodedRanking]:
    """Rankings as token ids, best completion first; every completion is cut to max_tokens."""
    examples, ranks = [], []
    for ranking in rankings:
        order = sorted(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k])
        examples += [Demonstration(ranking.prompt, ranking.completions[k]) for k in order]
        ranks.append([ranking.ranks[k] for k in order])
    rows = iter(encode_demonstrations(tokenizer, examples, max_tokens, on_bad_line))
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
