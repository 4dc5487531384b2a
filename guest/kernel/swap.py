"""Swap space: which block of the disk holds which page. Passive, in the kernel's own records.

A swapped page's entry is not present and holds the slot's number where a present one holds its
frame, as real kernels do:

    31/51 .. 12     10         0
    slot number     SOFT_SWAP  P = 0

A slot is held by every entry that names it (a fork copies entries), by a transfer under way, and by
the frame it was read into: a frame that is still as the slot has it (D = 0) need not be written
again. Slot n is block n of the disk.
"""

from __future__ import annotations

from penumbra.hw.formats import PAGE_SHIFT, FormatSpec, P

SOFT_SWAP = 1 << 10


class SwapSpace:
    """Slots with reference counts, and the slot each clean frame was read from.

    Invariant: a slot is free or has references; a backing slot has one reference of its frame.
    """

    def __init__(self, spec: FormatSpec, n_slots: int) -> None:
        self.n_slots = min(n_slots, spec.frame_mask >> PAGE_SHIFT)
        self._frame_mask = spec.frame_mask
        self._n_fresh = 0
        self._free: list[int] = []
        self._refs: dict[int, int] = {}
        self._backing: dict[int, int] = {}

    @property
    def n_used(self) -> int:
        return len(self._refs)

    def entry(self, slot: int) -> int:
        """Return the not-present entry that names a slot."""
        return slot << PAGE_SHIFT | SOFT_SWAP

    def slot_of(self, entry: int) -> int | None:
        """Return the slot a swapped page's entry names; None for any other entry."""
        if entry & P or not entry & SOFT_SWAP:
            return None
        return (entry & self._frame_mask) >> PAGE_SHIFT

    def take(self) -> int | None:
        """Return a free slot, now with one reference; None if the swap space is full."""
        if self._free:
            slot = self._free.pop()
        elif self._n_fresh < self.n_slots:
            slot = self._n_fresh
            self._n_fresh += 1
        else:
            return None
        self._refs[slot] = 1
        return slot

    def share(self, slot: int) -> None:
        """Add a reference to a taken slot."""
        self._refs[slot] += 1

    def drop(self, slot: int) -> None:
        """Give one reference back; with the last one the slot is free."""
        self._refs[slot] -= 1
        if not self._refs[slot]:
            del self._refs[slot]
            self._free.append(slot)

    def back(self, gfn: int, slot: int) -> None:
        """Note that a frame holds what the slot holds; the caller's reference goes to it."""
        assert gfn not in self._backing
        self._backing[gfn] = slot

    def backing(self, gfn: int) -> int | None:
        """Return the slot a frame was read from, if it is still held for it."""
        return self._backing.get(gfn)

    def take_backing(self, gfn: int) -> tuple[int | None, bool]:
        """Return a slot for a frame that is to go, and whether it holds the frame's old contents.

        The slot may be written: no other entry names it, or else the old contents are all that is
        wanted. Its reference is the caller's now. None if the swap space is full.
        """
        slot = self._backing.pop(gfn, None)
        return (self.take(), False) if slot is None else (slot, True)

    def forget(self, gfn: int) -> None:
        """The frame has gone, or may have changed unseen: its slot is no copy of it any more."""
        slot = self._backing.pop(gfn, None)
        if slot is not None:
            self.drop(slot)

    def references(self, slot: int) -> int:
        return self._refs.get(slot, 0)

    def check(self) -> None:
        assert not set(self._free) & self._refs.keys() and all(self._refs.values())
        assert len(self._free) + len(self._refs) == self._n_fresh <= self.n_slots
        assert all(slot in self._refs for slot in self._backing.values())
