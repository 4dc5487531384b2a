"""Programs that a test writes as a few coroutine functions."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from penumbra.guest.programs.program import Image
from penumbra.hw.operations import Mark, Syscall

ARENA = 0x2000_0000
PAGE = 4096
ANONYMOUS, SHARED, FILE = 0x32, 0x31, 0x12
RW, RO, NONE = 3, 1, 0


@dataclass(frozen=True)
class Script:
    """Entry n is `entries[n]`; the first process starts at 0."""

    entries: tuple[Callable[..., Coroutine[Any, Any, Any]], ...]
    images: tuple[Image, ...] = (Image(),)
    name: str = "script"
    peak_pages: int = 64

    def image(self, number: int) -> Image:
        return self.images[number]

    def start(self, entry: int, args: tuple[int, ...]) -> Coroutine[Any, Any, Any]:
        return self.entries[entry](*args)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA // PAGE, 0x4000)]


def script(*entries: Callable[..., Coroutine[Any, Any, Any]]) -> Script:
    return Script(entries)


async def mmap(
    gva: int, n_pages: int, prot: int = RW, flags: int = ANONYMOUS, file_id: int = -1, page: int = 0
) -> int:
    result: int = await Syscall("mmap", (gva, n_pages * PAGE, prot, flags, file_id, page))
    return result


async def saw(*values: int) -> None:
    """Let the test know what the program has seen."""
    await Mark("saw", values)
