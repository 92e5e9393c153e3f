"""How a run begins: output folders, --resume and backends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from rlhf_kernels.backend import INTERPRETING, why_not
from rlhf_trainer import ppo, reward, sft
from rlhf_trainer.checkpoint import SUMS, seal
from rlhf_trainer.config import ConfigError
from rlhf_trainer.reward import train_reward
from rlhf_trainer.sft import train_sft
from rlhf_trainer.state import start


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def data(tokenizer, demonstrations):
    return {"tokenizer": tokenizer, "train": demonstrations}


def test_a_run_is_not_overwritten(sft_config):
    config = sft_config()
    config.output.mkdir()
    (config.output / "metrics.jsonl").write_text(json.dumps({"stage": "sft", "step": 1}) + "\n")
    with pytest.raises(ConfigError, match="output: expected a folder without a run"):
        start(config, ())


def test_empty_metrics_are_no_run(sft_config):
    config = sft_config()
    config.output.mkdir()
    (config.output / "metrics.jsonl").touch()
    start(config, ())


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["model", "value"])
def test_starting_afresh_over_a_model_is_refused(sft_config, resume, name):
    config = sft_config(resume=resume)
    (config.output / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"output: expected .* without {name}/"):
        start(config, ())


def test_checkpoints_without_metrics_are_a_run(sft_config):
    config = sft_config()
    (config.output / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="output: expected a folder without a run"):
        start(config, ())


@pytest.mark.parametrize("save_every", [0, 1])
def test_another_stages_run_is_not_resumed(
    sft_config, reward_config, make_model, data, pairs, interrupt, save_every
):
    """With checkpoints and without, finished and broken off."""
    for stop in (2, 99):
        config = sft_config(f"stop-{stop}", save_every=save_every)
        try:
            train_sft(config, model=make_model(), on_step=interrupt(stop), **data)
        except interrupt.error:
            assert stop == 2
        before = contents(config.output)
        other = reward_config(config.output.name, resume=True)
        options = {"model": make_model(), "tokenizer": data["tokenizer"], "train": pairs}
        with pytest.raises(ConfigError, match="resume: expected a run of reward, got one of sft"):
            train_reward(other, **options)
        assert contents(config.output) == before
        if save_every:  # the checkpoint knows it too
            (config.output / "metrics.jsonl").unlink()
            error = r"stage: expected sft as in .*, got reward" if stop == 2 else "got a finished"
            with pytest.raises(ConfigError, match=error):
                train_reward(other, **options)


@pytest.mark.parametrize("save_every", [0, 1])
def test_finished_run_is_not_trained_again(sft_config, make_model, data, save_every):
    train_sft(sft_config(save_every=save_every), model=make_model(), **data)
    config = sft_config(save_every=save_every, resume=True)
    before = contents(config.output)
    with pytest.raises(ConfigError, match="resume: expected a run that broke off, got a finished"):
        train_sft(config, model=make_model(), **data)
    assert contents(config.output) == before


def test_resume_without_a_checkpoint_says_that_it_starts_afresh(
    sft_config, make_model, data, interrupt, capsys
):
    with pytest.raises(interrupt.error):
        train_sft(sft_config(), model=make_model(), on_step=interrupt(1), **data)
    result = train_sft(sft_config(resume=True), model=make_model(), **data)
    assert (
        f"sft: no checkpoint in {sft_config().output}: starting afresh" in capsys.readouterr().out
    )
    assert result.history[0]["step"] == 1


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", "[" * 100_000])
def test_metrics_of_something_else_are_not_resumed(sft_config, line):
    config = sft_config(resume=True)
    config.output.mkdir()
    (config.output / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: expected the metrics of a run"):
        start(config, ())


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other"])
def test_damaged_checkpoint_is_named_in_one_line(sft_config, make_model, data, interrupt, damage):
    with pytest.raises(interrupt.error):
        train_sft(sft_config(save_every=1), model=make_model(), on_step=interrupt(2), **data)
    config = sft_config(resume=True)
    path = config.output / "checkpoint-1" / "state.pt"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2]}.get(damage, b"garbage"))
    if damage == "other":  # with its checksum: whole, and still no checkpoint
        torch.save([1, 2], path)
        (path.parent / SUMS).unlink()
        seal(path.parent)
    reason = {"other": "is no state of a run"}.get(damage, "differs from its checksum")
    with pytest.raises(
        ConfigError,
        match=rf"resume: expected a whole checkpoint in .*, got none: .*state\.pt {reason}",
    ) as caught:
        train_sft(config, model=make_model(), **data)
    assert "\n" not in str(caught.value)


def test_damaged_metrics_of_a_resumed_run(sft_config, make_model, data, interrupt, untimed):
    """The lines up to the checkpoint come from the checkpoint."""
    whole = train_sft(sft_config("whole", save_every=2), model=make_model(), **data)
    with pytest.raises(interrupt.error):
        train_sft(sft_config(save_every=2), model=make_model(), on_step=interrupt(3), **data)
    config = sft_config(save_every=2, resume=True)
    path = config.output / "metrics.jsonl"
    first, *_ = path.read_text().splitlines()
    path.write_text(f"{first}\n{{\n")
    result = train_sft(config, model=make_model(), **data)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert untimed(rows) == untimed(result.history) == untimed(whole.history)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_backend_that_cannot_run_is_found_before_anything_is_written(
    sft_config, make_model, data, monkeypatch, backend, by
):
    """The run is on the CPU, where these two are never at home."""
    if backend == "triton" and INTERPRETING:
        pytest.skip("Triton's interpreter takes CPU tensors")
    if by == "environment":
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    config = sft_config(**({"backend": backend} if by == "option" else {}))
    source = "RLHF_KERNELS_BACKEND" if by == "environment" else "backend"
    with pytest.raises(ConfigError, match=f"^{source}: '{backend}'"):
        train_sft(config, model=make_model(), **data)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("stage", "ops"), [(sft, sft.SFT_OPS), (reward, reward.REWARD_OPS), (ppo, ppo.PPO_OPS)]
)
def test_ops_that_are_checked_are_those_that_the_stage_calls(stage, ops):
    source = Path(stage.__file__).read_text(encoding="utf-8")
    assert sorted(ops) == sorted(set(re.findall(r"\brk\.([a-z_]+)\(", source)))


@pytest.mark.parametrize("asked", ["auto", "reference", "environment"])
def test_kernels_json_says_which_backend_ran(sft_config, make_model, data, monkeypatch, asked):
    """Also where the environment chose it."""
    if asked == "environment":
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    config = sft_config(backend="auto" if asked == "environment" else asked, epochs=1)
    train_sft(config, model=make_model(), **data)
    expected = "reference"
    if asked == "auto":
        expected = "cpu" if why_not("linear_token_loss", "cpu") is None else "reference"
    assert json.loads((config.output / "kernels.json").read_text())["backend"] == expected
