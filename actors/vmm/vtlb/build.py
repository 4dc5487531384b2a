"""Building active entries: what fault handling and eager fill have in common.

An upper entry is kept as long as it stands for what the guest's says now. If it does not, it is
dropped with all below it and built anew: its rights, its table or its page size were another's
(ET1, ET2, ET6). A large guest page becomes a large active page if the machine's frames lie so;
else a table of pieces hangs from its entry and goes with it.

Source: VTLB Figs 7B-7C, blocks 730-770.
"""

from __future__ import annotations

from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import ActiveTable, Hierarchy, Place
from penumbra.hw.formats import PAGE_SHIFT


class Builder:
    """Writes active entries for one VCPU."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.n_linked = 0  # upper entries built so far

    def upper(self, h: Hierarchy, place: Place, entry: int, *, piece: bool = False) -> ActiveTable:
        """Make an active upper entry stand for a guest entry; return the table below (732-764).

        Raises:
            MonitorMemoryShortError: No frame is left; the entry is not present.
        """
        state = self._state
        table, index = place
        standing, child = table.origin.get(index), table.children.get(index)
        if standing is not None and not (
            child is not None and child.piece == piece and state.entries.same(standing, entry)
        ):
            state.drop(h, place)
            child = None
        if child is None:
            child = h.link(place, entry, piece)
            self.n_linked += 1
        value = state.entries.upper(entry, table.level, child.pfn, h.user, state.mode)
        before = h.entry(table, index)
        if before != value:
            h.put(place, value)
            if before:
                state.flushes.append(FLUSH_ALL)
        return child

    def page(self, h: Hierarchy, place: Place, entry: int, gfn: int) -> None:
        """Make a level-0 active entry stand for a guest leaf that maps guest frame `gfn` (846)."""
        table, index = place
        entries = self._state.entries
        h.set(table, index, entries.page(entry, gfn, h.user, self._state.mode), entry)

    def large(self, h: Hierarchy, place: Place, entry: int, gfn: int, gva: int) -> None:
        """Make active entries stand for a large guest page, at least for `gva`; `gfn` is there.

        Raises:
            MonitorMemoryShortError: No frame is left for a table of pieces.
        """
        state, table = self._state, place[0]
        n = 1 << (state.spec.levels[table.level].shift - PAGE_SHIFT)
        whole = state.entries.contiguous(gfn & -n, table.level)  # 736
        if whole is not None:
            if place[1] in table.children:
                state.drop(h, place)
            h.set(*place, state.entries.large(entry, whole, h.user, state.mode), entry)
            return
        while place[0].level:
            below = self.upper(h, place, entry, piece=True)
            place = (below, h.index(below, gva))
        self.page(h, place, entry, gfn)
