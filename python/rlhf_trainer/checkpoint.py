"""Folders and files of a run on the disk: whole or not there at all, and checked when read again.

A kill, a crash between any two calls, a power cut or a full disk leaves the old content or the new
one. What a run has to read again carries the SHA-256 of each of its files, in sha256sum's format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

SUMS = "SHA256SUMS"
FULL = (errno.ENOSPC, errno.EDQUOT)
# What replace_folder, remove_folder and write_text leave where a run is killed inside them.
LEFTOVER = re.compile(
    r"\.(model|value|(?:checkpoint|best)-\d+|metrics\.jsonl|kernels\.json|room)\.(?:new|old|gone)"
)


class DamagedError(ValueError):
    """A folder that does not hold what was written: the file, and what is wrong with it."""


def numbered(output: Path, kind: str) -> list[Path]:
    """Folders `kind`-N, by rising N."""
    found = [p for p in output.glob(f"{kind}-*") if p.name.removeprefix(f"{kind}-").isdigit()]
    return sorted(found, key=number_of)


def number_of(folder: Path) -> int:
    """N of a folder `kind`-N."""
    return int(folder.name.rpartition("-")[2])


# --- whole or not at all --------------------------------------------------------------------------


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place, then move it there, so that no reader ever meets half of
    it.

    Where `write` fails, nothing of it stays and the old folder is as it was; OSError with ENOSPC
    where that is as the disk is full.
    """
    fresh, stale = _beside(folder, "new"), _beside(folder, "old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        write(fresh)
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
    except BaseException as error:
        full = isinstance(error, Exception) and disk_is_full(error, folder.parent)
        shutil.rmtree(fresh, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill on the way leaves all of it, or nothing under its name."""
    gone = _beside(folder, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there."""
    fresh = _beside(path, "new")
    try:
        fresh.write_text(text, encoding="utf-8")
        _sync(fresh)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(path)
    _sync(path.parent)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def recover(output: Path) -> None:
    """Finish or undo what a killed run left between two steps of a function above.

    A folder was moved away only once the new one was whole: the new one takes its place.
    """
    for path in sorted(output.glob(".*.old")):
        if found := LEFTOVER.fullmatch(path.name):
            folder = output / found[1]
            fresh = _beside(folder, "new")
            if not folder.exists():
                (fresh if fresh.exists() else path).rename(folder)
    for path in output.glob(".*"):
        if LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- checksums ------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Write the checksum of each file of a folder into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_seal(folder: Path) -> None:
    """Raise DamagedError where a file is missing or differs from its checksum."""
    try:
        *lines, end = (folder / SUMS).read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{SUMS} cannot be read") from error
    if not lines or end:
        raise DamagedError(f"{SUMS} is cut off")
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            found = _digest(folder / name)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{name!r}, which {SUMS} lists, cannot be read") from error
        if found != digest:
            raise DamagedError(f"{name} differs from its checksum")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- a full disk ----------------------------------------------------------------------------------


def disk_is_full(error: Exception, folder: Path) -> bool:
    """Whether a write into the folder failed as there was no room.

    safetensors names that in the text alone, and torch.save not at all: then a small write tells,
    while the part that was written still takes the room.
    """
    if isinstance(error, OSError):
        return error.errno in FULL
    if any(os.strerror(code) in str(error) for code in FULL):
        return True
    probe = folder / ".room.new"
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as full:
        return full.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False
