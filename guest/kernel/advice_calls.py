"""What programs say about their use of memory: where large pages shall be."""

from __future__ import annotations

from dataclasses import replace

from penumbra.guest.kernel.areas import ANONYMOUS
from penumbra.guest.kernel.frames import OutOfFrames
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.memory_calls import EINVAL, ENOMEM, MemoryCalls
from penumbra.guest.kernel.process import Thread
from penumbra.guest.kernel.process_calls import process_of
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.tables import AddressSpace
from penumbra.guest.kernel.words import acquire, release
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT

EAGAIN = -11
# Linux's numbers.
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE = 14, 15, 25


class AdviceCalls:
    """madvise: large pages at the first use, none from now on, or at once of what is there."""

    def __init__(self, memory: MemoryCalls, large: LargePages, shootdown: Shootdown) -> None:
        self._memory = memory
        self._large = large
        self._shootdown = shootdown

    async def madvise(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(address, length, advice) -> 0.

        EINVAL: arguments that cannot be, or memory that no large page can be of. ENOMEM: something
        there is not mapped, or there are no adjacent frames. EAGAIN: some page is not in memory.
        """
        address, length, advice = args
        first, n_pages = address >> PAGE_SHIFT, -(-length // PAGE_BYTES)
        if address % PAGE_BYTES or not self._memory.allowed(first, n_pages):
            return EINVAL
        if advice not in (MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE) or not self._large.n_pages:
            return EINVAL
        space = process_of(thread).space
        await acquire(space.lock)
        if advice == MADV_COLLAPSE:
            result = await self._collapse(thread, space, first, first + n_pages)
        else:
            result = self._mark(space, first, first + n_pages, huge=advice == MADV_HUGEPAGE)
        await release(space.lock)
        return result

    def _mark(self, space: AddressSpace, first: int, stop: int, *, huge: bool) -> int:
        areas = space.areas.overlapping(first, stop)
        if sum(area.stop - area.first for area in areas) < stop - first:
            return ENOMEM
        if huge and any(area.shared or area.file_id != ANONYMOUS for area in areas):
            return EINVAL
        for area in space.areas.remove(first, stop):
            space.areas.insert(replace(area, huge=huge))
        return 0

    async def _collapse(self, thread: Thread, space: AddressSpace, first: int, stop: int) -> int:
        """Promote every aligned range between two pages; return the first error met."""
        n = self._large.n_pages
        blocks = range(-(-first // n) * n, stop - n + 1, n)
        if not blocks:
            return EINVAL
        result = 0
        for block in blocks:
            result = result or await self._collapse_one(thread, space, block)
        return result

    async def _collapse_one(self, thread: Thread, space: AddressSpace, block: int) -> int:
        area = space.areas.find(block)
        if area is None:
            return ENOMEM
        if not self._large.suits(area, block):
            return EINVAL
        if block // self._large.n_pages in space.large:
            return 0
        while True:
            try:
                return 0 if await self._large.promote(thread.cpu, space, block) else EAGAIN
            except OutOfFrames:
                if not await self._shootdown.settle_all(thread.cpu):
                    return ENOMEM
