"""Exact, fast kernels for RLHF: per-token log-prob and KL, PPO, GAE and reward losses."""

from rlhf_kernels.backend import build_info
from rlhf_kernels.logprob_kl import LogprobKL, logprob_kl
from rlhf_kernels.token_logprob import TokenLogprob, token_logprob

__version__ = "0.1.0"
__all__ = ["LogprobKL", "TokenLogprob", "build_info", "logprob_kl", "token_logprob"]
