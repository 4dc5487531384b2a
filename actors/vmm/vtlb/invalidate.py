"""Method 880: INVLPG drops the translation of an address from both hierarchies.

    884       find the active entry            886  a large page: its entry goes, pieces and all
    890-892   find the leaf's entry, clear P    894  an emptied table is freed, its link cleared
    900       host INVLPG with the operand

The two hierarchies are dropped from independently. Upper entries that stay are compared with the
guest's at the next fill below them, so none that is older than this event can serve a new load.

Source: VTLB Fig. 8.
"""

from __future__ import annotations

from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import Hierarchy


class InvalidateMethod:
    """Drops translations of single pages for one VCPU."""

    def __init__(self, state: State) -> None:
        self._state = state

    def page(self, gva: int) -> None:
        """Drop what translates `gva` (884-900)."""
        for hierarchy in self._state.pair.both:
            self._drop(hierarchy, gva)
        self._state.flushes.append(gva)  # 900

    def _drop(self, h: Hierarchy, gva: int) -> None:
        table = None
        for place in h.path(gva):  # 884, 890
            table, index = place
            child = table.children.get(index)
            if child is None or child.piece:  # 886
                self._state.drop(h, place)  # 892
                break
            table = child
        while table is not None and not table.origin and table.up is not None:  # 894
            place = table.up
            table = place[0]
            self._state.drop(h, place)
