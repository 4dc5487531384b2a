"""What the kernel does at a page fault: demand paging, copy-on-write, or the end of the process.

The order of operations for a private zero page whose table exists, the most frequent case: enable
interrupts, take the lock, disable interrupts, map the slot (store, INVLPG), fill, store the entry,
release the lock, return. No flush: x86 caches no entry with P=0.

When copy-on-write changes a frame and other CPUs have the address space loaded, the entry is
cleared and flushed everywhere before the new frame is put in; otherwise one sibling could write the
new frame while another still reads the old one.
"""

from __future__ import annotations

from typing import NamedTuple

from penumbra.guest.kernel.areas import ANONYMOUS, PROT_EXEC, PROT_WRITE, Area, page_word
from penumbra.guest.kernel.device_calls import DEVICE_FILE
from penumbra.guest.kernel.frames import Frames, OutOfFrames
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.page_cache import PageCache
from penumbra.guest.kernel.paging import Paging
from penumbra.guest.kernel.process import Thread
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.slots import Slots
from penumbra.guest.kernel.swap import SwapSpace
from penumbra.guest.kernel.tables import AddressSpace, Slot, Tables
from penumbra.guest.kernel.words import acquire, release
from penumbra.guest.threads import KernelPanic
from penumbra.hw.formats import NX, PAGE_SHIFT, PF_I, PF_W, A, D, P, W
from penumbra.hw.operations import Exchange, SetInterrupts, Store


class _Swapped(NamedTuple):
    """The page is in a slot of the swap space."""

    number: int


class Faults:
    """Resolves page faults of user accesses.

    Attributes:
        n_resolved: Faults after which the access can be tried again.
    """

    def __init__(
        self,
        tables: Tables,
        frames: Frames,
        cache: PageCache,
        slots: Slots,
        shootdown: Shootdown,
        paging: Paging,
        swap: SwapSpace,
        large: LargePages,
    ) -> None:
        self._large = large
        self._tables = tables
        self._frames = frames
        self._cache = cache
        self._slots = slots
        self._shootdown = shootdown
        self._paging = paging
        self._swap = swap
        self.n_resolved = 0

    async def resolve(self, thread: Thread, gva: int, error: int) -> str:
        """Make the access possible, or return why it may not be.

        Interrupts are enabled on entry; they are disabled on return if the access may be tried
        again, as they have to be for the slots anyway.

        Raises:
            OutOfMemory: With the lock released and nothing mapped.
        """
        assert thread.process is not None
        space = thread.process.space
        while True:
            # An access made with a lock held has its page pinned, so that it need not sleep.
            if thread.may_sleep:
                await self._paging.make_room(thread)
            await acquire(space.lock)
            try:
                reason = await self._resolve(thread, space, gva, error)
            except OutOfFrames:
                await release(space.lock)
                if await self._shootdown.settle_all(thread.cpu):
                    continue
                if not (self._paging.enabled and thread.may_sleep):
                    raise
                continue
            except Exception:
                await release(space.lock)
                raise
            if isinstance(reason, str):
                break
            number = reason.number
            try:
                gfn = await self._paging.bring_in(thread, space, number)
            except OutOfFrames:
                await release(space.lock)
                continue
            if gfn is not None:
                await acquire(space.lock)
                await self._map_swapped(space, gva, error, number, gfn)
                await release(space.lock)
        await self._shootdown.follow_root(thread.cpu, space)
        await release(space.lock)
        self.n_resolved += not reason
        return reason

    async def _map_swapped(
        self, space: AddressSpace, gva: int, error: int, number: int, gfn: int
    ) -> None:
        """Put a frame that was read from a slot where its page is still wanted, or give it back.

        While nobody held the lock the page may have been unmapped, moved, or brought in.
        """
        slot = self._tables.find(space, gva >> PAGE_SHIFT)
        area = space.areas.find(gva >> PAGE_SHIFT)
        wanted = slot is not None and area is not None and not _denied(area, error)
        if wanted:
            assert slot is not None and area is not None
            entry = await self._tables.load(slot)
            if slot.position in slot.table.live and self._swap.slot_of(entry) == number:
                write = bool(error & PF_W)
                entry = self._tables.entry(gfn, area.prot, writable=True, dirty=write)
                self._swap.drop(number)  # the entry's; the transfer's becomes the frame's
                self._swap.back(gfn, number)
                await Store(slot.gva, self._tables.entry_bytes, entry)
                return
        self._frames.drop(gfn)
        self._swap.drop(number)

    async def _resolve(
        self, thread: Thread, space: AddressSpace, gva: int, error: int
    ) -> str | _Swapped:
        vpn = gva >> PAGE_SHIFT
        area = space.areas.find(vpn) or self._underlay(space, vpn)
        if area is None:
            return f"segmentation fault: nothing is mapped at {gva:#x}"
        denied = _denied(area, error)
        if denied:
            return f"segmentation fault: {denied} {gva:#x}"
        write = bool(error & PF_W)
        if area.file_id == DEVICE_FILE and area.object_page(vpn):
            return f"bus error: the device window has no page at {gva:#x}"
        if await self._large.resolve(thread, space, area, vpn, write):
            return ""
        slot = self._tables.find(space, vpn) or await self._tables.make(space, vpn)
        if slot.position in slot.table.live:
            old = await self._tables.load(slot)
            number = self._swap.slot_of(old)
            if number is not None:
                return _Swapped(number)
            await self._adjust(thread, space, area, slot, write, old)
        else:
            await self._map_new(thread, area, slot, write)
        return ""

    def _underlay(self, space: AddressSpace, vpn: int) -> Area | None:
        """Return the initial image's page under `vpn`, put back where a mapping has gone."""
        area = space.underlay.find(vpn)
        if area is not None:
            area = area.clip(vpn, vpn + 1)
            space.areas.insert(area)
        return area

    async def _map_new(self, thread: Thread, area: Area, slot: Slot, write: bool) -> None:
        """Map a page that has no entry."""
        page = area.object_page(slot.vpn)
        if area.file_id == DEVICE_FILE:
            gfn, writable = self._frames.device_gfn, True
            await SetInterrupts(False)
        elif area.shared:
            gfn = await self._cached(thread, area.file_id, page)
            if area.prot & PROT_WRITE:
                self._cache.written(area.file_id, page)
            writable = True
        elif write or area.file_id == ANONYMOUS:
            gfn = await self._private(thread, area.file_id, page)
            writable = True
        else:
            gfn = await self._cached(thread, area.file_id, page)
            writable = False
        slot.table.live.add(slot.position)
        entry = self._tables.entry(gfn, area.prot, writable=writable, dirty=write)
        await Store(slot.gva, self._tables.entry_bytes, entry)

    async def _private(self, thread: Thread, file_id: int, page: int) -> int:
        """Return a frame of the process's own with the page's first contents."""
        source = None if file_id == ANONYMOUS else self._cache.get(file_id, page)
        try:
            gfn = self._frames.take()
        except Exception:
            if source is not None:
                self._frames.drop(source)
            raise
        await SetInterrupts(False)
        if source is None:
            await self._slots.fill(thread.cpu, gfn, page_word(file_id, page))
        else:
            await self._slots.copy(thread.cpu, gfn, source)
            self._frames.drop(source)
        return gfn

    async def _cached(self, thread: Thread, file_id: int, page: int) -> int:
        """Return the object's own frame, with a reference for the entry to come."""
        gfn = self._cache.get(file_id, page)
        if gfn is not None:
            await SetInterrupts(False)
            return gfn
        gfn = self._frames.take()
        await SetInterrupts(False)
        await self._slots.fill(thread.cpu, gfn, page_word(file_id, page))
        return self._cache.offer(file_id, page, gfn)

    async def read_page(self, thread: Thread, file_id: int, page: int, dst_gfn: int) -> None:
        """Copy a file's page to a frame. Leaves interrupts disabled; no lock is held.

        Raises:
            OutOfMemory: With nothing done.
        """
        await self._paging.make_room(thread)
        gfn = await self._cached(thread, file_id, page)
        await self._slots.copy(thread.cpu, dst_gfn, gfn)
        self._frames.drop(gfn)

    async def write_page(
        self, thread: Thread, file_id: int, page: int, src_gfn: int, n_bytes: int
    ) -> None:
        """Replace the first bytes of a file's page. Leaves interrupts disabled.

        Raises:
            OutOfMemory: With nothing done.
        """
        await self._paging.make_room(thread)
        gfn = await self._cached(thread, file_id, page)
        self._cache.written(file_id, page)
        await self._slots.copy(thread.cpu, gfn, src_gfn, n_bytes)
        self._frames.drop(gfn)

    async def _adjust(
        self,
        thread: Thread,
        space: AddressSpace,
        area: Area,
        slot: Slot,
        write: bool,
        old: int,
    ) -> None:
        """Give a mapped page the rights that its area has: usually a copy-on-write.

        Nothing to do means that a sibling was faster, or that this CPU held an older entry.
        """
        gfn = self._tables.frame(old)
        if write and not area.shared and self._frames.references(gfn) > 1:
            await self._copy(thread, space, area, slot, old)
            return
        await SetInterrupts(False)
        new = self._tables.entry(gfn, area.prot, writable=write, dirty=write) | old & (A | D)
        if not write:
            new |= old & W
        if new != old:
            # Rights only grow here, so no CPU has to forget what it has cached: unless the entry
            # is not what the kernel wrote.
            if not new & P or old & W & ~new or new & ~old & NX:
                raise KernelPanic(f"garbage {old:#x} in the page-table entry of {slot.vpn:#x}000")
            await self._tables.change(slot, old, new)

    async def _copy(
        self, thread: Thread, space: AddressSpace, area: Area, slot: Slot, old: int
    ) -> None:
        """Break sharing: put a copy of the frame into the entry."""
        cpu = thread.cpu
        shared_gfn = self._tables.frame(old)
        gfn = self._frames.take()
        await SetInterrupts(False)
        await self._slots.copy(cpu, gfn, shared_gfn)
        new = self._tables.entry(gfn, area.prot, writable=True, dirty=True)
        width = self._tables.entry_bytes
        if space.cpus & ~cpu.bit:
            await Exchange(slot.gva, width, 0)
            await self._shootdown.flush(cpu, space, slot.vpn, 1)
            await Store(slot.gva, width, new)
        else:
            await Store(slot.gva, width, new)
            await self._shootdown.flush(cpu, space, slot.vpn, 1)
        self._frames.drop(shared_gfn)
        await self._shootdown.flush_late(cpu, space, slot.vpn, 1)


def _denied(area: Area, error: int) -> str:
    """Return what the area forbids about an access, or nothing."""
    if error & PF_W:
        return "" if area.prot & PROT_WRITE else "write to read-only"
    if error & PF_I:
        return "" if area.prot & PROT_EXEC else "execution of non-executable"
    return "" if area.prot else "access to inaccessible"
