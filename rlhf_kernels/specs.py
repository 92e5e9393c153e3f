"""All operators, one record each: what the tests, the benchmarks and ``python -m`` walk over."""

import importlib

from rlhf_kernels.opspec import OpSpec

# By module: the functions of the package have the names of their modules.
SPECS: tuple[OpSpec, ...] = tuple(
    importlib.import_module(f"rlhf_kernels.{name}").SPEC
    for name in (
        "token_logprob",
        "token_logprob_and_grad",
        "logprob_kl",
        "linear_logprob",
        "linear_token_loss",
        "kl_estimate",
        "policy_loss",
        "value_loss",
        "gae",
        "kl_shaped_rewards",
        "masked_mean",
        "masked_whiten",
        "pairwise_reward_loss",
        "ranking_reward_loss",
    )
)
