"""token_logprob: log-probability of given tokens, and the entropy, in one read of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, Sample


class TokenLogprob(NamedTuple):
    """Log-probability of each token, and entropy of each position's distribution, in nats."""

    logprob: Tensor
    entropy: Tensor


@overload
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    with_entropy: Literal[True],
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> TokenLogprob: ...
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | TokenLogprob:
    """Log-probability log softmax(logits / temperature)[token], in nats.

    A banned token (logit -inf) has probability 0, entropy term 0 and gradient 0; as the target its
    log-probability is -inf. The row's maximum is subtracted before anything is scaled or summed, so
    a common offset of 1e4 changes nothing beyond the rounding of the inputs. Compiled backends keep
    log p relative to itself, also where p is near 1 (-1e-12 comes out as -1e-12, not as 0), and so
    they do 1 - p in the gradient; the reference, plain PyTorch, does not.

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64; stride 1 in V, any strides before. Never copied.
        tokens: (...) int64, one token a position, or (..., K): K tokens scored per position.
        temperature: number > 0, or a tensor broadcastable to ``tokens.shape`` (with K tokens a
            position: its last dimension must be 1, as the K share one softmax). No gradient.
        ignore_index: positions with this token give 0 and no gradient; their logits are not read.
        with_entropy: return the entropy too; it does not change a bit of the log-probability.
        inplace_backward: the backward overwrites ``logits`` with its gradient instead of allocating
            one of the same size; a later use of the logits by autograd then raises. Needs logits
            that are not a leaf and whose rows do not overlap. The reference overwrites them, too,
            but saves no memory. Ignored under torch.compile.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        logprob in the shape of ``tokens``, or ``TokenLogprob(logprob, entropy)``, entropy (...);
        float32 (float64 for float64 logits), both differentiable with respect to ``logits``.

    Raises:
        IndexError: a token outside [0, V) that is not ``ignore_index`` (CPU tensors; on CUDA the
            result is NaN, unless RLHF_KERNELS_CHECK=1, which waits for the device to look).
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    temperature_tensor, temperature_value = check_logits(logits, tokens, temperature, ignore_index)
    chosen = _backend.select(
        "token_logprob", logits.device.type, backend, logits.dtype, logits.shape[-1]
    )
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    inplace_backward = inplace_backward and logits.requires_grad and torch.is_grad_enabled()
    if inplace_backward:
        check_inplace("inplace_backward", logits)
    if chosen == "reference":
        logits = _OverwrittenByGradient.apply(logits) if inplace_backward else logits
        scale = temperature_value if temperature_tensor is None else temperature_tensor
        out = token_logprob_reference(logits, tokens, scale, ignore_index)
        return out if with_entropy else out.logprob
    logprob, entropy = _TokenLogprob.apply(
        chosen,
        logits,
        tokens,
        temperature_tensor,
        temperature_value,
        ignore_index,
        with_entropy,
        inplace_backward,
    )
    return TokenLogprob(logprob, entropy) if with_entropy else logprob


def check_logits(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, ignore_index: int
) -> tuple[Tensor | None, float]:
    """Check what all log-prob operators share; the temperature as (one per row or None, number)."""
    checks.floating("logits", logits)
    checks.rows("logits", logits)
    return check_targets("logits", logits, tokens, temperature, ignore_index)


def check_targets(
    name: str, x: Tensor, tokens: Tensor, temperature: float | Tensor, ignore_index: int
) -> tuple[Tensor | None, float]:
    """The same for ``x`` of shape (..., anything), whose name is ``name``."""
    checks.integer("tokens", tokens, x.device)
    many = tokens.dim() == x.dim()
    if tokens.shape[: x.dim() - 1] != x.shape[:-1] or tokens.dim() > x.dim():
        want = tuple(x.shape[:-1])
        raise ValueError(
            f"tokens: expected shape {want} or {(*want, 'K')} to match {name} "
            f"{tuple(x.shape)} without the last dim, got {tuple(tokens.shape)}"
        )
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not isinstance(temperature, Tensor):
        checks.number("temperature", temperature, 0.0, open_low=True)
        dtype = checks.accumulation_dtype(x)
        if not torch.compiler.is_compiling():
            limits = torch.finfo(dtype)
            checks.number("temperature", temperature, limits.tiny, limits.max)
            return None, float(temperature)
        temperature = checks.as_tensor(temperature, x, dtype)
    checks.floating("temperature", temperature, x.device)
    rows = (*tokens.shape[:-1], 1) if many else tokens.shape
    try:
        one_per_row = temperature.detach().to(checks.accumulation_dtype(x)).expand(rows)
    except RuntimeError:
        raise ValueError(
            f"temperature: expected a number or a shape broadcastable to {tuple(rows)}, "
            f"got {tuple(temperature.shape)}"
        ) from None
    return (one_per_row.squeeze(-1) if many else one_per_row).contiguous(), 1.0


def check_inplace(name: str, logits: Tensor) -> None:
    """``logits`` may be overwritten: no leaf nor a view of one, and no row twice in memory."""
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"{name}: expected logits computed by autograd, got a leaf or a view of one, "
            "whose values would be overwritten by its own gradient"
        )
    spans = sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1)
    end = 1
    for stride, size in spans:
        if stride < end:
            raise ValueError(
                f"{name}: expected rows that do not overlap, got strides "
                f"{tuple(logits.stride())} for shape {tuple(logits.shape)}"
            )
        end = stride * size


class _OverwrittenByGradient(torch.autograd.Function):
    """The logits as they are, for the reference, whose graph ends here in the backward."""

    @staticmethod
    def forward(ctx: Any, logits):
        ctx.save_for_backward(logits)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad):
        (logits,) = ctx.saved_tensors
        with torch.no_grad():
            logits.copy_(grad)
        return grad


def token_logprob_reference(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, ignore_index: int
) -> TokenLogprob:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    many = tokens.dim() == logits.dim()
    vocab = logits.shape[-1]
    index = check_range(tokens, tokens != ignore_index, vocab)
    index = index if many else index.unsqueeze(-1)  # (..., K); -1: NaN, vocab: ignored
    valid = index < vocab
    row_valid = valid.any(-1)
    check_positive(temperature, row_valid)
    z = logits.to(checks.accumulation_dtype(logits))  # read N*V
    z = torch.where(row_valid.unsqueeze(-1), z, 0.0)  # select: a NaN there reaches no gradient
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    row_max = z.detach().amax(-1, keepdim=True)
    banned = (z == -torch.inf) & (row_max > -torch.inf)
    z = (z - row_max) / scale
    log_p = z.masked_fill(banned, -torch.inf).log_softmax(-1)  # gradient 0 where banned
    logprob = log_p.gather(-1, index.clamp(0, vocab - 1)).masked_fill(index < 0, torch.nan)
    logprob = torch.where(valid, logprob, 0.0)  # write N*K
    p = log_p.exp()
    plogp = p * log_p.masked_fill(p == 0, 0.0)  # the scaled distance of a finite mask is infinite
    entropy = torch.where(row_valid, -plogp.sum(-1), 0.0)  # write N
    return TokenLogprob(logprob if many else logprob.squeeze(-1), entropy)


def check_range(tokens: Tensor, valid: Tensor, vocab: int) -> Tensor:
    """The tokens as indices: ``vocab`` where ignored; out of range raises on the CPU, else -1."""
    wrong = valid & ((tokens < 0) | (tokens >= vocab))
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"tokens: expected a value in [0, {vocab}) or ignore_index, got {int(tokens[at])} at "
            f"position {at[0] if len(at) == 1 else at}"
        )
    return torch.where(wrong, -1, torch.where(valid, tokens, vocab))


def check_positive(temperature: float | Tensor, scored: Tensor) -> None:
    """On the CPU: temperatures of scored rows are finite and > 0. The C++ kernel checks it too."""
    if not isinstance(temperature, Tensor) or temperature.device.type != "cpu":
        return
    wrong = scored & ~((temperature > 0) & (temperature < torch.inf))
    if not torch.compiler.is_compiling() and bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0])
        got = float(temperature.flatten()[row])
        raise ValueError(f"temperature: expected finite numbers > 0, got {got:f} in row {row}")


def forward_fake(logits, tokens, temperature, temperature_value, ignore_index, with_entropy):
    dtype = checks.accumulation_dtype(logits)
    rows = logits.shape[:-1]
    logprob = logits.new_empty(tokens.shape, dtype=dtype)
    entropy = logits.new_empty(rows if with_entropy else (0,), dtype=dtype)
    return (
        logprob,
        entropy,
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


def _backward_fake(grad_logprob, grad_entropy, logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# Forward: one read of N*V. row_max and log_sum = log sum exp((z - max) / temperature) stay apart
# for the backward: at an offset of 1e4 a float32 sum of the two has lost the digits that matter.
# log_sum = log1p(sum without the maximum itself) is accurate relative to itself.
# Backward: grad = (g_t (onehot - p) - g_H p (log p + H)) / temperature; read N*V, write N*V.
_SAVED = (
    "Tensor tokens, Tensor? temperature, float temperature_value, int ignore_index, "
    "Tensor entropy, Tensor row_max, Tensor log_sum"
)
_backend.define(
    "token_logprob",
    {
        "token_logprob_fwd": (
            "(Tensor logits, Tensor tokens, Tensor? temperature, float temperature_value, "
            "int ignore_index, bool with_entropy) "
            "-> (Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum)",
            forward_fake,
        ),
        "token_logprob_bwd": (
            f"(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, {_SAVED}) -> Tensor",
            _backward_fake,
        ),
        "token_logprob_bwd_": (
            f"(Tensor? grad_logprob, Tensor? grad_entropy, Tensor(a!) logits, {_SAVED}) -> ()",
            lambda *args: None,
        ),
    },
)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend,
        logits,
        tokens,
        temperature,
        temperature_value,
        ignore_index,
        with_entropy,
        inplace,
    ):
        ctx.ops = _backend.operators[backend]
        logprob, entropy, row_max, log_sum = ctx.ops.token_logprob_fwd(
            logits, tokens, temperature, temperature_value, ignore_index, with_entropy
        )
        ctx.save_for_backward(logits, tokens, temperature, entropy, row_max, log_sum)
        ctx.scalars = (temperature_value, ignore_index)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob, grad_entropy):
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 8
        logits, tokens, temperature, entropy, row_max, log_sum = ctx.saved_tensors
        saved = (tokens, temperature, *ctx.scalars, entropy, row_max, log_sum)
        if not ctx.inplace:
            grad = ctx.ops.token_logprob_bwd(grad_logprob, grad_entropy, logits, *saved)
            return None, grad, *(None,) * 6
        # Same memory, new tensor: the gradient must not carry the graph of the logits.
        grad = logits.detach()
        ctx.ops.token_logprob_bwd_(grad_logprob, grad_entropy, grad, *saved)
        torch.autograd.graph.increment_version(logits)  # a plain define() schema does not
        return None, grad, *(None,) * 6


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, vocab: int, *rows: int, **extra: Any) -> Sample:
        inputs = {"logits": make.randn(*rows, vocab, scale=3.0), **extra}
        return Sample({"tokens": make.integers(vocab, *rows), **inputs}, why)

    yield case("two rows of one short vector", 5, 2)
    yield case("668: not a multiple of any tile", 668, 3, 5)
    yield case("1: a certain token", 1, 3)
    both = {"with_entropy": True}
    yield case("8200: several blocks, with a rest; temperature", 8200, 3, temperature=0.7, **both)
    yield case("no rows", 33, 0)
    yield case(
        "one temperature a row", 130, 2, 3, temperature=make.uniform(2, 1, low=0.5, high=2.0)
    )
    yield case("K tokens a position", 97, 4, tokens=make.integers(97, 4, 3))
    yield case("and the entropy", 98, 4, tokens=make.integers(98, 4, 2), **both)
    ignored = make.integers(257, 6)
    ignored[::2] = -100
    yield case("ignored positions", 257, 6, tokens=ignored, **both)
    banned = make.randn(3, 8300)
    banned[:, :4200] = -torch.inf  # the whole first block
    yield case(
        "a leading block of -inf",
        8300,
        3,
        **both,
        logits=banned,
        tokens=make.tensor([8299, 4200, 6000], torch.int64),
    )
    strided = make.randn(4, 7, 40)[:, :-1, 3:]
    yield case("rows are strided slices", 37, 4, 6, logits=strided)


def _bench(make: Maker) -> Iterator[Sample]:
    tokens = make.integers(50304, 512)
    yield Sample({"logits": make.randn(512, 50304, scale=2.0), "tokens": tokens}, "512 x 50304")


def _bytes(inputs: Inputs) -> int:
    return inputs["logits"].numel() * inputs["logits"].element_size()


SPEC = OpSpec(
    name="token_logprob",
    function=token_logprob,
    samples=_samples,
    bench=_bench,
    differentiable=("logits",),
    bytes_forward=_bytes,  # read N*V
    bytes_backward=lambda inputs: 3 * _bytes(inputs),  # read N*V twice, write N*V
)
