"""The numerics contract as an assertion: the bound comes from the formula, not from taste."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_truth(
    got: Tensor, plain: Tensor, truth: Tensor, atol: float, what: str = ""
) -> None:
    """The largest error of ``got`` is at most twice the largest error of ``plain``, plus ``atol``.

    First NaN must stand exactly where the truth has NaN, and +-inf where it has +-inf (also where
    the truth is too large for the dtype of ``got``). Errors are then taken in float64.

    Args:
        got: what is tested.
        plain: the plain PyTorch formula in the input's dtype, accumulated in float32. Where it
            overflows although the truth does not, it grants ``got`` no error.
        truth: the same formula on the same inputs, in float64.
        atol: the small absolute term.
        what: said first in the message, e.g. ``"gradient of logits"``.
    """
    what = f"{what}: " if what else ""
    assert got.shape == plain.shape == truth.shape, (
        f"{what}shapes differ: got {tuple(got.shape)}, plain {tuple(plain.shape)}, "
        f"truth {tuple(truth.shape)}"
    )
    if got.numel() == 0:
        return
    got, plain, truth, rounded = (
        x.detach().double().cpu() for x in (got, plain, truth, truth.to(got.dtype))
    )
    finite = rounded.isfinite()
    same = (got == rounded) | (got.isnan() & rounded.isnan()) | (got.isfinite() & finite)
    if not same.all():
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}{int((~same).sum())} of {same.numel()} elements are NaN or infinite where the "
            f"truth is not, or the reverse; first at {at}: got {got[at]:g}, truth {truth[at]:g}"
        )
    error = torch.where(finite, (got - truth).abs(), 0.0)
    plain_error = torch.where(finite & plain.isfinite(), (plain - truth).abs(), 0.0)
    bound = 2 * float(plain_error.max()) + atol
    if float(error.max()) > bound:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what}error {float(error.max()):.3g} at {at} is above {bound:.3g} = "
            f"2 x {float(plain_error.max()):.3g} (plain formula) + {atol:g}; there got "
            f"{got[at]:.9g}, plain {plain[at]:.9g}, truth {truth[at]:.9g}; "
            f"{int((error > bound).sum())} of {error.numel()} elements are above the bound"
        )
