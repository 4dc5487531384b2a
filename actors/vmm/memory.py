"""Memory management module 350: which machine frame backs which guest frame.

Guest frames and the monitor's own frames (shadow tables) come from one machine RAM and never
overlap. Placement is scattered on purpose, so that a GPPN used as a PPN is seen at once.

A guest frame may lie in no machine frame (`ABSENT`): its content is kept here. Several may lie in
one, read-only, while their content is equal. Nothing here asks who still uses a frame: whoever
takes one away has made every shadow, derived value and TLB forget it before.

Source: A40 Fig. 5 (350), Fig. 7, ¶43.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.memory import Ram

UNBACKED = -1
ABSENT = -2
LOW = (1 << 32) >> PAGE_SHIFT
_ZEROS = bytes(PAGE_BYTES)


def scattered(frames: Sequence[int], seed: int) -> list[int]:
    """Return machine frames in an order that depends on the seed alone, on every machine."""
    keys = np.frombuffer(random.Random(seed).randbytes(8 * len(frames)), "<u8")
    order: list[int] = np.asarray(frames, np.int64)[np.argsort(keys, kind="stable")].tolist()
    return order


class MonitorMemoryShortError(Exception):
    """No machine frame is left for a shadow page."""


class MemoryManagement:
    """GPPN to PPN for one VM, and a pool of frames for the monitor.

    Invariant: `frame_map` and `guest_of` are inverse but for shared frames, whose first guest frame
    `guest_of` names; a frame of the pool backs no guest frame; content is kept of absent ones only.

    Attributes:
        frame_map: int64[n_guest_frames], PPN of each GPPN, or `UNBACKED` (no RAM), or `ABSENT` (RAM
            that is in no machine frame).
        n_unready: Guest frames that are absent or shared.
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
        absent: bool = False,
        devices: range = range(0),
    ) -> None:
        """Back every guest frame, or those of `backed` alone (ascending; the rest is no RAM).

        Args:
            frames: The machine frames this VM and its monitor may use; None: all there are.
            absent: No guest frame has a machine frame yet; all `frames` are the monitor's.
            devices: Guest frames that are device registers, above all others: never backed.
        """
        gfns = range(n_guest_frames) if backed is None else backed
        own = identity and backed is not None
        given = range(ram.n_frames) if frames is None else frames
        frames = list(gfns if own else given)
        if not identity:
            frames = scattered(frames, seed)
        self.ram = ram
        self.devices = devices
        assert not devices or devices.start >= max(n_guest_frames, ram.n_frames)
        self.frame_map = np.full(n_guest_frames, UNBACKED, np.int64)
        n_given = 0 if absent else len(gfns)
        self.frame_map[list(gfns)] = ABSENT if absent else frames[:n_given]
        self.frame_view = self.frame_map.data
        self.n_guest_frames = n_guest_frames
        self.guest_of = dict(zip(frames[:n_given], gfns, strict=False))
        self._free = frames[n_given:]
        self._pool = tuple(self._free)
        self._kept: dict[int, bytes] = {}  # of absent frames, where not all zero
        self._sharers: dict[int, dict[int, None]] = {}  # by PPN, two guest frames or more
        self.n_unready = len(gfns) - n_given

    def hpa(self, gpa: int) -> int | None:
        """Return the machine address behind a guest-physical one, or None where nothing is."""
        gfn = gpa >> PAGE_SHIFT
        if gfn >= self.n_guest_frames or (pfn := self.frame_view[gfn]) < 0:
            return None
        return (pfn << PAGE_SHIFT) | (gpa & 0xFFF)

    def is_device(self, gfn: int) -> bool:
        """Tell whether accesses to a guest frame are for an emulator, and never for memory."""
        return gfn in self.devices

    def load(self, gpa: int, size: int) -> int:
        """Read guest-physical memory, absent or not; all ones where nothing is."""
        hpa = self.hpa(gpa)
        if hpa is None and self.is_absent(gpa >> PAGE_SHIFT):
            at = gpa & (PAGE_BYTES - 1)
            return int.from_bytes(self.page(gpa >> PAGE_SHIFT)[at : at + size], "little")
        return (1 << (8 * size)) - 1 if hpa is None else self.ram.load(hpa, size)

    def store(self, gpa: int, size: int, value: int) -> None:
        """Write guest-physical memory without any trace or tap: loaders and A/D emulation only.

        The frame must be `ready` for writing.
        """
        assert self.ready(gpa >> PAGE_SHIFT, True), f"{gpa:#x} is absent or shared"
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

    # ---- frames that move -----------------------------------------------------------------------

    def is_absent(self, gfn: int) -> bool:
        """Tell whether a guest frame is RAM that lies in no machine frame."""
        return gfn < len(self.frame_map) and self.frame_view[gfn] == ABSENT

    def is_shared(self, gfn: int) -> bool:
        """Tell whether another guest frame lies in the same machine frame."""
        return gfn < len(self.frame_map) and self.frame_view[gfn] in self._sharers

    def are_shared(self, pfns: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Tell of each machine frame whether several guest frames lie in it."""
        return np.isin(pfns, list(self._sharers))

    def ready(self, gfn: int, write: bool) -> bool:
        """Tell whether a guest frame can be read, or written, where it lies now."""
        if not self.n_unready:
            return True
        return not self.is_absent(gfn) and not (write and self.is_shared(gfn))

    def guests(self, pfn: int) -> tuple[int, ...]:
        """Return the guest frames that lie in a machine frame."""
        if pfn in self._sharers:
            return tuple(self._sharers[pfn])
        return (self.guest_of[pfn],) if pfn in self.guest_of else ()

    def page(self, gfn: int) -> bytes:
        """Return a guest frame's content, wherever it is; nothing where there is no RAM."""
        if self.is_absent(gfn):
            return self._kept.get(gfn, _ZEROS)
        start = self.hpa(gfn << PAGE_SHIFT)
        return b"" if start is None else bytes(self.ram.bytes[start : start + PAGE_BYTES])

    def bring(self, gfn: int, pfn: int) -> bool:
        """Put an absent guest frame into a machine frame; tell whether it had any content."""
        content = self._kept.pop(gfn, None)
        self._fill(pfn, content or _ZEROS)
        self._enter(gfn, pfn)
        self.n_unready -= 1
        return content is not None

    def send_away(self, pfn: int) -> bool:
        """Make every guest frame in a machine frame absent; tell whether there was any content."""
        content = bytes(self.ram.bytes[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT])
        kept = content != _ZEROS
        for gfn in self.guests(pfn):
            self._leave(gfn)
            self.frame_view[gfn] = ABSENT
            self.n_unready += 1
            if kept:
                self._kept[gfn] = content
        return kept

    def move(self, gfn: int, pfn: int) -> int | None:
        """Copy a guest frame to another machine frame; return the old one if it is free now."""
        old = self.frame_view[gfn]
        self._fill(pfn, self.page(gfn))
        self._leave(gfn)
        self._enter(gfn, pfn)
        return None if old in self.guest_of else old

    def share(self, gfn: int, pfn: int) -> int | None:
        """Let a guest frame lie where others of equal content do; return its old frame if free."""
        old = self.frame_view[gfn]
        assert old != pfn and self.page(gfn) == self.page(self.guest_of[pfn])
        self._leave(gfn)
        self._enter(gfn, pfn)
        return None if old in self.guest_of else old

    def _fill(self, pfn: int, content: bytes) -> None:
        self.ram.bytes[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT] = content

    def _enter(self, gfn: int, pfn: int) -> None:
        self.frame_view[gfn] = pfn
        first = self.guest_of.setdefault(pfn, gfn)
        if first != gfn:
            sharers = self._sharers.setdefault(pfn, {first: None})
            sharers[gfn] = None
            self.n_unready += 2 if len(sharers) == 2 else 1

    def _leave(self, gfn: int) -> None:
        pfn = self.frame_view[gfn]
        sharers = self._sharers.get(pfn)
        if sharers is None:
            del self.guest_of[pfn]
            return
        del sharers[gfn]
        self.guest_of[pfn] = next(iter(sharers))
        self.n_unready -= 2 if len(sharers) == 1 else 1
        if len(sharers) == 1:
            del self._sharers[pfn]

    def check(self) -> None:
        view, n = self.frame_map, len(self.guest_of)
        pfns = np.fromiter(self.guest_of, np.int64, n)
        gfns = np.fromiter(self.guest_of.values(), np.int64, n)
        assert np.array_equal(view[gfns], pfns)
        assert not any(pfn in self.guest_of for pfn in self._free)
        for pfn, sharers in self._sharers.items():
            assert self.guest_of[pfn] == next(iter(sharers))
            assert all(view[gfn] == pfn for gfn in sharers)
        n += sum(len(sharers) - 1 for sharers in self._sharers.values())
        assert n == np.count_nonzero(view >= 0), "a frame is used that nobody knows of"
        assert all(view[gfn] == ABSENT for gfn in self._kept)
        n_shared = sum(map(len, self._sharers.values()))
        assert self.n_unready == np.count_nonzero(view == ABSENT) + n_shared
