"""Stage 2: the reward model.

In, as InstructGPT does it (arXiv 2203.02155, section 3.5 and appendix C.2): a scalar head instead
of the unembedding, on the supervised model; a batch of prompts whose every pair of completions
counts in one batch element, with one forward pass per completion; ties dropped; one epoch; a cosine
to a tenth of the peak; and a bias that makes the mean reward of a reference set 0. The head starts
from N(0, 1/(d+1)) (Stiennon et al. 2020). Out: the sweep over seeds and learning rates; several
processes; packing. The score of a sequence is the one at its last token: eos, or where the
completion was cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk
from rlhf_trainer.config import ConfigError, RewardConfig
from rlhf_trainer.data import (
    Demonstration,
    EncodedRanking,
    Ranking,
    collate,
    encode_demonstrations,
    encode_rankings,
    fingerprint,
    micro_batches,
    read_demonstrations,
    read_rankings,
    shuffled,
    split,
)
from rlhf_trainer.metrics import CURVES, KERNELS, KernelClock, MetricsLog, OnStep, plot
from rlhf_trainer.model import (
    ScalarModel,
    check_length,
    checked_tokenizer,
    load_causal_lm,
    load_tokenizer,
    save_model,
    score_rows,
    sequence_scores,
    set_dropout,
    train_tokenizer,
)
from rlhf_trainer.state import (
    RunState,
    adam,
    backend_of,
    cosine,
    replace_folder,
    start,
    write_json,
)

REWARD_OPS = ("pairwise_reward_loss", "ranking_reward_loss")  # of rlhf_kernels


@dataclass
class RewardResult:
    """A finished run. `accuracy` is the share of held-out pairs in the right order, None where none
    was held out."""

    model: ScalarModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    history: list[dict[str, Any]]
    accuracy: float | None
    kernels: dict[str, Any]
    seconds: float


def train_reward(
    config: RewardConfig,
    *,
    model: PreTrainedModel | ScalarModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: Sequence[Ranking] | None = None,
    heldout: Sequence[Ranking] | None = None,
    reference: Sequence[Demonstration] | None = None,
    on_step: OnStep | None = None,
) -> RewardResult:
    """Train a reward model on rankings; what is None is read from what the config names.

    A causal language model lends a copy of its backbone; a ScalarModel is trained in place.
    `reference` are the answers whose mean score becomes 0. Raises ConfigError or DataError before
    any training.
    """
    began = time.perf_counter()
    accelerator = start(config, REWARD_OPS)
    backend, device = backend_of(config), accelerator.device

    tokenizer = load_tokenizer(config.tokenizer, config.model) if tokenizer is None else tokenizer
    if train is None:
        train = read_rankings(config.require_given("train_file"))
    if heldout is None and config.heldout_file is not None:
        heldout = read_rankings(config.heldout_file)
    if heldout is None:
        train, heldout = split(train, [e.prompt for e in train], config.heldout_share, config.seed)
    if reference is None and config.reference_file is not None:
        reference = read_demonstrations(config.reference_file, tokenizer)
    if tokenizer is None:
        tokenizer = train_tokenizer(text for e in train for text in (e.prompt, *e.completions))
    tokenizer = checked_tokenizer(tokenizer)
    if model is None:
        model = load_causal_lm(config.require_given("model"), tokenizer, config.seed)
    if not isinstance(model, ScalarModel):
        model = ScalarModel.from_causal_lm(model, tokenizer.pad_token_id)
    groups, held = (
        [
            group
            for group in encode_rankings(tokenizer, rankings, config.max_response_tokens)
            if len(group.rows[0].prompt) <= config.max_prompt_tokens and len(set(group.ranks)) > 1
        ]
        for rankings in (train, heldout)
    )
    if not groups:
        raise ConfigError(
            "max_prompt_tokens: expected a prompt that fits, with completions not all tied, "
            f"got none in {len(train)} rankings"
        )
    if reference is not None:
        zero = encode_demonstrations(tokenizer, reference, config.max_response_tokens)
    else:
        zero = [row for group in held or groups for row in group.rows]
    rows = [*zero, *(row for group in groups + held for row in group.rows)]
    check_length(model.model, max(len(row.prompt) + len(row.response) for row in rows))
    dropped = len(train) + len(heldout) - len(groups) - len(held)
    print(
        f"reward: {len(groups)} prompts, {len(held)} held out, "
        f"{dropped} dropped (too long, or all tied)"
    )

    per_epoch = math.ceil(len(groups) / config.batch_size)
    total = config.epochs * per_epoch
    set_dropout(model, config.dropout)
    scorer, pad = accelerator.prepare_model(model), tokenizer.pad_token_id
    parameters = [{"params": list(scorer.parameters()), "lr": config.learning_rate}]
    optimizer = accelerator.prepare_optimizer(adam(config, parameters, device))
    scheduler = LambdaLR(optimizer, cosine(total, config.warmup_steps, config.lr_floor))
    state = RunState(
        config, tokenizer, {"model": scorer}, optimizer, scheduler, fingerprint((groups, held))
    )
    state.resume()
    log = MetricsLog(config.output, config.stage, state.step, on_step)
    clock = KernelClock(config.profile_steps, config.backend, device)
    bar = tqdm(
        total=total, initial=state.step, desc="reward", unit="step", disable=not config.progress
    )

    def forward(micro: Sequence[EncodedRanking]) -> tuple[Tensor, rk.RewardStats]:
        """Loss (mean over the prompts) and statistics of a micro-batch of prompts."""
        rows = [row for group in micro for row in group.rows]
        scores = sequence_scores(scorer, collate(rows, pad).to(device))
        if all(len(group.rows) == 2 for group in micro):  # best first: chosen, rejected
            return rk.pairwise_reward_loss(scores[0::2], scores[1::2], backend=backend)
        places = [sorted(set(group.ranks)) for group in micro]  # as numbers, float32 would tie some
        ranks = torch.tensor(
            [p.index(r) for p, group in zip(places, micro, strict=True) for r in group.ranks],
            device=device,
        )
        sizes = [len(group.rows) for group in micro]
        offsets = torch.tensor([0, *accumulate(sizes)], device=device)
        return rk.ranking_reward_loss(scores, ranks, offsets, backend=backend)

    def evaluate() -> dict[str, float]:
        scorer.eval()
        loss, parts = 0.0, []
        with torch.no_grad():
            for micro in micro_batches(held, config.micro_batch_size):
                part, stats = forward(micro)
                loss += part.item() * len(micro) / len(held)
                parts.append(stats)
        return {"heldout_loss": loss, "heldout_accuracy": reduce(add, parts).accuracy.item()}

    while state.step < total:
        epoch, k = divmod(state.step, per_epoch)
        order = shuffled(len(groups), config.seed, epoch, "examples")
        batch = [groups[i] for i in order[k * config.batch_size :][: config.batch_size]]
        step_began = time.perf_counter()
        scorer.train()
        loss, parts = torch.zeros((), device=device), []
        with clock.step(), clock.kernels():
            optimizer.zero_grad()
            for micro in micro_batches(batch, config.micro_batch_size):
                part, stats = forward(micro)
                part = part * (len(micro) / len(batch))  # the mean over the batch's prompts
                accelerator.backward(part)
                loss += part.detach()
                parts.append(stats)
            if config.max_grad_norm:
                accelerator.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
        state.step += 1
        stats = reduce(add, parts)
        metrics: dict[str, Any] = {
            "epoch": state.step / per_epoch,
            "loss": loss.item(),
            "accuracy": stats.accuracy.item(),
            "margin": stats.margin.item(),
            "lr": lr,
            "seconds": time.perf_counter() - step_began,
        }
        if held and (state.step % (config.eval_every or per_epoch) == 0 or state.step == total):
            metrics |= evaluate()
        log.write(state.step, **metrics)
        bar.set_postfix(
            loss=f"{metrics['loss']:.3f}",
            accuracy=f"{metrics['accuracy']:.2f}",
            prompts_per_s=int(len(batch) / metrics["seconds"]),
            refresh=False,
        )
        bar.update()
        if config.save_every and state.step % config.save_every == 0:
            state.save()

    bar.close()
    log.close()
    scorer = accelerator.unwrap_model(scorer, keep_fp32_wrapper=False).eval()
    scores = score_rows(scorer, zero, pad, 2 * config.micro_batch_size)
    scorer.bias -= scores.mean().item()
    folder = config.output / "model"
    replace_folder(folder, partial(save_model, scorer, tokenizer))
    if config.plot:
        plot(log.history, config.output / CURVES)
    kernels = clock.report()
    write_json(config.output / KERNELS, kernels)
    accuracy = log.history[-1].get("heldout_accuracy")
    seconds = time.perf_counter() - began
    return RewardResult(scorer, tokenizer, folder, log.history, accuracy, kernels, seconds)
