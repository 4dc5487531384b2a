"""One sub-VMM: the passive part of what its producer and consumer do for one VCPU.

`fault` is Fig. 8 (`fill`), `begin_store`/`finish_store` are Fig. 11, the `event_*` methods are
Fig. 12 (`follow`). Nothing here waits and nothing reaches into another VCPU: what concerns others
comes back as a value (`PlaceTraces`, `Owed`) for the driver to carry out.

Source: A40 Figs 6, 8, 11, 12.
"""

from __future__ import annotations

from collections.abc import Callable

from penumbra.actors.vmm.derive import derive_leaf
from penumbra.actors.vmm.fill import BringFrame, Filler, Forward, Outcome, PlaceTraces
from penumbra.actors.vmm.follow import Follower
from penumbra.actors.vmm.parts import UNPAGED, Parts, Shared
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.secondary import Owed
from penumbra.actors.vmm.shadow import NO_FRAGMENT
from penumbra.actors.vmm.top_registers import enter_entries, read_entries
from penumbra.actors.vmm.walk import REGISTERS, registers_flush
from penumbra.hw.control import reloads_top
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, A, P, W


class SubVmm:
    """Shadow tables and coherence of one VCPU.

    Invariant: every table a shadow page derives from is traced, every live shadow entry's guest
    entry has this VCPU in its interest set, and no shadow entry maps a traced frame writable.
    """

    def __init__(self, vcpu_id: int, shared: Shared) -> None:
        self._parts = parts = Parts(vcpu_id, shared)
        self._follower = Follower(parts)
        self._filler = Filler(parts, self._follower)
        self.vcpu_id = vcpu_id
        self.shared = shared
        self.registers = parts.registers
        self.space = parts.space
        self._spec = shared.spec
        self._memory = shared.memory
        self._traces = shared.traces

    def fault(self, gva: int, kind: int, user: bool) -> Outcome:
        """Answer a hardware page fault by the guest's own tables (Fig. 8)."""
        return self._filler.fault(gva, kind, user)

    def guest_address(
        self, gva: int, kind: int, user: bool
    ) -> int | Forward | PlaceTraces | BringFrame:
        """Translate for an emulated access, A and D set as the hardware would; return a gpa."""
        return self._filler.guest_address(gva, kind, user)

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
        self._follower.follow(self.shared.propagation.drain(self.vcpu_id, None))

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
        self._follower.follow(self.shared.propagation.drain(self.vcpu_id, covers))

    def _path(self, gva: int) -> set[Key]:
        """Return the guest entries the shadow path of `gva` derives from."""
        page, keys = self.space.root, set()
        while page is not None:
            index = self._spec.levels[page.level].index(gva)
            if page.role[2] == NO_FRAGMENT:
                keys.add((page.role[0] << PAGE_SHIFT, index * self._spec.entry_bytes))
            page = page.children.get(index)
        return keys

    def load_root(self, cr3: int) -> PlaceTraces | int | GeneralProtection:
        """Switch to the shadow of a guest root; return its machine address for the hardware's CR3.

        A load that the guest's CPU refuses changes nothing.

        Source: A40 ¶87, ¶113; patches are drained first, those postponed under other roots too.
        """
        if self._spec.root_registers:
            return self._load_registers(cr3)
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

    def _load_registers(self, cr3: int) -> int | GeneralProtection:
        entries = self.registers.top
        if self.registers.paging:
            read = read_entries(self._spec, self._memory, cr3)
            if isinstance(read, GeneralProtection):
                return read
            entries = read
        self.event_all()
        self.registers.cr3, self.registers.top = cr3, entries
        enter_entries(self._spec, self.space, self.registers)
        self.shared.roots[self.vcpu_id] = REGISTERS
        self.space.take_reload()  # the caller's load does it
        assert self.space.root is not None
        return self.space.root.pfn << PAGE_SHIFT

    def privilege(self, user: bool) -> int | None:
        """One shadow serves both privileges: its entries carry U."""
        return None

    def take_flushes(self) -> list[int]:
        """Return the addresses to flush since the last call; `[FLUSH_ALL]` is all of them."""
        return self.space.take_flushes()

    def take_reload(self) -> int | None:
        """Return the root to load again: the shadow's top entries, held in registers, changed."""
        if not self.space.take_reload():
            return None
        assert self.space.root is not None
        return self.space.root.pfn << PAGE_SHIFT

    def take_applied(self) -> int:
        """Return how many patches were applied since the last call."""
        return self._follower.take_applied()

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

    def forget_frame(self, gfn: int) -> None:
        """The machine frame behind a guest frame is about to be another: nothing here may map it.

        Patches in flight that were derived from the old one are void by the trace count (EP3).
        """
        self.space.forget_frame(gfn)

    def drop_table(self, gfn: int) -> None:
        """Forget everything derived from a guest table; its queued patches mean nothing then."""
        if self.shared.propagation.drain_base(self.vcpu_id, gfn << PAGE_SHIFT).drop_all:
            self._follower.drop_shadows()
        for page in self.space.of_table(gfn):
            if page in self.space.of_table(gfn):  # fragments go with their large page
                self.space.drop(page)

    def load_mode(self, register: int, value: int) -> bool | GeneralProtection:
        """Take a new CR0 or CR4; tell whether it flushes, and then derive everything anew.

        CR0.WP is read at each use and flushes nothing: no shadow entry is writable because WP is
        clear, such stores are emulated. A change that the guest's CPU refuses changes nothing.
        """
        before = self.registers.cr0, self.registers.cr4
        reloads = self._spec.root_registers > 0 and reloads_top(*before, register, value)
        if reloads:
            entries = read_entries(self._spec, self._memory, self.registers.cr3)
            if isinstance(entries, GeneralProtection):
                return entries
            self.registers.top = entries
        if not registers_flush(self.registers, register, value) and not reloads:
            return False
        self.event_all()
        self._follower.drop_shadows()
        return True

    def check(self) -> None:
        """Assert the class invariant and the shadow's own."""
        self.space.check()
        for page in self.space.all_pages():
            gfn, _, fragment = page.role
            if gfn in (UNPAGED, REGISTERS):
                continue
            assert gfn in self._traces, f"table {gfn:#x} is shadowed and not traced"
            if fragment != NO_FRAGMENT:
                assert page.parents, f"fragment {page.role} outlives its large page"
                continue
            for index in [*page.live, *page.children]:
                told = self._traces.consumers(gfn, index) >> self.vcpu_id & 1
                assert told, f"VCPU {self.vcpu_id} would not hear of {gfn:#x}[{index}]"
        if self._spec.root_registers and self.registers.paging and self.space.root:
            for index, child in self.space.root.children.items():
                entry = self.registers.top[index]
                assert entry & P and child.role[0] == (entry & self._spec.frame_mask) >> PAGE_SHIFT
        for page, index, target in self.space.leaves():
            entry = self.space.entry(page, index)
            traced = target in self._traces or not self._memory.ready(target, True)
            assert not (traced and entry & W), f"{target:#x} is writable"
            pfn = self._memory.hpa(target << PAGE_SHIFT)
            if pfn is not None:
                right = pfn >> PAGE_SHIFT == (entry & self._spec.frame_mask) >> PAGE_SHIFT
                assert right, f"{target:#x} is not in the frame of {entry:#x}"
            assert not self._memory.is_absent(target), f"{target:#x} is mapped and absent"
