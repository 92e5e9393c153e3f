"""What a run is: set-up, and the one object that is saved and restored whole.

The order of the data is a function of seed and epoch, so the step is the data position.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlhf_kernels.backend import select
from rlhf_trainer.config import ConfigError, RunConfig
from rlhf_trainer.metrics import CURVES, KERNELS, METRICS
from rlhf_trainer.model import load_weights, save_model

MODELS = ("model", "value")  # folders of what a run ends with
# A resumed run may differ in these and still continue the same run.
FREE = {"config", "output", "resume", "device", "save_every", "progress", "plot", "profile_steps"}
FREE |= {"on_bad_line"}  # what it makes of the data is compared


def start(config: RunConfig, ops: Sequence[str]) -> Accelerator:
    """Check the options, the output folder and that `ops` can run; find the device, make the folder
    and seed every generator."""
    config.validate()
    check_output(config)
    transformers_logging.disable_progress_bar()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=config.device == "cpu",
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            "accelerate: expected one process, which is what the trainer runs in, "
            f"got {accelerator.num_processes}"
        )
    check_backend(config, ops, accelerator.device.type)
    config.output.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    return accelerator


def check_output(config: RunConfig) -> None:
    """Raise ConfigError where the run would overwrite another one, or has nothing left to do."""
    output, log = config.output, config.output / METRICS
    begun = log.exists() and log.stat().st_size > 0  # an empty one: it ended before its first step
    saved = checkpoints(output)
    if not config.resume and (begun or saved):
        raise ConfigError(
            f"output: expected a folder without a run, got {output}; "
            "continue that run with --resume or choose another folder"
        )
    if begun and (stage := recorded_stage(log)) != config.stage:
        raise ConfigError(f"resume: expected a run of {config.stage}, got one of {stage}: {output}")
    if begun and (output / KERNELS).exists():  # written last
        raise ConfigError(f"resume: expected a run that broke off, got a finished one: {output}")
    for name in MODELS:
        if not saved and (output / name).exists():
            raise ConfigError(
                f"output: expected a checkpoint to resume or a folder without {name}/, which "
                f"starting afresh would overwrite, got {output}"
            )


def recorded_stage(log: Path) -> str:
    """The stage whose run wrote the metrics."""
    with log.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    try:
        return str(json.loads(line)["stage"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{log}:1: expected the metrics of a run, got {line[:40]!r}") from error


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


def remove_run(output: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in (METRICS, CURVES, KERNELS):
        (output / name).unlink(missing_ok=True)
    for folder in (*(output / name for name in MODELS), *checkpoints(output)):
        shutil.rmtree(folder, ignore_errors=True)


def backend_of(config: RunConfig) -> str | None:
    """The backend= argument of every rlhf_kernels call."""
    return None if config.backend == "auto" else config.backend


def adam(config: RunConfig, groups: list[dict[str, Any]], device: torch.device) -> AdamW:
    """Adam with decoupled weight decay over parameter groups {"params", "lr"}."""
    fused = device.type in ("cpu", "cuda")
    return AdamW(
        groups,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def cosine(total: int, warmup: int, floor: float) -> Callable[[int], float]:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine from 1 to
    `floor`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def warm_constant(warmup: int, first: float = 0.1) -> Callable[[int], float]:
    """Share of the peak learning rate at a step: linear from `first` to 1, then constant."""
    return lambda step: first + (1 - first) * min(step / warmup, 1.0) if warmup else 1.0


@dataclass
class RunState:
    """Everything that a run is. `models` maps the folder's name in a checkpoint to the model."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    models: dict[str, nn.Module]
    optimizer: Optimizer
    scheduler: LambdaLR
    data: int
    """Fingerprint of the training data."""
    step: int = 0
    """Optimiser steps done (PPO: iterations); with the seed it gives the data position."""
    kl_coef: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0
    """Evaluations since the best one."""

    def save(self) -> None:
        """Write checkpoint-<step> and remove older ones. A crash leaves the old or the new one,
        never half of one."""
        folder = self.config.output / f"checkpoint-{self.step}"

        def write(target: Path) -> None:
            for name, model in self.models.items():
                save_model(model, self.tokenizer, target / name)
            torch.save(self._record(), target / "state.pt")

        replace_folder(folder, write)
        for old in checkpoints(self.config.output):
            if old != folder:
                shutil.rmtree(old)

    def resume(self) -> None:
        """Restore the newest checkpoint of the output folder, if there is one and the config asks
        for it.

        Raises ConfigError where options or data differ from those of the checkpoint.
        """
        found = checkpoints(self.config.output)
        if not self.config.resume:
            return
        if not found:
            print(f"{self.config.stage}: no checkpoint in {self.config.output}: starting afresh")
            return
        path = found[-1] / "state.pt"
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
            options, data = record["options"], record["data"]
        except Exception as error:  # a damaged file can make the unpickler raise anything
            raise ConfigError(f"{path}: not a checkpoint ({type(error).__name__})") from error
        for name, value in self._options().items():
            if options.get(name) != value:
                raise ConfigError(
                    f"{name}: expected {options.get(name)} as in {found[-1]}, got {value}"
                )
        if data != self.data:
            raise ConfigError(f"training data: expected those of {found[-1]}, got others")
        for name, model in self.models.items():
            load_weights(model, found[-1] / name)
        self.optimizer.load_state_dict(record["optimizer"])
        self.scheduler.load_state_dict(record["scheduler"])
        for name in ("step", "kl_coef", "best_loss", "best_step", "stale"):
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
            "data": self.data,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "kl_coef": self.kl_coef,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "stale": self.stale,
            "random": random.getstate(),
            "numpy": [name, numpy.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def _options(self) -> dict[str, str]:
        values = dataclasses.asdict(self.config)
        kept = {name: str(value) for name, value in values.items() if name not in FREE}
        return {"stage": self.config.stage, **kept}


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place, then move it there, so that no reader ever meets half of
    it."""
    fresh, stale = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
