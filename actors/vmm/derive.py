"""What a shadow entry is, given a guest entry: the one place that says it.

A shadow leaf has at most the guest's rights. It is writable only if the guest entry is writable
*and* dirty, so that the first write exits and D can be set (VTLB's emulation of D), and only if its
frame lies in a machine frame of its own. What becomes of an entry that maps a traced table is for
the detection policy to say: read-only, or marked. A guest entry with A=0 derives nothing: A is set
when a translation is loaded, by the fill. Nor does one whose frame is in no machine frame: the fill
brings it; nor one that maps a device: every access to it exits.

Source: A40 Fig. 7, Fig. 8 steps 810-814; VTLB for A and D.
"""

from __future__ import annotations

from typing import Protocol

from penumbra.actors.vmm.memory import ABSENT, UNBACKED, MemoryManagement
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.formats import CR4_PGE, EFER_NXE, NX, PAGE_SHIFT, A, D, FormatSpec, G, P, U, W

# A frame no machine of ours has: reads there return all ones, stores vanish.
NOWHERE = 0xFFFFF


class Guard(Protocol):
    """What keeps stores to traced frames from going unnoticed."""

    def guard(self, value: int, entry: int, gfn: int) -> int:
        """Return the shadow leaf `value`, derived from guest leaf `entry`, as `gfn` needs it."""
        ...


def link_rights(spec: FormatSpec, entry: int) -> int:
    """Return the rights bits an upper shadow entry mirrors from its guest entry."""
    return entry & (W | U | (NX if spec.has_nx else 0))


def derive_leaf(
    spec: FormatSpec,
    entry: int,
    target: int,
    memory: MemoryManagement,
    traces: Guard,
    registers: GuestRegisters,
) -> int:
    """Derive the shadow leaf of a guest leaf entry that maps guest frame `target`; 0 is nothing.

    Args:
        entry: The guest leaf, present or not, of any size.
    """
    if not entry & P or not entry & A:
        return 0
    if entry & NX and (not spec.has_nx or not registers.efer & EFER_NXE):
        return 0
    if entry & spec.levels[0].reserved or memory.is_device(target):
        return 0
    pfn = memory.frame_view[target] if target < memory.n_guest_frames else NOWHERE
    if pfn == ABSENT:
        return 0
    if pfn == UNBACKED:
        pfn = NOWHERE
    value = (pfn << PAGE_SHIFT) | P | A | D | link_rights(spec, entry)
    if not entry & D or not memory.ready(target, True):
        value &= ~W
    value = traces.guard(value, entry, target)
    if entry & G and registers.cr4 & CR4_PGE:
        value |= G
    return value
