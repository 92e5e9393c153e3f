"""Models and tokenizers: loading, heads without logits, saving."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_kernels.integrations.transformers import LMHead, hidden_forward
from rlhf_trainer.config import ConfigError
from rlhf_trainer.data import Batch
from rlhf_trainer.sources import locate
from rlhf_trainer.tokens import conflict, keep_stops, token_count

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
    if tokenizer is not None and model is not None and not model.startswith(SCRATCH):
        check_same_ids(loaded, spec, model)
    return checked_tokenizer(loaded)


def check_same_ids(tokenizer: PreTrainedTokenizerBase, spec: str, model: str) -> None:
    """Raise ConfigError where ids of the tokenizer mean something else to the model, which the
    tokenizer beside it tells; where there is none the sizes alone are checked, later."""
    try:
        own = load_pretrained(AutoTokenizer, "tokenizer", model)
    except ConfigError:
        return
    if len(own) > len(own.all_special_ids) and (fault := conflict(tokenizer, own, extra=True)):
        raise ConfigError(f"tokenizer: expected the ids of model {model}, got {spec}: {fault}")


def load_pretrained(kind: Any, option: str, spec: str, **options: Any) -> Any:
    """kind.from_pretrained(spec); what is wrong with the folder becomes a ConfigError of one
    line."""
    folder, found = locate(option, spec)
    try:
        return kind.from_pretrained(folder, **options, **found)
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{option}: cannot load one from {spec}: {reason}") from error


def load_model(kind: Any, option: str, spec: str, exact: bool = True, **options: Any) -> Any:
    """kind.from_pretrained(spec), every weight of it from there: where one is missing transformers
    would draw it at random.

    Tensors that the model has no place for are an error if exact, else they are named.
    """
    model, found = load_pretrained(
        kind, option, spec, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    faults = {
        "no tensor": sorted(found["missing_keys"]),
        "another shape": [
            f"{name} ({list(saved)} in place of {list(needed)})"
            for name, saved, needed in sorted(found["mismatched_keys"])
        ],
        "no place": sorted(found["unexpected_keys"]),
        "damage": sorted(found.get("error_msgs", [])),
    }
    if faults["no place"] and not exact:
        print(f"{option}: {_some(faults.pop('no place'))} of {spec} are left out: no such weights")
    for fault, names in faults.items():
        if names:
            raise ConfigError(
                f"{option}: expected the weights of {type(model).__name__} in {spec}, "
                f"got {fault} for {_some(names)}"
            )
    return model


def _some(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


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
    names = load_pretrained(AutoConfig, "model", spec).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"model: expected a causal language model in {spec}, got {', '.join(names)}"
        )
    model = load_model(AutoModelForCausalLM, "model", spec, exact=False, dtype=torch.float32)
    check_vocabulary(model, tokenizer, f"model {spec}")
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
            ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
            hidden_forward(model, ids, torch.ones_like(ids))  # without a mask transformers warns
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


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model takes; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model: PreTrainedModel, longest: int) -> None:
    """Raise ConfigError where the model has fewer positions than the longest sequence."""
    limit = max_positions(model)
    if limit is not None and longest > limit:
        raise ConfigError(
            "max_prompt_tokens + max_response_tokens: expected sequences of at most the model's "
            f"{limit} positions, got one of {longest} tokens"
        )


# --- saving -------------------------------------------------------------------------------------


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer in transformers' layout."""
    pretrained_part(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode  # what the umask allows
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what save_model wrote into a model that exists."""
    inner = pretrained_part(model)
    saved = load_model(type(inner), "checkpoint", str(folder), dtype=inner.dtype)
    inner.load_state_dict(saved.state_dict())


def pretrained_part(model: nn.Module) -> PreTrainedModel:
    """transformers' own model: the one given, or the one inside it."""
    return next(part for part in model.modules() if isinstance(part, PreTrainedModel))


def settle(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str = "model") -> None:
    """Let the model stop where responses end, and check that it takes the tokenizer's ids and that
    both can be saved.

    transformers refuses some settings only when it saves them, which would be after the training.
    """
    inner = pretrained_part(model)
    check_vocabulary(inner, tokenizer, name)
    keep_stops(inner, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        try:
            inner.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{name}: expected settings that transformers can save, got {reason}"
            ) from error


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ConfigError where the tokenizer makes ids that the model has no embedding for."""
    embedding: Any = model.get_input_embeddings()
    rows, needed = embedding.weight.shape[0], token_count(tokenizer)
    if needed > rows:
        raise ConfigError(f"tokenizer: expected at most the {rows} tokens of {name}, got {needed}")
