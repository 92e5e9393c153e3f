"""logprob_kl: log-probabilities, exact KL to a reference and entropy, one read of both logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.autograd import once_differentiable
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, Sample
from rlhf_kernels.token_logprob import check_logits, check_positive, check_range


class LogprobKL(NamedTuple):
    """Per token, in nats: log p(token), log q(token), KL(p || q) and the entropy of p."""

    logprob: Tensor
    ref_logprob: Tensor
    kl: Tensor
    entropy: Tensor


def logprob_kl(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LogprobKL:
    """Log-probability of each token under policy p and reference q, KL(p || q) and entropy of p.

    KL(p || q) = sum_v p_v (log p_v - log q_v), exact over the vocabulary, with p = softmax(logits /
    temperature) and q likewise from ``ref_logits``. Where q = 0 < p it is +inf (and has no usable
    gradient); where p = 0 that term is 0. ``logprob`` and ``entropy`` have the same bits as from
    ``token_logprob`` on the same compiled backend.

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, the policy; stride 1 in V. Never copied.
        ref_logits: (..., V) of the same dtype, the reference: a constant without gradient.
        tokens: (...) int64.
        temperature: number > 0, or a tensor broadcastable to ``tokens.shape``; divides both logits.
        ignore_index: positions with this token give 0 everywhere and no gradient.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        LogprobKL of (...) tensors, float32 (float64 for float64 logits); logprob, kl and entropy
        are differentiable with respect to ``logits``.

    Raises:
        IndexError: a token outside [0, V) that is not ``ignore_index`` (CPU tensors, and
            with RLHF_KERNELS_CHECK=1 on CUDA; else NaN).
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    temperature_tensor, temperature_value = check_logits(logits, tokens, temperature, ignore_index)
    if tokens.dim() == logits.dim():
        want = tuple(logits.shape[:-1])
        raise ValueError(f"tokens: expected shape {want}, got {tuple(tokens.shape)}")
    checks.floating("ref_logits", ref_logits, logits.device)
    checks.shape("ref_logits", ref_logits, logits.shape, "to match logits")
    checks.rows("ref_logits", ref_logits)
    if ref_logits.dtype != logits.dtype:
        raise TypeError(f"ref_logits: expected {logits.dtype} as logits, got {ref_logits.dtype}")
    chosen = _backend.select("logprob_kl", logits.device.type, backend)
    if chosen == "reference":
        scale = temperature_value if temperature_tensor is None else temperature_tensor
        return logprob_kl_reference(logits, ref_logits, tokens, scale, ignore_index)
    constants = (temperature_tensor, temperature_value, ignore_index)
    return LogprobKL(*_LogprobKL.apply(chosen, logits, ref_logits.detach(), tokens, *constants))


def logprob_kl_reference(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
) -> LogprobKL:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    vocab = logits.shape[-1]
    index = check_range(tokens, tokens != ignore_index, vocab).unsqueeze(-1)
    valid = index < vocab
    check_positive(temperature, valid.squeeze(-1))
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature

    def log_softmax(z: Tensor) -> Tensor:  # read N*V of each
        z = torch.where(valid, z.to(checks.accumulation_dtype(z)), 0.0)
        row_max = z.detach().amax(-1, keepdim=True)
        banned = (z == -torch.inf) & (row_max > -torch.inf)
        z = (z - row_max) / scale
        return z.masked_fill(banned, -torch.inf).log_softmax(-1)

    def of_token(log_p: Tensor) -> Tensor:
        at = log_p.gather(-1, index.clamp(0, vocab - 1)).masked_fill(index < 0, torch.nan)
        return torch.where(valid, at, 0.0).squeeze(-1)  # write N

    log_p, log_q = log_softmax(logits), log_softmax(ref_logits.detach())
    p = log_p.exp()
    nothing = p == 0  # then a term is 0, not 0 * inf
    kl = (p * torch.where(nothing, 0.0, log_p - log_q)).sum(-1)  # write N
    plogp = p * log_p.masked_fill(nothing, 0.0)
    entropy = torch.where(valid.squeeze(-1), -plogp.sum(-1), 0.0)  # write N
    return LogprobKL(of_token(log_p), of_token(log_q), kl, entropy)


def _forward_fake(logits, ref_logits, tokens, temperature, temperature_value, ignore_index):
    dtype = checks.accumulation_dtype(logits)
    return tuple(logits.new_empty(tokens.shape, dtype=dtype) for _ in range(8))


def _backward_fake(grad_logprob, grad_kl, grad_entropy, logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_backend.define(
    "logprob_kl",
    {
        "logprob_kl_fwd": (
            "(Tensor logits, Tensor ref_logits, Tensor tokens, Tensor? temperature, "
            "float temperature_value, int ignore_index) -> (Tensor logprob, Tensor ref_logprob, "
            "Tensor kl, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor ref_row_max, "
            "Tensor ref_log_sum)",
            _forward_fake,
        ),
        "logprob_kl_bwd": (
            "(Tensor? grad_logprob, Tensor? grad_kl, Tensor? grad_entropy, Tensor logits, "
            "Tensor ref_logits, Tensor tokens, Tensor? temperature, float temperature_value, "
            "int ignore_index, Tensor kl, Tensor entropy, Tensor row_max, Tensor log_sum, "
            "Tensor ref_row_max, Tensor ref_log_sum) -> Tensor",
            _backward_fake,
        ),
    },
)


class _LogprobKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, logits, ref_logits, tokens, temperature, *scalars):
        ctx.ops, ctx.scalars = _backend.operators[backend], scalars
        out = ctx.ops.logprob_kl_fwd(logits, ref_logits, tokens, temperature, *scalars)
        logprob, ref_logprob, kl, entropy, *saved = out
        ctx.save_for_backward(logits, ref_logits, tokens, temperature, kl, entropy, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ref_logprob)
        return logprob, ref_logprob, kl, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob, grad_ref_logprob, grad_kl, grad_entropy):
        if grad_logprob is None and grad_kl is None and grad_entropy is None:
            return (None,) * 7
        logits, ref_logits, tokens, temperature, *saved = ctx.saved_tensors
        grad = ctx.ops.logprob_kl_bwd(
            *(grad_logprob, grad_kl, grad_entropy, logits, ref_logits, tokens, temperature),
            *(*ctx.scalars, *saved),
        )
        return None, grad, None, None, None, None, None


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, vocab: int, *rows: int, **extra: Any) -> Sample:
        logits = make.randn(*rows, vocab, scale=2.0)
        inputs = {"logits": logits, "ref_logits": make.randn(*rows, vocab, scale=2.0)}
        return Sample({**inputs, "tokens": make.integers(vocab, *rows), **extra}, why)

    yield case("two rows of one short vector", 5, 2)
    yield case("668: not a multiple of any tile", 668, 3, 5)
    yield case("8200: several blocks, with a rest; temperature", 8200, 3, temperature=1.7)
    yield case("no rows", 33, 0)
    ignored = make.integers(257, 6)
    ignored[::2] = -100
    yield case("ignored positions", 257, 6, tokens=ignored)
    near = make.randn(4, 300, scale=2.0)
    yield case(
        "p close to q", 300, 4, logits=near, ref_logits=near + make.randn(4, 300, scale=0.01)
    )
    banned = make.randn(3, 4200)
    banned[:, :2100] = -torch.inf  # the whole first block
    tokens = make.tensor([4199, 2100, 3000], torch.int64)
    yield case("p = 0 on a whole block", 4200, 3, logits=banned, tokens=tokens)
    yield case("p = q = 0", 4200, 3, logits=banned, ref_logits=banned.flip(0), tokens=tokens)
    strided = make.randn(4, 7, 40)[:, :-1, 3:]
    yield case("rows are strided slices", 37, 4, 6, logits=strided)
    rising = torch.arange(6300, device=strided.device).to(strided.dtype).expand(2, -1) / 16
    yield case("maxima that grow from block to block", 6300, 2, logits=rising)


def _bench(make: Maker) -> Iterator[Sample]:
    inputs = {"logits": make.randn(512, 50304), "ref_logits": make.randn(512, 50304)}
    yield Sample({**inputs, "tokens": make.integers(50304, 512)}, "512 x 50304")


def _bytes(inputs: Inputs) -> int:
    return inputs["logits"].numel() * inputs["logits"].element_size()


SPEC = OpSpec(
    name="logprob_kl",
    function=logprob_kl,
    samples=_samples,
    bench=_bench,
    differentiable=("logits",),
    bytes_forward=lambda inputs: 2 * _bytes(inputs),  # read N*V of policy and reference
    bytes_backward=lambda inputs: 5 * _bytes(inputs),  # read both twice, write N*V
)
