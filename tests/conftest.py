"""Fixtures of every operator test: where it runs (``device``) and what runs (``backend``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_kernels.backend import INTERPRETING, why_not

# Under Triton's interpreter (a process of its own, with small shapes) only that backend is tested.
_ON_GPU = ["triton", "cuda"] if torch.cuda.is_available() else []
_BACKENDS = ["triton"] if INTERPRETING else ["reference", "cpu", *_ON_GPU]
_NEEDS = {"cpu": "cpu", "triton": "cpu" if INTERPRETING else "cuda", "cuda": "cuda"}


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors: ``"cpu"``, and ``"cuda"`` where there is one."""
    return request.param


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """A backend that runs on ``device``, for the argument ``backend=``.

    A backend that this installation lacks is skipped with the reason. One operator stands for all:
    an operator that misses in a library that is there fails its tests.
    """
    name = request.param
    if (needs := _NEEDS.get(name, device)) != device:
        pytest.skip(f"backend {name} needs {needs} tensors")
    if reason := why_not("token_logprob", name):
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture(scope="session", autouse=INTERPRETING)
def _interpreter_rounds_as_a_gpu_does():
    """Triton's interpreter cuts float32 off to bfloat16; GPUs round to nearest even."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest_even(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = torch.from_numpy(x.astype(numpy.float32)).to(torch.bfloat16).view(torch.int16)
        return bits.numpy().view(numpy.uint16)

    interpreter._convert_float = to_nearest_even
    with numpy.errstate(all="ignore"):
        yield
    interpreter._convert_float = convert


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under the interpreter: the tests of the operators alone."""
    if INTERPRETING:
        items[:] = [item for item in items if "backend" in getattr(item, "fixturenames", ())]


class _Lacking(pytest.Collector):
    """Stands for a folder of tests whose packages this interpreter lacks."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"the trainer needs {', '.join(_lacking())}")


def _lacking() -> list[str]:
    needed = "accelerate matplotlib numpy safetensors tokenizers tqdm transformers tyro yaml"
    return [name for name in needed.split() if find_spec(name) is None]


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Skip the trainer's tests as a whole where the extra ``train`` is not installed."""
    if path == Path(__file__).parent / "trainer" and _lacking():
        return _Lacking.from_parent(parent, name=path.name)
    return None
