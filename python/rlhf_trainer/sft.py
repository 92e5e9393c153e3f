"""Stage 1: supervised fine-tuning.

In, as InstructGPT does it (arXiv 2203.02155, appendix C.1): cross entropy on the response tokens
alone, Adam with betas (0.9, 0.95), a cosine to a tenth of the peak without warm-up, residual
dropout, many epochs. Out: choosing the checkpoint by reward-model score (there is no reward model
yet: the held-out loss chooses, and ends the training once it no longer falls); the 10 % of
pretraining text that is mixed in before PPO; several processes; packing. Multi-turn chats train the
last turn of the assistant only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk
from rlhf_trainer.checkpoint import replace_folder, write_json
from rlhf_trainer.config import ConfigError, SFTConfig
from rlhf_trainer.curves import plot
from rlhf_trainer.data import (
    Encoded,
    Source,
    collate,
    count_cut,
    encode_demonstrations,
    fingerprint,
    micro_batches,
    read_demonstrations,
    shuffled,
    split,
)
from rlhf_trainer.metrics import CURVES, KERNELS, KernelClock, MetricsLog, OnStep
from rlhf_trainer.model import (
    check_head,
    check_length,
    checked_tokenizer,
    completion_hidden,
    load_causal_lm,
    load_tokenizer,
    load_weights,
    save_model,
    set_dropout,
    settle,
    train_tokenizer,
)
from rlhf_trainer.optimizer import adam, cosine, gradient_norm
from rlhf_trainer.output import tidy
from rlhf_trainer.process import one_run
from rlhf_trainer.progress import Progress
from rlhf_trainer.state import RunState, backend_of, backends_of, start, weights_fingerprint

SFT_OPS = ("linear_token_loss",)  # of rlhf_kernels


@dataclass
class SFTResult:
    """A finished run. `model` holds the weights that `folder` holds; `kernels` is what
    KernelClock.report gives."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    history: list[dict[str, Any]]
    best: dict[str, float]
    kernels: dict[str, Any]
    seconds: float


@one_run
def train_sft(
    config: SFTConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: Source | None = None,
    heldout: Source | None = None,
    on_step: OnStep | None = None,
) -> SFTResult:
    """Fine-tune `model` in place; what is None is read from what the config names.

    Examples are Demonstrations, or dicts that hold what a line of a file holds. `heldout` None
    holds out config.heldout_share of `train`; an empty one turns evaluation off, and then the last
    weights are kept. Raises ConfigError or DataError before any training.
    """
    began = time.perf_counter()
    folder = config.output / "model"
    accelerator = start(config, SFT_OPS)
    backend, device = backend_of(config), accelerator.device

    tokenizer = load_tokenizer(config.tokenizer, config.model) if tokenizer is None else tokenizer
    read = partial(read_demonstrations, tokenizer=tokenizer, on_bad_line=config.on_bad_line)
    train = read(config.require_given("train_file") if train is None else train, name="train")
    apart = config.heldout_file if heldout is None else heldout
    if apart is not None:
        heldout = read(apart, name="heldout")
    else:
        train, heldout = split(train, [e.prompt for e in train], config.heldout_share, config.seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(text for e in train for text in (e.prompt, e.response))
    tokenizer = checked_tokenizer(tokenizer)
    if model is None:
        model = load_causal_lm(config.require_given("model"), tokenizer, config.seed)
    settle(model, tokenizer)
    rows, held = (
        [
            row
            for row in encode_demonstrations(
                tokenizer, examples, config.max_response_tokens, config.on_bad_line
            )
            if 0 < len(row.prompt) <= config.max_prompt_tokens
        ]
        for examples in (train, heldout)
    )
    if not rows:
        raise ConfigError(
            f"max_prompt_tokens: expected a prompt that fits, got {len(train)} longer ones"
        )
    check_length(model, max(len(row.prompt) + len(row.response) for row in rows + held))
    check_head(model)
    inputs = {
        "training data": fingerprint(rows),
        "held-out data": fingerprint(held),
        "tokenizer entries": fingerprint(sorted(tokenizer.get_vocab().items())),
        "model weights": weights_fingerprint(model),
    }
    dropped = len(train) + len(heldout) - len(rows) - len(held)
    print(
        f"sft: {len(rows)} demonstrations, {len(held)} held out, {dropped} dropped (long prompts); "
        f"{count_cut(rows + held)} responses cut to {config.max_response_tokens} tokens"
    )

    per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.epochs * per_epoch
    set_dropout(model, config.dropout)
    lm, pad = accelerator.prepare_model(model), tokenizer.pad_token_id
    groups = [{"params": list(lm.parameters()), "lr": config.learning_rate}]
    optimizer = accelerator.prepare_optimizer(adam(config, groups, device))
    scheduler = LambdaLR(optimizer, cosine(total, config.warmup_steps, config.lr_floor))
    state = RunState(config, tokenizer, {"model": lm}, optimizer, scheduler, inputs, total)
    state.resume()
    log = MetricsLog(config.output, config.stage, state.history, on_step)
    ran = backends_of(config, SFT_OPS, device.type)
    clock = KernelClock(config.profile_steps, ran, device)
    bar = Progress("sft", "step", state.step, total, config.progress)

    def forward(micro: Sequence[Encoded], tokens: int) -> Tensor:
        """The loss of a micro-batch: its share of a mean over so many tokens."""
        batch = collate(micro, pad).to(device)
        hidden, head = completion_hidden(lm, batch)
        with accelerator.autocast():
            loss, _ = rk.linear_token_loss(
                hidden,
                tokens=batch.labels,
                loss_fn=lambda logprob, entropy: (-logprob.sum() / tokens, None),
                backend=backend,
                **head._asdict(),
            )
        return loss

    def evaluate() -> float:
        lm.eval()
        tokens = sum(len(row.response) for row in held)
        with torch.no_grad():
            micros = list(micro_batches(held, config.micro_batch_size))
            parts = [forward(m, tokens) for m in bar.track("evaluating", micros, "micro-batches")]
        return torch.stack(parts).sum().item()

    while state.step < total and not 0 < config.patience <= state.stale:
        epoch, k = divmod(state.step, per_epoch)
        order = shuffled(len(rows), config.seed, epoch, "examples")
        batch_rows = [rows[i] for i in order[k * config.batch_size :][: config.batch_size]]
        # The mean is over the tokens of the whole batch: a mean per micro-batch would weigh short
        # ones too much.
        tokens = sum(len(row.response) for row in batch_rows)
        step_began = time.perf_counter()
        lm.train()
        loss = torch.zeros((), device=device)
        micros = list(micro_batches(batch_rows, config.micro_batch_size))
        with clock.step(), clock.kernels():
            optimizer.zero_grad()
            for micro in bar.track("learning", micros, "micro-batches"):
                part = forward(micro, tokens)
                accelerator.backward(part)
                loss += part.detach()
            norm = gradient_norm(accelerator, lm, config.max_grad_norm)
            numbers = state.take_step({"loss": loss, "grad_norm": norm})
            lr = scheduler.get_last_lr()[0]
            state.next_rate()
        state.step += 1
        metrics: dict[str, Any] = {
            "epoch": state.step / per_epoch,
            **numbers,
            "lr": lr,
            "tokens": tokens,
            "skipped": state.skipped,
        }
        metrics["seconds"] = time.perf_counter() - step_began
        if held and (state.step % (config.eval_every or per_epoch) == 0 or state.step == total):
            metrics["heldout_loss"] = evaluate()
            state.stale += 1
            if metrics["heldout_loss"] < state.best_loss:
                state.best_loss, state.best_step, state.stale = (
                    metrics["heldout_loss"],
                    state.step,
                    0,
                )
                if config.keep == "best":
                    state.save_best(lm)
        log.write(state.step, **metrics)
        bar.set_postfix(
            loss=f"{metrics['loss']:.3f}",
            tokens_per_s=int(tokens / metrics["seconds"]),
            refresh=False,
        )
        bar.update()
        state.end_step()

    bar.close()
    log.close()
    if state.step < total:
        print(
            f"sft: stopped early, after step {state.step} of {total}: the last {state.stale} "
            f"held-out evaluations found no loss below that of step {state.best_step}"
        )
    lm = accelerator.unwrap_model(lm, keep_fp32_wrapper=False)
    lm.eval()
    chosen = state.best_loss if config.keep == "best" else state.last("heldout_loss")
    if held and not math.isfinite(chosen):
        raise state.diverged("no held-out loss of the weights to keep is finite")
    if state.best_kept:
        load_weights(lm, state.best_folder)
    with torch.no_grad():
        state.check_end(forward(m, 1) for m in micro_batches(rows, config.micro_batch_size))
    replace_folder(folder, partial(save_model, lm, tokenizer))
    if config.plot:
        plot(log.history, config.output / CURVES)
    kernels = clock.report()
    write_json(config.output / KERNELS, kernels)
    tidy(config.output)
    best = {"loss": state.best_loss, "step": state.best_step}
    seconds = time.perf_counter() - began
    return SFTResult(lm, tokenizer, folder, log.history, best, kernels, seconds)
