"""One process that does nothing but take page faults of the guest's own."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import ARENA_AT, WORD, expect, map_anonymous, pattern
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Mark, Store, Syscall

_STRIDE = 2  # so that no neighbour is mapped by the same fault, should a kernel ever do that


@dataclass(frozen=True)
class PageFault:
    """`rounds` times: map `pages` pages, touch each for the first time, unmap them; the last stay.

    Every page must be zero at first, whatever was in its frame before.
    """

    rounds: int = 4
    pages: int = 48

    @property
    def name(self) -> str:
        return "page-fault"

    @property
    def peak_pages(self) -> int:
        return self.pages + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA_AT // PAGE_BYTES, self.pages * _STRIDE)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main()

    async def _main(self) -> None:
        n_bytes = self.pages * _STRIDE * PAGE_BYTES
        for number in range(self.rounds):
            await map_anonymous(ARENA_AT, self.pages * _STRIDE)
            for page in range(self.pages):
                gva = ARENA_AT + page * _STRIDE * PAGE_BYTES
                await expect(gva, 0)
                await Store(gva, WORD, pattern(page, number))
            last = number == self.rounds - 1  # whose pages stay, to be compared
            if not last and await Syscall("munmap", (ARENA_AT, n_bytes)) != 0:
                await Mark("wrong", (number,), "munmap failed")
