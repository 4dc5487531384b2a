"""Page tables in guest memory, and the entries in them. Generic over the paging format.

The kernel remembers in Python where each table is and which of its entries are not zero (as other
kernels keep it beside the page's descriptor); what an entry *is* stands in guest memory alone, and
is changed there by ordinary stores. Hardware sets A and D in present entries meanwhile, so an entry
that was present is only ever changed by a locked operation.

A large page's entry stands where else an entry points to a leaf table (level 1, bit PS), and its
index is `live` there. It is one entry of many frames, each with a reference of its own.

An entry with P=0 that is not zero still owns its frame: PROT_NONE keeps the frame under SOFT_NONE.

In a format whose top level is held in registers (PAE) a root has 32 bytes, so a frame is cut into
many, and a CPU sees a change of a root only when it loads CR3 again (`root_changes`): who finds
that it has an older one reloads at its fault; before a table is given away all reload (`root_cut`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from penumbra.guest.kernel.areas import PROT_EXEC, PROT_WRITE, AreaMap
from penumbra.guest.kernel.frames import TablePool
from penumbra.guest.kernel.layout import Layout
from penumbra.hw.formats import NX, PAGE_BYTES, PAGE_SHIFT, A, D, FormatSpec, P, U, W
from penumbra.hw.operations import CompareExchange, Load, Store

SOFT_NONE = 1 << 9


@dataclass(slots=True)
class Table:
    """One page-table page.

    Invariant: `live` holds the indices of exactly the entries that are not zero.

    Attributes:
        gva: Where the kernel sees it; not a page's start only for a root smaller than a page.
    """

    gfn: int
    gva: int
    live: set[int] = field(default_factory=set)

    @property
    def gpa(self) -> int:
        return self.gfn << PAGE_SHIFT | self.gva & (PAGE_BYTES - 1)


@dataclass(eq=False, slots=True)
class AddressSpace:
    """One set of page tables with its areas.

    Attributes:
        levels: Per level below the root, the tables by the address bits above those they translate.
        lock: Address of the lock that guards the areas and every table below the root. cpus: Bit
        per VCPU on which the root may be loaded; set before a load, cleared after the next. users:
        Threads that run in it. underlay: What is there wherever no area is: a recorded program's
        initial image. Read-only. heap_end: The break, a byte address; 0 while the program has none.
        gone: It is empty and its lock and root are about to be given back. large: The large pages,
        by the address bits above those inside them, as `levels[0]` has the leaf tables.
        root_changes: How often an entry of the root has changed that CPUs hold in registers.
        root_cut: Such an entry led to a table that some CPU may still walk from.
    """

    root: Table
    levels: tuple[dict[int, Table], ...]
    lock: int
    areas: AreaMap = field(default_factory=AreaMap)
    underlay: AreaMap = field(default_factory=AreaMap)
    cpus: int = 0
    users: int = 0
    heap_end: int = 0
    gone: bool = False
    large: set[int] = field(default_factory=set)
    root_changes: int = 0
    root_cut: bool = False

    @property
    def root_gpa(self) -> int:
        return self.root.gpa


class Slot(NamedTuple):
    """A leaf entry: its table, position in it, address, the first page it translates, how many."""

    table: Table
    position: int
    gva: int
    vpn: int
    n_pages: int = 1

    @property
    def last(self) -> int:
        """The last page it translates."""
        return self.vpn + self.n_pages - 1


class Tables:
    """Makes, finds and unlinks tables for address spaces of one format."""

    def __init__(
        self,
        spec: FormatSpec,
        layout: Layout,
        pool: TablePool,
        kernel_entries: Mapping[int, int],
    ) -> None:
        self.spec = spec
        self._layout = layout
        self._pool = pool
        self.entry_bytes = spec.entry_bytes
        self._leaf_bits = spec.levels[0].index_bits
        self._leaf_mask = spec.levels[0].n_entries - 1
        self._frame_mask = spec.frame_mask
        self._kernel_entries = kernel_entries
        above = spec.levels[1]
        # RISC-V's leaves are told by other bits than PS.
        has_large = above.large and not spec.rwx
        self.large_pages = 1 << (above.shift - PAGE_SHIFT) if has_large else 0
        self._spare_roots: list[Table] = []
        self._uncut_roots: list[Table] = []

    def take_table(self) -> Table:
        return self._table(self._pool.take())

    def take_promised_table(self) -> Table:
        """Return the empty table for which a frame was promised."""
        return self._table(self._pool.take_promised())

    def _table(self, gfn: int) -> Table:
        return Table(gfn, self._layout.direct(gfn))

    def take_root(self) -> Table:
        """Return a root that is all zero.

        Raises:
            OutOfMemory: The pool is exhausted.
        """
        n_bytes = self.spec.root_registers * self.entry_bytes
        if not n_bytes:
            return self.take_table()
        if not self._uncut_roots:
            page = self.take_table()
            last = page.gva + PAGE_BYTES - n_bytes
            self._uncut_roots = [
                Table(page.gfn, gva) for gva in range(last, page.gva - 1, -n_bytes)
            ]
        return self._uncut_roots.pop()

    async def new_root(self) -> Table:
        """Return a root that holds the kernel's entries and nothing else."""
        if self._spare_roots:
            return self._spare_roots.pop()
        root = self.take_root()
        for index, entry in self._kernel_entries.items():
            await Store(root.gva + index * self.entry_bytes, self.entry_bytes, entry)
        return root

    def drop_root(self, root: Table) -> None:
        """Keep a root without user entries for the next address space."""
        assert not root.live
        self._spare_roots.append(root)

    def new_levels(self) -> tuple[dict[int, Table], ...]:
        return tuple({} for _ in range(self.spec.top))

    def key(self, level: int, gva: int) -> int:
        """Return what distinguishes the table of `level` that translates `gva`."""
        lev = self.spec.levels[level]
        return gva >> (lev.shift + lev.index_bits)

    def frame(self, entry: int) -> int:
        return (entry & self._frame_mask) >> PAGE_SHIFT

    def entry(self, gfn: int, prot: int, *, writable: bool, dirty: bool) -> int:
        """Compose a user leaf entry, with A set as the fault that asks for it will use it."""
        if not prot:
            return gfn << PAGE_SHIFT | SOFT_NONE
        entry = gfn << PAGE_SHIFT | P | U | A
        if writable and prot & PROT_WRITE:
            entry |= W | D if dirty else W
        if self.spec.has_nx and not prot & PROT_EXEC:
            entry |= NX
        return entry

    def frames(self, slot: Slot, entry: int) -> range:
        """Return the frames that a slot's entry holds references to."""
        gfn = self.frame(entry)
        return range(gfn, gfn + slot.n_pages)

    def find_large(self, space: AddressSpace, vpn: int) -> Slot | None:
        """Return the entry of the large page that holds page `vpn`, if one does."""
        key = vpn >> self._leaf_bits
        return self.large_slot(space, key) if key in space.large else None

    def large_slot(self, space: AddressSpace, key: int) -> Slot:
        """Return the place of a large page's entry, the table it stands in being there."""
        gva = key << self.spec.levels[1].shift
        table = space.root
        if self.spec.top > 1:
            table = space.levels[1][self.key(1, gva)]
        index = self.spec.levels[1].index(gva)
        at = table.gva + index * self.entry_bytes
        return Slot(table, index, at, gva >> PAGE_SHIFT, self.large_pages)

    async def make_large(self, space: AddressSpace, key: int) -> Slot:
        """Return the place of a large page's entry, linking the tables above it.

        Raises:
            OutOfMemory: The pool is exhausted; tables already linked stay, empty.
        """
        await self._link_down(space, key << self.spec.levels[1].shift, 1)
        return self.large_slot(space, key)

    def unlink_leaf_table(self, space: AddressSpace, key: int) -> Table:
        """Forget a leaf table whose pointer has been cleared; return it."""
        self.large_slot(space, key).table.live.discard(key & (self.spec.levels[1].n_entries - 1))
        return space.levels[0].pop(key)

    async def link_leaf_table(self, space: AddressSpace, key: int, table: Table) -> None:
        """Link a leaf table, filled already, where nothing is."""
        place = self.large_slot(space, key)
        space.levels[0][key] = table
        place.table.live.add(place.position)
        await Store(place.gva, self.entry_bytes, table.gfn << PAGE_SHIFT | P | W | U | A)

    def find(self, space: AddressSpace, vpn: int) -> Slot | None:
        """Return the place of page `vpn`'s leaf entry if its table exists."""
        table = space.levels[0].get(vpn >> self._leaf_bits)
        return None if table is None else self._slot(table, vpn)

    async def make(self, space: AddressSpace, vpn: int) -> Slot:
        """Return the place of page `vpn`'s leaf entry, linking the tables it needs.

        Raises:
            OutOfMemory: The pool is exhausted; tables already linked stay, empty.
        """
        assert vpn >> self._leaf_bits not in space.large, "a large page is in the table's place"
        return self._slot(await self._link_down(space, vpn << PAGE_SHIFT, 0), vpn)

    async def _link_down(self, space: AddressSpace, gva: int, lowest: int) -> Table:
        """Return the table of level `lowest` that translates `gva`, linking what is missing."""
        parent = space.root
        for level in range(self.spec.top - 1, lowest - 1, -1):
            key = self.key(level, gva)
            table = space.levels[level].get(key)
            if table is None:
                table = self.take_table()
                space.levels[level][key] = table
                index = self.spec.levels[level + 1].index(gva)
                parent.live.add(index)
                entry = table.gfn << PAGE_SHIFT | P
                in_register = parent is space.root and self.spec.root_registers > 0
                if not in_register:  # these have no rights and no A
                    entry |= W | U | A
                await Store(parent.gva + index * self.entry_bytes, self.entry_bytes, entry)
                space.root_changes += in_register
            parent = table
        return parent

    def live(self, space: AddressSpace, first: int, stop: int) -> list[Slot]:
        """Return every leaf entry that is not zero in pages `first` .. `stop`, upwards.

        A large page counts by its first page.
        """
        bits = self._leaf_bits
        lo, hi = first >> bits, (stop - 1) >> bits
        tables = space.levels[0]
        n_keys = len(tables) + len(space.large)
        keys = range(lo, hi + 1) if hi - lo < n_keys else sorted([*tables, *space.large])
        slots = []
        for key in keys:
            if key in space.large and first <= key << bits < stop:
                slots.append(self.large_slot(space, key))
                continue
            table = tables.get(key)
            if table is None or not lo <= key <= hi:
                continue
            base = key << bits
            slots += [
                self._slot(table, base + index)
                for index in sorted(table.live)
                if first <= base + index < stop
            ]
        return slots

    async def change(self, slot: Slot, old: int, new: int) -> int:
        """Change a present entry from `old` to `new`, keeping an A or D that was set meanwhile.

        Returns:
            The entry as it was.
        """
        while True:
            seen: int = await CompareExchange(slot.gva, self.entry_bytes, old, new)
            if seen == old:
                return old
            new |= seen & (A | D)
            old = seen

    async def load(self, slot: Slot) -> int:
        entry: int = await Load(slot.gva, self.entry_bytes)
        return entry

    async def unlink_empty(self, space: AddressSpace, first: int, stop: int) -> list[Table]:
        """Unlink the empty tables under pages `first` .. `stop` that no area needs any more.

        They may be given to the pool only after every CPU has dropped its paging-structure caches.
        """
        unlinked: list[Table] = []
        for level in range(self.spec.top):
            pages_shift = self.spec.levels[level + 1].shift - PAGE_SHIFT
            tables = space.levels[level]
            lo, hi = first >> pages_shift, (stop - 1) >> pages_shift
            keys = range(lo, hi + 1) if hi - lo < len(tables) else sorted(tables)
            for key in keys:
                table = tables.get(key)
                if table is None or table.live or not lo <= key <= hi:
                    continue
                if space.areas.overlapping(key << pages_shift, (key + 1) << pages_shift):
                    continue
                await self._unlink(space, level, key)
                unlinked.append(table)
        return unlinked

    async def _unlink(self, space: AddressSpace, level: int, key: int) -> None:
        gva = key << self.spec.levels[level + 1].shift
        del space.levels[level][key]
        if level + 1 == self.spec.top:
            parent = space.root
        else:
            parent = space.levels[level + 1][self.key(level + 1, gva)]
        index = self.spec.levels[level + 1].index(gva)
        parent.live.discard(index)
        await Store(parent.gva + index * self.entry_bytes, self.entry_bytes, 0)
        if parent is space.root and self.spec.root_registers:
            space.root_changes += 1
            space.root_cut = True

    def _slot(self, table: Table, vpn: int) -> Slot:
        index = vpn & self._leaf_mask
        return Slot(table, index, table.gva + index * self.entry_bytes, vpn)
