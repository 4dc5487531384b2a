"""Nested paging: GPPN to PPN as a table in machine RAM that the hardware walks itself.

The guest's tables stay its own: stores to them, INVLPG and CR3 loads do not exit, and there is
nothing derived that could be behind. The price is paid at each TLB miss, where every guest entry
read, and the page itself, costs a walk of this table too. An exit comes only for a guest-physical
page that has no entry here, or none for writing.

Source: SDM vol. 3, 29.3 (EPT); field notes 1.8, R8-R10.
"""

from __future__ import annotations

import numpy as np

from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.memory import UNBACKED, MemoryManagement, MonitorMemoryShortError
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT

_LEVELS = (3, 2, 1)  # above the leaves
_ALL = 0b111  # read, write, fetch
_WRITE = 0b010
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

    Invariant: each guest frame is mapped to its machine frame, read-only if others lie there, too,
    or it is not mapped: where frames move it is mapped when it is touched. What else is mapped
    leads to no memory.

    Attributes:
        root: Machine address for the hardware's register.
    """

    def __init__(self, memory: MemoryManagement) -> None:
        self._memory = memory
        self._on_demand = memory.n_unready > 0
        self._tables: list[int] = []
        self.root = self._new_table() << PAGE_SHIFT
        self._map_backed()

    def back(self, gpa: int) -> None:
        """Answer a violation: give the page what the VM has there, or nothing that reads as ones.

        A frame that is absent has been brought before. Where no frame is left for tables, those of
        holes are given up. Nothing needs to be flushed: what is cached stays true.
        """
        gfn = gpa >> PAGE_SHIFT
        try:
            self._map(gfn)
        except MonitorMemoryShortError:
            self._forget_holes()
            self._map(gfn)

    def forget(self, gfn: int) -> None:
        """Map a guest frame nowhere until it is touched; every CPU of the VM has to flush."""
        at = self._at(gfn)
        if at is not None:
            self._memory.ram.store(at, 8, 0)

    def machine_address(self, gpa: int) -> int:
        """Return where an access to guest-physical memory goes that no CPU translates."""
        if not self.entry(gpa >> PAGE_SHIFT):
            self.back(gpa)
        return self.entry(gpa >> PAGE_SHIFT) & -PAGE_BYTES | gpa & (PAGE_BYTES - 1)

    def entry(self, gfn: int) -> int:
        """Return the leaf entry of a guest frame; 0 if there is none."""
        at = self._at(gfn)
        return 0 if at is None else self._memory.ram.load(at, 8)

    def leaves(self) -> list[tuple[int, int]]:
        """Return what is mapped: guest frames, and the machine frame each leads to."""
        return [(gfn, entry >> PAGE_SHIFT) for gfn, entry in self._entries().items()]

    def _entries(self) -> dict[int, int]:
        """Return the leaf entries that are there, by guest frame."""
        words, found = self._memory.ram.array64.reshape(-1, 512), {0: self.root}
        for _ in (*_LEVELS, 0):
            found = {
                first << 9 | index: int(words[table >> PAGE_SHIFT, index])
                for first, table in found.items()
                for index in np.flatnonzero(words[table >> PAGE_SHIFT]).tolist()
            }
        return found

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
        assert not memory.is_absent(gfn), f"guest frame {gfn:#x} is in no machine frame"
        at = self._at(gfn, make=True)
        assert at is not None
        memory.ram.store(at, 8, self._wanted(gfn))

    def _wanted(self, gfn: int) -> int:
        memory = self._memory
        inside = gfn < memory.n_guest_frames and memory.frame_view[gfn] != UNBACKED
        pfn = memory.frame_view[gfn] if inside else NOWHERE
        return pfn << PAGE_SHIFT | (_ALL if memory.ready(gfn, True) else _ALL & ~_WRITE)

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
        memory, entries = self._memory, self._entries()
        for gfn in range(memory.n_guest_frames):
            entry = entries.get(gfn, 0)
            if memory.is_absent(gfn):
                assert entry == 0, f"gfn {gfn:#x} is mapped and absent"
            elif memory.frame_view[gfn] == UNBACKED or self._on_demand:
                # Fewer rights than it could have cost an exit, more would be an error.
                assert not entry or not entry & ~self._wanted(gfn), f"gfn {gfn:#x}"
                assert not entry or entry | _WRITE == self._wanted(gfn) | _WRITE, f"gfn {gfn:#x}"
            else:
                assert entry == self._wanted(gfn), f"gfn {gfn:#x}"
