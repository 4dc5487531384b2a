"""The guest's frames in machine RAM: who got which, which are watched, what their entries hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .paging import Format

WATCHED = 1
NO_FRAME = -1
AWAY = -2
_FRAME_SHIFT = 12
_FRAME_BYTES = 1 << _FRAME_SHIFT


class Frames:
    """RAM as one guest sees it: by guest frames, in entries.

    A guest frame without a machine frame reads as ones, as an address without memory does; one that
    is AWAY, in none for now, as what it held when it went. Numbers below NO_FRAME stand for what
    registers were loaded with (`hold`): read, never stored to.

    Invariant: a machine frame's flag WATCHED is set exactly if a watched guest frame lies in it.

    Args:
        ram: All of the machine's RAM; only read.
        flags: One byte for each machine frame; only the bit WATCHED is changed.
    """

    def __init__(self, form: Format, ram: memoryview, flags: memoryview) -> None:
        self._bytes = memoryview(ram).cast("B")
        self._entries = self._bytes.cast("I" if form.entry_bytes == 4 else "Q")
        self._dtype = np.dtype(f"u{form.entry_bytes}")
        self._width = form.entry_bytes
        self._per_frame = _FRAME_BYTES // form.entry_bytes
        self._all_ones = (1 << 8 * form.entry_bytes) - 1
        self._nothing = np.full(self._per_frame, self._all_ones, self._dtype)
        self._flags = flags
        self._n_frames = len(self._bytes) // _FRAME_BYTES
        self._pfns: dict[int, int] = {}
        self._guests: dict[int, tuple[int, ...]] = {}
        self._away: dict[int, npt.NDArray[np.unsignedinteger]] = {}
        self._empty = np.zeros(self._per_frame, self._dtype)
        self._devices: dict[int, int] = {}
        self._watched: set[int] = set()
        self._held: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[tuple[int, ...], int] = {}
        self._n_held = 0

    @property
    def n_watched(self) -> int:
        """Number of guest frames watched."""
        return len(self._watched)

    def is_granted(self, gfn: int) -> bool:
        """Tell whether a guest frame lies in a machine frame."""
        return gfn in self._pfns

    def is_ram(self, gfn: int) -> bool:
        """Tell whether a guest frame lies in a machine frame or is away."""
        return gfn in self._pfns or gfn in self._away

    def pfn(self, gfn: int) -> int:
        """Return the machine frame of a guest frame, or NO_FRAME."""
        return self._pfns.get(gfn, NO_FRAME)

    def guests_of(self, pfn: int) -> Sequence[int]:
        """Return the guest frames that lie in a machine frame."""
        return self._guests.get(pfn, ())

    def serves(self, pfn: int, gfn: int) -> bool:
        """Tell whether `pfn` is what an access to `gfn` must reach: without a grant, nothing."""
        if gfn in self._away:
            return False
        granted = self._pfns.get(gfn, self._devices.get(gfn))
        if granted is not None:
            return pfn == granted
        return not 0 <= pfn < self._n_frames and pfn not in self._devices.values()

    def set_device(self, gfn: int, pfn: int) -> None:
        """Note that a guest frame is a device, which answers as `pfn`, where no RAM is."""
        assert gfn not in self._pfns and pfn >= self._n_frames
        self._devices[gfn] = pfn

    def grant_all(self, pfns: Sequence[int]) -> None:
        """Put guest frames 0, 1, 2 ... where nothing has been granted or watched yet."""
        assert not self._pfns and not self._away and not self._watched
        where = np.asarray(pfns)
        gfns = np.flatnonzero(where >= 0)
        granted = where[gfns].tolist()
        self._pfns = dict(zip(gfns.tolist(), granted, strict=True))
        self._guests = dict(zip(granted, zip(gfns.tolist(), strict=True), strict=True))
        self._away = dict.fromkeys(np.flatnonzero(where == AWAY).tolist(), self._empty)
        assert len(self._guests) == len(granted), "two guest frames in one machine frame"

    def grant(self, gfn: int, pfn: int) -> int:
        """Put a guest frame into a machine frame; NO_FRAME: it is no RAM.

        AWAY: it is RAM, its content is kept elsewhere; one never granted before is all zero.

        Returns:
            The machine frame it was in before, or NO_FRAME.
        """
        if pfn == AWAY:
            content = self.entries(gfn) if gfn in self._pfns else self._away.get(gfn, self._empty)
            self._away[gfn] = content.copy() if content.any() else self._empty
        else:
            self._away.pop(gfn, None)
        before = self._pfns.pop(gfn, NO_FRAME)
        if before != NO_FRAME:
            self._guests[before] = tuple(one for one in self._guests[before] if one != gfn)
            self._set_flag(before)
        if pfn >= 0:
            self._pfns[gfn] = pfn
            self._guests[pfn] = (*self._guests.get(pfn, ()), gfn)
            self._set_flag(pfn)
        return before

    def hold(self, gpa: int, n: int) -> int:
        """Return the number that stands for the `n` entries at an address as they are now.

        Equal entries have the same number, until it is released.
        """
        first = (gpa & (_FRAME_BYTES - 1)) // self._width
        values = tuple(self.entry(gpa >> _FRAME_SHIFT, first + i) for i in range(n))
        number = self._numbers.get(values)
        if number is None:
            self._n_held += 1
            number = self._numbers[values] = NO_FRAME - self._n_held
            self._held[number] = values
        return number

    @property
    def held(self) -> Sequence[int]:
        """Numbers that stand for entries in registers, oldest first."""
        return tuple(self._held)

    def release(self, number: int) -> None:
        """Forget what a number of `hold` stands for."""
        del self._numbers[self._held.pop(number)]

    def watch(self, gfn: int) -> None:
        """Ask to be told of stores to a guest frame, wherever it lies."""
        self._watched.add(gfn)
        self._set_flag(self.pfn(gfn))

    def unwatch(self, gfn: int) -> None:
        """Take the request back."""
        self._watched.discard(gfn)
        self._set_flag(self.pfn(gfn))

    def is_watched(self, gfn: int) -> bool:
        """Tell whether a guest frame is watched, and flagged if it has a machine frame."""
        pfn = self.pfn(gfn)
        return gfn in self._watched and (pfn == NO_FRAME or bool(self._flags[pfn] & WATCHED))

    def _set_flag(self, pfn: int) -> None:
        if pfn == NO_FRAME:
            return
        if any(gfn in self._watched for gfn in self._guests.get(pfn, ())):
            self._flags[pfn] |= WATCHED
        else:
            self._flags[pfn] &= 0xFF ^ WATCHED

    def entry(self, gfn: int, index: int) -> int:
        """Return an entry of the table in a guest frame, as it is now."""
        pfn = self._pfns.get(gfn)
        if pfn is None:
            if gfn in self._away:
                return int(self._away[gfn][index])
            return self._held[gfn][index] if gfn in self._held else self._all_ones
        return self._entries[pfn * self._per_frame + index]

    def entries(self, gfn: int) -> npt.NDArray[np.unsignedinteger]:
        """Return all entries of the table in a guest frame: a view of RAM, only to be read."""
        pfn = self._pfns.get(gfn)
        if pfn is None:
            if gfn in self._away:
                return self._away[gfn]
            held = self._held.get(gfn)
            return self._nothing if held is None else np.array(held, self._dtype)
        return np.frombuffer(self._bytes, self._dtype, self._per_frame, pfn * _FRAME_BYTES)

    def content(self, gfn: int) -> Sequence[int]:
        """Return a copy of the entries of the table in a guest frame."""
        return tuple(self.entries(gfn).tolist())

    def content_before(self, gfn: int, hpa: int, size: int, old: int) -> Sequence[int]:
        """Return the entries of a table as they were before a store within its frame."""
        first = self.pfn(gfn) * self._per_frame
        content = list(self.content(gfn))
        for number in range(hpa // self._width, (hpa + size - 1) // self._width + 1):
            if 0 <= number - first < self._per_frame:
                content[number - first] = self.entry_before(number, hpa, size, old)
        return tuple(content)

    def entry_before(self, number: int, hpa: int, size: int, old: int) -> int:
        """Return entry `number` of all RAM as it was before a store of `size` bytes at `hpa`."""
        shift = (hpa - number * self._width) * 8
        stored = (1 << 8 * size) - 1
        mask = (stored << shift if shift >= 0 else stored >> -shift) & self._all_ones
        before = old << shift if shift >= 0 else old >> -shift
        return (self._entries[number] & ~mask) | (before & mask)
