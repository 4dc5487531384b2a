"""One sub-VMM: the passive part of what its producer and consumer do for one VCPU.

`fault` is Fig. 8 (`fill`), `begin_store`/`finish_store` are Fig. 11, the `event_*` methods are
Fig. 12 (`follow`). Nothing here waits and nothing reaches into another VCPU: what concerns others
comes back as a value (`PlaceTraces`, `Owed`) for the driver to carry out.

Source: A40 Figs 6, 8, 11, 12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from penumbra.actors.vmm.contents import Translation, translations
from penumbra.actors.vmm.derive import derive_leaf
from penumbra.actors.vmm.fill import BringFrame, Filler, Forward, Outcome, PlaceTraces
from penumbra.actors.vmm.follow import Follower
from penumbra.actors.vmm.parts import UNPAGED, Parts, Shared
from penumbra.actors.vmm.prefetch import Prefetch
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.resync import Resync
from penumbra.actors.vmm.secondary import Owed
from penumbra.actors.vmm.shadow import NO_FRAGMENT, ShadowPage
from penumbra.actors.vmm.top_registers import enter_entries, linked_tables, read_entries
from penumbra.actors.vmm.walk import REGISTERS, registers_flush
from penumbra.hw.control import reloads_top
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, A, P, W

_NOTHING_COUNTED: Final[dict[str, int]] = {}


class SubVmm:
    """Shadow tables and coherence of one VCPU.

    Invariant: every table a shadow page derives from is traced or noted to be behind, every live
    shadow entry's guest entry has this VCPU in its interest set, and no store through a shadow
    entry that maps a traced frame goes unnoticed.
    """

    def __init__(self, vcpu_id: int, shared: Shared) -> None:
        self._parts = parts = Parts(vcpu_id, shared)
        self._follower = Follower(parts)
        self._resync = Resync(parts)
        self._filler = Filler(parts, self._follower, self._resync)
        self._prefetch = Prefetch(parts)
        self._kept_roots: list[int] = []
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
            if gpa >> PAGE_SHIFT in self._traces and not self._lift(gpa >> PAGE_SHIFT)
            for at in range(gpa & -width, gpa + size, width)
        ]
        if keys:
            self.shared.propagation.begin(self.vcpu_id, keys)
        return keys

    def _lift(self, gfn: int) -> bool:
        """Let a table go out of sync instead of telling who derives from it, if that may be."""
        lifted = self.shared.unsync.lift(gfn) is True
        self._parts.counts["unsync"] += lifted
        return lifted

    def finish_store(self, keys: list[Key]) -> Owed:
        """Tell the consumers (832-842); return who is owed a shootdown of which entry (844).

        The caller carries the shootdowns out and then calls `end_store`.
        """
        owed: Owed = []
        if not keys:
            return owed
        self.shared.propagation.stored(self.vcpu_id)
        for key in keys:
            consumers = self.consumers(key)
            if consumers:
                full = self.tell(key, consumers)
                if full:
                    owed.append((key, full))
        return owed

    def consumers(self, key: Key) -> int:
        """Return the bit set of those whom a change of an entry concerns (832); others stand by."""
        if self.shared.scheme.options.tell_all:
            return (1 << self.shared.matrix.n) - 1
        return self._traces.consumers(key[0] >> PAGE_SHIFT, key[1] // self._spec.entry_bytes)

    def tell(self, key: Key, consumers: int) -> int:
        """Tell consumers of one changed entry (836-842); return the bit set of those still owed."""
        source = self._memory.load(key[0] | key[1], self._spec.entry_bytes)
        derived = self._derive_for_others(key[0] >> PAGE_SHIFT, source)
        return self.shared.propagation.tell(self.vcpu_id, key, consumers, derived, source & ~A)

    def blockers(self, consumers: int) -> int:
        """Return who must drain before these have room again; 0 = they are shot down (844)."""
        return self.shared.propagation.blockers(self.vcpu_id, consumers)

    def end_store(self, keys: list[Key]) -> None:
        """All told and acknowledged (P9)."""
        if keys:
            self.shared.propagation.end(self.vcpu_id)

    def _derive_for_others(self, gfn: int, entry: int) -> int | None:
        """Derive a shadow leaf from the new entry if this table is used as a leaf table only."""
        if not entry & P or not self.space.is_leaf_table(gfn):
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
        self._resync.address(gva)
        self._prefetch.after_invlpg(gva)
        self.space.flushes.append(gva)

    def event_fault(self, gva: int) -> None:
        """Bring up to date what a delivered page fault covers: the entries `gva` uses alone."""
        path = self._path(gva)
        self._event(lambda base, offset: (base, offset) in path)
        self._resync.address(gva)
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
        role = (gfn, self._spec.top, NO_FRAGMENT)
        lifted = self._resync.to_trace(self.space.find(role))
        if lifted:
            return PlaceTraces(lifted)
        self.event_all()
        if self.space.enter(self.registers):
            self._follower.drop_shadows()
        self.registers.cr3 = cr3
        root = self.space.root = self._parts.shadow(role)
        root.va_base = 0
        self.shared.roots[self.vcpu_id] = gfn
        if paging:
            self._traces.note_upper(gfn)
        self._resync.beneath(root)
        self._keep_roots(root)
        return root.pfn << PAGE_SHIFT

    def _keep_roots(self, root: ShadowPage) -> None:
        """Drop what hangs only below roots that were in use longer ago than the scheme keeps."""
        n = self.shared.scheme.options.root_cache
        if n is None:
            return
        gfn = root.role[0]
        kept = self._kept_roots = [gfn, *(other for other in self._kept_roots if other != gfn)]
        for old in kept[n + 1 :]:
            page = self.space.find((old, self._spec.top, NO_FRAGMENT))
            if page is not None:
                self.space.drop_tree(page)
        del kept[n + 1 :]
        self._parts.drop_traces()

    def _load_registers(self, cr3: int) -> PlaceTraces | int | GeneralProtection:
        entries = self.registers.top
        if self.registers.paging:
            read = read_entries(self._spec, self._memory, cr3)
            if isinstance(read, GeneralProtection):
                return read
            entries = read
        lifted: dict[int, None] = {}
        for page in linked_tables(self._spec, self.space, entries):
            lifted.update(dict.fromkeys(self._resync.to_trace(page)))
        if lifted:
            return PlaceTraces(tuple(lifted))
        self.event_all()
        if self.space.enter(self.registers):
            self._follower.drop_shadows()
        self.registers.cr3, self.registers.top = cr3, entries
        enter_entries(self._spec, self.space, self.registers)
        self.shared.roots[self.vcpu_id] = REGISTERS
        self.space.take_reload()  # the caller's load does it
        assert self.space.root is not None
        self._resync.beneath(self.space.root)
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

    def take_remote(self) -> int:
        """Nobody else walks this VCPU's shadow."""
        return 0

    def take_applied(self) -> int:
        """Return how many patches were applied since the last call."""
        return self._follower.take_applied()

    def take_counts(self) -> dict[str, int]:
        """Return what else has happened since the last call, by counter name."""
        counts = self._parts.counts
        if not counts:
            return _NOTHING_COUNTED
        taken = dict(counts)
        counts.clear()
        return taken

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
        """A trace is being placed on `gfn`: guard its mappings here (T3a)."""
        return self._traces.detection.place(self.space, gfn)

    def forget_frame(self, gfn: int) -> None:
        """The machine frame behind a guest frame is about to be another: nothing here may map it.

        Patches in flight that were derived from the old one are void by the trace count (EP3).
        """
        self.space.forget_frame(gfn)

    def drop_table(self, gfn: int) -> None:
        """Forget everything derived from a guest table; its queued patches mean nothing then."""
        if self.shared.propagation.drain_base(self.vcpu_id, gfn << PAGE_SHIFT).drop_all:
            self._follower.drop_shadows()
        self.shared.propagation.settle(self.vcpu_id)
        for page in self.space.of_table(gfn):
            if page in self.space.of_table(gfn):  # fragments go with their large page
                self.space.drop(page)
        self._traces.detection.lift(self.space, gfn)

    def stores_lost(self) -> int:
        """Stores to guest tables went unseen: tell every consumer (P8); return who is owed it."""
        everyone = (1 << self.shared.matrix.n) - 1
        return self.shared.propagation.lose(self.vcpu_id, everyone)

    def forget_all(self) -> None:
        """Drop whatever is derived, from whichever table."""
        self._follower.drop_shadows()

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

    def entries(self) -> list[Translation]:
        """Return the translations of the shadow that hangs from the root in use."""
        if self.space.root is None:
            return []
        return translations(self._spec, self._memory.ram, self.space.root.pfn << PAGE_SHIFT)

    def check(self) -> None:
        """Assert the class invariant and the shadow's own."""
        self.space.check()
        for page in self.space.all_pages():
            gfn, fragment = page.role[0], page.role[2]
            if gfn in (UNPAGED, REGISTERS):
                continue
            if self._traces.is_lifted(gfn):
                assert not page.level, f"upper table {gfn:#x} is out of sync"
                behind = not page.live or self.shared.unsync.is_behind(self.vcpu_id, gfn)
                assert behind, f"table {gfn:#x} is taken for equal"
            else:
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
            escapes = self._traces.escapes(entry, target)
            escapes |= bool(entry & W) and not self._memory.ready(target, True)
            assert not escapes, f"{target:#x} is writable"
            pfn = self._memory.hpa(target << PAGE_SHIFT)
            if pfn is not None:
                right = pfn >> PAGE_SHIFT == (entry & self._spec.frame_mask) >> PAGE_SHIFT
                assert right, f"{target:#x} is not in the frame of {entry:#x}"
            assert not self._memory.is_absent(target), f"{target:#x} is mapped and absent"
