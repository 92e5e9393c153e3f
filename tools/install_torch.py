"""Install torch into the environment of this interpreter: a CPU build, unless told otherwise.

    python tools/install_torch.py                       # the version that the tests run with
    python tools/install_torch.py 'torch==2.11.0'       # a pip requirement, pip options may follow

On Linux the torch that pip finds by itself is mostly the CUDA build: gigabytes that a machine
without a GPU has no use for. So a plain ``torch==X.Y.Z`` is resolved first. If pip's answer brings
no CUDA packages (not Linux, or pip is configured for CPU wheels), pip installs it; else uv, which
knows PyTorch's own index of CPU builds. Any other text (another version specifier, pip options)
goes to pip as it is.
"""

import json
import re
import shlex
import subprocess
import sys

DEFAULT = "torch==2.13.0"
PIP = (sys.executable, "-m", "pip", "install")
UV = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)


def brings_cuda(requirement: str) -> bool:
    """Whether pip's own resolution contains CUDA packages."""
    command = [*PIP, "--dry-run", "--ignore-installed", "--quiet", "--report", "-", requirement]
    report = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    names = [item["metadata"]["name"].lower() for item in json.loads(report)["install"]]
    return any(name.startswith(("nvidia", "cuda")) for name in names)


def succeeds(*command: str) -> bool:
    return subprocess.run(command).returncode == 0


def main(text: str) -> int:
    """Install what ``text`` says; 0 when that worked."""
    if re.fullmatch(r"torch==[\d.]+", text) and brings_cuda(text):
        if succeeds(*PIP, "--quiet", "uv==0.13.8") and succeeds(*UV, "--torch-backend=cpu", text):
            return 0
        print("No CPU build of torch could be fetched: pip takes the CUDA build.", flush=True)
    return 0 if succeeds(*PIP, *shlex.split(text)) else 1


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]) or DEFAULT))
