"""What a run's folder holds, and which runs may begin in it or go on."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_trainer.checkpoint import numbered, recover, remove_folder
from rlhf_trainer.config import ConfigError, RunConfig
from rlhf_trainer.metrics import CURVES, KERNELS, METRICS

MODELS = ("model", "value")  # folders of what a run ends with
FIRST = '{"stage": "'  # what a line of metrics begins with


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return numbered(output, "checkpoint")


def tidy(output: Path) -> None:
    """Bring to an end what a killed run left half done; of a finished run, remove the best weights,
    which are in model/."""
    recover(output)
    if (output / KERNELS).exists():
        for folder in numbered(output, "best"):
            remove_folder(folder)


def check_output(config: RunConfig) -> None:
    """Raise ConfigError where the run would overwrite another one, or has nothing left to do."""
    output, log = config.output, config.output / METRICS
    stage = recorded_stage(log)
    finished = (output / KERNELS).exists()  # written last
    begun = bool(stage or finished or checkpoints(output))
    if begun and not config.resume:
        raise ConfigError(
            f"output: expected a folder without a run, got {output}; "
            "continue that run with --resume or choose another folder"
        )
    if stage not in (None, config.stage):
        raise ConfigError(f"resume: expected a run of {config.stage}, got one of {stage}: {output}")
    if finished:
        raise ConfigError(
            f"resume: expected a run that broke off, got a finished one: {output}; "
            "another run can start from its model"
        )
    for name in MODELS:
        if not begun and (output / name).exists():
            raise ConfigError(
                f"output: expected a run to resume or a folder without {name}/, which "
                f"starting afresh would overwrite, got {output}"
            )


def recorded_stage(log: Path) -> str | None:
    """The stage whose run wrote the metrics; None where it ended before it had written a line."""
    if not log.exists():
        return None
    with log.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    half = not line.endswith("\n") and FIRST.startswith(line[: len(FIRST)])
    if half or not line:
        return None
    try:
        return str(json.loads(line)["stage"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{log}:1: expected the metrics of a run, got {line[:40]!r}") from error


def remove_run(output: Path) -> None:
    """Remove what a run writes, and nothing else."""
    recover(output)
    for name in (METRICS, CURVES, KERNELS):
        (output / name).unlink(missing_ok=True)
    models = [output / name for name in MODELS if (output / name).exists()]
    for folder in (*models, *checkpoints(output), *numbered(output, "best")):
        remove_folder(folder)
