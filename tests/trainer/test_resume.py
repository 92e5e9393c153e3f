"""What a resumed run may change, and what it may not: content is compared, not its spelling."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from rlhf_trainer.config import ConfigError
from rlhf_trainer.model import save_model
from rlhf_trainer.optimizer import cosine
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.reward import train_reward
from rlhf_trainer.scalar import ScalarModel
from rlhf_trainer.sft import train_sft
from rlhf_trainer.state import weights_fingerprint


@pytest.fixture
def files(tmp_path, write_lines, make_model, tokenizer, demonstrations, pairs):
    """Models and data of all stages on the disk: base, reward, train.jsonl and so on."""
    save_model(make_model(), tokenizer, tmp_path / "base")
    torch.manual_seed(1)
    save_model(ScalarModel.from_causal_lm(make_model(), 0), tokenizer, tmp_path / "judge")
    rows = [{"prompt": d.prompt, "response": d.response} for d in demonstrations]
    write_lines("train.jsonl", rows)
    write_lines("held.jsonl", rows[:3])
    write_lines("zero.jsonl", rows[:4])
    write_lines("prompts.jsonl", rows)
    compared = [dict(zip(("chosen", "rejected"), pair.completions)) for pair in pairs]  # noqa: B905
    write_lines("pairs.jsonl", [{"prompt": p.prompt, **c} for p, c in zip(pairs, compared)])  # noqa: B905
    return tmp_path


@pytest.fixture
def train(files, sft_config, reward_config, ppo_config):
    """train(stage, on_step=None, **options): from the files, with a checkpoint a step."""

    def run(stage, on_step=None, **options):
        if stage == "sft":
            given = {"model": "base", "train_file": "train.jsonl", "heldout_file": "held.jsonl"}
            config, function = sft_config, train_sft
            options = {"epochs": 2} | options
        elif stage == "reward":
            given = {"model": "base", "train_file": "pairs.jsonl", "reference_file": "zero.jsonl"}
            config, function = reward_config, train_reward
            options = {"epochs": 2} | options
        else:
            given = {"model": "base", "reward_model": "judge", "prompt_file": "prompts.jsonl"}
            config, function = ppo_config, train_ppo
        paths = {name: files / path for name, path in given.items()}
        for name in ("model", "reward_model"):
            if name in paths:
                paths[name] = str(paths[name])
        return function(config(stage, **({"save_every": 1} | paths | options)), on_step=on_step)

    return run


@pytest.fixture
def broken_off(train, interrupt):
    """broken_off(stage): a run that ended in its third step, behind checkpoint-2."""

    def run(stage):
        with pytest.raises(interrupt.error):
            train(stage, interrupt(3))

    return run


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {"micro_batch_size": 3, "eval_every": 1, "patience": 1, "plot": True}),
        ("sft", {"backend": "reference", "max_bad_steps": 1, "heldout_share": 0.5}),
        ("sft", {"epochs": 3, "max_prompt_tokens": 1023}),
        ("reward", {"micro_batch_size": 2, "eval_every": 1, "epochs": 4}),
        ("ppo", {"micro_batch_size": 2, "rollout_batch_size": 3, "episodes": 80}),
    ],
)
def test_what_may_change(broken_off, train, stage, options):
    broken_off(stage)
    result = train(stage, resume=True, **options)
    assert [row["step"] for row in result.history] == list(range(1, len(result.history) + 1))
    assert len(result.history) > 3


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_same_content_by_another_path(broken_off, train, files, stage, monkeypatch):
    """A copy, a relative path, a link."""
    broken_off(stage)
    shutil.copytree(files / "base", files / "copied")
    shutil.move(files / "judge", files / "judge-moved")
    (files / "linked.jsonl").symlink_to(files / "train.jsonl")
    monkeypatch.chdir(files)
    options = {
        "sft": {"train_file": files / "linked.jsonl", "heldout_file": "./held.jsonl"},
        "reward": {
            "reference_file": "zero.jsonl",
            "train_file": "../" + files.name + "/pairs.jsonl",
        },
        "ppo": {"reward_model": "judge-moved", "prompt_file": "prompts.jsonl"},
    }[stage]
    result = train(stage, resume=True, model="copied", tokenizer="base", **options)
    assert len(result.history) > 3


@pytest.mark.parametrize(
    ("stage", "path", "named"),
    [
        ("sft", "base", "model weights"),
        ("reward", "base", "model weights"),
        ("ppo", "base", "model weights"),
        ("ppo", "judge", "reward weights"),
        ("sft", "train.jsonl", "training data"),
        ("sft", "held.jsonl", "held-out data"),
        ("reward", "pairs.jsonl", "training data"),
        ("reward", "zero.jsonl", "reference answers"),
        ("ppo", "prompts.jsonl", "prompts"),
    ],
)
def test_other_content_at_the_same_path_is_refused(
    broken_off, train, files, make_model, tokenizer, stage, path, named
):
    broken_off(stage)
    if path == "base":
        save_model(make_model(seed=1), tokenizer, files / path)
    elif path == "judge":
        save_model(ScalarModel.from_causal_lm(make_model(seed=1), 0), tokenizer, files / path)
    else:
        text = (files / path).read_text()
        (files / path).write_text(text.replace("say b", "say a"))
    before = (files / stage / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"{named}: expected those of .*checkpoint-2, .* others"):
        train(stage, resume=True)
    assert (files / stage / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "option", "value"),
    [
        ("sft", "batch_size", 5),
        ("sft", "keep", "last"),
        ("sft", "seed", 1),
        ("reward", "lr_floor", 0.2),
        ("ppo", "max_response_tokens", 4),
        ("ppo", "kl_coef", 0.5),
    ],
)
def test_what_may_not_change_is_named(broken_off, train, stage, option, value):
    broken_off(stage)
    with pytest.raises(ConfigError, match=rf"{option}: expected .* as in .*, got {value}"):
        train(stage, resume=True, **{option: value})


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_fingerprint_is_of_the_content(make_model, tokenizer, tmp_path, kind):
    model = make_model(kind)
    save_model(model, tokenizer, tmp_path / "here")
    os.rename(tmp_path / "here", tmp_path / "there")
    loaded = type(model).from_pretrained(tmp_path / "there")
    assert weights_fingerprint(loaded) == weights_fingerprint(model)
    assert weights_fingerprint(make_model(kind, seed=1)) != weights_fingerprint(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    assert weights_fingerprint(loaded) != weights_fingerprint(model)


def test_more_epochs_follow_the_longer_schedule(broken_off, train, capsys):
    """From the step at which the run goes on, the rate is that of a run of the new length."""
    broken_off("sft")
    result = train("sft", resume=True, epochs=4)
    assert "sft: 12 steps instead of 6: from here on the learning rate follows" in (
        capsys.readouterr().out
    )
    short, long = cosine(6, 0, 0.1), cosine(12, 0, 0.1)
    expected = [1e-2 * (short if step < 2 else long)(step) for step in range(12)]
    assert [row["lr"] for row in result.history] == pytest.approx(expected, rel=1e-12)


def test_fewer_epochs_than_are_done_are_refused(broken_off, train):
    broken_off("ppo")
    with pytest.raises(ConfigError, match=r"expected no fewer than the 2 steps of .*, got 1"):
        train("ppo", resume=True, episodes=16)


def test_a_finished_run_is_not_extended(train):
    result = train("sft", epochs=1)
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}
    for resume, error in ((True, "another run can start from its model"), (False, "without a run")):
        with pytest.raises(ConfigError, match=error):
            train("sft", resume=resume, epochs=2)
    assert before == {path: path.read_bytes() for path in before}
