"""Page frames of the guest: user frames with reference counts, and the page-table pool."""

from __future__ import annotations

from collections.abc import Callable

from penumbra.guest.threads import KernelPanic


class OutOfMemory(Exception):
    """No frame is left; the text names what ran out. The process that asked for it is killed."""


class OutOfFrames(OutOfMemory):
    """No user frame is left; replacement may still make room."""


class Frames:
    """User frames.

    The frame freed last is handed out first, so that a translation which should have been flushed
    meets foreign data soon.

    Invariant: a frame is either free with no reference or taken with at least one.

    Attributes:
        device_gfn: A frame that is no RAM: taken at any time, and never counted; -1: there is none.
    """

    def __init__(self, first_gfn: int, n_frames: int) -> None:
        self.first_gfn = first_gfn
        self.n_frames = n_frames
        self._refs = [0] * n_frames
        self._free = list(range(first_gfn + n_frames - 1, first_gfn - 1, -1))
        self.reclaim: Callable[[], bool] = lambda: False
        self.freed: Callable[[int], None] = lambda _: None
        self.device_gfn = -1

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Return a free frame, now with one reference.

        Raises:
            OutOfFrames: Nothing is free and nothing could be reclaimed.
        """
        if not self._free and not self.reclaim():
            raise OutOfFrames("out of memory")
        gfn = self._free.pop()
        self._refs[gfn - self.first_gfn] = 1
        return gfn

    def take_run(self, n: int) -> int:
        """Return the first of `n` adjacent free frames, aligned to `n`, with one reference each.

        From the top: single frames are handed out from the bottom, so runs stay whole longest.

        Raises:
            OutOfFrames: There is no such run, and nothing could be reclaimed that makes one.
        """
        first = self._find_run(n)
        if first is None and self.reclaim():
            first = self._find_run(n)
        if first is None:
            raise OutOfFrames(f"out of memory: no {n} adjacent frames")
        self._free = [gfn for gfn in self._free if not first <= gfn < first + n]
        start = first - self.first_gfn
        self._refs[start : start + n] = [1] * n
        return first

    def _find_run(self, n: int) -> int | None:
        end = self.first_gfn + self.n_frames
        for first in range(end // n * n - n, self.first_gfn - 1, -n):
            start = first - self.first_gfn
            if not any(self._refs[start : start + n]):
                return first
        return None

    def share(self, gfn: int) -> None:
        """Add a reference to a taken frame."""
        if gfn != self.device_gfn:
            self._refs[self._taken(gfn)] += 1

    def drop(self, gfn: int) -> None:
        """Give one reference back; with the last one the frame is free."""
        if gfn == self.device_gfn:
            return
        index = self._taken(gfn)
        self._refs[index] -= 1
        if not self._refs[index]:
            self._free.append(gfn)
            self.freed(gfn)

    def references(self, gfn: int) -> int:
        """Return the number of references to a frame; 0 if it is free or none of these."""
        index = gfn - self.first_gfn
        return self._refs[index] if 0 <= index < self.n_frames else 0

    def _taken(self, gfn: int) -> int:
        """Return the index of a taken frame.

        Raises:
            KernelPanic: It is not: the page table that names it holds garbage.
        """
        if not self.references(gfn):
            raise KernelPanic(f"a page table names frame {gfn:#x}, which the kernel has not given")
        return gfn - self.first_gfn

    def check(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free)
        for index, refs in enumerate(self._refs):
            assert (index + self.first_gfn in free) == (refs == 0)


class TablePool:
    """Frames for page tables, locks and mailboxes.

    Every frame handed out is full of zeros: RAM is at power-on, and whoever gives a frame back has
    cleared it entry by entry, as unmapping does.

    A promised frame is one that somebody may need where he cannot fail: to split a large page. It
    may be any frame, so none is set aside; only the last ones are kept from everybody else.

    Invariant: free frames are distinct and inside the pool, and no fewer than the promised.
    """

    def __init__(self, first_gfn: int, n_frames: int) -> None:
        self.first_gfn = first_gfn
        self.n_frames = n_frames
        self._free = list(range(first_gfn + n_frames - 1, first_gfn - 1, -1))
        self.n_promised = 0

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Return a zeroed frame.

        Raises:
            OutOfMemory: The pool is exhausted, but for the promised frames.
        """
        if len(self._free) <= self.n_promised:
            raise OutOfMemory("out of page-table memory")
        return self._free.pop()

    def promise(self) -> None:
        """Keep one frame for a `take_promised` that cannot fail.

        Raises:
            OutOfMemory: There is none left to promise.
        """
        if len(self._free) <= self.n_promised:
            raise OutOfMemory("out of page-table memory")
        self.n_promised += 1

    def take_promised(self) -> int:
        """Return the zeroed frame that a promise was for."""
        self.forget_promise()
        return self._free.pop()

    def forget_promise(self) -> None:
        """A promised frame is not needed any more."""
        assert self.n_promised > 0
        self.n_promised -= 1

    def drop(self, gfn: int) -> None:
        """Take back a frame that is full of zeros and that no CPU can still walk."""
        assert self.first_gfn <= gfn < self.first_gfn + self.n_frames
        self._free.append(gfn)

    def check(self) -> None:
        assert len(set(self._free)) == len(self._free) <= self.n_frames
        assert 0 <= self.n_promised <= len(self._free)
