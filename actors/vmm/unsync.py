"""Leaf tables out of sync: written without an exit, made equal at the coherency event.

A guest that stores to a traced leaf table gets the page: its trace is lifted and the store, and all
that follow, are the hardware's own. From then on every shadow of the table is *behind*. A VCPU
brings its own shadow up at its own events: INVLPG and a delivered fault one entry, a CR3 load all
tables that the new root reaches, whose traces are put back first. Others stay behind until theirs.
A table that was ever walked above the leaves keeps its trace, and so does a root: what
is stale there would stand for whole regions, and hardware forgets it at INVLPG of any address.

Source: field notes 1.1 and 1.3: the shadow MMUs of Linux KVM ("out of sync shadow", 2008) and Xen.
"""

from __future__ import annotations

from collections import defaultdict

from penumbra.actors.vmm.traces import WriteTraces


class UnsyncTables:
    """Which tables are out of sync, and for whom. One per VM.

    Invariant: whoever has a shadow of a table whose trace is lifted is behind with it.
    """

    def __init__(self, traces: WriteTraces, limit: int) -> None:
        """Allow at most `limit` lifted traces at a time; none with 0."""
        self._traces = traces
        self._limit = limit
        self._behind: defaultdict[int, set[int]] = defaultdict(set)

    def lift(self, gfn: int) -> bool | int:
        """Lift the trace of a table that is about to be written, if that may be.

        Returns:
            Whether it is lifted; or the guest table whose trace must be put back before.
        """
        traces = self._traces
        if self._limit == 0 or traces.is_upper(gfn):
            return False
        lifted = traces.lifted
        if len(lifted) >= self._limit:
            return lifted[0]
        vcpus = traces.interested(gfn)
        traces.lift(gfn)
        for vcpu_id in range(vcpus.bit_length()):
            if vcpus >> vcpu_id & 1:
                self._behind[vcpu_id].add(gfn)
        return True

    def note_fill(self, vcpu_id: int, gfn: int) -> None:
        """Note that a VCPU derives from a leaf table: nobody tells it what becomes of a lifted."""
        if self._traces.is_lifted(gfn):
            self._behind[vcpu_id].add(gfn)

    def behind(self, vcpu_id: int) -> list[int]:
        """Return the tables whose shadow at this VCPU may be behind, in ascending order."""
        return sorted(self._behind[vcpu_id])

    def is_behind(self, vcpu_id: int, gfn: int) -> bool:
        return gfn in self._behind[vcpu_id]

    def settle(self, vcpu_id: int, gfn: int, *, shadowed: bool) -> None:
        """All of this VCPU's shadow of a table is up to date, or gone."""
        if not shadowed or not self._traces.is_lifted(gfn):
            self._behind[vcpu_id].discard(gfn)
