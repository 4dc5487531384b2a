"""What the methods of one VCPU's virtual TLB work on together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.schemes import SchemeOptions
from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.vtlb.entries import Entries, Mode, Words
from penumbra.actors.vmm.vtlb.sharing import Pair, Pairs, Use
from penumbra.actors.vmm.vtlb.tables import Hierarchy, Place
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.formats import PAGE_SHIFT, FormatSpec


@dataclass
class State:
    """One VCPU's registers, the pair it runs on, and what its CPU has to be told.

    Attributes:
        registers: Guest control registers: CR0, CR2, CR3, CR4 as the guest believes they are.
        level: Current privilege level of the guest, 0 to 3.
        flushes: Addresses its CPU must flush before it runs the guest again; FLUSH_ALL is all.
    """

    vcpu_id: int
    entries: Entries
    pairs: Pairs
    options: SchemeOptions
    registers: GuestRegisters = field(default_factory=GuestRegisters)
    level: int = 0
    flushes: list[int] = field(default_factory=list)
    _pair: Pair | None = None
    _mode: Mode | None = None

    @property
    def spec(self) -> FormatSpec:
        return self.entries.spec

    @property
    def memory(self) -> MemoryManagement:
        return self.entries.memory

    @property
    def has_root(self) -> bool:
        """Whether a root has been loaded."""
        return self._pair is not None

    @property
    def pair(self) -> Pair:
        assert self._pair is not None, "no root is loaded"
        return self._pair

    @property
    def mode(self) -> Mode:
        assert self._mode is not None, "no root is loaded"
        return self._mode

    @property
    def user(self) -> bool:
        """Whether the guest is at a level that page protection calls user (510)."""
        return self.is_user(self.level)

    def is_user(self, level: int) -> bool:
        return level != 0 if self.printed("ET10") else level == 3

    def printed(self, erratum: str) -> bool:
        """Tell whether an erratum's printed form is asked for."""
        return erratum in self.options.errata

    def guest_table(self, gfn: int, level: int) -> Words | None:
        """Return a guest table's entries, in registers or not; None: it is in no machine frame."""
        if self.entries.in_registers(level):
            return np.array(self.registers.top, np.uint64)
        return self.entries.table(self.entries.frame(gfn)) if self.entries.backed(gfn) else None

    def root_gfn(self) -> int:
        """Return the guest frame of the guest's root table."""
        return (self.registers.cr3 & self.spec.frame_mask) >> PAGE_SHIFT

    def join(self) -> None:
        """Run on the pair that root and modes call for."""
        mode = Mode.of(self.registers)
        self._mode = replace(mode, pse=True) if self.printed("ET12") else mode
        root, top = (self.root_gfn(), self.registers.top) if self._mode.paging else (-1, ())
        before = self._pair
        self._pair = self.pairs.join(Use(self.vcpu_id, root, self._mode, top))
        if before is not None and before is not self._pair:
            self.flushes.append(FLUSH_ALL)

    def drop(self, hierarchy: Hierarchy, place: Place) -> None:
        """Make an active entry not present; what was freed must leave the CPUs' caches."""
        if hierarchy.clear(place, self.pair.others(self.vcpu_id)):
            self.flushes.append(FLUSH_ALL)

    def empty(self) -> None:
        """Drop all of the virtual TLB's content."""
        self.pair.empty(self.vcpu_id)
        self.flushes.append(FLUSH_ALL)

    def forget_frame(self, gfn: int) -> None:
        """Drop every entry that maps the machine frame behind a guest frame.

        Entries are not kept by what they map: frames move seldom, and each table is one comparison.
        """
        pfn = self.entries.frame(gfn)
        found = self.pairs.shared  # another VCPU may have cleared it, with this CPU still to flush
        for pair in self.pairs.used_by(self.vcpu_id):
            for hierarchy in pair.both:
                for place in hierarchy.mapping(pfn):
                    hierarchy.clear(place, pair.others(self.vcpu_id))
                    found = True
        if found:
            self.flushes.append(FLUSH_ALL)

    def empty_all(self) -> None:
        """Storage is short: a TLB may drop what it likes, so every pair here is emptied."""
        self.pairs.forget(0)
        for pair in self.pairs.all():
            pair.empty(self.vcpu_id)
        self.flushes.append(FLUSH_ALL)
