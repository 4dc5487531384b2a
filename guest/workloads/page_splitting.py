"""Threads that write memory whose large pages are made, split, shared and made again meanwhile."""

from __future__ import annotations

import random
from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.programs.sync import Barrier
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    PRIVATE_ANONYMOUS,
    RW,
    SHARED_AT,
    WORD,
    expect,
    pattern,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Fill, Load, Mark, Store, Syscall

_MAIN, _SIBLING, _CHILD = range(3)
_READ_ONLY = 1
_MOVE_FIXED = 1 | 2
_HUGE, _NO_HUGE, _COLLAPSE = 14, 15, 25
_AWAY = ARENA_AT + 0x1000_0000
_BARRIER, _DONE = SHARED_AT, SHARED_AT + WORD
_N_MOVED = 8
_N_HOT = 6
_EVERY = 16  # the main thread has a word in each page whose number is a multiple


@dataclass(frozen=True)
class PageSplitting:
    """`threads` threads go over `mib` MiB of one process, `rounds` times.

    In every other round the memory is mapped large at its first use, in the others it is filled
    page by page and then promoted. While the siblings store to their pages and look at what they
    stored, the main thread protects a page in the middle, replaces one, moves the last ones away
    and back, and after each has the rest promoted again. Then it forks a child, which must find
    what there was at the fork and stores to pages of its own, while all go on writing. A store
    lost at a change of size, or one that reaches the other process, is noticed by whoever made it.

    What a thread leaves depends on the round alone, not on how often it came round.
    """

    threads: int = 3
    rounds: int = 2
    mib: int = 4
    seed: int = 1

    @property
    def name(self) -> str:
        return "page-splitting"

    @property
    def pages(self) -> int:
        return self.mib * 256

    @property
    def peak_pages(self) -> int:
        return 3 * self.pages + 16

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [
            (SHARED_AT // PAGE_BYTES, 1),
            (ARENA_AT // PAGE_BYTES, self.pages),
            (_AWAY // PAGE_BYTES, _N_MOVED),
        ]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        if entry == _MAIN:
            return self._main()
        return self._sibling(*args) if entry == _SIBLING else self._child(*args)

    # -- the main thread --------------------------------------------------------------------------

    async def _main(self) -> None:
        await self._map(SHARED_AT, 1)
        siblings: list[int] = []
        for round_number in range(self.rounds):
            await self._begin(round_number)
            if not siblings:
                for number in range(1, self.threads):
                    siblings.append(await Syscall("thread_create", (_SIBLING, number)))
            await self._meet()
            await self._change(round_number)
            await self._end_of_phase(2 * round_number + 1)
            await self._check(round_number, 0)
            child = await Syscall("fork", (_CHILD, round_number))
            if child < 0:
                await Mark("wrong", (round_number,), "fork failed")
            await self._meet()
            for page in range(_EVERY, self.pages, 4 * _EVERY):
                await Store(_word(page), WORD, _mains(round_number, page))
            await Syscall("wait", (child,))
            await self._collapse()
            await self._end_of_phase(2 * round_number + 2)
            await self._check(round_number, 1)
        for sibling in siblings:
            await Syscall("thread_join", (sibling,))

    async def _begin(self, round_number: int) -> None:
        """Map the memory anew and put the main thread's words there; nobody else uses it."""
        n_bytes = self.pages * PAGE_BYTES
        await self._call("munmap", 0, ARENA_AT, n_bytes)
        await self._map(ARENA_AT, self.pages)
        small = round_number % 2 == 1
        await Syscall("madvise", (ARENA_AT, n_bytes, _NO_HUGE if small else _HUGE))
        for page in range(0, self.pages, 1 if small else _EVERY):
            word = 0 if page % _EVERY else _mains(round_number, page)
            await Store(_word(page), WORD, word)

    async def _change(self, round_number: int) -> None:
        """Split and promote in several ways while the siblings write."""
        await self._collapse()
        middle = self.pages // 2
        page = ARENA_AT + middle * PAGE_BYTES
        await self._call("mprotect", 0, page, PAGE_BYTES, _READ_ONLY)
        await expect(_word(middle), _mains(round_number, middle))
        await self._call("mprotect", 0, page, PAGE_BYTES, RW)
        await self._call("munmap", 0, page, PAGE_BYTES)
        await self._map(page, 1)
        await expect(_word(middle), 0)
        await Store(_word(middle), WORD, _mains(round_number, middle))
        await self._collapse()
        n_bytes = _N_MOVED * PAGE_BYTES
        last = ARENA_AT + self.pages * PAGE_BYTES - n_bytes
        await Store(last, WORD, pattern(round_number))
        await self._call("mremap", _AWAY, last, n_bytes, n_bytes, _MOVE_FIXED, _AWAY)
        await expect(_AWAY, pattern(round_number))
        await Store(_AWAY, WORD, pattern(round_number, 1))
        await self._call("mremap", last, _AWAY, n_bytes, n_bytes, _MOVE_FIXED, last)
        await expect(last, pattern(round_number, 1))
        await self._collapse()

    async def _collapse(self) -> None:
        """Have small pages promoted: if frames are scarce, or pages on the disk, not all are."""
        n_bytes = self.pages * PAGE_BYTES
        await Syscall("madvise", (ARENA_AT, n_bytes, _HUGE))
        await Syscall("madvise", (ARENA_AT, n_bytes, _COLLAPSE))

    async def _end_of_phase(self, phase: int) -> None:
        await Store(_DONE, WORD, phase)
        await self._meet()

    async def _check(self, round_number: int, part: int) -> None:
        """Look at every word that stays the same until the next meeting."""
        for page in range(0, self.pages, _EVERY):
            await expect(_word(page), _mains(round_number, page))
        for number in range(1, self.threads):
            for page in self._hot(number):
                await expect(_word(page), _left(round_number, part, page))
        if part:
            await self._meet()

    # -- the others -------------------------------------------------------------------------------

    async def _sibling(self, number: int) -> None:
        pages = self._hot(number)
        for round_number in range(self.rounds):
            values = dict.fromkeys(pages, 0)
            for part in range(2):
                await self._meet()
                phase, turn = 2 * round_number + part + 1, 0
                while await Load(_DONE, WORD) < phase:
                    turn += 1
                    for page in pages:
                        await expect(_word(page), values[page])
                        values[page] = pattern(phase, page, turn)
                        await self._put(page, values[page])
                    await Syscall("yield")
                for page in pages:
                    await expect(_word(page), values[page])
                    values[page] = _left(round_number, part, page)
                    await self._put(page, values[page])
                await self._meet()
            await self._meet()  # the main thread looks at it all

    async def _child(self, round_number: int) -> None:
        # How many have come to the next meeting at the time of the fork is nothing to be left.
        await self._call("munmap", 0, SHARED_AT, PAGE_BYTES)
        for page in range(0, self.pages, _EVERY):
            await expect(_word(page), _mains(round_number, page))
            if page % (2 * _EVERY):
                await Store(_word(page), WORD, pattern(page))
        for number in range(1, self.threads):
            for page in self._hot(number):
                await expect(_word(page), _left(round_number, 0, page))
                await Store(_word(page), WORD, pattern(number, page))
        for page in range(_EVERY, self.pages, 2 * _EVERY):
            await expect(_word(page), pattern(page))

    async def _put(self, page: int, value: int) -> None:
        """Store a word, or a whole page of it: a change of size may come in the midst of that."""
        if page % 2:
            await Fill(ARENA_AT + page * PAGE_BYTES, PAGE_BYTES, value)
        else:
            await Store(_word(page), WORD, value)

    def _hot(self, number: int) -> list[int]:
        """Return the pages of one sibling: nobody else stores there."""
        pages = [page for page in range(self.pages - _N_MOVED) if page % _EVERY]
        mine = pages[number :: self.threads]
        return sorted(random.Random(f"{self.seed} {number}").sample(mine, _N_HOT))

    async def _meet(self) -> None:
        await Barrier(_BARRIER, self.threads).wait()

    async def _map(self, gva: int, n_pages: int) -> None:
        flags = PRIVATE_ANONYMOUS | FIXED
        await self._call("mmap", gva, gva, n_pages * PAGE_BYTES, RW, flags, -1, 0)

    async def _call(self, name: str, wanted: int, *args: int) -> None:
        result = await Syscall(name, args)
        if result != wanted:
            await Mark("wrong", (args[0], wanted, result), f"{name} failed")


def _word(page: int) -> int:
    """Return the address of the word that is used in a page."""
    return ARENA_AT + page * PAGE_BYTES + page * 40 % PAGE_BYTES


def _mains(round_number: int, page: int) -> int:
    return pattern(round_number, page)


def _left(round_number: int, part: int, page: int) -> int:
    """Return what a sibling leaves in a page at the end of a round's first or second part."""
    return pattern(round_number, part, page, 7)
