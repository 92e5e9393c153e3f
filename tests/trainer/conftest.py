"""Tiny tokenizers and models, made here: no test loads anything that it did not write itself."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_trainer.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.data import Demonstration, Ranking, comparison

WORDS = ["say", "twice", "a", "b", "c", "d", "e", "f", "good", "bad"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads; beside other work on the cores they lose tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def word_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return word_tokenizer


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """make_model(kind="gpt2", seed=0): 2 layers of width 32, the word tokenizer's vocabulary."""

    def make(kind: str = "gpt2", seed: int = 0, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        tokens = {"vocab_size": 13, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
        if kind == "gpt2":
            sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
            return GPT2LMHeadModel(GPT2Config(**{**tokens, **sizes, **changes}))
        sizes = {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        }
        options = {**tokens, **sizes, **changes}
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**options))
        return Qwen2ForCausalLM(Qwen2Config(**options, tie_word_embeddings=True))

    return make


@pytest.fixture
def demonstrations() -> list[Demonstration]:
    """ "say x" -> "x", "twice x" -> "x x": prompts and responses of different lengths."""
    letters = ["a", "b", "c", "d", "e", "f"]
    once = [Demonstration(f"say {x}", x) for x in letters]
    twice = [Demonstration(f"say {y} twice {x}", f"{x} {x}") for x in letters for y in letters[:2]]
    return once + twice


@pytest.fixture
def pairs() -> list[Ranking]:
    """The completion that says good is preferred."""
    letters = ["a", "b", "c", "d", "e", "f"]
    return [
        comparison(f"say {x}", f"{y} good", f"{y} {y} bad") for x in letters for y in letters[:3]
    ]


@pytest.fixture
def rankings() -> list[Ranking]:
    """Four completions each, ranked by the number of good words, with a tie."""
    return [
        Ranking(f"say {x}", (x, "good good", f"good {x}", f"{x} {x}"), (3, 1, 2, 3))
        for x in ["a", "b", "c", "d", "e", "f"]
    ]


QUIET = {"progress": False, "plot": False, "profile_steps": 0, "device": "cpu", "save_every": 0}


@pytest.fixture
def sft_config(tmp_path: Path) -> Callable[..., SFTConfig]:
    def make(name: str = "sft", **changes: Any) -> SFTConfig:
        base = {
            "output": tmp_path / name,
            "learning_rate": 1e-2,
            "batch_size": 6,
            "epochs": 6,
            "dropout": 0.0,
        }
        return SFTConfig(**{**QUIET, **base, **changes})

    return make


@pytest.fixture
def reward_config(tmp_path: Path) -> Callable[..., RewardConfig]:
    def make(name: str = "reward", **changes: Any) -> RewardConfig:
        base = {"output": tmp_path / name, "learning_rate": 3e-3, "batch_size": 6, "epochs": 4}
        return RewardConfig(**{**QUIET, **base, **changes})

    return make


@pytest.fixture
def ppo_config(tmp_path: Path) -> Callable[..., PPOConfig]:
    def make(name: str = "ppo", **changes: Any) -> PPOConfig:
        base = {
            "output": tmp_path / name,
            "learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
            "batch_size": 16,
            "minibatches": 2,
            "micro_batch_size": 4,
            "episodes": 64,
            "max_response_tokens": 5,
            "warmup_iterations": 0,
            "missing_eos_score": None,
        }
        return PPOConfig(**{**QUIET, **base, **changes})

    return make


class Interrupted(Exception):
    """Stands for a run that was killed."""


@pytest.fixture
def interrupt() -> Callable[[int], Callable[[dict[str, Any]], None]]:
    """interrupt(n): an on_step that ends the run after step n."""

    def at(step: int) -> Callable[[dict[str, Any]], None]:
        def on_step(metrics: dict[str, Any]) -> None:
            if metrics["step"] == step:
                raise Interrupted

        return on_step

    at.error = Interrupted  # type: ignore[attr-defined]
    return at


@pytest.fixture
def same_weights() -> Callable[[torch.nn.Module, torch.nn.Module], bool]:
    """Whether two models hold the same bits."""

    def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
        a, b = one.state_dict(), two.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return same


@pytest.fixture
def untimed() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """The numbers of a run but its wall times."""

    def strip(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        dropped = ("stage", "seconds")
        return [{k: v for k, v in row.items() if k not in dropped} for row in history]

    return strip


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """write_lines(name, rows): a JSONL file (gzipped where the name ends in .gz); strings as is."""

    def write(name: str, rows: list[Any]) -> Path:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        path = tmp_path / name
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return path

    return write
