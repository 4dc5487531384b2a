"""Many processes with many page tables each, switched by the timer and by giving way."""

from __future__ import annotations

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

_STRIDE = 4 << 20  # a table's span at least, in either format
_MAIN, _PROCESS = 0, 1


@dataclass(frozen=True)
class ProcessSwitcher:
    """`processes` processes go over `regions` far-apart regions of `pages` pages, `turns` times.

    All use the same addresses, so every address means another page after each switch. In each turn
    a process gives way after every region and renews one region, whose tables go and come back.
    """

    processes: int = 6
    regions: int = 8
    pages: int = 2
    turns: int = 6

    @property
    def name(self) -> str:
        return "process-switcher"

    @property
    def peak_pages(self) -> int:
        return (self.processes + 1) * self.regions * self.pages + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(self._at(region) // PAGE_BYTES, self.pages) for region in range(self.regions)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else self._process(args[0])

    @staticmethod
    def _at(region: int) -> int:
        return ARENA_AT + region * _STRIDE

    async def _main(self) -> None:
        for number in range(self.processes):
            if await Syscall("fork", (_PROCESS, number)) < 0:
                await Mark("wrong", (number,), "fork failed")
        for _ in range(self.processes):
            await Syscall("wait", (-1,))

    async def _process(self, number: int) -> None:
        versions = [0] * self.regions
        for region in range(self.regions):
            await self._renew(number, region, 0)
        for turn in range(1, self.turns + 1):
            for region, version in enumerate(versions):
                for page in range(self.pages):
                    await expect(
                        self._at(region) + page * PAGE_BYTES, pattern(number, region, page, version)
                    )
                await Syscall("yield")
            renewed = (number + turn) % self.regions
            versions[renewed] = turn
            await Syscall("munmap", (self._at(renewed), self.pages * PAGE_BYTES))
            await self._renew(number, renewed, turn)

    async def _renew(self, number: int, region: int, version: int) -> None:
        gva, n_bytes = self._at(region), self.pages * PAGE_BYTES
        args = (gva, n_bytes, RW, PRIVATE_ANONYMOUS | FIXED, -1, 0)
        if await Syscall("mmap", args) != gva:
            await Mark("wrong", (gva,), "mmap failed")
        for page in range(self.pages):
            word = pattern(number, region, page, version)
            await Store(gva + page * PAGE_BYTES, WORD, word)
