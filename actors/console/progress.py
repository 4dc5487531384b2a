"""How far long work is, on stderr and only where somebody may be looking."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_MARGIN = 2


def is_live(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def working(on_what: str, quiet: bool) -> Iterator[None]:
    """Show that work is going on whose length is not known."""
    if quiet or not is_live(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(on_what):
        yield


class ProgressBars:
    """One bar per scheme, or one for all where the terminal has not the lines for so many.

    Nothing at all unless stderr is a terminal and quiet was not asked for. Redrawn by whoever
    reports, never by a thread of its own.
    """

    def __init__(self, names: Sequence[str], quiet: bool) -> None:
        self._names = names
        self._show = not quiet and is_live(sys.stderr)
        self._progress: Progress | None = None
        self._bars: list[TaskID] = []
        self._running: dict[int, float] = {}
        self._n_ended = 0

    def __enter__(self) -> ProgressBars:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[state]:>8}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
            )
            self._progress.start()
            names = self._names
            if len(names) > self._progress.console.height - _MARGIN:
                names = [f"{len(names)} schemes"]
            self._bars = [
                self._progress.add_task(name, start=False, total=None, state="waits")
                for name in names
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    @property
    def _for_all(self) -> bool:
        return len(self._bars) < len(self._names)

    def of(self, numbers: Sequence[int]) -> ProgressBars:
        """Return the same bars to somebody who counts only these schemes, from 0."""
        return _Some(self, numbers)

    def start(self, number: int) -> None:
        self._running[number] = 0.0
        if self._progress:
            bar = self._bars[0 if self._for_all else number]
            self._progress.start_task(bar)
            self._progress.update(bar, state="runs")
            self._show_all()

    def reach(self, number: int, fraction: float) -> None:
        """Report a fraction; 0 also stands for work whose length is not known."""
        self._running[number] = fraction
        if self._progress:
            if fraction > 0 and not self._for_all:
                self._progress.update(
                    self._bars[number], total=1.0, completed=fraction, state=f"{fraction:.0%}"
                )
            self._show_all()
            self._progress.refresh()

    def end(self, number: int, state: str) -> None:
        self._running.pop(number, None)
        self._n_ended += 1
        if self._progress:
            if not self._for_all:
                self._progress.update(self._bars[number], total=1.0, completed=1.0, state=state)
                self._progress.stop_task(self._bars[number])
            self._show_all()
            self._progress.refresh()

    def refresh(self) -> None:
        if self._progress:
            self._progress.refresh()

    def _show_all(self) -> None:
        """Bring the one bar for all up to date, if there is but one."""
        if self._progress and self._for_all:
            n = len(self._names)
            names = ", ".join(self._names[number] for number in self._running)
            self._progress.update(
                self._bars[0],
                total=float(n),
                completed=self._n_ended + sum(self._running.values()),
                state=f"{self._n_ended} of {n} done" + (f"; runs: {names}" if names else ""),
            )


class _Some(ProgressBars):
    """Some of the bars of others, by numbers of their own."""

    def __init__(self, all_bars: ProgressBars, numbers: Sequence[int]) -> None:
        self._all = all_bars
        self._numbers = numbers

    def start(self, number: int) -> None:
        self._all.start(self._numbers[number])

    def reach(self, number: int, fraction: float) -> None:
        self._all.reach(self._numbers[number], fraction)

    def end(self, number: int, state: str) -> None:
        self._all.end(self._numbers[number], state)

    def refresh(self) -> None:
        self._all.refresh()
