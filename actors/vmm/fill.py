"""Fig. 8: what a hardware page fault means, and how the shadow gets the missing translation.

The guest's own tables decide. Before anything is derived from an entry its table is traced on every
CPU and this VCPU is registered as its consumer; then it is read (again). The whole shadow path is
made equal to the guest's, so a fill is always at least as fresh as the last coherency event.

Source: A40 Fig. 8, steps 800-816.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from penumbra.actors.vmm.derive import derive_leaf, link_rights
from penumbra.actors.vmm.follow import Follower
from penumbra.actors.vmm.parts import UNPAGED, Parts
from penumbra.actors.vmm.prefetch import Prefetch
from penumbra.actors.vmm.resync import Resync
from penumbra.actors.vmm.shadow import ShadowPage
from penumbra.actors.vmm.walk import GuestWalker, Step
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, A, D, G, P, U, W
from penumbra.hw.mmu_layout import E_W
from penumbra.hw.streams import WRITE


@dataclass(frozen=True)
class Forward:
    """A true fault: the guest's kernel has to see it (804)."""

    error: int


@dataclass(frozen=True)
class Hidden:
    """The shadow was behind and is repaired: run the instruction again (816)."""


@dataclass(frozen=True)
class Emulate:
    """The access is permitted but must not be made by the hardware: the monitor does it.

    Attributes:
        device: It is one to a device (A40 ¶38), not a store to a traced table.
    """

    device: bool = False


@dataclass(frozen=True)
class PlaceTraces:
    """These guest tables must be traced on every CPU first (812); then ask again."""

    gfns: tuple[int, ...]


@dataclass(frozen=True)
class MachineCheck:
    """The guest's tables name memory its machine does not have (VTLB Fig. 7A, 716)."""

    gva: int
    gpa: int


@dataclass(frozen=True)
class BringFrame:
    """This guest frame must be in a machine frame first, its own if `write`; then ask again."""

    gfn: int
    write: bool


Outcome: TypeAlias = Forward | Hidden | Emulate | PlaceTraces | MachineCheck | BringFrame
_HIDDEN, _EMULATE, _DEVICE = Hidden(), Emulate(), Emulate(device=True)
_IDENTITY = P | W | U | A | D


class Filler:
    """Answers one VCPU's faults and translates for the stores its producer makes."""

    def __init__(self, parts: Parts, follower: Follower, resync: Resync) -> None:
        self._parts = parts
        self._follower = follower
        self._shared = parts.shared
        self._vcpu_id = parts.vcpu_id
        self._space = parts.space
        self._registers = parts.registers
        self._spec = parts.shared.spec
        self._memory = parts.shared.memory
        self._traces = parts.shared.traces
        self._resync = resync
        self._prefetch = Prefetch(parts)
        self._walker = GuestWalker(parts.shared.spec, parts.shared.memory)

    def fault(self, gva: int, kind: int, user: bool) -> Outcome:
        """Answer a hardware page fault by the guest's own tables.

        Source: A40 Fig. 8, steps 802-816.
        """
        if not self._registers.paging:
            return self._fault_unpaged(gva, kind)
        steps = self._walk(gva, kind, user)  # 802
        if not isinstance(steps, list):
            return steps  # 804, or 812 first
        walker = self._walker
        target = walker.frame(gva)  # 808
        if self._memory.is_device(target):
            return _DEVICE
        writable = walker.rights & E_W
        emulate = kind == WRITE and (self._traces.emulates(target) or not writable)
        if not emulate and not self._memory.ready(target, kind == WRITE):
            return BringFrame(target, kind == WRITE)
        steps = walker.set_accessed(steps, kind)
        if emulate:
            lifted = self._shared.unsync.lift(target) if writable else False
            if lifted is False:
                return _EMULATE
            if lifted is not True:
                return PlaceTraces((lifted,))  # as many are out of sync as may be
            self._parts.counts["unsync"] += 1
        self._install(steps, gva, target)  # 814
        return _HIDDEN

    def _fault_unpaged(self, gva: int, kind: int) -> Outcome:
        """Map an address to itself: with CR0.PG clear the guest has no table to derive from."""
        target = gva >> PAGE_SHIFT
        if self._memory.is_device(target):
            return _DEVICE
        if kind == WRITE and self._traces.emulates(target):
            return _EMULATE
        if not self._memory.ready(target, kind == WRITE):
            return BringFrame(target, kind == WRITE)
        root, top = self._space.root, self._spec.top
        assert root is not None, "no root is loaded"
        index = self._spec.levels[top].index(gva)
        n_bytes = self._spec.entry_bytes
        leaf = Step(top, (UNPAGED << PAGE_SHIFT) + index * n_bytes, _IDENTITY, UNPAGED, index)
        page, at = self._fragment(root, index, leaf, gva)
        value = derive_leaf(
            self._spec, _IDENTITY, target, self._memory, self._traces, self._registers
        )
        self._space.set_leaf(page, at, value, target)
        return _HIDDEN

    def _walk(
        self, gva: int, kind: int, user: bool
    ) -> list[Step] | Forward | PlaceTraces | BringFrame:
        """Walk the guest with every table on the path traced and this VCPU registered first."""
        walker, traces = self._walker, self._traces
        while True:
            permitted = walker.resolve(self._registers, gva, kind, user)
            unready = walker.unready()
            if unready is not None:
                return BringFrame(unready, True)
            if not permitted:
                return Forward(walker.error)
            steps = walker.steps()
            in_tables = [step for step in steps if step.gpa >= 0]
            untraced = tuple(
                step.gfn
                for step in in_tables
                if step.gfn not in traces and (step.level or not traces.is_lifted(step.gfn))
            )
            if untraced:
                return PlaceTraces(tuple(untraced))  # 812
            fresh = False
            for step in in_tables:
                fresh |= self._parts.register(step.gfn, step.place)
                if step.level:
                    traces.note_upper(step.gfn)
            if not fresh:
                self._shared.unsync.note_fill(self._vcpu_id, steps[-1].gfn)
                return steps
            # Registered after the read: read again, or a change in between would be missed (EP4).

    def guest_address(
        self, gva: int, kind: int, user: bool
    ) -> int | Forward | PlaceTraces | BringFrame:
        """Translate for an emulated access, A and D set as the hardware would; return a gpa."""
        if not self._registers.paging:
            return gva
        steps = self._walk(gva, kind, user)
        if not isinstance(steps, list):
            return steps
        frame = self._walker.frame(gva)
        self._walker.set_accessed(steps, kind)
        return (frame << PAGE_SHIFT) | (gva & (PAGE_BYTES - 1))

    def _install(self, steps: list[Step], gva: int, target: int) -> None:
        """Make the shadow path of `gva` equal to the guest's and install its leaf."""
        space, spec = self._space, self._spec
        self._parts.filling = frozenset([(step.gfn, step.place) for step in steps])
        self._drain_detached(steps, gva)
        page = space.root
        assert page is not None, "no root is loaded"
        for step, below in pairwise(steps):
            child = self._parts.shadow(self._parts.role(below.gfn, below.level, gva))
            space.link(page, step.place, child, link_rights(spec, step.entry), gva)
            page = child
        leaf = steps[-1]
        index, entry = leaf.place, leaf.entry
        if leaf.level:
            page, index = self._fragment(page, index, leaf, gva)
            # An event anywhere in a large page ends all of it: no piece may outlive a CR3 load.
            entry &= ~G
        value = derive_leaf(spec, entry, target, self._memory, self._traces, self._registers)
        space.set_leaf(page, index, value, target)
        self._parts.filling = frozenset()
        if not leaf.level:
            self._prefetch.around(page, index)

    def _drain_detached(self, steps: list[Step], gva: int) -> None:
        """Bring up to date what is about to be linked anew, all that hangs below it too (EP7)."""
        page, bases = self._space.root, set[int]()
        for step, below in pairwise(steps):
            role = self._parts.role(below.gfn, below.level, gva)
            linked = page.children.get(step.place) if page else None
            if linked is not None and linked.role == role:
                page = linked
                continue
            page = self._space.find(role)
            if page is not None:
                bases |= {table << PAGE_SHIFT for table in _tables_below(page)}
        if bases:
            drained = self._shared.propagation.drain_bases(self._vcpu_id, bases)
            self._follower.follow(drained)
            self._resync.tables(sorted(base >> PAGE_SHIFT for base in bases))

    def _fragment(
        self, page: ShadowPage, index: int, leaf: Step, gva: int
    ) -> tuple[ShadowPage, int]:
        """Shadow a large guest page in 4 KiB pieces: go down to the level-0 fragment of `gva`."""
        spec, space = self._spec, self._space
        inside = gva & ((1 << spec.levels[leaf.level].shift) - 1)
        for level in range(leaf.level - 1, -1, -1):
            part = inside >> spec.levels[level + 1].shift
            role = (leaf.gfn, level, leaf.place << 20 | part)
            child = self._parts.shadow(role)
            space.link(page, index, child, link_rights(spec, leaf.entry), gva)
            page, index = child, spec.levels[level].index(gva)
        return page, index


def _tables_below(page: ShadowPage) -> set[int]:
    """Return the guest tables that a shadow page and all that hangs below it derive from."""
    return {page.role[0]}.union(*map(_tables_below, page.children.values()))
