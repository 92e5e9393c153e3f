"""Options of the three stages, their defaults and where these come from.

Nothing heavy is imported here: `rlhf-train STAGE --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

SOURCES = """\
Defaults come from [C] InstructGPT, arXiv 2203.02155, appendix C; [S] Stiennon et al. 2020,
appendix B; [L] the lm-human-preferences code; [D] the notes "summarize from feedback details".
Own: none of them says.
"""


OnBadLine = Literal["error", "skip"]
SPECS = ("model", "tokenizer", "reward_model")  # a folder, or the name of something that is none


class ConfigError(ValueError):
    """An option that cannot be used: its name, what was expected, what came."""


class DataError(ValueError):
    """Data that cannot be used: the file, the line number and what is wrong."""


class DivergedError(RuntimeError):
    """Training whose numbers are no longer finite: which, at which step, and what is left."""


@dataclass(kw_only=True)
class Options:
    """Options as they come: from Python, YAML or the command line they end as the same values."""

    def __post_init__(self) -> None:
        self.convert()

    def convert(self) -> None:
        """Give every option its type, with ~ as the home folder; raise ConfigError for a value that
        has none."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _convert(getattr(self, field.name), hints[field.name], field.name)
            if field.name in SPECS and value is not None:
                value = os.path.expanduser(value)
            setattr(self, field.name, value)


@dataclass(kw_only=True)
class RunConfig(Options):
    """Options that every stage shares."""

    stage: ClassVar[str]
    auto: ClassVar[dict[str, tuple[int, int]]] = {}  # what 0 stands for, on a GPU and on a CPU

    config: Path | None = None
    """YAML file with values for any of these options (learning_rate: 1e-5); the command line
    overrides it."""
    output: Path = Path("runs/run")
    """Folder for metrics.jsonl, curves.png, kernels.json, model/ and checkpoint-N/."""
    model: str | None = None
    """Folder (a run's stands for its model/) or hub name of the model that the stage starts from,
    or scratch:gpt2-tiny, scratch:llama-tiny for random weights."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer. Default: the model's own; for a scratch model a
    byte-level BPE with 4096 entries, trained on the training file."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the output folder; start the run that broke off
    afresh where there is none. What sets memory or speed, and what the run does not depend on, may
    change; data and models are compared by content. Refused: a finished run, one of another
    stage."""
    seed: int = 0
    """Seed of initial weights, data order, dropout and sampling."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: what accelerate finds (CUDA before CPU)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision, weights and optimiser stay float32 ([C]: fp16 with fp32 masters)."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of every rlhf_kernels call; reference is plain PyTorch."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    batch_size: int = 32
    """Examples per optimiser step (reward: prompts; ppo: episodes per iteration)."""
    micro_batch_size: int = 8
    """Sequences per forward and backward pass (reward: prompts). Sets memory, changes no result
    beyond rounding. Own."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off. Own."""
    max_bad_steps: int = 10
    """A step whose loss, gradient or score is not finite changes no weight and is counted in
    metrics.jsonl; so many of them in a row end the run with a report. Own."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates [C]."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Own."""
    max_prompt_tokens: int = 1024
    """Examples with a longer prompt are dropped and counted [C]."""
    max_response_tokens: int = 1024
    """Longer responses are cut, and then carry no end-of-sequence token [C]."""
    on_bad_line: OnBadLine = "error"
    """A line of data that cannot be used, in whatever way: error names it and ends the run before
    training, skip leaves it out and says how many there were. Own."""
    save_every: int = 200
    """Optimiser steps (ppo: iterations) between checkpoints, of which the last two are kept; 0
    writes none but the final model (and one where a signal stops the run). Own."""
    progress: bool = True
    """Show how far the run and its step are: a bar on a terminal, elsewhere a line every 10
    seconds. On a CPU ppo says before it starts how long an iteration takes."""
    plot: bool = True
    """Draw curves.png at the end."""
    profile_steps: int = 3
    """Steps sampled by the profiler for kernels.json (the share of each rlhf_kernels op in a step);
    0: none."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        self.convert()  # again: an option may have been set since
        for name, value in vars(self).items():
            parts = value if isinstance(value, tuple) else (value,)
            finite = all(math.isfinite(part) for part in parts if isinstance(part, float))
            self._require(name, finite, "a finite number")
        self._require("seed", 0 <= self.seed < 2**32, "an integer in [0, 2**32)")
        for name in ("batch_size", "micro_batch_size", "max_prompt_tokens", "max_response_tokens"):
            low = 0 if name in self.auto else 1
            self._require(name, getattr(self, name) >= low, f"an integer >= {low}")
        self._require("max_bad_steps", self.max_bad_steps >= 1, "an integer >= 1")
        for name in ("max_grad_norm", "weight_decay", "save_every", "profile_steps"):
            self._require(name, getattr(self, name) >= 0, "a number >= 0")
        for name in ("learning_rate", "adam_eps"):
            self._require(name, getattr(self, name) > 0, "a number > 0")
        self._require(
            "adam_betas", all(0 <= b < 1 for b in self.adam_betas), "two numbers in [0, 1)"
        )

    def require_given(self, name: str) -> Any:
        """The option's value; raise ConfigError where it was not given."""
        if getattr(self, name) is None:
            raise ConfigError(f"{name}: expected a value, got none")
        return getattr(self, name)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


@dataclass(kw_only=True)
class _SupervisedConfig(RunConfig):
    """What SFT and reward training share."""

    train_file: Path | None = None
    """Training data, JSONL or JSONL.gz."""
    heldout_file: Path | None = None
    """Held-out data in the same form. Default: heldout_share of the training file."""
    heldout_share: float = 0.1
    """Share of the prompts held out when no heldout_file is given; 0: none. Own."""
    epochs: int = 1
    """Passes over the training data."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up; none in [C]."""
    lr_floor: float = 0.1
    """The learning rate falls along a cosine to this share of the peak [C]."""
    eval_every: int = 0
    """Optimiser steps between held-out evaluations; 0: once an epoch."""

    def validate(self) -> None:
        super().validate()
        self._require("epochs", self.epochs >= 1, "an integer >= 1")
        self._require("heldout_share", 0 <= self.heldout_share < 1, "a number in [0, 1)")
        self._require("lr_floor", 0 <= self.lr_floor <= 1, "a number in [0, 1]")
        for name in ("warmup_steps", "eval_every"):
            self._require(name, getattr(self, name) >= 0, "an integer >= 0")


@dataclass(kw_only=True)
class SFTConfig(_SupervisedConfig):
    """Supervised fine-tuning on demonstrations.

    Each line of the data holds {"prompt", "response"}, or {"messages": [{"role", "content"}, ...]}
    whose last message is the assistant's. In every stage text is taken as it is, and messages are
    rendered with the tokenizer's chat template, or as "\\n\\nHuman: ...\\n\\nAssistant:" where it
    has none.
    """

    stage = "sft"
    output: Path = Path("runs/sft")
    learning_rate: float = 9.65e-6
    """Peak learning rate; [C] for 1.3B and 6B parameters."""
    batch_size: int = 32
    """Demonstrations per optimiser step; [C] for 1.3B and 6B."""
    epochs: int = 16
    """Passes over the demonstrations [C]."""
    dropout: float = 0.2
    """Residual dropout [C]; dropout of attention weights is off. Models without dropout layers,
    such as Llama, have none."""
    keep: Literal["best", "last"] = "best"
    """Which weights end in model/: those of the lowest held-out loss, or the last ones. ([C] picks
    by reward-model score, which this stage does not have yet.)"""
    patience: int = 3
    """Stop after so many held-out evaluations without a new best; 0: never stop early. Own."""

    def validate(self) -> None:
        super().validate()
        self._require("dropout", 0 <= self.dropout < 1, "a number in [0, 1)")
        self._require("patience", self.patience >= 0, "an integer >= 0")


@dataclass(kw_only=True)
class RewardConfig(_SupervisedConfig):
    """Reward model from human preferences.

    Each line of the data holds {"prompt", "chosen", "rejected"}, or {"prompt", "completions":
    [...], "ranks": [...]} with lower ranks better and ties allowed, or the same with "messages"
    that end before the assistant's turn in place of "prompt"; or whole chats {"chosen",
    "rejected"}: messages, or HH-RLHF transcripts. Answers to messages are text or messages.
    """

    stage = "reward"
    output: Path = Path("runs/reward")
    learning_rate: float = 9e-6
    """Peak learning rate [C]."""
    batch_size: int = 64
    """Prompts per optimiser step; all pairs of a prompt count as one batch element [C]."""
    micro_batch_size: int = 8
    """Prompts per forward and backward pass. Sets memory, changes no result beyond rounding.
    Own."""
    epochs: int = 1
    """Passes over the comparisons; more overfit [C]."""
    dropout: float = 0.0
    """Residual dropout, as in SFT. Own."""
    reference_file: Path | None = None
    """Demonstrations whose mean reward is set to 0 after training [C]. Default: all
    completions of the held-out comparisons (of the training ones where nothing is held out)."""

    def validate(self) -> None:
        super().validate()
        self._require("dropout", 0 <= self.dropout < 1, "a number in [0, 1)")


@dataclass(kw_only=True)
class PPOConfig(RunConfig):
    """Reinforcement learning against a reward model.

    Each line of the data holds {"prompt"}, or {"messages"} that end before the assistant's turn.
    """

    stage = "ppo"
    auto = {"batch_size": (512, 64), "max_response_tokens": (1024, 64)}  # noqa: RUF012
    output: Path = Path("runs/ppo")
    reward_model: str | None = None
    """Folder or hub name of the reward model (a sequence classifier with one label)."""
    prompt_file: Path | None = None
    """Prompts, JSONL or JSONL.gz."""
    episodes: int = 256_000
    """Sampled responses in all [C]; the run has episodes / batch_size iterations, and what does not
    fill one is left out."""
    batch_size: int = 0
    """Episodes per iteration; 0: 512 [C], or 64 on a CPU, where 512 long ones take hours."""
    max_response_tokens: int = 0
    """Longer responses are cut, and carry no end-of-sequence token; 0: 1024 [C], or 64 on a CPU."""
    minibatches: int = 8
    """Optimiser steps per pass over an iteration's episodes [C]."""
    inner_epochs: int = 1
    """Passes over an iteration's episodes [C]."""
    rollout_batch_size: int = 128
    """Sequences sampled or scored at once. Sets memory; with another number other samples are drawn
    from the same distribution. Own."""
    temperature: float = 1.0
    """Of sampling [C], and of every log-probability, that of the reference model included."""
    learning_rate: float = 9e-6
    """Of the policy: warm-up, then constant. Own; [C] sweeps it for each model size."""
    value_learning_rate: float = 9e-6
    """Of the value function [C]."""
    warmup_iterations: int = 10
    """Iterations over which the learning rates rise linearly from a tenth [C]."""
    adam_eps: float = 1e-5
    """Adam's epsilon [L]."""
    kl_coef: float = 0.02
    """Weight of the per-token penalty on log p - log p_ref [C]."""
    kl_target: float | None = None
    """Nats a sequence: adapt kl_coef towards this KL (6 in [L]). Default: kl_coef stays fixed
    [C]."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive coefficient reacts [L]."""
    clip: float = 0.2
    """Range of the probability ratio [C]."""
    value_clip: float = 0.2
    """Range in which a value may move away from its old one [L]."""
    value_coef: float = 0.1
    """Weight of the value loss [L]."""
    gamma: float = 1.0
    """Discount; none [C]."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation [S, L]."""
    whiten_rewards: bool = True
    """Scale per-token rewards to unit variance without a shift of their mean [L]."""
    clip_score: float | None = None
    """Bound of the absolute score before the KL penalty. Default: no bound. Own."""
    missing_eos_score: float | None = -1.0
    """Score of a response that does not end within max_response_tokens [D]; None keeps the reward
    model's."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of such a response; use with missing_eos_score None. Own."""
    save_every: int = 20
    """Iterations between checkpoints, of which the last two are kept; 0 writes none but the final
    model (and one where a signal stops the run). Own."""

    def validate(self) -> None:
        super().validate()
        for name in ("episodes", "minibatches", "inner_epochs", "rollout_batch_size", "kl_horizon"):
            self._require(name, getattr(self, name) >= 1, "an integer >= 1")
        for name in ("temperature", "value_learning_rate", "clip", "value_clip"):
            self._require(name, getattr(self, name) > 0, "a number > 0")
        for name in ("warmup_iterations", "kl_coef", "value_coef", "missing_eos_penalty"):
            self._require(name, getattr(self, name) >= 0, "a number >= 0")
        for name in ("gamma", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("kl_target", "clip_score"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "a number > 0, or none")
        self._require(
            "minibatches",
            self.batch_size % self.minibatches == 0,
            f"a divisor of batch_size ({self.batch_size})",
        )
        size = self.batch_size or min(self.auto["batch_size"])
        self._require("episodes", self.episodes >= size, f"at least batch_size ({size})")
        if self.missing_eos_score is not None and self.missing_eos_penalty > 0:
            raise ConfigError(
                "missing_eos_penalty: expected 0 unless missing_eos_score is none, "
                f"got {self.missing_eos_penalty} with missing_eos_score {self.missing_eos_score}"
            )

    def on(self, device_type: str) -> PPOConfig:
        """The options with numbers for those that leave them to the device; it is said which."""
        column = int(device_type == "cpu")
        chosen: dict[str, Any] = {
            name: both[column] for name, both in self.auto.items() if not getattr(self, name)
        }
        resolved = dataclasses.replace(self, **chosen)
        resolved.validate()
        if chosen:
            numbers = ", ".join(f"{name} {value}" for name, value in chosen.items())
            print(f"ppo: {numbers} by default on {'a CPU' if column else 'a GPU'}")
        return resolved


Config = TypeVar("Config")


def load_yaml(kind: type[Config], path: Path) -> Config:
    """The config that a YAML file describes; what it leaves out keeps its default.

    Raises ConfigError naming the file and the key for an unknown key or a value of the wrong type.
    """
    import yaml  # here, as it is not there without the extra `train`

    path = Path(os.path.expanduser(path))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}; expected one of {', '.join(known)}")
    return kind(
        **{key: _convert(value, hints[key], f"{path}: {key}") for key, value in values.items()}
    )


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A value as the annotated type: YAML 1.1 reads 1e-5 as a string, and neither it nor a Python
    caller needs to know of paths or tuples."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
        return _convert(value, hint, where)
    try:
        if origin is Literal and value in typing.get_args(hint):
            return value
        parts = typing.get_args(hint)
        if origin is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_convert(v, h, where) for v, h in zip(value, parts, strict=True))
        if hint is bool and isinstance(value, bool):
            return value
        if hint is float and not isinstance(value, bool):
            return float(value)
        if hint is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if hint is str and isinstance(value, str | Path):
            return str(value)
        if hint is Path and isinstance(value, str | Path):
            return Path(os.path.expanduser(value))
    except (TypeError, ValueError, OverflowError):
        pass
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{where}: expected {name.replace('typing.', '')}, got {value!r}")
