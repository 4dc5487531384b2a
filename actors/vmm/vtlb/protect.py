"""Method 950: the guest changes CR0.WP.

    952       WP := 1?   no: nothing. A supervisor's store that the active entries refuse faults,
                         and method 700 opens them (printed: only if D is clear, ET3)
    954-960   yes: every active supervisor entry gets R/W of the guest entry it was built from,
              a leaf only if that was dirty; then the hardware's TLB is flushed

WP is evaluated at each use, on cached translations too, so this must be done before the guest's
next store. It needs no look at the guest's tables: the cached rights are in the active entries'
origins.

Source: VTLB Fig. 9 (blocks after 952 reconstructed).
"""

from __future__ import annotations

from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.vtlb.state import State
from penumbra.hw.formats import D, W


def protect(state: State) -> None:
    """CR0.WP has become 1: close what the guest's supervisor may not write any more."""
    h = state.pair.supervisor
    for table in h.tables():
        for index, origin in table.origin.items():
            before = h.entry(table, index)
            dirty = bool(origin & D) or index in table.children
            value = before & ~W | (before & origin & W if dirty else 0)
            if value != before:
                h.put((table, index), value)
    state.flushes.append(FLUSH_ALL)
