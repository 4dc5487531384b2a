"""Processes that share a pool of buffers over a larger store, written back when a buffer goes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from penumbra.guest.kernel.areas import page_word
from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    RW,
    SHARED_ANONYMOUS,
    SHARED_AT,
    WORD,
    expect,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import CompareExchange, Copy, Load, Mark, Store, Syscall

_MAIN, _WORKER = 0, 1
_FILE = 11
_MAP_SHARED = 1
_LATCH = SHARED_AT
_HAND = SHARED_AT + WORD
_HEADERS = SHARED_AT + 2 * WORD
_WINDOW_AT = ARENA_AT + 0x100_0000
_TALLY = 2 * WORD  # where a page of the store counts its updates
_M64 = (1 << 64) - 1


@dataclass(frozen=True)
class BufferPool:
    """`workers` processes do `updates` updates each of `pages` pages through `buffers` buffers.

    A buffer's header holds page number + 1 and, in bit 32, whether it is dirty. Under the pool's
    latch a worker finds its page, or takes the next buffer round: maps the store's page at its
    window, writes the old contents back if dirty, or reads the new ones, and unmaps it again. In
    the end the tallies of all pages must add up to the updates made.
    """

    workers: int = 3
    buffers: int = 4
    pages: int = 16
    updates: int = 24
    seed: int = 1

    @property
    def name(self) -> str:
        return "buffer-pool"

    @property
    def peak_pages(self) -> int:
        return 2 * self.pages + self.buffers + 2 * self.workers + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [
            (SHARED_AT // PAGE_BYTES, 1),
            (ARENA_AT // PAGE_BYTES, self.buffers),
            (_WINDOW_AT // PAGE_BYTES, 1),
        ]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else self._worker(args[0])

    async def _main(self) -> None:
        for gva, n_pages in ((SHARED_AT, 1), (ARENA_AT, self.buffers)):
            args = (gva, n_pages * PAGE_BYTES, RW, SHARED_ANONYMOUS | FIXED, -1, 0)
            if await Syscall("mmap", args) != gva:
                await Mark("wrong", (gva,), "mmap failed")
        for number in range(self.workers):
            if await Syscall("fork", (_WORKER, number)) < 0:
                await Mark("wrong", (number,), "fork failed")
        for _ in range(self.workers):
            await Syscall("wait", (-1,))
        for buffer in range(self.buffers):
            await self._write_back(buffer)
        total = 0
        for page in range(self.pages):
            await self._map_store(page)
            first = page_word(_FILE, page)
            await expect(_WINDOW_AT, first)
            total = (total + await Load(_WINDOW_AT + _TALLY, WORD) - first) & _M64
        if total != self.workers * self.updates:
            await Mark("wrong", (_TALLY, self.workers * self.updates, total), "updates were lost")

    async def _worker(self, number: int) -> None:
        choose = random.Random(f"{self.seed} {number}")
        for _ in range(self.updates):
            page = choose.randrange(self.pages)
            await self._latch()
            buffer = await self._find(page)
            gva = ARENA_AT + buffer * PAGE_BYTES
            await expect(gva, page_word(_FILE, page))
            await Store(gva + _TALLY, WORD, (await Load(gva + _TALLY, WORD) + 1) & _M64)
            await Store(_HEADERS + buffer * WORD, WORD, 1 << 32 | page + 1)
            await Store(_LATCH, WORD, 0)

    async def _latch(self) -> None:
        while await CompareExchange(_LATCH, WORD, 0, 1):
            await Syscall("yield")

    async def _find(self, page: int) -> int:
        """Return the buffer that holds a page, after reading it into one if none does."""
        for held in range(self.buffers):
            if await Load(_HEADERS + held * WORD, 4) == page + 1:
                return held
        buffer: int = await Load(_HAND, WORD)
        await Store(_HAND, WORD, (buffer + 1) % self.buffers)
        await self._write_back(buffer)
        await self._map_store(page)
        await Copy(ARENA_AT + buffer * PAGE_BYTES, _WINDOW_AT, PAGE_BYTES)
        await Syscall("munmap", (_WINDOW_AT, PAGE_BYTES))
        await Store(_HEADERS + buffer * WORD, WORD, page + 1)
        return buffer

    async def _write_back(self, buffer: int) -> None:
        header = await Load(_HEADERS + buffer * WORD, WORD)
        if header >> 32:
            await self._map_store((header & 0xFFFF_FFFF) - 1)
            await Copy(_WINDOW_AT, ARENA_AT + buffer * PAGE_BYTES, PAGE_BYTES)
            await Syscall("munmap", (_WINDOW_AT, PAGE_BYTES))

    async def _map_store(self, page: int) -> None:
        args = (_WINDOW_AT, PAGE_BYTES, RW, _MAP_SHARED | FIXED, _FILE, page)
        if await Syscall("mmap", args) != _WINDOW_AT:
            await Mark("wrong", (_WINDOW_AT, page), "mmap failed")
