"""Memory management module 350: which machine frame backs which guest frame.

Guest frames and the monitor's own frames (shadow tables) come from one machine RAM and never
overlap. Placement is scattered on purpose, so that a GPPN used as a PPN is seen at once.

Source: A40 Fig. 5 (350), Fig. 7.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from penumbra.hw.formats import PAGE_SHIFT
from penumbra.hw.memory import Ram

UNBACKED = -1
LOW = (1 << 32) >> PAGE_SHIFT


class MonitorMemoryShortError(Exception):
    """No machine frame is left for a shadow page."""


class MemoryManagement:
    """GPPN to PPN for one VM, and a pool of frames for the monitor.

    Invariant: `frame_map` and `guest_of` are inverse; a frame of the pool backs no guest frame.

    Attributes:
        frame_map: int64[n_guest_frames], PPN of each GPPN, or `UNBACKED`.
    """

    def __init__(
        self,
        ram: Ram,
        n_guest_frames: int,
        *,
        identity: bool,
        seed: int,
        backed: Sequence[int] | None = None,
        frames: Sequence[int] | None = None,
    ) -> None:
        """Back every guest frame, or those of `backed` alone (ascending; the rest is no RAM).

        Args:
            frames: The machine frames this VM and its monitor may use; None: all there are.
        """
        gfns = range(n_guest_frames) if backed is None else backed
        own = identity and backed is not None
        given = range(ram.n_frames) if frames is None else frames
        frames = list(gfns if own else given)
        if not identity:
            random.Random(seed).shuffle(frames)
        self.ram = ram
        self.frame_map = np.full(n_guest_frames, UNBACKED, np.int64)
        self.frame_map[list(gfns)] = frames[: len(gfns)]
        self.frame_view = self.frame_map.data
        self.n_guest_frames = n_guest_frames
        self.guest_of = dict(zip(frames, gfns, strict=False))
        self._free = frames[len(gfns) :]
        self._pool = tuple(self._free)

    def hpa(self, gpa: int) -> int | None:
        """Return the machine address behind a guest-physical one, or None where nothing is."""
        gfn = gpa >> PAGE_SHIFT
        if gfn >= self.n_guest_frames or (pfn := self.frame_view[gfn]) == UNBACKED:
            return None
        return (pfn << PAGE_SHIFT) | (gpa & 0xFFF)

    def load(self, gpa: int, size: int) -> int:
        """Read guest-physical memory; all ones where nothing is."""
        hpa = self.hpa(gpa)
        return (1 << (8 * size)) - 1 if hpa is None else self.ram.load(hpa, size)

    def store(self, gpa: int, size: int, value: int) -> None:
        """Write guest-physical memory without any trace or tap: loaders and A/D emulation only."""
        hpa = self.hpa(gpa)
        if hpa is not None:
            self.ram.store(hpa, size, value)

    def take_frame(self, *, low: bool = False) -> int:
        """Return a zeroed machine frame for the monitor.

        Args:
            low: It must lie below 4 GiB, as a root does that is loaded into a 32-bit CR3.

        Raises:
            MonitorMemoryShortError: The pool is empty, or has nothing there.
        """
        fits = (at for at in range(len(self._free) - 1, -1, -1) if self._free[at] < LOW or not low)
        at = next(fits, None)
        if at is None:
            raise MonitorMemoryShortError
        pfn = self._free.pop(at)
        self.ram.clear_frame(pfn)
        return pfn

    def give_frame(self, pfn: int) -> None:
        """Take back a frame of `take_frame`; no CPU may still walk it."""
        self._free.append(pfn)

    def take_all_back(self) -> None:
        """Take back every frame handed out: nothing of the monitor's is in use any more."""
        self._free = list(self._pool)

    def check(self) -> None:
        assert all(self.frame_view[gfn] == pfn for pfn, gfn in self.guest_of.items())
        assert not set(self._free) & set(self.guest_of)
