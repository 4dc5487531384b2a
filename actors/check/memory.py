"""Verdicts remembered: what the present tables allow, densely for access blocks.

Only what a walk of the present tables explains, A and D included, is remembered; it stays right
through every flush and until one of its entries changes, because adding to caches what the tables
say is always legal. Each cell is registered with the entries it rests on (`Table.dependents`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from .paging import Mode

UNKNOWN = -(1 << 63)  # no frame's number, and not what a machine says for "no frame" either
_Ints = npt.NDArray[np.int64]


class Stream(Protocol):
    """An access stream: `pages` int64 page numbers, `runs` int64 packed (see `decode`)."""

    @property
    def pages(self) -> _Ints:
        """Guest-virtual page numbers."""
        ...

    @property
    def runs(self) -> _Ints:
        """Runs: kind in bits 0-1, count in bits 14-39, index into `pages` from bit 40."""
        ...


def cells_of(runs: _Ints) -> _Ints:
    """Return the cell, page index * 4 + kind, of each run."""
    cells: _Ints = (runs >> 38) & -4 | runs & 3
    return cells


def n_references(runs: _Ints) -> int:
    """Return how many references the runs stand for."""
    return int((runs >> 14 & ((1 << 26) - 1)).sum())


class Block:
    """For the user-mode runs of one stream under one root: the machine frame of each cell."""

    def __init__(self, pages: _Ints) -> None:
        self.pages = pages
        self.frames: _Ints = np.full(4 * len(pages), UNKNOWN, np.int64)

    def known(self) -> list[tuple[int, int, int]]:
        """Return page number, kind and frame of each cell that is known."""
        cells = np.flatnonzero(self.frames != UNKNOWN).tolist()
        return [(int(self.pages[cell >> 2]), cell & 3, int(self.frames[cell])) for cell in cells]

    def forget(self, cell: int) -> None:
        """Make a page unknown; `cell` is its index."""
        self.frames[4 * cell : 4 * cell + 4] = UNKNOWN

    def forget_frame(self, pfn: int) -> None:
        """Make unknown what was answered by a machine frame."""
        self.frames[self.frames == pfn] = UNKNOWN


class Notes:
    """For single accesses under one root, mode and CR0.WP: the machine frame of each cell.

    Attributes:
        kernel_only: Cells of supervisor writes to pages that no user may use.
    """

    def __init__(self) -> None:
        self.frames: dict[int, int] = {}
        self.kernel_only: set[int] = set()

    def forget(self, cell: int) -> None:
        """Make a cell unknown."""
        self.frames.pop(cell, None)
        self.kernel_only.discard(cell)

    def forget_frame(self, pfn: int) -> None:
        """Make unknown what was answered by a machine frame."""
        for cell in [cell for cell, frame in self.frames.items() if frame == pfn]:
            del self.frames[cell]


class Memory:
    """All that is remembered, by root."""

    def __init__(self) -> None:
        self._blocks: dict[int | None, dict[tuple[int, Mode], Block]] = {}
        self._notes: dict[int | None, dict[tuple[bool, Mode], Notes]] = {}

    def block(self, root: int | None, mode: Mode, stream_id: int, stream: Stream) -> Block:
        """Return the memory for a stream under a root."""
        blocks = self._blocks.setdefault(root, {})
        found = blocks.get((stream_id, mode))
        if found is None:
            found = blocks[stream_id, mode] = Block(stream.pages)
        return found

    def notes(self, root: int | None, mode: Mode, write_protected: bool) -> Notes:
        """Return the memory for single accesses under a root."""
        return self._notes.setdefault(root, {}).setdefault((write_protected, mode), Notes())

    def forget_root(self, root: int) -> None:
        """Drop all that was remembered under a root."""
        self._blocks.pop(root, None)
        self._notes.pop(root, None)

    def forget_frame(self, pfn: int) -> None:
        """Make unknown what was answered by a machine frame."""
        for blocks in self._blocks.values():
            for block in blocks.values():
                block.forget_frame(pfn)
        for by_mode in self._notes.values():
            for notes in by_mode.values():
                notes.forget_frame(pfn)
