"""Shadow leaves derived before they are missed: around a fill, and after INVLPG.

Only what the guest has used is taken: an entry with A clear derives nothing, so speculation never
sets A. Each entry is read after this VCPU, and whoever shares its shadow, is registered for it, as
in any fill.

Source: field notes 1.1 (Linux KVM: prefetch at a fill; prepopulation at INVLPG, ad218f85e388), 1.3.
"""

from __future__ import annotations

from penumbra.actors.vmm.derive import derive_leaf
from penumbra.actors.vmm.parts import Parts
from penumbra.actors.vmm.shadow import ShadowPage
from penumbra.hw.formats import PAGE_SHIFT


class Prefetch:
    """Takes leaves of one VCPU's shadow in advance, as far as the scheme's options say."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._options = parts.shared.scheme.options
        self._spec = parts.shared.spec

    def around(self, page: ShadowPage, index: int) -> None:
        """Take the missing leaves of the aligned group that a leaf just filled is of."""
        n = self._options.prefetch
        if n > 1:
            first = index - index % n
            for other in range(first, min(first + n, self._spec.levels[0].n_entries)):
                self._take(page, other)

    def after_invlpg(self, gva: int) -> None:
        """Take the leaf of an address that INVLPG has just brought up to date, if it is missing."""
        page = self._parts.leaf_page(gva) if self._options.prefetch_invlpg else None
        if page is not None:
            self._take(page, self._spec.levels[0].index(gva))

    def _take(self, page: ShadowPage, index: int) -> None:
        if index in page.live:
            return
        parts, spec = self._parts, self._spec
        shared, gfn = parts.shared, page.role[0]
        news = parts.register(gfn, index)
        width = spec.entry_bytes
        entry = shared.memory.load((gfn << PAGE_SHIFT) + index * width, width)
        target = (entry & spec.frame_mask) >> PAGE_SHIFT
        value = derive_leaf(spec, entry, target, shared.memory, shared.traces, parts.registers)
        if value:
            shared.unsync.note_fill(parts.vcpu_id, gfn)
            parts.space.set_leaf(page, index, value, target)
            parts.counts["prefetch"] += 1
        elif news:
            parts.forget(gfn, index)
