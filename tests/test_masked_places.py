"""What stands where nothing counts reaches no output and no gradient, in any operator.

Places where nothing counts: where the mask is 0, where the token is ignore_index, where the rank is
NaN, and what belongs to a sequence without a valid token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_kernels.backend import INTERPRETING
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, outputs
from rlhf_kernels.specs import SPECS

HEAD = ("weight", "bias")  # of a linear operator: not of tokens
WITH_PLACES = [spec for spec in SPECS if spec.name not in ("kl_estimate", "pairwise_reward_loss")]


def with_places(spec: OpSpec, inputs: Inputs) -> tuple[Inputs, Tensor] | None:
    """A sample in which some tokens count for nothing, and where these are; None: it has none."""
    inputs = dict(inputs)
    if "ranks" in inputs:
        ranks = inputs["ranks"].double()
        nothing = torch.arange(ranks.shape[0], device=ranks.device) % 3 == 1
        inputs["ranks"] = ranks.masked_fill(nothing, math.nan)
    elif "tokens" in inputs:
        tokens = inputs["tokens"].clone()
        tokens.view(-1)[::2] = -100
        inputs["tokens"], nothing = tokens, tokens == -100
        if isinstance(inputs.get("temperature"), Tensor) and tokens.dim() < inputs_dim(inputs):
            inputs["temperature"] = inputs["temperature"].expand(tokens.shape).clone()
    else:
        like = inputs[next(name for name in ("logprob", "values", "x") if name in inputs)]
        if inputs.get("mask") is None:
            inputs["mask"] = torch.arange(like.numel(), device=like.device).view(like.shape) % 3 > 0
        nothing = ~inputs["mask"].bool()
        if nothing.dim() == 2 and nothing.shape[0] > 1:
            nothing[-1] = True
            inputs["mask"] = ~nothing
    return (inputs, nothing) if nothing.any() else None


def inputs_dim(inputs: Inputs) -> int:
    return inputs["logits" if "logits" in inputs else "hidden"].dim()


def poisoned(spec: OpSpec, inputs: Inputs, nothing: Tensor, garbage: float) -> Inputs:
    rows = nothing
    if "tokens" in inputs and nothing.dim() == inputs_dim(inputs):
        rows = nothing.all(-1)  # K tokens a position

    def fill(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: fill(y) for name, y in x.items()}
        if isinstance(x, tuple):
            return type(x)(*map(fill, x))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.shape == nothing.shape:
            return x.masked_fill(nothing, garbage)
        if "mask" in inputs and nothing.dim() == 2 and x.shape == nothing.shape[:1]:
            return x.masked_fill(nothing.all(1), garbage)  # one number a sequence
        if x.dim() == rows.dim() + 1 and x.shape[:-1] == rows.shape:
            return x.masked_fill(rows.unsqueeze(-1), garbage)
        return x

    kept = HEAD if spec.name.startswith("linear") else ("ranks",)
    return {name: x if name in kept else fill(x) for name, x in inputs.items()}


def results(
    spec: OpSpec, inputs: Inputs, backend: str, nothing: Tensor, garbage: float
) -> Iterator[tuple[str, Tensor]]:
    """Outputs and gradients; ``garbage`` is the upstream gradient where nothing counts."""
    inputs, leaves = dict(inputs), {}
    for name in spec.leaves(inputs):
        inputs[name] = leaves[name] = inputs[name].detach().clone().requires_grad_()
    found = outputs(spec.function(**inputs, backend=backend))
    yield from ((f"output {i}", x.detach()) for i, x in enumerate(found))
    wanted = [x for x in found if x.requires_grad]
    if not leaves or not wanted:
        return
    upstream = []
    for x in wanted:
        g = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
        upstream.append(g.masked_fill(nothing, garbage) if g.shape == nothing.shape else g)
    grads = torch.autograd.grad(wanted, list(leaves.values()), upstream, allow_unused=True)
    yield from ((f"gradient of {name}", g) for name, g in zip(leaves, grads, strict=True))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("spec", WITH_PLACES, ids=lambda spec: spec.name)
def test_what_stands_where_nothing_counts_reaches_nothing(spec, device, backend, garbage):
    if INTERPRETING and garbage == -math.inf:
        pytest.skip("the interpreter takes its time: one infinity will do")
    tried = 0
    for sample in spec.samples(Maker(device)):
        found = with_places(spec, sample.inputs)
        if found is None:
            continue
        inputs, nothing = found
        clean = results(spec, inputs, backend, nothing, 1.0)
        dirty = results(spec, poisoned(spec, inputs, nothing, garbage), backend, nothing, garbage)
        for (what, a), (_, b) in zip(clean, dirty, strict=True):
            if a is None:
                assert b is None
                continue
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{sample.why}: {what}"
        tried += 1
    assert tried
