"""The memory of a litmus test: as little of it as the test can reach.

Every dword of a table frame that the test does not name is 0; every other aligned dword at p
contains p. A table frame is one that holds an entry, at the start or by a store, or is a root.
A test reaches the frames its entries, registers and stored values name, as tables, small pages or
large ones; no other frame is given RAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from penumbra.guest.litmus.format import (
    LitmusTest,
    MovCr0,
    MovCr3,
    Read,
    SetEntry,
    Write,
    XchgEntry,
)
from penumbra.hw.formats import CR0_PG, IA32, PAGE_BYTES, PAGE_SHIFT, PS

_LARGE_SHIFT = IA32.levels[1].shift
_INSIDE = (1 << _LARGE_SHIFT) - 1


@dataclass(frozen=True)
class MemoryImage:
    """What is in memory at the start.

    Invariant: `frames` is ascending and every frame holds PAGE_BYTES.
    """

    frames: Mapping[int, bytes]

    @property
    def n_frames(self) -> int:
        return max(self.frames) + 1

    def check(self) -> None:
        assert list(self.frames) == sorted(self.frames)
        assert all(len(data) == PAGE_BYTES for data in self.frames.values())


def image_of(test: LitmusTest) -> MemoryImage:
    """Compute a test's memory."""
    tables = set(_table_frames(test))
    frames = {}
    for gfn in sorted(tables | set(_frames_reached(test))):
        first = gfn << PAGE_SHIFT
        words = np.arange(first, first + PAGE_BYTES, 4).astype(np.uint32)
        if gfn in tables:
            words[:] = 0
        for entry in test.init.entries:
            if entry.pa >> PAGE_SHIFT == gfn:
                words[(entry.pa & (PAGE_BYTES - 1)) >> 2] = int(entry.val)
        frames[gfn] = words.tobytes()
    return MemoryImage(frames)


def _table_frames(test: LitmusTest) -> Iterator[int]:
    for start in test.init.cpus:
        yield start.cr3 >> PAGE_SHIFT
    for entry in test.init.entries:
        yield entry.pa >> PAGE_SHIFT
    for program in test.programs:
        for operation in program:
            if isinstance(operation, SetEntry | XchgEntry):
                yield operation.pa >> PAGE_SHIFT
            elif isinstance(operation, MovCr3):
                yield operation.val >> PAGE_SHIFT


def _frames_reached(test: LitmusTest) -> Iterator[int]:
    """Yield every frame that some word of the test may map, as far as its accesses go."""
    words = {int(entry.val) for entry in test.init.entries}
    insides = {0}
    steps = [step for program in test.programs for step in program]
    for step in steps:
        if isinstance(step, SetEntry | XchgEntry | Write):
            words.add(int(step.val))
        if isinstance(step, Read | Write):
            insides |= {step.la & _INSIDE, step.la + 3 & _INSIDE}
    for word in words:
        yield word >> PAGE_SHIFT
        if word & PS:
            base = word >> _LARGE_SHIFT << _LARGE_SHIFT
            yield from ((base | inside) >> PAGE_SHIFT for inside in insides)
    if any(isinstance(step, MovCr0) and not step.val & CR0_PG for step in steps):
        accesses = [step for step in steps if isinstance(step, Read | Write)]
        yield from (step.la + byte >> PAGE_SHIFT for step in accesses for byte in (0, 3))
