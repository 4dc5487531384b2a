"""A second definition of the allowed set, written to be obviously right and nothing else.

The state of a VCPU is everything its caches *may* hold. After each step it is closed under loading:
whatever can be loaded is loaded. As every rule of removal looks at one item alone, the largest
state contains all others, so this is the enumeration of all TLB and paging-structure-cache states
at once. Items carry no times and no histories; nothing is shared with the oracle, not even names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Read = Callable[[int], int]


@dataclass(frozen=True)
class Upper:
    """A cached entry of an upper level: addresses with `prefix` go on in the table at `base`."""

    level: int
    prefix: int
    base: int
    w: bool
    u: bool
    x: bool


@dataclass(frozen=True)
class Leaf:
    """A cached translation of the page `number` of 2**`shift` bytes."""

    shift: int
    number: int
    frame: int
    w: bool
    u: bool
    x: bool
    d: bool
    g: bool


@dataclass
class Cpu:
    cr3: int
    wp: bool = True
    pse: bool = True
    pge: bool = False
    nxe: bool = False
    top: list[int] = field(default_factory=list)  # PAE: the four registers
    uppers: set[Upper] = field(default_factory=set)
    leaves: set[Leaf] = field(default_factory=set)


class Reference:
    """All VCPUs of a guest whose tables are read by `read(gpa)`.

    Args:
        shifts: First address bit of each level, from the leaf up.
        pages: The addresses that are ever used: loading is closed over these only.
    """

    def __init__(self, shifts: list[int], width: int, read: Read, pages: list[int]) -> None:
        self.shifts, self.width, self.read, self.pages = shifts, width, read, pages
        self.cpus: list[Cpu] = []

    def settle(self) -> None:
        """Load whatever can be loaded."""
        for cpu in self.cpus:
            for gva in self.pages:
                for way in self.ways(cpu, gva, loading=True):
                    if isinstance(way, Leaf):
                        cpu.leaves.add(way)

    def ways(self, cpu: Cpu, gva: int, *, loading: bool) -> Iterator[Leaf | int]:
        """Yield what walks started now can end in: a leaf, or the cause of a fault (0 or 9).

        Loading walks set A, so they pass only by entries that have it; a walk that faults need not.
        """
        top = len(self.shifts) - 1
        open_ways = [Upper(top + 1, 0, cpu.cr3 & ~0xFFF, True, True, True)]
        if cpu.top:
            entry = cpu.top[gva >> 30]
            if not entry & 1:
                if not loading:
                    yield 0
                return
            open_ways = [Upper(top, gva >> 30, entry & 0xFF_FFFF_F000, True, True, True)]
            top -= 1
        for level in range(top, -1, -1):
            prefix = gva >> self.shifts[level]
            below = {up for up in cpu.uppers if up.level == level and up.prefix == prefix}
            for way in open_ways:
                bits = self.shifts[level + 1] - self.shifts[level] if level < top else 10
                index = prefix & ((1 << (bits if self.width == 4 else 9)) - 1)
                value = self.read(way.base + index * self.width)
                if not value & 1:
                    if not loading:
                        yield 0
                    continue
                if loading and not value & 0x20:
                    continue
                w = way.w and bool(value & 2)
                u = way.u and bool(value & 4)
                x = way.x and not value >> 63
                large = level > 0 and bool(value & 0x80) and (cpu.pse or self.width == 8)
                unmarked = bool(value >> 63) and not cpu.nxe
                if self.width == 8 and (unmarked or (cpu.top and value >> 52 & 0x7FF)):
                    if not loading:
                        yield 9
                elif level == 0 or large:
                    if large and self.width == 4 and value >> 21 & 1:
                        if not loading:
                            yield 9
                        continue
                    yield self._leaf(cpu, gva, level, value, (w, u, x))
                else:
                    up = Upper(level, prefix, value & 0xFF_FFFF_F000, w, u, x)
                    below.add(up)
                    if loading:
                        cpu.uppers.add(up)
            open_ways = list(below)

    def _leaf(
        self, cpu: Cpu, gva: int, level: int, value: int, rights: tuple[bool, bool, bool]
    ) -> Leaf:
        shift = self.shifts[level]
        inside = gva & ((1 << shift) - 1)
        address = value & 0xFF_FFFF_F000
        if level:
            address = address >> shift << shift
        return Leaf(
            shift,
            gva >> shift,
            (address | inside) >> 12,
            *rights,
            d=bool(value & 0x40),
            g=bool(value & 0x100) and cpu.pge,
        )

    def may_use(self, cpu: Cpu, gva: int, kind: int, user: bool, frame: int) -> bool:
        """Tell whether some state lets an access reach a frame."""
        return any(
            leaf.number == gva >> leaf.shift
            and self._frame(leaf, gva) == frame
            and self._passes(cpu, leaf, kind, user)
            and (kind != 1 or leaf.d)
            for leaf in cpu.leaves
        )

    @staticmethod
    def _frame(leaf: Leaf, gva: int) -> int:
        inside = gva & ((1 << leaf.shift) - 1)
        return (leaf.frame << 12 >> leaf.shift << leaf.shift | inside) >> 12

    @staticmethod
    def _passes(cpu: Cpu, leaf: Leaf, kind: int, user: bool) -> bool:
        if user and not leaf.u:
            return False
        if kind == 1 and not leaf.w:
            return not user and not cpu.wp
        return kind != 2 or leaf.x

    def may_fault(self, cpu: Cpu, gva: int, error: int) -> bool:
        """Tell whether some state lets an access end in this error code."""
        user = bool(error & 4)
        kind = 2 if error & 16 else 1 if error & 2 else 0
        bits = error & ~9
        if bits != (4 if user else 0) | (2 if kind == 1 else 0) | (16 if kind == 2 else 0):
            return False
        if kind == 2 and not cpu.nxe:
            return False
        cached = [leaf for leaf in cpu.leaves if leaf.number == gva >> leaf.shift]
        for way in [*cached, *self.ways(cpu, gva, loading=False)]:
            cause = way if isinstance(way, int) else 1
            if isinstance(way, Leaf) and self._passes(cpu, way, kind, user):
                continue
            if cause == error & 9:
                return True
        return False

    # Removal

    def invlpg(self, cpu: Cpu, gva: int) -> None:
        cpu.uppers.clear()
        self._drop_page(cpu, gva)

    def fault(self, cpu: Cpu, gva: int) -> None:
        cpu.uppers = {up for up in cpu.uppers if up.prefix != gva >> self.shifts[up.level]}
        self._drop_page(cpu, gva)

    def load_root(self, cpu: Cpu, cr3: int) -> None:
        cpu.cr3 = cr3
        cpu.uppers.clear()
        cpu.leaves = {leaf for leaf in cpu.leaves if leaf.g}

    def drop_all(self, cpu: Cpu) -> None:
        cpu.uppers.clear()
        cpu.leaves.clear()

    @staticmethod
    def _drop_page(cpu: Cpu, gva: int) -> None:
        cpu.leaves = {leaf for leaf in cpu.leaves if leaf.number != gva >> leaf.shift}
