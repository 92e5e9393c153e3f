"""value_loss against numbers worked out by hand, and what it promises beyond the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_kernels import ValueStats, value_loss
from rlhf_kernels.aggregation import AGGREGATIONS


def case(batch: int, length: int, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    values, change, returns = torch.randn(3, batch, length, generator=g)
    return {
        "values": values.to(device),
        "old_values": (values + 0.3 * change).to(device),
        "returns": returns.to(device),
        "mask": (torch.rand(batch, length, generator=g) < 0.7).to(device),
    }


def gradient(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ValueStats, Tensor]:
    values = inputs["values"].clone().requires_grad_()
    loss, stats = value_loss(**{**inputs, "values": values}, **options)
    loss.backward()
    return loss.detach(), stats, values.grad


def test_value_loss_by_hand(device, backend):
    # old 0, clip 0.25
    # v      0.125  1      -1     1       0.5
    # R      1      0      -2     0.625   2
    # v - R -0.875  1       1     0.375  -1.5
    # clip   0.125  0.25   -0.25  0.25    0.25
    # - R   -0.875  0.25    1.75 -0.375  -1.75
    # kept   same   v - R  clip   v - R   clip      the fourth is a tie
    values = torch.tensor([[0.125, 1, -1, 1, 0.5]], device=device, requires_grad=True)
    returns = torch.tensor([[1, 0, -2, 0.625, 2]], device=device)
    loss, stats = value_loss(values, torch.zeros_like(returns), returns, clip=0.25, backend=backend)
    squares = 0.875**2 + 1 + 1.75**2 + 0.375**2 + 1.75**2
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * squares / 5, rel=1e-6)
    loss.backward()
    expected = torch.tensor([[-0.875, 1.0, 0.0, 0.375, 0.0]], device=device) / 5
    torch.testing.assert_close(values.grad, expected, rtol=1e-6, atol=0)
    assert stats.clip_count.item() == 2
    assert stats.clip_frac.item() == pytest.approx(0.4)


def test_plain_loss_and_explained_variance_by_hand(device, backend):
    # R = (1, 2, 3): variance 2/3. R - v = (1, 0, 0): variance 1/3 - 1/9 = 2/9. 1 - 1/3 = 2/3.
    values = torch.tensor([[0.0, 2.0, 3.0, 50.0]], device=device, requires_grad=True)
    returns = torch.tensor([[1.0, 2.0, 3.0, -50.0]], device=device)
    mask = torch.tensor([[1, 1, 1, 0]], device=device)
    loss, stats = value_loss(values, None, returns, mask, clip=None, backend=backend)
    assert loss.item() == pytest.approx(0.5 / 3)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-1.0, 0, 0, 0]], device=device) / 3)
    assert stats.explained_variance.item() == pytest.approx(2 / 3)
    assert stats.clip_frac.item() == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4 / 3])
def test_explained_variance_of_equal_returns_is_zero(device, backend, constant):
    returns = torch.full((3, 1111), constant, device=device)
    for values in (returns, torch.randn(3, 1111, device=device)):
        _, stats = value_loss(values, values, returns, backend=backend)
        assert stats.explained_variance.item() == 0
    _, stats = value_loss(returns[:0], returns[:0], returns[:0], backend=backend)
    assert stats.explained_variance.item() == 0


# Token losses 0.5, 2 | 8 | nothing valid; T = 4. Errors 1, 2 | 4.
SUMS = {
    "token-mean": 10.5 / 3,
    "token-sum": 10.5,
    "seq-mean-token-sum": (2.5 + 8) / 2,
    "seq-mean-token-mean": (1.25 + 8) / 2,
    "seq-mean-token-sum-norm": (2.5 + 8) / (2 * 4),
}


# What a token of the first and of the second sequence weighs: its gradient is v - R times that.
WEIGHTS = {
    "token-mean": (1 / 3, 1 / 3),
    "token-sum": (1.0, 1.0),
    "seq-mean-token-sum": (1 / 2, 1 / 2),
    "seq-mean-token-mean": (1 / 4, 1 / 2),
    "seq-mean-token-sum-norm": (1 / 8, 1 / 8),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand(device, backend, aggregation):
    returns = torch.tensor([[1.0, 2, 9, 9], [9, 4, 9, 9], [9, 9, 9, 9]], device=device)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], device=device)
    packed = torch.tensor([1.0, 2, 9, 4, 9], device=device)
    kept = torch.tensor([1, 1, 0, 1, 0], device=device)
    offsets = torch.tensor([0, 3, 4, 5], device=device)
    layouts: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (returns, mask, {}),
        (packed, kept, {"cu_seqlens": offsets, "max_length": 4}),
    ]
    for target, valid, layout in layouts:
        values = torch.zeros_like(target).requires_grad_()
        options = {"clip": None, "aggregation": aggregation, "backend": backend, **layout}
        loss, _ = value_loss(values, None, target, valid, **options)
        assert loss.item() == pytest.approx(SUMS[aggregation], rel=1e-6)
        loss.backward()
        first, second = WEIGHTS[aggregation]
        weights = torch.tensor([first, first, second], device=device)
        torch.testing.assert_close(values.grad[valid.bool()], -target[valid.bool()] * weights)
        assert not values.grad[~valid.bool()].any()
        count = {"token-mean": 3, "token-sum": 1}.get(aggregation, 2)
        loss, _ = value_loss(values, None, target, valid, **options, normalizer=5)
        assert loss.item() == pytest.approx(SUMS[aggregation] * count / 5, rel=1e-6)


def test_constants_get_no_gradient(device, backend):
    inputs = case(2, 8, device=device)
    for name in ("values", "old_values", "returns"):
        inputs[name].requires_grad_()
    loss, stats = value_loss(**inputs, backend=backend)
    loss.backward()
    assert inputs["old_values"].grad is None and inputs["returns"].grad is None
    assert not any(x.requires_grad for x in stats)


def test_stats_of_parts_add_up(device, backend):
    inputs = case(6, 700, device=device)
    _, whole, _ = gradient(inputs, backend=backend)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.append(gradient({k: v[rows] for k, v in inputs.items()}, backend=backend)[1])
    total = parts[0] + parts[1] + parts[2]
    assert isinstance(total, ValueStats)
    for name, a, b in zip(ValueStats._fields, total, whole, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-9), name
    valid = inputs["mask"]
    errors = (inputs["returns"] - inputs["values"]).double()[valid]
    expected = 1 - errors.var(correction=0) / inputs["returns"].double()[valid].var(correction=0)
    assert total.explained_variance.item() == pytest.approx(expected.item(), rel=1e-6)
    assert 0 < total.clip_frac.item() < 1


def test_gradient_of_a_row_has_the_same_bits_in_any_batch(device, backend):
    if backend == "reference":
        pytest.skip("promised for compiled backends")
    options = {"aggregation": "seq-mean-token-mean", "normalizer": 7, "backend": backend}
    inputs = case(5, 1037, device=device)  # two blocks a row, the last with a rest
    _, _, grad = gradient(inputs, **options)
    for i in range(5):
        _, _, one = gradient({k: v[i : i + 1] for k, v in inputs.items()}, **options)
        assert torch.equal(one[0], grad[i])
    offsets = torch.arange(6, device=device) * 1037
    packed = {k: v.flatten() for k, v in inputs.items()}
    _, _, flat = gradient(packed, **options, cu_seqlens=offsets)
    assert torch.equal(flat.view(5, 1037), grad)


@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
def test_nan_at_a_valid_place_is_seen(device, backend, name):
    inputs = case(2, 20, device=device)
    inputs["mask"][1, 3] = True
    inputs[name][1, 3] = torch.nan
    loss, _ = value_loss(**inputs, backend=backend)
    assert loss.isnan()


ok = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": ok.int()}, TypeError, "values: expected bfloat16, .* got torch.int32"),
        ({"old_values": None}, ValueError, "old_values: expected a tensor with clip=0.2, got None"),
        ({"old_values": ok[:1]}, ValueError, r"old_values: .* \(2, 3\) to match values, got \(1"),
        ({"returns": ok.T}, ValueError, r"returns: expected shape \(2, 3\) to match values"),
        ({"mask": ok[0]}, ValueError, r"mask: expected shape \(2, 3\) to match values"),
        ({"clip": -1}, ValueError, "clip: expected a finite number >= 0, got -1"),
        ({"aggregation": "sum"}, ValueError, "aggregation: expected one of token-mean"),
        ({"normalizer": -1.0}, ValueError, "normalizer: expected a finite number >= 0"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens: expected None with values"),
    ],
)
def test_argument_errors(changes, error, message):
    with pytest.raises(error, match=message):
        value_loss(**{"values": ok, "old_values": ok, "returns": ok, **changes})


def test_argument_errors_of_packed_tokens(backend):
    flat = torch.zeros(6)
    with pytest.raises(ValueError, match="aggregation='seq-mean-token-mean', got None"):
        value_loss(flat, flat, flat, aggregation="seq-mean-token-mean", backend=backend)
    with pytest.raises(ValueError, match=r"end at 6, got \[0, 7\]"):
        value_loss(flat, flat, flat, cu_seqlens=torch.tensor([0, 7]), backend=backend)
