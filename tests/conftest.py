"""Fixtures of every operator test: where it runs (``device``) and what runs (``backend``)."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_kernels import linear_chunks
from rlhf_kernels.backend import INTERPRETING, faulty, why_not

# Under Triton's interpreter (a process of its own, with small shapes) only that backend is tested.
_GPU = torch.cuda.is_available() and not INTERPRETING
_BACKENDS = ["triton"] if INTERPRETING else ["reference", "cpu", *(["triton", "cuda"] * _GPU)]
_NEEDS = {"cpu": "cpu", "triton": "cpu" if INTERPRETING else "cuda", "cuda": "cuda"}


@pytest.fixture(params=["cpu", "cuda"] if _GPU else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors: ``"cpu"``, and ``"cuda"`` where there is one."""
    return request.param


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """A backend that runs on ``device``, for the argument ``backend=``.

    A backend that this installation lacks is skipped with the reason; a library that is built and
    does not load fails. One operator stands for all:
    an operator that misses in a library that is there fails its tests (in that of CUDA, which has
    not got all, it skips them). A test that does not ask for ``device`` makes CPU tensors.
    """
    name = request.param
    if device != "cpu" and "device" not in inspect.signature(request.function).parameters:
        pytest.skip("this test is about CPU tensors")
    if (needs := _NEEDS.get(name, device)) != device:
        pytest.skip(f"backend {name} needs {needs} tensors")
    if reason := why_not("token_logprob", name):
        (pytest.fail if reason in faulty else pytest.skip)(f"backend {name}: {reason}")
    return name


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Skip where an operator has no CUDA kernel of its own (test_gpu.py says which have one)."""
    try:
        return (yield)
    except RuntimeError as error:  # of the compiler too, which quotes it
        reason = re.search(r"'cuda' cannot run \w+: no CUDA kernel is registered", str(error))
        if reason is None:
            raise
        pytest.skip(reason[0])


@pytest.fixture(params=["products of 16 bits", "products in float32"])
def products(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16 bits on CPUs with products of 16 bits and without them, whatever this one has."""
    has_them = request.param == "products of 16 bits"
    if not has_them and (device != "cpu" or INTERPRETING):
        pytest.skip("this is about the kernels of CPUs")
    monkeypatch.setattr(linear_chunks, "_cpu_multiplies", lambda dtype: has_them)


@pytest.fixture
def gpu_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[float], None]]:
    """``gpu_memory(gibibytes)`` skips unless the GPU has so much free.

    Of the tests that use this fixture one runs at a time, whichever process it is in.
    """
    import fcntl

    with (tmp_path_factory.getbasetemp().parent / "gpu_memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def need(gibibytes: float) -> None:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 2**30
            if free < gibibytes:
                pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.1f} are free")

        yield need
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=INTERPRETING)
def _interpreted_heads_are_those_of_a_gpu():
    """Whose products are of 16 bits, and whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_chunks, "_cpu_multiplies", lambda dtype: True)
        patch.setattr(linear_chunks, "_cpu_takes_blocks", lambda: False)
        yield


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


@pytest.fixture(scope="session", autouse=INTERPRETING)
def _interpreter_scans_as_a_gpu_does():
    """All steps of a block at once, in a tree; its own scan takes them one by one, in Python."""
    import numpy
    from triton.runtime import interpreter

    def scan(self, inputs):
        (size,) = inputs[0].handle.data.shape
        found, distance = inputs, 1
        while distance < size:
            data = [x.handle.data for x in found]
            earlier = [
                self.to_tensor(numpy.roll(x, distance), t.dtype)
                for x, t in zip(data, inputs, strict=True)
            ]
            first = numpy.arange(size) < distance
            found = [
                self.to_tensor(numpy.where(first, x, y.handle.data), y.dtype)
                for x, y in zip(data, self.combine_fn.fn(*earlier, *found), strict=True)
            ]
            distance *= 2
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ScanOps, "generic_scan", scan)
        yield


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
