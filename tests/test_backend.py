"""Which backend is taken where the caller names none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_kernels import backend
from rlhf_kernels.backend import Fastest, select
from rlhf_kernels.specs import SPECS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which everything can run; ``gpu(op, backend)`` takes one away."""
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)
    reasons = dict.fromkeys(backend._reasons)
    monkeypatch.setattr(backend, "_reasons", reasons)
    return lambda op, name: reasons.update({(op, name): "gone"})


def test_triton_serves_cuda_tensors_where_nothing_is_recorded(gpu, monkeypatch):
    monkeypatch.setattr(backend, "FASTEST", ())
    assert select("token_logprob", "cuda", None, torch.bfloat16, 151936) == "triton"
    gpu("token_logprob", "triton")
    assert select("token_logprob", "cuda", None, torch.bfloat16, 151936) == "cuda"
    assert select("token_logprob", "cpu", None, torch.bfloat16, 151936) == "cpu"


def test_recorded_backend_is_taken_for_its_op_dtype_and_size(gpu, monkeypatch):
    rows = (
        Fastest("token_logprob", torch.bfloat16, 100_000, "triton", "x.json"),
        Fastest("token_logprob", torch.bfloat16, 32_000, "cuda", "x.json"),
    )
    monkeypatch.setattr(backend, "FASTEST", rows)
    taken = [
        select("token_logprob", "cuda", None, torch.bfloat16, v) for v in (31999, 32000, 10**6)
    ]
    assert taken == ["triton", "cuda", "triton"]
    assert select("token_logprob", "cuda", None, torch.float32, 32000) == "triton"
    for op in ("token_logprob_and_grad", "linear_logprob", "linear_token_loss"):
        assert select(op, "cuda", None, torch.bfloat16, 32000) == "cuda"  # the same bits
    assert select("gae", "cuda", None, torch.bfloat16, 32000) == "triton"
    assert select("token_logprob", "cuda", "triton", torch.bfloat16, 32000) == "triton"
    gpu("token_logprob", "cuda")
    assert select("token_logprob", "cuda", None, torch.bfloat16, 32000) == "triton"


def test_nothing_but_the_reference(gpu, monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    gpu("gae", "triton")
    gpu("gae", "cuda")
    with pytest.warns(RuntimeWarning, match="gae runs on the plain PyTorch reference for cuda"):
        assert select("gae", "cuda") == "reference"
    with pytest.warns(RuntimeWarning, match="for xpu tensors: no xpu kernels"):
        monkeypatch.setattr(backend, "_warned", set())
        assert select("gae", "xpu") == "reference"


def test_records_stand_on_a_measurement():
    for row in backend.FASTEST:
        assert row.op in {spec.name for spec in SPECS}
        assert row.backend in ("triton", "cuda")
        assert row.op in (ROOT / "benchmarks" / "results" / row.result).read_text(), row
