"""Processes that map, protect, move and unmap all the time, and check every page they see."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from penumbra.guest.kernel.areas import page_word
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

READ_ONLY = 1
_MAYMOVE = 1
_MAIN, _WORKER = 0, 1
_N_FILES = 3
_BREAK_AT = ARENA_AT


@dataclass(frozen=True)
class MmapChurn:
    """`processes` processes do `steps` steps each, drawn from `seed`.

    A process knows what each of its pages must hold: zeros, a file's contents, or what it stored.
    """

    processes: int = 2
    steps: int = 60
    pages: int = 12
    regions: int = 6
    seed: int = 1

    @property
    def name(self) -> str:
        return "mmap-churn"

    @property
    def peak_pages(self) -> int:
        per_process = (self.regions + 2) * self.pages
        return (self.processes + 1) * per_process + _N_FILES * 2 * self.pages + 8

    def image(self, number: int) -> Image:
        return Image(number, heap=_BREAK_AT)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(_BREAK_AT // PAGE_BYTES, self.pages)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else _Worker(self, args[0]).run()

    async def _main(self) -> None:
        for number in range(1, self.processes):
            await Syscall("fork", (_WORKER, number))
        await _Worker(self, 0).run()
        for _ in range(1, self.processes):
            await Syscall("wait", (-1,))


class _Worker:
    """One process's regions, and what every page of them must hold.

    Invariant: `regions` maps the address of each region to the expected first word of its pages.
    """

    def __init__(self, churn: MmapChurn, number: int) -> None:
        self._churn = churn
        self._number = number
        self._random = random.Random(churn.seed * 1000 + number)
        self._regions: dict[int, list[int]] = {}
        self._file_regions: set[int] = set()
        self._n_stores = 0

    async def run(self) -> None:
        steps: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self._map,
            self._map_file,
            self._write,
            self._write,
            self._protect,
            self._move,
            self._cut,
            self._unmap,
            self._move_break,
        ]
        for _ in range(self._churn.steps):
            await self._random.choice(steps)()
        for gva in list(self._regions):
            await self._check(gva)
            await self._call("munmap", 0, gva, len(self._regions.pop(gva)) * PAGE_BYTES)

    async def _map(self) -> None:
        await self._add(-1, 0, [0] * self._random.randint(1, self._churn.pages))

    async def _map_file(self) -> None:
        file_id, offset = self._random.randrange(_N_FILES), self._random.randrange(8)
        n_pages = self._random.randint(1, self._churn.pages)
        words = [page_word(file_id, offset + page) for page in range(n_pages)]
        await self._add(file_id, offset, words)

    async def _add(self, file_id: int, offset: int, words: list[int]) -> None:
        if len(self._regions) >= self._churn.regions:
            await self._unmap()
        flags = PRIVATE_ANONYMOUS if file_id < 0 else 2
        n_bytes = len(words) * PAGE_BYTES
        gva = await Syscall("mmap", (0, n_bytes, RW, flags, file_id, offset))
        if gva <= 0:
            await Mark("wrong", (gva,), "mmap failed")
            return
        self._regions[gva] = words
        (self._file_regions.discard if file_id < 0 else self._file_regions.add)(gva)
        await self._check(gva)

    async def _write(self) -> None:
        gva = self._pick()
        if gva is None:
            return
        for page in range(len(self._regions[gva])):
            if self._random.random() < 0.7:
                await self._store(gva, page)
        await self._check(gva)

    async def _protect(self) -> None:
        """Make a region read-only and writable again: it must not have changed, then can be."""
        gva = self._pick()
        if gva is None:
            return
        n_bytes = len(self._regions[gva]) * PAGE_BYTES
        await self._call("mprotect", 0, gva, n_bytes, READ_ONLY)
        await self._check(gva)
        await self._call("mprotect", 0, gva, n_bytes, RW)
        await self._store(gva, 0)
        await self._check(gva)

    async def _move(self) -> None:
        """Grow a region by two pages, which usually moves it; new pages of memory are zero."""
        gva = self._pick()
        if gva is None or len(self._regions[gva]) + 2 > self._churn.pages:
            return
        if gva in self._file_regions:  # they would go on with the file's next pages
            return
        words = self._regions.pop(gva)
        grown = (len(words) + 2) * PAGE_BYTES
        new = await Syscall("mremap", (gva, len(words) * PAGE_BYTES, grown, _MAYMOVE))
        if new <= 0:
            await Mark("wrong", (gva, new), "mremap failed")
            return
        self._regions[new] = [*words, 0, 0]
        self._file_regions.discard(new)
        await self._check(new)

    async def _cut(self) -> None:
        """Unmap a region's last page and map a fresh one over its first."""
        gva = self._pick()
        if gva is None or len(self._regions[gva]) < 3:
            return
        words = self._regions[gva]
        words.pop()
        await self._call("munmap", 0, gva + len(words) * PAGE_BYTES, PAGE_BYTES)
        args = (gva, PAGE_BYTES, RW, PRIVATE_ANONYMOUS | FIXED, -1, 0)
        await self._call("mmap", gva, *args)
        words[0] = 0
        await self._check(gva)

    async def _unmap(self) -> None:
        gva = self._pick()
        if gva is not None:
            await self._check(gva)
            await self._call("munmap", 0, gva, len(self._regions.pop(gva)) * PAGE_BYTES)

    async def _move_break(self) -> None:
        """Shrink the heap to nothing, let it grow, and see that its pages are zero again."""
        await self._call("brk", _BREAK_AT, _BREAK_AT)
        n_pages = self._random.randint(1, self._churn.pages)
        await self._call("brk", _BREAK_AT + n_pages * PAGE_BYTES, _BREAK_AT + n_pages * PAGE_BYTES)
        for page in range(n_pages):
            gva = _BREAK_AT + page * PAGE_BYTES
            await expect(gva, 0)
            await Store(gva, WORD, pattern(self._number, page))

    async def _store(self, gva: int, page: int) -> None:
        self._n_stores += 1
        word = pattern(self._number, gva, page, self._n_stores)
        self._regions[gva][page] = word
        await Store(gva + page * PAGE_BYTES, WORD, word)

    async def _check(self, gva: int) -> None:
        for page, word in enumerate(self._regions[gva]):
            await expect(gva + page * PAGE_BYTES, word)

    async def _call(self, name: str, wanted: int, *args: int) -> None:
        result = await Syscall(name, args)
        if result != wanted:
            await Mark("wrong", (args[0], wanted, result), f"{name} failed")

    def _pick(self) -> int | None:
        return self._random.choice(list(self._regions)) if self._regions else None
