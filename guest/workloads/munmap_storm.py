"""A thread that maps, touches and unmaps while its siblings keep the address space loaded."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    SHARED_AT,
    WORD,
    expect,
    map_anonymous,
    pattern,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Mark, Store, Syscall

_MAIN = 0
_STOP = SHARED_AT
_READY = SHARED_AT + WORD


@dataclass(frozen=True)
class MunmapStorm:
    """`rounds` times: map `pages` pages, touch them, unmap them, with `threads` busy siblings.

    A sibling goes over `pages` pages of its own meanwhile. Each round's pages stand at other
    addresses, `spread` rounds long, and share their page table with the siblings', so that a kernel
    that flushes lazily can: it may neither map the same addresses anew nor give a table away.
    """

    threads: int = 3
    rounds: int = 40
    pages: int = 2
    spread: int = 64

    @property
    def name(self) -> str:
        return "munmap-storm"

    @property
    def peak_pages(self) -> int:
        # Lazily flushed frames come back late: every round's may still be owed.
        return (self.rounds + self.threads + 1) * self.pages + 16

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [
            (SHARED_AT // PAGE_BYTES, 1),
            (ARENA_AT // PAGE_BYTES, self._n_own + self.spread * self.pages),
        ]

    @property
    def _n_own(self) -> int:
        return max(1, self.threads) * self.pages

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else self._sibling(args[0])

    async def _main(self) -> None:
        await map_anonymous(SHARED_AT, 1)
        await map_anonymous(ARENA_AT, self._n_own)
        await Store(ARENA_AT, WORD, pattern())  # there is a table from now on
        siblings = [await Syscall("thread_create", (1, n)) for n in range(self.threads)]
        for number in range(self.threads):
            while not await Load(_READY + number * WORD, WORD):
                await Syscall("yield")
        for number in range(self.rounds):
            await self._round(number)
        await Store(_STOP, WORD, 1)
        for thread_id in siblings:
            await Syscall("thread_join", (thread_id,))

    async def _round(self, number: int) -> None:
        at = ARENA_AT + (self._n_own + number % self.spread * self.pages) * PAGE_BYTES
        await map_anonymous(at, self.pages)
        for page in range(self.pages):
            await expect(at + page * PAGE_BYTES, 0)
            await Store(at + page * PAGE_BYTES, WORD, pattern(number, page))
        if await Syscall("munmap", (at, self.pages * PAGE_BYTES)) != 0:
            await Mark("wrong", (number,), "munmap failed")

    async def _sibling(self, number: int) -> None:
        own = ARENA_AT + number * self.pages * PAGE_BYTES
        count = 0
        await Store(_READY + number * WORD, WORD, 1)
        while not await Load(_STOP, WORD):
            gva = own + count % self.pages * PAGE_BYTES
            await Store(gva, WORD, pattern(number, count))
            await expect(gva, pattern(number, count))
            count += 1
        for page in range(self.pages):  # what is left does not tell how long it took
            await Store(own + page * PAGE_BYTES, WORD, pattern(number, page))
