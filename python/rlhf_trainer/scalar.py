"""The scalar head: reward model and value function.

What is saved is transformers' own sequence classifier, and it scores there what it scored here: the
score is read at the last token that is not the pad token, which ends no text, and nothing is added
to what the head gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_trainer.config import ConfigError
from rlhf_trainer.data import (
    Batch,
    Encoded,
    collate,
    encode_prompts,
    encode_responses,
    micro_batches,
)
from rlhf_trainer.model import (
    check_vocabulary,
    load_model,
    load_pretrained,
    load_tokenizer,
    max_positions,
)
from rlhf_trainer.tokens import closing_ids, conflict

CENTER_ROWS = 4096  # sequences that show which direction tells them apart least


class ScalarModel(nn.Module):
    """A causal backbone with a scalar head: reward model and value function.

    `model` is transformers' own ...ForSequenceClassification with one label, so a saved one is
    loadable by AutoModelForSequenceClassification. `tokenizer` is the one whose ids it was trained
    on, or None where that is not known.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__()
        head = getattr(model, "score", None)
        plain = isinstance(head, nn.Linear) and head.bias is None
        if not plain or model.config.num_labels != 1:
            raise ConfigError(
                "reward model: expected a sequence classifier with one label and a linear head "
                f"`score` without bias, got {type(model).__name__}"
            )
        self.model: Any = model
        self.tokenizer = tokenizer

    @classmethod
    def from_causal_lm(cls, lm: PreTrainedModel, pad_token_id: int) -> ScalarModel:
        """The backbone's weights copied, with a head drawn from N(0, 1/(d+1)) (Stiennon et al.
        2020, appendix B)."""
        config = copy.deepcopy(lm.config)
        config.num_labels = 1
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=lm.dtype)
        except ValueError as error:
            raise ConfigError(
                "model: expected one for which transformers has a sequence classifier, "
                f"got {type(lm).__name__}"
            ) from error
        scalar = cls(model)
        model.base_model.load_state_dict(lm.base_model.state_dict())
        scalar.set_pad(pad_token_id)
        width = scalar.model.score.weight.shape[1]
        nn.init.normal_(scalar.model.score.weight, std=(width + 1) ** -0.5)
        return scalar.to(lm.device)

    def set_pad(self, pad_token_id: int) -> None:
        """Let transformers pass over this token; the embedding grows where it has no row for it."""
        if pad_token_id >= self.model.get_input_embeddings().weight.shape[0]:
            self.model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = pad_token_id

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
        model = load_model(kind, "reward_model", spec, dtype=torch.float32)
        return cls(model, load_tokenizer(None, spec))

    def check_ids(
        self, name: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] = ()
    ) -> None:
        """Raise ConfigError where the tokenizer's ids mean something else to this model."""
        check_vocabulary(self.model, tokenizer, name)
        theirs = self.tokenizer
        if theirs is None or theirs is tokenizer:
            return
        fault = conflict(tokenizer, theirs)
        if fault is None and tokenizer.eos_token_id not in closing_ids(theirs):
            fault = f"responses end with {tokenizer.eos_token!r} here, {theirs.eos_token!r} there"
        if fault is None:
            both = (encode_prompts(t, prompts) for t in (tokenizer, theirs))
            rows = zip(prompts, *both, strict=True)
            first = next((prompt for prompt, here, there in rows if here != there), None)
            if first is not None:
                fault = f"the prompt {first[:40]!r} has other tokens here than there"
        if fault is not None:
            raise ConfigError(
                f"{name}: expected one trained on the tokens of the policy's tokenizer, got one "
                f"with another: {fault}"
            )

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """What the head sees: (B, T, H)."""
        return self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Scores (B, T), one a position."""
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        head = self.model.score
        # Out of autocast: two scores of a pair differ by less than bf16 resolves.
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype)).squeeze(-1)


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
    model.check_ids("model", tokenizer)
    encoded = encode_responses(tokenizer, responses, max_positions(model.model), eos)
    rows = [Encoded(p, r) for p, r in zip(encode_prompts(tokenizer, prompts), encoded, strict=True)]
    return score_rows(model, rows, tokenizer.pad_token_id, batch_size).tolist()


# --- the mean of the scores -----------------------------------------------------------------------


@torch.no_grad()
def center_scores(
    model: ScalarModel,
    reference: Sequence[Encoded],
    rows: Sequence[Encoded],
    pad: int,
    batch_size: int,
) -> float:
    """Shift the scores so that those of `reference` average 0, and return what they averaged; where
    that is not finite, nothing changes. The shift is made within the weights that
    transformers' own class has: their heads have no bias.

    Where a LayerNorm with a bias comes before the head, its bias takes the shift exactly. Behind an
    RMSNorm nothing can: there the head turns a little, in the one direction that moves the mean and
    tells the sequences of `rows` apart least.
    """
    head = model.model.score
    weight = head.weight[0].cpu().double()
    mean = last_hidden(model, reference, pad, batch_size).mean(0)
    excess = mean @ weight
    if not excess.isfinite():
        return excess.item()
    norm: Any = final_norm(model, collate(reference[:1], pad))
    if norm is not None:
        norm.bias -= (excess * weight / weight.square().sum()).to(norm.bias)
        return excess.item()
    some = rows[:: math.ceil(len(rows) / CENTER_ROWS)]
    direction = flattest_direction(last_hidden(model, some, pad, batch_size), mean)
    head.weight -= (excess * direction).to(head.weight)
    return excess.item()


@torch.no_grad()
def last_hidden(model: ScalarModel, rows: Sequence[Encoded], pad: int, batch_size: int) -> Tensor:
    """What the head sees at the last valid token of each sequence: (N, H), float64, on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for chunk in micro_batches(rows, batch_size):
        batch = collate(chunk, pad).to(device)
        last = batch.attention_mask.sum(1) - 1
        hidden = model.hidden(**batch.inputs())
        parts.append(hidden[torch.arange(len(chunk), device=device), last].cpu().double())
    return torch.cat(parts)


def final_norm(model: ScalarModel, batch: Batch) -> nn.LayerNorm | None:
    """The LayerNorm with a bias whose output the head sees, if there is one."""
    seen: list[tuple[nn.LayerNorm, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append((module, output)))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) and module.bias is not None
    ]
    hidden = model.hidden(**batch.to(next(model.parameters()).device).inputs())
    for hook in hooks:
        hook.remove()
    norm, output = seen[-1] if seen else (None, hidden.new_zeros(0))
    return norm if torch.equal(output.flatten(), hidden.flatten()) else None


def flattest_direction(hidden: Tensor, mean: Tensor) -> Tensor:
    """The direction u (H,) with u . mean = 1 along which the rows of `hidden` (N, H) differ least.

    With C their covariance, u is C^-1 mean, scaled. C shrinks towards a multiple of the identity,
    the more the fewer rows there are.
    """
    n, width = hidden.shape
    covariance = torch.cov(hidden.t(), correction=0).reshape(width, width)
    share = width / (n + width)
    level = share * covariance.diagonal().mean() + 1e-12 * mean.square().mean()
    shrunk = (1 - share) * covariance + level * torch.eye(width, dtype=hidden.dtype)
    direction = torch.linalg.solve(shrunk, mean)
    return direction / (direction @ mean)
