"""The areas of an address space: which pages a process may use, how, and what is behind them.

Everything is counted in pages. An area's pages come from an object: none (private zero-filled
memory), a file, the initial image, or a shared anonymous object that lives as long as areas name
it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2

ANONYMOUS = -1
SHARED_OBJECTS = 1 << 40
_M64 = (1 << 64) - 1


def image_object(number: int) -> int:
    """Return the object id of initial image `number`: below every other id."""
    return -2 - number


def page_word(file_id: int, page: int) -> int:
    """Return the 64-bit word that fills page `page` of object `file_id` when it is first read."""
    if file_id == ANONYMOUS or file_id >= SHARED_OBJECTS:
        return 0
    x = (file_id * 0x9E3779B97F4A7C15 + page * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class Area:
    """Pages `first` to `stop` (exclusive) of an address space.

    Attributes:
        prot: Sum of PROT_READ, PROT_WRITE, PROT_EXEC.
        shared: Whether stores reach the object (and so the other processes that map it).
        file_id: The object behind it.
        offset: Page of the object behind page `first`.
        huge: Whether a first use may map a whole large page.
    """

    first: int
    stop: int
    prot: int
    shared: bool
    file_id: int
    offset: int
    huge: bool = False

    def object_page(self, vpn: int) -> int:
        return self.offset + vpn - self.first

    def clip(self, first: int, stop: int) -> Area:
        """Return the part of this area inside `first` .. `stop`; there must be one."""
        lo, hi = max(first, self.first), min(stop, self.stop)
        assert lo < hi
        return replace(self, first=lo, stop=hi, offset=self.object_page(lo))

    def move(self, first: int) -> Area:
        return replace(self, first=first, stop=first + self.stop - self.first)

    def continues(self, other: Area) -> bool:
        """Tell whether `other` is directly above and the two are one."""
        if self.stop != other.first or self._kind != other._kind:
            return False
        return self.file_id == ANONYMOUS or self.object_page(self.stop) == other.offset

    @property
    def _kind(self) -> tuple[int, bool, int, bool]:
        return self.prot, self.shared, self.file_id, self.huge


class AreaMap:
    """The areas of one address space.

    Invariant: areas are non-empty, sorted, disjoint, and no two neighbours could be one.
    """

    def __init__(self, areas: Iterator[Area] | None = None) -> None:
        self._areas = list(areas or ())
        self._firsts = [area.first for area in self._areas]

    def __iter__(self) -> Iterator[Area]:
        return iter(tuple(self._areas))

    def __len__(self) -> int:
        return len(self._areas)

    def find(self, vpn: int) -> Area | None:
        """Return the area that holds page `vpn`."""
        index = bisect_right(self._firsts, vpn) - 1
        if index < 0 or self._areas[index].stop <= vpn:
            return None
        return self._areas[index]

    def overlapping(self, first: int, stop: int) -> list[Area]:
        """Return what is mapped in `first` .. `stop`, clipped to it."""
        lo, hi = self._span(first, stop)
        return [area.clip(first, stop) for area in self._areas[lo:hi]]

    def remove(self, first: int, stop: int) -> list[Area]:
        """Take everything out of `first` .. `stop` and return it."""
        lo, hi = self._span(first, stop)
        taken = self._areas[lo:hi]
        rest = []
        for area in taken:
            if area.first < first:
                rest.append(area.clip(area.first, first))
            if area.stop > stop:
                rest.append(area.clip(stop, area.stop))
        self._replace(lo, hi, rest)
        return [area.clip(first, stop) for area in taken]

    def insert(self, area: Area) -> None:
        """Put an area where nothing is, joining it with the neighbours it continues."""
        lo, hi = self._span(area.first, area.stop)
        assert lo == hi, f"pages {area.first:#x} to {area.stop:#x} are taken"
        if lo and self._areas[lo - 1].continues(area):
            lo -= 1
            area = replace(self._areas[lo], stop=area.stop)
        if hi < len(self._areas) and area.continues(self._areas[hi]):
            area = replace(area, stop=self._areas[hi].stop)
            hi += 1
        self._replace(lo, hi, [area])

    def gap(self, n_pages: int, base: int, limit: int, hole: tuple[int, int]) -> int | None:
        """Return the first page at or above `base` with `n_pages` free pages below `limit`.

        Args:
            hole: First and stop page of a range that must stay free (the kernel's window).
        """
        at = base
        while at + n_pages <= limit:
            blocked = [area.stop for area in self.overlapping(at, at + n_pages)]
            if at < hole[1] and hole[0] < at + n_pages:
                blocked.append(hole[1])
            if not blocked:
                return at
            at = max(blocked)
        return None

    def check(self) -> None:
        assert self._firsts == [area.first for area in self._areas]
        for area in self._areas:
            assert area.first < area.stop
        for low, high in zip(self._areas, self._areas[1:], strict=False):
            assert low.stop <= high.first and not low.continues(high)

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        lo = bisect_right(self._firsts, first)
        if lo and self._areas[lo - 1].stop > first:
            lo -= 1
        hi = lo
        while hi < len(self._areas) and self._areas[hi].first < stop:
            hi += 1
        return lo, hi

    def _replace(self, lo: int, hi: int, areas: list[Area]) -> None:
        self._areas[lo:hi] = areas
        self._firsts[lo:hi] = [area.first for area in areas]
