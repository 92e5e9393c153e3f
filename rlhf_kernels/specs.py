"""All operators, one record each: what the tests, the benchmarks and ``python -m`` walk over."""

from rlhf_kernels.logprob_kl import SPEC as LOGPROB_KL
from rlhf_kernels.token_logprob import SPEC as TOKEN_LOGPROB

SPECS = (TOKEN_LOGPROB, LOGPROB_KL)
