"""Log-probabilities and, in the same pass, the gradient of the logits: one read and one write.

For losses whose coefficient of each token is known before the pass, is applied after it, or is the
clipped surrogate's. The operator is not differentiable: it is what a fused loss is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.opspec import Maker, OpSpec, Sample
from rlhf_kernels.token_logprob import (
    check_inplace,
    check_logits,
    forward_fake,
    token_logprob_reference,
)


class LogprobAndGrad(NamedTuple):
    """logprob in the shape of ``tokens``, grad_logits in that of the logits, and of each row (...):

    the entropy, or None; the largest logit, and log sum exp((logits - row_max) / temperature).
    """

    logprob: Tensor
    entropy: Tensor | None
    row_max: Tensor
    log_sum: Tensor
    grad_logits: Tensor


class ClippedSurrogate(NamedTuple):
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with r = exp(logprob - old_logprob), as policy_loss.

    Tensors in the shape of ``tokens``; both bounds and the dual clip as in ``policy_loss``.
    """

    old_logprob: Tensor
    advantages: Tensor
    clip_low: float | None = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None


def token_logprob_and_grad(
    logits: Tensor,
    tokens: Tensor,
    *,
    weight: Tensor | None = None,
    surrogate: ClippedSurrogate | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    with_entropy: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> LogprobAndGrad:
    """``token_logprob``, and d/dlogits of sum(weight * logprob) or of sum(weight * surrogate).

    Without ``weight`` and ``surrogate`` the gradient is onehot - p, over the temperature: rows to
    be scaled later. With a surrogate and weight = mask / mask.sum().clamp(min=1) it is that of
    ``policy_loss`` with aggregation token-mean; to leave masked rows unread, give them the token
    ``ignore_index``.

    On CUDA, where a row fits the shared memory of a cluster, the logits are read once and their
    gradient is written once, against two reads and one write for forward and backward.

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64; stride 1 in V, any strides before. A constant.
        tokens: (...) int64, or (..., K): K tokens scored per position (without ``surrogate``).
        weight: of each token, in the shape of ``tokens``, a constant; None: 1. Where it is 0 the
            surrogate is left out, whatever it holds there. Vectors are taken in float32 (float64
            for float64 logits).
        surrogate: the loss whose gradient is wanted; None: the log-probability.
        temperature: number > 0, or a tensor broadcastable to ``tokens.shape``.
        ignore_index: positions with this token give 0 and no gradient; their logits are not read,
            nor is what ``weight`` and ``surrogate`` hold there.
        with_entropy: return the entropy too. The gradient is not that of the entropy.
        inplace: the gradient may take the place of the logits, and is returned as that tensor; a
            later use of the logits by autograd then raises. The logits must not be a leaf that
            requires a gradient, and rows must not overlap. Ignored under torch.compile.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        LogprobAndGrad; logprob and entropy in float32 (float64 for float64 logits), the gradient in
        the dtype of the logits.

    Raises:
        IndexError: a token outside [0, V) that is not ``ignore_index`` (CPU tensors; on CUDA its
            log-probability is NaN and has no gradient, unless RLHF_KERNELS_CHECK=1).
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    temperature_tensor, temperature_value = check_logits(logits, tokens, temperature, ignore_index)
    if weight is not None:
        checks.floating("weight", weight, logits.device)
        checks.shape("weight", weight, tokens.shape, "to match tokens")
    slope = _check_surrogate(surrogate, logits, tokens)
    chosen = _backend.select(
        "token_logprob_and_grad", logits.device.type, backend, logits.dtype, logits.shape[-1]
    )
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace:
        check_inplace("inplace", logits)
    logits = logits.detach()
    with torch.no_grad():
        if chosen == "reference":
            dtype = checks.accumulation_dtype(logits)
            constants = (weight, *slope[:2], *checks.graph_numbers(logits, dtype, *slope[2:]))
            scale = temperature_value if temperature_tensor is None else temperature_tensor
            out = token_logprob_and_grad_reference(logits, tokens, scale, ignore_index, *constants)
            *results, grad_logits = out
            if inplace:
                grad_logits = logits.copy_(grad_logits)
        else:
            found, numbers = checks.separated(temperature_value, *slope[2:])
            scaling = (temperature_tensor, found[0], ignore_index)
            args = (logits, tokens, *scaling, weight, *slope[:2], *found[1:], with_entropy)
            if inplace:
                results = _backend.operators[chosen].token_logprob_and_grad_(*args)
                grad_logits = logits
                torch.autograd.graph.increment_version(logits)  # a plain define() does not
            else:
                name = "token_logprob_and_grad"
                *results, grad_logits = _backend.call(chosen, name, numbers, *args)
    logprob, entropy, row_max, log_sum = results
    wanted = entropy if with_entropy else None
    return LogprobAndGrad(logprob, wanted, row_max, log_sum, grad_logits)


def _check_surrogate(
    surrogate: ClippedSurrogate | None, logits: Tensor, tokens: Tensor
) -> tuple[Tensor | None, Tensor | None, Any, Any, Any]:
    """(old_logprob, advantages, and numbers for checks: least ratio, largest ratio, dual clip)."""
    if surrogate is None:
        return None, None, 0.0, torch.inf, torch.inf
    if not isinstance(surrogate, ClippedSurrogate):
        got = type(surrogate).__name__
        raise TypeError(f"surrogate: expected a ClippedSurrogate, got {got}")
    if tokens.dim() == logits.dim():
        raise ValueError(
            f"tokens: expected shape {tuple(logits.shape[:-1])}, one token a position, with a "
            f"surrogate, got {tuple(tokens.shape)}"
        )
    old_logprob, advantages, low, high, dual = surrogate
    for name, x in (("old_logprob", old_logprob), ("advantages", advantages)):
        checks.floating(f"surrogate.{name}", x, logits.device)
        checks.shape(f"surrogate.{name}", x, tokens.shape, "to match tokens")
    if low is not None:
        checks.number("surrogate.clip_low", low, 0.0)
    if high is not None:
        checks.number("surrogate.clip_high", high, 0.0)
    if dual is not None:
        checks.number("surrogate.dual_clip", dual, 1.0, open_low=True)
    high = low if high is None else high
    return (
        old_logprob,
        advantages,
        0.0 if low is None else checks.AroundOne(-1, low),
        torch.inf if high is None else checks.AroundOne(1, high),
        torch.inf if dual is None else float(dual),
    )


def token_logprob_and_grad_reference(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    weight: Tensor | None,
    old_logprob: Tensor | None,
    advantages: Tensor | None,
    low: float,
    high: float,
    dual: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification: plain PyTorch."""
    logprob, entropy = token_logprob_reference(logits, tokens, temperature, ignore_index)
    scored = (tokens >= 0) & (tokens < logits.shape[-1]) & (tokens != ignore_index)

    def select(x: Tensor) -> Tensor:  # first: what stands elsewhere takes part in nothing
        return torch.where(scored, x.to(logprob.dtype), 0.0)

    g = select(torch.ones_like(logprob) if weight is None else weight)  # read 3N
    if old_logprob is not None and advantages is not None:
        r, a = (select(logprob) - select(old_logprob)).exp(), select(advantages)
        least = torch.zeros_like(a).masked_fill(a < 0, low)
        most = (torch.zeros_like(a) + high).masked_fill(a < 0, dual)
        slope = torch.where((r < least) | (r > most), 0.0, -a * r)
        g = torch.where(scored & (g != 0), g * slope, 0.0)
    many = tokens.dim() == logits.dim()
    g, index = (g, tokens) if many else (g.unsqueeze(-1), tokens.unsqueeze(-1))
    used = (index != ignore_index).any(-1, keepdim=True)
    z = torch.where(used, logits.to(logprob.dtype), 0.0)  # read N*V
    banned = z == -torch.inf
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    row_max = z.amax(-1, keepdim=True)
    z = (z - row_max) / scale
    log_sum = torch.where(used, z.logsumexp(-1, keepdim=True), 0.0)
    p = (z - log_sum).exp()
    inside = scored if many else scored.unsqueeze(-1)
    onehot = torch.zeros_like(z).scatter_add_(-1, torch.where(inside, index, 0), g)
    grad = (onehot - g.sum(-1, keepdim=True) * p) / scale
    banned = banned & (row_max > -torch.inf)
    grad = torch.where(used & ~banned, grad, 0.0).to(logits.dtype)  # write N*V
    return logprob, entropy, row_max.squeeze(-1), log_sum.squeeze(-1), grad


def _fake_(logits, tokens, temperature, temperature_value, ignore_index, *rest):
    return forward_fake(logits, tokens, None, 1.0, ignore_index, rest[-1])


def _fake(logits, *rest):
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *_fake_(logits, *rest), grad_logits


# Read N*V, write N*V. The coefficient of a token is weight, or weight times the surrogate's slope
# in the log-probability, which is known once its row has been read.
_ARGUMENTS = (
    "logits, Tensor tokens, Tensor? temperature, float temperature_value, int ignore_index, "
    "Tensor? weight, Tensor? old_logprob, Tensor? advantages, float low, float high, float dual, "
    "bool with_entropy"
)
_RESULTS = "Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum"
_backend.define(
    "token_logprob_and_grad",
    {
        "token_logprob_and_grad": (
            f"(Tensor {_ARGUMENTS}) -> ({_RESULTS}, Tensor grad_logits)",
            _fake,
        ),
        "token_logprob_and_grad_": (
            f"(Tensor(a!) {_ARGUMENTS}) -> ({_RESULTS})",
            _fake_,
        ),
    },
)


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, vocab: int, *rows: int, **extra: Any) -> Sample:
        inputs = {"logits": make.randn(*rows, vocab, scale=3.0), **extra}
        return Sample({"tokens": make.integers(vocab, *rows), **inputs}, why)

    def clipped(*rows: int, **options: Any) -> ClippedSurrogate:
        return ClippedSurrogate(-3 - make.randn(*rows).abs(), make.randn(*rows), **options)

    yield case("onehot - p of a short vector", 5, 2)
    yield case("668: not a multiple of any tile", 668, 3, 5, weight=make.randn(3, 5))
    yield case("the clipped surrogate", 33, 7, 6, surrogate=clipped(7, 6), with_entropy=True)
    bounds = {"clip_high": 0.3, "dual_clip": 2.0}
    weight = make.uniform(9)
    yield case("dual clip", 33, 9, surrogate=clipped(9, **bounds), weight=weight, temperature=0.7)
    yield case("8200: several blocks, with a rest", 8200, 3, surrogate=clipped(3, clip_low=None))
    yield case("no rows", 33, 0, surrogate=clipped(0))
    many = {"tokens": make.integers(97, 4, 3), "weight": make.randn(4, 3)}
    temperature = make.uniform(4, 1, low=0.5, high=2.0)
    yield case("K tokens a position", 97, 4, **many, temperature=temperature, with_entropy=True)
    ignored = make.integers(257, 6)
    ignored[::2] = -100
    yield case("ignored positions", 257, 6, tokens=ignored, surrogate=clipped(6))
    banned = make.randn(3, 8300)
    banned[:, :4200] = -torch.inf
    targets = make.tensor([8299, 4200, 6000], torch.int64)
    yield case("a leading block of -inf", 8300, 3, logits=banned, tokens=targets)
    strided = make.randn(4, 7, 40)[:, :-1, 3:]
    yield case("rows are strided slices", 37, 4, 6, logits=strided, surrogate=clipped(4, 6))


def _bench(make: Maker) -> Iterator[Sample]:
    tokens = make.integers(50304, 512)
    yield Sample({"logits": make.randn(512, 50304, scale=2.0), "tokens": tokens}, "512 x 50304")


def _bytes(inputs: dict[str, Any]) -> int:
    return 2 * inputs["logits"].numel() * inputs["logits"].element_size()


SPEC = OpSpec(
    name="token_logprob_and_grad",
    function=token_logprob_and_grad,
    samples=_samples,
    bench=_bench,
    bytes_forward=_bytes,  # read and write N*V
    in_input_dtype=(-1,),
)
