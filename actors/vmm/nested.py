"""Nested paging: GPPN to PPN as a table in machine RAM that the hardware walks itself.

The guest's tables stay its own: stores to them, INVLPG and CR3 loads do not exit, and there is
nothing derived that could be behind. The price is paid at each TLB miss, where every guest entry
read, and the page itself, costs a walk of this table too. An exit comes only for a guest-physical
page that has no entry here, or none for writing.

Source: SDM vol. 3, 29.3 (EPT); field notes 1.8, R8-R10.
"""

from __future__ import annotations

from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.memory import UNBACKED, MemoryManagement, MonitorMemoryShortError
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT

_LEVELS = (3, 2, 1)  # above the leaves
_ALL = 0b111  # read, write, fetch
_SPARE = 64


def frames_for(n_guest_frames: int) -> int:
    """Return the frames a table for so many guest frames takes, and some for holes."""
    n, total = n_guest_frames, _SPARE
    for _ in range(4):
        n = -(-n // 512)
        total += n
    return total


class SecondLevel:
    """The second-level table of one VM, for all its VCPUs.

    Invariant: each backed guest frame is mapped to its machine frame; what else is mapped leads to
    no memory.

    Attributes:
        root: Machine address for the hardware's register.
    """

    def __init__(self, memory: MemoryManagement) -> None:
        self._memory = memory
        self._tables: list[int] = []
        self.root = self._new_table() << PAGE_SHIFT
        self._map_backed()

    def back(self, gpa: int) -> None:
        """Answer a violation: give the page what the VM has there, or nothing that reads as ones.

        Where no frame is left for tables, those of holes are given up. Nothing needs to be
        flushed: what is cached stays true.
        """
        gfn = gpa >> PAGE_SHIFT
        try:
            self._map(gfn)
        except MonitorMemoryShortError:
            self._forget_holes()
            self._map(gfn)

    def follow(self, gfn: int) -> None:
        """Map a guest frame to where it lies now; every CPU of the VM has to flush after it."""
        self._map(gfn)

    def machine_address(self, gpa: int) -> int:
        """Return where an access to guest-physical memory goes that no CPU translates."""
        if not self.entry(gpa >> PAGE_SHIFT):
            self.back(gpa)
        return self.entry(gpa >> PAGE_SHIFT) & -PAGE_BYTES | gpa & (PAGE_BYTES - 1)

    def entry(self, gfn: int) -> int:
        """Return the leaf entry of a guest frame; 0 if there is none."""
        at = self._at(gfn)
        return 0 if at is None else self._memory.ram.load(at, 8)

    def _at(self, gfn: int, *, make: bool = False) -> int | None:
        """Return the machine address of the leaf entry of a guest frame, making tables if asked."""
        ram, table = self._memory.ram, self.root
        for level in _LEVELS:
            at = table + (gfn >> 9 * level & 511) * 8
            entry = ram.load(at, 8)
            if not entry:
                if not make:
                    return None
                entry = self._new_table() << PAGE_SHIFT | _ALL
                ram.store(at, 8, entry)
            table = entry & -PAGE_BYTES
        return table + (gfn & 511) * 8

    def _map(self, gfn: int) -> None:
        memory = self._memory
        inside = gfn < memory.n_guest_frames and memory.frame_view[gfn] != UNBACKED
        pfn = memory.frame_view[gfn] if inside else NOWHERE
        at = self._at(gfn, make=True)
        assert at is not None
        memory.ram.store(at, 8, pfn << PAGE_SHIFT | _ALL)

    def _map_backed(self) -> None:
        for gfn in self._memory.guest_of.values():
            self._map(gfn)

    def _forget_holes(self) -> None:
        for pfn in self._tables[1:]:
            self._memory.give_frame(pfn)
        del self._tables[1:]
        self._memory.ram.clear_frame(self.root >> PAGE_SHIFT)
        self._map_backed()

    def _new_table(self) -> int:
        pfn = self._memory.take_frame()
        self._tables.append(pfn)
        return pfn

    def check(self) -> None:
        """Assert the class invariant."""
        for gfn in range(self._memory.n_guest_frames):
            pfn = self._memory.frame_view[gfn]
            if pfn != UNBACKED:
                assert self.entry(gfn) & ~_ALL == pfn << PAGE_SHIFT, f"gfn {gfn:#x}"
            else:
                assert self.entry(gfn) in (0, NOWHERE << PAGE_SHIFT | _ALL), f"gfn {gfn:#x}"
