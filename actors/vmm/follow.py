"""How one VCPU's shadow follows what was drained from its channels: Fig. 12, steps 872-876.

An upper entry that has changed is unlinked; a leaf is updated by the patch's derived value while
that is valid, else derived again, or invalidated, as the scheme says.

Source: A40 Fig. 12; A40c 49-51.
"""

from __future__ import annotations

from penumbra.actors.core import Drained, Patch
from penumbra.actors.vmm.derive import derive_leaf, link_rights
from penumbra.actors.vmm.parts import Parts
from penumbra.actors.vmm.shadow import FLUSH_ALL, NO_FRAGMENT, ShadowPage
from penumbra.hw.formats import PAGE_SHIFT, PS, A, P


class Follower:
    """Applies patches to one VCPU's shadow."""

    def __init__(self, parts: Parts) -> None:
        self._shared = parts.shared
        self._vcpu_id = parts.vcpu_id
        self._space = parts.space
        self._registers = parts.registers
        self._spec = parts.shared.spec
        self._memory = parts.shared.memory
        self._traces = parts.shared.traces
        self._n_applied = 0

    def follow(self, drained: Drained) -> None:
        """Make the shadow follow what was drained (872-876)."""
        if drained.drop_all:
            self.drop_shadows()
        for patch in drained.patches:
            self._apply(patch)
        self._shared.propagation.settle(self._vcpu_id)

    def drop_shadows(self) -> None:
        """Empty every shadow page and keep only roots, which CPUs point at."""
        roots = self._space.roots()
        for page in self._space.all_pages():
            for index in [*page.live, *page.children]:
                self._space.clear(page, index)
        for page in self._space.all_pages():
            if page not in roots:
                self._space.drop(page)
        self._space.flushes.append(FLUSH_ALL)

    def take_applied(self) -> int:
        """Return how many patches were applied since the last call."""
        n, self._n_applied = self._n_applied, 0
        return n

    def _apply(self, patch: Patch) -> None:
        """Bring this VCPU's entries for one patch up to date (872-876)."""
        gfn, index = patch.base >> PAGE_SHIFT, patch.offset // self._spec.entry_bytes
        current = self._memory.load(patch.base | patch.offset, self._spec.entry_bytes)
        self._n_applied += 1
        for page in self._space.of_table(gfn):
            if page.role[2] != NO_FRAGMENT:
                continue
            if index in page.children:
                self._apply_upper(page, index, current)
            elif index in page.live:
                self._apply_leaf(page, index, current, patch)

    def _apply_upper(self, page: ShadowPage, index: int, entry: int) -> None:
        child = page.children[index]
        same = (
            entry & P
            and entry & A
            and not entry & PS
            and child.role[2] == NO_FRAGMENT
            and (entry & self._spec.frame_mask) >> PAGE_SHIFT == child.role[0]
            and self._links_same(page, index, entry)
        )
        if not same:
            self._space.clear(page, index)

    def _links_same(self, page: ShadowPage, index: int, entry: int) -> bool:
        mask = link_rights(self._spec, ~0)
        return self._space.entry(page, index) & mask == link_rights(self._spec, entry)

    def _apply_leaf(self, page: ShadowPage, index: int, entry: int, patch: Patch) -> None:
        value = 0
        target = (entry & self._spec.frame_mask) >> PAGE_SHIFT
        if self._shared.scheme.apply == "update":
            mask = ((1 << 64) - 1) & ~A
            if self._shared.propagation.usable(self._vcpu_id, patch, entry, mask):
                value = patch.derived or 0
                guests = self._memory.guests((value & self._spec.frame_mask) >> PAGE_SHIFT)
                if value and guests and target not in guests:
                    target = guests[0]
            elif self._shared.scheme.options.stale == "derive":
                value = derive_leaf(
                    self._spec, entry, target, self._memory, self._traces, self._registers
                )
        if value:
            self._space.set_leaf(page, index, value, target)
        else:
            self._space.clear(page, index)
