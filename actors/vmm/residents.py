"""Which guest frames are in machine frames, and which of them goes when one is needed.

Frames leave in the order in which they came, as in a clock without reference bits: the monitor sees
faults, not accesses. A traced table is passed by once, since all that was derived from it goes with
it. What an instruction under way may need stays: the last `RECENT` frames that were asked for. One
instruction reaches at most four pages, each through at most five tables.

Source: A40 ¶43 (the kernel's memory management).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

RECENT = 24
_TO_CHOOSE_FROM = 8


def least_host_frames(n_vcpus: int) -> int:
    """Return how few frames a guest can run in: what must stay at any one time, and some more."""
    return RECENT + 2 * n_vcpus + _TO_CHOOSE_FROM  # a root and a word spun on per VCPU


class HostMemoryShortError(Exception):
    """No machine frame can be had for guest memory: all that are there must stay."""


class Residents:
    """The guest frames of one VM that lie in machine frames, oldest first."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}
        self._spared: set[int] = set()
        self._recent: deque[int] = deque(maxlen=RECENT)

    def __len__(self) -> int:
        return len(self._order)

    def wanted(self, gfn: int) -> None:
        """An instruction under way needs a frame."""
        if gfn in self._recent:
            self._recent.remove(gfn)
        self._recent.append(gfn)

    def is_recent(self, gfn: int) -> bool:
        """Tell whether an instruction under way may need a frame."""
        return gfn in self._recent

    def arrive(self, gfn: int) -> None:
        """A guest frame has got a machine frame."""
        self._order[gfn] = None

    def leave(self, gfn: int) -> None:
        """A guest frame has lost its machine frame."""
        del self._order[gfn]
        self._spared.discard(gfn)

    def gfns(self) -> list[int]:
        """Return all, oldest first."""
        return list(self._order)

    def victim(self, stays: Callable[[int], bool], spare: Callable[[int], bool]) -> int | None:
        """Choose who goes; those passed by are the youngest then. None: all of them stay."""
        for _ in range(2 * len(self._order)):
            gfn = next(iter(self._order))
            if not stays(gfn):
                if gfn in self._spared or not spare(gfn):
                    return gfn
                self._spared.add(gfn)
            del self._order[gfn]
            self._order[gfn] = None
        return None


class Holder(Protocol):
    """A VM whose guest memory comes from a pool."""

    @property
    def n_resident(self) -> int:
        """Guest frames it has in machine frames."""
        ...

    def evict(self) -> bool:
        """Give one machine frame back to the pool; False if all have to stay."""
        ...


class FramePool:
    """Machine frames for guest memory: of one VM, or of the kernel for all of its VMs.

    Invariant: a free frame belongs to nobody.

    Attributes:
        holders: The VMs that take from it, by number.
        owner: By frame, the number of the VM that has it, or -1; None: nobody asks.
    """

    def __init__(self, frames: Sequence[int], owner: npt.NDArray[np.int16] | None = None) -> None:
        self._free = list(frames)
        self.owner = owner
        self.holders: dict[int, Holder] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, vm: int) -> int:
        """Return a frame for a VM; if none is free the VM that holds most has to give one.

        Its content is whatever was there.

        Raises:
            HostMemoryShortError: All have to stay where they are.
        """
        if not self._free:
            by_size = sorted(self.holders.items(), key=lambda item: (-item[1].n_resident, item[0]))
            if not any(holder.evict() for _, holder in by_size):
                raise HostMemoryShortError
        pfn = self._free.pop()
        if self.owner is not None:
            self.owner[pfn] = vm
        return pfn

    def give(self, pfn: int) -> None:
        """Take a frame back that nothing maps any more."""
        self._free.append(pfn)
        if self.owner is not None:
            self.owner[pfn] = -1

    def check(self) -> None:
        assert len(set(self._free)) == len(self._free)
        if self.owner is not None:
            assert all(self.owner[pfn] == -1 for pfn in self._free)
