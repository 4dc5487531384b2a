"""One process that calls its kernel for next to nothing."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import ARENA_AT, WORD, map_anonymous, pattern
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Mark, Store, Syscall


@dataclass(frozen=True)
class SystemCalls:
    """`calls` times `getpid`, which must always give the same answer; a page says it was done."""

    calls: int = 1000

    @property
    def name(self) -> str:
        return "system-calls"

    @property
    def peak_pages(self) -> int:
        return 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA_AT // PAGE_BYTES, 1)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main()

    async def _main(self) -> None:
        pid = await Syscall("getpid")
        for _ in range(self.calls - 1):
            if (found := await Syscall("getpid")) != pid:
                await Mark("wrong", (pid, found), "getpid changed its mind")
        await map_anonymous(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, pattern(pid, self.calls))
