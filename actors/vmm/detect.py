"""How the monitor learns that a guest table changed: the detection policies.

A policy says what the shadow entries that map a traced frame look like. `WriteProtect` takes their
W away, so that each store exits and the monitor makes it (A40). `MarkForLog` leaves W and sets the
hardware's traced-write mark: the store is made at full speed and its record waits in the CPU's
guest write buffer (GWB).

Source: A40 ¶83, T3a; GWB.
"""

from __future__ import annotations

from typing import Protocol

from penumbra.actors.vmm.buffer_faults import BufferFault
from penumbra.actors.vmm.shadow import ShadowSpace
from penumbra.hw.formats import D, W
from penumbra.hw.write_buffer import MARK


class Detection(Protocol):
    """What is asked about the shadow entries of guest frames, traced or not.

    Attributes:
        emulates: Stores to a traced frame are the monitor's to make.
    """

    emulates: bool

    def leaf(self, value: int, entry: int, traced: bool) -> int:
        """Return a shadow leaf as this policy wants it, from what it would be without one.

        Args:
            entry: The guest leaf it is derived from.
        """
        ...

    def escapes(self, value: int) -> bool:
        """Tell whether stores through this shadow leaf of a traced frame would go unnoticed."""
        ...

    def place(self, space: ShadowSpace, gfn: int) -> int:
        """A trace is being placed: change every mapping of `gfn`; return how many lost a right."""
        ...

    def lift(self, space: ShadowSpace, gfn: int) -> None:
        """The trace of `gfn` is going: its mappings may be as any other frame's."""


class WriteProtect:
    """Detect by write traces: no shadow maps a traced frame writable."""

    emulates = True

    def leaf(self, value: int, entry: int, traced: bool) -> int:
        return value & ~W if traced else value

    def escapes(self, value: int) -> bool:
        return bool(value & W)

    def place(self, space: ShadowSpace, gfn: int) -> int:
        return space.revoke_write(gfn)

    def lift(self, space: ShadowSpace, gfn: int) -> None:
        """Write permission comes back with the next fault."""


class MarkForLog:
    """Detect by the guest write buffer: whatever maps a traced frame writable is marked.

    The mark stands in the shadow entry *and* in cached copies of it, so an entry that was writable
    and unmarked is flushed when it gets one (EG3), under every address that maps the frame (EG4).
    D is the guest's as before: an entry whose guest entry is clean is not writable (W1, EG6).

    Args:
        everything: Mark all that is writable; stores to other frames are filtered later (W5).
    """

    emulates = False

    def __init__(self, *, everything: bool = False, fault: BufferFault = BufferFault.NONE) -> None:
        self._everything = everything
        self._fault = fault

    def leaf(self, value: int, entry: int, traced: bool) -> int:
        if not traced and not self._everything:
            return value
        if self._fault & BufferFault.HARDWARE_DIRTY and not entry & D:
            value |= entry & W
        return value | MARK

    def escapes(self, value: int) -> bool:
        return value & (W | MARK) == W

    def place(self, space: ShadowSpace, gfn: int) -> int:
        n = 0
        for page, index in space.mappings(gfn):
            value = space.entry(page, index)
            if value & MARK:
                continue
            flush = value & W and not self._fault & BufferFault.MARK_UNFLUSHED
            space.rewrite(page, index, value | MARK, flush=bool(flush))
            n += bool(value & W)
            if self._fault & BufferFault.ONE_ALIAS_MARKED:
                break
        return n

    def lift(self, space: ShadowSpace, gfn: int) -> None:
        """Take the marks away; a cached one left only logs what the reader filters."""
        if self._everything:
            return
        for page, index in space.mappings(gfn):
            space.rewrite(page, index, space.entry(page, index) & ~MARK, flush=False)
