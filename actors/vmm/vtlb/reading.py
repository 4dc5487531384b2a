"""Reading the guest's tables for a fault: the walk from the guest's CR3, and what it permits.

The walk is the whole question of boxes 710 and 832, rights of all levels together. The text asks
level by level, which lets an active entry's stale rights, and even a dead guest entry, decide
(ET1, ET2, ET6), or asks for P alone (ET4); those forms read here what they would have seen.

Source: VTLB Figs 7A-7D, boxes 710, 832; SDM vol. 3, 4.6, 4.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import Hierarchy
from penumbra.actors.vmm.walk import GuestWalker, Step
from penumbra.hw.formats import (
    CR4_PSE,
    PAGE_SHIFT,
    PF_I,
    PF_P,
    PF_RSVD,
    PF_U,
    PF_W,
    A,
    D,
    P,
    U,
    W,
)
from penumbra.hw.streams import FETCH, WRITE

IDENTITY = P | W | U | A | D  # with CR0.PG clear every address maps itself
NO_ENTRY = -1  # address of an entry there is not
_STALE = (("ET1", W), ("ET2", P), ("ET6", U))


@dataclass(frozen=True)
class Reading:
    """What a walk of the guest's tables said.

    Attributes:
        steps: The entries read, from the root down; the last one maps the page if `error` is None.
        gfn: Guest frame the address maps to, -1 if to none.
        error: Error code of the fault the guest has to see, or None.
        denied: Error code by the rights of all levels; differs from `error` under ET4 alone.
        unready: A guest table of the path that cannot be read and stored to where it lies now;
            then nothing else of this says anything.
    """

    steps: Sequence[Step]
    gfn: int
    error: int | None = None
    denied: int | None = None
    unready: int | None = None


class GuestReader:
    """Walks one VCPU's guest tables."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._walker = GuestWalker(state.spec, state.memory)
        self._as_printed = any(state.printed(name) for name in ("ET1", "ET2", "ET4", "ET6"))

    def read(self, examined: Hierarchy, gva: int, kind: int, user: bool) -> Reading:
        """Walk for an access; `examined` is the hierarchy of its privilege."""
        if not self._state.mode.paging:
            return self._identity(gva)
        registers = self._state.registers
        if self._state.printed("ET12"):
            registers = replace(registers, cr4=registers.cr4 | CR4_PSE)
        walker = self._walker
        permitted = walker.resolve(registers, gva, kind, user)
        unready = walker.unready()
        if unready is not None:
            return Reading([], -1, unready=unready)
        if not self._as_printed:
            if not permitted:
                return Reading([], -1, walker.error, walker.error)
            return Reading(walker.steps(), walker.frame(gva))
        denied = None if permitted else walker.error
        if denied is not None and denied & PF_RSVD:
            return Reading([], -1, denied, denied)
        return self._read_as_printed(examined, gva, kind, user, denied)

    def _identity(self, gva: int) -> Reading:
        gfn = gva >> PAGE_SHIFT
        n_bytes, top = self._state.spec.entry_bytes, self._state.spec.top
        entries = [IDENTITY] * top + [(gfn << PAGE_SHIFT) | IDENTITY]
        steps = [
            Step.at(top - depth, NO_ENTRY, entry, n_bytes) for depth, entry in enumerate(entries)
        ]
        return Reading(steps, gfn)

    def _read_as_printed(
        self, examined: Hierarchy, gva: int, kind: int, user: bool, denied: int | None
    ) -> Reading:
        """Walk with what active upper entries still say in place of what the guest's say now."""
        state, spec = self._state, self._state.spec
        stale = [table.origin[index] for table, index in examined.path(gva)]
        wanted = (U if user else 0) | (W if kind == WRITE and (user or state.mode.wp) else 0)
        code = (PF_W if kind == WRITE else 0) | (PF_U if user else 0)
        code |= PF_I if kind == FETCH and state.mode.nxe and spec.has_nx else 0
        steps: list[Step] = []
        base, refused = state.root_gfn() << PAGE_SHIFT, False
        for depth, level in enumerate(range(spec.top, -1, -1)):
            index, held = spec.levels[level].index(gva), state.entries.in_registers(level)
            gpa = NO_ENTRY if held else base + index * spec.entry_bytes
            entry = state.registers.top[index] if held else state.memory.load(gpa, spec.entry_bytes)
            if level and depth < len(stale):
                entry = self._seen(entry, stale[depth])
            steps.append(Step.at(level, gpa, entry, spec.entry_bytes))
            if not entry & P:
                return Reading(steps, -1, code, code)
            refused |= bool(wanted & ~entry) and not held
            if level == 0 or state.entries.is_large(entry, level, state.mode):
                break
            base = entry & spec.frame_mask
        if refused and not state.printed("ET4"):
            return Reading(steps, -1, code | PF_P, code | PF_P)
        leaf = steps[-1]
        inside = gva & ((1 << spec.levels[leaf.level].shift) - 1)
        return Reading(
            steps,
            state.entries.first_frame(leaf.entry, leaf.level) + (inside >> PAGE_SHIFT),
            None,
            denied,
        )

    def _seen(self, entry: int, stale: int) -> int:
        for name, bit in _STALE:
            if self._state.printed(name):
                entry = entry & ~bit | stale & bit
        return entry

    def mark(self, reading: Reading, kind: int, skip: int) -> list[Step]:
        """Set A in every entry of a permitted walk and D in the leaf of a store, in guest memory.

        The monitor's own stores. They are made before anything is derived, as the hardware sets A
        and D before it caches (744, 750, 802, 848).

        Args:
            skip: So many entries from the root down are left as they are (ET1b).
        """
        memory, width = self._state.memory, self._state.spec.entry_bytes
        steps = []
        for depth, step in enumerate(reading.steps):
            want = A | (D if step is reading.steps[-1] and kind == WRITE else 0)
            if step.gpa >= 0 and depth >= skip:
                now = memory.load(step.gpa, width)
                if want & ~now and now & P:
                    memory.store(step.gpa, width, now | want)
                step = step._replace(entry=step.entry | want)
            steps.append(step)
        return steps
