"""What a build does to memory: short processes that are forked, exec'ed, read, compute and write.

A maker forks `jobs` compilers at a time. Each becomes another program (a fresh image, demand-loaded
page by page), maps its source file and reads it, fills a heap that grows by and by, goes over it
again and again, frees it, and says in a shared page what it has read.
"""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.kernel.areas import page_word
from penumbra.guest.programs.program import Image, PageRegion
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    RW,
    SHARED_ANONYMOUS,
    SHARED_AT,
    WORD,
    expect,
    map_anonymous,
    pattern,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Mark, Store, Syscall

_MAIN, _FORKED, _COMPILER = 0, 1, 2
_IMAGE = 1
_TEXT_AT = 0x0800_0000
_SOURCE_AT = ARENA_AT + 0x100_0000
_PRIVATE_FILE = 2
_WORDS_PER_PAGE = 16


@dataclass(frozen=True)
class CompileMix:
    """`units` compilations, `jobs` at a time.

    Attributes:
        units: Source files, one process each.
        jobs: Processes that run at once.
        pages: Pages of each compiler's heap; its text and its source have half as many.
        passes: How often a compiler goes over its heap.
    """

    units: int = 4
    jobs: int = 2
    pages: int = 24
    passes: int = 6

    @property
    def name(self) -> str:
        return "compile-mix"

    @property
    def peak_pages(self) -> int:
        return (self.jobs + 1) * (2 * self.pages + 16) + self.units * self.pages + 16

    @property
    def _half(self) -> int:
        return max(1, self.pages // 2)

    def image(self, number: int) -> Image:
        if number != _IMAGE:
            return Image(number)
        text = PageRegion(_TEXT_AT // PAGE_BYTES, self._half, 5)
        return Image(number, [text], heap=ARENA_AT)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [
            (_TEXT_AT // PAGE_BYTES, self._half),
            (SHARED_AT // PAGE_BYTES, self._n_shared),
            (ARENA_AT // PAGE_BYTES, self.pages),
            (_SOURCE_AT // PAGE_BYTES, self._half),
        ]

    @property
    def _n_shared(self) -> int:
        return 1 + self.units * WORD // PAGE_BYTES

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        if entry == _MAIN:
            return self._main()
        return self._forked(args[0]) if entry == _FORKED else self._compile(args[0])

    async def _main(self) -> None:
        await map_anonymous(SHARED_AT, self._n_shared, SHARED_ANONYMOUS)
        running = 0
        for unit in range(self.units):
            if running == self.jobs:
                await Syscall("wait", (-1,))
                running -= 1
            if await Syscall("fork", (_FORKED, unit)) < 0:
                await Mark("wrong", (unit,), "fork failed")
            running += 1
        for _ in range(running):
            await Syscall("wait", (-1,))
        for unit in range(self.units):
            await expect(SHARED_AT + unit * WORD, pattern(unit))

    async def _forked(self, unit: int) -> None:
        """Say that the unit is begun, as a shell would, and become the compiler."""
        await Store(SHARED_AT + unit * WORD, WORD, pattern(unit))
        await Syscall("exec", (_IMAGE, _COMPILER, unit))
        await Mark("wrong", (unit,), "exec failed")

    async def _compile(self, unit: int) -> None:
        args = (_SOURCE_AT, self._half * PAGE_BYTES, RW, _PRIVATE_FILE | FIXED, unit, 0)
        if await Syscall("mmap", args) != _SOURCE_AT:
            await Mark("wrong", (unit,), "mmap failed")
        for page in range(self._half):
            await Load(_TEXT_AT + page * PAGE_BYTES, WORD)
            await expect(_SOURCE_AT + page * PAGE_BYTES, page_word(unit, page))
            await self._grow(unit, 2 * page)
        for number in range(self.passes):
            await self._go_over(unit, number)
        await Syscall("munmap", (_SOURCE_AT, self._half * PAGE_BYTES))
        await Syscall("brk", (ARENA_AT,))

    async def _grow(self, unit: int, first: int) -> None:
        """Let the heap grow by two pages, as an allocator does, and write them."""
        stop = min(first + 2, self.pages)
        await Syscall("brk", (ARENA_AT + stop * PAGE_BYTES,))
        for page in range(first, stop):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, pattern(unit, page))

    async def _go_over(self, unit: int, number: int) -> None:
        used = min(2 * self._half, self.pages)
        for page in range(used):
            gva = ARENA_AT + page * PAGE_BYTES
            await expect(gva, pattern(unit, page))
            for word in range(1, _WORDS_PER_PAGE):
                await Store(gva + word * WORD, WORD, pattern(unit, page, word, number))
            await Load(_TEXT_AT + (page % self._half) * PAGE_BYTES + WORD, WORD)
