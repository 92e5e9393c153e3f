"""Thin packager: runs CMake and puts what it installs into the package. CMakeLists.txt decides."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake run builds every native file; setuptools only learns where they went."""

    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), *generator),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRK_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        jobs = str(self.parallel or os.cpu_count() or 1)
        for command in (
            configure,
            ["cmake", "--build", str(folder), "--parallel", jobs],
            ["cmake", "--install", str(folder), "--prefix", str(target)],
        ):
            subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "rlhf_kernels").glob("*.so")]


setup(ext_modules=[Extension("rlhf_kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
