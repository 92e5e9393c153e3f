"""token_logprob of hidden states and the head's weight: the logits never exist in full.

Forward: one matrix product, chunk by chunk. Backward: the chunk's logits again, their gradient in
their place, and two products. For losses of single tokens ``linear_token_loss`` saves one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks, linear_chunks, linear_parallel
from rlhf_kernels.autograd import not_compiled, once_differentiable
from rlhf_kernels.linear_chunks import Head, Rows, take
from rlhf_kernels.linear_parallel import Shard
from rlhf_kernels.opspec import Maker, OpSpec, Sample
from rlhf_kernels.token_logprob import TokenLogprob, token_logprob_reference

# Called as watch(part, z, tokens, rows, scaling): the chunk's place among the scored positions, its
# logits (see Sweep.logits and Sweep.scaling), their tokens and statistics. z is valid in the call.
Watch = Callable[[slice, Tensor, Tensor, Rows, tuple[Tensor | None, float, int]], None]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    with_entropy: bool = False,
    process_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    fast: bool = False,
    backend: str | None = None,
) -> Tensor | TokenLogprob:
    """``token_logprob`` of the logits that a language model's head makes of its hidden states.

        logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature

    Memory: one chunk of logits, forward and backward (by default within 128 MiB on the CPU and 1.25
    GiB on CUDA, beside the returned gradients and, for 16 bits in several chunks, the float32 sum
    of the weight's); the backward makes each chunk again, which costs a fourth matrix product. With
    inputs of 16 bits the logits have 16 bits as well, but the target's logit, and its share of the
    normaliser, are float32; on CPUs without products of 16 bits all of it is. Deterministic; as a
    library's matrix product may depend on how many rows it has, another batch may change the last
    bits.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or fp64; differentiable.
        weight: (V, H) in the dtype of ``hidden`` (under autocast both are converted);
            differentiable. No gradient is computed for what does not require one. A DTensor (FSDP2)
            or a parameter of ZeRO-3 is gathered: see ``full_weight``.
        tokens: (...) int64, or (..., K): K tokens scored per position.
        bias: (V,), differentiable; None: no bias.
        temperature: number > 0, or a tensor broadcastable to ``tokens.shape``. No gradient.
        logit_scale: number > 0 (Cohere's ``logit_scale``; Granite's is 1 / ``logits_scaling``).
        softcap: number > 0 (Gemma 2's ``final_logit_softcapping``); None: none.
        ignore_index: positions with this token give 0 and no gradient, and reach no matrix product.
            To find them waits for the device on CUDA; while a CUDA graph is captured they are
            computed, and then left out.
        with_entropy: return the entropy too; it does not change a bit of the log-probability.
        process_group: vocabulary parallel: ``weight`` and ``bias`` are this rank's rows, in the
            order of the ranks (shards may differ in size), ``tokens`` ids of the whole vocabulary.
            Everything but weight and bias is to be the same on all ranks, and so are the results.
            Each rank has to run the backward of the same loss: the gradient of hidden is summed
            over the ranks, those of weight and bias are of this rank's rows. The shards' sizes are
            exchanged once a call, which waits for the device; no CUDA graph can hold it, and
            torch.compile breaks its graph here. Not for backend="reference".
        chunk_tokens: tokens whose logits exist at a time; None: what the memory above has room for.
        fast: let a Triton kernel that multiplies and sums up at once serve where no gradient is
            needed, on CUDA tensors of at most 32 bits. Its logits are float32, none is stored
            (``chunk_tokens`` does nothing), and other tokens of the batch change no bit; but its
            bits are not those of the calls that have a gradient, so it must not make the old
            log-probs of a ratio that should be exactly 1. The ordinary path runs, as without it:
            with gradients or process_group; for float64, or a weight whose rows are not dense; and
            where a backend other than triton is asked for, here or in the environment.
        backend: of the row kernels: reference | cpu | triton | cuda; None chooses (see
            rlhf_kernels.backend). With reference all logits exist.

    Returns:
        logprob in the shape of ``tokens``, or ``TokenLogprob(logprob, entropy)``, entropy (...);
        float32 (float64 for float64 inputs), both differentiable.

    Raises:
        IndexError: a token outside [0, V) that is not ``ignore_index`` (CPU tensors; on CUDA as in
            ``token_logprob``).
        ValueError, TypeError: arguments that do not fit, before anything is computed.
    """
    rows, flat, head = linear_chunks.check(
        hidden,
        weight,
        tokens,
        bias,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        chunk_tokens,
    )
    shard = linear_parallel.shard_of(
        process_group, hidden, head.weight, tokens, chunk_tokens, with_entropy
    )
    linear_chunks.check_tokens(tokens, ignore_index, shard.vocab if shard else head.weight.shape[0])
    chosen = _backend.select(
        "linear_logprob", hidden.device.type, backend, rows.dtype, head.weight.shape[0]
    )
    linear_parallel.check_backend(chosen, shard)
    if chosen == "reference":
        scale = head.temperature_value if head.temperature is None else head.temperature
        z = linear_chunks.logits_reference(rows, head, flat)
        logprob, entropy = token_logprob_reference(z, flat, scale, ignore_index)
    elif fast and shard is None and _fast_serves(rows, head, chosen, backend):
        logprob, entropy = _backend.operators["triton"].linear_logprob_fast(
            rows, head.weight, head.bias, flat, *head[2:], with_entropy
        )
    else:
        apply = _LinearLogprob.apply if shard is None else _apply_sharded
        scaling, numbers = checks.separated(*head[3:6])
        logprob, entropy = apply(
            *(chosen, shard, numbers, rows, head.weight, head.bias, flat, head.temperature),
            *(*scaling, ignore_index, chunk_tokens, with_entropy),
        )
    logprob = logprob.view(tokens.shape)
    if not with_entropy:
        return logprob
    return TokenLogprob(logprob, entropy.view(hidden.shape[:-1]))


def _fast_serves(rows: Tensor, head: Head, chosen: str, asked: str | None) -> bool:
    """Whether the kernel without gradients may run; a recorded row kernel does not stand for it."""
    leaves = (rows, head.weight, head.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return False
    if rows.dtype == torch.float64 or (rows.shape[1] > 1 and head.weight.stride(1) != 1):
        return False
    if chosen == "triton":
        return True
    free = rows.is_cuda and _backend.requested(asked) is None
    return free and _backend.why_not("linear_logprob", "triton") is None


@linear_chunks.without_autocast
def forward_sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    chunk_tokens: int | None,
    with_entropy: bool,
    backend: str,
    shard: Shard | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, and what the backward needs: row_max and log_sum; the entropy is empty
    unless asked for. ``watch`` sees each chunk of logits."""
    index = linear_chunks.used_tokens(tokens, ignore_index)
    h, some = take(hidden, index), take(tokens, index)
    scaling = (temperature_value, logit_scale, softcap, ignore_index)
    head = Head(weight, bias, take(temperature, index), *scaling)
    largest = None if shard is None else shard.largest
    size = linear_chunks.tokens_of_chunk(h, head, chunk_tokens, largest, index is not None)
    sweep = linear_parallel.make_sweep(h, head, backend, size, shard)
    full = _empty_results(hidden, tokens, with_entropy)
    results = full if index is None else _empty_results(h, some, with_entropy)
    for part in linear_chunks.chunks(h.shape[0], size):
        z = sweep.logits(part)
        rows = sweep.rows(part, z, some[part], with_entropy)
        rows = rows._replace(logprob=sweep.refined(part, some[part], rows))
        if watch is not None:
            watch(part, z, some[part], rows, sweep.scaling(part))
        for to, x in zip(results, rows, strict=True):
            if to.numel():
                to[part] = x
    if index is not None:
        for to, x in zip(full, results, strict=True):
            if to.numel():
                to.zero_().index_copy_(0, index, x)
    return full


def _empty_results(hidden: Tensor, tokens: Tensor, with_entropy: bool) -> Rows:
    dtype, n = checks.accumulation_dtype(hidden), hidden.shape[:1]
    shapes = (tokens.shape, n if with_entropy else (0,), n, n)
    return Rows(*(hidden.new_empty(shape, dtype=dtype) for shape in shapes))


@linear_chunks.without_autocast
def backward_sweep(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    chunk_tokens: int | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    shard: Shard | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, empty where not needed; ``dtypes``: of hidden's and
    of the others, when not those of the tensors."""
    if entropy.numel() == 0:  # not asked for: torch.compile hands over its empty gradient
        grad_entropy = None
    index = linear_chunks.used_tokens(tokens, ignore_index)
    h, some = take(hidden, index), take(tokens, index)
    grads = (take(grad_logprob, index), take(grad_entropy, index))
    statistics = [x if x.numel() == 0 else take(x, index) for x in (entropy, row_max, log_sum)]
    scaling = (temperature_value, logit_scale, softcap, ignore_index)
    head = Head(weight, bias, take(temperature, index), *scaling)
    largest = None if shard is None else shard.largest
    size = linear_chunks.tokens_of_chunk(h, head, chunk_tokens, largest, index is not None)
    sweep = linear_parallel.make_sweep(h, head, backend, size, shard, dtypes)
    grad_hidden = sweep.new_gradient() if need_hidden else None
    for part in linear_chunks.chunks(h.shape[0], size):
        z = sweep.logits(part)
        h_part, max_part, sum_part = (x[part] if x.numel() else x for x in statistics)
        g, g_entropy = (None if x is None else x[part] for x in grads)
        rows = Rows(z, h_part, max_part, sum_part)
        g_logits = sweep.gradient(part, z, some[part], rows, g, g_entropy)
        sweep.add_products(part, g_logits, None, grad_hidden, need_weight, need_bias)
    if grad_hidden is not None:
        grad_hidden = sweep.hidden_gradient(grad_hidden)
        if index is not None:
            zeros = torch.zeros_like(hidden, dtype=grad_hidden.dtype)
            grad_hidden = zeros.index_copy_(0, index, grad_hidden)
    grad_weight, grad_bias = sweep.weight_gradients()
    return (
        hidden.new_empty(0) if grad_hidden is None else grad_hidden,
        hidden.new_empty(0) if grad_weight is None else grad_weight,
        hidden.new_empty(0) if grad_bias is None else grad_bias,
    )


def _forward_fake(hidden, weight, bias, tokens, *rest):
    return tuple(_empty_results(hidden, tokens, rest[-2]))


def _backward_fake(grad_logprob, grad_entropy, hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-4:-1]
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


# Matrix products of a library and the row kernels of token_logprob, in one opaque operator each.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? temperature, "
    "float temperature_value, float logit_scale, float softcap, int ignore_index, "
    "int? chunk_tokens, "
)
_backend.define_composed(
    "linear_logprob",
    "token_logprob",
    {
        "linear_logprob_fwd": (
            f"({_HEAD}bool with_entropy, str backend) "
            "-> (Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum)",
            forward_sweep,
            _forward_fake,
        ),
        "linear_logprob_bwd": (
            f"(Tensor? grad_logprob, Tensor? grad_entropy, {_HEAD}Tensor entropy, Tensor row_max, "
            "Tensor log_sum, bool need_hidden, bool need_weight, bool need_bias, str backend) "
            "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
            backward_sweep,
            _backward_fake,
        ),
    },
)


def _fast_fake(hidden, weight, bias, tokens, *rest):
    shape = hidden.shape[:1] if rest[-1] else (0,)
    return tuple(hidden.new_empty(x, dtype=torch.float32) for x in (tokens.shape, shape))


_backend.define_triton(
    "linear_logprob",
    {
        "linear_logprob_fast": (
            "(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? temperature, "
            "float temperature_value, float logit_scale, float softcap, int ignore_index, "
            "bool with_entropy) -> (Tensor logprob, Tensor entropy)",
            _fast_fake,
        ),
    },
)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend, shard, numbers, hidden, weight, bias, tokens, temperature, *options
    ):
        *scaling, chunk_tokens, with_entropy = options
        args = (hidden, weight, bias, tokens, temperature, *scaling, chunk_tokens)
        args += (with_entropy, backend)
        if shard is None:
            results = _backend.call(backend, "linear_logprob_fwd", numbers, *args)
        else:  # an operator's schema has no process groups
            results = forward_sweep(*args, shard)
        logprob, entropy, *saved = results
        ctx.save_for_backward(numbers, hidden, weight, bias, tokens, temperature, entropy, *saved)
        ctx.options = (*scaling, chunk_tokens)
        ctx.backend, ctx.shard = backend, shard
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob, grad_entropy):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[3:6]
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 14
        numbers, *inputs, entropy, row_max, log_sum = ctx.saved_tensors
        args = (grad_logprob, grad_entropy, *inputs, *ctx.options, entropy, row_max, log_sum)
        args += (need_hidden, need_weight, need_bias, ctx.backend)
        if ctx.shard is None:
            grads = _backend.call(ctx.backend, "linear_logprob_bwd", numbers, *args)
        else:
            grads = backward_sweep(*args, ctx.shard)
        grad_hidden, grad_weight, grad_bias = grads
        return (
            None,
            None,
            None,
            grad_hidden if need_hidden else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 8,
        )


@not_compiled
def _apply_sharded(*args: Any) -> Any:
    return _LinearLogprob.apply(*args)


def samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, vocab: int, *rows: int, **extra: Any) -> Sample:
        hidden, weight = make.randn(*rows, 16), make.randn(vocab, 16, scale=0.7)
        inputs = {"hidden": hidden, "weight": weight, "tokens": make.integers(vocab, *rows)}
        return Sample({**inputs, **extra}, why)

    yield case("two rows", 5, 2)
    yield case("several chunks, the last one smaller", 67, 3, 5, chunk_tokens=4)
    both = {"with_entropy": True, "chunk_tokens": 2}
    yield case("bias, entropy, temperature", 33, 7, temperature=0.7, bias=make.randn(33), **both)
    yield case("softcap", 40, 5, logit_scale=2.0, softcap=3.0, bias=make.randn(40), **both)
    warm = make.uniform(2, 1, low=0.5, high=2.0)
    yield case("scale, one temperature a row", 130, 2, 3, temperature=warm, logit_scale=0.25)
    yield case("K tokens a position", 97, 4, tokens=make.integers(97, 4, 3), chunk_tokens=3)
    ignored = make.integers(257, 6)
    ignored[::2] = -100
    yield case("ignored positions", 257, 6, tokens=ignored, **both)
    yield case("nothing scored", 9, 3, tokens=make.tensor([-100] * 3, torch.int64))
    yield case("no rows", 33, 0, with_entropy=True)
    yield case("without gradients", 100, 19, fast=True, temperature=0.7, bias=make.randn(100))
    several = {"tokens": make.integers(67, 5, 2), "temperature": make.uniform(5, 1, low=0.5)}
    capped = {"softcap": 3.0, "logit_scale": 2.0, "with_entropy": True}
    yield case("the same, several tokens, softcap", 67, 5, fast=True, **several, **capped)
    odd = {"hidden": make.randn(6, 17), "weight": make.randn(257, 17), "tokens": ignored}
    yield case("the same, no width of a wide load", 257, 6, fast=True, **odd)


def _bench(make: Maker) -> Iterator[Sample]:
    hidden, weight = make.randn(1024, 512), make.randn(32000, 512, scale=0.05)
    inputs = {"hidden": hidden, "weight": weight, "tokens": make.integers(32000, 1024)}
    yield Sample(inputs, "1024 x 512 x 32000")


SPEC = OpSpec(
    name="linear_logprob",
    function=linear_logprob,
    samples=samples,
    bench=_bench,
    differentiable=("hidden", "weight", "bias"),
    without_gradients=lambda inputs: inputs.get("fast", False),
    own_matmul=False,
)
