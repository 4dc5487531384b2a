"""Machine frames behind guest frames: brought, taken, moved and shared, on all CPUs.

Passive code says what it cannot do where a frame is now (`FrameWanted`); this asks whom it has to
ask, and then the passive code is asked again. Before the machine frame behind a guest frame changes

1. every consumer drops the shadow leaves that map it and its CPU what was cached of them, or the
   second-level table its entry and every CPU all it has combined (`Mappings`);
2. the trace count moves, so that no derived value in flight is used (EP3);
3. the content is carried over, or kept;
4. the checker is told.

All of it falls between two steps of one exit: no store is under way, nobody else runs. No guest
progress is spent, so a guest does the same whatever its monitor does to its frames.

Source: A40 Fig. 5 (350), ¶43, ¶100; V3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.mappings import Mappings, NoMappings
from penumbra.actors.machine.observer import Observer, Taps
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.memory import UNBACKED, MemoryManagement
from penumbra.actors.vmm.residents import FramePool, Residents
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.hw.formats import PAGE_SHIFT
from penumbra.hw.memory import FLAG_SPIN

# Free frames for moves where every guest frame has one.
SPARES = 8
_MOST_MOVES = 16


class FramesOf(Protocol):
    """What the drivers of one VM ask of its machine frames."""

    def start(self) -> None:
        """Tell the checker where guest memory lies, before anything is in it."""

    def attach(self, mappings: Mappings) -> None:
        """These are to forget frames from now on."""

    def want(self, gfn: int, write: bool) -> None:
        """Have a guest frame in a machine frame; to be written, in one of its own."""

    def separate(self, gfn: int) -> None:
        """Have a guest frame share its machine frame with no other."""

    def release(self, gfn: int) -> None:
        """The guest has no use for what is in a frame, all zeros now, until it touches it again."""

    def until(self, progress: int) -> None:
        """Do what is due by this progress, between two exits."""


class FixedFrames:
    """Every guest frame stays where it is for ever."""

    def __init__(self, memory: MemoryManagement, taps: Taps | None) -> None:
        self._memory = memory
        self._taps = taps

    def start(self) -> None:
        if self._taps is not None:
            pfns = [UNBACKED] * self._memory.n_guest_frames
            for pfn, gfn in self._memory.guest_of.items():
                pfns[gfn] = pfn
            self._taps.grant_all(pfns)

    def attach(self, mappings: Mappings) -> None:
        pass

    def want(self, gfn: int, write: bool) -> None:
        pass

    def separate(self, gfn: int) -> None:
        pass

    def release(self, gfn: int) -> None:
        pass

    def until(self, progress: int) -> None:
        pass


class FrameKeeper:
    """Moves the frames of one VM.

    Invariant: no traced guest frame is shared; the root of no VCPU, the word no VCPU spins on and
    nothing an instruction under way needs is absent because of this.

    Args:
        vm: Number of the VM in the pool.
        running: Says which VCPU has to pay.
    """

    def __init__(
        self,
        memory: MemoryManagement,
        pool: FramePool,
        traces: WriteTraces,
        submms: Sequence[SecondaryData],
        observer: Observer,
        config: MachineConfig,
        seed: int,
        vm: int,
        running: Callable[[], int],
    ) -> None:
        self._memory = memory
        self._pool = pool
        self._traces = traces
        self._submms = submms
        self._observer = observer
        self._taps = observer.taps
        self._vm = vm
        self._running = running
        self._draw = random.Random(seed)
        self._mappings: Mappings = NoMappings()
        self._residents = Residents()
        self._every = {"move": config.host_moves, "scan": config.share_pages}
        self._next = dict(self._every)
        pool.holders[vm] = self

    @property
    def n_resident(self) -> int:
        return len(self._residents)

    def start(self) -> None:
        pfns = self._memory.frame_map.tolist()
        for gfn, pfn in enumerate(pfns):
            if pfn >= 0:
                self._residents.arrive(gfn)
        if self._taps is not None:
            self._taps.grant_all(pfns)

    def attach(self, mappings: Mappings) -> None:
        self._mappings = mappings

    # ---- asked by the drivers -------------------------------------------------------------------

    def want(self, gfn: int, write: bool) -> None:
        memory = self._memory
        self._residents.wanted(gfn)
        if memory.is_absent(gfn):
            pfn = self._pool.take(self._vm)
            swapped = memory.bring(gfn, pfn)
            self._residents.arrive(gfn)
            self._grant(gfn)
            self._count("host_page_in" if swapped else "host_zero_fill")
            self._note(EventKind.FRAME_IN, gfn, pfn)
        if write:
            self.separate(gfn)

    def separate(self, gfn: int) -> None:
        memory = self._memory
        if not memory.is_shared(gfn):
            return
        self._residents.wanted(gfn)
        pfn = self._pool.take(self._vm)
        self._carry(gfn, pfn)
        self._count("pages_unshared")

    def evict(self) -> bool:
        """Give one machine frame back to the pool; what was in it becomes absent."""
        gfn = self._residents.victim(self._stays, self._traces.is_table)
        if gfn is None:
            return False
        self._give(gfn)
        return True

    def release(self, gfn: int) -> None:
        memory = self._memory
        if not memory.is_absent(gfn) and not self._is_needed(memory.frame_view[gfn]):
            self._give(gfn)

    def _give(self, gfn: int) -> None:
        """Give the machine frame behind a guest frame back, from all that lie in it."""
        memory = self._memory
        pfn = memory.frame_view[gfn]
        gfns = memory.guests(pfn)
        for each in gfns:
            self._mappings.untrace(each)
            self._mappings.forget(each)
        swapped = memory.send_away(pfn)
        for each in gfns:
            self._residents.leave(each)
            self._grant(each)
        self._pool.give(pfn)
        self._count("host_page_out" if swapped else "host_zero_drop")
        self._note(EventKind.FRAME_OUT, gfn, pfn)

    def until(self, progress: int) -> None:
        for what, period in self._every.items():
            if not period or self._next[what] > progress:
                continue
            n_due = (progress - self._next[what]) // period + 1
            self._next[what] += n_due * period
            if what == "scan":
                self._scan()
            else:
                for _ in range(min(n_due, _MOST_MOVES)):
                    self._migrate()

    # ---- moves ----------------------------------------------------------------------------------

    def _migrate(self) -> None:
        """Move a guest frame drawn by chance, and all that share with it, to another frame."""
        pfn = self._pool.take(self._vm)
        gfns = self._residents.gfns()
        if not gfns:
            self._pool.give(pfn)
            return
        gfn = gfns[self._draw.randrange(len(gfns))]
        old = self._memory.frame_view[gfn]
        if self._is_spun_on(old):
            self._pool.give(pfn)
            return
        first, *others = self._memory.guests(old)
        self._carry(first, pfn)
        for other in others:
            self._join(other, pfn)
        self._count("frames_moved")

    def _carry(self, gfn: int, pfn: int) -> None:
        """Let a guest frame lie in another machine frame, alone."""
        self._mappings.forget(gfn)
        old = self._memory.move(gfn, pfn)
        self._grant(gfn)
        if old is not None:
            self._pool.give(old)
        self._note(EventKind.FRAME_MOVED, gfn, pfn)

    def _join(self, gfn: int, pfn: int) -> None:
        """Let a guest frame lie where others of equal content do."""
        self._mappings.forget(gfn)
        old = self._memory.share(gfn, pfn)
        self._grant(gfn)
        if old is not None:
            self._pool.give(old)
        self._note(EventKind.FRAME_SHARED, gfn, pfn)

    def _scan(self) -> None:
        """Let guest frames of equal content share one machine frame, read-only."""
        memory = self._memory
        first: dict[bytes, int] = {}
        for pfn, gfn in list(memory.guest_of.items()):
            if self._traces.is_table(gfn) or self._is_spun_on(pfn):
                continue
            into = first.setdefault(memory.page(gfn), pfn)
            if into == pfn:
                continue
            if not memory.is_shared(memory.guest_of[into]):
                self._mappings.forget(memory.guest_of[into])  # comes back read-only
            for each in memory.guests(pfn):
                self._join(each, into)
                self._count("pages_shared")

    # ---- what the checker and the summary are told ----------------------------------------------

    def _grant(self, gfn: int) -> None:
        if self._taps is not None:
            self._taps.grant(gfn, self._memory.frame_view[gfn])

    def _count(self, name: str) -> None:
        self._observer.count(self._running(), name)

    def _note(self, kind: EventKind, gfn: int, pfn: int) -> None:
        self._observer.note(self._running(), kind, 0, gfn, pfn)

    # ---- what has to stay -----------------------------------------------------------------------

    def _is_spun_on(self, pfn: int) -> bool:
        return bool(self._memory.ram.flags[pfn] & FLAG_SPIN)

    def _is_needed(self, pfn: int) -> bool:
        """Tell whether a VCPU spins on a word of a machine frame or has its root there."""
        roots = {submm.registers.cr3 >> PAGE_SHIFT for submm in self._submms}
        return self._is_spun_on(pfn) or any(each in roots for each in self._memory.guests(pfn))

    def _stays(self, gfn: int) -> bool:
        pfn = self._memory.frame_view[gfn]
        recent = (self._residents.is_recent(each) for each in self._memory.guests(pfn))
        return self._is_needed(pfn) or any(recent)
