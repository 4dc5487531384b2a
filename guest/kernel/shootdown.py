"""The guest's own TLB shootdown: request in guest memory, interrupt, acknowledgements.

    request word    first page's address | number of pages (1 .. 32), or 0: reload CR3
    acknowledge     one byte per CPU, two words

The sender holds the shootdown lock, clears the bytes of those it asks, writes the request, sends
the interrupt, flushes its own TLB meanwhile, and spins with interrupts enabled until all bytes are
set: so two CPUs that want to shoot at each other both get through. Only CPUs that may have the
address space loaded are asked; an idle CPU has the kernel's root loaded and is never asked.

INVLPG of any address also drops the paging-structure caches, and so does a CR3 load: after a flush
no CPU can still walk a table that was unlinked before it.

Source: A40 ¶30.
"""

from __future__ import annotations

from penumbra.guest.kernel.layout import MAX_VCPUS
from penumbra.guest.kernel.process import Cpu
from penumbra.guest.kernel.tables import AddressSpace
from penumbra.guest.kernel.vectors import VECTOR_SHOOTDOWN
from penumbra.guest.kernel.words import WORD_BYTES, Words, acquire, release
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.operations import (
    Invlpg,
    Load,
    LoadControl,
    SendIpi,
    SetInterrupts,
    SpinUntil,
    Store,
)

_ACK_WORDS = MAX_VCPUS // 8


class Shootdown:
    """Flushes page ranges of address spaces on every CPU that may cache them.

    Invariant: between two flushes no acknowledge byte is awaited and the lock word is 0.

    Attributes:
        flush_limit: Ranges of more pages are flushed by a CR3 load.
        n_requests: Shootdowns that had to ask another CPU.
    """

    def __init__(
        self, words: Words, kernel_root_gpa: int, flush_limit: int, bugs: frozenset[str]
    ) -> None:
        assert 1 <= flush_limit < PAGE_BYTES
        self._lock = words.take_run(2 + _ACK_WORDS)
        self._request = self._lock + WORD_BYTES
        self._acks = self._lock + 2 * WORD_BYTES
        self._kernel_root_gpa = kernel_root_gpa
        self.flush_limit = flush_limit
        self._bugs = bugs
        self.n_requests = 0

    async def flush(self, cpu: Cpu, space: AddressSpace, first: int, n_pages: int) -> None:
        """Make every CPU forget what it cached of `n_pages` pages from `first` on.

        To be called after the stores to the tables and before frames or tables are given away.
        Returns with the interrupt flag as it found it; enables interrupts while it waits.
        """
        if "short-range" in self._bugs:
            n_pages -= 1
            if not n_pages:
                return
        request = first << PAGE_SHIFT | n_pages if n_pages <= self.flush_limit else 0
        targets = space.cpus & ~cpu.bit
        if not targets or self._bugs & {"skip-shootdown", "late-shootdown"}:
            await self._flush_own(cpu, space, request)
            return
        await self._ask(cpu, space, request, targets)

    async def flush_late(self, cpu: Cpu, space: AddressSpace, first: int, n_pages: int) -> None:
        """Do what `flush` left undone under the bug `late-shootdown`; else nothing."""
        targets = space.cpus & ~cpu.bit
        if "late-shootdown" in self._bugs and targets:
            request = first << PAGE_SHIFT | n_pages if n_pages <= self.flush_limit else 0
            await self._ask(cpu, space, request, targets)

    async def _ask(self, cpu: Cpu, space: AddressSpace, request: int, targets: int) -> None:
        self.n_requests += 1
        was_enabled = await SetInterrupts(True)
        await acquire(self._lock)
        awaited = _awaited_bytes(targets)
        for gva, _ in awaited:
            await Store(self._acks + gva, WORD_BYTES, 0)
        await Store(self._request, WORD_BYTES, request)
        await SendIpi(targets, VECTOR_SHOOTDOWN)
        await self._flush_own(cpu, space, request)
        for gva, mask in awaited:
            await SpinUntil(self._acks + gva, WORD_BYTES, mask, mask)
        await release(self._lock)
        if not was_enabled:
            await SetInterrupts(False)

    async def serve(self, cpu: Cpu) -> None:
        """Handle the shootdown interrupt: flush, then acknowledge."""
        request: int = await Load(self._request, WORD_BYTES)
        if "early-acknowledge" in self._bugs:
            await Store(self._acks + cpu.cpu_id, 1, 1)
        await self._invalidate(cpu, request)
        if "early-acknowledge" not in self._bugs:
            await Store(self._acks + cpu.cpu_id, 1, 1)

    async def _flush_own(self, cpu: Cpu, space: AddressSpace, request: int) -> None:
        if space.cpus & cpu.bit and "skip-local-invlpg" not in self._bugs:
            await self._invalidate(cpu, request)

    async def _invalidate(self, cpu: Cpu, request: int) -> None:
        n_pages = request & (PAGE_BYTES - 1)
        if not n_pages:
            # Nothing switches address spaces while kernel code runs on this CPU.
            root = cpu.space.root_gpa if cpu.space is not None else self._kernel_root_gpa
            await LoadControl(3, root)
            return
        first = request & ~(PAGE_BYTES - 1)
        for gva in range(first, first + n_pages * PAGE_BYTES, PAGE_BYTES):
            await Invlpg(gva)


def _awaited_bytes(targets: int) -> list[tuple[int, int]]:
    """Return (offset, mask) of each acknowledge word that `targets` have bytes in."""
    words = []
    for word in range(_ACK_WORDS):
        cpus = targets >> (8 * word) & 0xFF
        mask = sum(1 << (8 * n) for n in range(8) if cpus >> n & 1)
        if mask:
            words.append((word * WORD_BYTES, mask))
    return words
