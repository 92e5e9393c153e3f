"""Stand-ins for what OpenRLHF imports and a machine without a GPU cannot have: flash-attn, vllm.

As a plugin of pytest (``-p openrlhf_stubs``) it also patches OpenRLHF where the environment says so
(OPENRLHF_PATCH=1). The host's tests load its files under other names; what is loaded so is patched
as well, and OPENRLHF_CALLS names a file for the names of the replacements that were called.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F


def unpad_input(x, mask):
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), lengths


def pad_input(x, indices, batch, length):
    out = x.new_zeros(batch * length, *x.shape[1:])
    out[indices] = x
    return out.unflatten(0, (batch, length))


def rearrange(x, pattern, **sizes):
    from einops import rearrange

    return rearrange(x, pattern, **sizes)


class Anything:
    def __init__(self, *args, **kwargs):
        pass


FACES = {
    "flash_attn": {},
    "flash_attn.bert_padding": {
        "index_first_axis": lambda x, indices: x[indices],
        "pad_input": pad_input,
        "rearrange": rearrange,
        "unpad_input": unpad_input,
    },
    "flash_attn.utils": {},
    "flash_attn.utils.distributed": {"all_gather": lambda x, group=None: x},
    "vllm": dict.fromkeys("SamplingParams AsyncLLMEngine AsyncEngineArgs LLM".split(), Anything),
    "vllm.inputs": {"TokensPrompt": Anything},
    "vllm.utils": {"random_uuid": lambda: "0"},
}


def install():
    """Add those that are missing; a list of their names."""
    missing = [name for name in ("flash_attn", "vllm") if importlib.util.find_spec(name) is None]
    added = [name for name in FACES if name.partition(".")[0] in missing]
    for name in added:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__, module.__version__ = [], "0"
        vars(module).update(FACES[name])
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return added


def remove(names):
    for name in names:
        sys.modules.pop(name, None)


def _patch_other_names(calls):
    """Replace in modules that are made of the host's files under names that are not the host's."""
    from rlhf_kernels.integrations import openrlhf

    load = importlib.machinery.SourceFileLoader.exec_module

    def spied(name, ours):
        @functools.wraps(ours)
        def call(*args, **kwargs):
            with open(calls, "a") as file:
                file.write(f"{name}\n")
            return ours(*args, **kwargs)

        return call

    def exec_module(self, module):
        load(self, module)
        if module.__name__.startswith("openrlhf."):
            return
        for replacement in openrlhf.patch.__self__.replacements:
            file = replacement.module.replace(".", "/") + ".py"
            if str(module.__file__).endswith(file):
                owner, _, name = replacement.name.rpartition(".")
                holder = getattr(module, owner) if owner else module
                ours = replacement.make(getattr(holder, name), True)
                setattr(holder, name, spied(replacement.name, ours))

    importlib.machinery.SourceFileLoader.exec_module = exec_module


if os.environ.get("OPENRLHF_TESTS"):
    install()
if os.environ.get("OPENRLHF_CALLS"):
    from rlhf_kernels.integrations import openrlhf as _adapter

    _adapter.patch()
    _patch_other_names(Path(os.environ["OPENRLHF_CALLS"]))
