"""A disk and its DMA controller: blocks of one page, a bounded queue, a fixed latency. Passive.

The controller moves whole pages between blocks and guest-physical memory past every MMU. Whoever
owns the memory carries a transfer out when it is due, in the order of due times; what it may do to
memory is therefore not decided here.

    start   a transfer enters the queue and gets a ticket
    due     it is taken out to be carried out, and its ticket is finished
    finished   who started it takes the ticket back, once

Source: A40 ¶10, Fig. 1 (DMA controller 21, disk 140).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.interrupts import NEVER

DISK_VECTOR = 0x2E
QUEUE_LIMIT = 64
_ZEROS = bytes(PAGE_BYTES)


@dataclass(frozen=True, order=True)
class Transfer:
    """One page on its way.

    Attributes:
        due: Guest progress at which the memory is touched and the interrupt is raised.
        ticket: Unique, from 1, in order of start.
        owner: CPU that started it and gets the interrupt.
        to_disk: Direction: memory to block, or block to memory.
    """

    due: int
    ticket: int
    owner: int = field(compare=False)
    block: int = field(compare=False)
    gpa: int = field(compare=False)
    to_disk: bool = field(compare=False)


class Disk:
    """`n_blocks` blocks of 4096 bytes, zero at first.

    Invariant: the queue holds at most `QUEUE_LIMIT` transfers, each of a block of this disk, sorted
    by due time and ticket; no ticket is both queued and finished.

    Attributes:
        n_started: Transfers accepted so far; the last ticket.
    """

    def __init__(self, n_blocks: int, latency: int) -> None:
        self.n_blocks = n_blocks
        self.latency = latency
        self.n_started = 0
        self._blocks: dict[int, bytes] = {}
        self._queue: list[Transfer] = []
        self._finished: dict[int, deque[int]] = {}

    def start(self, owner: int, block: int, gpa: int, to_disk: bool, now: int) -> Transfer | None:
        """Queue a transfer at progress `now`; None if the controller refuses it.

        It refuses a block the disk does not have, an address that is no page's, and whatever comes
        while the queue is full.
        """
        if not 0 <= block < self.n_blocks or gpa < 0 or gpa % PAGE_BYTES:
            return None
        if len(self._queue) >= QUEUE_LIMIT:
            return None
        self.n_started += 1
        transfer = Transfer(now + self.latency, self.n_started, owner, block, gpa, to_disk)
        self._queue.append(transfer)
        self._queue.sort()
        return transfer

    @property
    def next_due(self) -> int:
        """Progress at which the next transfer is due; `NEVER` if none is queued."""
        return self._queue[0].due if self._queue else NEVER

    def take_due(self, progress: int) -> Transfer | None:
        """Take out the first transfer due by `progress`; its ticket is finished from now on."""
        if self.next_due > progress:
            return None
        transfer = self._queue.pop(0)
        self._finished.setdefault(transfer.owner, deque()).append(transfer.ticket)
        return transfer

    def take_finished(self, owner: int) -> int:
        """Return the oldest finished ticket of a CPU that it has not taken yet, or 0."""
        tickets = self._finished.get(owner)
        return tickets.popleft() if tickets else 0

    def read(self, block: int) -> bytes:
        """Return the 4096 bytes of a block."""
        return self._blocks.get(block, _ZEROS)

    def write(self, block: int, data: bytes) -> None:
        """Replace the 4096 bytes of a block."""
        assert 0 <= block < self.n_blocks and len(data) == PAGE_BYTES
        self._blocks[block] = data

    def check(self) -> None:
        assert self._queue == sorted(self._queue) and len(self._queue) <= QUEUE_LIMIT
        queued = {transfer.ticket for transfer in self._queue}
        finished = [ticket for tickets in self._finished.values() for ticket in tickets]
        assert not queued & set(finished) and len(set(finished)) == len(finished)
        assert all(0 <= transfer.block < self.n_blocks for transfer in self._queue)
