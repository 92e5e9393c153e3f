"""verl 0.7 to 0.9 on our kernels: one line before training.

    import rlhf_kernels.integrations.verl
    rlhf_kernels.integrations.verl.patch()

Ray's workers are processes of their own: set RLHF_KERNELS_VERL=1 in their environment, and verl's
plugin mechanism calls ``patch`` in each of them (see ``rlhf_kernels_verl``).

Replaced, with the same numbers within rounding:

    FusedLinearForPPO.forward         linear_logprob: memory of a chunk that does not grow with V
    linear_cross_entropy              linear_logprob, on the CPU, where verl's own does not run
    logprobs_from_logits_v2, _naive   token_logprob: one read of the logits
    entropy_from_logits, .._with_chunking    token_logprob
    compute_gae_advantage_return      gae, and what verl leaves in masked slots
    masked_mean, masked_whiten        masked_mean
    kl_penalty_forward                kl_estimate, for k3 (and so k3+)

and ``actor.policy_loss.loss_mode=rlhf_kernels`` selects the vanilla policy loss as one pass.
Whatever a replacement does not serve goes to verl's own function. Results of 16-bit logits are
rounded to the dtype in which verl returns them. Two things differ: a logit of +inf makes the
log-probability of its row NaN, where verl's is -inf; and the fused head does not look for logits of
-inf (weights of -inf, products that overflow), which make verl's entropy NaN and add 0 to ours.

Nothing of ours can be differentiated twice. Log-probs of 16-bit logits keep the logits for the
backward, so they must not be written to before it. The policy loss waits for the device twice, for
its check of finite numbers and for verl's metrics, which are Python numbers; verl's waits more.

``report()`` names what is left alone and why: losses that no registry holds, sums that cost a
fraction of a millisecond, heads and logits shared over tensor-parallel ranks.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_kernels import checks
from rlhf_kernels.aggregation import AGGREGATIONS
from rlhf_kernels.gae import gae
from rlhf_kernels.integrations import patching
from rlhf_kernels.integrations.patching import Addition, Host, Replacement
from rlhf_kernels.integrations.serving import has_kernels, in_torch_func
from rlhf_kernels.kl_estimate import kl_estimate
from rlhf_kernels.linear_chunks import NOTHING_IGNORED
from rlhf_kernels.linear_logprob import linear_logprob
from rlhf_kernels.masked_mean import masked_mean
from rlhf_kernels.policy_loss import policy_loss
from rlhf_kernels.token_logprob import token_logprob

__all__ = ["check", "patch", "patched", "report", "survey", "unpatch"]

EPS = 1e-8  # what verl adds to a variance
LOG_RATIO_CLAMP = 20.0
K3_CLAMP = 10.0
LOSS = "rlhf_kernels"  # actor.policy_loss.loss_mode


# ---- what our operators serve -------------------------------------------------------------------


def _serves(op: str, *tensors: Any) -> bool:
    """Plain floating tensors of one device that has kernels for ``op``."""
    if not all(type(x) in (Tensor, nn.Parameter) and x.dtype in checks.DTYPES for x in tensors):
        return False
    if in_torch_func() or any(x.device != tensors[0].device for x in tensors):
        return False
    return has_kernels(op, tensors[0].device.type)


def _serves_rows(logits: Any) -> bool:
    """Logits (..., V) with at least one number, and V side by side in memory."""
    if not _serves("token_logprob", logits) or logits.dim() < 2 or logits.numel() == 0:
        return False
    return logits.shape[-1] == 1 or logits.stride(-1) == 1


def _are_labels(labels: Any, rows: Tensor) -> bool:
    """One token for each row of (..., anything)."""
    if type(labels) is not Tensor or labels.dtype != torch.int64 or labels.device != rows.device:
        return False
    return labels.shape == rows.shape[:-1]


def _is_number(x: Any, above: float = -math.inf) -> bool:
    return type(x) in (int, float) and above < x < math.inf


def _mask_matches(mask: Any, x: Tensor) -> bool:
    return type(mask) is Tensor and mask.shape == x.shape and mask.device == x.device


def _is_binary(mask: Tensor) -> bool:
    """Nothing but 0 and 1; looks at the numbers."""
    return mask.dtype == torch.bool or bool((mask == mask.bool()).all())


def _all_finite(*tensors: Tensor) -> bool:
    """Nothing is infinite or NaN, nor do the sums overflow; waits for the device."""
    return math.isfinite(sum(x.detach().sum(dtype=torch.float64) for x in tensors))


def _autocast_casts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


def _dtype_of(function: Callable[[Tensor], Tensor], logits: Tensor) -> torch.dtype:
    """In which dtype the host's formula returns; autocast has a say in it."""
    if not torch.is_autocast_enabled(logits.device.type):
        return logits.dtype
    return function(logits.detach().new_zeros(1, 1)).dtype


# ---- log-probabilities and entropies ------------------------------------------------------------


def _fused_linear(original: Any, strict: bool) -> Any:
    """FusedLinearForPPO.forward: entropies in the dtype of the hidden states, log-probs too up to
    verl 0.7, since then in float32.

    What autocast would cast is left to the host, whose backward recomputes without it.
    """
    module = sys.modules[original.__module__]
    probe = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    rounds = original(_TorchBackend(), probe[0], *probe)[0].dtype == torch.bfloat16

    @functools.wraps(original)
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        liger = getattr(module, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", None)
        ids = input_ids.to(torch.int64) if isinstance(input_ids, Tensor) else input_ids
        if (
            (getattr(self, "impl_backend", "torch") != "torch" and liger is not None)  # since 0.9.1
            or not _serves_head(hidden_states, vocab_weights, ids, temperature)
            or hidden_states.dim() not in (2, 3)
        ):
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        try:
            logprob, entropy = _linear(hidden_states, vocab_weights, ids, temperature)
        except IndexError:
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        dtype = hidden_states.dtype
        # A copy, which may be written to: the backward reads the entropy.
        return logprob.to(dtype if rounds else torch.float32), entropy.to(dtype, copy=True)

    return forward


def _serves_head(hidden: Any, weight: Any, labels: Any, temperature: Any) -> bool:
    return (
        _serves("linear_logprob", hidden, weight)
        and hidden.numel() > 0
        and weight.dim() == 2
        and weight.shape[0] > 0
        and weight.shape[1] == hidden.shape[-1]
        and weight.dtype == hidden.dtype
        and not _autocast_casts(hidden)
        and _are_labels(labels, hidden)
        and _is_temperature(temperature)
    )


def _is_temperature(x: Any) -> bool:
    limits = torch.finfo(torch.float32)
    return _is_number(x, above=0.0) and limits.tiny <= x <= limits.max


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Any:
    return linear_logprob(
        hidden,
        weight,
        labels,
        temperature=temperature,
        with_entropy=True,
        ignore_index=NOTHING_IGNORED,
    )


def _linear_cross_entropy(original: Any, strict: bool) -> Any:
    """linear_cross_entropy: both flat, in float32, for CPU tensors, which the host's does not take.

    On CUDA its own kernel stays, until a run has compared the two. With the vocabulary on several
    ranks the host returns each rank's own part of the hidden states' gradient, which Megatron then
    sums; ours is summed already, so the host keeps that.
    """

    @functools.wraps(original)
    def linear_cross_entropy(
        hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        args = (hidden, weight, labels, temperature, reduction, dist_process_group)
        flat = labels
        if isinstance(labels, Tensor) and isinstance(hidden, Tensor) and hidden.dim() > 1:
            hidden, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if (
            reduction != "none"
            or not isinstance(hidden, Tensor)
            or hidden.device.type != "cpu"
            or not _alone(dist_process_group)
            or type(temperature) is not float
            or not _serves_head(hidden, weight, flat, temperature)
            or hidden.dtype == torch.float64
        ):
            return original(*args)
        try:
            logprob, entropy = _linear(hidden, weight, flat, temperature)
        except IndexError:
            return original(*args)
        return logprob, entropy.clone()  # the backward reads what was there

    return linear_cross_entropy


def _log_softmax_and_entropy(hidden, weight, labels, temperature, reduction):
    """What linear_cross_entropy gives, for the calls on which they are compared."""
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def _alone(group: Any) -> bool:
    return group is None or (isinstance(group, dist.ProcessGroup) and group.size() == 1)


def _logprobs(original: Any, strict: bool) -> Any:
    """logprobs_from_logits_v2 and _naive. Neither overwrites the logits, so nor does ours."""

    @functools.wraps(original)
    def logprobs_from_logits(logits, labels):
        if not _serves_rows(logits) or not _are_labels(labels, logits):
            return original(logits, labels)
        dtype = _dtype_of(functools.partial(torch.log_softmax, dim=-1), logits)
        try:
            return token_logprob(logits, labels, ignore_index=NOTHING_IGNORED).to(dtype)
        except IndexError:
            return original(logits, labels)

    return logprobs_from_logits


def _entropy(logits: Tensor, strict: bool) -> Tensor:
    """Entropies of the rows; strict: NaN where a logit is -inf, as 0 * -inf is in the formula.

    The backward reads them, so a caller hands on a copy, which may be written to.
    """
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = token_logprob(logits, tokens, with_entropy=True).entropy
    if not strict:
        return entropy
    banned = logits.detach().amin(-1) == -torch.inf
    return entropy * torch.where(banned, torch.nan, 1.0)


def _entropy_from_logits(original: Any, strict: bool) -> Any:
    @functools.wraps(original)
    def entropy_from_logits(logits):
        if not _serves_rows(logits):
            return original(logits)
        return _entropy(logits, strict).to(_dtype_of(original, logits), copy=True)

    return entropy_from_logits


def _chunked_entropy(original: Any, strict: bool) -> Any:
    """entropy_from_logits_with_chunking, whose result has torch's default dtype."""

    @functools.wraps(original)
    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        if not _serves_rows(logits) or logits.dim() != 2 or not _is_number(chunk_size, above=0):
            return original(logits, chunk_size)
        return _entropy(logits, strict).to(torch.get_default_dtype(), copy=True)

    return entropy_from_logits_with_chunking


# ---- advantages, means and KL -------------------------------------------------------------------


def _masked_mean(original: Any, strict: bool) -> Any:
    """masked_mean over everything. A numeric mask is a weight to the host: it keeps those."""

    @functools.wraps(original)
    def verl_masked_mean(values, mask, axis=None):
        if (
            axis is not None
            or not _serves("masked_mean", values)
            or not _mask_matches(mask, values)
            or mask.dtype != torch.bool
        ):
            return original(values, mask, axis)
        dtype = torch.promote_types(values.dtype, torch.get_default_dtype())
        return masked_mean(values, mask).to(dtype)

    return verl_masked_mean


def _whitened(x: Tensor, valid: Tensor, count: int, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + eps) at all places, with the statistics of the valid ones."""
    mean = masked_mean(x, valid)
    deviation = x - mean
    variance = masked_mean(deviation * deviation, valid) * (count / (count - 1))
    whitened = deviation * torch.rsqrt(variance + EPS)
    return whitened if shift_mean else whitened + mean


def _masked_whiten(original: Any, strict: bool) -> Any:
    """masked_whiten. The host looks at the number of valid elements too, and raises below two."""

    @functools.wraps(original)
    def masked_whiten(values, mask, shift_mean=True):
        if (
            not _serves("masked_mean", values)
            or values.dim() == 0
            or not _mask_matches(mask, values)
            or not _is_binary(mask)
            or (count := int(mask.sum())) < 2
        ):
            return original(values, mask, shift_mean)
        valid = mask.bool()
        x = values.to(checks.accumulation_dtype(values))
        if not strict:
            x = torch.where(valid | ~x.isnan(), x, 0.0)
        return _whitened(x, valid, count, bool(shift_mean)).to(values.dtype)

    return masked_whiten


def _gae(original: Any, strict: bool) -> Any:
    """compute_gae_advantage_return: a masked slot has the advantage of the next valid step, its
    own value is added to that in the returns, and both are whitened and handed on as they are."""

    @functools.wraps(original)
    def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
        rewards, mask = token_level_rewards, response_mask
        if (
            not all(_is_number(x) and 0.0 <= x <= 1.0 for x in (gamma, lam))
            or not _serves("gae", rewards, values)
            or rewards.dim() != 2
            or rewards.shape != values.shape
            or not _mask_matches(mask, values)
            or mask.dtype == torch.bool
            or not _is_binary(mask)
            or (count := int(mask.sum())) < 2
            or (strict and not _all_finite(rewards, values))
        ):
            return original(token_level_rewards, values, response_mask, gamma, lam)
        dtype = torch.promote_types(rewards.dtype, values.dtype)
        if mask.is_floating_point():
            dtype = torch.promote_types(dtype, mask.dtype)
        with torch.no_grad():
            valid = mask.bool()
            advantages = gae(rewards, values, valid, gamma=float(gamma), lam=float(lam)).advantages
            if count < valid.numel():
                advantages = _carried(advantages, valid)
            own = values if strict else torch.where(valid | ~values.isnan(), values, 0.0)
            returns = advantages + own
            return _whitened(advantages, valid, count).to(dtype), returns.to(dtype)

    return compute_gae_advantage_return


def _carried(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, T), with the next valid one of its row in each slot that is not; 0 after the last."""
    end = x.shape[1]
    steps = torch.arange(end, device=x.device)
    here = torch.where(valid, steps, end)
    following = here.flip(1).cummin(1).values.flip(1)
    return nn.functional.pad(x, (0, 1)).gather(1, following)


def _kl(original: Any, strict: bool) -> Any:
    """kl_penalty_forward. k1, abs and k2 are one or two operations already: the host keeps them."""

    @functools.wraps(original)
    def kl_penalty_forward(logprob, ref_logprob, kl_penalty):
        if (
            kl_penalty not in ("k3", "low_var_kl")
            or not _serves("kl_estimate", logprob, ref_logprob)
            or logprob.shape != ref_logprob.shape
        ):
            return original(logprob, ref_logprob, kl_penalty)
        kl = kl_estimate(logprob, ref_logprob, kind="k3", clamp=LOG_RATIO_CLAMP)
        dtype = torch.promote_types(logprob.dtype, ref_logprob.dtype)
        return kl.clamp(-K3_CLAMP, K3_CLAMP).to(dtype)

    return kl_penalty_forward


# ---- the policy loss ----------------------------------------------------------------------------

POLICY_LOSS_SIGNATURE = (
    "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
    "rollout_is_weights=None)"
)


def _register(core_algos: types.ModuleType, ours: Any) -> Callable[[], None]:
    registry = core_algos.POLICY_LOSS_REGISTRY
    if LOSS in registry:
        raise patching.LeftAlone(f"a policy loss {LOSS!r} is registered already")
    core_algos.register_policy_loss(LOSS)(ours)

    def take_out() -> None:
        if registry.get(LOSS) is ours:
            del registry[LOSS]

    return take_out


def _policy_loss(vanilla: Any, strict: bool) -> Any:
    """verl's vanilla loss in one pass; what ours does not serve goes there."""

    @functools.wraps(vanilla)
    def compute_policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        def host():
            return vanilla(
                old_log_prob=old_log_prob,
                log_prob=log_prob,
                advantages=advantages,
                response_mask=response_mask,
                loss_agg_mode=loss_agg_mode,
                config=config,
                rollout_is_weights=rollout_is_weights,
            )

        constants = [old_log_prob, advantages]
        constants += [] if rollout_is_weights is None else [rollout_is_weights]
        clip = _clip_options(config)
        scale = None if clip is None else _scale(loss_agg_mode, response_mask, config)
        if (
            clip is None
            or scale is None
            or not _serves_losses(log_prob, constants, response_mask)
            or (strict and not _all_finite(log_prob, *constants))
        ):
            return host()
        aggregation, normalizer, factor = scale
        loss, stats = policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            response_mask,
            log_ratio_clamp=LOG_RATIO_CLAMP,
            importance_weight=rollout_is_weights,
            aggregation=aggregation,
            normalizer=normalizer,
            clip_low=clip.low,
            clip_high=clip.high,
            dual_clip=clip.dual,
        )
        with torch.no_grad():
            count = stats.token_count.clamp(min=1)
            log_ratio = (log_prob - old_log_prob).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
            capped = (advantages < 0) & (log_ratio > math.log(clip.dual)) & response_mask
            numbers = [
                stats.token_count,
                stats.clip_frac,
                -masked_mean(log_ratio, response_mask),
                capped.sum() / count,
            ]
            tokens, clipped, kl, lower = torch.stack([x.double() for x in numbers]).tolist()
        if strict and tokens == 0:  # 0 / 0 is NaN there
            return host()
        metrics = {
            "actor/pg_clipfrac": clipped,
            "actor/ppo_kl": kl,
            "actor/pg_clipfrac_lower": lower,
        }
        return loss * factor, metrics

    return compute_policy_loss


class _Clip(NamedTuple):
    low: float
    high: float
    dual: float


def _clip_options(config: Any) -> _Clip | None:
    """The bounds of the ratio, for policy_loss; None: not a config that the host would take."""
    names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "global_batch_info")
    if config is None or not all(hasattr(config, name) for name in names):
        return None
    both, low, high = (getattr(config, name) for name in names[:3])
    low, high = both if low is None else low, both if high is None else high
    dual = config.get("clip_ratio_c", 3.0)
    if not (all(_is_number(x) and x >= 0 for x in (low, high)) and _is_number(dual, above=1.0)):
        return None
    return _Clip(low, high, dual)


def _scale(mode: str, mask: Any, config: Any) -> tuple[str, Any, float] | None:
    """(aggregation, normalizer, factor) of policy_loss for what agg_loss does with the config."""
    info = dict(config.global_batch_info)
    ranks = info.pop("dp_size", 1)
    tokens, sequences = info.pop("batch_num_tokens", None), info.pop("global_batch_size", None)
    horizon = info.pop("loss_scale_factor", None)
    if info or mode not in AGGREGATIONS or not _is_number(ranks, above=0) or mask.dim() != 2:
        return None
    if mode == "token-sum":
        return mode, None, ranks
    total = tokens if mode == "token-mean" else sequences
    if total is None:
        if ranks > 1:
            return None
    elif not (_is_number(total, above=0) or (type(total) is Tensor and total.numel() == 1)):
        return None
    if mode != "seq-mean-token-sum-norm":
        return mode, total, ranks
    horizon = mask.shape[-1] if horizon is None else horizon
    return ("seq-mean-token-sum", total, ranks / horizon) if _is_number(horizon, above=0) else None


def _serves_losses(log_prob: Any, constants: list[Any], mask: Any) -> bool:
    """Tensors (B, T), of which one at least is float32, and a bool mask."""
    tensors = [log_prob, *constants]
    if not _serves("policy_loss", *tensors) or not _mask_matches(mask, log_prob):
        return False
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    return (
        dtype in (torch.float32, torch.float64)
        and mask.dtype == torch.bool
        and all(x.shape == log_prob.shape and not x.requires_grad for x in constants)
    )


# ---- what is replaced ---------------------------------------------------------------------------

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _numbers(*shape: int) -> Tensor:
    """Spread over [-3, 3], the same on each call."""
    steps = torch.arange(math.prod(shape), dtype=torch.float32)
    return (3 * torch.sin(1.7 * steps + 0.3)).view(shape)


def _tokens(*shape: int) -> Tensor:
    return (5 * torch.arange(math.prod(shape)) % 7).view(shape)


_MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


class _TorchBackend:
    """What forward reads of its module."""

    impl_backend, chunk_size = "torch", 512


def _variables(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _numbers(*shape).to(dtype).requires_grad_()


def _head_calls() -> Iterator[Call]:
    head = sys.modules[_FUSED].FusedLinearForPPO()
    yield (head, _variables(2, 3, 4), _variables(7, 4), _tokens(2, 3), 0.7), {}
    yield (head, _variables(5, 4), _numbers(7, 4), _tokens(5)), {}
    # Small whole numbers: their products are exact in 16 bits.
    hidden, weight = (_numbers(*shape).round().bfloat16() for shape in ((5, 4), (7, 4)))
    yield (head, hidden.requires_grad_(), weight, _tokens(5)), {}


def _cross_entropy_calls() -> Iterator[Call]:
    yield (_variables(5, 128), _variables(7, 128), _tokens(5), 0.7, "none"), {}


def _logprob_calls() -> Iterator[Call]:
    yield (_variables(2, 3, 7), _tokens(2, 3)), {}
    yield (_variables(4, 7, dtype=torch.bfloat16), _tokens(4)), {}


def _entropy_calls() -> Iterator[Call]:
    yield (_variables(4, 7),), {}
    yield (_variables(4, 7, dtype=torch.bfloat16),), {}


def _masked_calls() -> Iterator[Call]:
    yield (_variables(3, 5), _MASK.bool()), {}


def _whiten_calls() -> Iterator[Call]:
    yield (_variables(3, 5), _MASK), {}
    yield (_variables(3, 5), _MASK.bool()), {"shift_mean": False}


def _gae_calls() -> Iterator[Call]:
    yield (_numbers(3, 5), _numbers(5, 3).t().contiguous(), _MASK, 0.9, 0.8), {}


def _kl_calls() -> Iterator[Call]:
    for kind in ("k3", "low_var_kl", "k1"):
        yield (_variables(3, 5), 8 * _numbers(5, 3).t(), kind), {}


class _LossConfig:
    """What the loss reads of an actor's configuration."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.1, 0.3
    global_batch_info: ClassVar[dict[str, Any]] = {}

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


_MODES = [mode for mode in AGGREGATIONS if mode != "token-sum"]  # that one since verl 0.9


def _policy_loss_calls() -> Iterator[Call]:
    old = _numbers(3, 5) + 0.3 * _numbers(5, 3).t()
    args = (old, _variables(3, 5), _numbers(5, 3).t().contiguous(), _MASK.bool())
    for mode in _MODES:
        yield (*args, mode, _LossConfig()), {}


_FUSED = "verl.utils.experimental.torch_functional"
_CROSS_ENTROPY = "verl.utils.kernel.linear_cross_entropy"
_CROSS_ENTROPY_TAKES = (
    "hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None)"
)
_FUNCTIONAL = "verl.utils.torch_functional"
_MEGATRON = "verl.utils.megatron.tensor_parallel"
_ALGOS = "verl.trainer.ppo.core_algos"

_SHARED = "no operator of ours takes logits that are shared over tensor-parallel ranks"

_host = patching.add(
    Host(
        "verl",
        [(0, 9, 1)],
        [
            Replacement(
                f"{_FUSED}:FusedLinearForPPO.forward",
                "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
                _fused_linear,
                _head_calls,
                "log-probs and entropies of hidden states, by linear_logprob",
            ),
            Replacement(
                f"{_CROSS_ENTROPY}:linear_cross_entropy",
                f"(ctx, {_CROSS_ENTROPY_TAKES}",
                _linear_cross_entropy,
                _cross_entropy_calls,
                "the same on the CPU, where one rank holds the vocabulary, by linear_logprob",
                {f"({_CROSS_ENTROPY_TAKES}": _cross_entropy_calls},
                _log_softmax_and_entropy,
            ),
            Replacement(
                f"{_FUNCTIONAL}:logprobs_from_logits_v2",
                "(logits, labels)",
                _logprobs,
                _logprob_calls,
                "log-probs, by token_logprob",
            ),
            Replacement(
                f"{_FUNCTIONAL}:logprobs_from_logits_naive",
                "(logits, labels)",
                _logprobs,
                _logprob_calls,
                "log-probs, by token_logprob",
            ),
            Replacement(
                f"{_FUNCTIONAL}:entropy_from_logits",
                "(logits)",
                _entropy_from_logits,
                _entropy_calls,
                "entropies, by token_logprob",
            ),
            Replacement(
                f"{_FUNCTIONAL}:entropy_from_logits_with_chunking",
                "(logits, chunk_size=2048)",
                _chunked_entropy,
                _entropy_calls,
                "entropies, by token_logprob",
            ),
            Replacement(
                f"{_FUNCTIONAL}:masked_mean",
                "(values, mask, axis=None)",
                _masked_mean,
                _masked_calls,
                "the mean under a bool mask, by masked_mean",
            ),
            Replacement(
                f"{_FUNCTIONAL}:masked_whiten",
                "(values, mask, shift_mean=True)",
                _masked_whiten,
                _whiten_calls,
                "whitening with the statistics of masked_mean",
            ),
            Replacement(
                f"{_ALGOS}:compute_gae_advantage_return",
                "(token_level_rewards, values, response_mask, gamma, lam)",
                _gae,
                _gae_calls,
                "advantages and returns, by gae",
            ),
            Replacement(
                f"{_ALGOS}:kl_penalty_forward",
                "(logprob, ref_logprob, kl_penalty)",
                _kl,
                _kl_calls,
                "the k3 estimate, by kl_estimate",
            ),
        ],
        {
            f"{_FUNCTIONAL}:logprobs_from_logits": "it hands on to logprobs_from_logits_v2, which "
            "is replaced, or on GPUs to flash-attn's kernel where that is installed",
            f"{_ALGOS}:kl_penalty": "it takes its estimates from kl_penalty_forward, which is "
            "replaced",
            f"{_ALGOS}:agg_loss": "no operator of ours aggregates a loss that is made elsewhere, "
            "and 64 x 1024 numbers take 0.15 ms",
            f"{_ALGOS}:compute_value_loss": "a loss of verl's own that no registry holds",
            f"{_ALGOS}:compute_policy_loss_vanilla": "a loss of verl's own: select ours by "
            f"actor.policy_loss.loss_mode={LOSS}",
            f"{_MEGATRON}:vocab_parallel_log_probs_from_logits": _SHARED,
            f"{_MEGATRON}:vocab_parallel_entropy": _SHARED,
        },
        [
            Addition(
                f"{_ALGOS}:POLICY_LOSS_REGISTRY['{LOSS}']",
                "compute_policy_loss_vanilla",
                POLICY_LOSS_SIGNATURE,
                _policy_loss,
                _policy_loss_calls,
                _register,
                "the vanilla policy loss, by policy_loss",
            )
        ],
    )
)

patch, unpatch, patched = _host.patch, _host.unpatch, _host.patched
report, survey, check = _host.report, _host.survey, _host.check
