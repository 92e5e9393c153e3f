"""Any loss of single tokens from hidden states: value and gradients in one sweep over chunks.

Three matrix products, against four where the logits are made again for the backward, and one chunk
of logits in memory. The loss is a function of the caller's, differentiated by autograd on vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks, linear_chunks, linear_parallel
from rlhf_kernels.autograd import not_compiled, once_differentiable, wants_gradient
from rlhf_kernels.linear_chunks import ADDED_ROWS, Head, take
from rlhf_kernels.linear_parallel import Shard
from rlhf_kernels.opspec import Maker, OpSpec, Sample
from rlhf_kernels.token_logprob import token_logprob_reference

LossFn = Callable[..., tuple[Tensor, Any]]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    loss_fn: LossFn,
    per_token: Mapping[str, Tensor] | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    with_entropy: bool = False,
    process_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """A loss of the log-probabilities that ``linear_logprob`` gives, additive over tokens.

        def loss_fn(logprob, entropy, old_logprob, advantages):
            return policy_loss(logprob, old_logprob, advantages, normalizer=count)

        loss, stats = linear_token_loss(hidden, weight, tokens, loss_fn,
                                        {"old_logprob": old_logprob, "advantages": advantages})
        loss.backward()

    ``loss_fn`` is called once a chunk, with 1-d tensors of its tokens, and the results are added:
    it has to be a sum over tokens, so a mean needs the number of all tokens (``normalizer`` of
    ``policy_loss``). A loss that looks at whole sequences goes through ``linear_logprob``.

    The gradients are computed here, and held until ``backward`` scales and returns them; so there
    is one backward a call, and no gradient for what else ``loss_fn`` uses (``reference`` has both,
    where hidden, weight or bias requires one). For float16 inputs they
    are held in float32, as the loss scale that keeps them in range comes with the backward; each
    chunk waits for the device there. Under ``no_grad`` only the logits are made. Where ``loss_fn``
    uses no entropy the row is read once: its gradient is written as onehot - p, and the loss's
    coefficients are put on the thin sides of the products.

    With a ``process_group`` ``per_token`` and ``loss_fn`` too are the same on all ranks: each of
    them computes the whole loss and the same statistics, which are not to be added over the group.

    Args:
        hidden, weight, tokens, bias, temperature, logit_scale, softcap, ignore_index,
            process_group, chunk_tokens, backend: as for ``linear_logprob``; tokens (...), one a
            position.
        loss_fn: called as loss_fn(logprob=, entropy=, **chunk of each per_token tensor); returns
            (0-d tensor, statistics). logprob is float32 (float64 for float64 inputs) and requires a
            gradient; entropy is None unless ``with_entropy``. Statistics: None, a dict of what can
            be added with ``+``, or one such thing (``PolicyStats``). Ignored positions may be left
            out; where they are not their logprob is 0 and they have no gradient.
        per_token: name -> tensor in the shape of ``tokens``, a constant.
        with_entropy: hand the entropy to ``loss_fn``, differentiable.

    Returns:
        (loss, statistics), added over the chunks; loss is 0-d and differentiable with respect to
        hidden, weight and bias. Not traced by torch.compile, as it runs the caller's code.

    Raises:
        IndexError, ValueError, TypeError: as ``linear_logprob``; RuntimeError: a second backward.
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
    if flat.dim() != 1:
        raise ValueError(
            f"tokens: expected shape {tuple(hidden.shape[:-1])}, one token a position, got "
            f"{tuple(tokens.shape)}"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
    vectors = _check_per_token(per_token, tokens)
    shard = linear_parallel.shard_of(
        process_group, hidden, head.weight, tokens, chunk_tokens, with_entropy
    )
    linear_chunks.check_tokens(tokens, ignore_index, shard.vocab if shard else head.weight.shape[0])
    chosen = _backend.select(
        "linear_token_loss", hidden.device.type, backend, rows.dtype, head.weight.shape[0]
    )
    linear_parallel.check_backend(chosen, shard)
    if chosen == "reference":
        return linear_token_loss_reference(rows, flat, head, loss_fn, vectors, with_entropy)
    return _run(chosen, rows, flat, head, loss_fn, vectors, with_entropy, chunk_tokens, shard)


def _check_per_token(per_token: Any, tokens: Tensor) -> dict[str, Tensor]:
    if per_token is None:
        return {}
    if not isinstance(per_token, Mapping):
        raise TypeError(f"per_token: expected a dict of tensors, got {type(per_token).__name__}")
    for name, x in per_token.items():
        label = f"per_token[{name!r}]"
        if name in ("logprob", "entropy"):
            raise ValueError(f"{label}: the name is taken by what is computed")
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(x).__name__}")
        checks.same_device(label, x, tokens.device)
        checks.shape(label, x, tokens.shape, "to match tokens")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{label}: expected a constant, got a tensor that requires a gradient")
    return {name: x.reshape(-1) for name, x in per_token.items()}


def _call(
    loss_fn: LossFn, logprob: Tensor, entropy: Tensor | None, vectors: dict[str, Tensor]
) -> tuple[Tensor, Any]:
    result = loss_fn(logprob=logprob, entropy=entropy, **vectors)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise TypeError("loss_fn: expected it to return (loss, statistics)")
    if result[0].dim() != 0:
        shape = tuple(result[0].shape)
        raise ValueError(f"loss_fn: expected it to return a loss without dimensions, got {shape}")
    return result


def linear_token_loss_reference(
    hidden: Tensor,
    tokens: Tensor,
    head: Head,
    loss_fn: LossFn,
    vectors: dict[str, Tensor],
    with_entropy: bool,
) -> tuple[Tensor, Any]:
    """The specification: plain PyTorch, differentiated by plain autograd; all tokens at once."""
    need = torch.is_grad_enabled() and wants_gradient(hidden, head.weight, head.bias)
    index = linear_chunks.used_tokens(tokens, head.ignore_index)
    h, some, temperature = take(hidden, index), take(tokens, index), take(head.temperature, index)
    scale = head.temperature_value if temperature is None else temperature
    vectors = {name: take(x, index) for name, x in vectors.items()}
    with torch.set_grad_enabled(need):  # the loss has no gradient for the sake of a constant
        z = linear_chunks.logits_reference(h, head, some)
        logprob, entropy = token_logprob_reference(z, some, scale, head.ignore_index)
        loss, stats = _call(loss_fn, logprob, entropy if with_entropy else None, vectors)
    return loss, _added(None, stats)


@not_compiled
def _run(
    backend: str,
    hidden: Tensor,
    tokens: Tensor,
    head: Head,
    loss_fn: LossFn,
    vectors: dict[str, Tensor],
    with_entropy: bool,
    chunk_tokens: int | None,
    shard: Shard | None,
) -> tuple[Tensor, Any]:
    found: list[Any] = []  # the statistics, beside autograd
    enabled = torch.is_grad_enabled()  # it never is within an autograd function

    def sweep(*need: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss, stats, grads = _sweep(
            *(backend, hidden.detach(), tokens, head, loss_fn, vectors, with_entropy),
            *(chunk_tokens, *(enabled and x for x in need), shard),
        )
        found.append(stats)
        return loss, grads

    with torch.profiler.record_function("rlhf_kernels::linear_token_loss"):
        loss = _LinearTokenLoss.apply(sweep, hidden, head.weight, head.bias)
    return loss, found[0]


@linear_chunks.without_autocast
def _sweep(
    backend: str,
    hidden: Tensor,
    tokens: Tensor,
    head: Head,
    loss_fn: LossFn,
    vectors: dict[str, Tensor],
    with_entropy: bool,
    chunk_tokens: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    shard: Shard | None,
) -> tuple[Tensor, Any, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Loss, statistics, and the gradients of hidden, weight and bias."""
    head = head._replace(weight=head.weight.detach(), bias=_detached(head.bias))
    index = linear_chunks.used_tokens(tokens, head.ignore_index)
    h, some = take(hidden, index), take(tokens, index)
    head = head._replace(temperature=take(head.temperature, index))
    vectors = {name: take(x.detach(), index) for name, x in vectors.items()}
    largest = None if shard is None else shard.largest
    size = linear_chunks.tokens_of_chunk(h, head, chunk_tokens, largest, index is not None)
    narrow = hidden.dtype == torch.float16
    dtypes = (torch.float32, torch.float32) if narrow else None
    sweep = linear_parallel.make_sweep(h, head, backend, size, shard, dtypes)
    grad_hidden = sweep.new_gradient() if need_hidden else None
    need = need_hidden or need_weight or need_bias
    one_read = need and not with_entropy and not head.softcap and shard is None
    loss: Tensor | None = None
    stats: Any = None
    for part in linear_chunks.chunks(h.shape[0], size):
        z, token = sweep.logits(part), some[part]
        rows = (
            sweep.rows_and_gradient(part, z, token)
            if one_read
            else sweep.rows(part, z, token, with_entropy)
        )
        logprob = sweep.refined(part, token, rows).requires_grad_(need)
        entropy = rows.entropy.detach().requires_grad_(need) if with_entropy else None
        with torch.set_grad_enabled(need):
            part_loss, part_stats = _call(
                loss_fn, logprob, entropy, {name: x[part] for name, x in vectors.items()}
            )
        loss = part_loss.detach() if loss is None else loss + part_loss.detach()
        stats = _added(stats, part_stats)
        if not need:
            continue
        g, g_entropy = _coefficients(part_loss, logprob, entropy, token != head.ignore_index)
        unit = 1.0
        if narrow:
            unit = _unit(g, g_entropy)
            g, g_entropy = g / unit, None if g_entropy is None else g_entropy / unit
        if one_read:
            sweep.add_products(part, z, g, grad_hidden, need_weight, need_bias, unit)
        else:
            g_logits = sweep.gradient(part, z, token, rows, g, g_entropy)
            sweep.add_products(part, g_logits, None, grad_hidden, need_weight, need_bias, unit)
    if grad_hidden is not None:
        grad_hidden = sweep.hidden_gradient(grad_hidden)
        if index is not None:
            zeros = torch.zeros_like(hidden, dtype=grad_hidden.dtype)
            grad_hidden = zeros.index_copy_(0, index, grad_hidden)
    assert loss is not None
    return loss, stats, (grad_hidden, *sweep.weight_gradients())


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _coefficients(
    loss: Tensor, logprob: Tensor, entropy: Tensor | None, scored: Tensor
) -> tuple[Tensor, Tensor | None]:
    """d loss / d logprob and d entropy; 0 at ignored positions."""
    wanted = [logprob] if entropy is None else [logprob, entropy]
    if not loss.requires_grad:  # a constant
        grads: tuple[Tensor, ...] = tuple(torch.zeros_like(x) for x in wanted)
    else:
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    grads = tuple(torch.where(scored, x, 0.0) for x in grads)
    return grads[0], grads[1] if entropy is not None else None


def _unit(*grads: Tensor | None) -> float:
    """A power of two: in units of it the coefficients are below 1, and in the range of float16."""
    largest = max((float(x.abs().max()) for x in grads if x is not None and x.numel()), default=0.0)
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1], -126)


def _added(total: Any, x: Any) -> Any:
    if type(x) in (tuple, list):
        raise TypeError(
            "loss_fn: expected its statistics to be None, a dict, or something that + adds up, got "
            f"a {type(x).__name__}"
        )
    if isinstance(x, Mapping):
        return {k: _added(None if total is None else total[k], value) for k, value in x.items()}
    x = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, x)
    return x if total is None else total + x


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sweep, hidden, weight, bias):
        loss, grads = sweep(*ctx.needs_input_grad[1:])
        ctx.grads = grads
        ctx.save_for_backward(loss)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss):
        if ctx.grads is None:
            raise RuntimeError(
                "linear_token_loss: the gradients were made in the forward and are given away by "
                "the first backward; call it again, or use linear_logprob"
            )
        grads, ctx.grads = ctx.grads, None
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
            grads = [None if x is None else _scaled(x, grad_loss) for x in grads]
        wanted = zip(grads, ctx.dtypes, strict=True)
        return None, *(None if x is None else x.to(dtype) for x, dtype in wanted)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """In place; in 16 bits the factor itself (a loss scale of 65536) may be out of range."""
    for some in x.split(ADDED_ROWS):
        some.copy_(some.to(factor.dtype).mul_(factor))
    return x


_backend.follow("linear_token_loss", "token_logprob_and_grad")


def _samples(make: Maker) -> Iterator[Sample]:
    def minus_logprob(logprob: Tensor, entropy: Tensor | None, weight: Tensor) -> Any:
        return -(logprob * weight).sum(), {"sum": logprob.sum().double()}

    def with_entropy(logprob: Tensor, entropy: Tensor, weight: Tensor) -> Any:
        return -((logprob.exp() + 0.3 * entropy) * weight).sum(), {}

    def case(why: str, vocab: int, *rows: int, **extra: Any) -> Sample:
        hidden, weight = make.randn(*rows, 16), make.randn(vocab, 16, scale=0.7)
        inputs = {"hidden": hidden, "weight": weight, "tokens": make.integers(vocab, *rows)}
        vectors = {"weight": make.randn(*rows)}
        return Sample({**inputs, "loss_fn": minus_logprob, "per_token": vectors, **extra}, why)

    both = {"loss_fn": with_entropy, "with_entropy": True, "chunk_tokens": 3}
    yield case("two rows", 5, 2)
    yield case("several chunks", 67, 3, 5, chunk_tokens=4, bias=make.randn(67))
    yield case("entropy", 33, 7, temperature=0.7, bias=make.randn(33), **both)
    yield case("softcap", 40, 5, logit_scale=2.0, softcap=3.0, chunk_tokens=2)
    warm = make.uniform(2, 1, low=0.5, high=2.0)
    yield case("scale, one temperature a row", 130, 2, 3, temperature=warm, logit_scale=0.25)
    ignored = make.integers(257, 6)
    ignored[::2] = -100
    yield case("ignored positions", 257, 6, tokens=ignored, chunk_tokens=2)
    yield case("nothing scored", 9, 3, tokens=make.tensor([-100] * 3, torch.int64))
    yield case("no rows", 33, 0, **both)


def _bench(make: Maker) -> Iterator[Sample]:
    def minus_logprob(logprob: Tensor, entropy: Tensor | None) -> Any:
        return -logprob.sum(), None

    hidden, weight = make.randn(1024, 512), make.randn(32000, 512, scale=0.05)
    inputs = {"hidden": hidden, "weight": weight, "tokens": make.integers(32000, 1024)}
    yield Sample({**inputs, "loss_fn": minus_logprob}, "1024 x 512 x 32000")


SPEC = OpSpec(
    name="linear_token_loss",
    function=linear_token_loss,
    samples=_samples,
    bench=_bench,
    differentiable=("hidden", "weight", "bias"),
    own_matmul=False,
    compiles=False,
    one_backward=True,
    dtypes=(torch.float32, torch.float64),
)
