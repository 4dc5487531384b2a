"""Write traces on guest page-table pages, and who wants to hear of which entry.

A trace stands on a whole page; consumers are noted per entry (A40 [0095]-[0096]). While a guest
frame is traced every store to it is noticed, at once or by the next coherency event, as the
detection policy has it: no shadow of any VCPU may map it writable, or every one is marked. Placing
one counts: the count is the usefulness indicator of derived values (A40 [0100]).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.detect import Detection, WriteProtect
from penumbra.actors.vmm.walk import Step


@dataclass
class TracedTable:
    """One traced guest table.

    Attributes:
        interest: Bit set of VCPUs whose shadow derives from an entry, by entry index; 0 dropped.
        stores: Traced stores since a fill last went through this table.
        upper: Walked at a level above the leaves, or as root, at some time since it is traced.
        shadowed: Bit set of VCPUs that have a shadow page of this table.
    """

    interest: dict[int, int] = field(default_factory=dict)
    stores: int = 0
    upper: bool = False
    shadowed: int = 0


class WriteTraces:
    """The traces of one VM.

    A trace may be lifted for a while (`unsync`): the guest then writes the table without an exit,
    and who derives from which entry stays noted.

    Invariant: `gfn in traces` exactly while its stores are noticed. The count only grows.

    Attributes:
        detection: How they are.
    """

    def __init__(self, matrix: Matrix, detection: Detection | None = None) -> None:
        self._matrix = matrix
        self.detection: Detection = WriteProtect() if detection is None else detection
        self._tables: dict[int, TracedTable] = {}
        self._lifted: dict[int, None] = {}  # in the order of lifting
        self.n_placed = 0
        self.n_removed = 0

    def __contains__(self, gfn: int) -> bool:
        return gfn in self._tables and gfn not in self._lifted

    def is_table(self, gfn: int) -> bool:
        """Tell whether shadows may derive from a frame: it is traced, or its trace is lifted."""
        return gfn in self._tables

    def guard(self, value: int, entry: int, gfn: int) -> int:
        """Return the shadow leaf `value` of a guest frame as the detection policy needs it."""
        return self.detection.leaf(value, entry, gfn in self)

    def emulates(self, gfn: int) -> bool:
        """Tell whether the monitor has to make the stores to a frame."""
        return self.detection.emulates and gfn in self

    def escapes(self, value: int, gfn: int) -> bool:
        """Tell whether a shadow leaf lets stores to a traced frame go unnoticed."""
        return gfn in self and self.detection.escapes(value)

    def place(self, gfn: int) -> None:
        """Mark `gfn` traced and count (T1, T2); the caller then has every CPU guard it.

        A lifted trace is put back: whoever was noted before still is.
        """
        if gfn in self._lifted:
            del self._lifted[gfn]
        else:
            self._tables[gfn] = TracedTable()
        self._matrix.place_trace()
        self.n_placed += 1

    def remove(self, gfn: int) -> None:
        """Stop tracing; the caller has dropped every shadow derived from `gfn`."""
        del self._tables[gfn]
        if gfn in self._lifted:
            del self._lifted[gfn]
        else:
            self.n_removed += 1

    def lift(self, gfn: int) -> None:
        """Let the guest write a traced table; every shadow of it may be behind from now on."""
        self._lifted[gfn] = None
        self.n_removed += 1

    @property
    def lifted(self) -> list[int]:
        """Tables whose trace is lifted, the longest first."""
        return list(self._lifted)

    def is_lifted(self, gfn: int) -> bool:
        return gfn in self._lifted

    def note_upper(self, gfn: int) -> None:
        """Note that a table is walked above the leaves."""
        self._tables[gfn].upper = True

    def is_upper(self, gfn: int) -> bool:
        return self._tables[gfn].upper

    def interested(self, gfn: int) -> int:
        """Return the bit set of VCPUs that derive from any entry of a table."""
        return functools.reduce(int.__or__, set(self._tables[gfn].interest.values()), 0)

    def note_shadow(self, gfn: int, vcpu_id: int, there: bool) -> bool:
        """Note whether a VCPU has a shadow page of a table; tell whether any VCPU has one."""
        table = self._tables.get(gfn)
        if table is None:
            return True
        table.shadowed = table.shadowed & ~(1 << vcpu_id) | there << vcpu_id
        return table.shadowed != 0

    def frame_moved(self) -> None:
        """Count without a trace: a PPN derived before may be another's now (EP3)."""
        self._matrix.place_trace()

    def register(self, gfn: int, index: int, vcpu_id: int) -> bool:
        """Note that this VCPU derives from an entry: before the entry is read (Fig. 8, 812).

        Returns:
            Whether that is news.
        """
        table = self._tables[gfn]
        table.stores = 0
        told, bit = table.interest.get(index, 0), 1 << vcpu_id
        if told & bit:
            return False
        table.interest[index] = told | bit
        return True

    def note_walk(self, steps: list[Step], vcpus: int) -> list[Step] | tuple[int, ...]:
        """Note that these VCPUs (a bit set) are about to derive from each entry a walk has read.

        Returns:
            The steps for which that is news to one of them; or, with nothing noted, the tables that
            must be traced before (Fig. 8, 812).
        """
        tables, lifted = self._tables, self._lifted
        untraced = [
            gfn
            for level, gpa, _, gfn, _ in steps
            if gpa >= 0 and (gfn not in tables or (level and gfn in lifted))
        ]
        if untraced:
            return tuple(untraced)
        fresh = []
        for step in steps:
            level, gpa, _, gfn, place = step
            if gpa < 0:
                continue
            table = tables[gfn]
            table.stores = 0
            told = table.interest.get(place, 0)
            if told & vcpus != vcpus:
                table.interest[place] = told | vcpus
                fresh.append(step)
            if level:
                table.upper = True
        return fresh

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
        assert self._lifted.keys() <= self._tables.keys()
        assert self.n_placed - self.n_removed == len(self._tables) - len(self._lifted)
