"""The calls that change an address space. Each has flushed what it must before it returns.

All work is done under the address space's lock; frames and tables are given away only after the
flush. Arguments come from programs and are checked; errors are returned as negative numbers, as
Linux does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from penumbra.guest.kernel.areas import (
    ANONYMOUS,
    MAP_FIXED,
    MAP_SHARED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_READ,
    PROT_WRITE,
    Area,
    AreaMap,
)
from penumbra.guest.kernel.device_calls import refuses
from penumbra.guest.kernel.frames import Frames, OutOfMemory, TablePool
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.layout import Layout
from penumbra.guest.kernel.page_cache import PageCache
from penumbra.guest.kernel.process import Cpu, Thread
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.swap import SwapSpace
from penumbra.guest.kernel.tables import AddressSpace, Slot, Table, Tables
from penumbra.guest.kernel.words import acquire, release
from penumbra.hw.formats import NX, PAGE_BYTES, PAGE_SHIFT, A, D, P, W
from penumbra.hw.operations import Exchange, Store

EINVAL, ENOMEM = -22, -12
_MREMAP_DONTUNMAP = 4


@dataclass
class _Gathered:
    """What several unmappings have taken and nobody may get before the one flush for all."""

    vpns: list[int] = field(default_factory=list)
    gfns: list[int] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def add(self, vpns: list[int], gfns: list[int], tables: list[Table]) -> None:
        self.vpns += vpns
        self.gfns += gfns
        self.tables += tables


class MemoryCalls:
    """mmap, munmap, mprotect, mremap and brk, and the unmapping that exec and exit need."""

    def __init__(
        self,
        tables: Tables,
        layout: Layout,
        frames: Frames,
        pool: TablePool,
        cache: PageCache,
        shootdown: Shootdown,
        bugs: frozenset[str],
        swap: SwapSpace,
        large: LargePages,
    ) -> None:
        self._large = large
        self._swap = swap
        self._tables = tables
        self._layout = layout
        self._frames = frames
        self._pool = pool
        self._cache = cache
        self._shootdown = shootdown
        self._bugs = bugs
        spec = tables.spec
        self._limit = 1 << (spec.va_bits - (1 if spec.sign_extended else 0)) >> PAGE_SHIFT
        self._hole = (layout.window_gva >> PAGE_SHIFT, layout.window_end >> PAGE_SHIFT)

    async def mmap(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(address, length, prot, flags, file or -1, page offset) -> address."""
        address, length, prot, flags, file_id, offset = args
        n_pages = _pages(length)
        if not n_pages or address % PAGE_BYTES or refuses(file_id, n_pages, offset, flags):
            return EINVAL
        space = _space(thread)
        await acquire(space.lock)
        first: int | None = address >> PAGE_SHIFT
        if flags & MAP_FIXED:
            if not self.allowed(first, n_pages):
                first = None
            else:
                await self.unmap(thread.cpu, space, address >> PAGE_SHIFT, n_pages)
        else:
            first = self._gap(space, n_pages)
        if first is not None:
            await self._shootdown.settle(thread.cpu, space, first, n_pages)
            shared = bool(flags & MAP_SHARED)
            if file_id < 0:
                file_id, offset = (self._cache.new_object() if shared else ANONYMOUS), 0
            space.areas.insert(Area(first, first + n_pages, prot & 7, shared, file_id, offset))
        await release(space.lock)
        return ENOMEM if first is None else first << PAGE_SHIFT

    async def munmap(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(address, length, and as many more pairs as wanted) -> 0."""
        ranges = [
            (address >> PAGE_SHIFT, _pages(length))
            for address, length in zip(args[::2], args[1::2], strict=False)
        ]
        if len(args) % 2 or any(address % PAGE_BYTES for address in args[::2]):
            return EINVAL
        if not all(self.allowed(first, n_pages) for first, n_pages in ranges):
            return EINVAL
        space = _space(thread)
        await acquire(space.lock)
        gathered = _Gathered() if self._shootdown.gathers else None
        for first, n_pages in ranges:
            await self.unmap(thread.cpu, space, first, n_pages, gathered)
        if gathered and gathered.vpns:
            await self._flush(thread.cpu, space, sorted(gathered.vpns))
        if gathered:
            self._drop_frames(gathered.gfns)
            self._drop_tables(gathered.tables)
        await release(space.lock)
        return 0

    async def mprotect(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(address, length, prot) -> 0; pages where nothing is mapped are passed over."""
        address, length, prot = args
        first, n_pages = address >> PAGE_SHIFT, _pages(length)
        if not self.allowed(first, n_pages) or address % PAGE_BYTES:
            return EINVAL
        space = _space(thread)
        await acquire(space.lock)
        lowered: list[int] = []
        split = self._large.split_edges if prot & 7 else self._large.split_all
        await split(thread.cpu, space, first, first + n_pages)
        await self._shootdown.stop_others(thread.cpu)
        for area in space.areas.remove(first, first + n_pages):
            new_area = replace(area, prot=prot & 7)
            space.areas.insert(new_area)
            for slot in self._tables.live(space, area.first, area.stop):
                if await self._protect(new_area, slot):
                    lowered.append(slot.vpn)
        if lowered:
            await self._flush(thread.cpu, space, lowered)
        else:
            await self._shootdown.resume_others(thread.cpu)
        await release(space.lock)
        return 0

    async def mremap(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(old, old length, new length, flags, new address with MREMAP_FIXED) -> new address."""
        old_address, old_length, new_length, flags = args[:4]
        old, n_old, n_new = old_address >> PAGE_SHIFT, _pages(old_length), _pages(new_length)
        if not (self.allowed(old, n_old) and n_new) or old_address % PAGE_BYTES:
            return EINVAL
        space = _space(thread)
        await acquire(space.lock)
        if flags & MREMAP_FIXED:
            new = args[4] >> PAGE_SHIFT
            apart = new == old or new + n_new <= old or old + n_old <= new
            fits = apart and self.allowed(new, n_new)
        else:
            new = self._new_place(space, old, n_old, n_new, flags)
            fits = new >= 0
        try:
            if fits:
                await self._remap(thread, space, old, n_old, new, n_new, flags)
        except OutOfMemory:
            await release(space.lock)
            raise
        await release(space.lock)
        return new << PAGE_SHIFT if fits else ENOMEM

    async def brk(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(wanted break, 0 to ask) -> the break now."""
        (wanted,) = args
        space = _space(thread)
        if not wanted:
            return space.heap_end
        await acquire(space.lock)
        old, new = _pages(space.heap_end), _pages(wanted)
        if not space.heap_end:
            old = new
        if new > old:
            await self._shootdown.settle(thread.cpu, space, old, new - old)
        if new > old and self.allowed(old, new - old):
            at = old
            for taken in [*space.areas.overlapping(old, new), None]:
                stop = taken.first if taken else new
                if at < stop:
                    space.areas.insert(Area(at, stop, PROT_READ | PROT_WRITE, False, ANONYMOUS, 0))
                at = taken.stop if taken else new
        elif new < old:
            await self.unmap(thread.cpu, space, new, old - new)
        space.heap_end = wanted
        await release(space.lock)
        return wanted

    async def unmap(
        self,
        cpu: Cpu,
        space: AddressSpace,
        first: int,
        n_pages: int,
        gathered: _Gathered | None = None,
    ) -> None:
        """Take pages out of an address space, flush, and give what they held away.

        The caller holds the lock; interrupts are enabled. With `gathered` the flush and the giving
        away are the caller's, for all that was gathered there.
        """
        stop = first + n_pages
        await self._large.split_edges(cpu, space, first, stop)
        areas = space.areas.remove(first, stop)
        width = self._tables.entry_bytes
        vpns: list[int] = []
        gfns: list[int] = []
        await self._shootdown.stop_others(cpu)
        for slot in self._tables.live(space, first, stop):
            slot.table.live.discard(slot.position)
            self._large.removed(space, slot)
            entry: int = await Exchange(slot.gva, width, 0)
            number = self._swap.slot_of(entry)
            if number is not None:
                self._swap.drop(number)
                continue
            gfns += self._tables.frames(slot, entry)
            if entry & P:
                vpns += (slot.vpn, slot.last)
        if "reuse-before-flush" in self._bugs:
            self._drop_frames(gfns)
        unlinked = await self._tables.unlink_empty(space, first, stop)
        if gathered is not None:
            gathered.add(vpns or [first] * bool(unlinked), gfns, unlinked)
            for area in areas:
                self._cache.forget_object(area.file_id)
            return
        if vpns or unlinked:
            held = vpns or [first]
            n_held = held[-1] - held[0] + 1
            if not unlinked and await self._shootdown.defer(cpu, space, held[0], n_held, gfns):
                gfns = []
            else:
                await self._shootdown.flush(cpu, space, held[0], n_held)
        else:
            await self._shootdown.resume_others(cpu)
        if "reuse-before-flush" not in self._bugs:
            self._drop_frames(gfns)
        self._drop_tables(unlinked)
        for area in areas:
            self._cache.forget_object(area.file_id)
        if vpns:
            await self._shootdown.flush_late(cpu, space, vpns[0], vpns[-1] - vpns[0] + 1)

    async def clear(self, space: AddressSpace) -> None:
        """Empty an address space that no CPU has loaded any more; that needs no flush."""
        assert not space.cpus and not space.users
        width = self._tables.entry_bytes
        areas = list(space.areas)
        space.areas.remove(0, 1 << 64)
        space.underlay = AreaMap()
        for slot in self._tables.live(space, 0, 1 << 52):
            slot.table.live.discard(slot.position)
            self._large.removed(space, slot)
            entry: int = await Exchange(slot.gva, width, 0)
            number = self._swap.slot_of(entry)
            if number is not None:
                self._swap.drop(number)
                continue
            self._drop_frames(self._tables.frames(slot, entry))
        self._drop_tables(await self._tables.unlink_empty(space, 0, 1 << 52))
        for area in areas:
            self._cache.forget_object(area.file_id)

    async def _protect(self, area: Area, slot: Slot) -> bool:
        """Give one entry its area's rights; tell whether some CPU may have cached more."""
        if slot.n_pages > 1:
            return await self._large.protect(area, slot)
        old = await self._tables.load(slot)
        if self._swap.slot_of(old) is not None:
            return False  # it gets its area's rights when it is brought in
        gfn = self._tables.frame(old)
        own = area.shared or self._frames.references(gfn) == 1
        if area.shared and area.prot & PROT_WRITE:
            self._cache.written(area.file_id, area.object_page(slot.vpn))
        new = self._tables.entry(gfn, area.prot, writable=own, dirty=False)
        if new & P:
            new |= old & (A | D)
        else:
            self._swap.forget(gfn)  # whether it is dirty stands nowhere then
        if new == old:
            return False
        await self._tables.change(slot, old, new)
        return bool(old & P and (not new & P or old & ~new & W or new & ~old & NX))

    async def _remap(
        self,
        thread: Thread,
        space: AddressSpace,
        old: int,
        n_old: int,
        new: int,
        n_new: int,
        flags: int,
    ) -> None:
        """Make `n_old` pages from `old` be `n_new` pages from `new`, moving entries."""
        cpu = thread.cpu
        if n_new < n_old and not flags & _MREMAP_DONTUNMAP:
            await self.unmap(cpu, space, old + n_new, n_old - n_new)
        n_kept = min(n_old, n_new)
        if new != old:
            await self.unmap(cpu, space, new, n_new)
            await self._large.split_all(cpu, space, old, old + n_kept)
            for slot in self._tables.live(space, old, old + n_kept):
                await self._tables.make(space, slot.vpn - old + new)
            await self._move(cpu, space, old, n_kept, new, keep=bool(flags & _MREMAP_DONTUNMAP))
        await self._shootdown.settle(cpu, space, new, n_new)
        if n_new > n_old:
            await self.unmap(cpu, space, new + n_old, n_new - n_old)
            last = space.areas.find(new + n_old - 1)
            if last is not None:
                grown = replace(last, stop=new + n_new)
                space.areas.insert(grown.clip(new + n_old, new + n_new))

    async def _move(
        self, cpu: Cpu, space: AddressSpace, old: int, n_pages: int, new: int, *, keep: bool
    ) -> None:
        """Move areas and entries, the destination's tables being there; flush the source.

        The lock is held until after the flush, so nobody can free a moved frame while a CPU still
        reaches it through the old address.
        """
        for area in space.areas.remove(old, old + n_pages):
            space.areas.insert(area.move(area.first - old + new))
            if keep:
                space.areas.insert(area)
        width = self._tables.entry_bytes
        moved = []
        await self._shootdown.stop_others(cpu)
        for slot in self._tables.live(space, old, old + n_pages):
            slot.table.live.discard(slot.position)
            entry: int = await Exchange(slot.gva, width, 0)
            target = self._tables.find(space, slot.vpn - old + new)
            assert target is not None
            target.table.live.add(target.position)
            await Store(target.gva, width, entry)
            if entry & P:
                moved.append(slot.vpn)
        unlinked = await self._tables.unlink_empty(space, old, old + n_pages)
        if moved or unlinked:
            await self._flush(cpu, space, moved or [old])
        else:
            await self._shootdown.resume_others(cpu)
        self._drop_tables(unlinked)

    def _new_place(self, space: AddressSpace, old: int, n_old: int, n_new: int, flags: int) -> int:
        """Return where mremap puts its pages, -1 if there is no room."""
        if n_new <= n_old:
            return old
        beyond = old + n_old
        if self.allowed(beyond, n_new - n_old) and not space.areas.overlapping(beyond, old + n_new):
            return old
        gap = self._gap(space, n_new) if flags & MREMAP_MAYMOVE else None
        return -1 if gap is None else gap

    def _gap(self, space: AddressSpace, n_pages: int) -> int | None:
        base = self._layout.user_base >> PAGE_SHIFT
        return space.areas.gap(n_pages, base, self._limit, self._hole)

    def allowed(self, first: int | None, n_pages: int) -> bool:
        """Tell whether a non-empty page range lies in user addresses, clear of the window."""
        if first is None or n_pages <= 0 or first < 0 or first + n_pages > self._limit:
            return False
        return first + n_pages <= self._hole[0] or first >= self._hole[1]

    async def _flush(self, cpu: Cpu, space: AddressSpace, vpns: list[int]) -> None:
        """Flush from the lowest to the highest of `vpns` where no frame is given away after it."""
        n_pages = vpns[-1] - vpns[0] + 1
        await self._shootdown.flush(cpu, space, vpns[0], n_pages)
        await self._shootdown.flush_late(cpu, space, vpns[0], n_pages)

    def _drop_frames(self, gfns: Iterable[int]) -> None:
        for gfn in gfns:
            self._frames.drop(gfn)

    def _drop_tables(self, tables: list[Table]) -> None:
        for table in tables:
            self._pool.drop(table.gfn)


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES)


def _space(thread: Thread) -> AddressSpace:
    assert thread.process is not None
    return thread.process.space
