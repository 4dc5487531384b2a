"""Processes that together use several times the memory there is, and know what each page holds."""

from __future__ import annotations

import random
from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    PRIVATE_ANONYMOUS,
    RW,
    WORD,
    expect,
    pattern,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Mark, Store, Syscall

_MAIN, _PROCESS, _THREAD, _HEIR = range(4)


@dataclass(frozen=True)
class SwapThrash:
    """`processes` processes of `threads` threads use `pages` pages each, `rounds` times over.

    Each thread owns every `threads`-th page of its process. It goes over them in an order drawn
    from `seed`, finds what it left there, and changes half of them, so that clean and dirty pages
    go out. In the middle each process forks an heir, which must find what its forebear had when it
    forked, on the disk or not, whatever that writes meanwhile.
    """

    processes: int = 3
    threads: int = 2
    pages: int = 48
    rounds: int = 3
    seed: int = 1

    @property
    def name(self) -> str:
        return "swap-thrash"

    @property
    def peak_pages(self) -> int:
        return (2 * self.processes + 1) * self.pages + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA_AT // PAGE_BYTES, self.pages)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        if entry == _MAIN:
            return self._main()
        if entry == _PROCESS:
            return self._process(*args)
        return self._thread(*args) if entry == _THREAD else self._heir(*args)

    async def _main(self) -> None:
        for number in range(self.processes):
            if await Syscall("fork", (_PROCESS, number)) < 0:
                await Mark("wrong", (number,), "fork failed")
        for _ in range(self.processes):
            await Syscall("wait", (-1,))

    async def _process(self, number: int) -> None:
        n_bytes = self.pages * PAGE_BYTES
        args = (ARENA_AT, n_bytes, RW, PRIVATE_ANONYMOUS | FIXED, -1, 0)
        if await Syscall("mmap", args) != ARENA_AT:
            await Mark("wrong", (number,), "mmap failed")
        half = self.rounds // 2
        for first, stop in ((0, half), (half, self.rounds)):
            siblings = [
                await Syscall("thread_create", (_THREAD, number, sibling, first, stop))
                for sibling in range(1, self.threads)
            ]
            await self._thread(number, 0, first, stop)
            for sibling in siblings:
                await Syscall("thread_join", (sibling,))
            if stop == half and await Syscall("fork", (_HEIR, number, stop)) < 0:
                await Mark("wrong", (number,), "fork failed")
        await Syscall("wait", (-1,))

    async def _thread(self, number: int, thread: int, first: int, stop: int) -> None:
        for round_number in range(first, stop):
            for page in self._order(number, thread, round_number):
                await self._find(number, page, round_number)
                if self._changes(page, round_number):
                    gva = ARENA_AT + page * PAGE_BYTES
                    await Store(gva, WORD, pattern(number, page, round_number))
                    await Store(gva + PAGE_BYTES - WORD, WORD, pattern(page, round_number))

    async def _heir(self, number: int, round_number: int) -> None:
        for page in range(self.pages):
            await self._find(number, page, round_number)
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, pattern(number))

    async def _find(self, number: int, page: int, round_number: int) -> None:
        """See that a page holds what was stored last before a round."""
        gva = ARENA_AT + page * PAGE_BYTES
        last = next((r for r in range(round_number - 1, -1, -1) if self._changes(page, r)), None)
        await expect(gva, 0 if last is None else pattern(number, page, last))
        await expect(gva + PAGE_BYTES - WORD, 0 if last is None else pattern(page, last))

    def _changes(self, page: int, round_number: int) -> bool:
        return (page // self.threads + round_number) % 2 == 0

    def _order(self, number: int, thread: int, round_number: int) -> list[int]:
        pages = list(range(thread, self.pages, self.threads))
        random.Random(f"{self.seed} {number} {thread} {round_number}").shuffle(pages)
        return pages
