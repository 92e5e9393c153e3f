"""Thin packager: runs CMake and puts what it installs into the package. CMakeLists.txt decides."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake run builds every native file; setuptools only learns where they went."""

    def run(self) -> None:
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        # One folder for each environment: CMake's cache holds the paths of its headers and torch.
        environment = f"{sys.implementation.cache_tag}-{zlib.crc32(sys.prefix.encode()):08x}"
        folder = ROOT / "build" / environment
        # cmake and ninja may come from pip into an environment that is not activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        ninja = shutil.which("ninja", path=path)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder)),
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRK_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        jobs = str(self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        for command in (
            configure,
            ["cmake", "--build", str(folder), "--parallel", jobs],
            ["cmake", "--install", str(folder), "--prefix", str(target)],
        ):
            try:
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except FileNotFoundError:
                sys.exit("cmake is missing: install CMake >= 3.25 (pip install cmake)")
            except subprocess.CalledProcessError as error:
                sys.exit(error.returncode)  # CMake has said why

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib, "rlhf_kernels")
        return [str(path) for suffix in ("so", "dylib") for path in folder.glob(f"*.{suffix}")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install runs the files where CMake put them


setup(ext_modules=[Extension("rlhf_kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
