"""value_loss: the clipped squared error of a value function, in one pass over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import aggregation as _aggregation
from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.aggregation import Reduction
from rlhf_kernels.autograd import call_constant, once_differentiable, wants_gradient
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, Sample, total_bytes
from rlhf_kernels.stats import merge, merge_from_zero


class ValueStats(NamedTuple):
    """Sums over valid tokens, each a float64 tensor of one element; ``+`` merges two of them.

    Variances are differences, mean of squares - square of mean, because only plain sums add up over
    micro-batches and ranks. float32 sums would lose a variance below 1e-7 of the squared mean; in
    float64 the squares of float32 numbers are exact, and what the difference leaves resolves any
    spread that float32 numbers around that mean can have.
    """

    token_count: Tensor
    clip_count: Tensor
    error_sum: Tensor
    error_square_sum: Tensor
    return_sum: Tensor
    return_square_sum: Tensor

    def __add__(self, other: ValueStats) -> ValueStats:  # type: ignore[override]
        return merge(self, other)

    def __radd__(self, start: Any) -> ValueStats:
        return merge_from_zero(self, start)

    @property
    def clip_frac(self) -> Tensor:
        """Share of tokens whose loss is the clipped one: the value gets no gradient there."""
        return self.clip_count / self.token_count.clamp(min=1)

    @property
    def explained_variance(self) -> Tensor:
        """1 - var(returns - values) / var(returns); 0 where the returns do not vary."""
        count = self.token_count.clamp(min=1)
        mean, error = self.return_sum / count, self.error_sum / count
        square = self.return_square_sum / count
        variance = square - mean * mean
        left = (self.error_square_sum / count - error * error).clamp(min=0)
        # Equal returns leave a rounding error of the sums, not 0: 1e-12 is a spread of 1e-6 around
        # the mean, and float32 tells no more than 1e-7 apart.
        varies = variance > 1e-12 * square
        return torch.where(varies, 1 - left / torch.where(varies, variance, 1.0), 0.0)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ValueStats]:
    """0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2) of each valid token, aggregated.

    The value loss of OpenAI's lm-human-preferences, with its factor 0.5. Where the two are equal
    the gradient is the unclipped one, v - R; where the clipped one is larger it is 0.

    Args:
        values: v, the value function's output: (B, T), or packed (N,). Differentiable.
        old_values: v when the batch was drawn, constant, the same shape; None when clip is None.
        returns: R, constant, the same shape.
        mask: non-zero where a token counts; None: everywhere. What stands elsewhere, NaN included,
            reaches no result and no gradient.
        clip: c >= 0; None: the plain squared error.
        aggregation, normalizer, max_length, cu_seqlens: as in ``policy_loss``.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        (loss, ValueStats); loss is 0-d, float32 (float64 if an input is float64), and 0 with zero
        gradient when nothing is valid.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit; nothing is computed then.
    """
    checks.floating("values", values)
    checks.floating("returns", returns, values.device)
    checks.shape("returns", returns, values.shape, "to match values")
    if clip is None:
        old_values = None
    else:
        checks.number("clip", clip, 0.0)
        if old_values is None:
            raise ValueError(f"old_values: expected a tensor with clip={clip}, got None")
        checks.floating("old_values", old_values, values.device)
        checks.shape("old_values", old_values, values.shape, "to match values")
    reduction = _aggregation.check_reduction(
        "values", values, mask, aggregation, normalizer, max_length, cu_seqlens
    )
    bound = torch.inf if clip is None else float(clip)
    chosen = _backend.select("value_loss", values.device.type, backend)
    if chosen == "reference":
        (bound,) = checks.graph_numbers(values, _dtype(values, old_values, returns), bound)
        loss, totals = value_loss_reference(values, old_values, returns, reduction, bound)
        return loss, ValueStats(*totals.unbind()[:6])
    (_, bound), numbers = checks.separated(reduction.normalizer_value, bound)
    constants = (old_values, returns, *reduction, bound)
    if wants_gradient(values):
        loss, totals = _ValueLoss.apply(chosen, values, constants, numbers)
    else:
        arguments = (numbers, values, *constants, False)
        loss, totals, _ = call_constant(_backend.call, chosen, "value_loss_fwd", *arguments)
    return loss, ValueStats(*totals.unbind()[:6])


def value_loss_reference(
    values: Tensor, old_values: Tensor | None, returns: Tensor, reduction: Reduction, clip: float
) -> tuple[Tensor, Tensor]:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    dtype = _dtype(values, old_values, returns)
    valid = _aggregation.valid_tokens(values, reduction)
    # Select first: what stands at a masked place takes part in nothing.
    v = torch.where(valid, values.to(dtype), 0.0)
    r = torch.where(valid, returns.detach().to(dtype), 0.0)
    plain = loss = 0.5 * (v - r) ** 2
    if old_values is not None:
        old = torch.where(valid, old_values.detach().to(dtype), 0.0)
        clipped = 0.5 * (v.clamp(old - clip, old + clip) - r) ** 2
        loss = torch.where(plain >= clipped, plain, clipped)  # maximum() would halve the gradient
    errors, targets = (r - v).detach().double(), r.double()
    counts = (valid, loss > plain, errors, errors**2, targets, targets**2)
    total = _aggregation.aggregate_reference(loss, valid, reduction)
    return total, torch.stack([x.double().sum() for x in counts])


def _dtype(values: Tensor, old_values: Tensor | None, returns: Tensor) -> torch.dtype:
    tensors = (values, returns) if old_values is None else (values, returns, old_values)
    return checks.accumulation_dtype(*tensors)


def _forward_fake(values, old_values, returns, *rest):
    dtype = _dtype(values, old_values, returns)
    return (
        values.new_empty((), dtype=dtype),
        values.new_empty(7, dtype=torch.float64),
        values.new_empty(values.shape if rest[-1] else (0,), dtype=dtype),
    )


# Forward, 17 bytes a token in float32 with a mask: read three tensors and the mask, write the
# coefficient d loss / d values but for the denominator; totals are the six statistics and the
# denominator's inverse. Backward, 8 bytes: coefficient times grad / denominator.
_backend.define(
    "value_loss",
    {
        "value_loss_fwd": (
            f"(Tensor values, Tensor? old_values, Tensor returns, {_aggregation.SCHEMA}, "
            "float clip, bool need) -> (Tensor loss, Tensor totals, Tensor coefficient)",
            _forward_fake,
        ),
        "value_loss_bwd": (
            "(Tensor grad, Tensor totals, Tensor coefficient) -> Tensor",
            lambda grad, totals, coefficient: torch.empty_like(coefficient),
        ),
    },
)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, values, constants, numbers):  # a tuple: autograd looks at each
        ctx.ops = _backend.operators[backend]
        arguments = (numbers, values, *constants, True)
        loss, totals, coefficient = _backend.call(backend, "value_loss_fwd", *arguments)
        ctx.save_for_backward(loss, totals, coefficient)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad, _):
        if grad is None:
            return (None,) * 4
        return None, ctx.ops.value_loss_bwd(grad, *ctx.saved_tensors[1:]), None, None


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, **extra: Any) -> Sample:
        values = make.randn(*shape)
        inputs: Inputs = {
            "values": values,
            "old_values": (values + make.randn(*shape, scale=0.3)).to(values.dtype),
            "returns": make.randn(*shape),
        }
        return Sample({**inputs, **extra}, why)

    offsets = make.tensor([0, 5, 5, 6, 23], torch.int32)
    yield case("defaults, no mask", 2, 5)
    yield case("37: vectors and a rest", 3, 37, mask=make.mask(3, 37))
    yield case("plain", 3, 37, clip=None, old_values=None, aggregation="seq-mean-token-mean")
    for aggregation in _aggregation.AGGREGATIONS:
        yield case(
            f"{aggregation}, packed, one sequence empty",
            23,
            aggregation=aggregation,
            cu_seqlens=offsets,
            mask=make.mask(23),
            max_length=9,
        )
    yield case("sequences of 1100: two blocks each", 2, 1100, mask=make.mask(2, 1100))
    yield case("packed tokens in one run; global denominator", 700, normalizer=1000)
    yield case("nothing valid", 3, 5, mask=make.mask(3, 5, keep=0.0))
    yield case("no sequences", 0, 5)
    yield case("no tokens", 3, 0, aggregation="seq-mean-token-sum-norm")
    yield case("strided", 9, 4, values=make.randn(4, 9).T, returns=make.randn(9, 1).expand(9, 4))


def _bench(make: Maker) -> Iterator[Sample]:
    tensors: Inputs = {name: make.randn(64, 1024) for name in ("values", "old_values", "returns")}
    yield Sample({**tensors, "mask": make.mask(64, 1024)}, "64 x 1024")


SPEC = OpSpec(
    name="value_loss",
    function=value_loss,
    samples=_samples,
    bench=_bench,
    differentiable=("values",),
    # the coefficient is written, read, and the gradient written, in float32
    bytes_backward=lambda inputs: total_bytes(inputs) + 12 * inputs["values"].numel(),
)
