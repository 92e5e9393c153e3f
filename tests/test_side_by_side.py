"""The memory that the benchmarks beside host trainers report."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("side_by_side", FOLDER / "side_by_side.py")
assert spec is not None and spec.loader is not None
side_by_side = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = side_by_side
spec.loader.exec_module(side_by_side)

MIB = 2**18  # floats


def test_peak_is_what_stood_at_once():
    def call():
        a = torch.ones(3 * MIB)
        b = a + 1  # 6 MiB stand
        del a
        return [b.sum()]

    for _ in range(2):
        assert 6 * 2**20 <= side_by_side.peak(call) <= 6 * 2**20 + 4096


def test_peak_refuses_a_call_that_leaves_something_behind():
    """Whoever is second would free the gradients of the first, and seem to need less."""
    weight = torch.ones(3 * MIB, requires_grad=True)

    def call():
        weight.grad = None
        (weight * weight).sum().backward()
        return []

    with pytest.raises(ValueError, match="leaves nothing behind"):
        side_by_side.peak(call)
