"""masked_mean against numbers worked out by hand. Process groups: test_masked_whiten.py."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kernels import masked_mean


def test_masked_mean_by_hand(device, backend):
    # (1 + 2 + 6) / 3 = 3; each valid element has the gradient 5 / 3 under an upstream of 5.
    x = torch.tensor([[1.0, math.nan, 2.0], [math.inf, 6.0, 7.0]], device=device)
    mask = torch.tensor([[1, 0, 2], [0, 1, 0]], device=device)
    x.requires_grad_()
    mean = masked_mean(x, mask, backend=backend)
    assert mean.shape == () and mean.item() == 3.0
    (grad,) = torch.autograd.grad(5 * mean, x)
    expected = torch.tensor([[5 / 3, 0.0, 5 / 3], [0.0, 5 / 3, 0.0]], device=device)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (0,), (0, 5)])
def test_masked_mean_of_nothing(device, backend, shape):
    x = torch.full(shape, math.nan, device=device, requires_grad=True)
    mean = masked_mean(x, torch.zeros(shape, dtype=torch.bool, device=device), backend=backend)
    assert mean.item() == 0
    mean.backward()
    assert x.grad.shape == shape and (x.grad == 0).all()


def test_masked_mean_at_a_large_offset(device, backend):
    """100 000 numbers around 1e4: sums in float32 alone would be off by a hundredth."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(device) + 1e4
    mask = torch.ones_like(x, dtype=torch.bool)
    truth = x.double().mean()
    assert abs(masked_mean(x, mask, backend=backend).double() - truth) <= 1e-3  # 1 ulp at 1e4


def test_masked_mean_dtypes_and_errors(device, backend):
    x = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, device=device, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool, device=device)
    mean = masked_mean(x, mask, backend=backend)
    mean.backward()
    assert mean.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    assert masked_mean(x.double(), mask, backend=backend).dtype == torch.float64
    with pytest.raises(ValueError, match=r"mask: expected shape \(2,\) to match x, got \(1,\)"):
        masked_mean(x, mask[:1], backend=backend)
    with pytest.raises(TypeError, match="mask: expected a tensor, got NoneType"):
        masked_mean(x, None, backend=backend)
    with pytest.raises(TypeError, match=r"x: expected bfloat16, .* got torch.int64"):
        masked_mean(mask.long(), mask, backend=backend)
