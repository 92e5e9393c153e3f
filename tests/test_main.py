"""``python -m rlhf_kernels``: the report says what is there, and a wrong number turns it red."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_kernels
from rlhf_kernels import __main__ as report
from rlhf_kernels.backend import BACKENDS, LOADED, faulty, why_not
from rlhf_kernels.specs import SPECS
from rlhf_kernels.token_logprob import SPEC


def test_every_cpu_kernel_is_built():
    """The other tests skip a backend that is missing; this one says that none may be."""
    assert {spec.name: why_not(spec.name, "cpu") for spec in SPECS} == dict.fromkeys(
        (spec.name for spec in SPECS), None
    )


def test_every_built_library_loads():
    assert faulty == []


def test_report_of_a_sound_installation(capsys):
    status = report.main()
    text = capsys.readouterr().out
    assert status == 0, text
    assert text.endswith("all checks passed\n")
    assert torch.__version__ in text and rlhf_kernels.__version__ in text
    assert f"build simd                {rlhf_kernels.build_info()['simd']}" in text
    for spec in SPECS:
        available, checked = (line for line in text.splitlines() if f" {spec.name} " in line)
        cells = re.findall(r"yes|(?:no|loaded) \[\d+\]", available)
        assert cells[:2] == ["yes", "yes"] and checked.split().count("ok") == cells.count("yes")
        for backend, cell in zip(BACKENDS, cells, strict=True):
            reason = why_not(spec.name, backend)
            word, _, number = cell.partition(" ")
            assert word == ("yes" if reason is None else "loaded" if reason == LOADED else "no")
            assert reason is None or f"  {number} {reason}\n" in text


def test_integrations_are_surveyed(capsys):
    """Trainers that are not installed are named as such; each adapter's own tests are elsewhere."""
    assert report.main(["integrations"]) == 0
    text = capsys.readouterr().out
    for name in ("trl", "verl", "openrlhf"):
        assert (f"{name} is not installed\n" in text) == (find_spec(name) is None)
    assert report.main(["integration"]) == 2
    assert "got integration" in capsys.readouterr().err


def adapter_line(text: str, name: str) -> str:
    _, _, below = text.partition("Adapters, in the libraries")
    (line,) = (line for line in below.splitlines() if line.startswith(f"  {name} "))
    return line


@pytest.mark.parametrize("where", ["logprob", "patch", "import"])
def test_an_adapter_that_is_broken_turns_the_check_red(monkeypatch, capsys, where):
    """24. The adapters are called: transformers 5.24 broke one, and all was said to be well."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    adapter = importlib.import_module("rlhf_kernels.integrations.transformers")
    monkeypatch.setattr(report, "SPECS", (SPEC,))
    assert report.main() == 0
    line = adapter_line(capsys.readouterr().out, "transformers")
    assert version("transformers") in line and "FAILED" not in line
    if where == "logprob":
        ours = adapter.linear_logprob
        worse = lambda *args, **options: type(out := ours(*args, **options))(out[0] + 1e-6, out[1])  # noqa: E731
        monkeypatch.setattr(adapter, "linear_logprob", worse)
    elif where == "patch":

        def output(values):
            raise TypeError("unexpected keyword argument 'cache'\non another line")

        monkeypatch.setattr(adapter, "_logprob_output_of", output)
    else:
        monkeypatch.setitem(sys.modules, adapter.__name__, None)
    assert report.main() == 1
    text = capsys.readouterr().out
    assert text.endswith("a check FAILED\n")
    message = {
        "logprob": "error 1.0e-06",
        "patch": "'cache' on another line",
        "import": adapter.__name__,
    }
    assert "FAILED" in adapter_line(text, "transformers")
    assert message[where] in adapter_line(text, "transformers")


def wrong_on_cpu(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """token_logprob whose cpu backend passes its result through ``change``."""

    def function(*, backend: str, **inputs: Any) -> Tensor:
        out = SPEC.function(**inputs, backend=backend)
        return change(out) if backend == "cpu" else out

    return function


def explode(x: Tensor) -> Tensor:
    raise FloatingPointError("on purpose")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 1e-4, "error 1.0"),
        (lambda x: x * torch.where(x == 0, torch.nan, 1.0), "error inf"),
        (lambda x: x + 0.01 * (x - x.detach()), "error"),  # right value, wrong gradient
        (explode, "FloatingPointError: on purpose"),
    ],
    ids=["value", "nan", "gradient", "exception"],
)
def test_a_wrong_result_turns_the_check_red(monkeypatch, capsys, change, message):
    broken = dataclasses.replace(SPEC, function=wrong_on_cpu(change))
    gae = next(spec for spec in SPECS if spec.name == "gae")
    monkeypatch.setattr(report, "SPECS", (broken, gae))
    assert report.main() == 1
    text = capsys.readouterr().out
    assert text.endswith("a check FAILED\n")
    assert "FAILED [1]" in text and "  [1] token_logprob, cpu, " in text and message in text
    assert any(line.split()[:2] == ["gae", "ok"] for line in text.splitlines())
