"""Programs that run as several processes, a rank each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(program: Path, folder: Path, count: int, **environment: str) -> None:
    """Each rank has to end well, and to print that every case passed.

    Args:
        program: a Python file, called with a path at which the ranks meet (``file://`` it).
        folder: for that, and for what they print.
        count: how many; RANK, LOCAL_RANK and WORLD_SIZE say it to each of them.
        environment: more variables.
    """
    command = [sys.executable, str(program), str(folder / "meeting")]
    ranks, logs = [], [folder / f"rank-{rank}" for rank in range(count)]
    try:
        for rank, path in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            own |= {"OMP_NUM_THREADS": "1", **environment}
            with path.open("w") as log:
                ranks.append(
                    subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
                )
        statuses = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    printed = [path.read_text() for path in logs]
    ends = "\n".join(text[-3000:] for text in printed)
    assert statuses == [0] * count and all("every case passed" in x for x in printed), ends
