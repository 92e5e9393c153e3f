"""What a run says while it works, and before it starts."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from rlhf_trainer import forecast as forecasts
from rlhf_trainer import progress
from rlhf_trainer.config import ConfigError, PPOConfig
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.progress import Progress, duration
from rlhf_trainer.reward import train_reward
from rlhf_trainer.sft import train_sft

PROMPTS = ["say a", "say b twice c", "good", "say d e f a"]


def count_good(prompts, responses):
    return [response.split().count("good") / 5 for response in responses]


@pytest.fixture
def every_line(monkeypatch):
    """No terminal, and every line is said."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)


def test_lines_where_there_is_no_terminal(every_line, capsys):
    bar = Progress("ppo", "iteration", 1, 3, True)
    bar.part("sampling", 5, 64, "tokens")
    assert list(bar.track("learning", "ab", "minibatches")) == ["a", "b"]
    bar.set_postfix(score="0.5", refresh=False)
    bar.update()
    bar.part("sampling", 1, 64, "tokens")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "ppo: iteration 2 of 3: sampling, 5 of 64 tokens",
        "ppo: iteration 2 of 3: learning, 0 of 2 minibatches",
        "ppo: iteration 2 of 3: learning, 1 of 2 minibatches",
    ]
    assert lines[3].startswith("ppo: iteration 2 of 3: score 0.5; 0.0 seconds left")
    assert lines[4] == "ppo: iteration 3 of 3: sampling, 1 of 64 tokens"


def test_lines_are_few_and_none_where_they_are_not_wanted(capsys, monkeypatch):
    bar = Progress("sft", "step", 0, 3, True)
    for k in range(100):
        bar.part("learning", k, 100, "micro-batches")
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    quiet = Progress("sft", "step", 0, 3, False)
    quiet.part("learning", 1, 2, "micro-batches")
    quiet.update()
    assert capsys.readouterr().err == ""


def test_bar_of_a_terminal_names_the_part(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "REDRAW_EVERY", 0.0)
    bar = Progress("ppo", "iteration", 0, 3, True)
    bar.part("sampling", 5, 64, "tokens")
    assert "ppo: sampling 5/64 tokens:   0%" in capsys.readouterr().err
    bar.update()
    bar.close()
    assert "| 1/3 [" in capsys.readouterr().err


def test_every_part_of_an_iteration_is_shown_and_changes_no_number(
    ppo_config, make_model, tokenizer, every_line, capsys, untimed
):
    data = {"tokenizer": tokenizer, "reward_fn": count_good, "prompts": PROMPTS}
    quiet = train_ppo(ppo_config("quiet", episodes=32), policy=make_model(), **data)
    silent = capsys.readouterr()
    assert silent.err == "" and "takes up to about" not in silent.out
    shown = train_ppo(ppo_config("shown", episodes=32, progress=True), policy=make_model(), **data)
    said = capsys.readouterr()
    for part in (
        "sampling, 1 of 5 tokens",
        "scoring, 0 of 16 responses",
        "log-probs, 3 of 4 micro-batches",
        "learning, 1 of 2 minibatches",
    ):
        for k in (1, 2):
            assert f"ppo: iteration {k} of 2: {part}\n" in said.err
    assert "ppo: an iteration of 16 episodes of up to 5 tokens takes up to about " in said.out
    assert said.out.index("takes up to about") > said.out.index("2 iterations of 16 episodes")
    assert untimed(shown.history) == untimed(quiet.history)


def test_parts_of_the_supervised_stages_are_shown(
    sft_config, reward_config, make_model, tokenizer, demonstrations, pairs, every_line, capsys
):
    options = {"epochs": 1, "micro_batch_size": 2, "progress": True}
    data = {"tokenizer": tokenizer, "model": make_model()}
    train_sft(sft_config(**options), train=demonstrations, heldout=demonstrations[:4], **data)
    train_reward(reward_config(**options), train=pairs, heldout=pairs[:4], **data)
    said = capsys.readouterr()
    for stage in ("sft", "reward"):
        assert f"{stage}: step 1 of 3: learning, 2 of 3 micro-batches\n" in said.err
        assert f"{stage}: step 3 of 3: evaluating, 1 of 2 micro-batches\n" in said.err
    assert "reward: scoring 8 answers, whose mean becomes 0" in said.out


def test_forecast_by_hand(make_model, tokenizer, monkeypatch):
    """1 ms a token in the body and 0.1 ms in the head, 7 s of sampling."""
    monkeypatch.setattr(forecasts, "seconds_per_token", lambda *args: (1e-3, 1e-4))
    monkeypatch.setattr(forecasts, "sampling_seconds", lambda *args: 7.0)
    config = PPOConfig(batch_size=16, max_response_tokens=20, inner_epochs=2)
    line = forecasts.forecast(make_model(), tokenizer, [[3] * 10] * 16, config, True, 100)
    # 16 sequences: 4 + 6 * 2 passes of 30 tokens in bodies, 4 + 3 * 2 of 20 in heads
    learning = 16 * (16 * 30e-3 + 10 * 20e-4)
    assert learning == pytest.approx(8.0)
    assert line == (
        "ppo: an iteration of 16 episodes of up to 20 tokens takes up to about 15 seconds here "
        "(7.0 seconds of sampling, 8.0 seconds of scoring and learning), all 100 of them 25 minutes"
    )


def test_sampling_forecast_by_hand(make_model, tokenizer, monkeypatch):
    """A second for the first token, 0.1 s for each further one, in 2 batches of 8."""
    calls: list[int] = []

    def seconds(work):
        work()
        calls.append(1)
        return 1.0 if len(calls) == 1 else 1.0 + 0.1 * forecasts.STEPS

    monkeypatch.setattr(forecasts, "_seconds", seconds)
    config = PPOConfig(batch_size=16, rollout_batch_size=8, max_response_tokens=20)
    got = forecasts.sampling_seconds(
        make_model(eos_token_id=None), tokenizer, [[3] * 10] * 16, config, 1e-3
    )
    assert got == pytest.approx(2 * 20 * 0.1 + 16 * 10 * 1e-3)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 seconds"), (9.96, "10.0 seconds"), (119, "119 seconds"), (150, "2 minutes"),
     (7300, "2 hours"), (900_000, "10 days")],
)  # fmt: skip
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_ppo_defaults_fit_the_device(capsys):
    assert PPOConfig().on("cuda").batch_size == 512
    assert PPOConfig().on("cuda").max_response_tokens == 1024
    capsys.readouterr()
    config = PPOConfig().on("cpu")
    assert (config.batch_size, config.max_response_tokens) == (64, 64)
    said = "ppo: batch_size 64, max_response_tokens 64 by default on a CPU\n"
    assert capsys.readouterr().out == said
    given = PPOConfig(batch_size=128, max_response_tokens=32)
    assert given.on("cpu") == given and capsys.readouterr().out == ""
    changed = {f.name for f in dataclasses.fields(config)
               if getattr(config, f.name) != getattr(PPOConfig(), f.name)}  # fmt: skip
    assert changed == {"batch_size", "max_response_tokens"}
    PPOConfig(minibatches=128).on("cuda")
    with pytest.raises(ConfigError, match=r"minibatches: expected a divisor of batch_size \(64\)"):
        PPOConfig(minibatches=128).on("cpu")


def test_resume_compares_what_the_defaults_stood_for(
    ppo_config, make_model, tokenizer, interrupt, capsys
):
    def policy():
        return make_model("llama", max_position_embeddings=80)

    data = {"tokenizer": tokenizer, "reward_fn": count_good, "prompts": PROMPTS}
    free = {"batch_size": 0, "max_response_tokens": 0, "episodes": 128, "micro_batch_size": 32}
    with pytest.raises(interrupt.error):
        train_ppo(ppo_config(save_every=1, **free), policy=policy(), on_step=interrupt(2), **data)
    other = free | {"max_response_tokens": 32, "resume": True}
    with pytest.raises(ConfigError, match="max_response_tokens: expected 64 as in"):
        train_ppo(ppo_config(**other), policy=policy(), **data)
    spelt = free | {"batch_size": 64, "max_response_tokens": 64, "resume": True}
    result = train_ppo(ppo_config(**spelt), policy=policy(), **data)
    assert [row["episodes"] for row in result.history] == [64, 128]
