"""Command line: rlhf-train sft | reward | ppo | demo."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_trainer.config import (
    SOURCES,
    ConfigError,
    DataError,
    DivergedError,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    load_yaml,
)
from rlhf_trainer.process import Stopped

USAGE = """\
usage: rlhf-train STAGE [--config FILE.yaml] [options]

Train a language model the InstructGPT way, on the kernels of rlhf_kernels.

stages, in their order:
  sft      supervised fine-tuning on demonstrations
  reward   reward model from human preferences
  ppo      reinforcement learning against the reward model
  demo     all three on a small generated world: no download, no data

rlhf-train STAGE --help lists a stage's options, their units and where their defaults come from.
A run that broke off goes on with the same command and --resume.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one stage; a bad option, a bad line of data, a full disk or numbers that are not finite
    end it with a message and status 1, Ctrl-C with 130 and SIGTERM with 143."""
    args = list(sys.argv[1:] if argv is None else argv)
    stage = args.pop(0) if args else "--help"
    if stage in ("-h", "--help"):
        print(USAGE, end="")
        return
    try:
        _run(stage, args)
    except KeyboardInterrupt as stop:
        print(f"rlhf-train {stage}: {str(stop) or 'stopped before the run began'}", file=sys.stderr)
        sys.exit(stop.status if isinstance(stop, Stopped) else 130)
    except (ConfigError, DataError, DivergedError, OSError) as error:
        sys.exit(f"rlhf-train {stage}: {error}")
    except ImportError as error:
        sys.exit(f"rlhf-train {stage}: {error}; run: pip install 'rlhf-kernels[train]'")


def _run(stage: str, args: list[str]) -> None:
    if stage == "sft":
        config = parse(stage, SFTConfig, args)
        from rlhf_trainer.sft import train_sft

        sft = train_sft(config)
        best = f"best held-out loss {sft.best['loss']:.4f} at step {sft.best['step']}"
        evaluated = any("heldout_loss" in row for row in sft.history)
        print(f"sft: {best if evaluated else 'no held-out data'}; {sft.folder}")
    elif stage == "reward":
        config = parse(stage, RewardConfig, args)
        from rlhf_trainer.reward import train_reward

        reward = train_reward(config)
        accuracy = "no held-out data"
        if reward.accuracy is not None:
            accuracy = f"held-out accuracy {reward.accuracy:.3f}"
        print(f"reward: {accuracy}; {reward.folder}")
    elif stage == "ppo":
        config = parse(stage, PPOConfig, args)
        from rlhf_trainer.ppo import train_ppo

        ppo = train_ppo(config)
        # Of the last iteration that was not skipped: what is not finite is null in the metrics.
        last = next(row for row in reversed(ppo.history) if "policy_loss" in row)
        print(f"ppo: score {last['score']:.3f}, KL {last['kl']:.2f} nats a sequence; {ppo.folder}")
    elif stage == "demo":
        from rlhf_trainer import demo

        demo.main(parse(stage, demo.DemoConfig, args))
    else:
        raise ConfigError(f"expected sft, reward, ppo or demo, got {stage!r}")


def parse(stage: str, kind: type[Any], args: Sequence[str]) -> Any:
    """Options from defaults, then the YAML file named by --config, then the command line."""
    import tyro  # here, as it is not there without the extra `train`

    default = None
    for k, arg in enumerate(args):
        name, equals, path = arg.partition("=")
        if name == "--config" and (equals or k + 1 < len(args)):
            default = load_yaml(kind, Path(path if equals else args[k + 1]))
    sources = SOURCES if issubclass(kind, RunConfig) else ""
    description = f"{inspect.getdoc(kind)}\n\n{sources}"
    return tyro.cli(
        kind, args=args, default=default, prog=f"rlhf-train {stage}", description=description
    )
