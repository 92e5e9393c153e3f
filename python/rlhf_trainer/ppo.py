"""Stage 3: reinforcement learning with PPO.

In, as InstructGPT does it (arXiv 2203.02155, section 3.5 and appendix C.4): whole responses sampled
at temperature 1; the reward model's score at the last token less a per-token KL penalty against the
supervised model; no discount; generalised advantage estimation; clipped policy and value losses; a
value function that starts from the reward model and shares nothing with the policy; one pass over 8
minibatches an iteration; learning rates that warm up over 10 iterations and then stay. From
lm-human-preferences: rewards whitened without a shift, advantages whitened per minibatch with the
biased variance, the adaptive KL controller (off by default). Out: the pretraining gradients of
PPO-ptx; the moving average of the weights; several processes; packing. Dropout is off throughout
(the models stay in eval mode, which takes gradients all the same), so that the log-probabilities of
sampling time are those of training time.
"""

from __future__ import annotations

import copy
import inspect
import math
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from inspect import Parameter
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import LMHead, hidden_forward
from rlhf_trainer.checkpoint import replace_folder, write_json
from rlhf_trainer.config import ConfigError, DataError, DivergedError, PPOConfig
from rlhf_trainer.curves import plot
from rlhf_trainer.data import (
    IGNORE,
    Encoded,
    Prompt,
    Source,
    encode_prompts,
    fingerprint,
    positions,
    read_prompts,
    shuffled,
)
from rlhf_trainer.forecast import forecast
from rlhf_trainer.metrics import CURVES, KERNELS, KernelClock, MetricsLog, OnStep
from rlhf_trainer.model import (
    check_head,
    check_length,
    checked_tokenizer,
    head_logits,
    load_causal_lm,
    load_tokenizer,
    save_model,
    settle,
)
from rlhf_trainer.optimizer import adam, gradient_norm, warm_constant
from rlhf_trainer.output import tidy
from rlhf_trainer.process import one_run
from rlhf_trainer.progress import Progress
from rlhf_trainer.sampling import Samples, sample
from rlhf_trainer.scalar import ScalarModel, score_rows
from rlhf_trainer.state import RunState, backend_of, backends_of, start, weights_fingerprint

# What the stage takes from rlhf_kernels.
PPO_OPS = (
    "linear_logprob",
    "linear_token_loss",
    "logprob_kl",
    "kl_estimate",
    "kl_shaped_rewards",
    "masked_mean",
    "masked_whiten",
    "gae",
    "policy_loss",
    "value_loss",
)
RewardFn = Callable[..., Sequence[float]]
KL_ERROR_BOUND = 0.2  # lm-human-preferences
KL_LOGITS = 2**24  # of one of the two models, that exist at a time


@dataclass
class PPOResult:
    """A finished run. `policy` holds the weights that `folder` holds; the value function is in the
    folder `value` beside it."""

    policy: PreTrainedModel
    value: ScalarModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    history: list[dict[str, Any]]
    kernels: dict[str, Any]
    seconds: float


@dataclass
class Rollout:
    """One iteration's episodes, (B, T) over the response tokens, with what PPO keeps fixed while it
    learns."""

    samples: Samples
    tokens: Tensor  # int64, IGNORE where the mask is False
    logprob: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@one_run
def train_ppo(
    config: PPOConfig,
    *,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: ScalarModel | None = None,
    reward_fn: RewardFn | None = None,
    value: ScalarModel | None = None,
    prompts: Source | None = None,
    on_step: OnStep | None = None,
) -> PPOResult:
    """Train `policy` in place; what is None is read from what the config names.

    The policy as it comes in is the KL reference. `prompts` are texts, or dicts that hold what a
    line of a file holds. reward_fn(prompts, responses) takes the place of the reward model: texts
    without special tokens in, one number a response out. What else the prompts' lines hold it gets
    by keyword, a list a column, where it has a parameter of that name or **kwargs. `value` defaults
    to a copy of the reward model, or with reward_fn to the policy's backbone under a fresh head.
    Raises ConfigError or DataError before any training.
    """
    began = time.perf_counter()
    accelerator = start(config, PPO_OPS)
    backend, device = backend_of(config), accelerator.device
    config = config.on(device.type)

    tokenizer = load_tokenizer(config.tokenizer, config.model) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError(f"model: expected a trained model, got {config.model}")
    tokenizer = checked_tokenizer(tokenizer)
    pad = tokenizer.pad_token_id
    bad = config.on_bad_line
    given = config.require_given("prompt_file") if prompts is None else prompts
    texts = read_prompts(given, tokenizer, on_bad_line=bad)
    encoded = encode_prompts(tokenizer, texts, bad)
    kept = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= config.max_prompt_tokens]
    if not kept:
        raise ConfigError(
            f"max_prompt_tokens: expected a prompt that fits, got {len(encoded)} longer ones"
        )
    dropped = len(encoded) - len(kept)
    texts, encoded = [texts[i] for i in kept], [encoded[i] for i in kept]
    columns = columns_for(reward_fn, texts) if reward_fn is not None else {}
    total, left_out = divmod(config.episodes, config.batch_size)
    print(
        f"ppo: {len(kept)} prompts, {dropped} dropped (long prompts); {total} iterations of "
        f"{config.batch_size} episodes" + (f", {left_out} episodes left out" if left_out else "")
    )
    if policy is None:
        policy = load_causal_lm(config.require_given("model"), tokenizer, config.seed)
    if reward is None and reward_fn is None:
        reward = ScalarModel.load(config.require_given("reward_model"))
    for name, scorer in (("reward_model", reward), ("value", value)):
        if scorer is not None:
            scorer.check_ids(name, tokenizer, texts)
    trained_on = reward.tokenizer if reward else None
    if trained_on is not None and trained_on.chat_template != tokenizer.chat_template:
        print("ppo: the reward model was trained with another chat template than the policy's")
    if value is None:
        value = copy.deepcopy(reward) if reward else ScalarModel.from_causal_lm(policy, pad)
        value.requires_grad_(True)
    longest = max(map(len, encoded)) + config.max_response_tokens
    for model in (policy, value.model, *([reward.model] if reward else [])):
        check_length(model, longest)
    check_head(policy)
    settle(policy, tokenizer)
    settle(value, tokenizer, "value")
    reference = copy.deepcopy(policy).eval()

    actor, critic = accelerator.prepare_model(policy), accelerator.prepare_model(value)
    reference = accelerator.prepare_model(reference, evaluation_mode=True)
    judge: Any = reward
    if reward is not None:
        judge = accelerator.prepare_model(reward, evaluation_mode=True)
    inputs = {
        "prompts": fingerprint((encoded, columns)),
        "tokenizer entries": fingerprint(sorted(tokenizer.get_vocab().items())),
        "model weights": weights_fingerprint(policy),
        "reward weights": weights_fingerprint(reward) if reward else "reward_fn",
    }
    groups = [
        {"params": list(actor.parameters()), "lr": config.learning_rate},
        {"params": list(critic.parameters()), "lr": config.value_learning_rate},
    ]
    optimizer = accelerator.prepare_optimizer(adam(config, groups, device))
    scheduler = LambdaLR(optimizer, warm_constant(config.warmup_iterations))
    state = RunState(
        config,
        tokenizer,
        {"policy": actor, "value": critic},
        optimizer,
        scheduler,
        inputs,
        total,
        kl_coef=config.kl_coef,
    )
    state.resume()
    actor.eval()
    critic.eval()
    log = MetricsLog(config.output, config.stage, state.history, on_step)
    ran = backends_of(config, PPO_OPS, device.type)
    clock = KernelClock(config.profile_steps, ran, device)
    bar = Progress("ppo", "iteration", state.step, total, config.progress)

    size = config.batch_size // config.minibatches

    def micro_batches_of(order: Tensor) -> list[Tensor]:
        return [m for rows in order.split(size) for m in rows.split(config.micro_batch_size)]

    def score(samples: Samples, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Scores (B,) of the responses cut where they end: as judged, and after the rule for those
        that do not."""
        bar.part("scoring", 0, len(chosen), "responses")
        if reward_fn is not None:
            extra = {name: [values[i] for i in chosen] for name, values in columns.items()}
            given = reward_fn([texts[i] for i in chosen], samples.texts(tokenizer), **extra)
            judged = checked_rewards(reward_fn, given, len(chosen)).to(device)
        else:
            responses = zip(chosen, samples.responses(), strict=True)
            rows = [Encoded(encoded[i], response) for i, response in responses]
            judged = score_rows(judge, rows, pad, config.rollout_batch_size)
        if config.missing_eos_score is not None:
            return judged, judged.masked_fill(~samples.ended, config.missing_eos_score)
        return judged, judged - config.missing_eos_penalty * (~samples.ended)

    def forward(model: nn.Module, samples: Samples, rows: Tensor) -> Any:
        """Hidden states (b, T, H) and head, or values (b, T), at the positions that predict the
        response tokens."""
        first = samples.prompt_width - 1
        mask = samples.attention_mask[rows]
        inputs = {
            "input_ids": samples.input_ids[rows],
            "attention_mask": mask,
            "position_ids": positions(mask),
        }
        if model is critic:
            return model(**inputs)[:, first:-1]
        columns = torch.arange(first, mask.shape[1] - 1, device=device)
        return hidden_forward(model, **inputs, use_cache=False, logits_to_keep=columns)

    @torch.no_grad()
    def explore(chosen: list[int], first_order: Tensor) -> tuple[Rollout, dict[str, Any]]:
        """Sample and score; old log-probabilities, values and advantages; and the iteration's
        statistics."""
        try:
            samples = sample(
                accelerator.unwrap_model(actor),
                tokenizer,
                [encoded[i] for i in chosen],
                max_response_tokens=config.max_response_tokens,
                temperature=config.temperature,
                batch_size=config.rollout_batch_size,
                on_token=lambda n: bar.part("sampling", n, config.max_response_tokens, "tokens"),
            )
        except DivergedError as error:
            raise state.diverged(f"iteration {state.step + 1}: {error}") from error
        judged, scores = score(samples, chosen)
        mask = samples.mask
        tokens = samples.tokens.masked_fill(~mask, IGNORE)
        logprob, ref_logprob, kl, entropy, values = (
            torch.zeros(mask.shape, device=device) for _ in range(5)
        )
        with clock.kernels():
            # The first optimiser step has a ratio of exactly 1. A model's forward pass is not batch
            # invariant, so the first pass over the data takes the same rows in the same
            # micro-batches as this one; and the old log-probabilities come from the op whose chunks
            # and bits are those of the loss, not from the logits that the KL takes.
            for rows in bar.track("log-probs", micro_batches_of(first_order), "micro-batches"):
                policies = forward(actor, samples, rows), forward(reference, samples, rows)
                options: Any = {"temperature": config.temperature, "backend": backend}
                with accelerator.autocast():
                    for (hidden, head), result in zip(
                        policies, (logprob, ref_logprob), strict=True
                    ):
                        result[rows] = rk.linear_logprob(  # type: ignore[assignment]
                            hidden, tokens=tokens[rows], **head._asdict(), **options
                        )
                    out = exact_kl(*policies, tokens[rows], **options)
                kl[rows], entropy[rows] = out.kl, out.entropy
                values[rows] = forward(critic, samples, rows)
            rewards = rk.kl_shaped_rewards(
                scores,
                logprob,
                ref_logprob,
                mask,
                kl_coef=state.kl_coef,
                clip_score=config.clip_score,
                backend=backend,
            )
            if config.whiten_rewards:
                shaped = rk.masked_whiten(
                    rewards, mask, shift_mean=False, unbiased=False, backend=backend
                )
            else:
                shaped = rewards
            advantages, returns = rk.gae(
                shaped, values, mask, gamma=config.gamma, lam=config.lam, backend=backend
            )
            length = mask.sum() / len(chosen)
            sampled = rk.kl_estimate(logprob, ref_logprob, kind="k1", backend=backend)
            sums = {  # a masked mean over tokens times tokens a sequence is a mean over sequences
                "reward": rk.masked_mean(rewards, mask, backend=backend) * length,
                "value": rk.masked_mean(values, mask, backend=backend),
                "kl": rk.masked_mean(kl, mask, backend=backend) * length,
                "kl_sampled": rk.masked_mean(sampled, mask, backend=backend) * length,
                "entropy": rk.masked_mean(entropy, mask, backend=backend),
            }
        metrics = {
            "score": judged.mean().item(),
            **{name: number.item() for name, number in sums.items()},
            "length": length.item(),
            "eos_rate": samples.ended.float().mean().item(),
            "cut": int((~samples.ended).sum()),
        }
        return Rollout(samples, tokens, logprob, values, advantages, returns), metrics

    def update(rollout: Rollout, rows: Tensor) -> list[Any] | None:
        """One optimiser step on a minibatch: PolicyStats, ValueStats, policy loss, value loss; None
        where it was skipped."""
        mask = rollout.samples.mask
        tokens = mask[rows].sum()
        advantages = rk.masked_whiten(
            rollout.advantages[rows], mask[rows], unbiased=False, backend=backend
        )

        def surrogate(logprob: Tensor, entropy: None, **fixed: Any) -> tuple[Tensor, Any]:
            return rk.policy_loss(
                logprob, **fixed, clip_low=config.clip, normalizer=tokens, backend=backend
            )

        results = []
        optimizer.zero_grad()
        for micro, advantage in zip(
            rows.split(config.micro_batch_size),
            advantages.split(config.micro_batch_size),
            strict=True,
        ):
            fixed = {"old_logprob": rollout.logprob[micro], "advantages": advantage}
            hidden, head = forward(actor, rollout.samples, micro)
            with accelerator.autocast():
                policy_loss, policy_stats = rk.linear_token_loss(
                    hidden,
                    tokens=rollout.tokens[micro],
                    loss_fn=surrogate,
                    per_token=fixed | {"mask": mask[micro]},
                    temperature=config.temperature,
                    backend=backend,
                    **head._asdict(),
                )
            accelerator.backward(policy_loss)
            value_loss, value_stats = rk.value_loss(
                forward(critic, rollout.samples, micro),
                rollout.values[micro],
                rollout.returns[micro],
                mask[micro],
                clip=config.value_clip,
                normalizer=tokens,
                backend=backend,
            )
            accelerator.backward(config.value_coef * value_loss)
            results.append((policy_stats, value_stats, policy_loss.detach(), value_loss.detach()))
        sums = [reduce(add, parts) for parts in zip(*results, strict=True)]
        # Apart: the two networks share nothing, and a large value gradient must not slow the
        # policy.
        state.take_step(
            {
                "policy loss": sums[2],
                "value loss": sums[3],
                "policy gradient norm": gradient_norm(accelerator, actor, config.max_grad_norm),
                "value gradient norm": gradient_norm(accelerator, critic, config.max_grad_norm),
            }
        )
        return None if state.bad else sums

    @torch.no_grad()
    def last_numbers() -> Iterator[Tensor]:
        """What the last weights make of the last episodes, a number a micro-batch."""
        for rows in micro_batches_of(torch.arange(config.batch_size, device=device)):
            hidden, _ = forward(actor, rollout.samples, rows)
            yield hidden.mean() + forward(critic, rollout.samples, rows).mean()

    def prompts_of(step: int) -> list[int]:
        """The prompts of an iteration, as a function of seed and step."""
        chosen: list[int] = []
        for episode in range(step * config.batch_size, (step + 1) * config.batch_size):
            epoch, k = divmod(episode, len(encoded))
            if k == 0 or not chosen:
                order = shuffled(len(encoded), config.seed, epoch, "prompts")
            chosen.append(order[k])
        return chosen

    if config.progress and device.type == "cpu" and state.step < total:
        some = [encoded[i] for i in prompts_of(state.step)]
        print(forecast(policy, tokenizer, some, config, reward is not None, total - state.step))
    while state.step < total:
        iteration_began = time.perf_counter()
        chosen = prompts_of(state.step)
        passes = [
            torch.tensor(shuffled(config.batch_size, config.seed, epoch, "minibatches")).to(device)
            for epoch in range(
                state.step * config.inner_epochs, (state.step + 1) * config.inner_epochs
            )
        ]
        minibatches = [rows for order in passes for rows in order.split(size)]
        with clock.step():
            rollout, metrics = explore(chosen, passes[0])
            usable, results = not state.skip(metrics), []
            if usable:
                with clock.kernels():
                    learning = bar.track("learning", minibatches, "minibatches")
                    results = [update(rollout, rows) for rows in learning]
        state.step += 1
        metrics |= {
            "episodes": state.step * config.batch_size,
            "kl_coef": state.kl_coef,
            "lr": scheduler.get_last_lr()[0],
            "skipped": state.skipped,
        }
        taken = [result for result in results if result is not None]
        if taken:
            policy_stats, value_stats, policy_loss, value_loss = (
                reduce(add, parts) for parts in zip(*taken, strict=True)
            )
            metrics |= {
                "clip_frac": policy_stats.clip_frac.item(),
                "approx_kl": policy_stats.approx_kl.item(),
                "ratio_max": policy_stats.ratio_max.item(),
                "first_approx_kl": taken[0][0].approx_kl.item(),  # 0: the first step's ratio is 1
                "policy_loss": policy_loss.item() / len(taken),
                "value_loss": value_loss.item() / len(taken),
                "value_clip_frac": value_stats.clip_frac.item(),
                "explained_variance": value_stats.explained_variance.item(),
            }
        metrics["seconds"] = time.perf_counter() - iteration_began
        state.next_rate()
        if config.kl_target is not None and usable:
            error = metrics["kl"] / config.kl_target - 1
            error = min(max(error, -KL_ERROR_BOUND), KL_ERROR_BOUND)
            state.kl_coef *= 1 + error * config.batch_size / config.kl_horizon
        log.write(state.step, **metrics)
        bar.set_postfix(
            score=f"{metrics['score']:.3f}",
            kl=f"{metrics['kl']:.2f}",
            cut=f"{metrics['cut']}/{config.batch_size}",
            episodes_per_s=int(config.batch_size / metrics["seconds"]),
            refresh=False,
        )
        bar.update()
        state.end_step()

    bar.close()
    log.close()
    cut = sum(row.get("cut", 0) for row in log.history)
    print(
        f"ppo: {cut} of {state.step * config.batch_size} responses were cut at "
        f"{config.max_response_tokens} tokens, before their end"
    )
    actor, critic = (accelerator.unwrap_model(m, keep_fp32_wrapper=False) for m in (actor, critic))
    state.check_end(last_numbers())
    folder = config.output / "model"
    for name, model in (("model", actor), ("value", critic)):
        replace_folder(config.output / name, partial(save_model, model, tokenizer))
    if config.plot:
        plot(log.history, config.output / CURVES)
    kernels = clock.report()
    write_json(config.output / KERNELS, kernels)
    tidy(config.output)
    seconds = time.perf_counter() - began
    return PPOResult(actor, critic, tokenizer, folder, log.history, kernels, seconds)


def columns_for(reward_fn: RewardFn, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """The columns of the prompts that reward_fn takes beside prompts and responses, a value a
    prompt: those it names, or all of them where it has **kwargs. A prompt without one gives None.

    Raises DataError for a prompt without a column that reward_fn cannot do without, and ConfigError
    where it does not take the two lists of texts in that order.
    """
    try:
        signature = inspect.signature(reward_fn)
    except ValueError:  # some callables in C have no signature
        return {}
    parameters = list(signature.parameters.values())
    rows = [prompt.columns if isinstance(prompt, Prompt) else {} for prompt in prompts]
    known = list(dict.fromkeys(name for row in rows for name in row))
    by_place = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    taken = [p.name for p in parameters if p.kind in by_place][:2]  # prompts and responses
    rest = [p for p in parameters if p.kind in by_name and p.name not in taken]
    variadic = any(p.kind == Parameter.VAR_POSITIONAL for p in parameters)
    if (len(taken) < 2 and not variadic) or "prompts" in taken[1:] or "responses" in taken[:1]:
        raise ConfigError(
            "reward_fn: expected a function whose first two parameters are prompts and responses, "
            f"got one with {signature}"
        )
    for name in (p.name for p in rest if p.default is Parameter.empty):
        missing = [i for i, row in enumerate(rows) if name not in row]
        if missing:
            where = getattr(prompts[missing[0]], "where", "") or f"prompts[{missing[0]}]"
            raise DataError(
                f"{where}: missing key {name!r}, which reward_fn requires and {len(missing)} of "
                f"{len(rows)} prompts lack"
            )
    if not any(p.kind == Parameter.VAR_KEYWORD for p in parameters):
        known = [name for name in known if name in {p.name for p in rest}]
    return {name: [row.get(name) for row in rows] for name in known if name not in taken}


def checked_rewards(reward_fn: RewardFn, given: Any, count: int) -> Tensor:
    """What reward_fn returned, as float32 (count,).

    Raises ValueError where that is not `count` numbers. One that is not finite, or None, is named,
    and stays as such: its iteration is skipped and counted, as at any such number.
    """
    name = f"reward_fn {getattr(reward_fn, '__name__', type(reward_fn).__name__)}"
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
        raise ValueError(f"{name}: expected {count} numbers, got {reprlib.repr(given)}")
    items: list[Any] = list(given)
    if len(items) != count:
        raise ValueError(f"{name}: expected {count} numbers, one a response, got {len(items)}")
    numbers: list[float] = []
    for k, item in enumerate(items):
        try:
            if isinstance(item, str | bytes):
                raise TypeError
            numbers.append(math.nan if item is None else float(item))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(
                f"{name}: expected a number for response {k} of {count}, got {reprlib.repr(item)}"
            ) from None
    rewards = torch.tensor(numbers, dtype=torch.float64).float()
    for k in (~rewards.isfinite()).nonzero()[:1].flatten().tolist():
        tqdm.write(f"{name}: {items[k]} for response {k} of {count}")
    return rewards


@torch.no_grad()
def exact_kl(
    policy: tuple[Tensor, LMHead],
    reference: tuple[Tensor, LMHead],
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> rk.LogprobKL:
    """logprob_kl of two models from hidden states (..., H), for some positions at a time; 0 at
    ignored tokens (...)."""
    places = (tokens != IGNORE).nonzero(as_tuple=True)
    results = rk.LogprobKL(*(torch.zeros(tokens.shape, device=tokens.device) for _ in range(4)))
    size = max(KL_LOGITS // policy[1].weight.shape[0], 1)
    for some in zip(*(place.split(size) for place in places), strict=True):
        logits, ref_logits = (head_logits(x[some], head) for x, head in (policy, reference))
        part = rk.logprob_kl(
            logits,
            ref_logits,
            tokens[some],
            temperature=temperature,
            backend=backend,
        )
        for whole, x in zip(results, part, strict=True):
            whole[some] = x
    return results
