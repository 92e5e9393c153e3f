"""What a run is: set-up, and the one object that is saved and restored whole.

The order of the data is a function of seed and epoch, so the step is the data position.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import signal
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlhf_kernels.backend import select
from rlhf_trainer.checkpoint import (
    DamagedError,
    check_seal,
    number_of,
    numbered,
    remove_folder,
    replace_folder,
    seal,
)
from rlhf_trainer.config import ConfigError, DivergedError, RunConfig
from rlhf_trainer.model import load_weights, save_model
from rlhf_trainer.output import check_output, checkpoints, tidy
from rlhf_trainer.process import Stopped, check_processes, defer, received
from rlhf_trainer.scalar import ScalarModel

# A resumed run may differ in these and still continue the same run: they set where and how it runs,
# memory and speed, ...
FREE = {"config", "output", "resume", "device", "backend", "progress", "plot", "profile_steps"}
FREE |= {"save_every", "micro_batch_size", "rollout_batch_size", "max_bad_steps"}
# ... when it ends and how often it is looked at, ...
FREE |= {"epochs", "episodes", "eval_every", "patience"}
# ... or name what is compared by its content.
FREE |= {"model", "tokenizer", "reward_model", "train_file", "heldout_file", "heldout_share"}
FREE |= {"reference_file", "prompt_file", "max_prompt_tokens", "on_bad_line"}
RESTORED = (
    "step",
    "kl_coef",
    "best_loss",
    "best_step",
    "best_kept",
    "stale",
    "taken",
    "skipped",
    "history",
)
# Of a model's configuration: where it came from, and what transformers notes down when it saves.
NAMES = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}


def start(config: RunConfig, ops: Sequence[str]) -> Accelerator:
    """Check the options, the output folder and that `ops` can run; find the device, make the folder
    and seed every generator."""
    config.validate()
    check_processes()
    tidy(config.output)
    check_output(config)
    transformers_logging.disable_progress_bar()
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            cpu=config.device == "cpu",
        )
    except ValueError as error:  # accelerate keeps to the first ones of a process
        raise ConfigError(
            "precision, device: expected those of the first run in this Python process, "
            f"got {config.precision} and {config.device}: start this run in a new process"
        ) from error
    check_backend(config, ops, accelerator.device.type)
    config.output.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    return accelerator


def check_backend(config: RunConfig, ops: Sequence[str], device_type: str) -> None:
    """Raise ConfigError for the first of `ops` that the backend asked for cannot run."""
    for op in ops:
        try:
            select(op, device_type, backend_of(config))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(str(error)) from error


def backends_of(config: RunConfig, ops: Sequence[str], device_type: str) -> list[str]:
    """The backends that `ops` run on, as the option, the environment and the device have it."""
    return sorted({select(op, device_type, backend_of(config)) for op in ops})


def backend_of(config: RunConfig) -> str | None:
    """The backend= argument of every rlhf_kernels call."""
    return None if config.backend == "auto" else config.backend


def weights_fingerprint(model: nn.Module) -> str:
    """A checksum of a model's configuration and weights, wherever they were loaded from."""
    inner: Any = model.model if isinstance(model, ScalarModel) else model
    settings = {k: v for k, v in inner.config.to_diff_dict().items() if k not in NAMES}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class RunState:
    """Everything that a run is. `models` maps the folder's name in a checkpoint to the model."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    models: dict[str, nn.Module]
    optimizer: Optimizer
    scheduler: LambdaLR
    inputs: Mapping[str, object]
    """Fingerprints of what the run learns from, by the plural name that an error gives it."""
    total: int
    """Steps of the whole run."""
    step: int = 0
    """Optimiser steps done (PPO: iterations); with the seed it gives the data position."""
    kl_coef: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    best_kept: bool = False
    """Whether best-<best_step> holds the weights of the best held-out loss."""
    stale: int = 0
    """Evaluations since the best one."""
    taken: int = 0
    """Optimiser steps that changed weights."""
    skipped: int = 0
    """Steps that changed no weight, as a number was not finite."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl."""
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Of the steps skipped since the last good one: its number, and what was not finite."""
    due: bool = False
    """Whether a checkpoint waits for a good step."""

    def skip(self, numbers: Mapping[str, float]) -> bool:
        """Whether one of a step's numbers is not finite: then the step is counted, not taken."""
        odd = [f"{name} {x}" for name, x in numbers.items() if not math.isfinite(x)]
        if odd:
            self.skipped += 1
            self.bad.append((self.step + 1, ", ".join(odd)))
            tqdm.write(f"{self.config.stage}: step {self.step + 1} is skipped: {', '.join(odd)}")
        return bool(odd)

    def take_step(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Take the optimiser's step where the one-element tensors that it comes from are all
        finite; they come back as numbers, by the step's one wait for the device."""
        values = torch.stack(list(tensors.values())).tolist()
        numbers = dict(zip(tensors, values, strict=True))
        if not self.skip(numbers):
            self.optimizer.step()
            self.taken += 1
            self.bad.clear()
        return numbers

    def next_rate(self) -> None:
        """Move on to the next step's learning rate, also where the optimiser's step was skipped."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()

    def end_step(self) -> None:
        """Save a checkpoint where one is due; raise DivergedError after too many bad steps, and
        Stopped where a signal came.

        No checkpoint is written behind a bad step: it may be the last good one's step that broke
        the weights.
        """
        every, stop = self.config.save_every, received()
        self.due |= every > 0 and self.step % every == 0
        if len(self.bad) >= self.config.max_bad_steps:
            step, what = self.bad[-1]
            raise self.diverged(
                f"{len(self.bad)} steps in a row were not finite, the last one, step {step}, with "
                f"{what}"
            )
        if not self.bad and (self.due or stop is not None):
            self.save()
        if stop is not None:
            found = checkpoints(self.config.output)
            rest = f"goes on from {found[-1]}" if found else "starts afresh"
            raise Stopped(
                stop,
                f"stopped by {signal.Signals(stop).name} after step {self.step}; "
                f"the same command {rest} with --resume",
            )

    def check_end(self, losses: Iterable[Tensor]) -> None:
        """Raise DivergedError where no step was good; where the last one was bad and none of
        `losses`, taken one by one with the last weights, is finite; or where a weight is not."""
        if not self.taken:
            raise self.diverged(f"none of the run's steps was finite, as in {self.bad[-1][1]}")
        if self.bad and not any(bool(loss.isfinite().all()) for loss in losses):
            step, what = self.bad[-1]
            raise self.diverged(f"the last weights give no finite loss, as in step {step}: {what}")
        self.check_weights()

    def check_weights(self) -> None:
        """Raise DivergedError where a weight is not finite."""
        for folder, model in self.models.items():
            for name, weight in model.named_parameters():
                # A frozen one may be meant: -inf in the bias of a banned token.
                if weight.requires_grad and not bool(weight.isfinite().all()):
                    raise self.diverged(f"{name} of {folder} is not finite after step {self.step}")

    def last(self, name: str) -> float:
        """A number of the metrics as last written; NaN where it was not finite, or never was."""
        values = [row[name] for row in self.history if name in row]
        return values[-1] if values and values[-1] is not None else math.nan

    def diverged(self, what: str) -> DivergedError:
        """An error that says what is not finite, and which checkpoint is from before."""
        last_good = self.bad[0][0] - 1 if self.bad else self.step
        found = checkpoints(self.config.output)
        before = [folder for folder in found if number_of(folder) < last_good]
        left = "there is no checkpoint from before"
        if before:
            left = f"another run can start from {before[-1] / next(iter(self.models))}"
        return DivergedError(f"{what}; no bad step has changed a weight; {left}")

    def save_best(self, model: nn.Module) -> None:
        """Keep the weights of the best held-out loss in best-<step>, and older ones as long as a
        checkpoint goes back to them."""
        self.best_kept = True
        output = self.config.output

        def write(target: Path) -> None:
            save_model(model, self.tokenizer, target)
            seal(target)

        replace_folder(output / f"best-{self.best_step}", write)
        found = numbered(output, "best")
        ends = [number_of(folder) for folder in checkpoints(output)]
        needed = {
            max((best for best in found if number_of(best) <= end), key=number_of, default=None)
            for end in ends
        }
        for old in found[:-1]:
            if old not in needed:
                remove_folder(old)

    @property
    def best_folder(self) -> Path:
        return self.config.output / f"best-{self.best_step}"

    def save(self) -> None:
        """Write checkpoint-<step> and keep one older one. A crash leaves the old or the new one,
        never half of one."""
        self.check_weights()
        folder = self.config.output / f"checkpoint-{self.step}"

        def write(target: Path) -> None:
            for name, model in self.models.items():
                save_model(model, self.tokenizer, target / name)
            torch.save(self._record(), target / "state.pt")
            seal(target)

        replace_folder(folder, write)
        self.due = False
        found = checkpoints(self.config.output)
        kept = [old for old in found if number_of(old) <= self.step][-2:]
        for old in found:  # later ones are damaged: the run went on from before them
            if old not in kept:
                remove_folder(old)

    def resume(self) -> None:
        """Restore the newest whole checkpoint of the output folder, if there is one and the config
        asks for it. From here on a signal waits for the end of the step.

        Raises ConfigError where options, data or models differ from those of the checkpoint, or
        where all checkpoints are damaged.
        """
        if self.config.resume and (found := self._newest()):
            self._restore(*found)
        for best in numbered(self.config.output, "best"):
            if number_of(best) > self.best_step:  # of steps that are run again
                remove_folder(best)
        defer()

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and what it holds."""
        stage, output, damaged = self.config.stage, self.config.output, []
        for folder in reversed(checkpoints(output)):
            try:
                record = self._read(folder)
            except DamagedError as error:
                damaged.append(f"{folder.name} is damaged: {error}")
                continue
            for line in damaged:
                print(f"{stage}: {line}; going on from {folder.name}")
            return folder, record
        if damaged:
            raise ConfigError(
                f"resume: expected a whole checkpoint in {output}, got none: {'; '.join(damaged)}"
            )
        print(f"{stage}: no checkpoint in {output}: starting afresh")
        return None

    def _read(self, folder: Path) -> dict[str, Any]:
        """What save wrote into the folder; DamagedError where the disk has not kept it."""
        check_seal(folder)
        try:
            record = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            best = f"best-{record['best_step']}" if record["best_kept"] else None
        except Exception as error:  # a damaged file can make the unpickler raise anything
            raise DamagedError(f"state.pt is no state of a run ({type(error).__name__})") from error
        if best is not None:
            try:
                check_seal(self.config.output / best)
            except DamagedError as error:
                raise DamagedError(f"its {best}: {error}") from error
        return record

    def _restore(self, folder: Path, record: dict[str, Any]) -> None:
        options = record["options"]
        for name, value in self._options().items():
            if name in options and options[name] != value:
                raise ConfigError(f"{name}: expected {options[name]} as in {folder}, got {value}")
        for name, content in self.inputs.items():
            if record["inputs"].get(name) != content:
                raise ConfigError(
                    f"{name}: expected those of {folder}, with which its run began, got others"
                )
        if self.total < record["step"]:
            raise ConfigError(
                f"epochs, episodes: expected no fewer than the {record['step']} steps of {folder}, "
                f"got {self.total}"
            )
        if self.total != record["total"]:
            print(
                f"{self.config.stage}: {self.total} steps instead of {record['total']}: from here "
                "on the learning rate follows the schedule of a run of that length"
            )
        for name, model in self.models.items():
            load_weights(model, folder / name)
        self.optimizer.load_state_dict(record["optimizer"])
        self.scheduler.load_state_dict(record["scheduler"])
        # The rate of the next step, from this run's schedule: the same bits where it is the same.
        self.scheduler.last_epoch -= 1
        self.scheduler.step()
        for name in RESTORED:
            setattr(self, name, record[name])
        random.setstate(_tuples(record["random"]))
        numpy.random.set_state(_tuples(record["numpy"]))
        torch.set_rng_state(record["torch"])
        if record["cuda"]:
            torch.cuda.set_rng_state_all(record["cuda"])

    def _record(self) -> dict[str, Any]:
        name, keys, *rest = numpy.random.get_state(legacy=True)
        return {
            "options": self._options(),
            "inputs": dict(self.inputs),
            "total": self.total,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **{name: getattr(self, name) for name in RESTORED},
            "random": random.getstate(),
            "numpy": [name, numpy.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def _options(self) -> dict[str, str]:
        values = dataclasses.asdict(self.config)
        kept = {name: str(value) for name, value in values.items() if name not in FREE}
        return {"stage": self.config.stage, **kept}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
