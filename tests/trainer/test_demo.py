"""The demo: the whole way at toy size, and what its report is made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rlhf_trainer.config import ConfigError
from rlhf_trainer.demo import Answers, DemoConfig, agreement, claim, main, make_tokenizer, win_rate


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
    assert "rlhf_kernels::linear_token_loss" in ops
    assert any("reward_loss" in name for name in ops)
    assert {"rlhf_kernels::gae", "rlhf_kernels::policy_loss_fwd"} <= ops


def test_demo_says_what_the_logits_would_cost(finished):
    """Logits, log-softmax and gradient; the logits and a gradient in their place; a chunk of them.
    Each also has the head's gradient. The quick demo's logits fit into a single chunk."""
    _, report = finished
    if report["versions"]["simd"] is None:
        pytest.skip("no compiled kernels here")
    memory = report["memory"]
    logits = 4 * memory["words"] * memory["tokens"]
    peaks = list(memory["peak_bytes"].values())
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 2 * logits and peaks[1] > logits


@pytest.mark.parametrize("other", [None, "{}", '{"name": "a demo of mine"}', "[1]", "{"])
def test_folder_that_is_no_demos_is_refused(tmp_path, other):
    (tmp_path / "thesis.txt").write_text("years of work")
    if other is not None:
        (tmp_path / "demo.json").write_text(other)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="out: expected an earlier demo, an empty folder or none"):
        main(DemoConfig(out=tmp_path, quick=True))
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_files_beside_an_earlier_demos_are_kept(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for place in (out, out / "ppo", out / "notes"):
        place.mkdir(exist_ok=True)
        (place / "thesis.txt").write_text("years of work")
    claim(out)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {"demo.json", "thesis.txt", "ppo/thesis.txt", "notes/thesis.txt"}
    claim(out)  # again: what was cut off is still known as a demo


def test_demo_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claim(Path("."))
    (tmp_path / "thesis.txt").write_text("years of work")
    claim(Path("."))
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "thesis.txt"}


def test_demo_checks_its_options_before_it_clears_anything(finished, monkeypatch):
    out, _ = finished
    with pytest.raises(ConfigError, match="seed: expected an integer"):
        main(DemoConfig(out=out, quick=True, seed=-1))
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "cuda")  # of which the demo's CPU tensors know none
    with pytest.raises(ConfigError, match="RLHF_KERNELS_BACKEND: 'cuda'"):
        main(DemoConfig(out=out, quick=True))
    assert (out / "curves.png").exists()


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
