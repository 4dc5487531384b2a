"""Geometry and storage of a TLB with its paging-structure cache.

Finite, set-associative, least recently used (A40 ¶14, ¶19). Entries carry an address-space tag, so
that sibling CPUs may share one (A40 Fig. 4): the tag of a private entry is the frame of the
root it was loaded under, that of a global entry belongs to the logical CPU.
"""

from __future__ import annotations

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
        self.view[k.TLB_LARGE] = 0
        self.view[k.TLB_PSC] = geometry.psc_slots
        self.view[k.TLB_PSC_BASE] = psc_base

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
