"""What token ids mean: which ones end a response, which one pads, and whether two tokenizers
agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.chat import turn_end


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows an embedding needs; ids may leave holes."""
    return max(tokenizer.get_vocab().values()) + 1


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that close a response as text: eos, and the special token by which the chat template
    ends the assistant's turn, where that is another one."""
    ids = [tokenizer.eos_token_id]
    end = turn_end(tokenizer)
    if end:
        last = tokenizer(end, add_special_tokens=False).input_ids[-1]
        special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
        if last in special.union(tokenizer.all_special_ids) and last not in ids:
            ids.append(last)
    return ids


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a sampled response: those of the model's generation settings, and those that
    close a response as text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*own, *closing_ids(tokenizer)]))


def keep_stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model that generates stop at stop_ids wherever it is loaded."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        stops = stop_ids(model, tokenizer)
        settings.eos_token_id = stops if len(stops) > 1 else stops[0]


def own_pad(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> PreTrainedTokenizerBase:
    """A copy that pads on the right with a token that ends no text.

    transformers' sequence classifiers read the score at the last token that is not the pad token:
    were it one that ends texts, they would read the one before.
    """
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = "right"
    if padded.pad_token_id in ends:
        padded.add_special_tokens({"pad_token": "<pad>"})
    return padded


def conflict(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, extra: bool = False
) -> str | None:
    """The first difference in what the two make of text and ids, as a clause; None where all ids
    of ours mean the same to theirs.

    Pad tokens may differ, as no text holds them. extra=True: ours may have tokens at ids that
    theirs leaves free.
    """
    here, there = ours.get_vocab(), theirs.get_vocab()
    names = {k: token for token, k in there.items()}
    for token, k in sorted(here.items(), key=lambda item: item[1]):
        free = token not in there and (token == ours.pad_token or (extra and k not in names))
        if there.get(token) != k and not free:
            return f"token {k} is {token!r} here and {names.get(k)!r} there"
    if _rules(ours) != _rules(theirs):
        return "they split text in different ways"
    return None


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How text becomes tokens, but for special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    return {part: state.get(part) for part in ("normalizer", "pre_tokenizer", "model")}
