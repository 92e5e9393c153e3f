"""Adam, its learning rates, and the norm of what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf_trainer.config import RunConfig


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


def gradient_norm(accelerator: Accelerator, model: nn.Module, limit: float) -> Tensor:
    """Norm of a model's gradients, which are scaled down to `limit` where they exceed it; 0: no
    limit."""
    if limit:
        return accelerator.clip_grad_norm_(model.parameters(), limit)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
