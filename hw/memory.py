"""Machine RAM: page frames in one buffer, seen as 8, 32 and 64-bit words.

Reads beyond RAM return all ones and writes there vanish, as on a PC. Nothing here translates:
addresses are host-physical (`hpa`), frames are `pfn`.
"""

from __future__ import annotations

import numpy as np

from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT

FLAG_TABLE = 1  # an observer wants every guest store to this frame
FLAG_SPIN = 2  # some VCPU spins on a word of this frame


class Ram:
    """`n_frames` page frames of 4096 bytes, zeroed.

    Invariant: every view below shares one buffer, and `len(flags) == n_frames`.

    Attributes:
        bytes: uint8 view as a memoryview.
        u64: Unsigned 64-bit view (memoryview), index `hpa >> 3`.
        flags: uint8[n_frames] as a memoryview: `FLAG_*` bits a store must respect.
    """

    def __init__(self, n_frames: int) -> None:
        if n_frames < 1:
            raise ValueError(f"RAM needs at least one frame, got {n_frames}")
        self.n_frames = n_frames
        self.array = np.zeros(n_frames * PAGE_BYTES, np.uint8)
        self.array64 = self.array.view(np.int64)
        self.array32 = self.array.view(np.uint32)
        self.flags_array = np.zeros(n_frames, np.uint8)
        self.bytes = self.array.data
        self.u64 = self.array.view(np.uint64).data
        self.i64 = self.array64.data
        self.u32 = self.array32.data
        self.flags = self.flags_array.data

    def load(self, hpa: int, size: int) -> int:
        """Read `size` bytes (1, 2, 4, 8) at `hpa`; all ones beyond RAM."""
        if hpa >> PAGE_SHIFT >= self.n_frames:
            return (1 << (8 * size)) - 1
        if size == 8 and not hpa & 7:
            return self.u64[hpa >> 3]
        return int.from_bytes(self.bytes[hpa : hpa + size], "little")

    def store(self, hpa: int, size: int, value: int) -> None:
        """Write the low `size` bytes of `value` at `hpa`; dropped beyond RAM."""
        if hpa >> PAGE_SHIFT >= self.n_frames:
            return
        if size == 8 and not hpa & 7:
            self.u64[hpa >> 3] = value
        else:
            self.bytes[hpa : hpa + size] = value.to_bytes(size, "little")

    def clear_frame(self, pfn: int) -> None:
        """Zero one frame."""
        self.array64[pfn << 9 : (pfn + 1) << 9] = 0

    def check(self) -> None:
        assert len(self.array) == self.n_frames * PAGE_BYTES
        assert len(self.flags_array) == self.n_frames
