"""One sub-VMM: the passive part of what its producer and consumer do for one VCPU.

`fault` is Fig. 8, `begin_store`/`finish_store` are Fig. 11, the `event_*` methods are Fig. 12.
Nothing here waits and nothing reaches into another VCPU: what concerns others comes back as a value
(`PlaceTraces`, `Owed`) for the driver to carry out.

Source: A40 Figs 6, 8, 11, 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from penumbra.actors.core import Drained, Matrix, Patch
from penumbra.actors.vmm.derive import derive_leaf, link_rights
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import Key, Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.shadow import FLUSH_ALL, NO_FRAGMENT, ShadowPage, ShadowSpace
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import GuestRegisters, GuestWalker, Step, registers_flush
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, PS, A, D, FormatSpec, G, P, U, W
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
    """The store is permitted but must not be made by the hardware: the monitor does it."""


@dataclass(frozen=True)
class PlaceTraces:
    """These guest tables must be traced on every CPU first (812); then ask again."""

    gfns: tuple[int, ...]


Outcome: TypeAlias = Forward | Hidden | Emulate | PlaceTraces
Owed: TypeAlias = list[tuple[Key, int]]
_HIDDEN, _EMULATE = Hidden(), Emulate()
# Stands for the table that a guest without paging does not have: every address is physical.
UNPAGED = -2
_IDENTITY = P | W | U | A | D


@dataclass
class Shared:
    """What the sub-VMMs of one VM share."""

    spec: FormatSpec
    scheme: Scheme
    memory: MemoryManagement
    matrix: Matrix
    traces: WriteTraces
    propagation: Propagation
    roots: dict[int, int] = field(default_factory=dict)  # vcpu_id to the root's guest frame


class SubVmm:
    """Shadow tables and coherence of one VCPU.

    Invariant: every table a shadow page derives from is traced, every live shadow entry's guest
    entry has this VCPU in its interest set, and no shadow entry maps a traced frame writable.
    """

    def __init__(self, vcpu_id: int, shared: Shared) -> None:
        self.vcpu_id = vcpu_id
        self.registers = GuestRegisters()
        self.shared = shared
        self._spec = shared.spec
        self._memory = shared.memory
        self._traces = shared.traces
        self._walker = GuestWalker(shared.spec, shared.memory)
        self.space = ShadowSpace(
            shared.spec, shared.memory, shared.scheme.options.shadow_pages, self._gone
        )
        self._filling: frozenset[tuple[int, int]] = frozenset()
        self._n_applied = 0

    def _gone(self, gfn: int, index: int) -> None:
        # What a fill is about to derive from stays registered, whatever is cleared on the way.
        if (gfn, index) not in self._filling:
            self._traces.forget(gfn, index, self.vcpu_id)

    # ---- Fig. 8 ---------------------------------------------------------------------------------

    def fault(self, gva: int, kind: int, user: bool) -> Outcome:
        """Answer a hardware page fault by the guest's own tables.

        Source: A40 Fig. 8, steps 802-816.
        """
        if not self.registers.paging:
            return self._fault_unpaged(gva, kind)
        steps = self._walk(gva, kind, user)  # 802
        if not isinstance(steps, list):
            return steps  # 804, or 812 first
        walker = self._walker
        target = walker.frame(gva)  # 808
        writable = walker.rights & E_W
        steps = walker.set_accessed(steps, kind)
        if kind == WRITE and (target in self._traces or not writable):
            return _EMULATE
        self._install(steps, gva, target)  # 814
        return _HIDDEN

    def _fault_unpaged(self, gva: int, kind: int) -> Outcome:
        """Map an address to itself: with CR0.PG clear the guest has no table to derive from."""
        target = gva >> PAGE_SHIFT
        if kind == WRITE and target in self._traces:
            return _EMULATE
        root, top = self.space.root, self._spec.top
        assert root is not None, "no root is loaded"
        index = self._spec.levels[top].index(gva)
        leaf = Step(top, (UNPAGED << PAGE_SHIFT) + index * self._spec.entry_bytes, _IDENTITY)
        page, at = self._fragment(root, index, leaf, gva)
        value = derive_leaf(
            self._spec, _IDENTITY, target, self._memory, self._traces, self.registers
        )
        self.space.set_leaf(page, at, value, target)
        return _HIDDEN

    def _walk(self, gva: int, kind: int, user: bool) -> list[Step] | Forward | PlaceTraces:
        """Walk the guest with every table on the path traced and this VCPU registered first."""
        walker, traces = self._walker, self._traces
        while True:
            if not walker.resolve(self.registers, gva, kind, user):
                return Forward(walker.error)
            steps = walker.steps()
            untraced = tuple(step.gfn for step in steps if step.gfn not in traces)
            if untraced:
                return PlaceTraces(untraced)  # 812
            fresh = False
            for step in steps:
                index = self._index(step.gpa)
                fresh |= not traces.consumers(step.gfn, index) >> self.vcpu_id & 1
                traces.register(step.gfn, index, self.vcpu_id)
            if not fresh:
                return steps
            # Registered after the read: read again, or a change in between would be missed (EP4).

    def guest_address(self, gva: int, kind: int, user: bool) -> int | Forward | PlaceTraces:
        """Translate for an emulated access, A and D set as the hardware would; return a gpa."""
        if not self.registers.paging:
            return gva
        steps = self._walk(gva, kind, user)
        if not isinstance(steps, list):
            return steps
        frame = self._walker.frame(gva)
        self._walker.set_accessed(steps, kind)
        return (frame << PAGE_SHIFT) | (gva & (PAGE_BYTES - 1))

    def _index(self, gpa: int) -> int:
        return (gpa & (PAGE_BYTES - 1)) // self._spec.entry_bytes

    def _install(self, steps: list[Step], gva: int, target: int) -> None:
        """Make the shadow path of `gva` equal to the guest's and install its leaf."""
        space, spec = self.space, self._spec
        self._filling = frozenset((step.gfn, self._index(step.gpa)) for step in steps)
        self._drain_detached(steps)
        page = space.root
        assert page is not None, "no root is loaded"
        for step, below in pairwise(steps):
            role = (below.gfn, below.level, NO_FRAGMENT)
            child = space.find(role) or space.create(role)
            space.link(page, self._index(step.gpa), child, link_rights(spec, step.entry), gva)
            page = child
        leaf = steps[-1]
        index = self._index(leaf.gpa)
        entry = leaf.entry
        if leaf.level:
            page, index = self._fragment(page, index, leaf, gva)
            # An event anywhere in a large page ends all of it: no piece may outlive a CR3 load.
            entry &= ~G
        value = derive_leaf(spec, entry, target, self._memory, self._traces, self.registers)
        space.set_leaf(page, index, value, target)
        self._filling = frozenset()

    def _drain_detached(self, steps: list[Step]) -> None:
        """Bring up to date what is about to be linked anew, all that hangs below it too (EP7)."""
        page, bases = self.space.root, set[int]()
        for step, below in pairwise(steps):
            child = self.space.find((below.gfn, below.level, NO_FRAGMENT))
            if child and (page is None or page.children.get(self._index(step.gpa)) is not child):
                bases |= {table << PAGE_SHIFT for table in _tables_below(child)}
            page = child
        if bases:
            propagation = self.shared.propagation
            self._follow(propagation.drain(self.vcpu_id, lambda base, _: base in bases))

    def _fragment(
        self, page: ShadowPage, index: int, leaf: Step, gva: int
    ) -> tuple[ShadowPage, int]:
        """Shadow a large guest page in 4 KiB pieces: go down to the level-0 fragment of `gva`."""
        spec, space = self._spec, self.space
        inside = gva & ((1 << spec.levels[leaf.level].shift) - 1)
        for level in range(leaf.level - 1, -1, -1):
            part = inside >> spec.levels[level + 1].shift
            role = (leaf.gfn, level, self._index(leaf.gpa) << 20 | part)
            child = space.find(role) or space.create(role)
            space.link(page, index, child, link_rights(spec, leaf.entry), gva)
            page, index = child, spec.levels[level].index(gva)
        return page, index

    # ---- Fig. 11 --------------------------------------------------------------------------------

    def begin_store(self, parts: list[tuple[int, int]]) -> list[Key]:
        """Announce a store to guest memory (P1); return the traced entries it touches.

        The caller makes the store (831) and then calls `finish_store` with what this returned.

        Args:
            parts: (guest-physical address, bytes), one per page.
        """
        width = self._spec.entry_bytes
        keys = [
            (gpa & -PAGE_BYTES, at & (PAGE_BYTES - 1))
            for gpa, size in parts
            if gpa >> PAGE_SHIFT in self._traces
            for at in range(gpa & -width, gpa + size, width)
        ]
        if keys:
            self.shared.propagation.begin(self.vcpu_id, keys)
        return keys

    def finish_store(self, keys: list[Key]) -> Owed:
        """Tell the consumers (832-842); return who is owed a shootdown of which entry (844).

        The caller carries the shootdowns out and then calls `end_store`.
        """
        owed: Owed = []
        if not keys:
            return owed
        self.shared.propagation.stored(self.vcpu_id)
        for key in keys:
            base, offset = key
            gfn, index = base >> PAGE_SHIFT, offset // self._spec.entry_bytes
            consumers = self._traces.consumers(gfn, index)  # 832
            if self.shared.scheme.options.tell_all:
                consumers = (1 << self.shared.matrix.n) - 1
            if consumers:
                source = self._memory.load(base | offset, self._spec.entry_bytes)
                derived = self._derive_for_others(gfn, source)
                full = self.shared.propagation.tell(
                    self.vcpu_id, key, consumers, derived, source & ~A
                )
                if full:
                    owed.append((key, full))
        return owed

    def end_store(self, keys: list[Key]) -> None:
        """All told and acknowledged (P9)."""
        if keys:
            self.shared.propagation.end(self.vcpu_id)

    def _derive_for_others(self, gfn: int, entry: int) -> int | None:
        """Derive a shadow leaf from the new entry if this table is used as a leaf table only."""
        pages = self.space.of_table(gfn)
        if len(pages) != 1 or pages[0].level or not entry & P:
            return None
        target = (entry & self._spec.frame_mask) >> PAGE_SHIFT
        return derive_leaf(self._spec, entry, target, self._memory, self._traces, self.registers)

    # ---- Fig. 12 --------------------------------------------------------------------------------

    def event_all(self) -> None:
        """Bring everything up to date: a CR3 load, a flush, a mode change."""
        self._follow(self.shared.propagation.drain(self.vcpu_id, None))

    def event_invlpg(self, gva: int) -> None:
        """Bring up to date what INVLPG covers: the leaf of `gva` and every upper entry."""
        path = self._path(gva)

        def covers(base: int, offset: int) -> bool:
            pages = self.space.of_table(base >> PAGE_SHIFT)
            return (base, offset) in path or not pages or any(page.level for page in pages)

        self._event(covers)
        self.space.flushes.append(gva)

    def event_fault(self, gva: int) -> None:
        """Bring up to date what a delivered page fault covers: the entries `gva` uses alone."""
        path = self._path(gva)
        self._event(lambda base, offset: (base, offset) in path)
        self.space.flushes.append(gva)

    def _event(self, covers: Callable[[int, int], bool]) -> None:
        self._follow(self.shared.propagation.drain(self.vcpu_id, covers))

    def _follow(self, drained: Drained) -> None:
        """Make the shadow follow what was drained (872-876)."""
        if drained.drop_all:
            self._drop_shadows()
        for patch in drained.patches:
            self._apply(patch)
        self.shared.propagation.settle(self.vcpu_id)

    def _path(self, gva: int) -> set[Key]:
        """Return the guest entries the shadow path of `gva` derives from."""
        page, keys = self.space.root, set()
        while page is not None:
            index = self._spec.levels[page.level].index(gva)
            if page.role[2] == NO_FRAGMENT:
                keys.add((page.role[0] << PAGE_SHIFT, index * self._spec.entry_bytes))
            page = page.children.get(index)
        return keys

    def load_root(self, cr3: int) -> PlaceTraces | int:
        """Switch to the shadow of a guest root; return its machine address for the hardware's CR3.

        Source: A40 ¶87, ¶113; patches are drained first, those postponed under other roots too.
        """
        paging = self.registers.paging
        gfn = (cr3 & self._spec.frame_mask) >> PAGE_SHIFT if paging else UNPAGED
        if paging and gfn not in self._traces:
            return PlaceTraces((gfn,))
        self.event_all()
        self.registers.cr3 = cr3
        role = (gfn, self._spec.top, NO_FRAGMENT)
        self.space.root = self.space.find(role) or self.space.create(role)
        self.space.root.va_base = 0
        self.shared.roots[self.vcpu_id] = gfn
        return self.space.root.pfn << PAGE_SHIFT

    def take_applied(self) -> int:
        """Return how many patches were applied since the last call."""
        n, self._n_applied = self._n_applied, 0
        return n

    def _apply(self, patch: Patch) -> None:
        """Bring this VCPU's entries for one patch up to date (872-876)."""
        gfn, index = patch.base >> PAGE_SHIFT, patch.offset // self._spec.entry_bytes
        current = self._memory.load(patch.base | patch.offset, self._spec.entry_bytes)
        self._n_applied += 1
        for page in self.space.of_table(gfn):
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
            self.space.clear(page, index)

    def _links_same(self, page: ShadowPage, index: int, entry: int) -> bool:
        mask = link_rights(self._spec, ~0)
        return self.space.entry(page, index) & mask == link_rights(self._spec, entry)

    def _apply_leaf(self, page: ShadowPage, index: int, entry: int, patch: Patch) -> None:
        value = 0
        target = (entry & self._spec.frame_mask) >> PAGE_SHIFT
        if self.shared.scheme.apply == "update":
            mask = ((1 << 64) - 1) & ~A
            if self.shared.propagation.usable(self.vcpu_id, patch, entry, mask):
                value = patch.derived or 0
                if value:
                    target = self._memory.guest_of.get(
                        (value & self._spec.frame_mask) >> PAGE_SHIFT, target
                    )
            else:
                value = derive_leaf(
                    self._spec, entry, target, self._memory, self._traces, self.registers
                )
        if value:
            self.space.set_leaf(page, index, value, target)
        else:
            self.space.clear(page, index)

    # ---- asked by other CPUs --------------------------------------------------------------------

    def flooded(self, gfn: int, whole_page: bool) -> bool:
        """Note a store to a traced table; tell whether its trace and shadows should go.

        They should when the guest overwrites the whole page, as it does before it uses a page anew,
        or stores again and again without a fill in between; never while a VCPU runs on it as root.
        A store that crosses into a traced page begins in one that may not be.
        """
        if gfn not in self._traces:
            return False
        stores = self._traces.note_store(gfn)
        limit = self.shared.scheme.options.flood
        flood = whole_page or (limit > 0 and stores >= limit)
        return flood and gfn not in self.shared.roots.values()

    def shoot_down(self, key: Key) -> None:
        """Invalidate whatever derives from one guest entry (844; A40 ¶91)."""
        gfn, index = key[0] >> PAGE_SHIFT, key[1] // self._spec.entry_bytes
        for page in self.space.of_table(gfn):
            if page.role[2] != NO_FRAGMENT:
                continue
            self.space.clear(page, index)

    def revoke_write(self, gfn: int) -> int:
        """A trace is being placed on `gfn`: take write permission away here (T3a)."""
        return self.space.revoke_write(gfn)

    def drop_table(self, gfn: int) -> None:
        """Forget everything derived from a guest table; its queued patches mean nothing then."""
        if self.shared.propagation.drain_base(self.vcpu_id, gfn << PAGE_SHIFT).drop_all:
            self._drop_shadows()
        for page in self.space.of_table(gfn):
            if page in self.space.of_table(gfn):  # fragments go with their large page
                self.space.drop(page)

    def load_mode(self, register: int, value: int) -> bool:
        """Take a new CR0 or CR4; tell whether it flushes, and then derive everything anew.

        CR0.WP is read at each use and flushes nothing: no shadow entry is writable because WP is
        clear, such stores are emulated.
        """
        if not registers_flush(self.registers, register, value):
            return False
        self.event_all()
        self._drop_shadows()
        return True

    def _drop_shadows(self) -> None:
        """Empty every shadow page and keep only the root's, which the CPU points at."""
        root = self.space.root
        for page in self.space.all_pages():
            for index in [*page.live, *page.children]:
                self.space.clear(page, index)
        for page in self.space.all_pages():
            if page is not root:
                self.space.drop(page)
        self.space.flushes.append(FLUSH_ALL)

    def check(self) -> None:
        """Assert the class invariant and the shadow's own."""
        self.space.check()
        for page in self.space.all_pages():
            gfn, _, fragment = page.role
            if gfn == UNPAGED:
                continue
            assert gfn in self._traces, f"table {gfn:#x} is shadowed and not traced"
            if fragment != NO_FRAGMENT:
                assert page.parents, f"fragment {page.role} outlives its large page"
                continue
            for index in [*page.live, *page.children]:
                told = self._traces.consumers(gfn, index) >> self.vcpu_id & 1
                assert told, f"VCPU {self.vcpu_id} would not hear of {gfn:#x}[{index}]"
        for page, index, target in self.space.leaves():
            traced = target in self._traces
            assert not (traced and self.space.entry(page, index) & W), f"{target:#x} is writable"


def _tables_below(page: ShadowPage) -> set[int]:
    """Return the guest tables that a shadow page and all that hangs below it derive from."""
    return {page.role[0]}.union(*map(_tables_below, page.children.values()))
