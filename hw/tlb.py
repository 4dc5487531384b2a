"""Geometry and storage of a TLB with its paging-structure cache.

Finite, set-associative, least recently used (A40 ¶14, ¶19). Entries carry an address-space tag, so
that sibling CPUs may share one (A40 Fig. 4): the tag of a private entry is the frame of the
root it was loaded under, that of a global entry belongs to the logical CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penumbra.hw import mmu_layout as k
from penumbra.hw.formats import FormatSpec


@dataclass(frozen=True)
class TlbGeometry:
    """Size of a TLB.

    Attributes:
        entries: Number of entries; a power of two times `ways`.
        ways: Entries per set.
        psc_slots: Paging-structure-cache entries per upper level (direct-mapped; 0 or 2**n).
    """

    entries: int = 512
    ways: int = 8
    psc_slots: int = 16

    def __post_init__(self) -> None:
        sets, rest = divmod(self.entries, self.ways) if self.ways > 0 else (0, 1)
        if rest or sets < 1 or sets & (sets - 1):
            raise ValueError(
                f"TLB of {self.entries} entries in {self.ways} ways: sets must be 2**n"
            )
        if self.psc_slots < 0 or self.psc_slots & (self.psc_slots - 1):
            raise ValueError(f"paging-structure cache of {self.psc_slots} slots: must be 0 or 2**n")


class Tlb:
    """Storage of one TLB: an int64 array laid out as `mmu_layout` says, and its memoryview."""

    def __init__(self, spec: FormatSpec, geometry: TlbGeometry) -> None:
        self.geometry = geometry
        n = geometry.entries
        psc_base = k.TLB_TAGS + 2 * n
        self.array = np.full(psc_base + spec.top * 2 * geometry.psc_slots, -1, np.int64)
        self.view = self.array.data
        self.view[k.TLB_SET_MASK] = n // geometry.ways - 1
        self.view[k.TLB_WAYS] = geometry.ways
        self.view[k.TLB_N] = n
        self.view[k.TLB_LARGE] = self.view[k.TLB_PIECES] = 0
        self.view[k.TLB_PSC] = geometry.psc_slots
        self.view[k.TLB_PSC_BASE] = psc_base

    def drop(self, page: int | None, asid: int | None, shifts: Sequence[int]) -> None:
        """Drop leaves by page number and address space; upper-level entries unless a page is given.

        Args:
            page: A 4 KiB page's number, or None for all.
            asid: An address space's tag, whose global entries stay, or None for all.
            shifts: For each level, how many bits of a page number lie inside its pages.
        """
        n, ways = self.geometry.entries, self.geometry.ways
        for at in range(k.TLB_TAGS, k.TLB_TAGS + n):
            key = self.view[at]
            inside = key >> k.LEVEL_SHIFT
            tag = key >> k.TAG_SHIFT & ((1 << (k.LEVEL_SHIFT - k.TAG_SHIFT)) - 1)
            if key == -1 or (asid is not None and tag != asid):
                continue
            if page is None or key & k.VPN_MASK == page >> shifts[inside]:
                self.view[at], self.view[at + n] = -1, -1
        if page is None:
            base = self.view[k.TLB_PSC_BASE]
            keys = self.array[base:].reshape(-1, 2, max(1, self.geometry.psc_slots))[:, 0]
            tags = keys >> k.TAG_SHIFT & ((1 << (k.LEVEL_SHIFT - k.TAG_SHIFT)) - 1)
            keys[(tags == asid) if asid is not None else slice(None)] = -1
        self._close_ranks(n, ways)

    def _close_ranks(self, n: int, ways: int) -> None:
        """Move live entries to the front of their sets, in order, and count the large ones."""
        tags = self.array[k.TLB_TAGS : k.TLB_TAGS + n].reshape(-1, ways)
        values = self.array[k.TLB_TAGS + n : k.TLB_TAGS + 2 * n].reshape(-1, ways)
        order = np.argsort(tags == -1, axis=1, kind="stable")
        tags[:] = np.take_along_axis(tags, order, axis=1)
        values[:] = np.take_along_axis(values, order, axis=1)
        self.view[k.TLB_LARGE] = int(np.count_nonzero(tags >> k.LEVEL_SHIFT > 0))

    def entries(self) -> dict[int, int]:
        """Return every live entry: key (page, tag, level) to value (frame, rights)."""
        n = self.geometry.entries
        tags, values = self.array[k.TLB_TAGS : k.TLB_TAGS + n], self.array[k.TLB_TAGS + n :]
        return {int(tags[i]): int(values[i]) for i in range(n) if tags[i] != -1}

    def check(self) -> None:
        """Assert that no key stands twice and every key is in its set."""
        n, ways = self.geometry.entries, self.geometry.ways
        tags = [int(t) for t in self.array[k.TLB_TAGS : k.TLB_TAGS + n]]
        live = [t for t in tags if t != -1]
        assert len(live) == len(set(live))
        for at, tag in enumerate(tags):
            assert tag == -1 or (tag & k.VPN_MASK) % (n // ways) == at // ways
        assert int(self.array[k.TLB_LARGE]) == sum(t >> k.LEVEL_SHIFT > 0 for t in live)
