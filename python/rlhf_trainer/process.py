"""What keeps a run apart from others, and ends it in order: the folder's lock, signals, a full
disk."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Concatenate, ParamSpec, TypeVar

from rlhf_trainer.checkpoint import FULL, numbered
from rlhf_trainer.config import ConfigError, RunConfig

LOCK = ".lock"
# Of torchrun and accelerate, and of the launchers of Intel MPI, Open MPI and MVAPICH.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

Config = TypeVar("Config", bound=RunConfig)
Options = ParamSpec("Options")
Result = TypeVar("Result")


class DiskFullError(OSError):
    """A write found no room: the folder, and what is left of the run."""


class Stopped(KeyboardInterrupt):
    """A run that a signal ended in order: after which step, and how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number
        """The exit status by which a shell knows the signal."""


def one_run(
    train: Callable[Concatenate[Config, Options], Result],
) -> Callable[Concatenate[Config, Options], Result]:
    """Of a stage: the run has its folder and its process to itself, ends in order at a signal, and
    names a full disk."""

    @functools.wraps(train)
    def run(config: Config, *args: Options.args, **options: Options.kwargs) -> Result:
        config.validate()
        check_processes()
        with full_disk_named(config.output), lock(config.output), signals():
            return train(config, *args, **options)

    return run


def check_processes() -> None:
    """Raise ConfigError where a launcher started several processes."""
    for name in WORLD_SIZES:
        if (value := os.environ.get(name, "1")) != "1":
            raise ConfigError(
                f"{name}: expected 1 process, which is what the trainer runs in, got {value}; "
                "start it without torchrun, accelerate launch or mpirun"
            )


# --- one run a folder -----------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made where it is missing, and then removed where it stays empty.

    The system releases the lock of a process that ends in whatever way. Raises ConfigError where
    another run holds it.
    """
    made, path = not folder.exists(), folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(
            f"output: expected a folder that can be made, got {folder}: {error.strerror}"
        ) from error
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # its holder has just removed it
                raise BlockingIOError
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                f"output: expected a folder that no other run is writing to, got {folder}, "
                f"which process {holder} holds"
            ) from error
        except OSError as error:
            print(f"{folder}: no lock on this file system ({error.strerror}): start one run only")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: see st_nlink
            if made:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()


# --- signals --------------------------------------------------------------------------------------


class _Signals:
    """The signal that asked the run to stop, and whether the run ends its step before it does."""

    received: int | None = None
    deferring = False


_signals = _Signals()


@contextmanager
def signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Stopped: at once, or once `defer` was called at the end of a step.

    A second one ends the process. A program's own handlers stay, and so do those of the process
    where the run is not in its main thread, the only one that gets signals.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = {
        number: handler
        for number, handler in defaults.items()
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is handler
    }
    if ours:
        _signals.received, _signals.deferring = None, False
    for number in ours:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if not _signals.deferring:
        raise Stopped(number, f"stopped by {name} before the first step")
    _signals.received = number
    for every in (signal.SIGINT, signal.SIGTERM):
        signal.signal(every, signal.SIG_DFL)
    text = f"\n{name}: the run stops at the end of its step; a second signal ends it at once\n"
    with suppress(OSError):
        os.write(2, text.encode())  # not print, which may be what was interrupted


def defer() -> None:
    """From here on a signal waits for the end of the step, where the run asks `received`."""
    _signals.deferring = True


def received() -> int | None:
    """The signal that asked the run to stop, if one did."""
    return _signals.received


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full_disk_named(output: Path) -> Iterator[None]:
    """Turn the error of a write without room into one that says so, and what is left of the run."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or isinstance(error, DiskFullError):
            raise
        kept = numbered(output, "checkpoint")
        left = f"{kept[-1]} is whole: make room, then go on with --resume" if kept else "make room"
        raise DiskFullError(
            f"output: the disk of {output} is full: {error.filename or 'a file'} was not written; "
            f"{left}"
        ) from error
