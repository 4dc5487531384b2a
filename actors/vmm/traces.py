"""Write traces on guest page-table pages, and who wants to hear of which entry.

A trace stands on a whole page; consumers are noted per entry (A40 [0095]-[0096]). While a guest
frame is traced every store to it is noticed, at once or by the next coherency event, as the
detection policy has it: no shadow of any VCPU may map it writable, or every one is marked. Placing
one counts: the count is the usefulness indicator of derived values (A40 [0100]).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.detect import Detection, WriteProtect


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

    Invariant: `gfn in traces` exactly while its stores are noticed. The count only grows.

    Attributes:
        detection: How they are.
    """

    def __init__(self, matrix: Matrix, detection: Detection | None = None) -> None:
        self._matrix = matrix
        self.detection: Detection = WriteProtect() if detection is None else detection
        self._tables: dict[int, TracedTable] = {}
        self.n_placed = 0
        self.n_removed = 0

    def __contains__(self, gfn: int) -> bool:
        return gfn in self._tables

    def guard(self, value: int, entry: int, gfn: int) -> int:
        """Return the shadow leaf `value` of a guest frame as the detection policy needs it."""
        return self.detection.leaf(value, entry, gfn in self._tables)

    def emulates(self, gfn: int) -> bool:
        """Tell whether the monitor has to make the stores to a frame."""
        return self.detection.emulates and gfn in self._tables

    def escapes(self, value: int, gfn: int) -> bool:
        """Tell whether a shadow leaf lets stores to a traced frame go unnoticed."""
        return gfn in self._tables and self.detection.escapes(value)

    def place(self, gfn: int) -> None:
        """Mark `gfn` traced and count (T1, T2); the caller then has every CPU guard it."""
        self._tables[gfn] = TracedTable()
        self._matrix.place_trace()
        self.n_placed += 1

    def remove(self, gfn: int) -> None:
        """Stop tracing; the caller has dropped every shadow derived from `gfn`."""
        del self._tables[gfn]
        self.n_removed += 1

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

    def derived_from(self, gfn: int, first: int, stop: int) -> list[int]:
        """Return the indexes from `first` up to `stop` that some VCPU's shadow derives from."""
        interest = self._tables[gfn].interest
        if stop - first > len(interest):
            return sorted(index for index in interest if first <= index < stop)
        return [index for index in range(first, stop) if index in interest]

    def note_store(self, gfn: int) -> int:
        """Count a traced store; return how many came since the last fill through the table."""
        table = self._tables[gfn]
        table.stores += 1
        return table.stores

    def check(self) -> None:
        for gfn, table in self._tables.items():
            assert all(table.interest.values()), f"empty interest kept for {gfn:#x}"
        assert self.n_placed - self.n_removed == len(self._tables)
