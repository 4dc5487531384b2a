"""What the kernel asks of a program.

Python cannot copy a coroutine, so fork, exec and thread creation name an *entry* of the program and
its arguments: the new process or thread starts there, on a copy of (or in) its creator's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penumbra.guest.threads import GuestCoroutine


class ImageRegion(Protocol):
    """Pages that are mapped before a program's first instruction (a recording's `Region` is
    one)."""

    @property
    def first_vpn(self) -> int: ...
    @property
    def n_pages(self) -> int: ...
    @property
    def prot(self) -> int: ...


@dataclass(frozen=True)
class PageRegion:
    """A plain `ImageRegion`; `prot` as for mmap: 1 read, 2 write, 4 execute."""

    first_vpn: int
    n_pages: int
    prot: int


@dataclass(frozen=True)
class Image:
    """What exec maps.

    Attributes:
        number: Names the contents: page p of image n is filled with a word made from both.
        regions: Disjoint page ranges.
        heap: Initial break (byte address), 0 if the program has no heap or its first `brk` says it.
        underlies: Its pages are there again wherever a mapping laid over them has gone.
    """

    number: int = 0
    regions: Sequence[ImageRegion] = ()
    heap: int = 0
    underlies: bool = False


class Program(Protocol):
    """A program: images and entry points, both by number."""

    @property
    def name(self) -> str: ...

    @property
    def peak_pages(self) -> int:
        """Upper bound of the pages that all its processes have resident at once."""
        ...

    def image(self, number: int) -> Image:
        """Return what exec of image `number` maps; 0 is the first process's."""
        ...

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        """Return a fresh coroutine that runs entry `entry`; 0 is the first process's."""
        ...

    def used_ranges(self) -> Sequence[tuple[int, int]]:
        """Return the page ranges (first, number) it uses at addresses of its own choice."""
        ...
