"""Large pages: mapped whole at a first use, put together from small ones, split again.

A large page is one entry where else a leaf table is linked. Both changes of size go through P=0, so
that no CPU ever holds translations of two sizes for one address, as the SDM recommends:

    promote                                   split
    clear the pointer to the leaf table       exchange the large entry for 0
    flush all its pages on every CPU          flush one page: INVLPG of any drops all
    copy the pages to adjacent frames         fill a table with the same frames, rights, A and D
    give the table away                       link the table
    install the large entry
    give the old frames away

Whoever uses the range meanwhile faults, waits for the address space's lock, finds the new mapping
and tries again; so nobody can store to a page that has been copied. Frames that are adjacent
already and nobody else's stay where they are.

A large page holds a reference to each of its frames. So a part of it can be shared or given away as
soon as it is split, and a split is only a change of tables. It cannot fail: the frame for its table
was promised when the page was made.

Source: SDM vol. 3, 4.10.4.2 for the way through P=0, 4.10.4.1 for what INVLPG drops.
"""

from __future__ import annotations

from collections.abc import Iterable

from penumbra.guest.kernel.areas import ANONYMOUS, Area
from penumbra.guest.kernel.frames import Frames, OutOfFrames, OutOfMemory, TablePool
from penumbra.guest.kernel.process import Cpu, Thread
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.slots import Slots
from penumbra.guest.kernel.swap import SwapSpace
from penumbra.guest.kernel.tables import AddressSpace, Slot, Tables
from penumbra.hw.formats import NX, PAGE_BYTES, PAGE_SHIFT, PS, A, D, P, W
from penumbra.hw.operations import Exchange, Fill, SetInterrupts, Store


class LargePages:
    """Makes, shares and splits large pages of address spaces whose lock the caller holds.

    Invariant: a large page lies inside one private anonymous area, no leaf table is linked there,
    and one frame of the pool is promised for each.

    Attributes:
        n_pages: Small pages in a large one; 0 if the format has none.
        n_mapped, n_promoted, n_split: Made at a first use, made of small pages, split so far;
            `n_in_place` of the promoted needed no copy.
    """

    def __init__(
        self,
        tables: Tables,
        frames: Frames,
        pool: TablePool,
        slots: Slots,
        shootdown: Shootdown,
        swap: SwapSpace,
        bugs: frozenset[str],
    ) -> None:
        self._tables = tables
        self._frames = frames
        self._pool = pool
        self._slots = slots
        self._shootdown = shootdown
        self._swap = swap
        self._bugs = bugs
        self._entry_bytes = tables.entry_bytes
        self.n_pages = tables.large_pages
        self.n_mapped = self.n_promoted = self.n_in_place = self.n_split = 0

    def suits(self, area: Area | None, first: int) -> bool:
        """Tell whether an aligned range from page `first` on may become a large page."""
        return (
            area is not None
            and not area.shared
            and area.file_id == ANONYMOUS
            and area.prot != 0
            and area.first <= first
            and first + self.n_pages <= area.stop
        )

    # -- faults -----------------------------------------------------------------------------------

    async def resolve(
        self, thread: Thread, space: AddressSpace, area: Area, vpn: int, write: bool
    ) -> bool:
        """Answer a fault in what is or can be a large page; False if the page is a small one.

        A write to one that is shared with another process splits it: only the page is copied then.
        Interrupts are enabled on entry, disabled when True is returned.
        """
        slot = self._tables.find_large(space, vpn)
        if slot is None:
            return await self._map(thread, space, area, vpn, write)
        entry = await self._tables.load(slot)
        if write and not self._owned(self._tables.frames(slot, entry)):
            await self.split(thread.cpu, space, slot)
            return False
        await SetInterrupts(False)
        new = self._entry(slot, entry, area, writable=write, dirty=write) | entry & (A | D)
        if not write:
            new |= entry & W
        if new != entry:  # rights only grow, so nobody has to forget anything
            await self._tables.change(slot, entry, new)
        return True

    async def _map(
        self, thread: Thread, space: AddressSpace, area: Area, vpn: int, write: bool
    ) -> bool:
        """Map a large page of zeros at its first use; False if the area or memory forbids it."""
        if not (area.huge and self.n_pages):
            return False
        key = vpn // self.n_pages
        if not self.suits(area, key * self.n_pages) or key in space.levels[0]:
            return False
        try:
            first = self._frames.take_run(self.n_pages)
        except OutOfFrames:
            return False
        run = range(first, first + self.n_pages)
        try:
            self._pool.promise()
        except OutOfMemory:
            self._drop(run)
            return False
        try:
            slot = await self._tables.make_large(space, key)
        except OutOfMemory:
            self._pool.forget_promise()
            self._drop(run)
            return False
        for gfn in run:
            await SetInterrupts(False)
            await self._slots.fill(thread.cpu, gfn, 0)
            await SetInterrupts(True)
        await SetInterrupts(False)
        entry = self._tables.entry(first, area.prot, writable=True, dirty=write) | PS
        await self._install(space, slot, entry)
        self.n_mapped += 1
        return True

    # -- promotion --------------------------------------------------------------------------------

    async def promote(self, cpu: Cpu, space: AddressSpace, first: int) -> bool:
        """Make one large page of the small ones from page `first` on, all of which must be there.

        Interrupts are enabled.

        Returns:
            False, with nothing changed, if some page is not in memory.

        Raises:
            OutOfFrames: There is no run of adjacent frames; nothing is changed.
        """
        area = space.areas.find(first)
        assert area is not None and self.suits(area, first)
        key = first // self.n_pages
        table = space.levels[0].get(key)
        if table is None or len(table.live) < self.n_pages:
            return False
        old = []
        for slot in self._tables.live(space, first, first + self.n_pages):
            entry = await self._tables.load(slot)
            if not entry & P:
                return False
            old.append(self._tables.frame(entry))
        in_place = self._is_run(old)
        run = old[0] if in_place else self._frames.take_run(self.n_pages)

        place = self._tables.large_slot(space, key)
        await self._shootdown.stop_others(cpu)
        await Store(place.gva, self._entry_bytes, 0)
        self._tables.unlink_leaf_table(space, key)
        await self._flush(cpu, space, first, "promote-without-flush")
        if not in_place:
            for gfn, source in enumerate(old, run):
                await SetInterrupts(False)
                await self._slots.copy(cpu, gfn, source)
                await SetInterrupts(True)
        await Fill(table.gva, PAGE_BYTES, 0)
        self._pool.drop(table.gfn)
        self._pool.promise()  # there is one: it has just been given back
        entry = self._tables.entry(run, area.prot, writable=True, dirty=True) | PS
        await self._install(space, place, entry)
        for gfn in old:
            if in_place:
                self._swap.forget(gfn)  # whether it alone is dirty stands nowhere from now on
            else:
                self._frames.drop(gfn)
        self.n_promoted += 1
        self.n_in_place += in_place
        return True

    def _is_run(self, gfns: list[int]) -> bool:
        """Tell whether frames are adjacent, aligned and nobody else's."""
        first = gfns[0]
        adjacent = gfns == list(range(first, first + self.n_pages))
        return adjacent and first % self.n_pages == 0 and self._owned(gfns)

    async def _flush(self, cpu: Cpu, space: AddressSpace, first: int, bug: str) -> None:
        """Flush every page of a range from `first` on: there were small pages."""
        if bug in self._bugs:
            await self._shootdown.resume_others(cpu)
            return
        await self._shootdown.flush(cpu, space, first, self.n_pages)
        await self._shootdown.flush_late(cpu, space, first, self.n_pages)

    async def _install(self, space: AddressSpace, slot: Slot, entry: int) -> None:
        space.large.add(slot.vpn // self.n_pages)
        slot.table.live.add(slot.position)
        await Store(slot.gva, self._entry_bytes, entry)

    # -- splitting --------------------------------------------------------------------------------

    async def split_edges(self, cpu: Cpu, space: AddressSpace, first: int, stop: int) -> None:
        """Split what is partly in pages `first` .. `stop`; what is wholly in there stays large."""
        for vpn in (first, stop - 1):
            slot = self._tables.find_large(space, vpn)
            if slot is not None and not first <= slot.vpn <= slot.last < stop:
                await self.split(cpu, space, slot)

    async def split_all(self, cpu: Cpu, space: AddressSpace, first: int, stop: int) -> None:
        """Split every large page that has a page in `first` .. `stop`."""
        await self.split_edges(cpu, space, first, stop)
        for slot in self._tables.live(space, first, stop):
            if slot.n_pages > 1:
                await self.split(cpu, space, slot)

    async def split(self, cpu: Cpu, space: AddressSpace, slot: Slot) -> None:
        """Let a leaf table with the same frames and rights take a large page's place.

        Interrupts are enabled.
        """
        await self._shootdown.stop_others(cpu)
        old: int = await Exchange(slot.gva, self._entry_bytes, 0)
        table = self._tables.take_promised_table()
        space.large.discard(slot.vpn // self.n_pages)
        slot.table.live.discard(slot.position)
        await self._shootdown.flush(cpu, space, slot.vpn, 1)
        await self._shootdown.flush_late(cpu, space, slot.vpn, 1)
        small = old & ~PS
        for index in range(self.n_pages):
            entry = small + (index << PAGE_SHIFT)
            await Store(table.gva + index * self._entry_bytes, self._entry_bytes, entry)
        table.live.update(range(self.n_pages))
        await self._tables.link_leaf_table(space, slot.vpn // self.n_pages, table)
        self.n_split += 1

    # -- what calls do with whole ones ------------------------------------------------------------

    async def protect(self, area: Area, slot: Slot) -> bool:
        """Give a large page its area's rights; tell whether some CPU may have cached more."""
        old = await self._tables.load(slot)
        owned = self._owned(self._tables.frames(slot, old))
        new = self._entry(slot, old, area, writable=owned, dirty=False) | old & (A | D)
        if new == old:
            return False
        await self._tables.change(slot, old, new)
        return bool(old & ~new & W or new & ~old & NX)

    async def share(self, new: AddressSpace, slot: Slot, lowered: list[int]) -> None:
        """Let a forked child have a large page too, read-only on both sides.

        Raises:
            OutOfMemory: The pool is exhausted; the child has nothing of the page.
        """
        self._pool.promise()
        try:
            target = await self._tables.make_large(new, slot.vpn // self.n_pages)
        except OutOfMemory:
            self._pool.forget_promise()
            raise
        entry = await self._tables.load(slot)
        if entry & W:
            entry = await self._tables.change(slot, entry, entry & ~W) & ~W
            lowered.append(slot.vpn)
        for gfn in self._tables.frames(slot, entry):
            self._frames.share(gfn)
        await self._install(new, target, entry)

    def removed(self, space: AddressSpace, slot: Slot) -> None:
        """Note that an entry is about to go for good; nothing if it is a small page's."""
        if slot.n_pages > 1:
            space.large.discard(slot.vpn // self.n_pages)
            self._pool.forget_promise()

    def _entry(self, slot: Slot, old: int, area: Area, *, writable: bool, dirty: bool) -> int:
        """Compose a large page's entry anew, with its area's rights."""
        gfn = self._tables.frame(old)
        assert area.prot, "an inaccessible page is a small one"
        return self._tables.entry(gfn, area.prot, writable=writable, dirty=dirty) | PS

    def _owned(self, gfns: Iterable[int]) -> bool:
        return all(self._frames.references(gfn) == 1 for gfn in gfns)

    def _drop(self, gfns: Iterable[int]) -> None:
        for gfn in gfns:
            self._frames.drop(gfn)

    def check(self, spaces: Iterable[AddressSpace]) -> None:
        """Assert the invariant over the address spaces that processes have."""
        n_large = 0
        for space in spaces:
            n_large += len(space.large)
            assert not space.large & space.levels[0].keys()
            for key in space.large:
                slot = self._tables.large_slot(space, key)
                assert slot.position in slot.table.live
                assert self.suits(space.areas.find(slot.vpn), slot.vpn)
        assert self._pool.n_promised >= n_large
