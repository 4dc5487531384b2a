"""One process that forks a child and waits for its end, over and over."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import ARENA_AT, WORD, expect, map_anonymous, pattern
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Mark, Store, Syscall

_MAIN = 0


@dataclass(frozen=True)
class ForkWait:
    """`rounds` times: fork, the child ends at once, wait. The parent has `pages` resident pages.

    Before each fork the parent writes one page, which the last fork had made copy-on-write; the
    child reads that page and must find what was written.
    """

    rounds: int = 12
    pages: int = 32

    @property
    def name(self) -> str:
        return "fork-wait"

    @property
    def peak_pages(self) -> int:
        return 2 * self.pages + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA_AT // PAGE_BYTES, self.pages)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else self._child(*args)

    async def _main(self) -> None:
        await map_anonymous(ARENA_AT, self.pages)
        for page in range(self.pages):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, pattern(page))
        for number in range(1, self.rounds + 1):
            page = number % self.pages
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, pattern(page, number))
            child = await Syscall("fork", (1, page, number))
            if child < 0 or await Syscall("wait", (child,)) != child:
                await Mark("wrong", (number, child), "fork or wait failed")

    async def _child(self, page: int, number: int) -> None:
        await expect(ARENA_AT + page * PAGE_BYTES, pattern(page, number))
