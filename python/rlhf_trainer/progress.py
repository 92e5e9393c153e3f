"""What a run says while it works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

LINE_EVERY = 10.0  # seconds between lines where stderr is no terminal
REDRAW_EVERY = 0.2  # and between updates of the bar

Item = TypeVar("Item")


class Progress:
    """The steps of a run, and what goes on within the one under way.

    On a terminal it is tqdm's bar, whose description names the part of a step. A log file gets a
    line at most every LINE_EVERY seconds.
    """

    def __init__(self, stage: str, unit: str, done: int, total: int, shown: bool) -> None:
        self.stage, self.unit, self.done, self.total = stage, unit, done, total
        self.shown = shown
        self.terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, desc=stage, unit=unit, disable=not (shown and self.terminal)
        )
        self._began, self._first = time.perf_counter(), done
        self._said = self._drawn = self._began
        self._numbers: dict[str, Any] = {}

    def part(self, name: str, done: int, total: int, unit: str) -> None:
        """Say how much of a part of the step is done."""
        now = time.perf_counter()
        if self.terminal and now - self._drawn >= REDRAW_EVERY:
            self._drawn = now
            self._bar.set_description_str(f"{self.stage}: {name} {done}/{total} {unit}")
        elif not self.terminal:
            self._line(f"{name}, {done} of {total} {unit}")

    def track(self, name: str, items: Sequence[Item], unit: str) -> Iterator[Item]:
        """The items one after the other, as a part of the step."""
        for k, item in enumerate(items):
            self.part(name, k, len(items), unit)
            yield item

    def set_postfix(self, refresh: bool = True, **numbers: Any) -> None:
        """Show these numbers of the last step; as tqdm's own."""
        self._numbers = numbers
        self._bar.set_postfix(refresh=refresh, **numbers)

    def update(self) -> None:
        """A step is done."""
        self.done += 1
        self._bar.set_description_str(self.stage, refresh=False)
        self._bar.update()
        if not self.terminal:
            numbers = ", ".join(f"{name} {value}" for name, value in self._numbers.items())
            left = (time.perf_counter() - self._began) / (self.done - self._first)
            left *= self.total - self.done
            self._line(f"{numbers}; {duration(left)} left", self.done)

    def close(self) -> None:
        self._bar.close()

    def _line(self, text: str, step: int | None = None) -> None:
        now = time.perf_counter()
        if self.shown and now - self._said >= LINE_EVERY:
            self._said = now
            where = f"{self.unit} {self.done + 1 if step is None else step} of {self.total}"
            print(f"{self.stage}: {where}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
