"""The demo: the whole way at toy size, and what its report is made of."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from rlhf_trainer.config import ConfigError
from rlhf_trainer.demo import Answers, DemoConfig, agreement, main, make_tokenizer, win_rate


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, main(DemoConfig(out=out, quick=True, seed=3))


def test_demo_runs_through_and_writes_its_report(finished):
    out, report = finished
    assert json.loads((out / "demo.json").read_text()) == report
    assert report["seed"] == 3
    assert set(report["score"]) == {"base", "SFT", "PPO"}
    assert set(report["seconds"]) == {"base", "sft", "reward", "ppo", "total"}
    assert set(report["win_rate"]) == {
        "PPO against SFT",
        "PPO against SFT at equal length",
        "SFT against base",
    }
    for win in report["win_rate"].values():
        assert win["low"] <= win["rate"] <= win["high"]
    assert report["kl_to_sft"]["SFT"] == pytest.approx(0.0, abs=1e-6)
    assert report["kl_to_sft"]["PPO"] > 1e-4
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(out / stage / "model")


def test_demo_spends_time_in_the_kernels(finished):
    _, report = finished
    if report["versions"]["simd"] is None:
        pytest.skip("no compiled kernels here")
    ops = {name for stage in report["kernels"].values() for name in stage["ops"]}
    assert "rlhf_kernels::token_logprob_fwd" in ops
    assert any("reward_loss" in name for name in ops)
    assert {"rlhf_kernels::gae", "rlhf_kernels::policy_loss_fwd"} <= ops


def test_demo_replaces_a_demo_and_nothing_else(finished, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="out: expected an earlier demo or no folder"):
        main(DemoConfig(out=tmp_path, quick=True))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_tokenizer_is_exact():
    tokenizer = make_tokenizer()
    text = "of course : a hen has two legs ."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer(f"{text} \n")["input_ids"] == [*ids, tokenizer.get_vocab()["\n"]]


def answers(scores, lengths):
    return Answers([["" for _ in row] for row in scores], lengths, scores, 0.0, 0.0)


def test_win_rate_by_hand():
    a = answers([[1.0, 0.5], [0.0, 0.5]], [[5, 3], [5, 3]])
    b = answers([[0.5, 0.5], [0.5, 1.0]], [[5, 5], [9, 9]])
    # question 1: 1 > .5 twice, .5 = .5 twice: 3 / 4; question 2: 0, 0, 1/2, 0: 1 / 8
    assert win_rate(a, b)["rate"] == pytest.approx((3 / 4 + 1 / 8) / 2)
    # at 5 tokens: question 1: 1 > .5 twice; question 2 has no pair of equal length
    equal = win_rate(a, b, equal_length=True)
    assert equal["rate"] == 1.0 and equal["questions"] == 1


def test_agreement_by_hand():
    assert agreement([[3.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]]) == pytest.approx(2 / 3)
    assert agreement([[1.0, 1.0, 2.0]], [[0.0, 9.0, 9.0]]) == pytest.approx((1 + 0.5) / 2)
    assert agreement([[1.0, 2.0]], [[2.0, 1.0]], [[0.0, 1.0]]) == 0.0
