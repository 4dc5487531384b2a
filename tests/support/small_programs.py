"""Guest programs made for one test each: hostile ones, broken ones, and one that opens race 1."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    PRIVATE_ANONYMOUS,
    RW,
    SHARED_AT,
    WORD,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, SpinUntil, Store, Syscall

Body = Callable[[], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class SmallProgram:
    """A program whose entries are the given coroutine functions."""

    name: str
    bodies: tuple[Body, ...]
    peak_pages: int = 64
    ranges: list[tuple[int, int]] = field(default_factory=lambda: [(ARENA_AT >> 12, 4096)])

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return self.ranges

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self.bodies[entry]()


async def map_pages(gva: int, n_pages: int, prot: int = RW) -> None:
    """Map anonymous private pages at a fixed address."""
    await Syscall("mmap", (gva, n_pages * PAGE_BYTES, prot, PRIVATE_ANONYMOUS | FIXED, -1, 0))


def race_one() -> SmallProgram:
    """Two CPUs change one entry before a third takes its event.

    Thread X, on the later CPU, raises the page to writable, which needs no flush; then the main
    thread, on CPU 0, makes it read-only and shoots down; then Z writes. Z's event finds main's
    patch first and X's older one second: if X's derived value passes for useful, Z can write.
    """
    page, phase = ARENA_AT, SHARED_AT

    async def when(n: int) -> None:
        # Spinning, not waiting in the kernel, keeps each thread on its CPU.
        await SpinUntil(phase, WORD, (1 << 64) - 1, n)

    async def main() -> None:
        await map_pages(phase, 1)
        await map_pages(page, 1)
        await Store(page, WORD, 1)
        await Syscall("thread_create", (1,))
        await Syscall("thread_create", (2,))
        await when(1)
        await Syscall("mprotect", (page, PAGE_BYTES, 1))
        await Store(phase, WORD, 2)
        await when(4)
        await Syscall("mprotect", (page, PAGE_BYTES, 1))
        await Store(phase, WORD, 5)
        await when(6)

    async def raiser() -> None:
        await when(3)
        await Load(page, WORD)  # now this CPU's shadow has the table, too: it derives for others
        await Syscall("mprotect", (page, PAGE_BYTES, RW))
        await Store(phase, WORD, 4)
        await when(6)

    async def writer() -> None:
        await Store(page, WORD, 2)
        await Store(phase, WORD, 1)
        await when(2)
        await Load(page, WORD)
        await Store(phase, WORD, 3)
        await when(5)
        await Store(page, WORD, 3)
        await Store(phase, WORD, 6)

    return SmallProgram("race-one", (main, raiser, writer))
