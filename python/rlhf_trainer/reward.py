"""Stage 2: the reward model.

In, as InstructGPT does it (arXiv 2203.02155, section 3.5 and appendix C.2): a scalar head instead
of the unembedding, on the supervised model; a batch of prompts whose every pair of completions
counts in one batch element, with one forward pass per completion; ties dropped; one epoch; a cosine
to a tenth of the peak; and a bias that makes the mean reward of a reference set 0. The head starts
from N(0, 1/(d+1)) (Stiennon et al. 2020). Out: the sweep over seeds and learning rates; several
processes; packing. The score of a sequence is the one at its last token: eos, or where the
completion was cut. The head of transformers' classifiers has no bias: `center_scores` says what
takes its place.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk
from rlhf_trainer.checkpoint import replace_folder, write_json
from rlhf_trainer.config import ConfigError, DataError, RewardConfig
from rlhf_trainer.curves import plot
from rlhf_trainer.data import (
    EncodedRanking,
    Source,
    collate,
    count_cut,
    encode_demonstrations,
    encode_rankings,
    fingerprint,
    micro_batches,
    read_demonstrations,
    read_rankings,
    shuffled,
    split,
)
from rlhf_trainer.metrics import CURVES, KERNELS, KernelClock, MetricsLog, OnStep
from rlhf_trainer.model import (
    check_length,
    checked_tokenizer,
    load_causal_lm,
    load_tokenizer,
    save_model,
    set_dropout,
    settle,
    train_tokenizer,
)
from rlhf_trainer.optimizer import adam, cosine, gradient_norm
from rlhf_trainer.output import tidy
from rlhf_trainer.process import one_run
from rlhf_trainer.progress import Progress
from rlhf_trainer.scalar import ScalarModel, center_scores, sequence_scores
from rlhf_trainer.state import RunState, backend_of, backends_of, start, weights_fingerprint
from rlhf_trainer.tokens import own_pad, stop_ids

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


@one_run
def train_reward(
    config: RewardConfig,
    *,
    model: PreTrainedModel | ScalarModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: Source | None = None,
    heldout: Source | None = None,
    reference: Source | None = None,
    on_step: OnStep | None = None,
) -> RewardResult:
    """Train a reward model on rankings; what is None is read from what the config names.

    A causal language model lends a copy of its backbone; a ScalarModel is trained in place.
    Examples are Rankings, or dicts that hold what a line of a file holds. `reference` are the
    answers (Demonstrations, or dicts) whose mean score becomes 0. Raises ConfigError or DataError
    before any training.
    """
    began = time.perf_counter()
    accelerator = start(config, REWARD_OPS)
    backend, device = backend_of(config), accelerator.device

    tokenizer = load_tokenizer(config.tokenizer, config.model) if tokenizer is None else tokenizer
    bad = config.on_bad_line
    read = partial(read_rankings, tokenizer=tokenizer, on_bad_line=bad)
    train = read(config.require_given("train_file") if train is None else train, name="train")
    apart = config.heldout_file if heldout is None else heldout
    if apart is not None:
        heldout = read(apart, name="heldout")
    else:
        train, heldout = split(train, [e.prompt for e in train], config.heldout_share, config.seed)
    answers = config.reference_file if reference is None else reference
    if answers is not None:
        answers = read_demonstrations(answers, tokenizer, name="reference", on_bad_line=bad)
    if tokenizer is None:
        tokenizer = train_tokenizer(text for e in train for text in (e.prompt, *e.completions))
    tokenizer = checked_tokenizer(tokenizer)
    if model is None:
        model = load_causal_lm(config.require_given("model"), tokenizer, config.seed)
    weights = weights_fingerprint(model)
    tokenizer = own_pad(tokenizer, stop_ids(model, tokenizer))
    if isinstance(model, ScalarModel):
        model.set_pad(tokenizer.pad_token_id)
    else:
        model = ScalarModel.from_causal_lm(model, tokenizer.pad_token_id)
    model.tokenizer = tokenizer
    settle(model, tokenizer)
    groups, held = (
        [
            group
            for group in encode_rankings(tokenizer, rankings, config.max_response_tokens, bad)
            if 0 < len(group.rows[0].prompt) <= config.max_prompt_tokens and group.teaches
        ]
        for rankings in (train, heldout)
    )
    if not groups:
        raise ConfigError(
            "max_prompt_tokens: expected a prompt that fits, with completions not all tied, "
            f"got none in {len(train)} rankings"
        )
    if answers is not None:
        zero = encode_demonstrations(tokenizer, answers, config.max_response_tokens, bad)
        zero = [row for row in zero if row.prompt]
        if not zero:
            raise DataError("reference: expected an answer whose prompt has tokens, got none")
    else:
        zero = [row for group in held or groups for row in group.rows]
    rows = [row for group in groups + held for row in group.rows]
    check_length(model.model, max(len(row.prompt) + len(row.response) for row in rows + zero))
    inputs = {
        "training data": fingerprint(groups),
        "held-out data": fingerprint(held),
        "reference answers": fingerprint(zero),
        "tokenizer entries": fingerprint(sorted(tokenizer.get_vocab().items())),
        "model weights": weights,
    }
    dropped = len(train) + len(heldout) - len(groups) - len(held)
    print(
        f"reward: {len(groups)} prompts, {len(held)} held out, "
        f"{dropped} dropped (too long, or all tied or the same); "
        f"{count_cut(rows)} completions cut to {config.max_response_tokens} tokens"
    )

    per_epoch = math.ceil(len(groups) / config.batch_size)
    total = config.epochs * per_epoch
    set_dropout(model, config.dropout)
    scorer, pad = accelerator.prepare_model(model), tokenizer.pad_token_id
    parameters = [{"params": list(scorer.parameters()), "lr": config.learning_rate}]
    optimizer = accelerator.prepare_optimizer(adam(config, parameters, device))
    scheduler = LambdaLR(optimizer, cosine(total, config.warmup_steps, config.lr_floor))
    state = RunState(config, tokenizer, {"model": scorer}, optimizer, scheduler, inputs, total)
    state.resume()
    log = MetricsLog(config.output, config.stage, state.history, on_step)
    ran = backends_of(config, REWARD_OPS, device.type)
    clock = KernelClock(config.profile_steps, ran, device)
    bar = Progress("reward", "step", state.step, total, config.progress)

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
            micros = list(micro_batches(held, config.micro_batch_size))
            for micro in bar.track("evaluating", micros, "micro-batches"):
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
        micros = list(micro_batches(batch, config.micro_batch_size))
        with clock.step(), clock.kernels():
            optimizer.zero_grad()
            for micro in bar.track("learning", micros, "micro-batches"):
                part, stats = forward(micro)
                part = part * (len(micro) / len(batch))  # the mean over the batch's prompts
                accelerator.backward(part)
                loss += part.detach()
                parts.append(stats)
            norm = gradient_norm(accelerator, scorer, config.max_grad_norm)
            numbers = state.take_step({"loss": loss, "grad_norm": norm})
            lr = scheduler.get_last_lr()[0]
            state.next_rate()
        state.step += 1
        stats = reduce(add, parts)
        metrics: dict[str, Any] = {
            "epoch": state.step / per_epoch,
            **numbers,
            "accuracy": stats.accuracy.item(),
            "margin": stats.margin.item(),
            "lr": lr,
            "skipped": state.skipped,
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
        state.end_step()

    bar.close()
    log.close()
    scorer = accelerator.unwrap_model(scorer, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        batches = micro_batches(groups, config.micro_batch_size)
        state.check_end(forward(micro)[0] for micro in batches)
    if held and not math.isfinite(state.last("heldout_loss")):
        raise state.diverged("the last held-out loss is not finite")
    print(f"reward: scoring {len(zero)} answers, whose mean becomes 0")
    mean = center_scores(scorer, zero, rows, pad, 2 * config.micro_batch_size)
    if not math.isfinite(mean):
        raise state.diverged(f"the mean score of the reference answers is {mean}")
    folder = config.output / "model"
    replace_folder(folder, partial(save_model, scorer, tokenizer))
    if config.plot:
        plot(log.history, config.output / CURVES)
    kernels = clock.report()
    write_json(config.output / KERNELS, kernels)
    tidy(config.output)
    accuracy = evaluate()["heldout_accuracy"] if held else None  # of the centred scores
    seconds = time.perf_counter() - began
    return RewardResult(scorer, tokenizer, folder, log.history, accuracy, kernels, seconds)
