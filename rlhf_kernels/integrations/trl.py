"""TRL's log-probabilities and entropies on the kernels of this library; TRL 1.10 to 1.16.

    import rlhf_kernels.integrations.trl
    rlhf_kernels.integrations.trl.patch()

before or after ``import trl``: every trainer computes what it did, up to rounding. Replaced, in the
modules that define them and in those that import them by name:

- ``_ChunkedLogProbFunction`` of ``trl.trainer.utils``, the fused head of SFT, DPO, KTO, GRPO and
  RLOO since TRL 1.15; in 1.14 of DPO, KTO and GRPO with ``use_liger_kernel``, and before of
  AsyncGRPO alone. TRL 1.15 has it for GPUs only: with the patch it runs on CPUs too. All five
  outputs come from one sweep over chunks of tokens. With 16 bits the target's logit is float32. Its
  chunks follow this library's budget of memory, not ``chunk_size``. TRL passes all positions on the
  CPU, with labels it has clamped, and zeroes the masked ones afterwards: the forward cannot leave
  those out, the backward does. Under autocast the weight is converted as a whole, once forward and
  once backward; TRL converts a part at a time, and before 1.14 none.
- ``selective_log_softmax``, ``entropy_from_logits`` and ``selective_log_softmax_and_entropy`` of
  ``trl.trainer.utils``: one read of the logits instead of one or several for each, and no copy of
  them for a temperature. Since TRL 1.14 on the CPU alone: on GPUs it has Triton kernels of its own.
  Logits of 16 bits on the CPU are TRL's unless ``strict=False``: there torch's log_softmax rounds
  more than once, ours once, and TRL's tests ask for torch's bits.

Where a logit is -inf TRL's entropy, and its gradient, is NaN. So it is with ``patch()``; with
``patch(strict=False)`` it is the entropy, a banned token adding 0. The head looks for -inf in the
bias only, scaled and divided by the temperature: not for finite weights whose products overflow.

What our operators do not serve TRL computes: other dtypes, DTensors and other subclasses of
tensors, transforms of torch.func, a temperature that is a tensor or not positive, shapes that
broadcast, and on the CPU tokens outside of the vocabulary and, if strict, calls whose
log-probabilities are not all finite. On a GPU to look for such tokens would wait for the device:
the head gives NaN there, where TRL has minus log Z. Under torch.compile nothing is looked at; such
a token raises IndexError on the CPU, and the head breaks the graph under autocast and where it is
asked for statistics (as by SFT). Nothing of ours can be differentiated twice.

Left alone, see ``report()``: losses, which TRL has in its trainers' methods and not in functions;
the masked mean and whitening of PPO, where nothing is won; Triton kernels.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionMeta

from rlhf_kernels import checks, full_weight, token_logprob
from rlhf_kernels.autograd import not_compiled, once_differentiable
from rlhf_kernels.backend import select
from rlhf_kernels.integrations import patching
from rlhf_kernels.integrations.patching import Host, Replacement
from rlhf_kernels.integrations.serving import has_kernels, in_torch_func
from rlhf_kernels.linear_chunks import LOW, NOTHING_IGNORED, Rows
from rlhf_kernels.linear_logprob import backward_sweep, forward_sweep

IGNORED = -100  # no token is negative where ours are called
LOOKED_AT = {"cpu": 1 << 21, "cuda": 1 << 25}  # logits whose statistics are made at a time


def _can_look(x: Tensor) -> bool:
    """Its values are here: to look at them waits for no device, and no graph is being made."""
    compiling = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
    return x.device.type == "cpu" and not compiling


def _plain(*tensors: Any) -> bool:
    """Tensors that kernels can read: no DTensor, nothing that torch.func's transforms wrap."""
    if in_torch_func():
        return False
    kinds = (Tensor, nn.Parameter, FakeTensor)
    return all(type(x) in kinds for x in tensors)


def _positive(x: Any) -> bool:
    """An ordinary number that our operators take as a temperature, a scale or a cap."""
    limits = torch.finfo(torch.float32)
    return isinstance(x, (int, float)) and limits.tiny <= x <= limits.max


# ---- the fused head -----------------------------------------------------------------------------


class _Statistics:
    """What TRL wants to know of the logits beside log-prob and entropy, chunk by chunk.

    Args:
        names: of the outputs, as TRL has them.
        hidden: (N, H).
    """

    KINDS = ("log_sum_sq_probs", "mean_logits", "is_top1")

    def __init__(self, names: Sequence[str], hidden: Tensor):
        self.outputs = {
            name: hidden.new_empty(
                hidden.shape[0], dtype=torch.bool if name == "is_top1" else torch.float32
            )
            for name in self.KINDS
            if name in names
        }

    def __call__(self, part: slice, z: Tensor, tokens: Tensor, rows: Rows, scaling: Any) -> None:
        step = max(LOOKED_AT.get(z.device.type, LOOKED_AT["cuda"]) // z.shape[1], 1)
        for begin in range(0, z.shape[0], step):
            some = slice(begin, begin + step)
            few = Rows(*(x[some] if x.numel() else x for x in rows))
            for name, output in self.outputs.items():
                statistic = getattr(self, name)
                output[part][some] = statistic(z[some], tokens[some], few, scaling[1])

    @staticmethod
    def log_sum_sq_probs(z: Tensor, tokens: Tensor, rows: Rows, temperature: float) -> Tensor:
        """log sum_v p_v^2, from the row's maximum: the largest term is 1."""
        squares = z.to(rows.row_max.dtype).sub(rows.row_max.unsqueeze(-1))
        squares = squares.mul_(2 / temperature).exp_()
        return squares.sum(-1).log() - 2 * rows.log_sum

    @staticmethod
    def mean_logits(z: Tensor, tokens: Tensor, rows: Rows, temperature: float) -> Tensor:
        return z.sum(-1, dtype=rows.row_max.dtype) / (temperature * z.shape[1])

    @staticmethod
    def is_top1(z: Tensor, tokens: Tensor, rows: Rows, temperature: float) -> Tensor:
        """Of several largest the first one counts; -inf and NaN never do."""
        target = z.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return (z.argmax(-1) == tokens) & (target > -torch.inf)


class _Head(torch.autograd.Function):
    """logprob, entropy (empty unless asked for), and ``statistics.outputs``, all float32 or bool.

    Products in ``dtype``, gradients in the dtypes of the inputs. ``old``: as up to TRL 1.12, whose
    entropy passes no gradient on.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden, weight, bias, tokens, scaling, dtype, with_entropy, statistics, old
    ):
        ctx.backend = select("linear_logprob", hidden.device.type, None, dtype, weight.shape[0])
        ctx.options = (None, *scaling)
        ctx.dtype, ctx.old = dtype, old
        args = (*_cast(dtype, hidden, weight, bias), tokens, *ctx.options)
        args += (NOTHING_IGNORED, None, with_entropy, ctx.backend)
        if statistics is None:
            results = torch.ops.rlhf_kernels.linear_logprob_fwd.default(*args)
            more: tuple[Tensor, ...] = ()
        else:
            results = forward_sweep(*args, None, statistics)
            more = tuple(statistics.outputs.values())
        logprob, entropy, row_max, log_sum = results
        ctx.save_for_backward(hidden, weight, bias, tokens, entropy, row_max, log_sum)
        ctx.set_materialize_grads(old)
        ctx.mark_non_differentiable(*more)
        return logprob.float(), entropy.float(), *more

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob, grad_entropy, *_):
        hidden, weight, bias, tokens, entropy, row_max, log_sum = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grads = [grad_logprob, None if ctx.old or entropy.numel() == 0 else grad_entropy]
        upstream = [g for g in grads if g is not None]
        if not upstream:
            return (None,) * 9
        ignored = NOTHING_IGNORED
        if tokens.device.type == "cpu":  # elsewhere to look for them would wait for the device
            unused = torch.stack([g == 0 for g in upstream]).all(0)
            tokens, ignored = tokens.masked_fill(unused, IGNORED), IGNORED
        args = (
            *_cast(row_max.dtype, *grads),
            *_cast(ctx.dtype, hidden, weight, bias),
            *(tokens, *ctx.options, ignored, None, entropy, row_max, log_sum),
            *(need_hidden, need_weight, need_bias, ctx.backend),
        )
        dtypes = (hidden.dtype, weight.dtype)
        if dtypes == (ctx.dtype, ctx.dtype):
            results = torch.ops.rlhf_kernels.linear_logprob_bwd.default(*args)
        else:
            results = backward_sweep(*args, None, dtypes)
        grad_hidden, grad_weight, grad_bias = results
        return (
            grad_hidden if need_hidden else None,
            grad_weight if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            *(None,) * 6,
        )


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x in tensors]


_head_not_compiled = not_compiled(_Head.apply)


def _serves_head(hidden: Any, weight: Any, bias: Any, tokens: Any, numbers: Sequence[Any]) -> bool:
    floating = [hidden, weight] if bias is None else [hidden, weight, bias]
    if not _plain(*floating, tokens):
        return False
    if any(x.dtype not in checks.DTYPES or x.device != tokens.device for x in floating):
        return False
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        return False
    if tokens.shape != hidden.shape[:1] or tokens.dtype != torch.int64 or weight.shape[0] < 1:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    if not all(map(_positive, numbers)) or not has_kernels("linear_logprob", hidden.device.type):
        return False
    return not _can_look(tokens) or not bool(((tokens < 0) | (tokens >= weight.shape[0])).any())


class _InPlaceOf(FunctionMeta):
    """Kind of a class that stands in the place of its base: what is a subclass of the one is one
    of the other. To torch.compile it is no autograd function: it traces our ``apply``."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]):
        super().__init__(name, bases, namespace)
        if any(isinstance(base, _InPlaceOf) for base in bases):  # somebody's own, as if of the base
            cls.__class__ = FunctionMeta  # type: ignore[assignment]

    def __subclasscheck__(cls, other: type) -> bool:
        base: Any = cls.__base__
        return issubclass(other, base)


def _applied(original: Any, apply: Callable[..., Any]) -> Any:
    """A subclass of an autograd function that differs in its ``apply``; its own subclasses, which
    may have another ``forward``, do not."""

    def applied(cls, *args, **kwargs):
        return apply(*args, **kwargs) if cls is ours else super(ours, cls).apply(*args, **kwargs)

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    functools.update_wrapper(applied, original.apply)
    ours: Any = _InPlaceOf(original.__name__, (original,), names | {"apply": classmethod(applied)})
    return ours


def _head(original: Any, strict: bool) -> Any:
    takes = inspect.signature(original.forward).parameters
    old = "bias" not in takes  # up to 1.12
    casts = "get_autocast_dtype" in original.forward.__code__.co_names  # since 1.14

    def scored(hidden, weight, bias, tokens, temperature, chunk_size, softcap, scale, outputs):
        """The five outputs of 1.16, or None: the original is to be called."""
        numbers = (temperature, chunk_size, scale, 1.0 if softcap is None else softcap)
        if not _serves_head(hidden, weight, bias, tokens, numbers):
            return None
        device, dtype = hidden.device.type, hidden.dtype
        if casts and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # TRL gathers what ZeRO-3 has partitioned around this call: for the backward it is held.
        weight, bias = (full_weight(x) if hasattr(x, "ds_id") else x for x in (weight, bias))
        scaling = (float(temperature), float(scale), float(softcap or 0.0))
        statistics = None
        if any(name in outputs for name in _Statistics.KINDS):
            statistics = _Statistics(outputs, hidden)
        plain = statistics is None and dtype == hidden.dtype == weight.dtype
        apply = _Head.apply if plain else _head_not_compiled
        with_entropy = "entropy" in outputs
        args = (hidden, weight, bias, tokens, scaling, dtype, with_entropy, statistics, old)
        logprob, entropy, *more = apply(*args)
        if strict and _can_look(logprob) and not bool(logprob.isfinite().all()):
            return None
        if strict and with_entropy and bias is not None and softcap is None:
            banned = (bias.detach().to(dtype) * (scaling[1] / scaling[0])).isneginf().any()
            entropy = entropy * torch.where(banned, math.nan, 1.0)
        found = {} if statistics is None else dict(zip(statistics.outputs, more, strict=True))
        return (logprob, entropy if with_entropy else None, *map(found.get, _Statistics.KINDS))

    def apply_old(
        last_hidden,
        weight,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
    ):
        rest = (temperature, chunk_size, final_logit_softcapping, logit_scale)
        results = scored(last_hidden, weight, None, targets, *rest, ("entropy",))
        if results is None:
            return original.apply(last_hidden, weight, targets, *rest)
        return results[:2]

    def apply_without_statistics(
        last_hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
    ):
        rest = (temperature, chunk_size, final_logit_softcapping, logit_scale)
        results = scored(last_hidden, weight, bias, targets, *rest, ("entropy",))
        if results is None:
            return original.apply(last_hidden, weight, bias, targets, *rest)
        return results[:2]

    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", *_Statistics.KINDS),
    ):
        rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
        args: tuple[Any, ...] = (hidden, weight, bias, targets, *rest)
        results = scored(*args)
        return original.apply(*args) if results is None else results

    if "outputs" in takes:
        return _applied(original, apply)
    return _applied(original, apply_old if old else apply_without_statistics)


# ---- functions of the logits --------------------------------------------------------------------


def _has_kernels(original: Callable[..., Any]) -> bool:
    """TRL has Triton kernels for GPUs since 1.14, which its module names."""
    return "_supports_trl_loss_kernel" in original.__globals__


def _serves_logits(logits: Any, own_kernels: bool, strict: bool, least_dim: int = 2) -> bool:
    if not _plain(logits) or logits.dtype not in checks.DTYPES:
        return False
    if logits.device.type == "cpu":  # TRL's own tests want the very bits of torch's log_softmax
        served = not strict or logits.dtype not in LOW
    else:
        served = not own_kernels
    return (
        served
        and logits.dim() >= least_dim
        and logits.shape[-1] > 0
        and (logits.stride(-1) == 1 or logits.shape[-1] == 1)
        and has_kernels("token_logprob", logits.device.type)
    )


def _serves_index(logits: Tensor, index: Any, temperature: Any, row_mask: Any) -> bool:
    if not _positive(temperature) or logits.shape[0] < 1 or not _plain(index):
        return False
    many = index.dim() == logits.dim() and index.shape[-1] > 0
    shape = index.shape[:-1] if many else index.shape
    if shape != logits.shape[:-1] or index.dtype not in (torch.int32, torch.int64):
        return False
    masked = isinstance(row_mask, Tensor) and row_mask.shape == index.shape
    return index.device == logits.device and (row_mask is None or masked)


def _result_dtype(logits: Tensor) -> torch.dtype:
    """log_softmax is among what autocast computes in float32, on CUDA."""
    if logits.dtype in LOW and logits.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return logits.dtype


def _score(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    with_entropy: bool,
    strict: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """log-prob and entropy in the host's dtype, or None: the host is to be asked."""
    tokens, ignored = index.long(), NOTHING_IGNORED
    if row_mask is not None and not strict:  # not even read; TRL lets a NaN there reach gradients
        tokens, ignored = tokens.masked_fill(row_mask == 0, IGNORED), IGNORED
        if _can_look(index) and bool((index == IGNORED).any()):
            return None
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignored}
    if with_entropy:
        options["with_entropy"] = True
    try:
        out: Any = token_logprob(logits, tokens, **options)
    except IndexError:  # a token outside of the vocabulary
        return None
    logprob: Tensor = out.logprob if with_entropy else out
    entropy: Tensor | None = out.entropy if with_entropy else None
    if strict and _can_look(logprob) and not bool(logprob.isfinite().all()):
        return None
    if strict and entropy is not None:
        entropy = _nan_where_banned(entropy, logits, temperature)
        if entropy is None:
            return None

    def finished(x: Tensor) -> Tensor:  # a copy: the backward reads the entropy
        x = x.to(_result_dtype(logits), copy=True)
        return x if row_mask is None else x.masked_fill(row_mask == 0, 0.0)

    return finished(logprob), None if entropy is None else finished(entropy)


def _nan_where_banned(entropy: Tensor, logits: Tensor, temperature: float) -> Tensor | None:
    """NaN in rows with a logit of -inf; None: there is one, and the host can be asked instead.

    What is -inf after TRL's division by the temperature counts.
    """
    banned = (logits.detach().amin(-1) / temperature).isneginf()
    if _can_look(banned):
        return None if bool(banned.any()) else entropy
    return entropy * torch.where(banned, math.nan, 1.0)


def _selective_log_softmax(original: Callable[..., Tensor], strict: bool) -> Callable[..., Tensor]:
    own_kernels = _has_kernels(original)

    def score(logits: Any, index: Any, temperature: Any, row_mask: Any) -> Tensor | None:
        if not _serves_logits(logits, own_kernels, strict):
            return None
        if not _serves_index(logits, index, temperature, row_mask):
            return None
        result = _score(logits, index, temperature, row_mask, False, strict)
        return None if result is None else result[0]

    if "temperature" not in inspect.signature(original).parameters:  # up to 1.13

        @functools.wraps(original)
        def old(logits, index):
            logprob = score(logits, index, 1.0, None)
            return original(logits, index) if logprob is None else logprob

        return old

    @functools.wraps(original)
    def ours(logits, index, temperature=1.0, row_mask=None):
        logprob = score(logits, index, temperature, row_mask)
        return original(logits, index, temperature, row_mask) if logprob is None else logprob

    return ours


def _entropy_from_logits(original: Callable[..., Tensor], strict: bool) -> Callable[..., Tensor]:
    own_kernels = _has_kernels(original)

    @functools.wraps(original)
    def ours(logits, chunk_size=128):
        if not _positive(chunk_size) or not _serves_logits(logits, own_kernels, strict, 1):
            return original(logits, chunk_size)
        rows = logits.unsqueeze(0) if logits.dim() == 1 else logits
        tokens = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=rows.device)
        entropy = token_logprob(rows, tokens, with_entropy=True).entropy
        checked = _nan_where_banned(entropy, rows, 1.0) if strict else entropy
        if checked is None:
            return original(logits, chunk_size)
        # A copy, which may be written to: the backward reads the entropy.
        return checked.to(_result_dtype(logits), copy=True).view(logits.shape[:-1])

    return ours


def _selective_log_softmax_and_entropy(
    original: Callable[..., Any], strict: bool
) -> Callable[..., Any]:
    own_kernels = _has_kernels(original)

    @functools.wraps(original)
    def ours(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        results = None
        if (
            _serves_logits(logits, own_kernels, strict)
            and _serves_index(logits, index, temperature, row_mask)
            and (row_mask is None or index.dim() < logits.dim())
        ):
            results = _score(logits, index, temperature, row_mask, True, strict)
        if results is None:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        logprob, entropy = results
        return logprob, entropy if entropy_requires_grad or entropy is None else entropy.detach()

    return ours


# ---- small calls, on which an unknown version has to agree ---------------------------------------


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _head_calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    hidden, weight, bias = _random(5, 8), _random(11, 8, seed=1), _random(11, seed=2)
    for variable in (hidden, weight, bias):
        variable.requires_grad_()
    targets = torch.tensor([0, 3, 10, 5, 5])
    everything = ("entropy", *_Statistics.KINDS)
    for number in (1.0, 0.7):
        cap, scale = (None, 1.0) if number == 1 else (2.0, 0.5)
        yield (hidden, weight, bias, targets, number, 4, cap, scale, everything), {}
        yield (hidden, weight, None, targets, number, 32768, cap, scale, ("log_probs",)), {}
        yield (hidden[:0], weight, bias, targets[:0], number, 4, cap, scale, everything), {}
    # Numbers that bfloat16 rounds, to such as make whole logits: whether autocast does shows.
    hidden = (3 * hidden.detach()).round() * (1 + 2**-9)
    weight = (3 * weight.detach()).round()
    with torch.autocast("cpu", torch.bfloat16):
        yield (hidden, weight, None, targets, 1.0, 4, None, 1.0, everything), {}


def _plain_head_calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    yield from ((args[:-1], {}) for args, _ in _head_calls())


def _old_head_calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for (hidden, weight, bias, *rest, _outputs), _ in _head_calls():
        if bias is None or len(hidden):
            yield (hidden, weight, *rest), {}


def _score_calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    logits, index = _random(2, 3, 7), torch.tensor([[0, 6, 3], [2, 2, 5]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    for dtype in (torch.float32, torch.float64):
        variable = logits.to(dtype).requires_grad_()
        yield (variable, index), {}
        yield (variable, index), {"temperature": 0.7, "row_mask": mask}


def _old_score_calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    yield from ((args, {}) for args, options in _score_calls() if not options)


def _entropy_calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    logits = _random(2, 3, 7).requires_grad_()
    yield (logits,), {}
    yield (logits.double(), 2), {}
    yield (logits[0, 0],), {}


_HEAD = (
    "(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
    "logit_scale=1.0, outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))"
)
_HEAD_PLAIN = (
    "(ctx, last_hidden, weight, bias, targets, temperature, chunk_size, "
    "final_logit_softcapping=None, logit_scale=1.0)"
)
_HEAD_OLD = _HEAD_PLAIN.replace("bias, ", "")
_UTILS = "trl.trainer.utils"
_PPO = "trl.experimental.ppo.ppo_trainer"
_WHERE = (
    "not 16 bits on the CPU, unless strict=False, nor what TRL gives its Triton kernels on GPUs"
)
_INLINE = "there is no function to replace"
_host = patching.add(
    Host(
        "trl",
        [(1, 12, 0), (1, 15, 0), (1, 16, 0)],
        [
            Replacement(
                f"{_UTILS}:_ChunkedLogProbFunction",
                *(_HEAD, _head, _head_calls),
                "log-probs, entropy and statistics of the logits, from the hidden states",
                {_HEAD_PLAIN: _plain_head_calls, _HEAD_OLD: _old_head_calls},
            ),
            Replacement(
                f"{_UTILS}:selective_log_softmax",
                "(logits, index, temperature=1.0, row_mask=None)",
                *(_selective_log_softmax, _score_calls),
                f"log-probs of given tokens; {_WHERE}",
                {"(logits, index)": _old_score_calls},
            ),
            Replacement(
                f"{_UTILS}:entropy_from_logits",
                "(logits, chunk_size=128)",
                *(_entropy_from_logits, _entropy_calls),
                f"entropies; {_WHERE}",
            ),
            Replacement(
                f"{_UTILS}:selective_log_softmax_and_entropy",
                "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
                *(_selective_log_softmax_and_entropy, _score_calls),
                f"both, in one read of the logits; {_WHERE}",
            ),
        ],
        {
            "trl.trainer.reward_trainer:RewardTrainer.compute_loss": (
                f"the pair loss is part of it: {_INLINE}"
            ),
            "trl.trainer.sft_trainer:_chunked_cross_entropy_loss": (
                "TRL up to 1.14: SFT's loss and its statistics in one function, which makes no "
                "log-probs; since 1.15 SFT has the fused head"
            ),
            f"{_PPO}:PPOTrainer.train": (
                f"TRL up to 1.12: GAE and the losses are parts of it: {_INLINE}"
            ),
            f"{_PPO}:masked_mean": (
                "TRL up to 1.12: 0.07 ms for 64 x 1024 on a CPU; ours takes 0.03, but 0.10 with "
                "the NaN that TRL gives where nothing is valid or a masked value is NaN"
            ),
            f"{_PPO}:masked_whiten": (
                "TRL up to 1.12: 0.27 ms for 64 x 1024 on a CPU, once a batch; ours takes 0.21 "
                "with that NaN and what TRL leaves in masked places"
            ),
            f"{_PPO}:masked_var": "TRL up to 1.12: only masked_whiten calls it",
            "trl.kernels.logprob_entropy:selective_log_softmax_and_entropy": (
                "one read of the logits by Triton on GPUs, as ours; not compared there yet"
            ),
            "trl.kernels.chunked_divergence:ChunkedDivergenceFunction": (
                "divergences between two models' tokens: there is no operator of ours"
            ),
        },
    )
)
patch, unpatch, patched = _host.patch, _host.unpatch, _host.patched
report, survey, check = _host.report, _host.survey, _host.check
__all__ = ["check", "patch", "patched", "report", "survey", "unpatch"]
