"""The kernel's disk driver: start transfers, sleep until they are done.

Between a StartDma and the next operation nothing else runs on this CPU, and its interrupt comes to
this CPU; so the ticket is noted before it can be finished. A thread that sleeps here may be woken
early, by the end of its process: it goes on sleeping, because the controller still has its frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penumbra.guest.kernel.process import State, Thread
from penumbra.guest.kernel.scheduler import Scheduler
from penumbra.guest.threads import KernelPanic
from penumbra.hw.formats import PAGE_SHIFT
from penumbra.hw.operations import FinishedDma, StartDma


class Move(NamedTuple):
    """One page to move between a block and a frame."""

    block: int
    gfn: int
    to_disk: bool


@dataclass(eq=False, slots=True)
class _Request:
    thread: Thread
    n_left: int = 0


class DiskDriver:
    """Moves pages for threads that can sleep.

    Invariant: every open ticket belongs to a thread that sleeps in `move`, or is about to.

    Attributes:
        n_reads, n_writes: Pages moved so far.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open: dict[int, _Request] = {}
        self._others: list[Thread] = []
        self.n_reads = 0
        self.n_writes = 0

    async def move(self, thread: Thread, moves: Sequence[Move]) -> None:
        """Move pages and sleep until all are there. No lock may be held; interrupts are enabled.

        Raises:
            KernelPanic: The controller refuses although none of our transfers is under way.
        """
        request = _Request(thread)
        for block, gfn, to_disk in moves:
            while not (ticket := await StartDma(block, gfn << PAGE_SHIFT, to_disk)):
                if not self._open:
                    raise KernelPanic(f"the disk refuses block {block:#x}, frame {gfn:#x}")
                await self._wait_for_any(thread)
            self._open[ticket] = request
            request.n_left += 1
        while request.n_left:
            thread.state = State.BLOCKED
            await self._scheduler.block(thread)
        n_writes = sum(move.to_disk for move in moves)
        self.n_writes += n_writes
        self.n_reads += len(moves) - n_writes

    async def _wait_for_any(self, thread: Thread) -> None:
        """Sleep until some transfer is done, whoever wants it."""
        if thread not in self._others:
            self._others.append(thread)
        thread.state = State.BLOCKED
        await self._scheduler.block(thread)

    async def serve(self) -> None:
        """Handle the disk's interrupt: wake who sleeps for what is finished."""
        while ticket := await FinishedDma():
            request = self._open.pop(ticket)
            request.n_left -= 1
            if not request.n_left:
                await self._scheduler.wake(request.thread)
        others, self._others = self._others, []
        for thread in others:
            await self._scheduler.wake(thread)
