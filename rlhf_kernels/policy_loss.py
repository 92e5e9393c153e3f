"""policy_loss: PPO, CISPO and REINFORCE with KL and entropy terms, in one pass over the tokens."""

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
from rlhf_kernels.kl_estimate import KINDS, kl_estimate_reference
from rlhf_kernels.opspec import Inputs, Maker, OpSpec, Sample, total_bytes
from rlhf_kernels.stats import merge, merge_from_zero

OBJECTIVES = ("ppo", "cispo", "reinforce")  # the order of enum Objective in csrc/math/policy.h
RATIO_LEVELS = ("token", "sequence")


class PolicyStats(NamedTuple):
    """Sums over valid tokens, each a float64 tensor of one element; ``+`` merges two of them.

    float64 because a count in float32 stops growing at 2^24, which a few merged batches reach.
    """

    token_count: Tensor
    clip_count: Tensor
    kl_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor

    def __add__(self, other: PolicyStats) -> PolicyStats:  # type: ignore[override]
        return merge(self, other)

    def __radd__(self, start: Any) -> PolicyStats:
        return merge_from_zero(self, start)

    @property
    def clip_frac(self) -> Tensor:
        """Share of tokens where the clip binds: r > 1 + high with A > 0, r < 1 - low with A < 0."""
        return self.clip_count / self.token_count.clamp(min=1)

    @property
    def approx_kl(self) -> Tensor:
        """Mean k3 estimate of KL(old || new), in nats."""
        return self.kl_sum / self.token_count.clamp(min=1)

    @property
    def ratio_mean(self) -> Tensor:
        return self.ratio_sum / self.token_count.clamp(min=1)


class _Options(NamedTuple):
    """The numbers of a call, in the order of the operator's schema; inf: no bound."""

    objective: int  # index into OBJECTIVES
    by_sequence: bool
    low: float
    high: float
    dual: float
    clamp: float
    kl_kind: int  # index into KINDS
    kl_coef: float
    entropy_coef: float


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    objective: str = "ppo",
    ratio_level: str = "token",
    log_ratio_clamp: float | None = None,
    importance_weight: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Policy-gradient loss of each valid token, aggregated, with r = exp(logprob - old_logprob).

        ppo        max(-A r, -A clip(r, 1 - low, 1 + high)), and <= -A c where A < 0   (dual_clip c)
        cispo      -stopgrad(clip(r, 1 - low, 1 + high)) A logprob
        reinforce  -A logprob
        loss       w objective + kl_coef kl(logprob, ref_logprob) - entropy_coef entropy

    PPO: Schulman et al. 2017, equation 7. Dual clip: Ye et al. 2020. Unequal bounds: DAPO. Sequence
    ratios: GSPO, r = exp(mean of the sequence's log-ratios). CISPO: MiniMax-M1.

    On the edge of the clip (r = 1 + high) the gradient is the unclipped one, -A r. Where the clip
    binds, a ratio that overflows leaves loss and gradient finite; where it does not (A < 0, r huge)
    the loss is infinite unless ``dual_clip`` or ``log_ratio_clamp`` bounds it.

    As a term of the loss only k2 has the gradient of KL(policy || reference) in expectation. k1 has
    an expected gradient of zero, and k3 that of KL(reference || policy) (see ``kl_estimate``).

    Args:
        logprob: log-probabilities under the policy, in nats; differentiable; (B, T), whose rows are
            the sequences, or packed (N,).
        old_logprob: those of the policy that drew the tokens; constant. None (reinforce only): the
            statistics are those of ratio 1.
        advantages: A, constant; the shape of ``logprob``, like every tensor below.
        mask: non-zero where a token counts; None: everywhere. What stands elsewhere, NaN included,
            reaches no result and no gradient.
        clip_low: low >= 0; None: no lower bound (CISPO's usual form).
        clip_high: high >= 0; None: as ``clip_low``, so with both None nothing is clipped.
        dual_clip: c > 1, ppo only.
        objective: ppo | cispo | reinforce.
        ratio_level: token | sequence.
        log_ratio_clamp: c > 0; the log-ratio (with ratio_level sequence: its mean) is bounded to
            [-c, c] before it is exponentiated, and has no gradient outside. It does not bound the
            KL term.
        importance_weight: w, constant.
        ref_logprob: log-probabilities under the reference, constant; needed when kl_coef is not 0.
        kl_kind: k1 | k2 | k3.
        entropy: of each position, in nats; differentiable; needed when entropy_coef is not 0.
        aggregation: with l the loss of a token, n the number of valid tokens of a sequence, N that
            of all and S the number of sequences that have one: token-mean: sum l / N; token-sum:
            sum l; seq-mean-token-sum: sum l / S; seq-mean-token-mean: sum (l / n) / S;
            seq-mean-token-sum-norm: sum l / (S max_length).
        normalizer: global denominator (number >= 0 or one-element tensor, constant) in place of the
            local N (token-*) or S (seq-*); token-sum divides by it when given; 0 gives 0. With it
            the losses of micro-batches and ranks add up to the loss of the whole batch.
        max_length: of seq-mean-token-sum-norm (Dr.GRPO) alone: T by default, required when packed.
        cu_seqlens: (S + 1,) int32 or int64, where the packed sequences start, and N at the end; may
            be left out where neither aggregation nor ratio_level asks for sequences.
        backend: reference | cpu | triton | cuda; None chooses (see rlhf_kernels.backend).

    Returns:
        (loss, PolicyStats); loss is 0-d, float32 (float64 if an input is float64), and 0 with zero
        gradients when nothing is valid. approx_kl is taken token by token at either ratio level.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit; nothing is computed then.
    """
    checks.floating("logprob", logprob)
    checks.choice("objective", objective, OBJECTIVES)
    checks.choice("ratio_level", ratio_level, RATIO_LEVELS)
    checks.choice("kl_kind", kl_kind, KINDS)
    if old_logprob is None and objective != "reinforce":
        raise ValueError(f"old_logprob: expected a tensor with objective={objective!r}, got None")
    if advantages is None:
        raise TypeError("advantages: expected a tensor, got NoneType")
    _check_like("old_logprob", old_logprob, logprob)
    _check_like("advantages", advantages, logprob)
    _check_like("importance_weight", importance_weight, logprob)
    ref_logprob = _check_term("ref_logprob", ref_logprob, "kl_coef", kl_coef, logprob)
    entropy = _check_term("entropy", entropy, "entropy_coef", entropy_coef, logprob)
    by_sequence = ratio_level == "sequence"
    reduction = _aggregation.check_reduction(
        "logprob",
        logprob,
        mask,
        aggregation,
        normalizer,
        max_length,
        cu_seqlens,
        needs_sequences=by_sequence,
    )
    if clip_low is not None:
        checks.number("clip_low", clip_low, 0.0)
    if clip_high is not None:
        checks.number("clip_high", clip_high, 0.0)
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, 1.0, open_low=True)
    if log_ratio_clamp is not None:
        checks.number("log_ratio_clamp", log_ratio_clamp, 0.0, open_low=True)
    clip_high = clip_low if clip_high is None else clip_high
    chosen = _backend.select("policy_loss", logprob.device.type, backend)
    coefs = None
    if chosen != "reference" and torch.compiler.is_compiling():
        both = (kl_coef, entropy_coef)
        coefs = torch.stack([checks.as_tensor(x, logprob, torch.float64) for x in both])
        kl_coef = entropy_coef = 0.0
    tensors = (old_logprob, advantages, importance_weight, ref_logprob)
    bounds: tuple[Any, ...] = (
        0.0 if clip_low is None else checks.AroundOne(-1, clip_low),
        torch.inf if clip_high is None else checks.AroundOne(1, clip_high),
        torch.inf if dual_clip is None else float(dual_clip),
        torch.inf if log_ratio_clamp is None else float(log_ratio_clamp),
    )
    numbers = None
    if chosen == "reference":
        bounds = checks.graph_numbers(logprob, _dtype(logprob, entropy, *tensors), *bounds)
    else:
        found, numbers = checks.separated(reduction.normalizer_value, *bounds, 0.0, 0.0)
        bounds = found[1:5]
    low, high, dual, clamp = bounds
    options = _Options(
        OBJECTIVES.index(objective),
        by_sequence,
        low,
        high,
        dual,
        clamp,
        KINDS.index(kl_kind),
        float(kl_coef),
        float(entropy_coef),
    )
    constants = (*tensors, *reduction, *options, coefs)
    if chosen == "reference":
        loss, stats = policy_loss_reference(logprob, entropy, *tensors, reduction, options)
    elif wants_gradient(logprob, entropy):
        loss, stats = _PolicyLoss.apply(chosen, logprob, entropy, constants, numbers)
    else:
        arguments = (numbers, logprob, entropy, *constants, False, False)
        loss, stats, _, _ = call_constant(_backend.call, chosen, "policy_loss_fwd", *arguments)
    return loss, PolicyStats(*stats.unbind()[:5])


def _check_like(name: str, x: Any, logprob: Tensor) -> None:
    if x is not None:
        checks.floating(name, x, logprob.device)
        checks.shape(name, x, logprob.shape, "to match logprob")


def _check_term(name: str, x: Any, coef_name: str, coef: Any, logprob: Tensor) -> Tensor | None:
    """The tensor of an optional term of the loss; None where its coefficient is 0."""
    _check_like(name, x, logprob)
    checks.number(coef_name, coef)
    if coef == 0:
        return None
    if x is None:
        raise ValueError(f"{name}: expected a tensor with {coef_name}={coef}, got None")
    return x


def policy_loss_reference(
    logprob: Tensor,
    entropy: Tensor | None,
    old_logprob: Tensor | None,
    advantages: Tensor,
    importance_weight: Tensor | None,
    ref_logprob: Tensor | None,
    reduction: Reduction,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """The specification: plain PyTorch, differentiated by plain autograd."""
    dtype = _dtype(logprob, entropy, old_logprob, advantages, importance_weight, ref_logprob)
    valid = _aggregation.valid_tokens(logprob, reduction)

    def select(x: Tensor) -> Tensor:  # first: what stands at a masked place takes part in nothing
        return torch.where(valid, x.to(dtype), 0.0)

    objective, clamp = OBJECTIVES[options.objective], options.clamp
    new, a = select(logprob), select(advantages.detach())
    log_ratio = torch.zeros_like(new)
    if old_logprob is not None:
        log_ratio = new - select(old_logprob.detach())
    x = log_ratio.detach().clamp(-clamp, clamp)
    if options.by_sequence:
        lengths = _aggregation.segment_sum(valid.to(dtype), reduction.cu_seqlens).clamp(min=1)
        means = _aggregation.segment_sum(log_ratio, reduction.cu_seqlens) / lengths
        log_ratio = _aggregation.spread(means, reduction.cu_seqlens, new)
    log_ratio = log_ratio.clamp(-clamp, clamp)
    r = log_ratio.detach().exp()
    loss = _objective_reference(objective, new, log_ratio, r, a, options)
    if importance_weight is not None:
        loss = loss * select(importance_weight.detach())
    if ref_logprob is not None:
        ref = select(ref_logprob.detach())
        kl = kl_estimate_reference(new, ref, KINDS[options.kl_kind], None)
        loss = loss + options.kl_coef * kl
    if entropy is not None:
        loss = loss - options.entropy_coef * select(entropy)
    total = _aggregation.aggregate_reference(torch.where(valid, loss, 0.0), valid, reduction)

    clipped = ((a > 0) & (r > options.high)) | ((a < 0) & (r < options.low))
    counts = (valid, clipped & (objective != "reinforce"), torch.expm1(x) - x, r)
    sums = [torch.where(valid, y, 0.0).double().sum() for y in counts]
    r_max = torch.cat([torch.where(valid, r, 0.0).flatten(), r.new_zeros(1)]).amax().double()
    return total, torch.stack([*sums, r_max])


def _objective_reference(
    objective: str, new: Tensor, log_ratio: Tensor, r: Tensor, a: Tensor, options: _Options
) -> Tensor:
    if objective == "reinforce":
        return -a * new
    if objective == "cispo":
        return -a * r.clamp(options.low, options.high) * new
    # max(-A r, -A clip(r)) = -A clip(r, bounds that depend on the sign of A). The exponential is
    # taken anew where r is inside, so that an overflow outside gives no 0 * inf = NaN.
    least = torch.zeros_like(a).masked_fill(a < 0, options.low)
    most = (torch.zeros_like(a) + options.high).masked_fill(a < 0, options.dual)
    outside = (r < least) | (r > most)
    bound = torch.minimum(torch.maximum(r, least), most)
    return -a * torch.where(outside, bound, log_ratio.masked_fill(outside, 0.0).exp())


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    return checks.accumulation_dtype(*(x for x in tensors if x is not None))


def _forward_fake(logprob, entropy, old_logprob, advantages, importance_weight, ref_logprob, *rest):
    need, need_entropy = rest[-2:]
    dtype = _dtype(logprob, entropy, old_logprob, advantages, importance_weight, ref_logprob)
    return (
        logprob.new_empty((), dtype=dtype),
        logprob.new_empty(6, dtype=torch.float64),
        logprob.new_empty(logprob.shape if need else (0,), dtype=dtype),
        logprob.new_empty(logprob.shape if need_entropy else (0,), dtype=dtype),
    )


# Forward, 17 bytes a token in float32 with a mask: read logprob, old_logprob, advantages and the
# mask, write the coefficient d loss / d logprob but for the denominator, which is known only after
# the last token: totals are the five statistics and its inverse. Backward, 8 bytes: coefficient
# times grad / denominator. coefs holds kl_coef and entropy_coef where they are not numbers.
_backend.define(
    "policy_loss",
    {
        "policy_loss_fwd": (
            "(Tensor logprob, Tensor? entropy, Tensor? old_logprob, Tensor advantages, "
            f"Tensor? importance_weight, Tensor? ref_logprob, {_aggregation.SCHEMA}, "
            "int objective, bool by_sequence, float low, float high, float dual, float clamp, "
            "int kl_kind, float kl_coef, float entropy_coef, Tensor? coefs, bool need, "
            "bool need_entropy) "
            "-> (Tensor loss, Tensor totals, Tensor coefficient, Tensor entropy_coefficient)",
            _forward_fake,
        ),
        "policy_loss_bwd": (
            "(Tensor grad, Tensor totals, Tensor coefficient) -> Tensor",
            lambda grad, totals, coefficient: torch.empty_like(coefficient),
        ),
    },
)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend, logprob, entropy, constants, numbers):
        # The constants are in a tuple, as autograd looks at each argument.
        ctx.ops = _backend.operators[backend]
        arguments = (logprob, entropy, *constants, *ctx.needs_input_grad[1:3])
        loss, totals, *coefficients = _backend.call(backend, "policy_loss_fwd", numbers, *arguments)
        ctx.save_for_backward(loss, totals, *coefficients)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad, _):
        grads: list[Tensor | None] = [None] * 5
        if grad is not None:
            _, totals, *coefficients = ctx.saved_tensors
            for i, coefficient in enumerate(coefficients, start=1):
                if ctx.needs_input_grad[i]:
                    grads[i] = ctx.ops.policy_loss_bwd(grad, totals, coefficient)
        return tuple(grads)


def _samples(make: Maker) -> Iterator[Sample]:
    def case(why: str, *shape: int, terms: bool = False, **extra: Any) -> Sample:
        logprob = make.randn(*shape)
        inputs: Inputs = {
            "logprob": logprob,
            "old_logprob": (logprob + make.randn(*shape, scale=0.3)).to(logprob.dtype),
            "advantages": make.randn(*shape),
        }
        if terms:
            inputs["importance_weight"] = make.uniform(*shape, high=2.0)
            inputs["ref_logprob"] = (logprob + make.randn(*shape, scale=0.3)).to(logprob.dtype)
            inputs["entropy"] = make.uniform(*shape, high=4.0)
            inputs |= {"kl_coef": 0.3, "entropy_coef": 0.2}
        return Sample({**inputs, **extra}, why)

    offsets = make.tensor([0, 5, 5, 6, 23], torch.int32)
    yield case("defaults, no mask", 2, 5)
    yield case("37: vectors and a rest; every term, k3", 3, 37, terms=True, mask=make.mask(3, 37))
    yield case("k1, bounds of their own", 3, 37, terms=True, kl_kind="k1", clip_high=0.28)
    yield case(
        "k2, sequence mean of token sums",
        3,
        37,
        terms=True,
        kl_kind="k2",
        aggregation="seq-mean-token-sum",
        mask=make.mask(3, 37),
    )
    yield case("dual clip, ratios bounded", 3, 9, dual_clip=1.2, log_ratio_clamp=0.4)
    yield case("reinforce without old", 4, 9, objective="reinforce", old_logprob=None)
    for objective in OBJECTIVES:
        yield case(
            f"{objective}, sequence ratios, packed, one sequence empty",
            23,
            terms=True,
            objective=objective,
            ratio_level="sequence",
            cu_seqlens=offsets,
            mask=make.mask(23),
            aggregation="seq-mean-token-mean",
            clip_low=0.05,
        )
    yield case("cispo without lower bound", 4, 9, objective="cispo", clip_low=None, clip_high=0.1)
    yield case(
        "sequences of 1100: two blocks each",
        2,
        1100,
        ratio_level="sequence",
        clip_low=0.01,
        mask=make.mask(2, 1100),
        aggregation="seq-mean-token-sum-norm",
        max_length=2000,
    )
    yield case("packed tokens in one run; global denominator", 700, normalizer=1000)
    yield case(
        "token sum over a tensor", 3, 5, aggregation="token-sum", normalizer=make.tensor(7.0)
    )
    yield case("nothing valid", 3, 5, terms=True, mask=make.mask(3, 5, keep=0.0))
    yield case("no sequences", 0, 5)
    yield case("no tokens", 3, 0, aggregation="seq-mean-token-mean")
    yield case(
        "strided", 9, 4, logprob=make.randn(4, 9).T, advantages=make.randn(9, 1).expand(9, 4)
    )


def _bench(make: Maker) -> Iterator[Sample]:
    tensors: Inputs = {"logprob": make.randn(64, 1024), "advantages": make.randn(64, 1024)}
    noise = make.randn(64, 1024, scale=0.1)
    old = (tensors["logprob"] + noise).to(noise.dtype)
    yield Sample({**tensors, "old_logprob": old, "mask": make.mask(64, 1024)}, "64 x 1024")


SPEC = OpSpec(
    name="policy_loss",
    function=policy_loss,
    samples=_samples,
    bench=_bench,
    differentiable=("logprob", "entropy"),
    # the coefficient is written, read, and the gradient written, in float32
    bytes_backward=lambda inputs: total_bytes(inputs) + 12 * inputs["logprob"].numel(),
    # differences see the ratio that CISPO keeps from the gradient
    smooth=lambda inputs: inputs.get("objective") != "cispo",
)
