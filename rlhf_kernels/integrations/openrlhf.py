"""OpenRLHF 0.9 to 0.11 on the kernels of this library. One line, in every process that trains:

    rlhf_kernels.integrations.openrlhf.patch()

Replaced:

- ``Actor.forward``, where it gives log-probs (PPO, SFT, DPO, the reference model): from the hidden
  states, without logits. Only positions that are returned reach the head. With ``return_output``
  the output makes its logits when somebody looks at them, which the trainers do not. With images,
  or a head that is no plain linear layer (LoRA on it, quantised), it is the original; of a head it
  warns.
- ``log_probs_from_logits`` and ``compute_entropy``, which the original ``Actor.forward`` calls.
- ``compute_approx_kl`` for k3, whose small values the host loses to cancellation. For k1 and k2,
  and with ``unbiased_gradient``, it is the original, which is as fast.
- ``get_advantages_and_returns`` and ``get_cumulative_returns``: one scan, not a loop in time.

Results have the host's dtypes and shapes; 16-bit results are rounded once, from float32. The host's
entropy is NaN where a token is banned (logit -inf); so is ours, but ``Actor.forward`` looks for
-inf in the bias of the head only. With ``strict=False`` a banned token adds 0, and
``Actor.forward`` leaves masked actions out of the head, and gives 0 there whatever the model gives.

Up to OpenRLHF 0.11.1 ``Actor.forward`` takes the entropy of the logits before it divides them by
the temperature, and so does ours, by a second sweep where that is not 1.

Nothing of ours can be differentiated twice. Log-probs of 16-bit logits keep the logits for the
backward, the host keeps their log-softmax: logits must not be written to before the backward.

What is left alone, and why, is in ``report()``.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_kernels import checks
from rlhf_kernels.full_weight import full_weight
from rlhf_kernels.gae import gae
from rlhf_kernels.integrations import patching
from rlhf_kernels.integrations.serving import has_kernels, in_torch_func
from rlhf_kernels.kl_estimate import kl_estimate
from rlhf_kernels.linear_chunks import NOTHING_IGNORED
from rlhf_kernels.linear_logprob import linear_logprob
from rlhf_kernels.token_logprob import TokenLogprob, token_logprob

LOW = (torch.bfloat16, torch.float16)
IGNORED = -100
NO_TOKEN = NOTHING_IGNORED + 1  # which nobody has


def _runs(op: str, *tensors: Any) -> bool:
    """Kernels of ours serve these tensors: plain ones, floating, on one device."""
    first = tensors[0]
    if not all(isinstance(x, Tensor) for x in tensors):
        return False
    if any(x.device != first.device or x.dtype not in checks.DTYPES for x in tensors):
        return False
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
        return False
    return not in_torch_func() and has_kernels(op, first.device.type)


# ---- log-probs and entropy of logits -----------------------------------------------------------


def _log_probs_from_logits(original: Any, strict: bool) -> Any:
    @functools.wraps(original)
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not _rows(logits) or not _labels(logits, labels):
            return original(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)  # who looks at them later sees this
        # The host scores on CUDA with flash-attn, which ignores this label.
        ignore_index = IGNORED if logits.is_cuda else NOTHING_IGNORED
        try:
            return token_logprob(logits, labels, ignore_index=ignore_index).to(logits.dtype)
        except IndexError:
            return original(logits, labels)

    return log_probs_from_logits


def _rows(logits: Any) -> bool:
    """They are rows in a batch, with words side by side in memory."""
    if not _runs("token_logprob", logits) or logits.dim() < 2 or logits.shape[-1] < 1:
        return False
    if logits.dtype in LOW and logits.shape[0] == 0:
        return False  # the host raises
    return logits.shape[-1] == 1 or logits.stride(-1) == 1


def _labels(logits: Tensor, labels: Any) -> bool:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        return False
    if logits.is_cuda and logits.dtype == torch.float64:
        return False  # flash-attn gives float32
    return labels.shape == logits.shape[:-1] and labels.device == logits.device


def _compute_entropy(original: Any, strict: bool) -> Any:
    # The host's is compiled: what that left on it would let a compiled caller pass ours by.
    @functools.wraps(inspect.unwrap(original), updated=())
    def compute_entropy(logits: Tensor) -> Tensor:
        if not _rows(logits):
            return original(logits)
        tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        entropy = token_logprob(logits, tokens, with_entropy=True).entropy
        if strict:  # the host's 0 * -inf
            banned = logits.detach().amin(-1) == -torch.inf
            entropy = entropy * torch.where(banned, torch.nan, 1.0)
        return entropy.to(logits.dtype, copy=True)  # the backward reads what was there

    return compute_entropy


def _calls_of_logits(*more: Tensor) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for dtype in (torch.float32, torch.float64):
        yield ((4 * _random(2, 5, 37).to(dtype)).requires_grad_(), *more), {}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---- KL ----------------------------------------------------------------------------------------


def _compute_approx_kl(original: Any, strict: bool) -> Any:
    far = torch.full((1,), -100.0, requires_grad=True)
    with torch.inference_mode(False), torch.enable_grad():
        (gradient,) = torch.autograd.grad(original(far, -far.detach(), kl_estimator="k3"), far)
    overflows = bool(gradient.isnan())  # up to 0.11.1

    def score(log_probs: Any, log_probs_base: Any) -> Tensor | None:
        """k3, or None: the original has to."""
        if not _runs("kl_estimate", log_probs, log_probs_base):
            return None
        if log_probs.shape != log_probs_base.shape:
            return None
        p, q = log_probs.float(), log_probs_base.float()
        nothing: Tensor | float = 0.0
        if strict and overflows:
            p = p - q
            q = torch.zeros_like(p)
            nothing = ((-p).exp() + p).clamp(max=0)  # but NaN, or with such a gradient, as there
        elif strict and torch.is_grad_enabled() and (p.requires_grad or q.requires_grad):
            p = (p - q).clamp(min=-10)  # no gradient where it is NaN
            q = torch.zeros_like(p)
        # This clamp only keeps exp from overflow: below -3 and above 11 the next one binds.
        return kl_estimate(p, q, kind="k3", clamp=20.0).clamp(max=10) + nothing

    @functools.wraps(original)
    def old(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
        kl = score(log_probs, log_probs_base) if kl_estimator == "k3" else None
        return original(log_probs, log_probs_base, kl_estimator) if kl is None else kl

    @functools.wraps(original)
    def compute_approx_kl(
        log_probs: Tensor,
        log_probs_base: Tensor,
        log_probs_old: Tensor | None = None,
        kl_estimator: str = "k1",
        unbiased_gradient: bool = False,
    ) -> Tensor:
        ours = kl_estimator == "k3" and not unbiased_gradient
        kl = score(log_probs, log_probs_base) if ours else None
        if kl is not None:
            return kl
        return original(log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient)

    # Up to 0.11.0 it knows of no old log-probs.
    takes = inspect.signature(original).parameters
    return compute_approx_kl if "log_probs_old" in takes else old


def _calls_of_kl() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    log_ratio = torch.tensor([[0.0, 0.5, -2.0, -5.0, -50.0, -100.0, 8.0, 10.5, 30.0]])
    for estimator in ("k1", "k3"):
        args = log_ratio.requires_grad_(), torch.zeros_like(log_ratio)
        yield args, {"kl_estimator": estimator}


# ---- advantages --------------------------------------------------------------------------------


def _get_advantages_and_returns(original: Any, strict: bool) -> Any:
    @functools.wraps(original)
    def get_advantages_and_returns(
        self: Any,
        values: Tensor,
        rewards: Tensor,
        action_mask: Tensor,
        gamma: float,
        lambd: float,
    ) -> tuple[Tensor, Tensor]:
        if _scans(values, rewards, action_mask, gamma, lambd):
            # Not gae's own mask, which would carry values across a gap.
            r, v = _masked(rewards, action_mask), _masked(values, action_mask)
            advantages, returns = gae(r, v, gamma=gamma, lam=lambd)
            dtype = torch.promote_types(r.dtype, v.dtype)
            return advantages.to(dtype), returns.to(dtype)
        return original(self, values, rewards, action_mask, gamma, lambd)

    return get_advantages_and_returns


def _get_cumulative_returns(original: Any, strict: bool) -> Any:
    @functools.wraps(original)
    def get_cumulative_returns(
        self: Any, rewards: Tensor, action_mask: Tensor, gamma: float
    ) -> Tensor:
        if _scans(rewards, rewards, action_mask, gamma, 1.0):
            r = _masked(rewards, action_mask)
            values = r.new_zeros(()).expand(r.shape)
            return gae(r, values, gamma=gamma, lam=1.0).advantages.to(rewards.dtype)
        return original(self, rewards, action_mask, gamma)

    return get_cumulative_returns


def _scans(values: Any, rewards: Any, mask: Any, gamma: Any, lam: Any) -> bool:
    if not _runs("gae", values, rewards) or rewards.dim() != 2 or values.shape != rewards.shape:
        return False
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.shape == rewards.shape and mask.device == rewards.device
    ):
        return False
    discounts = all(type(x) in (int, float) and 0 <= x <= 1 for x in (gamma, lam))
    return discounts and rewards.shape[1] > 0


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.detach() if mask is None else mask.detach() * x.detach()


def _calls_of_gae(*names: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    for dtype in (torch.float32, torch.float64):
        rewards, values = _random(2, 3, 5).to(dtype).unbind()
        given: dict[str, Any] = {"values": values, "rewards": rewards, "action_mask": mask}
        given |= {"gamma": 0.9, "lambd": 0.8}
        yield (None, *(given[name] for name in names)), {}


# ---- Actor -------------------------------------------------------------------------------------


def _forward(original: Any, strict: bool) -> Any:
    # Since 0.11.2 the logits are divided before their entropy is taken, and not after it.
    scales_first = "div_" in inspect.unwrap(original).__code__.co_names

    @functools.wraps(original)
    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Any = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        if (
            (action_mask is not None or return_logprobs)
            and (return_output or not return_entropy)
            and not mm_inputs
            and _is_plain(self)
            and _is_batch(sequences, attention_mask, action_mask)
        ):
            packing = _packing(original, ring_attn_group) if self.packing_samples else None
            batch = sequences, action_mask, attention_mask
            asked = return_output, return_entropy
            result = _serve(self, *batch, *asked, packing, strict, scales_first)
            if result is not None:
                return result
        return original(
            self,
            sequences,
            action_mask,
            attention_mask,
            return_output=return_output,
            allgather_logits=allgather_logits,
            return_logprobs=return_logprobs,
            ring_attn_group=ring_attn_group,
            packed_seq_lens=packed_seq_lens,
            return_entropy=return_entropy,
            **mm_inputs,
        )

    return forward


class _Packing(NamedTuple):
    """The host's own functions, which put the rows of a batch behind one another and apart."""

    pack: Callable[..., Any]
    unpack: Callable[..., Tensor]
    group: Any  # of ring attention, where a rank has a slice of what is packed; or None


def _packing(original: Any, group: Any) -> _Packing | None:
    known = getattr(inspect.unwrap(original), "__globals__", {})
    pack, unpack = known.get("unpad_and_slice_tensor"), known.get("gather_and_pad_tensor")
    return _Packing(pack, unpack, group) if pack and unpack else None


class _Layout(NamedTuple):
    """What the model is given, what is scored there, and where the results go."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    scored: slice  # positions
    tokens: Tensor  # that are scored there
    ignore_index: int
    place: Callable[[Tensor], Tensor]  # results of those, to (rows, positions)


def _padded(
    sequences: Tensor, attention_mask: Tensor, actions: Tensor | None, strict: bool
) -> _Layout:
    position_ids = attention_mask.long().cumsum(-1) - 1
    position_ids = torch.where(attention_mask == 0, 1, position_ids)
    ignore_index = NOTHING_IGNORED if strict else IGNORED
    last = sequences.shape[1] - 1
    scored = slice(0 if actions is None else last - actions.shape[1], last)
    tokens = sequences[:, 1:][:, scored]
    if actions is not None and not strict:
        tokens = tokens.masked_fill(actions == 0, IGNORED)
    model_inputs = sequences, attention_mask, position_ids
    return _Layout(*model_inputs, scored, tokens, ignore_index, lambda x: x)


def _packed(
    sequences: Tensor,
    attention_mask: Tensor,
    actions: Tensor | None,
    strict: bool,
    packing: _Packing,
) -> _Layout:
    pack, unpack, group = packing
    packed, position_ids, tokens, extra, indices = pack(sequences, attention_mask, group)
    wanted = torch.zeros_like(sequences, dtype=torch.bool)
    if actions is None:
        wanted[:, :-1] = True
    else:
        wanted[:, -1 - actions.shape[1] : -1] = True if strict else actions != 0
    wanted = wanted.flatten()[indices]
    if group is not None:
        first = torch.distributed.get_rank(group) * tokens.shape[1]
        wanted = nn.functional.pad(wanted, (0, extra))[first : first + tokens.shape[1]]
    # Padding may be a row's last label, whatever it is. The host ignores this one on CUDA itself.
    ignore_index = IGNORED if tokens.is_cuda else NO_TOKEN
    tokens = torch.where(wanted, tokens, ignore_index)

    def place(x: Tensor) -> Tensor:
        return unpack(x, group, extra, indices, *sequences.shape)[:, :-1]

    return _Layout(packed, None, position_ids, slice(None), tokens, ignore_index, place)


@torch.compiler.disable  # what runs the model below is not compiled as a whole either
def _serve(
    actor: Any,
    sequences: Tensor,
    action_mask: Tensor | None,
    attention_mask: Tensor,
    return_output: bool,
    return_entropy: bool,
    packing: _Packing | None,
    strict: bool,
    scales_first: bool,
) -> Any:
    """What ``forward`` returns, or None: the original has to."""
    # The host gives none: None is as the configuration says. Without the output nobody sees it,
    # but models only keep packed rows apart where there is no cache.
    takes = inspect.signature(actor.model.forward).parameters
    more: dict[str, Any] = {}
    if "use_cache" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        more["use_cache"] = None if return_output or actor.packing_samples else False
    actions = None if return_entropy else action_mask  # the entropy is that of all positions
    given = sequences, attention_mask, actions, strict
    if packing is not None:
        layout = _packed(*given, packing)
    elif not actor.packing_samples:
        layout = _padded(*given)
    else:  # nobody here knows how
        return None
    ran = _run(actor.model, *layout[:3], **more)
    if ran is None:
        return None
    options = ran.head._asdict() | {
        "tokens": layout.tokens,
        "ignore_index": layout.ignore_index,
    }
    hidden, temperature = ran.hidden[:, layout.scored], actor.temperature
    at_once = return_entropy and (scales_first or temperature == 1)
    try:
        with ran.autocast:
            result = linear_logprob(
                hidden, **options, temperature=temperature, with_entropy=at_once
            )
            logprob, entropy = result if isinstance(result, TokenLogprob) else (result, None)
            if return_entropy and not at_once:
                unscaled: Any = linear_logprob(hidden, **options, with_entropy=True)
                entropy = unscaled.entropy
    except IndexError:  # the embedding has more tokens than the head
        return None
    head = ran.head
    if strict and entropy is not None and head.bias is not None and head.softcap is None:
        banned = full_weight(head.bias).detach().isneginf().any()
        entropy = entropy * torch.where(banned, math.nan, 1.0)  # the host's 0 * -inf
    logprob = layout.place(logprob.float())
    if action_mask is not None:
        logprob = logprob[:, -action_mask.shape[1] :] * action_mask.float()
    if not return_output:
        return logprob
    _make_logits_later(ran, actor.temperature)
    if entropy is not None:  # the backward reads its own
        ran.output.entropy = layout.place(entropy.to(torch.float32, copy=True))
    return logprob, ran.output


def _is_plain(actor: Any) -> bool:
    temperature = actor.temperature
    return (
        hasattr(actor, "packing_samples")  # where there is none the host raises
        and not getattr(actor, "is_vlm", False)
        and type(temperature) in (int, float)
        and 1e-30 < temperature < 1e30
    )


def _is_batch(sequences: Any, attention_mask: Any, action_mask: Any) -> bool:
    tensors = [x for x in (sequences, attention_mask, action_mask) if x is not None]
    if len(tensors) < 2 or not all(isinstance(x, Tensor) and x.dim() == 2 for x in tensors):
        return False
    if sequences.dtype != torch.int64 or any(x.device != sequences.device for x in tensors):
        return False
    rows, length = sequences.shape
    if rows < 1 or length < 2 or attention_mask is None or attention_mask.shape != (rows, length):
        return False
    if action_mask is not None and (
        action_mask.shape[0] != rows or not 0 < action_mask.shape[1] < length
    ):
        return False
    return not in_torch_func() and has_kernels("linear_logprob", sequences.device.type)


_expressible: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _run(
    model: Any, sequences: Tensor, mask: Tensor | None, position_ids: Tensor, **more: Any
) -> Any:
    """The model's ``HiddenOutput``, or None: what its head does cannot be expressed."""
    from rlhf_kernels.integrations.transformers import UnsupportedModel, hidden_output

    known = _expressible.get(model)
    if known is False:
        return None
    random = None if known else _random_states(sequences)
    reason = "its hidden states are not those of the tokens"
    try:
        ran = hidden_output(model, sequences, mask, position_ids=position_ids, **more)
        if ran.hidden.shape[:2] == sequences.shape:
            _expressible[model] = True
            return ran
    except UnsupportedModel as error:
        reason = str(error)
    _expressible[model] = False
    if random is not None:  # the model may have run in vain, and drawn its dropout
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], sequences.device)
    warnings.warn(f"OpenRLHF's Actor makes its logits: {reason}", RuntimeWarning, stacklevel=2)
    return None


def _random_states(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


def _make_logits_later(ran: Any, temperature: float) -> None:
    """Let the model's output make its logits, in float32 and scaled, when they are looked at."""
    grad = torch.is_grad_enabled()
    output, hidden, head, autocast = ran.output, ran.hidden, ran.head, ran.autocast

    def logits() -> Tensor:  # does not know of the output, which then goes with its last user
        with torch.set_grad_enabled(grad):
            with autocast:
                z = nn.functional.linear(
                    hidden,
                    full_weight(head.weight),
                    None if head.bias is None else full_weight(head.bias),
                )
                z = z if head.logit_scale == 1 else z * head.logit_scale
                if head.softcap is not None:
                    z = head.softcap * torch.tanh(z / head.softcap)
            z = z.float()
            return z if temperature == 1 else z / temperature

    kind: Any = type(output)
    vars(output).pop("logits")  # what was made up
    output.__class__ = _later(kind)
    output.make_logits = logits


@functools.cache
def _later(kind: Any) -> type:
    """A subclass of a class of outputs whose instances are of ``kind`` again once they have logits.

    Keys, their order and the number of values do not depend on the logits; all else asks for them.
    """

    def get(self: Any) -> Tensor:
        logits: Tensor = self.make_logits()
        put(self, logits)
        return logits

    def put(self: Any, logits: Any) -> None:
        vars(self).pop("make_logits", None)
        self.__class__ = kind
        self["logits"] = logits

    def made(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            get(self)
            return getattr(self, name)(*args, **kwargs)

        return method

    def getitem(self: Any, key: Any) -> Any:
        if not isinstance(key, str) or key == "logits":
            return made("__getitem__")(self, key)
        as_it_is = kind.__new__(kind)  # its own class knows the names that a key had before
        for name, value in OrderedDict.items(self):
            OrderedDict.__setitem__(as_it_is, name, value)
        return as_it_is[key]

    def get_item_or(self: Any, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    names = "items values to_tuple copy __eq__ __ne__ __or__ __ror__ __reduce__ __reduce_ex__"
    face: dict[str, Any] = {name: made(name) for name in names.split()}
    face |= {"logits": property(get, put), "__getitem__": getitem, "get": get_item_or}
    face |= {"__module__": kind.__module__, "__hash__": None}
    return types.new_class(
        f"{kind.__name__}WithLogitsLater", (kind,), {}, lambda ns: ns.update(face)
    )


def _calls_of_forward() -> Iterator[tuple[Any, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.default_generator.manual_seed(0)  # of the CPU alone, which the caller puts back
    config = LlamaConfig(
        use_cache=False,
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    sequences, attention_mask = torch.arange(14).view(2, 7), torch.ones(2, 7, dtype=torch.int64)
    attention_mask[0, :2] = 0
    action_mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    weights = list(model.parameters())
    for packing in (False, True):
        actor = types.SimpleNamespace(model=model, temperature=0.7, packing_samples=packing)
        yield (actor, sequences, action_mask, attention_mask), {}, weights
        yield (actor, sequences, None, attention_mask), {"return_logprobs": True}, weights
        asked = {"return_output": True, "return_entropy": True}
        yield (actor, sequences, action_mask, attention_mask), asked, weights


# ---- the host ----------------------------------------------------------------------------------

_MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
_FORWARD = (
    "(self, sequences, action_mask=None, attention_mask=None, return_output=False, "
    "allgather_logits=False, return_logprobs=False, ring_attn_group=None, packed_seq_lens=None, "
    "return_entropy=False"
)
_OWN_LOSS = "a loss of its own: OpenRLHF has no registry where another could be chosen"
_host = patching.add(
    patching.Host(
        "openrlhf",
        [(0, 11, 2)],
        [
            patching.Replacement(
                "openrlhf.models.actor:Actor.forward",
                f"{_FORWARD}, **mm_inputs)",
                _forward,
                _calls_of_forward,
                "log-probs and entropy from hidden states, without logits",
                {f"{_FORWARD})": _calls_of_forward},  # up to 0.9
            ),
            patching.Replacement(
                "openrlhf.models.utils:log_probs_from_logits",
                "(logits, labels, temperature=1.0)",
                _log_probs_from_logits,
                functools.partial(_calls_of_logits, torch.arange(10).view(2, 5)),
                "log-probs of labels in one read of the logits",
            ),
            patching.Replacement(
                "openrlhf.models.utils:compute_entropy",
                "(logits)",
                _compute_entropy,
                _calls_of_logits,
                "entropy in one read of the logits",
            ),
            patching.Replacement(
                "openrlhf.models.utils:compute_approx_kl",
                "(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', "
                "unbiased_gradient=False)",
                _compute_approx_kl,
                _calls_of_kl,
                "k3 without cancellation",
                {"(log_probs, log_probs_base, kl_estimator='k1')": _calls_of_kl},  # up to 0.11.0
            ),
            patching.Replacement(
                f"{_MAKER}.get_advantages_and_returns",
                "(self, values, rewards, action_mask, gamma, lambd)",
                _get_advantages_and_returns,
                functools.partial(
                    _calls_of_gae, "values", "rewards", "action_mask", "gamma", "lambd"
                ),
                "advantages in one scan",
            ),
            patching.Replacement(
                f"{_MAKER}.get_cumulative_returns",
                "(self, rewards, action_mask, gamma)",
                _get_cumulative_returns,
                functools.partial(_calls_of_gae, "rewards", "action_mask", "gamma"),
                "discounted returns in one scan",
            ),
        ],
        {
            "openrlhf.models.utils:masked_mean": "OpenRLHF gives NaN for an empty mask and for a "
            "NaN at a masked place; the passes that match it are what ours saves (0.05 ms of 0.08 "
            "at 64 x 1024)",
            "openrlhf.models.utils:compute_reward": "OpenRLHF keeps the KL of masked places, and "
            "gives a score to a sequence without actions; 0.2 ms at 64 x 1024",
            "openrlhf.models.utils:masked_normalize": "the trainers do not use it",
            f"{_MAKER}.compute_advantages_and_returns": "its whitening is inline, over all "
            "experiences, and a few passes over values a token",
            "openrlhf.models.loss:PolicyLoss": _OWN_LOSS,
            "openrlhf.models.loss:ValueLoss": _OWN_LOSS,
            "openrlhf.models.loss:SFTLoss": _OWN_LOSS,
            "openrlhf.models.loss:DPOLoss": _OWN_LOSS,
            "openrlhf.models.loss:PairWiseLoss": _OWN_LOSS,
            "openrlhf.models.loss:LogExpLoss": f"{_OWN_LOSS}; it overflows where the rejected "
            "reward is above the chosen one by 89 or more, and knows no margin",
        },
    )
)
patch, unpatch, patched = _host.patch, _host.unpatch, _host.patched
report, survey, check = _host.report, _host.survey, _host.check
