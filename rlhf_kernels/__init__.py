"""Exact, fast kernels for RLHF: per-token log-prob and KL, PPO, GAE and reward losses."""

from rlhf_kernels.backend import build_info
from rlhf_kernels.full_weight import full_weight
from rlhf_kernels.gae import GAE, gae
from rlhf_kernels.kl_estimate import kl_estimate
from rlhf_kernels.kl_shaped_rewards import kl_shaped_rewards
from rlhf_kernels.linear_logprob import linear_logprob
from rlhf_kernels.linear_token_loss import linear_token_loss
from rlhf_kernels.logprob_kl import LogprobKL, logprob_kl
from rlhf_kernels.masked_mean import masked_mean
from rlhf_kernels.masked_whiten import masked_whiten
from rlhf_kernels.pairwise_reward_loss import RewardStats, pairwise_reward_loss
from rlhf_kernels.policy_loss import PolicyStats, policy_loss
from rlhf_kernels.ranking_reward_loss import ranking_reward_loss
from rlhf_kernels.token_logprob import TokenLogprob, token_logprob
from rlhf_kernels.token_logprob_and_grad import (
    ClippedSurrogate,
    LogprobAndGrad,
    token_logprob_and_grad,
)
from rlhf_kernels.value_loss import ValueStats, value_loss

__version__ = "0.1.0"
__all__ = [
    "GAE",
    "ClippedSurrogate",
    "LogprobAndGrad",
    "LogprobKL",
    "PolicyStats",
    "RewardStats",
    "TokenLogprob",
    "ValueStats",
    "build_info",
    "full_weight",
    "gae",
    "kl_estimate",
    "kl_shaped_rewards",
    "linear_logprob",
    "linear_token_loss",
    "logprob_kl",
    "masked_mean",
    "masked_whiten",
    "pairwise_reward_loss",
    "policy_loss",
    "ranking_reward_loss",
    "token_logprob",
    "token_logprob_and_grad",
    "value_loss",
]
