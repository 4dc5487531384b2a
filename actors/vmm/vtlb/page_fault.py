"""Method 700: a page fault is the guest's own, or an inconsistency of the virtual TLB.

    704-706   find the active entries, choose the hierarchy of the access's privilege
    710, 832  would the guest's tables refuse?          yes: 712, 834  the guest's fault
    714, 836  does the VM have memory there?            no: 716, 838  machine check, if asked for
              a device there?                           yes: the emulator 330 does the access
              in no machine frame, or not its own?      it is brought first, then asked again
    718, 840  no active entry: 730-764, 846             A is set, the entry built
    720, 842  active entry read-only for want of D: 802-809, 848     D is set, the entry opened
    722, 844  active entry older than what the guest says: built anew (printed: the guest's fault)
    822, 828  active entry permits: only the hardware's TLB was behind
    768-770, 810-812, 822-824, 828-830, 850-852   host INVLPG, execute again

Level by level from the root, for both hierarchies, whatever the format. One exit fills the whole
path; with `options.levels = "one"` each exit builds one level, as printed.

Source: VTLB Figs 7A-7D; SDM vol. 3, 32.3.5.2.
"""

from __future__ import annotations

from typing import TypeAlias

from penumbra.actors.vmm.fill import BringFrame, Emulate, Forward, Hidden, MachineCheck
from penumbra.actors.vmm.memory import MonitorMemoryShortError
from penumbra.actors.vmm.vtlb.build import Builder
from penumbra.actors.vmm.vtlb.reading import GuestReader, Reading
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import Hierarchy, Place
from penumbra.actors.vmm.walk import Step
from penumbra.hw.formats import NX, PAGE_SHIFT, PF_I, PF_P, PF_U, PF_W, A, D, P, U, W
from penumbra.hw.streams import FETCH, WRITE

Answer: TypeAlias = Forward | Hidden | Emulate | MachineCheck | BringFrame
_HIDDEN, _DEVICE = Hidden(), Emulate(device=True)


class PageFaultMethod:
    """Answers one VCPU's hardware page faults."""

    def __init__(self, state: State, reader: GuestReader, builder: Builder) -> None:
        self._state = state
        self._reader = reader
        self._builder = builder

    def answer(self, gva: int, kind: int, user: bool) -> Answer:
        """Answer a fault of an access; `user` is the access's own privilege, not the level's."""
        state = self._state
        if state.printed("ET9"):
            user = state.user
        examined = state.pair.of(user)  # 704, 706
        reading = self._reader.read(examined, gva, kind, user)
        if reading.unready is not None:
            return BringFrame(reading.unready, True)
        if reading.error is not None:  # 710, 832
            return Forward(self._code(examined, gva, kind, reading.error))  # 712, 834
        if state.memory.is_device(reading.gfn):
            return _DEVICE
        if not state.memory.ready(reading.gfn, kind == WRITE):
            return BringFrame(reading.gfn, kind == WRITE)
        if state.printed("ET14") and not state.entries.backed(reading.gfn):  # 714, 836
            return MachineCheck(gva, reading.gfn << PAGE_SHIFT)  # 716, 838
        if self._reflected(examined, gva, kind, user, reading):  # 720, 842
            code = (PF_P | (PF_W if kind == WRITE else 0) | (PF_U if user else 0)) | (
                PF_I if kind == FETCH else 0
            )
            return Forward(self._code(examined, gva, kind, reading.denied or code))  # 722, 844
        if state.printed("ET15"):
            state.registers.cr2 = gva
        self._fill(examined, gva, kind, reading)
        state.flushes.append(gva)  # 768, 810, 822, 828, 850
        return _HIDDEN  # 770, 812, 824, 830, 852

    def _fill(self, examined: Hierarchy, gva: int, kind: int, reading: Reading) -> None:
        """Set A and D, then build both paths; if storage is short, in an emptied virtual TLB."""
        state = self._state
        skip = len(examined.path(gva)) if state.printed("ET1b") else 0
        steps = self._reader.mark(reading, kind, min(skip, len(reading.steps) - 1))
        for attempt in range(2):
            try:
                for hierarchy in state.pair.both:
                    self._path(hierarchy, gva, steps, reading.gfn)
                return
            except MonitorMemoryShortError:
                if attempt and not state.pairs.storage.owing:
                    raise
                state.empty_all()
        # The frames wait for other CPUs' flushes, which end with this exit: fault again.

    def _path(self, h: Hierarchy, gva: int, steps: list[Step], gfn: int) -> None:
        """Make a hierarchy's path of `gva` stand for the guest's (718, 730-766, 840, 846)."""
        builder, table = self._builder, h.root
        n_linked = builder.n_linked
        for step in steps[:-1]:
            table = builder.upper(h, (table, h.index(table, gva)), step.entry)
            if builder.n_linked > n_linked and self._state.options.levels == "one":
                return
        place = (table, h.index(table, gva))
        if table.level:
            builder.large(h, place, steps[-1].entry, gfn, gva)
        else:
            builder.page(h, place, steps[-1].entry, gfn)
            self._prefetch(h, place, steps[-1])

    def _prefetch(self, h: Hierarchy, place: Place, leaf: Step) -> None:
        """Load neighbours the guest has used already: a TLB may load what it likes."""
        state, n = self._state, self._state.options.prefetch
        if not n or not state.mode.paging:
            return
        spec, entries, (table, index) = state.spec, state.entries, place
        base = leaf.gpa - index * spec.entry_bytes
        bad = spec.levels[0].reserved | (NX if spec.has_nx and not state.mode.nxe else 0)
        for near in range(max(0, index - n), min(spec.levels[0].n_entries, index + n + 1)):
            if near in table.origin:
                continue
            entry = state.memory.load(base + near * spec.entry_bytes, spec.entry_bytes)
            gfn = (entry & spec.frame_mask) >> PAGE_SHIFT
            if entry & (P | A) == P | A and not entry & bad and entries.backed(gfn):
                self._builder.page(h, (table, near), entry, gfn)

    # ---- as printed -----------------------------------------------------------------------------

    def _reflected(
        self, examined: Hierarchy, gva: int, kind: int, user: bool, reading: Reading
    ) -> bool:
        """Tell whether a printed form delivers a fault that the guest's tables do not explain."""
        if not self._state.options.errata:
            return False
        refusing = self._refusing(examined, gva, kind, user)
        if refusing is None:
            return False
        table, _ = refusing
        last = reading.steps[-1]
        of_page = table.level <= last.level
        if kind == WRITE and of_page and not last.entry & D:
            return False  # 802, 848
        if reading.denied is not None:
            return True
        if kind == WRITE and not user and not self._state.mode.wp and self._state.printed("ET3"):
            return True
        return self._state.printed("ET5")

    def _refusing(self, h: Hierarchy, gva: int, kind: int, user: bool) -> Place | None:
        """Return the present active entry that refuses the access, if one does (708, 826)."""
        for table, index in h.path(gva):
            entry = h.entry(table, index)
            if self._state.entries.in_registers(table.level):
                continue
            if (
                (user and not entry & U)
                or (kind == WRITE and not entry & W)
                or (kind == FETCH and self._state.mode.nxe and entry & NX)
            ):
                return table, index
        return None

    def _code(self, examined: Hierarchy, gva: int, kind: int, error: int) -> int:
        """Return the error code the guest gets: recomputed, or (ET15) the hardware's own."""
        if not self._state.printed("ET15"):
            return error
        path = examined.path(gva)
        present = bool(path) and path[-1][1] not in path[-1][0].children
        code = PF_U | (PF_P if present else 0) | (PF_W if kind == WRITE else 0)
        return code | (PF_I if kind == FETCH and self._state.mode.nxe else 0)
