"""A doorbell between processes: whoever sleeps at it costs nothing, and a ring is never lost.

An eventfd where there is one, else a pipe that nobody blocks on. It says only that something is to
be looked at; what it is stands in memory both sides share. Ringing twice is ringing once.

The order that makes it safe beside such memory: who wants to sleep says so there, orders that
before its next loads, looks once more, and only then waits; who has stored something orders that
before its next loads, reads who sleeps, and rings. One of the two sees the other.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from multiprocessing.reduction import DupFd
from typing import Any

import anyio

_ONE = (1).to_bytes(8, "little")


class Doorbell:
    """A bell that many ring and one waits at; goes to a child process as an argument of `Process`.

    Each process closes its own.
    """

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._waits = self._rings = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._waits, self._rings = os.pipe()
            os.set_blocking(self._waits, False)
            os.set_blocking(self._rings, False)

    def __getstate__(self) -> tuple[Any, ...]:
        ends = {self._waits, self._rings}
        return (len(ends), *(DupFd(end) for end in (self._waits, self._rings)[: len(ends)]))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        n_ends, *ends = state
        self._waits = ends[0].detach()
        self._rings = self._waits if n_ends == 1 else ends[1].detach()

    def ring(self) -> None:
        """Wake whoever waits, now or the next time; never blocks."""
        with suppress(BlockingIOError):  # full: it has been rung often enough
            os.write(self._rings, _ONE)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the bell has been rung, and clear it; False if the time is over."""
        poll = select.poll()
        poll.register(self._waits, select.POLLIN)
        rung = bool(poll.poll(None if timeout is None else max(0.0, timeout * 1000)))
        self.clear()
        return rung

    async def wait_rung(self) -> None:
        """Like `wait`, in trio's or asyncio's event loop; cancelled, the bell stays rung."""
        await anyio.wait_readable(self._waits)
        self.clear()

    def clear(self) -> None:
        """Forget all rings."""
        with suppress(BlockingIOError):
            while len(os.read(self._waits, 4096)) == 4096:
                pass

    def close(self) -> None:
        for end in {self._waits, self._rings}:
            os.close(end)
