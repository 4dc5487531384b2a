"""How one VCPU's shadow catches up with leaf tables that were written without an exit.

The comparison is with the guest table as it is now; there is no snapshot to keep equal to it. A
live entry is looked at again if it maps another frame or grants other rights than the guest's entry
does now: one vector expression per table, and a derivation for what differs.

Source: field notes 1.1 (`sync_page`), 1.3 (resynchronisation of one entry, of all).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from penumbra.actors.vmm.derive import derive_leaf
from penumbra.actors.vmm.parts import Parts
from penumbra.actors.vmm.shadow import NO_FRAGMENT, ShadowPage
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, A, D, G, P, U, W


class Resync:
    """Brings one VCPU's shadow of out-of-sync tables up to date."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._shared = parts.shared
        self._space = parts.space
        self._vcpu_id = parts.vcpu_id
        self._spec = parts.shared.spec
        self._memory = parts.shared.memory
        self._unsync = parts.shared.unsync
        # Bits a shadow leaf mirrors; the frame apart, W is compared as a right that may be less.
        self._mirrored = U | (1 << 63 if self._spec.has_nx else 0)

    def to_trace(self, root: ShadowPage | None) -> tuple[int, ...]:
        """Return the tables beneath a root whose traces have to be put back before `beneath`."""
        if root is None:
            return ()
        lifted = self._shared.traces.is_lifted
        return tuple(gfn for gfn in self._reached(root) if lifted(gfn))

    def beneath(self, root: ShadowPage) -> None:
        """Bring everything up to date that is behind and that a root reaches: a CR3 load."""
        self.tables(self._reached(root))

    def tables(self, gfns: list[int]) -> None:
        """Bring the shadow of whole guest tables up to date."""
        for gfn in gfns:
            if not self._unsync.is_behind(self._vcpu_id, gfn):
                continue
            pages = self._leaf_pages(gfn)
            for page in pages:
                self._page(page)
            self._parts.counts["resync"] += 1
            self._unsync.settle(self._vcpu_id, gfn, shadowed=bool(self._space.of_table(gfn)))

    def address(self, gva: int) -> None:
        """Bring the one leaf up to date that translates an address: INVLPG, a delivered fault."""
        page = self._parts.leaf_page(gva)
        if page is None or not self._unsync.is_behind(self._vcpu_id, page.role[0]):
            return
        index = self._spec.levels[0].index(gva)
        if index in page.live:
            self._parts.counts["resync_entry"] += 1
            self._entry(page, index)

    def _reached(self, root: ShadowPage) -> list[int]:
        """Return the tables that are behind and hang below a root; forget those without shadow."""
        found = []
        for gfn in self._unsync.behind(self._vcpu_id):
            pages = self._leaf_pages(gfn)
            if any(_hangs_below(page, root) for page in pages):
                found.append(gfn)
            elif not pages:
                self._unsync.settle(self._vcpu_id, gfn, shadowed=False)
        return found

    def _leaf_pages(self, gfn: int) -> list[ShadowPage]:
        pages = self._space.of_table(gfn)
        return [page for page in pages if page.level == 0 and page.role[2] == NO_FRAGMENT]

    def _page(self, page: ShadowPage) -> None:
        for index in self._suspects(page):
            self._parts.counts["resync_entry"] += 1
            self._entry(page, index)

    def _suspects(self, page: ShadowPage) -> list[int]:
        """Return the live entries that are not what the guest's entry would give now."""
        spec, n = self._spec, len(page.live)
        indexes = np.fromiter(page.live, np.intp, n)
        mapped = np.fromiter(page.live.values(), np.int64, n)
        guest = self._words(page.role[0])[indexes]
        shadow = self._space.entries(page)[indexes].view(guest.dtype)
        same = (guest & (P | A) == P | A) & (shadow & ~guest & G == 0)
        frames = (guest & np.asarray(spec.frame_mask, guest.dtype)) >> np.asarray(12, guest.dtype)
        same &= frames.astype(np.int64) == mapped
        same &= (guest ^ shadow) & np.asarray(self._mirrored, guest.dtype) == 0
        same &= (shadow & W == 0) | (guest & (W | D) == W | D)
        same &= guest & np.asarray(spec.levels[0].reserved, guest.dtype) == 0
        return [int(index) for index in indexes[~same]]

    def _words(self, gfn: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return a guest table's entries; all ones where no memory is."""
        dtype = np.uint64 if self._spec.entry_bytes == 8 else np.uint32
        n = PAGE_BYTES // self._spec.entry_bytes
        hpa = self._memory.hpa(gfn << PAGE_SHIFT)
        if hpa is None:
            return np.full(n, -1).astype(dtype)
        return np.frombuffer(self._memory.ram.bytes, dtype, n, hpa)

    def _entry(self, page: ShadowPage, index: int) -> None:
        """Make one live leaf what the guest's entry gives now, or nothing, as the scheme says."""
        spec, value, target = self._spec, 0, 0
        if self._shared.scheme.apply == "update":
            width = spec.entry_bytes
            entry = self._memory.load((page.role[0] << PAGE_SHIFT) + index * width, width)
            target = (entry & spec.frame_mask) >> PAGE_SHIFT
            traces, registers = self._shared.traces, self._parts.registers
            value = derive_leaf(spec, entry, target, self._memory, traces, registers)
        if value:
            self._space.set_leaf(page, index, value, target)
        else:
            self._space.clear(page, index)


def _hangs_below(page: ShadowPage, root: ShadowPage) -> bool:
    """Tell whether a root's tree holds a page."""
    seen, todo = {page}, [page]
    while todo:
        if root in seen:
            return True
        above = {parent for parent, _ in todo.pop().parents} - seen
        seen |= above
        todo += above
    return root in seen
