"""The InstructGPT recipe in one file a stage, on transformers, accelerate and rlhf_kernels.

`sft.train_sft`, `reward.train_reward` and `ppo.train_ppo` are the three stages; each takes a config
from `config` and reads what it is not handed in memory from the files that the config names.
"""
