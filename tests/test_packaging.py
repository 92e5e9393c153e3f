"""The package as others get it: the wheel, a copy without the extension, each SIMD level."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from rlhf_kernels.backend import select

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("baseline", "avx2", "avx512")


def run(
    *arguments: str | Path, cwd: Path, package: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds rlhf_kernels in ``package`` and everything else as here.

    Without site (-S) no .pth file is read: an editable install would lend its extension to a copy
    of the package that has none.
    """
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_KERNELS_")}
    env |= {"PYTHONPATH": os.pathsep.join([str(package), *installed]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True)


def lacking(*modules: str) -> str | None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"this interpreter has no {', '.join(missing)}" if missing else None


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A folder with a copy of the package that was never built."""
    ignore = shutil.ignore_patterns("*.so", "*.dylib", "__pycache__")
    shutil.copytree(ROOT / "rlhf_kernels", tmp_path / "copy" / "rlhf_kernels", ignore=ignore)
    return tmp_path / "copy"


def test_wheel_works_elsewhere(tmp_path):
    if reason := lacking("pip", "setuptools"):
        pytest.skip(reason)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    pip = [sys.executable, "-m", "pip"]
    # As in this folder, so that nothing is compiled twice.
    architectures = rlhf_kernels.build_info().get("cuda_architectures", "").replace(" ", ";")
    cuda = {"RLHF_KERNELS_CUDA": str(int(bool(architectures)))}
    cuda |= {"RLHF_KERNELS_CUDA_ARCH": architectures}
    command = [*pip, "wheel", *options, "-w", tmp_path, ROOT]
    subprocess.run(command, env=os.environ | cuda, check=True)
    (wheel,) = tmp_path.glob("rlhf_kernels-*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        binaries = {Path(n).name: archive.read(n) for n in names if n.endswith((".so", ".dylib"))}
        (points,) = (archive.read(n).decode() for n in names if n.endswith("/entry_points.txt"))
    packages = {"rlhf_kernels", "rlhf_kernels_verl", "rlhf_trainer"}
    assert {n.split("/")[0].split("-")[0] for n in names} == packages
    assert "[verl.plugins]\nrlhf_kernels = rlhf_kernels_verl" in points
    libraries = ["librlhf_kernels_cpu", *(["librlhf_kernels_cuda"] if architectures else [])]
    assert sorted(name.split(".")[0] for name in binaries) == ["_C", *libraries]
    for name, content in binaries.items():
        assert str(ROOT).encode() not in content, f"{name} names the folder it was built in"
    for folder in (ROOT, ROOT / "python"):
        modules = {str(p.relative_to(folder)) for p in folder.glob("rlhf_*/**/*.py")}
        assert modules and modules <= set(names)
    assert "rlhf_kernels/py.typed" in names

    target = tmp_path / "target"
    options = ("--no-deps", "--no-index", "--quiet", "--target")
    subprocess.run([*pip, "install", *options, target, wheel], check=True)
    where = "import rlhf_kernels, rlhf_trainer as t; print(rlhf_kernels.__file__, t.__file__)"
    found = run("-c", where, cwd=tmp_path, package=target).stdout.split()
    assert len(found) == 2 and all(Path(path).is_relative_to(target) for path in found)
    check = run("-m", "rlhf_kernels", cwd=tmp_path, package=target)
    assert check.returncode == 0, check.stdout + check.stderr


def test_without_the_extension_the_reference_runs(without_extension, tmp_path):
    script = """
import torch, warnings, rlhf_kernels
assert "error" in rlhf_kernels.build_info()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        logprob = rlhf_kernels.token_logprob(torch.zeros(1, 2), torch.tensor([1]))
print(logprob.item(), *[f"{w.category.__name__}: {w.message}" for w in caught], sep="\\n")
"""
    result = run("-c", script, cwd=tmp_path, package=without_extension)
    assert result.returncode == 0, result.stderr
    value, *warned = result.stdout.splitlines()
    assert float(value) == pytest.approx(-0.6931472)  # log 1/2
    assert len(warned) == 1
    assert warned[0].startswith("RuntimeWarning: token_logprob runs on the plain PyTorch reference")
    assert "is not built" in warned[0]


def test_without_the_extension_the_report_says_why(without_extension, tmp_path):
    result = run("-m", "rlhf_kernels", cwd=tmp_path, package=without_extension)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "build error" in result.stdout
    if torch.cuda.is_available():
        return  # then other backends run
    cells = next(line.split() for line in result.stdout.splitlines() if " gae " in line)
    assert cells == ["gae", "yes", "no", "[1]", "no", "[2]", "no", "[3]"]
    for number, reason in enumerate(("is not built", "triton", "cuda"), 1):
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"  [{number}] "))
        assert reason in line.lower()


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_asking_for_a_backend_that_cannot_run_raises(without_extension, tmp_path, broken):
    if broken:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        library = without_extension / "rlhf_kernels" / f"librlhf_kernels_cpu.{suffix}"
        library.write_bytes(b"not a library")
    script = "import torch, rlhf_kernels as r; r.gae(torch.zeros(1, 2), torch.zeros(1, 2))"
    result = run("-c", script, cwd=tmp_path, package=without_extension, RLHF_KERNELS_BACKEND="cpu")
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: RLHF_KERNELS_BACKEND: 'cpu' cannot run gae: librlhf")
    cause = "file too short" if sys.platform == "linux" else ""
    assert ("does not load" if broken else "is not built") in error
    assert not broken or cause in error  # the first one, not that loading failed
    assert ("RuntimeWarning: librlhf" in result.stderr) == broken
    status = run("-m", "rlhf_kernels", cwd=tmp_path, package=without_extension).returncode
    assert status == int(broken)  # what is not built is no fault; what does not load is one


def test_unknown_backend(monkeypatch):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"backend: expected one of reference, cpu.* got 'gpu'"):
        rlhf_kernels.gae(x, x, backend="gpu")
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"RLHF_KERNELS_BACKEND: expected one of .* got 'gpu'"):
        rlhf_kernels.gae(x, x)


def test_order_of_choice(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    assert select("gae", "cpu", "cpu") == "cpu"
    assert select("gae", "cpu") == "reference"
    monkeypatch.delenv("RLHF_KERNELS_BACKEND")
    assert select("gae", "cpu") == "cpu"


def test_build_info():
    info = rlhf_kernels.build_info()
    keys = "version compiler flags simd_levels simd cuda_architectures stable_abi"
    assert set(info) == set(keys.split())
    assert info["version"] == rlhf_kernels.__version__
    assert info["stable_abi"] == "2.10"
    assert info["simd"] in info["simd_levels"].split()


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_passes_the_self_check(level, tmp_path):
    info = rlhf_kernels.build_info()
    if level not in info["simd_levels"].split():
        pytest.skip(f"this build has no {level} kernels")
    best = "import rlhf_kernels; print(rlhf_kernels.build_info()['simd'])"
    found = run("-c", best, cwd=tmp_path, package=ROOT).stdout.strip()
    if LEVELS.index(level) > LEVELS.index(found):
        pytest.skip(f"this processor has no {level}")
    result = run("-m", "rlhf_kernels", cwd=tmp_path, package=ROOT, RLHF_KERNELS_SIMD=level)
    assert f"build simd                {level}\n" in result.stdout
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_unknown_simd_level_is_named(tmp_path):
    if "error" in rlhf_kernels.build_info():
        pytest.skip("the extension is not built")
    code = "import rlhf_kernels; rlhf_kernels.build_info()"
    result = run("-c", code, cwd=tmp_path, package=ROOT, RLHF_KERNELS_SIMD="avx3")
    assert "RLHF_KERNELS_SIMD: expected baseline, avx2 or avx512, got avx3" in result.stderr
