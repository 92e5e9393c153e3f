"""Models and tokenizers: loading, heads without logits, the scalar head, sampling."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_kernels.integrations.transformers import LMHead, hidden_forward
from rlhf_trainer.config import ConfigError, DivergedError
from rlhf_trainer.data import (
    Batch,
    Encoded,
    collate,
    encode_prompts,
    encode_responses,
    left_pad,
    micro_batches,
)

SCRATCH = "scratch:"
SCRATCH_VOCABULARY = 4096

# --- tokenizers -----------------------------------------------------------------------------------


def load_tokenizer(tokenizer: str | None, model: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer named, else the model's own; None where a scratch model needs one trained on
    its data."""
    if tokenizer is None and model is not None and model.startswith(SCRATCH):
        return None
    if tokenizer is None and model is None:
        raise ConfigError("model: expected a folder, a hub name or scratch:gpt2-tiny, got none")
    spec = str(tokenizer or model)
    loaded = load_pretrained(AutoTokenizer, "tokenizer", spec)
    # From a GPT-2 folder without a tokenizer comes one that knows no text at all.
    if len(loaded) <= len(loaded.all_special_ids):
        raise ConfigError(f"tokenizer: expected one in {spec}, got none")
    return checked_tokenizer(loaded)


def load_pretrained(kind: Any, option: str, spec: str, **options: Any) -> Any:
    """kind.from_pretrained(spec); what is wrong with the folder becomes a ConfigError of one
    line."""
    try:
        return kind.from_pretrained(spec, **options)
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{option}: cannot load one from {spec}: {reason}") from error


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token; it must have an end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("tokenizer: expected one with an eos_token, which is how responses end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks and labels come from lengths
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = SCRATCH_VOCABULARY
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with at most vocab_size entries, "<pad>" and "<eos>" among them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


# --- causal models --------------------------------------------------------------------------------


def load_causal_lm(spec: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A causal language model in float32 from a folder, a hub name or "scratch:NAME"."""
    if spec.startswith(SCRATCH):
        return scratch_model(spec.removeprefix(SCRATCH), tokenizer, seed)
    model = load_pretrained(AutoModelForCausalLM, "model", spec, dtype=torch.float32)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"tokenizer: expected at most the {vocabulary} tokens of model {spec}, "
            f"got {len(tokenizer)}"
        )
    return model


def scratch_model(name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights: "gpt2-tiny" or "llama-tiny" (2 layers of width 128, context
    2048)."""
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if name == "gpt2-tiny":
        config: Any = GPT2Config(n_layer=2, n_embd=128, n_head=4, n_positions=2048, **shared)
    elif name == "llama-tiny":
        config = LlamaConfig(
            num_hidden_layers=2,
            hidden_size=128,
            intermediate_size=384,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            **shared,
        )
    else:
        raise ConfigError(
            f"model: expected scratch:gpt2-tiny or scratch:llama-tiny, got {SCRATCH}{name}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def check_head(model: PreTrainedModel) -> None:
    """Raise ConfigError where log-probabilities need the model's logits."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden_forward(model, torch.zeros((1, 1), dtype=torch.int64, device=model.device))
    except TypeError as error:
        raise ConfigError(str(error)) from error
    finally:
        model.train(training)


def completion_hidden(model: nn.Module, batch: Batch) -> tuple[Tensor, LMHead]:
    """Hidden states (B, C, H) at the batch's columns, and the head that makes logits of them."""
    return hidden_forward(model, **batch.inputs(), use_cache=False, logits_to_keep=batch.columns)


def head_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """Logits (..., V), as the model itself would make them."""
    z = nn.functional.linear(hidden, head.weight, head.bias)
    if head.logit_scale != 1:
        z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set residual dropout to p and dropout of attention weights, which GPT-2 has too, to 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if name.rpartition(".")[2].startswith("att") else p


def check_length(model: PreTrainedModel, longest: int) -> None:
    """Raise ConfigError where the model has fewer positions than the longest sequence."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ConfigError(
            "max_prompt_tokens + max_response_tokens: expected sequences of at most the model's "
            f"{limit} positions, got one of {longest} tokens"
        )


# --- the scalar head ------------------------------------------------------------------------------


class ScalarModel(nn.Module):
    """A causal backbone with a scalar head: reward model and value function.

    `model` is transformers' own ...ForSequenceClassification with one label, so a saved one is
    loadable by AutoModelForSequenceClassification; the constant by which its scores are shifted is
    `config.score_bias`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if getattr(model, "score", None) is None or model.config.num_labels != 1:
            raise ConfigError(
                "reward model: expected a sequence classifier with one label and a head `score`, "
                f"got {type(model).__name__}"
            )
        self.model: Any = model

    @classmethod
    def from_causal_lm(cls, lm: PreTrainedModel, pad_token_id: int) -> ScalarModel:
        """The backbone's weights copied, with a head drawn from N(0, 1/(d+1)) (Stiennon et al.
        2020, appendix B)."""
        config = copy.deepcopy(lm.config)
        config.num_labels, config.pad_token_id = 1, pad_token_id
        model = AutoModelForSequenceClassification.from_config(config, dtype=lm.dtype)
        model.base_model.load_state_dict(lm.base_model.state_dict())
        scalar = cls(model)
        width = scalar.model.score.weight.shape[1]
        nn.init.normal_(scalar.model.score.weight, std=(width + 1) ** -0.5)
        return scalar.to(lm.device)

    @classmethod
    def load(cls, spec: str) -> ScalarModel:
        """A saved reward model in float32."""
        names = load_pretrained(AutoConfig, "reward_model", spec).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in names):
            raise ConfigError(
                f"reward_model: expected a sequence classifier in {spec}, "
                f"got {', '.join(names) or 'none'}"
            )
        kind = AutoModelForSequenceClassification
        return cls(load_pretrained(kind, "reward_model", spec, dtype=torch.float32))

    @property
    def bias(self) -> float:
        """What is added to every score."""
        return float(getattr(self.model.config, "score_bias", 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        self.model.config.score_bias = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Scores (B, T), one a position."""
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        head = self.model.score
        # Out of autocast: two scores of a pair differ by less than bf16 resolves.
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype)).squeeze(-1) + self.bias


def sequence_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores (B,): those at the last valid token of each right-padded sequence."""
    scores = model(**batch.inputs())
    last = batch.attention_mask.sum(1, keepdim=True) - 1
    return scores.gather(1, last).squeeze(1)


@torch.no_grad()
def score_rows(model: nn.Module, rows: Sequence[Encoded], pad: int, batch_size: int) -> Tensor:
    """Scores (N,) of encoded sequences, without gradients, on the model's device."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    parts = [
        sequence_scores(model, collate(chunk, pad).to(device))
        for chunk in micro_batches(rows, batch_size)
    ]
    model.train(training)
    return torch.cat(parts)


def score_responses(
    model: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int = 64,
    eos: bool = True,
) -> list[float]:
    """Scores of responses given as text; eos=False scores them as cut off."""
    encoded = encode_responses(
        tokenizer, responses, model.model.config.max_position_embeddings, eos
    )
    rows = [Encoded(p, r) for p, r in zip(encode_prompts(tokenizer, prompts), encoded, strict=True)]
    return score_rows(model, rows, tokenizer.pad_token_id, batch_size).tolist()


# --- sampling -------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Sampled continuations: left-padded prompts of width P, then responses of width R."""

    input_ids: Tensor  # (B, P + R)
    attention_mask: Tensor  # (B, P + R)
    mask: Tensor  # (B, R) bool: response tokens up to and with eos
    ended: Tensor  # (B,) bool: whether eos came

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


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_response_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
) -> Samples:
    """Sample one continuation of each prompt from the model's whole distribution (temperature 0:
    greedy).

    Raises DivergedError where the model's logits are not finite.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompt_ids, prompt_mask = (t.to(model.device) for t in left_pad(prompts, pad))
    settings = GenerationConfig(
        max_new_tokens=max_response_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        eos_token_id=eos,
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
            )
            parts.append(output[:, prompt_ids.shape[1] :])
    finally:
        model.generation_config = own
        model.train(training)
    finite.check()
    width = max(part.shape[1] for part in parts)
    tokens = torch.cat([nn.functional.pad(p, (0, width - p.shape[1]), value=pad) for p in parts])
    is_eos = tokens == eos
    mask = is_eos.cumsum(1) - is_eos.long() == 0
    return Samples(
        input_ids=torch.cat([prompt_ids, tokens], 1),
        attention_mask=torch.cat([prompt_mask, mask.long()], 1),
        mask=mask,
        ended=is_eos.any(1),
    )


@dataclass(frozen=True)
class Response:
    """A sampled response: its text without special tokens, its ids (eos included), whether it
    ended."""

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
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ended = samples.ended.tolist()
    return [Response(*row) for row in zip(texts, ids, ended, strict=True)]


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer in transformers' layout."""
    inner: Any = model.model if isinstance(model, ScalarModel) else model
    inner.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what save_model wrote into a model that exists."""
    inner: Any = model.model if isinstance(model, ScalarModel) else model
    saved = load_pretrained(type(inner), "checkpoint", str(folder), dtype=inner.dtype)
    inner.load_state_dict(saved.state_dict())
    if isinstance(model, ScalarModel):
        model.bias = ScalarModel(saved).bias
