"""masked_whiten against numbers worked out by hand, and over two processes."""

from __future__ import annotations

import datetime
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_kernels import masked_mean, masked_whiten
from rlhf_kernels.backend import why_not


@pytest.mark.parametrize(
    ("unbiased", "shift_mean", "expected"),
    # Valid: 1, 2, 6. Mean 3, deviations -2, -1, 3, squares 14: variance 7 (n - 1) or 14/3 (n).
    [
        (True, True, [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]),
        (False, True, [-2 / (14 / 3) ** 0.5, -1 / (14 / 3) ** 0.5, 3 / (14 / 3) ** 0.5]),
        (True, False, [3 - 2 / 7**0.5, 3 - 1 / 7**0.5, 3 + 3 / 7**0.5]),
    ],
)
def test_masked_whiten_by_hand(device, backend, unbiased, shift_mean, expected):
    x = torch.tensor([[1.0, math.nan, 2.0], [1e30, 6.0, math.inf]], device=device)
    mask = torch.tensor([[True, False, True], [False, True, False]], device=device)
    got = masked_whiten(x, mask, unbiased=unbiased, shift_mean=shift_mean, backend=backend)
    torch.testing.assert_close(
        got[mask], torch.tensor(expected, device=device), rtol=1e-6, atol=1e-7
    )
    assert (got[~mask] == 0).all()


def test_masked_whiten_eps_by_hand(device, backend):
    # Mean 0, variance (1 + 1) / 1 = 2, with eps 2: divided by sqrt(4).
    x = torch.tensor([-1.0, 1.0], device=device)
    got = masked_whiten(x, torch.ones_like(x), eps=2.0, backend=backend)
    torch.testing.assert_close(got, torch.tensor([-0.5, 0.5], device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_gradient(device, backend, shift_mean):
    """Whitened numbers do not change when x is shifted or (but for eps) scaled, so the gradient is
    orthogonal to both; what is masked gets none. Its values: gradcheck in test_ops.py."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 200, generator=generator, dtype=torch.float64).to(device)
    mask = (torch.rand(200, generator=generator) < 0.7).to(device)
    x[~mask], weight[~mask] = math.nan, 0.0
    x.requires_grad_()
    got = masked_whiten(x, mask, shift_mean=shift_mean, eps=1e-12, backend=backend)
    (grad,) = torch.autograd.grad((got * weight).sum(), x)
    assert (grad[~mask] == 0).all()
    if shift_mean:
        assert abs(grad.sum()) < 1e-9 and abs((grad[mask] * x[mask]).sum()) < 1e-9
    else:  # shifting x by 1 shifts every valid result by 1
        torch.testing.assert_close(grad.sum(), weight.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_single_element(device, backend, unbiased, shift_mean):
    x = torch.tensor([7.0, 1.0, 2.0], device=device, requires_grad=True)
    mask = torch.tensor([False, True, False], device=device)
    got = masked_whiten(x, mask, unbiased=unbiased, shift_mean=shift_mean, backend=backend)
    assert got.tolist() == [0.0, 0.0 if shift_mean else 1.0, 0.0]
    (grad,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(
        grad, torch.tensor([0.0, 0.0 if shift_mean else 1.0, 0.0], device=device), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("shape", [(3, 4), (0,), (0, 5)])
def test_masked_whiten_of_nothing(device, backend, shape):
    x = torch.full(shape, math.nan, device=device, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    got = masked_whiten(x, mask, shift_mean=False, backend=backend)
    assert got.shape == shape and (got == 0).all()
    got.sum().backward()
    assert (x.grad == 0).all()


def test_masked_whiten_argument_errors(device, backend):
    x = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match="eps: expected a finite number > 0, got 0"):
        masked_whiten(x, x, eps=0, backend=backend)
    with pytest.raises(ValueError, match=r"mask: expected shape \(3,\) to match x, got \(2,\)"):
        masked_whiten(x, x[1:], backend=backend)


def shards() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, generator=generator, dtype=torch.float64) + 5
    mask = torch.rand(24, generator=generator) < 0.8
    uneven = [(x[:7], mask[:7]), (x[7:], mask[7:])]
    empty = [(x, mask), (x[:5], torch.zeros(5, dtype=torch.bool))]
    return [*uneven, *empty]


def run_rank(rank: int, store: str, backends: list[str]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    for backend in backends:
        for first in (0, 2):
            check_rank(rank, shards()[first : first + 2], backend)
    dist.destroy_process_group()


def check_rank(rank: int, pair: list[tuple[torch.Tensor, torch.Tensor]], backend: str) -> None:
    """This rank's results and gradients are its part of those over both shards in one process."""
    group = dist.group.WORLD
    whole = torch.cat([x for x, _ in pair]).requires_grad_()
    whole_mask = torch.cat([mask for _, mask in pair])
    mine, mask = pair[rank][0].clone().requires_grad_(), pair[rank][1]
    own = slice(0, len(pair[0][0])) if rank == 0 else slice(len(pair[0][0]), None)
    for shift_mean in (True, False):
        kwargs = {"shift_mean": shift_mean, "backend": backend}
        together = masked_whiten(mine, mask, process_group=group, **kwargs)
        expected = masked_whiten(whole, whole_mask, **kwargs)
        torch.testing.assert_close(together, expected[own], rtol=1e-9, atol=1e-12)
        # The gradient is that of the sum of the ranks' losses.
        (grad,) = torch.autograd.grad((together**3).sum(), mine)
        (full,) = torch.autograd.grad((expected**3).sum(), whole)
        torch.testing.assert_close(grad, full[own], rtol=1e-9, atol=1e-9)
    together = masked_mean(mine, mask, process_group=group, backend=backend)
    expected = masked_mean(whole, whole_mask, backend=backend)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(together, mine)
    (full,) = torch.autograd.grad(2 * expected, whole)  # both ranks have this loss
    torch.testing.assert_close(grad, full[own], rtol=1e-12, atol=0)


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo")
def test_masked_whiten_and_mean_over_two_processes(tmp_path):
    """Shards that differ in size; then one without a valid element, which must not hang."""
    backends = [b for b in ("reference", "cpu") if why_not("masked_whiten", b) is None]
    mp.spawn(run_rank, (str(tmp_path / "store"), backends), nprocs=2)
