"""The InstructGPT recipe in one file a stage, on transformers, accelerate and rlhf_kernels.

`train_sft`, `train_reward` and `train_ppo` are the three stages; each takes a config and reads what
it is not handed in memory from the files that the config names. A name is imported on first use:
`import rlhf_trainer` loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trainer.config import (
        ConfigError,
        DataError,
        DivergedError,
        PPOConfig,
        RewardConfig,
        SFTConfig,
        load_yaml,
    )
    from rlhf_trainer.data import Demonstration, Ranking, comparison
    from rlhf_trainer.ppo import PPOResult, train_ppo
    from rlhf_trainer.reward import RewardResult, train_reward
    from rlhf_trainer.sampling import respond
    from rlhf_trainer.scalar import ScalarModel, score_responses
    from rlhf_trainer.sft import SFTResult, train_sft

_MODULES = {
    "config": "ConfigError DataError DivergedError PPOConfig RewardConfig SFTConfig load_yaml",
    "data": "Demonstration Ranking comparison",
    "ppo": "PPOResult train_ppo",
    "reward": "RewardResult train_reward",
    "sampling": "respond",
    "scalar": "ScalarModel score_responses",
    "sft": "SFTResult train_sft",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "ConfigError",
    "DataError",
    "Demonstration",
    "DivergedError",
    "PPOConfig",
    "PPOResult",
    "Ranking",
    "RewardConfig",
    "RewardResult",
    "SFTConfig",
    "SFTResult",
    "ScalarModel",
    "comparison",
    "load_yaml",
    "respond",
    "score_responses",
    "train_ppo",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
