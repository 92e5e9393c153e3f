"""Per-token log-probs from any causal model of transformers: its logits never exist.

The model runs as it is, but its output embedding hands on one made-up row of logits in place of
the product. What the model's own code makes of that row (a scale, a softcap) is read off and goes
to ``linear_logprob``; anything else raises. So no model family is known here by name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rlhf_kernels import checks
from rlhf_kernels.linear_logprob import linear_logprob
from rlhf_kernels.token_logprob import TokenLogprob


class UnsupportedModel(TypeError):
    """What a model does after its hidden states is more than ``linear_logprob`` can do."""


class LMHead(NamedTuple):
    """What makes the logits of hidden states; the names are those of ``linear_logprob``."""

    weight: Tensor  # (V, H), the model's own parameter
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


@dataclass
class LogprobOutput(ModelOutput):
    """What a patched model returns; after the entropy come the fields of its own output but its
    logits, whatever this version of transformers calls them."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        _, args, *state = super().__reduce__()
        names = tuple(field.name for field in fields(self))
        return _logprob_output_of, (dict(zip(names, args, strict=True)),), *state


def _logprob_output_of(values: dict[str, Any]) -> LogprobOutput:
    """One that has these fields."""
    others = tuple(name for name in values if name not in ("logprob", "entropy"))
    output: LogprobOutput = _output_class(others)(**values)
    return output


@functools.cache
def _output_class(others: tuple[str, ...]) -> Any:
    """A dataclass with these fields too: what pytrees, data parallelism and copies go by."""
    declared = [(name, Any, field(default=None)) for name in others]
    here = {"__module__": __name__}
    return make_dataclass("LogprobOutput", declared, bases=(LogprobOutput,), namespace=here)


def logprob_forward(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    backend: str | None = None,
    **model_kwargs: Any,
) -> Tensor | TokenLogprob:
    """Log-probs of the next tokens, or of ``tokens``, by a transformers model, without its logits.

    Equal to ``token_logprob`` of the model's own logits within rounding, and differentiable with
    respect to all parameters. Left padding needs ``position_ids`` where the model's own call does.
    To compile the model, compile its decoder (``model.model.compile()``): compiled as a whole, it
    runs eagerly here.

    Args:
        model: a causal language model of transformers, or a module that holds one and hands its
            keyword arguments on (DistributedDataParallel, PEFT's). The whole weight of the head
            must be there while the model runs.
        input_ids: (B, T) int64; None with ``inputs_embeds``.
        attention_mask: (B, T), 0 at padding, or whatever else the model takes.
        tokens: (B, S) or (B, S, K) int64: tokens[:, t] is scored by the hidden state at t. S is the
            number of positions at which the model would make logits (T, or as ``logits_to_keep``
            says), or one less, as for ``labels[:, 1:]``. None: the next tokens,
            ``input_ids[:, 1:]``; where it or the position before is padding the result is 0.
        temperature, with_entropy, ignore_index, chunk_tokens, backend: as for ``linear_logprob``;
            a temperature tensor is broadcast to the tokens.
        model_kwargs: the model's own (``position_ids``); ``use_cache`` is False if not given.

    Returns:
        logprob (B, T - 1) or in the shape of ``tokens``, or ``TokenLogprob(logprob, entropy)``;
        float32 (float64 for float64 models).

    Raises:
        UnsupportedModel: (a TypeError) no causal language model of transformers; or one whose head
            does what ``linear_logprob`` cannot do, or is no plain linear layer (quantized, LoRA).
        IndexError, ValueError: arguments that do not fit.
    """
    with patched(model):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            return_logprob=True,
            tokens=tokens,
            temperature=temperature,
            with_entropy=with_entropy,
            ignore_index=ignore_index,
            chunk_tokens=chunk_tokens,
            backend=backend,
            **model_kwargs,
        )
    return TokenLogprob(output.logprob, output.entropy) if with_entropy else output.logprob


def hidden_forward(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **model_kwargs: Any,
) -> tuple[Tensor, LMHead]:
    """The hidden states (B, T, H) that the head would see, and the head: for linear_token_loss.

        hidden, head = hidden_forward(model, input_ids, attention_mask)
        loss, stats = linear_token_loss(hidden[:, :-1], tokens=input_ids[:, 1:], loss_fn=...,
                                        **head._asdict())

    Arguments and errors as for ``logprob_forward``. The head is used after the model has returned:
    to DDP with ``find_unused_parameters=True`` one that is not tied looks unused, and its gradient
    is an error there; leave that option off, or call ``logprob_forward``.
    """
    return hidden_output(model, input_ids, attention_mask, **model_kwargs)[:2]


class HiddenOutput(NamedTuple):
    """What ``hidden_output`` returns."""

    hidden: Tensor  # (B, T, H)
    head: LMHead
    output: Any  # the model's own, but its logits, which are made up
    autocast: torch.autocast  # as it was at the head


def hidden_output(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **model_kwargs: Any,
) -> HiddenOutput:
    """``hidden_forward``, with what else the model returns: for those who hand that on."""
    with patched(model):
        hidden, scale, softcap, output, autocast = model(
            input_ids=input_ids, attention_mask=attention_mask, return_hidden=True, **model_kwargs
        )
    head = _causal_lm(model).get_output_embeddings()  # not through what wraps the model
    return HiddenOutput(hidden, LMHead(head.weight, head.bias, scale, softcap), output, autocast)


def patch(model: nn.Module) -> None:
    """Let ``model(..., return_logprob=True)`` return a ``LogprobOutput`` in place of logits.

    With it the call takes ``tokens``, ``temperature``, ``with_entropy``, ``ignore_index``,
    ``chunk_tokens`` and ``backend`` of ``logprob_forward``; without it nothing changes. Only this
    model is patched, and copies of it. To patch again does nothing.

    Raises:
        UnsupportedModel: as ``logprob_forward``, but for what the head does, which the first call
            shows.
    """
    lm = _causal_lm(model)
    if not _is_patched(lm):
        lm.forward = types.MethodType(_forward_of(lm), lm)


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``; where nothing is patched nothing is done."""
    lm = _causal_lm(model)
    if not _is_patched(lm):
        return
    ours = lm.forward.__func__
    del lm.forward
    if ours.before is not None:
        copied = ours.bound and ours.before.__self__ is not lm
        lm.forward = types.MethodType(ours.before.__func__, lm) if copied else ours.before


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[None]:
    """``patch`` for a ``with`` block; afterwards the model is as it was, patched or not."""
    lm = _causal_lm(model)

    def install() -> Callable[[], None]:
        was = _is_patched(lm)
        patch(lm)
        return (lambda: None) if was else (lambda: unpatch(lm))

    with _while_used(lm, install):
        yield


_lock = threading.Lock()
_used: weakref.WeakKeyDictionary[nn.Module, tuple[int, Callable[[], None]]] = (
    weakref.WeakKeyDictionary()
)  # how many threads use what is installed on a module, and what removes it


@contextlib.contextmanager
def _while_used(module: nn.Module, install: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """The first of several threads installs something on the module, the last one removes it."""
    with _lock:
        count, remove = _used[module] if module in _used else (0, install())
        _used[module] = count + 1, remove
    try:
        yield
    finally:
        with _lock:
            count, remove = _used.pop(module)
            if count > 1:
                _used[module] = count - 1, remove
            else:
                remove()


if hasattr(os, "register_at_fork"):  # a child must not wait for a thread of its parent alone
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def check() -> str:
    """Whether this version of transformers is served, in a line: of a small model log-probs,
    entropy and gradients, of ``logprob_forward`` and of a patched model.

    Raises:
        RuntimeError: they are not those of the model's own logits.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        model = _small_model()
        ids = torch.randint(model.config.vocab_size, (2, 7))
        logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        logprob = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        own = _with_gradients(model, logprob, -(logp.exp() * logp).sum(-1))
        with patched(model):
            output = model(input_ids=ids, return_logprob=True, with_entropy=True)
        called = logprob_forward(model, ids, with_entropy=True)
        for name, result in (("logprob_forward", called), ("patch", output.to_tuple()[:2])):
            found = zip(_with_gradients(model, *result), own, strict=True)
            error = max(float((got - want).detach().abs().max()) for got, want in found)
            if not error <= 1e-10:
                raise RuntimeError(f"{name}: error {error:.1e} against the model's own logits")
    return f"{transformers.__version__}: log-probs and gradients are those of a model's own logits"


def _small_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).double()


def _with_gradients(model: nn.Module, logprob: Tensor, entropy: Tensor) -> list[Tensor]:
    """Both, and the gradients of a sum that weighs them differently."""
    total = logprob.sum() - 2 * entropy.square().sum()
    return [logprob, entropy, *torch.autograd.grad(total, list(model.parameters()))]


def _causal_lm(model: nn.Module) -> Any:
    """The model, or the one that it wraps."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
                return module
    raise UnsupportedModel(
        "model: expected a causal language model of transformers (with output embeddings), got "
        f"{type(model).__name__}"
    )


def _is_patched(lm: PreTrainedModel) -> bool:
    function = getattr(lm.__dict__.get("forward"), "__func__", None)
    return hasattr(function, "before")


def _forward_of(lm: PreTrainedModel) -> Callable[..., Any]:
    """The patched ``forward``, a function of ``self``: deepcopy binds it to the copy."""
    before = lm.__dict__.get("forward")  # of another patch
    inner: Any = before if before is not None else lm.forward
    bound = getattr(inner, "__self__", None) is lm
    function = inner.__func__ if bound else (lambda self, *args, **kwargs: inner(*args, **kwargs))
    signature = inspect.signature(lm.forward)  # generate looks at it

    @functools.wraps(inner)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        return_logprob: bool = False,
        return_hidden: bool = False,
        **kwargs: Any,
    ) -> Any:
        call = functools.partial(function, self)
        if return_logprob:
            given = signature.bind_partial(*args).arguments
            return _logprob_output(self, call, {**given, **kwargs})
        if return_hidden:
            ran = _run(self, call, {**signature.bind_partial(*args).arguments, **kwargs})
            return ran.hidden, *ran.head[2:], ran.output, ran.autocast
        return call(*args, **kwargs)

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    attributes: Any = forward
    attributes.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    attributes.before, attributes.bound = before, bound
    return forward


@torch.compiler.disable
def _logprob_output(
    lm: PreTrainedModel, call: Callable[..., Any], given: dict[str, Any]
) -> LogprobOutput:
    names = ("tokens", "temperature", "with_entropy", "ignore_index", "chunk_tokens", "backend")
    options = {name: given.pop(name) for name in names if name in given}
    tokens = options.pop("tokens", None)
    if tokens is None:
        tokens = _next_tokens(lm, given, options.get("ignore_index", -100))
    checks.integer("tokens", tokens)
    hidden, head, output, autocast = _run(lm, call, given)
    b, n = hidden.shape[:2]
    if tuple(tokens.shape[:2]) not in ((b, n), (b, n - 1)):
        raise ValueError(
            f"tokens: expected shape {(b, n)} or {(b, n - 1)}, as the model makes logits at {n} "
            f"positions, got {tuple(tokens.shape)}"
        )
    with autocast:
        result = linear_logprob(
            hidden[:, : tokens.shape[1]], tokens=tokens, **head._asdict(), **options
        )
    logprob, entropy = result if isinstance(result, TokenLogprob) else (result, None)
    others = [f.name for f in fields(output)] if is_dataclass(output) else []
    own = {name: getattr(output, name) for name in others if name != "logits"}
    return _logprob_output_of(own | {"logprob": logprob, "entropy": entropy})


def _next_tokens(lm: PreTrainedModel, given: dict[str, Any], ignore_index: int) -> Tensor:
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(input_ids, Tensor) or getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(
            "tokens: expected the tokens to score, as they do not follow from input_ids, got None"
        )
    tokens = input_ids[:, 1:]
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        return tokens
    valid = mask.bool()
    return torch.where(valid[:, 1:] & valid[:, :-1], tokens, ignore_index)


class _Ran(NamedTuple):
    hidden: Tensor
    head: LMHead
    output: Any
    autocast: torch.autocast  # as it was at the head: a patch below may turn it on and off


@torch.compiler.disable  # a head that is another at every call would be compiled at every call
def _run(lm: PreTrainedModel, call: Callable[..., Any], given: dict[str, Any]) -> _Ran:
    """Run the model with a probe in place of the logits."""
    if given.get("return_dict") is False:
        raise ValueError("return_dict: expected True, as logits go by their name, got False")
    for name in ("labels", "shift_labels"):
        if given.get(name) is not None:
            raise ValueError(f"{name}: expected None, as there are no logits for the model's loss")
    if "use_cache" in inspect.signature(type(lm).forward).parameters:
        given.setdefault("use_cache", False)
    head: Any = lm.get_output_embeddings()
    seen: list[tuple[Tensor, Tensor, int, torch.autocast]] = []
    with _while_used(head, lambda: _install_probe(head)):
        outer = _here.seen.get(head)  # a hook of the model may ask for log-probs of its own
        _here.seen[head] = seen
        try:
            output = call(**given)
        except Exception as error:
            if not seen or str(error) == _SHARD:
                raise
            raise UnsupportedModel(
                f"{_refusal(lm)}: it failed on a row of logits: {error}"
            ) from error
        finally:
            if outer is None:
                del _here.seen[head]
            else:
                _here.seen[head] = outer
    if len(seen) != 1:
        raise UnsupportedModel(f"{_refusal(lm)}: it calls the output embeddings {len(seen)} times")
    hidden, weight, vocab, autocast = seen[0]
    if hidden.dim() != 3:
        raise UnsupportedModel(f"{_refusal(lm)}: it gives them hidden states {tuple(hidden.shape)}")
    if weight.untyped_storage().nbytes() == 0 and not hasattr(weight, "ds_id"):
        raise UnsupportedModel(_SHARD)  # full_weight can gather again what ZeRO-3 has let go of
    scale, softcap = _read(lm, _probe(vocab), getattr(output, "logits", None))
    return _Ran(hidden, LMHead(head.weight, head.bias, scale, softcap), output, autocast)


class _Here(threading.local):
    """Heads at which this thread is to be given the probe, and what it has seen there."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, list[tuple[Tensor, Tensor, int, torch.autocast]]] = {}


_here = _Here()


def _install_probe(head: Any) -> Callable[[], None]:
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or "forward" in head.__dict__:
        raise UnsupportedModel(
            f"model: expected output embeddings that are a plain nn.Linear, got "
            f"{type(head).__name__} with a forward of its own"
        )

    def forward(hidden: Tensor) -> Tensor:
        seen = _here.seen.get(head)
        if seen is None:  # a thread that wants its logits
            return nn.Linear.forward(head, hidden)
        device = hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        autocast = torch.autocast(device, dtype=dtype, enabled=enabled)
        seen.append((hidden, head.weight, head.weight.shape[0], autocast))
        if type(head.weight.data) is not Tensor or head.weight.dim() != 2:
            raise UnsupportedModel(_SHARD)
        return _probe(head.weight.shape[0])

    def remove() -> None:
        del head.forward

    head.forward = forward
    return remove


_SHARD = (
    "model: expected the whole weight of the output embeddings, got a shard: sharded, they belong "
    "in the group of the model itself"
)
# The first two give the softcap and the scale: c tanh(s x / c) bends at the one, is s x at the
# other. None is so large that what else a model might add to it would be rounded away.
_LARGE, _SMALL = 2.0**12, 2.0**-20
_VALUES = (_LARGE, _SMALL, 0.0, 1.0, -1.0, 0.25, -4.0, 9.0, -20.0, 30.0, -70.0, 500.0)


def _probe(vocab: int) -> Tensor:
    """(1, R, V) float64 on the CPU, so that to look at what becomes of it waits for no device."""
    values = torch.tensor(_VALUES, dtype=torch.float64)
    rows = -(-len(values) // vocab)  # one but for tiny vocabularies
    return values.repeat(-(-rows * vocab // len(values)))[: rows * vocab].view(1, rows, vocab)


def _read(lm: PreTrainedModel, probe: Tensor, logits: Any) -> tuple[float, float | None]:
    """Scale and softcap, from what the model made of the probe; every column has to agree."""
    if not isinstance(logits, Tensor) or logits.shape != probe.shape:
        what = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else repr(logits)
        raise UnsupportedModel(
            f"{_refusal(lm)}: of logits {tuple(probe.shape)} it returns as `logits` what is {what}"
        )
    if logits.requires_grad:
        raise UnsupportedModel(f"{_refusal(lm)}: parameters act on the logits")
    x, y = probe.flatten(), logits.detach().double().cpu().flatten()
    large, scale = float(y[0]) / _LARGE, float(y[1]) / _SMALL
    softcap = None
    if 0 < scale < torch.inf and 0 < large < torch.inf:
        if abs(large - scale) <= 1e-6 * scale:
            scale = large
        elif large < scale:
            softcap = scale * _LARGE / _bend(large / scale)
        z = x * scale
        expected = z if softcap is None else softcap * torch.tanh(z / softcap)
        if torch.allclose(y, expected, rtol=1e-6, atol=0):
            return scale, softcap
    raise UnsupportedModel(f"{_refusal(lm)}: it is more than a scale and a softcap")


def _bend(ratio: float) -> float:
    """The u > 0 with tanh(u) / u = ratio, for a ratio in (0, 1)."""
    low, high = 0.0, 1 / ratio
    for _ in range(100):
        u = (low + high) / 2
        low, high = (u, high) if math.tanh(u) > ratio * u else (low, u)
    return high


def _refusal(lm: PreTrainedModel) -> str:
    return f"model: what {type(lm).__name__} does with its logits cannot be expressed"
