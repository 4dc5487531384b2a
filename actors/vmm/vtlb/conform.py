"""Keeping hierarchies across root loads: what is loaded is compared, not thrown away.

A VCPU may keep the pairs of roots it ran on before (its working set). When the guest loads such a
root again, every active entry is held against the guest's entry of now: the equal ones stay, for
they are as fresh as a new load, the others go. Nothing was traced meanwhile and no other VCPU is
asked, so a root load costs a comparison per loaded entry instead of a fault per used page.

An entry with A cleared goes as well, or the guest would not see its next use; one with D cleared
would not see its next store.

Source: VTLB method 400, block 408; field notes 1.8, VTLB-SMP.
"""

from __future__ import annotations

from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import ActiveTable, Hierarchy
from penumbra.hw.formats import PAGE_SHIFT, A, P


class Conformer:
    """Compares one VCPU's active entries with the guest's.

    Attributes:
        n_compared, n_dropped: Entries so far.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.n_compared = self.n_dropped = 0

    def conform(self) -> None:
        """Drop every active entry that a load of now would not give."""
        state = self._state
        if not state.mode.paging:
            state.empty()  # what the guest's tables say does not count
            return
        for hierarchy in state.pair.both:
            self._table(hierarchy, hierarchy.root, state.root_gfn())

    def _table(self, h: Hierarchy, table: ActiveTable, gfn: int) -> None:
        entries, mask = self._state.entries, self._state.spec.frame_mask
        words = self._state.guest_table(gfn, table.level)
        used = P if entries.in_registers(table.level) else P | A
        for index, origin in list(table.origin.items()):
            self.n_compared += 1
            now = 0 if words is None else int(words[index])
            child = table.children.get(index)
            if child is None:
                keep = now == origin
            else:
                keep = now & used == used and entries.same(origin, now)
                keep &= not child.piece or now == origin
            if not keep:
                self.n_dropped += 1
                self._state.drop(h, (table, index))
            elif child is not None and not child.piece:
                self._table(h, child, (now & mask) >> PAGE_SHIFT)
