"""The guest's paging structures: which frames are tables, and what their entries have been.

The oracle finds tables itself. Every root that a VCPU loads is read, every table it leads to, and
every table that a later store links; each gets a `Table`, and its frame is watched from then on.
What an entry holds now is in RAM; only values that ended are remembered, each with the times at
which it held. So a table costs nothing per entry, and a hardware A or D update, which nobody
reports, is seen at the next reading: at the latest in `old` of the store that ends the value.

A frame is a table once per level it is reached at (a self-mapped root is one at every level).

A table is *live* while a loaded root leads to it, or some VCPU may still hold an upper-level entry
that did. One that is not live stays watched until the first store into it: then its frame may well
hold data, so it is buried with the content it had (`graves.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .entries import Held, Table
from .frames import Frames
from .graves import Graveyard
from .paging import GLOBAL, PRESENT, TABLE, Format, Level, levels_in
from .windows import NEVER, Windows

_MAX_HELD = 256
_N_KEPT = 4
_N_BEFORE_PRUNING = 8
_N_BEFORE_MERGING = 64


class Tables:
    """All tables of one guest.

    Invariant: exactly the frames of tables are watched, and no table among them is buried.

    Attributes:
        now: The oracle's time; whoever tells of something new advances it first.
        marker: Time at which a loadable value of an upper-level entry last ended.
        buried_roots: Guest frames of roots buried; whoever keeps things by root empties the list.
    """

    def __init__(self, form: Format, frames: Frames, vcpus: Sequence[Windows]) -> None:
        self.form = form
        self.frames = frames
        self.now = 0
        self.marker = 0
        self.buried_roots: list[int] = []
        self.graves = Graveyard(form, vcpus)
        self._vcpus = vcpus
        self._tables: dict[tuple[int, int], Table] = {}
        self._by_frame: dict[int, list[Table]] = {}
        self._readings: tuple[tuple[Level, ...], ...] = ()
        self._n_burials = 0

    def check(self) -> None:
        """Assert the invariants of this and of its tables."""
        for table in self._tables.values():
            table.check()
            assert table.died == NEVER and self.frames.is_watched(table.gfn)
        assert self.frames.n_watched == len(self._by_frame)

    def find(self, gfn: int, level: int) -> Table | None:
        """Return the table at a frame, if it is one now."""
        return self._tables.get((gfn, level))

    def incarnations(self, gfn: int, level: int) -> Iterator[Table]:
        """Yield every table that a frame is, or was and may still matter."""
        now = self._tables.get((gfn, level))
        if now is not None:
            yield now
        yield from self.graves.at(gfn, level)

    def entry(self, table: Table, index: int) -> int:
        """Return what an entry holds now, or held when the table was buried."""
        if table.content is not None:
            return table.content[index]
        return self.frames.entry(table.gfn, index)

    def values(self, table: Table, index: int) -> Iterator[Held]:
        """Yield every remembered value of an entry, the last one last."""
        yield from table.past.get(index, ())
        yield Held(table.since(index), table.died, self.entry(table, index))

    # Roots and modes

    def root_of(self, cr3: int) -> int:
        """Return what stands for the root that a load of CR3, or of its registers, sets in force.

        That is its guest frame; where a CPU holds the top level in registers, the number of what
        the entries are at this moment: stores to them change nothing until the next load.
        """
        if not self.form.registers:
            return self.form.table_gfn(cr3)
        return self.frames.hold(cr3 & 0xFFFF_FFE0, self.form.registers)

    def load_root(self, gfn: int, vcpu: int) -> None:
        """Take note that a VCPU has this root in its CR3 now."""
        root = self._open(gfn, self.form.top)
        root.loaded_by.add(vcpu)
        if len(self.frames.held) > _MAX_HELD:
            self._release_held()
        if not root.bases or root.n_burials_seen != self._n_burials:
            root.bases.add(0)
            self._link_all(root)
        root.n_burials_seen = self._n_burials

    def unload_root(self, gfn: int, vcpu: int) -> None:
        """Take note that a VCPU has dropped this root, and so all upper entries that it led to."""
        self._tables[gfn, self.form.top].loaded_by.discard(vcpu)

    def _release_held(self) -> None:
        """Bury every root that registers were loaded with and no VCPU has in its registers now."""
        for number in self.frames.held:
            table = self._tables.get((number, self.form.top))
            if table is not None and not table.loaded_by:
                self._bury(table, self.frames.content(number))
                self.frames.release(number)

    def change_readings(self) -> None:
        """Find the tables that are tables only by a VCPU's new mode (PS without CR4.PSE)."""
        modes = sorted({vcpu.mode for vcpu in self._vcpus if vcpu.mode.paging})
        readings = tuple(levels_in(self.form, mode) for mode in modes)
        if readings != self._readings:
            self._readings = readings
            self._n_burials += 1  # what is not loaded now must be linked anew when it is
            for table in tuple(self._tables.values()):
                if table.loaded_by:
                    self._link_all(table)

    # Stores and grants

    def store(self, hpa: int, size: int, old: int) -> None:
        """Record what a store to a watched frame has ended.

        Args:
            old: The `size` bytes at `hpa` before the store; RAM already holds the new ones.
        """
        frames = self.frames
        width = self.form.entry_bytes
        for number in range(hpa // width, (hpa + size - 1) // width + 1):
            pfn, index = divmod(number, self.form.per_table)
            before = frames.entry_before(number, hpa, size, old)
            for gfn in frames.guests_of(pfn):
                for table in tuple(self._by_frame.get(gfn, ())):
                    if table.died != NEVER:
                        continue
                    if self._is_live(table):
                        self._change(table, index, before)
                    else:
                        self._bury(table, frames.content_before(gfn, hpa, size, old))

    def grant(self, gfn: int, pfn: int) -> int:
        """Move a guest frame to a machine frame; a table that gets its first one starts now.

        Returns:
            The machine frame it was in before, or NO_FRAME.
        """
        first = not self.frames.is_ram(gfn)
        before = self.frames.grant(gfn, pfn)
        if first:
            for table in tuple(self._by_frame.get(gfn, ())):
                table.born = self.now
                for index in tuple(table.children):
                    self._unlink(table, index, loadable=False)
                self._note_globals(table)
                self._link_all(table)
        return before

    def _change(self, table: Table, index: int, before: int) -> None:
        after = self.frames.entry(table.gfn, index)
        if after == before:
            return
        ended = Held(table.since(index), self.now, before)
        past = table.past.setdefault(index, [])
        past.append(ended)
        if len(past) >= _N_BEFORE_PRUNING and len(past) & (len(past) - 1) == 0:
            table.past[index] = self._pruned(table, index, past)
        table.forget(index)
        if after & (PRESENT | GLOBAL) == PRESENT | GLOBAL:
            table.has_global = self.graves.globals_seen = True
        if table.level:
            if ended.loadable:
                self.marker = self.now
            self._unlink(table, index, loadable=ended.loadable)
            self._link(table, index, after)

    def _pruned(self, table: Table, index: int, past: list[Held]) -> list[Held]:
        """Drop the values no VCPU can hold any more, but for the last few, kept for reports."""
        old, kept = past[:-_N_KEPT], past[-_N_KEPT:]
        old = [held for held in old if self.graves.may_be_cached(table, index, held)]
        if len(old) >= _N_BEFORE_MERGING:
            # Equal values as one: in the gaps between them the oracle then accepts more, not less.
            hulls: dict[int, Held] = {}
            for held in old:
                first = hulls.pop(held.value, held)
                hulls[held.value] = held._replace(start=first.start)
            old = list(hulls.values())
        return old + kept

    # Links

    def _open(self, gfn: int, level: int) -> Table:
        table = self._tables.get((gfn, level))
        if table is None:
            table = self._tables[gfn, level] = Table(gfn, level, self.now)
            if gfn not in self._by_frame:
                self.frames.watch(gfn)
            self._by_frame.setdefault(gfn, []).append(table)
            self._note_globals(table)
        return table

    def _note_globals(self, table: Table) -> None:
        values = self.frames.entries(table.gfn)
        both = values.dtype.type(PRESENT | GLOBAL)
        if bool(((values & both) == both).any()):
            table.has_global = self.graves.globals_seen = True

    def _link_all(self, table: Table) -> None:
        """Link every table below this one that is not, or that has been buried since."""
        if table.level == 0:
            return
        values = self.frames.entries(table.gfn)
        present = np.flatnonzero(values & values.dtype.type(PRESENT)).tolist()
        for index in present:
            child = table.children.get(index)
            if child is None:
                self._link(table, index, int(values[index]))
            else:
                self._link_all(child)

    def _link(self, table: Table, index: int, value: int) -> None:
        level = table.level
        if all(levels[level].classify(value) != TABLE for levels in self._readings):
            return
        child = self._open(self.form.table_gfn(value), level - 1)
        table.children[index] = child
        child.parents.add((table, index))
        step = index << self.form.levels[level][1]
        self._reach(child, {base + step for base in table.bases})
        self._link_all(child)

    def _reach(self, table: Table, bases: set[int]) -> None:
        new = bases - table.bases
        if not new:
            return
        table.bases |= new
        for index, child in table.children.items():
            step = index << self.form.levels[table.level][1]
            self._reach(child, {base + step for base in new})

    def adopt(self, parent: Table, index: int, value: int) -> Table:
        """Return the table an entry points to, though no store was reported that made it so."""
        self._unlink(parent, index, loadable=True)
        self._link(parent, index, value)
        return parent.children[index]

    def _unlink(self, table: Table, index: int, *, loadable: bool) -> None:
        child = table.children.pop(index, None)
        if child is not None:
            child.parents.discard((table, index))
            if loadable:
                child.unlinked.update(dict.fromkeys(self._holders(table), self.now))

    # Life and death

    def _holders(self, table: Table) -> set[int]:
        """Return the VCPUs that can reach a table, by their roots or by links they may cache."""
        holders = table.loaded_by.union(
            vcpu for vcpu, ended in table.unlinked.items() if ended > self._vcpus[vcpu].upper_closed
        )
        return holders.union(*(self._holders(parent) for parent, _ in table.parents))

    def _is_live(self, table: Table) -> bool:
        if table.loaded_by:
            return True
        for vcpu, ended in table.unlinked.items():
            if ended > self._vcpus[vcpu].upper_closed:
                return True
        return any(self._is_live(parent) for parent, _ in table.parents)

    def _bury(self, table: Table, content: Sequence[int]) -> None:
        """End a table that nothing can reach, and the tables that it alone led to."""
        self._n_burials += 1
        del self._tables[table.gfn, table.level]
        roles = self._by_frame[table.gfn]
        roles.remove(table)
        if not roles:
            del self._by_frame[table.gfn]
            self.frames.unwatch(table.gfn)
        table.died = self.now
        table.content = content
        for parent, index in table.parents:
            del parent.children[index]
        table.parents.clear()
        for index, child in tuple(table.children.items()):
            self._unlink(table, index, loadable=False)
            if not child.parents and not self._is_live(child):
                self._bury(child, self.frames.content(child.gfn))
        for index in tuple(table.dependents):
            table.forget(index)
        if table.level == self.form.top:
            self.buried_roots.append(table.gfn)
        self.graves.add(table)
