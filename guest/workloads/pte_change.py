"""One process whose page-table entries are changed, again and again, while they are in use."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import ARENA_AT, RW, WORD, expect, map_anonymous, pattern
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Mark, Store, Syscall

_READ_ONLY = 1


@dataclass(frozen=True)
class PteChange:
    """`rounds` times: make `pages` resident pages read-only, read each, make them writable again.

    A page must hold what was written last, and take a new word when it is writable.
    """

    rounds: int = 8
    pages: int = 24

    @property
    def name(self) -> str:
        return "pte-change"

    @property
    def peak_pages(self) -> int:
        return self.pages + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA_AT // PAGE_BYTES, self.pages)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main()

    async def _main(self) -> None:
        await map_anonymous(ARENA_AT, self.pages)
        await self._write(0)
        for number in range(1, self.rounds + 1):
            await self._protect(_READ_ONLY)
            for page in range(self.pages):
                await expect(ARENA_AT + page * PAGE_BYTES, pattern(page, number - 1))
            await self._protect(RW)
            await self._write(number)

    async def _write(self, number: int) -> None:
        for page in range(self.pages):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, pattern(page, number))

    async def _protect(self, prot: int) -> None:
        if await Syscall("mprotect", (ARENA_AT, self.pages * PAGE_BYTES, prot)) != 0:
            await Mark("wrong", (prot,), "mprotect failed")
