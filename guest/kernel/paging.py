"""Page replacement: what makes room when frames run short, and brings pages back.

The clock's hand goes over the pages of all address spaces in turn. A page whose A bit is set loses
it and is passed over; one that has not been used since goes:

    under the paging lock and the space's lock
        clear A, or exchange the entry for the slot's    one flush for the whole batch: a CPU
                                                         that kept a translation would not set
                                                         A again, or would use the frame
    with no lock held
        write what is dirty to its slot, sleeping         the slot is busy meanwhile
        give the frames away                              only now may anybody get them

Whoever faults on a page that is being written or read sleeps until the slot is not busy. Nobody
sleeps with a lock held, so frames are made free before a fault takes its lock, and a fault that
finds none left after all gives the lock back and begins again.

A large page that has not been used is split, and its pages go one by one.

A frame shared copy-on-write goes from one entry at a time. While it is being written that entry's
reference is the transfer's, so whoever writes through another entry copies it first.

Stays resident: pages of shared mappings, inaccessible pages, and the page a system call has pinned.

Source: A40 ¶10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from penumbra.guest.kernel.disk import DiskDriver, Move
from penumbra.guest.kernel.frames import Frames, OutOfFrames
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.page_cache import PageCache
from penumbra.guest.kernel.process import State, Thread
from penumbra.guest.kernel.scheduler import Scheduler
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.swap import SwapSpace
from penumbra.guest.kernel.tables import AddressSpace, Slot, Tables
from penumbra.guest.kernel.words import Words, acquire, release
from penumbra.hw.formats import A, D, P
from penumbra.hw.operations import Exchange

_BATCH = 4
_LOOKED_AT = 32
_TURNS = 3
_END = 1 << 52


@dataclass
class _Batch:
    """What one turn of the hand takes: dirty pages by slot, and frames that are free already."""

    writes: list[Move] = field(default_factory=list)
    clean: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.writes) + len(self.clean)


class Paging:
    """Replacement for one guest; without swap space it does nothing at all.

    Invariant: a busy slot has a reference of its transfer, and its frame is given to nobody.

    Attributes:
        n_evicted: Pages taken from address spaces so far; `n_written` of them were dirty.
    """

    def __init__(
        self,
        tables: Tables,
        frames: Frames,
        cache: PageCache,
        shootdown: Shootdown,
        words: Words,
        swap: SwapSpace,
        driver: DiskDriver,
        scheduler: Scheduler,
        spaces: Callable[[], list[tuple[int, AddressSpace]]],
        large: LargePages,
    ) -> None:
        self._large = large
        self._tables = tables
        self._frames = frames
        self._cache = cache
        self._shootdown = shootdown
        self._swap = swap
        self._driver = driver
        self._scheduler = scheduler
        self._spaces = spaces
        self._lock = words.take()
        self._reserve = 1 + min(len(scheduler.cpus), frames.n_frames // 8)
        self._busy: dict[int, int] = {}
        self._waiters: list[Thread] = []
        self._hand = (0, 0)
        self._pins: dict[int, tuple[AddressSpace, int]] = {}
        self.n_evicted = 0
        self.n_written = 0
        frames.freed = swap.forget

    @property
    def enabled(self) -> bool:
        return self._swap.n_slots > 0

    def where(self, entry: int) -> tuple[bool, int] | None:
        """Return where the page of a swapped entry is: (in memory, frame or block), else None."""
        slot = self._swap.slot_of(entry)
        if slot is None:
            return None
        return (True, self._busy[slot]) if self._busy.get(slot, -1) >= 0 else (False, slot)

    async def guard(self) -> None:
        """Keep the hand out of every address space until `unguard`: one is about to go."""
        if self.enabled:
            await acquire(self._lock)

    async def unguard(self) -> None:
        if self.enabled:
            await release(self._lock)

    async def pin(self, thread: Thread, space: AddressSpace, vpn: int) -> None:
        """Keep a page where it is, or will be at its next use, until `unpin`; no lock is held."""
        if self.enabled:
            self._pins[thread.thread_id] = space, vpn
            # Whoever looked at the page before the pin was there is through with it after this.
            await acquire(space.lock)
            await release(space.lock)

    def unpin(self, thread: Thread) -> None:
        self._pins.pop(thread.thread_id, None)

    # -- out --------------------------------------------------------------------------------------

    async def make_room(self, thread: Thread) -> None:
        """See that some frames are free. Interrupts are enabled; no lock is held.

        Raises:
            OutOfFrames: None is free and nothing can go: the swap space is full, or all pages stay.
        """
        while self.enabled and self._frames.n_free < self._reserve:
            if self._frames.reclaim():
                continue  # what nobody maps goes before what somebody may need next
            if await self._shootdown.settle_all(thread.cpu):
                continue
            batch = await self._pick(thread)
            if batch:
                await self._send(thread, batch)
                continue
            if self._frames.n_free:
                return
            if not self._busy:
                raise OutOfFrames("out of memory")
            await self._wait(thread)

    async def _pick(self, thread: Thread) -> _Batch:
        """Let the hand go on until it has a batch, or has been everywhere often enough."""
        batch = _Batch()
        await acquire(self._lock)
        spaces = self._spaces()
        for _ in range(_TURNS * len(spaces) + 1):
            pid, first = self._hand
            pid, space = next((s for s in spaces if s[0] >= pid), spaces[0])
            first = first if pid == self._hand[0] else 0
            while first < _END and len(batch) < _BATCH:
                await acquire(space.lock)
                first = await self._scan(thread, space, first, batch)
                await release(space.lock)
            if len(batch) >= _BATCH:
                self._hand = (pid, first)
                break
            self._hand = (pid + 1, 0)
        await release(self._lock)
        return batch

    async def _scan(self, thread: Thread, space: AddressSpace, first: int, batch: _Batch) -> int:
        """Look at some pages from `first` on; return where to go on. The caller holds the locks."""
        changed: list[int] = []
        after = _END
        for slot in self._tables.live(space, first, _END):
            if len(batch) >= _BATCH or len(changed) >= _LOOKED_AT:
                after = slot.vpn
                break
            if (space, slot.vpn) in self._pins.values():
                continue
            entry = await self._tables.load(slot)
            if not entry & P:
                continue
            if entry & A:
                await self._tables.change(slot, entry, entry & ~A)
                changed.append(slot.vpn)
            elif slot.n_pages > 1:
                await self._large.split(thread.cpu, space, slot)
                after = slot.vpn
                break
            elif await self._unmap(space, slot, self._tables.frame(entry), batch):
                changed.append(slot.vpn)
        if changed:
            n_pages = changed[-1] - changed[0] + 1
            await self._shootdown.flush(thread.cpu, space, changed[0], n_pages)
        return after

    async def _unmap(self, space: AddressSpace, slot: Slot, gfn: int, batch: _Batch) -> bool:
        """Take a page out of its entry if it can go; the flush is the caller's."""
        area = space.areas.find(slot.vpn)
        if area is None or area.shared:
            return False
        width = self._tables.entry_bytes
        page = area.object_page(slot.vpn)
        if self._cache.is_clean(area.file_id, page, gfn):
            slot.table.live.discard(slot.position)
            await Exchange(slot.gva, width, 0)
            batch.clean.append(gfn)
            return True
        if not self._frames.references(gfn) or self._cache.holds(area.file_id, page, gfn):
            return False
        number, is_copy = self._swap.take_backing(gfn)
        if number is None:
            return False
        old: int = await Exchange(slot.gva, width, self._swap.entry(number))
        self.n_evicted += 1
        if is_copy and not old & D:
            batch.clean.append(gfn)
            return True
        if self._swap.references(number) > 1:  # a forked sibling's entry still means the old page
            fresh = self._swap.take()
            if fresh is None:
                await Exchange(slot.gva, width, old)
                self._swap.drop(number)
                return False
            self._swap.drop(number)
            number = fresh
            await Exchange(slot.gva, width, self._swap.entry(number))
        self._swap.share(number)
        self._busy[number] = gfn
        batch.writes.append(Move(number, gfn, True))
        return True

    async def _send(self, thread: Thread, batch: _Batch) -> None:
        """Write what is dirty, then give every frame of the batch away."""
        for gfn in batch.clean:
            self._frames.drop(gfn)
        if not batch.writes:
            return
        await self._driver.move(thread, batch.writes)
        self.n_written += len(batch.writes)
        for number, gfn, _ in batch.writes:
            del self._busy[number]
            self._swap.drop(number)
            self._frames.drop(gfn)
        await self._wake()

    async def _wait(self, thread: Thread) -> None:
        """Sleep until some slot is not busy any more."""
        if thread not in self._waiters:
            self._waiters.append(thread)
        thread.state = State.BLOCKED
        await self._scheduler.block(thread)

    async def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            await self._scheduler.wake(waiter)

    # -- in ---------------------------------------------------------------------------------------

    async def bring_in(self, thread: Thread, space: AddressSpace, number: int) -> int | None:
        """Read a slot into a frame while its page is wanted; the space's lock is given back.

        Returns:
            The frame, whose reference is the caller's, and with it one of the slot; None if the
            slot was busy: then the fault has to look again.

        Raises:
            OutOfFrames: With the lock still held.
        """
        if number in self._busy:
            await release(space.lock)
            while number in self._busy:
                await self._wait(thread)
            return None
        gfn = self._frames.take()
        self._swap.share(number)
        self._busy[number] = -1
        await release(space.lock)
        await self._driver.move(thread, [Move(number, gfn, False)])
        del self._busy[number]
        await self._wake()
        return gfn

    def check(self) -> None:
        self._swap.check()
        for number, gfn in self._busy.items():
            assert self._swap.references(number)
            assert gfn < 0 or self._frames.references(gfn)
