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
    """One bar per scheme; nothing at all unless stderr is a terminal and quiet was not asked for.

    Redrawn by whoever reports, never by a thread of its own.
    """

    def __init__(self, names: Sequence[str], quiet: bool) -> None:
        self._names = names
        self._show = not quiet and is_live(sys.stderr)
        self._progress: Progress | None = None
        self._bars: list[TaskID] = []

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
            self._bars = [
                self._progress.add_task(name, start=False, total=None, state="waits")
                for name in self._names
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

    def start(self, number: int) -> None:
        if self._progress:
            self._progress.start_task(self._bars[number])
            self._progress.update(self._bars[number], state="runs")

    def reach(self, number: int, fraction: float) -> None:
        """Report a fraction; 0 also stands for work whose length is not known."""
        if self._progress:
            if fraction > 0:
                self._progress.update(
                    self._bars[number], total=1.0, completed=fraction, state=f"{fraction:.0%}"
                )
            self._progress.refresh()

    def end(self, number: int, state: str) -> None:
        if self._progress:
            self._progress.update(self._bars[number], total=1.0, completed=1.0, state=state)
            self._progress.stop_task(self._bars[number])
            self._progress.refresh()

    def refresh(self) -> None:
        if self._progress:
            self._progress.refresh()
