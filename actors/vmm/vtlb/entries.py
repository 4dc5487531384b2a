"""What an active entry is, given the guest entry it stands for.

The user hierarchy has the guest's own rights. In the supervisor hierarchy every entry is open to
the hardware's user mode, in which all guest software runs, and it is writable where the guest's is
or where the guest keeps CR0.WP clear. A leaf is read-only in both until the guest's D is set, so
that the first store exits: that rule comes last and wins.

G, PWT and PCD are the monitor's and stay clear: a global translation would survive the reload of
CR3 at a change of privilege. A and D are preset, for nobody reads them in an active entry.

Source: VTLB Figs 7B-7C, blocks 736-764, 846-848; Figs 10A/B, blocks 1012-1026, 1038-1052.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.memory import UNBACKED, MemoryManagement
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.compiled import kernels_for
from penumbra.hw.formats import (
    CR0_WP,
    CR4_PSE,
    EFER_NXE,
    NX,
    PAGE_SHIFT,
    PS,
    A,
    D,
    FormatSpec,
    P,
    U,
    W,
)

Words = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Mode:
    """What of the guest's registers decides what entries mean; equal modes may share tables."""

    paging: bool
    wp: bool
    pse: bool
    nxe: bool

    @classmethod
    def of(cls, registers: GuestRegisters) -> Mode:
        return cls(
            registers.paging,
            bool(registers.cr0 & CR0_WP),
            bool(registers.cr4 & CR4_PSE),
            bool(registers.efer & EFER_NXE),
        )


class Entries:
    """Makes active entries of one paging format over one VM's memory."""

    def __init__(self, spec: FormatSpec, memory: MemoryManagement) -> None:
        self.spec = spec
        self.memory = memory
        self._nx = NX if spec.has_nx else 0
        self._leaf_frame = kernels_for(spec).functions.leaf_frame

    def same(self, mine: int, now: int) -> bool:
        """Tell whether an active upper entry still stands for the guest entry it was built from.

        A and D are the hardware's marks: the guest's meaning does not change with them.
        """
        return not (mine ^ now) & ~(A | D)

    def is_large(self, entry: int, level: int, mode: Mode) -> bool:
        """Tell whether a guest entry maps a large page (730): PS, where it counts."""
        spec = self.spec
        return bool(entry & PS) and spec.levels[level].large and self._ps_counts(mode)

    def _ps_counts(self, mode: Mode) -> bool:
        return mode.pse or not self.spec.large_needs_pse

    def upper(self, entry: int, level: int, pfn: int, user: bool, mode: Mode) -> int:
        """Return the active entry that links the table in machine frame `pfn` (732-764)."""
        if self.in_registers(level):
            return (pfn << PAGE_SHIFT) | P
        return (pfn << PAGE_SHIFT) | P | A | self.rights(entry, user, mode)

    def page(self, entry: int, gfn: int, user: bool, mode: Mode) -> int:
        """Return the active entry that maps guest frame `gfn`: read-only while others lie there."""
        value = self.leaf(entry, self.frame(gfn), user, mode)
        return value & ~W if self.memory.is_shared(gfn) else value

    def in_registers(self, level: int) -> bool:
        """Tell whether CPUs hold a level's entries in registers: those carry no rights and no A."""
        return self.spec.root_registers > 0 and level == self.spec.top

    def leaf(self, entry: int, pfn: int, user: bool, mode: Mode) -> int:
        """Return the active entry that maps machine frame `pfn` (736-764, 846)."""
        rights = self.rights(entry, user, mode)
        if not entry & D:
            rights &= ~W  # 752-756
        return (pfn << PAGE_SHIFT) | P | A | D | rights

    def large(self, entry: int, pfn: int, user: bool, mode: Mode) -> int:
        """Return the active entry that maps a whole large page from machine frame `pfn` on."""
        return self.leaf(entry, pfn, user, mode) | PS

    def rights(self, entry: int, user: bool, mode: Mode) -> int:
        """Return W, U and NX of an active entry in the user or the supervisor hierarchy."""
        if user:
            return entry & (W | U | self._nx)  # 740, 758
        open_to_all = 0 if mode.wp else W
        return entry & (W | self._nx) | U | open_to_all  # 740, 762, 764

    def first_frame(self, entry: int, level: int) -> int:
        """Return the first guest frame of the page a guest leaf maps."""
        return int(self._leaf_frame(entry - (1 << 64) if entry >> 63 else entry, level))

    def frame(self, gfn: int) -> int:
        """Return the machine frame a guest frame lies in; where it lies in none, `NOWHERE`."""
        memory = self.memory
        pfn = memory.frame_view[gfn] if 0 <= gfn < memory.n_guest_frames else UNBACKED
        assert pfn < 0 or gfn in memory.guests(pfn), "a frame of another VM"
        return NOWHERE if pfn < 0 else pfn

    def backed(self, gfn: int) -> bool:
        """Tell whether the VM has memory there now (714, 836, 1008, 1034)."""
        return self.frame(gfn) != NOWHERE

    def contiguous(self, gfn: int, level: int) -> int | None:
        """Return the machine frame a large guest page starts at, if it lies there in one piece."""
        n = 1 << (self.spec.levels[level].shift - PAGE_SHIFT)
        memory = self.memory
        if gfn + n > memory.n_guest_frames:
            return None
        first = memory.frame_view[gfn]
        if first < 0 or first & (n - 1):
            return None
        frames = memory.frame_map[gfn : gfn + n]
        whole = np.array_equal(frames, np.arange(first, first + n))
        return first if whole and not memory.are_shared(frames).any() else None

    # ---- whole tables at once: method 1000 ------------------------------------------------------

    def table(self, pfn: int) -> Words:
        """Return a view of the entries in a machine frame."""
        n = self.spec.levels[0].n_entries
        ram = self.memory.ram
        words: npt.NDArray[Any] = ram.array64 if self.spec.entry_bytes == 8 else ram.array32
        return words[pfn * n : (pfn + 1) * n].view(f"u{self.spec.entry_bytes}")

    def loadable(self, entries: Words, level: int, mode: Mode) -> npt.NDArray[np.bool_]:
        """Tell which guest leaves may be loaded unasked: P and A set, nothing reserved (1030)."""
        bad = self.spec.levels[level].reserved | (0 if mode.nxe else self._nx)
        mask = entries.dtype.type(P | A | bad)
        wanted: npt.NDArray[np.bool_] = (entries & mask) == entries.dtype.type(P | A)
        return wanted

    def leaves(self, entries: Words, user: bool, mode: Mode) -> tuple[Words, npt.NDArray[np.bool_]]:
        """Return the active entries of a table of guest leaves, and which have memory behind them.

        Entries without are 0 (1032). Others of the table must be masked by the caller.
        """
        kind = entries.dtype.type
        gfns = ((entries & kind(self.spec.frame_mask)) >> kind(PAGE_SHIFT)).astype(np.int64)
        inside = gfns < self.memory.n_guest_frames
        pfns = np.where(inside, self.memory.frame_map[np.where(inside, gfns, 0)], UNBACKED)
        backed = pfns >= 0
        rights = entries & kind(W | self._nx | (U if user else 0))
        if not user:
            rights |= kind(U | (0 if mode.wp else W))
        writable = (entries & kind(D) != 0) & ~self.memory.are_shared(pfns)
        rights &= ~np.where(writable, kind(0), kind(W))  # 1042, 1044
        values = (pfns.astype(entries.dtype) << kind(PAGE_SHIFT)) | rights | kind(P | A | D)
        return np.where(backed, values, kind(0)), backed
