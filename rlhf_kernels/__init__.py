"""Exact, fast kernels for RLHF: per-token log-prob and KL, PPO, GAE and reward losses."""

from rlhf_kernels.backend import build_info
from rlhf_kernels.token_logprob import TokenLogprob, token_logprob

__version__ = "0.1.0"
__all__ = ["TokenLogprob", "build_info", "token_logprob"]
