"""The demo: InstructGPT's three stages on a small generated world, from random weights to a table.

A base model learns from worksheets, and asked a question it asks another one. Supervised
fine-tuning on demonstrations of mixed skill makes it answer; a reward model learns from a noisy
labeler's rankings of its answers; PPO against that reward goes beyond the demonstrators. The
noise-free labeler judges on held-out questions.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import hidden_forward
from rlhf_trainer import world
from rlhf_trainer.checkpoint import write_json
from rlhf_trainer.config import (
    ConfigError,
    DivergedError,
    Options,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf_trainer.curves import LOSS, History, Panel, draw
from rlhf_trainer.data import Demonstration, Encoded, Ranking, collate
from rlhf_trainer.metrics import CURVES
from rlhf_trainer.model import completion_hidden
from rlhf_trainer.optimizer import cosine
from rlhf_trainer.output import remove_run
from rlhf_trainer.ppo import PPO_OPS, exact_kl, train_ppo
from rlhf_trainer.process import LOCK, Stopped, lock
from rlhf_trainer.reward import REWARD_OPS, train_reward
from rlhf_trainer.sampling import respond
from rlhf_trainer.scalar import score_responses
from rlhf_trainer.sft import SFT_OPS, train_sft
from rlhf_trainer.state import check_backend
from rlhf_trainer.world import Task

RESPONSE_TOKENS = 20
WORDS = 128_256  # of the vocabulary in peak_memory: that of Llama 3
MARK = "demo.json"
MARKS = ("win_rate", "kl_to_sft", "reward_model")  # keys by which it is known as a demo's


@dataclass(kw_only=True)
class DemoConfig(Options):
    """InstructGPT's three stages on a small generated world: no download, no data."""

    config: Path | None = None
    """YAML file with values for any of these options; the command line overrides it."""
    seed: int = 0
    """Seed of the world, the weights and the sampling."""
    out: Path = Path("demo_out")
    """Folder for demo.json, curves.png and a folder a stage. What an earlier demo wrote there is
    replaced, and nothing else."""
    backend: Literal["auto", "reference", "cpu"] = "auto"
    """Backend of every rlhf_kernels call; reference is plain PyTorch."""
    quick: bool = False
    """A run of seconds at toy size that shows the way, and too short to learn much."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything. The numbers were tried on 2 cores, where the whole takes minutes."""

    pages: int = 16  # of the corpus, a step
    pretraining_steps: int = 1500
    demonstrations: int = 6000
    compared: int = 8000  # prompts of the reward model, each with 4 answers
    episodes: int = 128 * 50
    questions: int = 400  # held out, for the evaluation
    samples: int = 4  # answers to each of them


QUICK = Sizes(
    pretraining_steps=20,
    demonstrations=320,
    compared=64,
    episodes=256,
    questions=40,
    samples=2,
)


@dataclass
class Answers:
    """The noise-free labeler's view of a model on the held-out questions, (question, sample)."""

    texts: list[list[str]]
    lengths: list[list[int]]  # tokens, the end included
    scores: list[list[float]]
    kl: float  # nats a response, to the supervised model
    entropy: float  # nats a token

    @property
    def score(self) -> float:
        return fmean(s for row in self.scores for s in row)

    @property
    def length(self) -> float:
        return fmean(n for row in self.lengths for n in row)


@dataclass
class Demo:
    """What the stages share."""

    config: DemoConfig
    sizes: Sizes
    tokenizer: PreTrainedTokenizerFast
    seconds: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)

    def options(self, stage: str) -> dict[str, Any]:
        return {
            "output": self.config.out / stage,
            "seed": self.config.seed,
            "backend": self.config.backend,
            "device": "cpu",
            "save_every": 0,
            "max_response_tokens": RESPONSE_TOKENS,
            "progress": sys.stderr.isatty(),
        }

    @property
    def backend(self) -> str | None:
        return None if self.config.backend == "auto" else self.config.backend

    def tasks(self, held_out: bool, name: str, count: int) -> list[Task]:
        """Of the training set or the held-out one; every name draws others."""
        rng = random.Random(f"{self.config.seed} {name}")
        source = world.tasks(self.config.seed, held_out, rng)
        return [next(source) for _ in range(count)]

    def respond(self, model: PreTrainedModel, tasks: Sequence[Task], seed: int):
        prompts = [line(task) for task in tasks]
        return respond(
            model, self.tokenizer, prompts, max_response_tokens=RESPONSE_TOKENS, seed=seed
        )


def main(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, print its report and write demo.json; returns what demo.json holds."""
    options = SFTConfig(seed=config.seed, backend=config.backend)
    options.validate()
    check_backend(options, (*SFT_OPS, *REWARD_OPS, *PPO_OPS), "cpu")
    # A model this small keeps one core busy. On two, threads that wait for one another made the
    # reward stage several times slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with lock(config.out):
            claim(config.out)
            return _run(config)
    except Stopped as stop:
        raise Stopped(stop.number, "stopped; the same command begins anew") from stop
    finally:
        torch.set_num_threads(threads)


def claim(out: Path) -> None:
    """Clear the folder, which is made where it is missing, of what an earlier demo wrote.

    Raises ConfigError where it holds anything but has no demo.json, or one of something else.
    """
    ours = (LOCK, f".{MARK}.new")  # of a demo cut off before its first mark
    if not is_demo(out / MARK) and out.exists() and any(p.name not in ours for p in out.iterdir()):
        raise ConfigError(f"out: expected an earlier demo, an empty folder or none, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARK, dict.fromkeys(MARKS))  # first, so that a demo cut off is known as one
    for stage in ("sft", "reward", "ppo"):
        remove_run(out / stage)
    (out / CURVES).unlink(missing_ok=True)


def is_demo(path: Path) -> bool:
    """Whether the file is a demo's report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and report.keys() >= set(MARKS)


def _run(config: DemoConfig) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    demo = Demo(config, QUICK if config.quick else Sizes(), make_tokenizer())
    began = time.perf_counter()

    base = pretrain(demo)
    drawn = {task.prompt: task for task in demo.tasks(True, "questions", 8000)}
    questions = list(drawn.values())[: demo.sizes.questions]  # all different
    answers = {"base": examine(demo, base, base, questions)}
    sft, sft_history = fine_tune(demo, base)
    answers["SFT"] = examine(demo, sft, sft, questions)
    reward, reward_report, reward_history = learn_reward(demo, sft)
    policy, ppo_history = reinforce(demo, sft, reward)
    answers["PPO"] = examine(demo, policy, sft, questions)
    memory = peak_memory(demo)

    report = {
        "seed": config.seed,
        "backend": demo.kernels["ppo"]["backend"],
        "seconds": {**demo.seconds, "total": time.perf_counter() - began},
        "score": {name: a.score for name, a in answers.items()},
        "win_rate": {
            "PPO against SFT": win_rate(answers["PPO"], answers["SFT"]),
            "PPO against SFT at equal length": win_rate(answers["PPO"], answers["SFT"], True),
            "SFT against base": win_rate(answers["SFT"], answers["base"]),
        },
        "kl_to_sft": {name: answers[name].kl for name in ("SFT", "PPO")},
        "entropy": {name: a.entropy for name, a in answers.items()},
        "length": {name: a.length for name, a in answers.items()},
        "sft": {"heldout_loss": [r["heldout_loss"] for r in sft_history if "heldout_loss" in r]},
        "reward_model": reward_report,
        "kernels": demo.kernels,
        "memory": memory,
        "versions": {
            "rlhf_kernels": rk.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "simd": rk.build_info().get("simd"),
            "threads": torch.get_num_threads(),
        },
    }
    write_json(config.out / MARK, report)
    figure = picture(sft_history, reward_history, ppo_history)
    figure.savefig(config.out / CURVES, dpi=110)
    show(report, answers, questions, config.out)
    return report


# ---- Stages -------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<pad>", "<eos>", *world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def shape(words: int, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The model with a vocabulary of so many words."""
    return LlamaConfig(
        vocab_size=words,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def line(task: Task) -> str:
    return f"{task.prompt} {world.LINE}"


def pretrain(demo: Demo) -> PreTrainedModel:
    """The base model, from random weights: next-token prediction on pages of the corpus."""
    began = time.perf_counter()
    sizes, tokenizer = demo.sizes, demo.tokenizer
    model = LlamaForCausalLM(shape(len(tokenizer), tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), fused=True)
    scheduler = LambdaLR(optimizer, cosine(sizes.pretraining_steps, 30, 0.05))
    rng = random.Random(f"{demo.config.seed} corpus")
    source = world.tasks(demo.config.seed, False, rng)
    index = tokenizer.get_vocab()
    steps = tqdm(
        range(sizes.pretraining_steps),
        desc="base",
        unit="step",
        disable=not sys.stderr.isatty(),
    )
    for _ in steps:
        pages = [world.page(source, rng, 64).split(" ") for _ in range(sizes.pages)]
        width = max(map(len, pages)) + 1
        ids = torch.full((len(pages), width), tokenizer.pad_token_id)
        labels = torch.full((len(pages), width), -100)
        for row, words in enumerate(pages):
            ids[row, : len(words) + 1] = torch.tensor([index[w] for w in (*words, "<eos>")])
            labels[row, : len(words) + 1] = ids[row, : len(words) + 1]
        logprob = rk.token_logprob(
            model(input_ids=ids, use_cache=False).logits[:, :-1],
            labels[:, 1:],
            inplace_backward=True,
            backend=demo.backend,
        )
        loss = -logprob.sum() / (labels[:, 1:] >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not bool(norm.isfinite()):
            raise DivergedError(f"base: the gradient norm is {norm.item()}, of loss {loss.item()}")
        optimizer.step()
        scheduler.step()
    demo.seconds["base"] = time.perf_counter() - began
    print(f"base: {model.num_parameters():,} parameters, {demo.seconds['base']:.0f} s")
    return model.eval()


def fine_tune(demo: Demo, base: PreTrainedModel) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Stage 1, until the held-out loss no longer falls; the best held-out checkpoint."""

    def demonstrations(held_out: bool, count: int) -> list[Demonstration]:
        rng = random.Random(f"{demo.config.seed} demonstrators {held_out}")
        tasks = demo.tasks(held_out, "demonstrations", count)
        return [Demonstration(line(task), world.demonstrate(task, rng)) for task in tasks]

    config = SFTConfig(
        **demo.options("sft"),
        epochs=2 if demo.config.quick else 12,
        patience=1,
        batch_size=64,
        micro_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=10,
        dropout=0.0,
    )
    result = train_sft(
        config,
        model=base,
        tokenizer=demo.tokenizer,
        train=demonstrations(False, demo.sizes.demonstrations),
        heldout=demonstrations(True, min(400, demo.sizes.demonstrations // 8)),
    )
    demo.seconds["sft"], demo.kernels["sft"] = result.seconds, result.kernels
    print(f"sft: held-out loss {result.best['loss']:.4f}, {result.seconds:.0f} s")
    return result.model, result.history


def learn_reward(demo: Demo, sft: PreTrainedModel):
    """Stage 2: rankings of 4 sampled answers by the noisy labeler. Held out are questions."""
    began = time.perf_counter()
    groups: dict[bool, list[tuple[Task, list[str], list[float]]]] = {}
    for held_out, count in (
        (False, demo.sizes.compared),
        (True, max(demo.sizes.compared // 20, 8)),
    ):
        tasks = demo.tasks(held_out, "comparisons", count)
        given = demo.respond(sft, [task for task in tasks for _ in range(4)], demo.config.seed + 1)
        groups[held_out] = []
        for i, task in enumerate(tasks):
            four = given[4 * i : 4 * i + 4]
            scores = [world.score(task, r.text, r.ended) for r in four]
            groups[held_out].append((task, [r.text for r in four], scores))
    rng = random.Random(f"{demo.config.seed} labeler")
    ranked = {
        held_out: [
            Ranking(line(task), tuple(texts), tuple(world.rank(scores, rng)))
            for task, texts, scores in of
        ]
        for held_out, of in groups.items()
    }
    config = RewardConfig(
        **demo.options("reward"),
        epochs=1,
        batch_size=16,
        micro_batch_size=16,
        learning_rate=1.5e-3,
        warmup_steps=10,
        dropout=0.0,
    )
    result = train_reward(
        config, model=sft, tokenizer=demo.tokenizer, train=ranked[False], heldout=ranked[True]
    )
    held = groups[True]
    given_scores = score_responses(
        result.model,
        demo.tokenizer,
        [line(task) for task, texts, _ in held for _ in texts],
        [text for _, texts, _ in held for text in texts],
    )
    learned = [given_scores[4 * i : 4 * i + 4] for i in range(len(held))]
    truth = [scores for _, _, scores in groups[False]]
    second = [world.rank(scores, rng) for scores in truth]
    first = [list(r.ranks) for r in ranked[False]]
    report = {
        "accuracy_on_clean_labels": agreement([s for *_, s in held], learned),
        "accuracy_on_noisy_labels": result.accuracy,
        "labeler_agrees_with_truth": agreement(truth, [[-x for x in row] for row in first]),
        "two_labelers_agree": agreement(
            [[-x for x in row] for row in first], [[-x for x in row] for row in second], truth
        ),
    }
    demo.seconds["reward"] = time.perf_counter() - began
    demo.kernels["reward"] = result.kernels
    print(
        f"reward: held-out accuracy {report['accuracy_on_clean_labels']:.1%} on clean labels, "
        f"{demo.seconds['reward']:.0f} s"
    )
    return result.model, report, result.history


def reinforce(demo: Demo, sft: PreTrainedModel, reward):
    """Stage 3. The policy is trained in a copy: the supervised model is what it is compared
    with."""
    policy = copy.deepcopy(sft)
    config = PPOConfig(
        **demo.options("ppo"),
        episodes=demo.sizes.episodes,
        batch_size=128,
        minibatches=4,
        micro_batch_size=128,
        rollout_batch_size=128,
        inner_epochs=2,
        learning_rate=4e-4,
        value_learning_rate=4e-4,
        kl_coef=0.25,
        warmup_iterations=5,
    )
    prompts = [line(t) for t in demo.tasks(False, "prompts", max(2000, config.batch_size))]
    result = train_ppo(
        config, policy=policy, tokenizer=demo.tokenizer, reward=reward, prompts=prompts
    )
    demo.seconds["ppo"], demo.kernels["ppo"] = result.seconds, result.kernels
    print(f"ppo: score {result.history[-1]['score']:.2f}, {result.seconds:.0f} s")
    return result.policy, result.history


# ---- Evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def examine(
    demo: Demo, model: PreTrainedModel, sft: PreTrainedModel, questions: Sequence[Task]
) -> Answers:
    """Sampled answers to the held-out questions, as the noise-free labeler sees them."""
    n = demo.sizes.samples
    given = demo.respond(model, [task for task in questions for _ in range(n)], demo.config.seed)
    judged = zip((task for task in questions for _ in range(n)), given, strict=True)
    scores = [world.score(task, r.text, r.ended) for task, r in judged]
    prompts = demo.tokenizer([line(task) for task in questions])["input_ids"]
    kl, entropy, tokens = 0.0, 0.0, 0
    for start in range(0, len(given), 256):
        rows = [
            Encoded(prompts[(start + k) // n], r.ids)
            for k, r in enumerate(given[start : start + 256])
        ]
        batch = collate(rows, demo.tokenizer.pad_token_id)
        out = exact_kl(
            completion_hidden(model, batch),
            completion_hidden(sft, batch),
            batch.labels,
            backend=demo.backend,
        )
        kl, entropy = kl + out.kl.sum().item(), entropy + out.entropy.sum().item()
        tokens += sum(len(row.response) for row in rows)

    def by_question(flat: list[Any]) -> list[list[Any]]:
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    return Answers(
        by_question([r.text for r in given]),
        by_question([len(r.ids) for r in given]),
        by_question(scores),
        kl / len(given),
        entropy / tokens,
    )


def agreement(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    among: Sequence[Sequence[float]] | None = None,
) -> float:
    """Share of the pairs that differ in `among` (default: a) which a and b put in the same order; a
    tie of one of them counts half."""
    hits = []
    for row_a, row_b, row in zip(a, b, among or a, strict=True):
        for i, j in combinations(range(len(row)), 2):
            if row[i] != row[j]:
                product = (row_a[i] - row_a[j]) * (row_b[i] - row_b[j])
                hits.append(0.5 if product == 0 else float(product > 0))
    return fmean(hits) if hits else math.nan


def win_rate(a: Answers, b: Answers, equal_length: bool = False) -> dict[str, float]:
    """How often an answer of a scores above one of b to the same question, ties count half: the
    mean over questions, with a 95 % bootstrap interval over questions. With equal_length only pairs
    of answers with the same number of tokens count, and questions that have such a pair."""
    rates = []
    for scores_a, scores_b, lengths_a, lengths_b in zip(
        a.scores, b.scores, a.lengths, b.lengths, strict=True
    ):
        wins = [
            0.5 if x == y else float(x > y)
            for x, n in zip(scores_a, lengths_a, strict=True)
            for y, m in zip(scores_b, lengths_b, strict=True)
            if n == m or not equal_length
        ]
        if wins:
            rates.append(fmean(wins))
    if not rates:
        return {"rate": math.nan, "low": math.nan, "high": math.nan, "questions": 0}
    generator = numpy.random.default_rng(0)
    draws = generator.choice(numpy.array(rates), (2000, len(rates))).mean(1)
    low, high = numpy.quantile(draws, (0.025, 0.975))
    return {
        "rate": fmean(rates),
        "low": float(low),
        "high": float(high),
        "questions": len(rates),
    }


# ---- Memory -------------------------------------------------------------------------------------


def peak_memory(demo: Demo) -> dict[str, Any]:
    """Peak bytes of a forward and backward pass on all tokens of some pages, beyond what was there
    before, in three ways; the model is the demo's, with a vocabulary of today's size."""
    rows = 1 if demo.config.quick else 8
    model = LlamaForCausalLM(shape(WORDS, demo.tokenizer))
    ids = torch.randint(WORDS, (rows, 129), generator=torch.Generator().manual_seed(0))
    labels, count = ids[:, 1:], ids[:, 1:].numel()

    def cross_entropy() -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def with_logits() -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        logprob: Any = rk.token_logprob(logits, labels, inplace_backward=True, backend=demo.backend)
        return -logprob.mean()

    def without_logits() -> Tensor:
        hidden, head = hidden_forward(model, input_ids=ids[:, :-1])
        loss, _ = rk.linear_token_loss(
            hidden,
            tokens=labels,
            loss_fn=lambda logprob, entropy: (-logprob.sum() / count, None),
            backend=demo.backend,
            **head._asdict(),
        )
        return loss

    ways = {
        "torch cross_entropy": cross_entropy,
        "token_logprob in place": with_logits,
        "linear_token_loss": without_logits,
    }
    losses, peaks = {}, {}
    for name, way in ways.items():
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = way()
            loss.backward()
        losses[name], peaks[name] = loss.item(), _peak(profiler)
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise RuntimeError(f"the ways to the same loss disagree: {losses}")
    return {"words": WORDS, "tokens": count, "peak_bytes": peaks}


def _peak(profiler: profile) -> int:
    """Of the bytes that the allocator held more than at the start."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate((size for _, size in sorted(changes, key=itemgetter(0))), initial=0))


# ---- Report -------------------------------------------------------------------------------------


def picture(sft: History, reward: History, ppo: History) -> Figure:
    """One picture of the three stages."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    heldout = {"accuracy": "training (noisy labels)", "heldout_accuracy": "held-out (noisy labels)"}
    drawn = (
        ("SFT", sft, Panel("loss (nats a token)", LOSS)),
        ("reward model", reward, Panel("share of pairs in the right order", heldout, share=True)),
        ("PPO", ppo, Panel("reward model's score", {"score": "score"})),
        ("PPO", ppo, Panel("KL to SFT (nats a response)", {"kl": "KL"})),
        ("PPO", ppo, Panel("entropy (nats a token)", {"entropy": "entropy"})),
        ("PPO", ppo, Panel("values' explained variance", {"explained_variance": "share"})),
    )
    for axes, (title, history, panel) in zip(figure.subplots(2, 3).flat, drawn, strict=True):
        draw(axes, panel, history)
        axes.set_title(title, fontsize=10)
    return figure


def show(
    report: dict[str, Any], answers: dict[str, Answers], questions: Sequence[Task], out: Path
) -> None:
    """Samples before and after, and the tables."""
    print("\nHeld-out questions, the first sampled answer of each model:\n")
    for i in range(5):
        print(f"  {world.pretty(questions[i].prompt)}")
        for name, a in answers.items():
            print(f"    {name:<5}{a.scores[i][0]:>5.2f}  {world.pretty(a.texts[i][0])}")
    print(f"\n{'':<6}{'score':>7}{'tokens':>8}{'entropy':>9}{'KL to SFT':>11}")
    for name, a in answers.items():
        kl = f"{a.kl:>11.2f}" if name != "base" else f"{'':>11}"
        print(f"{name:<6}{a.score:>7.3f}{a.length:>8.1f}{a.entropy:>9.2f}{kl}")
    print("\nwin rate, ties count half, 95 % interval over questions (noise-free labeler):")
    for name, win in report["win_rate"].items():
        print(f"  {name:<34}{win['rate']:>7.1%}  [{win['low']:.1%}, {win['high']:.1%}]")
    model = report["reward_model"]
    print(
        f"reward model: {model['accuracy_on_clean_labels']:.1%} of held-out pairs right; its "
        f"labeler: {model['labeler_agrees_with_truth']:.1%}, and two such labelers agree on "
        f"{model['two_labelers_agree']:.1%}"
    )
    print("\ntime in the kernels, of sampled steps:")
    for stage, clock in report["kernels"].items():
        if "note" in clock:
            print(f"  {stage}: {clock['note']}")
        for op, time_of in clock["ops"].items():
            name = op.removeprefix("rlhf_kernels::")
            print(
                f"  {stage:<8}{name:<28}{time_of['ms_per_step']:>8.2f} ms{time_of['share']:>8.2%}"
            )
    memory = report["memory"]
    print(
        f"\npeak memory of forward and backward on {memory['tokens']:,} tokens, this model with a "
        f"vocabulary of {memory['words']:,}:"
    )
    for name, size in memory["peak_bytes"].items():
        print(f"  {name:<34}{size / 2**20:>7.0f} MiB")
    total = report["seconds"]["total"]
    print(f"\n{total:.0f} s in all; curves: {out / CURVES}; numbers: {out / MARK}")
