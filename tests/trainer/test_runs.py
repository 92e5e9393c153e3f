"""Runs that are killed, stopped, damaged or out of room: what they leave, and how they go on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rlhf_trainer
from rlhf_trainer import checkpoint
from rlhf_trainer.checkpoint import DamagedError, check_seal, recover, replace_folder, seal
from rlhf_trainer.config import ConfigError
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.process import DiskFullError, Stopped, lock
from rlhf_trainer.reward import train_reward
from rlhf_trainer.sft import train_sft

STAGES = ("sft", "reward", "ppo")


@pytest.fixture
def train(sft_config, reward_config, ppo_config, make_model, tokenizer, demonstrations, pairs):
    """train(stage, name, on_step=None, **options): a run of six steps (ppo: four iterations)."""

    def run(stage, name, on_step=None, **options):
        data = {"tokenizer": tokenizer, "on_step": on_step}
        if stage == "sft":
            options = {"epochs": 2, "eval_every": 1, "patience": 0} | options
            data |= {"train": demonstrations, "heldout": demonstrations[:3]}
            return train_sft(sft_config(name, **options), model=make_model(), **data)
        if stage == "reward":
            data |= {"train": pairs, "heldout": pairs[:3]}
            return train_reward(reward_config(name, **({"epochs": 2} | options)),
                                model=make_model(), **data)  # fmt: skip
        data |= {"prompts": ["say a", "good"], "reward_fn": count_good}
        return train_ppo(ppo_config(name, **options), policy=make_model(), **data)

    return run


def count_good(prompts, responses):
    return [response.split().count("good") / 5 for response in responses]


def trained(result):
    return result.policy if hasattr(result, "policy") else result.model


# --- kills ----------------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def killed_at(count: int, output: Path, run) -> bool:
    """Run in a forked process that kills itself just before its count-th change in the folder: a
    file opened for writing, a name made, moved or removed. False where the run ends before."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = count

    def hook(event: str, args) -> None:
        nonlocal left
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
        if (writes or event in CHANGES) and str(output) in str(args[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.addaudithook(hook)
        run()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_anywhere_goes_on(train, tmp_path, same_weights, untimed, stage, save_every):
    """By SIGKILL, at points spread over all that it writes: best-N/, checkpoint-N/, the removal of
    old ones, metrics.jsonl, model/, kernels.json. With --resume each ends in the same bits."""
    options = {"save_every": save_every}
    whole = train(stage, "whole", **options)
    count = 1
    while killed_at(count, tmp_path / "killed", lambda: train(stage, "killed", **options)):
        folder = tmp_path / "killed"
        if (folder / "kernels.json").exists():
            with pytest.raises(ConfigError, match="got a finished one"):
                train(stage, "killed", resume=True, **options)
        else:
            resumed = train(stage, "killed", resume=True, **options)
            assert same_weights(trained(resumed), trained(whole)), count
            assert untimed(resumed.history) == untimed(whole.history), count
        left = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint")}
        value = {"value"} if stage == "ppo" else set()
        assert left == {"metrics.jsonl", "model", "kernels.json"} | value
        shutil.rmtree(folder)
        count += max(count // 2, 1)
    assert count > 10


def test_a_run_of_an_earlier_version_is_not_stuck(train, tmp_path, untimed):
    """model/ after the first evaluation, and no checkpoint yet: --resume starts afresh."""
    whole = train("sft", "whole")
    folder = tmp_path / "sft"
    (folder / "model").mkdir(parents=True)
    first, *_ = (whole.folder.parent / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(first)
    with pytest.raises(ConfigError, match="continue that run with --resume"):
        train("sft", "sft")
    assert untimed(train("sft", "sft", resume=True).history) == untimed(whole.history)


def test_half_a_first_line_of_metrics_is_no_run(train, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"stage": "sft", "st')
    assert train("sft", "sft").history[0]["step"] == 1


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_replaced_or_kept_whole(tmp_path, monkeypatch, old):
    """A crash between the two renames leaves none under the name: the next start brings it back."""
    folder = tmp_path / "model"

    def write(text):
        return lambda target: (target / "a").write_text(text)

    if old:
        replace_folder(folder, write("old"))

    def crash(self, target):
        if target == folder:
            raise KeyboardInterrupt
        return os.rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(folder, write("new"))
    assert not folder.exists()
    recover(tmp_path)
    assert folder.exists() == old
    if old:
        assert (folder / "a").read_text() == "new"  # which was whole before the old one went
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * old


def test_what_is_not_a_runs_own_stays(tmp_path):
    for name in (".git.old", ".cache.new", ".notes.gone"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.fixture
def broken_off(train, interrupt):
    """A run of SFT with checkpoints 2 and 4, and its uninterrupted twin."""
    options = {"save_every": 2, "dropout": 0.2}
    whole = train("sft", "whole", **options)
    with pytest.raises(interrupt.error):
        train("sft", "broken", on_step=interrupt(5), **options)
    return options, whole


def test_a_flipped_bit_in_any_file_falls_back_to_the_older_checkpoint(
    broken_off, train, tmp_path, capsys, same_weights, untimed
):
    options, whole = broken_off
    source, folder = tmp_path / "broken", tmp_path / "copy"
    newest = source / "checkpoint-4"
    files = sorted(path.relative_to(source) for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 6
    for name in files:
        for byte in (0, -1, (source / name).stat().st_size // 2):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(newest, folder / "checkpoint-4")
            flip(folder / name, byte)
            with pytest.raises(DamagedError):
                check_seal(folder / "checkpoint-4")
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
    flip(folder / "checkpoint-4" / "model" / "model.safetensors", -1)
    resumed = train("sft", "copy", resume=True, **options)
    said = (
        "sft: checkpoint-4 is damaged: model/model.safetensors differs from its checksum; "
        "going on from checkpoint-2\n"
    )
    assert said in capsys.readouterr().out
    assert same_weights(resumed.model, whole.model)
    assert untimed(resumed.history) == untimed(whole.history)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]


@pytest.mark.parametrize("damage", ["best", "missing", "cut", "both"])
def test_damaged_checkpoints_are_never_resumed(broken_off, train, tmp_path, capsys, damage):
    options, _ = broken_off
    folder = tmp_path / "broken"
    if damage == "best":  # the weights of the best held-out loss so far
        best = max(folder.glob("best-*"), key=checkpoint.number_of)
        assert checkpoint.number_of(best) >= 4
        for path in folder.glob("best-*"):
            if checkpoint.number_of(path) > 2:
                flip(path / "model.safetensors", -1)
    elif damage == "missing":
        (folder / "checkpoint-4" / "model" / "config.json").unlink()
    elif damage == "cut":
        path = folder / "checkpoint-4" / "SHA256SUMS"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        for name in ("checkpoint-2", "checkpoint-4"):
            flip(folder / name / "state.pt", 100)
        with pytest.raises(ConfigError, match=r"resume: expected a whole checkpoint") as caught:
            train("sft", "broken", resume=True, **options)
        assert "checkpoint-2 is damaged" in str(caught.value)
        assert "checkpoint-4 is damaged" in str(caught.value)
        return
    seen: list[dict] = []
    train("sft", "broken", resume=True, on_step=seen.append, **options)
    assert seen[0]["step"] == 3
    assert "checkpoint-4 is damaged" in capsys.readouterr().out


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"abc")
    seal(tmp_path)
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (tmp_path / "SHA256SUMS").read_text() == f"{known}  model/a\n"
    check_seal(tmp_path)


# --- one run a folder -----------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(train, tmp_path):
    with (
        lock(tmp_path / "sft"),
        pytest.raises(ConfigError, match=rf"output: expected .*process {os.getpid()} holds"),
    ):
        train("sft", "sft")
    train("sft", "sft")


def test_a_folder_that_cannot_be_made_is_named(train, tmp_path):
    (tmp_path / "sft").write_text("")
    with pytest.raises(ConfigError, match=r"^output: expected a folder .*sft: File exists$"):
        train("sft", "sft")


def test_the_lock_of_a_killed_run_is_free(train, tmp_path):
    child = os.fork()
    if not child:
        with lock(tmp_path / "sft"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "sft" / ".lock").read_text() == f"{child}\n"
    train("sft", "sft")
    assert not (tmp_path / "sft" / ".lock").exists()


def test_a_run_that_is_refused_leaves_no_folder(train, tmp_path):
    with pytest.raises(ConfigError):
        train("sft", "sft", max_prompt_tokens=1)
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused(train, tmp_path, monkeypatch, name):
    """Before accelerate waits for the others, and before anything is written."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"{name}: expected 1 process, .* got 2"):
        train("sft", "sft")
    assert not (tmp_path / "sft").exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_at_the_end_of_the_step(
    train, tmp_path, stage, number, same_weights, untimed, capfd
):
    """Also with save_every 0. The run that goes on ends in the same bits."""
    whole = train(stage, "whole")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def on_step(row):
        if row["step"] == 2:
            os.kill(os.getpid(), number)

    folder = tmp_path / "stopped"
    with pytest.raises(Stopped) as caught:
        train(stage, "stopped", on_step=on_step)
    assert caught.value.status == 128 + number
    assert str(caught.value) == (
        f"stopped by {signal.Signals(number).name} after step 2; the same command goes on from "
        f"{folder / 'checkpoint-2'} with --resume"
    )
    assert "a second signal ends it at once" in capfd.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = train(stage, "stopped", resume=True)
    assert same_weights(trained(resumed), trained(whole))
    assert untimed(resumed.history) == untimed(whole.history)


def test_a_second_signal_ends_the_process_at_once(train, tmp_path):
    child = os.fork()
    if not child:
        train("sft", "sft", on_step=lambda row: [os.kill(os.getpid(), 2) for _ in range(2)])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT
    assert not list((tmp_path / "sft").glob("checkpoint-*"))


def test_a_programs_own_handler_stays(train):
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        result = train("sft", "sft", on_step=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM] * len(result.history)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_with_the_signals_status_and_one_line(
    tmp_path, write_lines, demonstrations, number
):
    rows = [{"prompt": d.prompt, "response": d.response} for d in demonstrations]
    path, output = write_lines("train.jsonl", rows), tmp_path / "run"
    command = f"-m rlhf_trainer sft --model scratch:gpt2-tiny --train-file {path} --output {output}"
    quick = "--epochs 4000 --device cpu --no-progress --no-plot --heldout-share 0"
    source = str(Path(rlhf_trainer.__file__).parents[1])
    running = subprocess.Popen(
        [sys.executable, *command.split(), *quick.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ["PYTHONPATH"]])},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 128 + number, errors
    assert "Traceback" not in errors
    name = signal.Signals(number).name
    last = errors.splitlines()[-1]
    assert re.fullmatch(
        rf"rlhf-train sft: stopped by {name} after step (\d+); the same command goes on from "
        rf"{output}/checkpoint-\1 with --resume",
        last,
    )


# --- a full disk ----------------------------------------------------------------------------------


class FullDisk:
    """From a moment on, what is written into a folder finds no room."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.saved = torch.save

    def save(self, record, path):
        Path(path).write_bytes(b"half")
        if self.kind == "torch":  # which does not say why
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576")
        if self.kind == "safetensors":
            raise RuntimeError("Error while serializing: No space left on device (os error 28)")
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("kind", ["torch", "safetensors", "quota"])
def test_a_full_disk_is_named_and_leaves_no_half_folder(train, tmp_path, monkeypatch, kind):
    """In the second checkpoint. What was there is whole, and the run goes on from it."""
    full = FullDisk(kind)
    folder = tmp_path / "sft"

    def save(record, path):
        if record["step"] < 4:
            return full.saved(record, path)
        return full.save(record, path)

    opened = Path.open

    def no_room(self, mode="r", *args, **options):
        if self.name == ".room.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        if kind == "torch":
            patch.setattr(Path, "open", no_room)
        with pytest.raises(DiskFullError, match=f"output: the disk of {folder} is full") as caught:
            train("sft", "sft", save_every=2)
    assert "checkpoint-4 was not written" in str(caught.value)
    assert f"{folder / 'checkpoint-2'} is whole" in str(caught.value)
    assert not [path.name for path in folder.iterdir() if path.name.endswith((".new", ".old"))]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    seen: list[dict] = []
    train("sft", "sft", save_every=2, resume=True, on_step=seen.append)
    assert seen[0]["step"] == 3


def test_another_error_of_a_write_is_not_taken_for_a_full_disk(tmp_path):
    def write(target):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        replace_folder(tmp_path / "model", write)
    assert not list(tmp_path.iterdir())


def test_no_room_for_metrics_is_named(train, monkeypatch):
    def on_step(row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskFullError, match=r"is full: a file was not written; make room"):
        train("sft", "sft", on_step=on_step)


def test_a_real_full_disk(train, tmp_path):
    """A file system of 1 MiB, where the system lets us mount one."""
    folder = tmp_path / "sft"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        with pytest.raises(DiskFullError, match=f"the disk of {folder} is full"):
            train("sft", "sft", save_every=1)
        assert not [path.name for path in folder.iterdir() if path.name.endswith(".new")]
        for path in folder.glob("checkpoint-*"):
            check_seal(path)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
