"""Write traces on guest page-table pages, and who wants to hear of which entry.

A trace stands on a whole page; consumers are noted per entry (A40 [0095]-[0096]). While a guest
frame is traced no shadow of any VCPU may map it writable, so every store to it exits. Placing one
counts: the count is the usefulness indicator of derived values (A40 [0100]).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penumbra.actors.core import Matrix


@dataclass
class TracedTable:
    """One traced guest table.

    Attributes:
        interest: Bit set of VCPUs whose shadow derives from an entry, by entry index; 0 dropped.
        stores: Traced stores since a fill last went through this table.
    """

    interest: dict[int, int] = field(default_factory=dict)
    stores: int = 0


class WriteTraces:
    """The traces of one VM.

    Invariant: `gfn in traces` exactly while its stores exit. The count only grows.
    """

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._tables: dict[int, TracedTable] = {}
        self.n_placed = 0
        self.n_removed = 0

    def __contains__(self, gfn: int) -> bool:
        return gfn in self._tables

    def place(self, gfn: int) -> None:
        """Mark `gfn` traced and count (T1, T2); the caller then revokes write rights everywhere."""
        self._tables[gfn] = TracedTable()
        self._matrix.place_trace()
        self.n_placed += 1

    def remove(self, gfn: int) -> None:
        """Stop tracing; the caller has dropped every shadow derived from `gfn`."""
        del self._tables[gfn]
        self.n_removed += 1

    def frame_moved(self) -> None:
        """Count without a trace: a PPN derived before may be another's now (EP3)."""
        self._matrix.place_trace()

    def register(self, gfn: int, index: int, vcpu_id: int) -> None:
        """Note that this VCPU derives from an entry: before the entry is read (Fig. 8, 812)."""
        table = self._tables[gfn]
        table.interest[index] = table.interest.get(index, 0) | 1 << vcpu_id
        table.stores = 0

    def forget(self, gfn: int, index: int, vcpu_id: int) -> None:
        """Note that nothing of this VCPU derives from an entry any more."""
        table = self._tables.get(gfn)
        if table is None:
            return
        left = table.interest.get(index, 0) & ~(1 << vcpu_id)
        if left:
            table.interest[index] = left
        else:
            table.interest.pop(index, None)

    def consumers(self, gfn: int, index: int) -> int:
        """Return the bit set of VCPUs to tell of a change (Fig. 11, 832)."""
        return self._tables[gfn].interest.get(index, 0)

    def note_store(self, gfn: int) -> int:
        """Count a traced store; return how many came since the last fill through the table."""
        table = self._tables[gfn]
        table.stores += 1
        return table.stores

    def check(self) -> None:
        for gfn, table in self._tables.items():
            assert all(table.interest.values()), f"empty interest kept for {gfn:#x}"
        assert self.n_placed - self.n_removed == len(self._tables)
