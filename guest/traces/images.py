"""The address spaces behind a recording: initial images, and how much can be resident.

Both follow from the streams and calls, so neither is stored in a file: `with_images` derives them
whenever a recording is made or read.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from penumbra.guest.traces.recording import (
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    Call,
    RecordedProcess,
    Recording,
    Region,
)
from penumbra.hw.streams import FETCH, PAGE_SHIFT, READ, WRITE

_MREMAP_DONTUNMAP = 4
_PROT = np.zeros(3, np.uint8)
_PROT[READ], _PROT[WRITE], _PROT[FETCH] = PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC


class PageSet:
    """A set of page numbers as disjoint ranges.

    Invariant: `bounds` is strictly ascending and of even length; pages from an even-numbered bound
    up to the next one are in the set.
    """

    def __init__(self, bounds: Iterable[int] = ()) -> None:
        self.bounds = list(bounds)

    def copy(self) -> PageSet:
        return PageSet(self.bounds)

    def add(self, first: int, end: int) -> None:
        self._replace(first, end, inside=True)

    def remove(self, first: int, end: int) -> None:
        self._replace(first, end, inside=False)

    def holds(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Say of each page whether it is in the set."""
        n_bounds_up_to = np.searchsorted(np.array(self.bounds, np.int64), pages, side="right")
        return np.equal(n_bounds_up_to % 2, 1)

    def check(self) -> None:
        assert len(self.bounds) % 2 == 0
        assert all(a < b for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    def _replace(self, first: int, end: int, inside: bool) -> None:
        if first >= end:
            return
        low, high = bisect_left(self.bounds, first), bisect_right(self.bounds, end)
        left = [first] if (low % 2 == 1) != inside else []
        right = [end] if (high % 2 == 1) != inside else []
        self.bounds[low:high] = left + right


class AddressSpace:
    """What is mapped in one process: by mmap and its kin, and by the break."""

    def __init__(self) -> None:
        self.mapped = PageSet()
        self._break: tuple[int, int] | None = None  # base and present break, in pages

    def copy(self) -> AddressSpace:
        twin = AddressSpace()
        twin.mapped, twin._break = self.mapped.copy(), self._break
        return twin

    def apply(self, call: Call) -> None:
        """Follow one successful call; calls that change no mapping do nothing."""
        args = [value >> 12 for value in call.args]
        match call.name:
            case "mmap":
                self.mapped.add(call.result >> 12, (call.result >> 12) + args[1])
            case "munmap":
                self.mapped.remove(args[0], args[0] + args[1])
            case "mremap":
                if not call.args[3] & _MREMAP_DONTUNMAP:
                    self.mapped.remove(args[0], args[0] + args[1])
                self.mapped.add(call.result >> 12, (call.result >> 12) + args[2])
            case "brk":
                self._move_break((call.result + 0xFFF) >> 12)
            case "exec":
                self.mapped, self._break = PageSet(), None
            case _:
                pass

    def _move_break(self, end: int) -> None:
        base, old = self._break or (end, end)
        self._break = (min(base, end), end)
        if end > old:
            self.mapped.add(old, end)
        else:
            self.mapped.remove(end, old)


def with_images(processes: Iterable[RecordedProcess], bits: int, provenance: str) -> Recording:
    """Make a recording, deriving its processes' images and the bound of resident pages.

    The recording without them must satisfy `Recording.problem`.
    """
    known = tuple(processes)
    spaces: dict[int, AddressSpace] = {}
    touched: list[dict[int, int]] = []
    for process in known:
        space = AddressSpace() if process.starts_at_exec else spaces.pop(process.index)
        touched.append(_touched_outside(process, space, spaces))
    for process in reversed(known):
        if not process.starts_at_exec:
            above = touched[process.parent]
            for page, prot in touched[process.index].items():
                above[page] = above.get(page, 0) | prot
    imaged = tuple(replace(process, image=_regions(touched[process.index])) for process in known)
    return Recording(imaged, bits, provenance, _peak_pages(imaged))


def _touched_outside(
    process: RecordedProcess, space: AddressSpace, spaces: dict[int, AddressSpace]
) -> dict[int, int]:
    """Find the rights with which pages are touched while nothing is mapped there.

    Leaves in `spaces` the address space that each child inherits.
    """
    kinds = process.stream.runs & 3
    pages = process.stream.runs >> PAGE_SHIFT
    prot = np.zeros(len(process.stream.pages), np.uint8)
    done = 0

    def touch(end: int) -> None:
        nonlocal done
        for kind in (READ, WRITE, FETCH):
            used = np.zeros(len(prot), bool)
            used[pages[done:end][kinds[done:end] == kind]] = True
            vpns = np.flatnonzero(used)
            prot[vpns[~space.mapped.holds(process.stream.pages[vpns])]] |= _PROT[kind]
        done = end

    for call in process.calls:
        if call.name in ("mmap", "munmap", "mremap", "brk", "exec"):
            touch(call.at)
            space.apply(call)
        elif call.name == "fork":
            spaces[call.args[0]] = space.copy()
    touch(len(kinds))
    outside = np.flatnonzero(prot)
    return dict(zip(process.stream.pages[outside].tolist(), prot[outside].tolist(), strict=True))


def _regions(pages: dict[int, int]) -> tuple[Region, ...]:
    regions: list[Region] = []
    for vpn, prot in sorted(pages.items()):
        last = regions[-1] if regions else None
        if last and last.first_vpn + last.n_pages == vpn and last.prot == prot:
            regions[-1] = replace(last, n_pages=last.n_pages + 1)
        else:
            regions.append(Region(vpn, 1, prot))
    return tuple(regions)


def _peak_pages(processes: tuple[RecordedProcess, ...]) -> int:
    """Bound the pages resident at once.

    A process holds at most the pages it touches and, when it started as a copy, those its parent
    held. Every child forked and not yet waited for may be at its own peak; of a child waited for
    only its own unwaited children can be left.
    """
    held: list[npt.NDArray[np.int64]] = []
    for process in processes:
        own = process.stream.pages
        held.append(own if process.starts_at_exec else np.union1d(own, held[process.parent]))
    peaks, left = [0] * len(processes), [0] * len(processes)
    for process in reversed(processes):
        alive = peak = 0
        for call in process.calls:
            if call.name == "fork":
                alive += peaks[call.args[0]]
                peak = max(peak, alive)
            elif call.name == "wait" and call.args[0] >= 0:
                alive -= peaks[call.args[0]] - left[call.args[0]]
        peaks[process.index] = len(held[process.index]) + peak
        left[process.index] = alive
    return peaks[0] if processes else 0
