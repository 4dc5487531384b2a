"""Active page-table hierarchies: real-format tables in machine RAM that stand for a TLB's content.

A hierarchy starts with a root whose every entry is invalid, as a TLB starts empty. Each entry
remembers the guest entry it was built from, so the monitor can tell whether it still means what
the guest's tables say. Tables are allocated when an upper entry is built and freed with it.

A CPU may still hold a pointer to a table that is freed, in its paging-structure cache. So a freed
frame is handed out again only after every CPU that may walk it has flushed: this VCPU's own CPU
does so before the guest runs again, the others are asked to (`Storage.owing`).

Source: VTLB Figs 4 and 6; Fig. 8, block 894.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from penumbra.actors.vmm.memory import MemoryManagement, MonitorMemoryShortError
from penumbra.actors.vmm.vtlb.entries import Entries
from penumbra.hw.formats import PAGE_SHIFT, P, U

Place: TypeAlias = "tuple[ActiveTable, int]"


class ActiveTable:
    """One active page table.

    Invariant: entry `i` in RAM is present exactly if `i` is in `origin`.

    Attributes:
        origin: By index, the guest entry an active entry was built from.
        children: For links, the table linked.
        up: The entry that links this table; None for a root.
        piece: Whether this table shadows part of a large guest page.
    """

    __slots__ = ("children", "level", "origin", "pfn", "piece", "up")

    def __init__(self, pfn: int, level: int, up: Place | None, piece: bool) -> None:
        self.pfn = pfn
        self.level = level
        self.up = up
        self.piece = piece
        self.origin: dict[int, int] = {}
        self.children: dict[int, ActiveTable] = {}


class Storage:
    """Machine frames for the active tables of one VM, or of several that take turns.

    Invariant: a frame is in use, free, or owed a flush by the CPUs of `_owed`.

    Attributes:
        reuses_at_once: ET8 as printed: a freed frame is handed out again at once.
    """

    def __init__(
        self, pool: MemoryManagement, max_tables: int, *, reuses_at_once: bool = False
    ) -> None:
        """Take frames of `pool`, so many at most."""
        self._pool = pool
        self.reuses_at_once = reuses_at_once
        self.max_tables = max_tables
        self.n_used = 0
        self.n_freed = 0
        self.owing = 0  # bit set of VCPUs whose CPUs have to flush
        self._owed: list[tuple[int, int]] = []

    @property
    def n_left(self) -> int:
        """How many tables may still be taken, if the machine has the frames."""
        return self.max_tables - self.n_used - len(self._owed)

    def take(self) -> int:
        """Return a zeroed frame.

        Raises:
            MonitorMemoryShortError: None is left.
        """
        if self.n_left <= 0:
            raise MonitorMemoryShortError
        return self.take_root()

    def take_root(self, *, low: bool = False) -> int:
        """Return a zeroed frame for a root: tables leave room for those, for none can run without.

        Args:
            low: As for `MemoryManagement.take_frame`.

        Raises:
            MonitorMemoryShortError: The machine itself has none left.
        """
        pfn = self._pool.take_frame(low=low)
        self.n_used += 1
        return pfn

    def give(self, pfn: int, others: int) -> None:
        """Take a frame back; the CPUs of `others` may still walk it.

        The caller's own CPU flushes before it runs the guest again.
        """
        self.n_used -= 1
        self.n_freed += 1
        if others and not self.reuses_at_once:
            self._pool.ram.clear_frame(pfn)
            self._owed.append((pfn, others))
            self.owing |= others
        else:
            self._pool.give_frame(pfn)

    def flushed(self, vcpu_id: int) -> None:
        """The CPU of a VCPU has dropped all it held: frames that waited for it alone are free."""
        if not self.owing >> vcpu_id & 1:
            return
        self.owing = 0
        left = []
        for pfn, others in self._owed:
            others &= ~(1 << vcpu_id)
            if others:
                left.append((pfn, others))
                self.owing |= others
            else:
                self._pool.give_frame(pfn)
        self._owed = left

    def frames_owed(self) -> list[int]:
        """Return the frames that may not be used yet."""
        return [pfn for pfn, _ in self._owed]


class Hierarchy:
    """The active tables of one privilege.

    Invariant: see `ActiveTable`; every table but the root is linked by exactly one entry; in the
    supervisor hierarchy every entry has U.

    Attributes:
        n_tables: Tables in use, the root included.
    """

    def __init__(self, storage: Storage, entries: Entries, user: bool) -> None:
        self.user = user
        self._storage = storage
        self._entries = entries
        self._ram = entries.memory.ram
        self._spec = entries.spec
        root = storage.take_root(low=self._spec.root_registers > 0)
        self.root = ActiveTable(root, self._spec.top, None, False)
        self.n_tables = 1

    @property
    def address(self) -> int:
        """Return what the hardware's CR3 has to hold."""
        return self.root.pfn << PAGE_SHIFT

    def index(self, table: ActiveTable, gva: int) -> int:
        return self._spec.levels[table.level].index(gva)

    def entry(self, table: ActiveTable, index: int) -> int:
        """Return an active entry as the hardware reads it."""
        width = self._spec.entry_bytes
        return self._ram.load((table.pfn << PAGE_SHIFT) + index * width, width)

    def _write(self, table: ActiveTable, index: int, value: int) -> None:
        width = self._spec.entry_bytes
        self._ram.store((table.pfn << PAGE_SHIFT) + index * width, width, value)

    def path(self, gva: int) -> list[Place]:
        """Return the present entries an access walks through, from the root down (704, 884)."""
        places: list[Place] = []
        table: ActiveTable | None = self.root
        while table is not None:
            index = self.index(table, gva)
            if index not in table.origin:
                break
            places.append((table, index))
            table = table.children.get(index)
        return places

    def set(self, table: ActiveTable, index: int, value: int, origin: int) -> None:
        """Write a leaf: with a single store, P with the rest (766)."""
        assert index not in table.children
        table.origin[index] = origin
        self._write(table, index, value)

    def link(self, place: Place, origin: int, piece: bool) -> ActiveTable:
        """Allocate an empty table for an upper entry that is not present (732); write the entry.

        The caller writes the entry's rights with `narrow`.

        Raises:
            MonitorMemoryShortError: No frame is left; nothing was changed.
        """
        table, index = place
        assert index not in table.origin
        child = ActiveTable(self._storage.take(), table.level - 1, place, piece)
        self.n_tables += 1
        table.origin[index] = origin
        table.children[index] = child
        return child

    def put(self, place: Place, value: int) -> None:
        """Write an entry whose origin is noted already."""
        self._write(*place, value)

    def clear(self, place: Place, others: int) -> bool:
        """Make an entry not present and free what hangs below; tell whether a table was freed."""
        table, index = place
        if table.origin.pop(index, None) is None:
            return False
        self._write(table, index, 0)
        child = table.children.pop(index, None)
        if child is None:
            return False
        self._free(child, others)
        return True

    def _free(self, table: ActiveTable, others: int) -> None:
        for child in table.children.values():
            self._free(child, others)
        self.n_tables -= 1
        self._storage.give(table.pfn, others)

    def empty(self, others: int) -> bool:
        """Make every entry of the root not present; tell whether anything was."""
        root = self.root
        had = bool(root.origin)
        for child in root.children.values():
            self._free(child, others)
        root.origin.clear()
        root.children.clear()
        if had:
            self._ram.clear_frame(root.pfn)
        return had

    def release(self, others: int) -> None:
        """Free the root as well: nobody uses this hierarchy any more."""
        self.empty(others)
        self._storage.give(self.root.pfn, others)
        self.n_tables = 0

    def tables(self) -> Iterator[ActiveTable]:
        """Return every table, parents first."""
        todo = [self.root]
        while todo:
            table = todo.pop()
            yield table
            todo += table.children.values()

    def mapping(self, pfn: int) -> list[Place]:
        """Return the leaves, large ones included, that map a machine frame."""
        return [(table, index) for table in self.tables() for index in self._mapping(table, pfn)]

    def _mapping(self, table: ActiveTable, pfn: int) -> list[int]:
        words = self._entries.table(table.pfn)
        kind = words.dtype.type
        if table.level == 0:
            mask = kind(self._spec.frame_mask | P)
            return np.flatnonzero(words & mask == kind(pfn << PAGE_SHIFT | P)).tolist()
        n = 1 << (self._spec.levels[table.level].shift - PAGE_SHIFT)
        return [
            index
            for index in table.origin
            if index not in table.children
            and self._entries.first_frame(int(words[index]), table.level) == pfn & -n
        ]

    def check(self) -> None:
        """Assert the class invariant: what RAM holds is what the books say."""
        n, seen = 0, set[int]()
        for table in self.tables():
            n += 1
            assert table.pfn not in seen, f"frame {table.pfn:#x} is two tables"
            seen.add(table.pfn)
            words = self._entries.table(table.pfn)
            assert set(np.flatnonzero(words & P).tolist()) == set(table.origin), table.level
            assert set(table.children) <= set(table.origin)
            for index, child in table.children.items():
                assert child.up == (table, index)
                assert self.entry(table, index) & self._spec.frame_mask == child.pfn << PAGE_SHIFT
            if not self.user and not self._entries.in_registers(table.level):
                assert np.all(words[words & P != 0] & U), "closed to the hardware's user mode"
        assert n == self.n_tables
        assert not seen & set(self._storage.frames_owed()), "a table waits for a flush and is used"
