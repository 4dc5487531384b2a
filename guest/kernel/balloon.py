"""The balloon: user frames the kernel has no use for now, lent to whatever is below it.

It is filled and emptied by turns, as a guest is that other guests need memory from, at the ticks of
the first CPU: in `TICKS` ticks it takes what is free and releases it, in as many it takes all back.
Only free frames go in, and all of them come out when the kernel runs short.

Source: A40 ¶43 (the kernel's memory management takes back what a VM has).
"""

from __future__ import annotations

from penumbra.guest.kernel.frames import Frames
from penumbra.hw.formats import PAGE_SHIFT
from penumbra.hw.operations import ReleaseFrame

TICKS = 8


class Balloon:
    """The frames that are lent.

    Invariant: each is taken, with one reference, and mapped nowhere.

    Attributes:
        n_released: How often a frame was released.
    """

    def __init__(self, frames: Frames, n_frames: int) -> None:
        """Lend up to `n_frames` of these."""
        self.n_released = 0
        self._frames = frames
        self._n_frames = n_frames
        self._inside: list[int] = []
        self._n_ticks = 0

    def __len__(self) -> int:
        return len(self._inside)

    async def tick(self) -> None:
        """Fill or empty it by an eighth. Interrupts are disabled."""
        fills = self._n_ticks // TICKS % 2 == 0
        self._n_ticks += 1
        for _ in range(-(-self._n_frames // TICKS)):
            if not fills:
                self.give_back(1)
            elif len(self._inside) < self._n_frames and self._frames.n_free > 1:
                gfn = self._frames.take()
                self._inside.append(gfn)
                self.n_released += 1
                await ReleaseFrame(gfn << PAGE_SHIFT)

    def give_back(self, n: int) -> bool:
        """Let the kernel have frames again; False if there is none."""
        given = [self._inside.pop() for _ in range(min(n, len(self._inside)))]
        for gfn in given:
            self._frames.drop(gfn)
        return bool(given)

    def check(self) -> None:
        assert all(self._frames.references(gfn) == 1 for gfn in self._inside)
