"""A virtual machine without an event loop: the real parts, driven by plain calls.

Hardware, shadow tables, traces, channels and the oracle are the product's own; what the drivers of
`actors/machine` do between them is done here in the open, one call per thing the guest does:

    bench = Bench(IA32, PATCH)
    root = bench.frame()
    bench.map(root, 0x5000, gfn=9)                  the boot loader's stores
    bench.start(root)
    bench.access(0, 0x5000)                         -> 9, the guest frame used
    bench.poke(0, bench.where(root, 0x5000), new)   a guest store to a table: Fig. 11
    bench.invlpg(0, 0x5000)                         a coherency event: Fig. 12

Every access and every fault is judged by the oracle; `log` tells what the monitor did.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from penumbra.actors.check import Oracle
from penumbra.actors.core import Order
from penumbra.actors.vmm.compose import (
    compose_buffer,
    compose_matrix,
    compose_readers,
    compose_traces,
)
from penumbra.actors.vmm.fill import Emulate, Forward, Hidden, PlaceTraces
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.parts import Shared
from penumbra.actors.vmm.propagate import ImmediateShootdown, Key, PatchChannels
from penumbra.actors.vmm.schemes import (
    OUT_OF_SYNC,
    PATCH,
    SHOOTDOWN,
    WRITE_BUFFER,
    Apply,
    Propagate,
    Scheme,
    SchemeOptions,
    WriteBufferOptions,
)
from penumbra.actors.vmm.shadow import FLUSH_ALL, ShadowPage
from penumbra.actors.vmm.shared_shadow import Company, mode_of
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import BufferFull, Done, Exit, GeneralProtection, PageFault, TlbMiss
from penumbra.hw.formats import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    EFER_NXE,
    IA32,
    PAGE_BYTES,
    PAGE_SHIFT,
    A,
    D,
    FormatSpec,
    P,
    U,
    W,
)
from penumbra.hw.memory import FLAG_TABLE, Ram
from penumbra.hw.streams import FETCH, READ, WRITE
from penumbra.hw.tlb import Tlb, TlbGeometry

LINK = P | W | U | A  # an upper entry
USED = P | W | U | A | D  # a leaf that has been written through
PROTECTED = CR0_PE | CR0_PG | CR0_WP
CR4 = {"ia32": CR4_PSE | CR4_PGE, "pae": CR4_PAE | CR4_PGE, "x86-64": CR4_PAE | CR4_PGE}


@dataclass(frozen=True)
class Faulted:
    """The guest got a page fault with this error code."""

    error: int


@dataclass(frozen=True)
class Seen:
    """One thing the monitor did: `what`, for which VCPU (-1: for all), and its argument."""

    what: str
    vcpu: int
    arg: object = None


def patch(apply: Apply = "update", **options: object) -> Scheme:
    """Return the patch scheme with other options; shadow memory is small unless said."""
    chosen = msgspec.convert({"shadow_pages": 64, **options}, SchemeOptions)
    return msgspec.structs.replace(PATCH, apply=apply, options=chosen)


def write_buffer(propagate: Propagate = "patch", **options: object) -> Scheme:
    """Return the write-buffer scheme, those of `WriteBufferOptions` among the options."""
    names = WriteBufferOptions.__struct_fields__
    buffer = {name: options.pop(name) for name in names if name in options}
    chosen = msgspec.convert({"shadow_pages": 64, "buffer": buffer, **options}, SchemeOptions)
    apply: Apply = "update" if propagate == "patch" else "invalidate"
    return msgspec.structs.replace(WRITE_BUFFER, propagate=propagate, apply=apply, options=chosen)


def shootdown(**options: object) -> Scheme:
    """Return the shootdown scheme with other options."""
    chosen = msgspec.convert({"shadow_pages": 64, **options}, SchemeOptions)
    return msgspec.structs.replace(SHOOTDOWN, options=chosen)


def out_of_sync(
    propagate: Propagate = "shootdown", apply: Apply = "update", **options: object
) -> Scheme:
    """Return the scheme of unsynchronised leaf tables with other options."""
    chosen = msgspec.convert({"shadow_pages": 64, **options}, SchemeOptions)
    return msgspec.structs.replace(OUT_OF_SYNC, propagate=propagate, apply=apply, options=chosen)


class Bench:
    """One VM with a physical CPU per VCPU.

    Invariant: between two calls every exit is complete; `check` asserts those of all parts.

    Attributes:
        log: What the monitor did since `take_log`.
    """

    def __init__(
        self,
        spec: FormatSpec = IA32,
        scheme: Scheme | None = None,
        *,
        n_vcpus: int = 2,
        n_frames: int = 64,
        order: Order = Order.CORRECT,
        tlb: TlbGeometry | None = None,
        software: bool = False,
    ) -> None:
        """Put a machine together; with `software` the monitor fills the TLBs."""
        self.spec = spec
        scheme = scheme or patch()
        n_shadow = (scheme.options.shadow_pages + 8) * n_vcpus
        self.ram = Ram(n_frames + n_shadow)
        self.memory = MemoryManagement(self.ram, n_frames, identity=False, seed=1)
        self.matrix = compose_matrix(scheme, n_vcpus, order)
        self.traces = compose_traces(scheme, self.matrix)
        patches = scheme.propagate == "patch"
        policy = PatchChannels(self.matrix, scheme.options) if patches else ImmediateShootdown()
        shared = Shared(spec, scheme, self.memory, self.matrix, self.traces, policy)
        shared.company = Company() if scheme.shadow == "shared" else None
        self.submms = [SubVmm(i, shared) for i in range(n_vcpus)]
        geometry = tlb or TlbGeometry(64, 4, 4)
        buffer = compose_buffer(scheme)
        self.cpus = [
            PhysicalCpu(i, spec, self.ram, Tlb(spec, geometry), buffer=buffer)
            for i in range(n_vcpus)
        ]
        self.ports = [cpu.let_software_manage() for cpu in self.cpus] if software else []
        self._update = scheme.apply == "update"
        buffers = [cpu.write_buffer for cpu in self.cpus]
        self.readers = compose_readers(scheme, spec, self.memory, self.traces, buffers)
        self.oracle = Oracle(spec.name, n_vcpus, self.ram.bytes, self.ram.flags_array)
        self.log: list[Seen] = []
        self._next_frame = 1
        self._used = -1
        for cpu in self.cpus:
            self._watch(cpu)
        for gfn in range(n_frames):
            self.oracle.grant(gfn, self.memory.frame_view[gfn])

    def _watch(self, cpu: PhysicalCpu) -> None:
        def used(gva: int, kind: int, user: bool, pfn: int) -> None:
            self._used = pfn
            self.oracle.used(cpu.cpu_id, gva, kind, user, pfn)

        def flagged(hpa: int, size: int, old: int, new: int) -> None:
            self.oracle.store(hpa, size, old, new)

        cpu.on_used, cpu.on_flagged = used, flagged

    # ---- the guest's tables ---------------------------------------------------------------------

    def frame(self) -> int:
        """Return a guest frame not given out before."""
        self._next_frame += 1
        return self._next_frame - 1

    def entry(self, gpa: int) -> int:
        """Read a guest entry."""
        return self.memory.load(gpa, self.spec.entry_bytes)

    def at(self, table: int, level: int, gva: int) -> int:
        """Return where the entry for `gva` stands in a guest table."""
        index = self.spec.levels[level].index(gva)
        return (table << PAGE_SHIFT) + index * self.spec.entry_bytes

    def where(self, root: int, gva: int, level: int = 0) -> int:
        """Return the guest-physical address of the entry that translates `gva` at a level."""
        table = root
        for above in range(self.spec.top, level, -1):
            entry = self.entry(self.at(table, above, gva))
            assert entry & P, f"no table for {gva:#x} below level {above}"
            table = (entry & self.spec.frame_mask) >> PAGE_SHIFT
        return self.at(table, level, gva)

    def map(
        self, root: int, gva: int, gfn: int, flags: int = USED, *, level: int = 0, link: int = LINK
    ) -> int:
        """Map as a boot loader does, missing tables too; return the entry's gpa."""
        table = root
        for above in range(self.spec.top, level, -1):
            at = self.at(table, above, gva)
            if not self.entry(at) & P:
                bits = P if above == self.spec.top and self.spec.root_registers else link
                self.memory.store(at, self.spec.entry_bytes, self.frame() << PAGE_SHIFT | bits)
            table = (self.entry(at) & self.spec.frame_mask) >> PAGE_SHIFT
        at = self.at(table, level, gva)
        self.memory.store(at, self.spec.entry_bytes, gfn << PAGE_SHIFT | flags)
        return at

    def start(self, *roots: int, cr0: int = PROTECTED, cr4: int | None = None) -> None:
        """Let every VCPU start on a root; the last one serves those that have none of their own."""
        cr4 = CR4[self.spec.name] if cr4 is None else cr4
        efer = EFER_NXE if self.spec.has_nx else 0
        for i, submm in enumerate(self.submms):
            registers = submm.registers
            registers.cr0, registers.cr4, registers.efer = cr0, cr4, efer
            cr3 = roots[min(i, len(roots) - 1)] << PAGE_SHIFT
            assert self._load_root(i, cr3) is None
            self._set_modes(i)
            self.oracle.registers(i, cr0, cr3, cr4, efer)

    # ---- what a guest does ----------------------------------------------------------------------

    def access(self, vcpu: int, gva: int, kind: int = READ, *, user: bool = True) -> int | Faulted:
        """Access 4 bytes; return the guest frame used. A fault is delivered before it returns."""
        if kind == FETCH:
            return self._fetch(vcpu, gva, user)
        return self.do(vcpu, o.Store(gva, 4, 1) if kind == WRITE else o.Load(gva, 4), user=user)

    def store(
        self, vcpu: int, gva: int, value: int, *, size: int = 0, user: bool = False
    ) -> int | Faulted:
        """Store to a virtual address, an entry's width unless said; through traces as needed."""
        return self.do(vcpu, o.Store(gva, size or self.spec.entry_bytes, value), user=user)

    def do(self, vcpu: int, work: o.Operation, *, user: bool = False) -> int | Faulted:
        """Run one operation to its end or its fault; return the last guest frame it used."""
        at = 0
        for _ in range(2 * PAGE_BYTES):
            stop = self.cpus[vcpu].run(work, user, at)
            if isinstance(stop, Done):
                return self.memory.guest_of.get(self._used, -1)
            at = getattr(stop, "at", at)
            if isinstance(stop, BufferFull):
                error, at, done = self._buffer_full(vcpu, work, at, user)
            else:
                missed = self._miss(vcpu, stop, user)
                if missed is None:
                    continue
                error, at, done = self._page_fault(vcpu, missed, work, user)
            if error is not None:
                return error
            if done:
                return self.memory.guest_of.get(self._used, -1)
        raise AssertionError(f"{work} does not get on")

    def _fetch(self, vcpu: int, gva: int, user: bool) -> int | Faulted:
        cpu = self.cpus[vcpu]
        while (pfn := cpu.translate(gva, FETCH, user)) < 0:
            fault = self._miss(vcpu, cpu.fault(FETCH), user)
            if fault is None:
                continue
            error, _, _ = self._page_fault(vcpu, fault, o.Load(gva, 1), user)
            if error is not None:
                return error
        self.oracle.used(vcpu, gva, FETCH, user, pfn)
        return self.memory.guest_of.get(pfn, -1)

    def poke(self, vcpu: int, gpa: int, value: int, *, size: int = 0) -> None:
        """Store to guest-physical memory, as through a direct map that is never in the way."""
        size = size or self.spec.entry_bytes
        hpa = self.memory.hpa(gpa)
        assert hpa is not None
        keys = self.submms[vcpu].begin_store([(gpa, size)])
        old = self.ram.load(hpa, size)
        self.ram.store(hpa, size, value)  # 831
        if self.ram.flags[hpa >> PAGE_SHIFT] & FLAG_TABLE:
            self.oracle.store(hpa, size, old, value)
        self._finish_store(vcpu, keys)

    def invlpg(self, vcpu: int, gva: int) -> None:
        """Execute INVLPG."""
        self.tell_logged()
        self.submms[vcpu].event_invlpg(gva)
        self._flush(vcpu)
        self.oracle.event(vcpu, "INVLPG", gva)

    def load_cr3(self, vcpu: int, root: int, offset: int = 0) -> GeneralProtection | None:
        """Load CR3 with a guest frame, or an address in it; return why the CPU refuses."""
        self.tell_logged()
        cr3 = root << PAGE_SHIFT | offset
        refused = self._load_root(vcpu, cr3)
        if refused is None:
            self.oracle.event(vcpu, "CR3", cr3)
        return refused

    def load_cr0(self, vcpu: int, value: int) -> GeneralProtection | None:
        """Load CR0."""
        return self._load_mode(vcpu, 0, value)

    def load_cr4(self, vcpu: int, value: int) -> GeneralProtection | None:
        """Load CR4."""
        return self._load_mode(vcpu, 4, value)

    def _load_mode(self, vcpu: int, register: int, value: int) -> GeneralProtection | None:
        self.tell_logged()
        mode = mode_of(self.submms[vcpu].registers)
        refused = self.submms[vcpu].load_mode(register, value)
        if isinstance(refused, GeneralProtection):
            return refused
        self._set_modes(vcpu)
        self._flush(vcpu)
        in_another = mode_of(self.submms[vcpu].registers) != mode
        if self.submms[vcpu].shared.company is not None and in_another:
            self._load_root(vcpu, self.submms[vcpu].registers.cr3)
        self.oracle.event(vcpu, f"CR{register}", value)
        return None

    def untrace(self, gfn: int) -> None:
        """Stop tracing a guest frame: every VCPU forgets what it derived from it first."""
        for vcpu, submm in enumerate(self.submms):
            submm.drop_table(gfn)
            self._flush(vcpu)
        self.traces.remove(gfn)
        self.log.append(Seen("untraced", -1, gfn))

    def forget_frame(self, vcpu: int, gfn: int) -> None:
        """Let one VCPU forget where a guest frame lies."""
        self.submms[vcpu].forget_frame(gfn)
        self._flush(vcpu)

    def move_frame(self, gfn: int, *, keep: bool = False) -> None:
        """Let a guest frame lie in another machine frame; `keep`: tell nobody but the oracle."""
        if not keep:
            for vcpu in range(len(self.submms)):
                self.forget_frame(vcpu, gfn)
            self.traces.frame_moved()
        old = self.memory.move(gfn, self.memory.take_frame())
        self.oracle.grant(gfn, self.memory.frame_view[gfn])
        if old is not None:
            self.memory.give_frame(old)

    # ---- what the drivers do --------------------------------------------------------------------

    def _miss(self, vcpu: int, stop: Exit, user: bool) -> PageFault | None:
        """Fill a TLB that software manages from the shadow; the fault if there is one to answer."""
        if isinstance(stop, TlbMiss):
            if self.ports[vcpu].refill(stop.gva, stop.kind, user) is None:
                return None
            return PageFault(stop.gva, 0, stop.at, stop.kind)
        assert isinstance(stop, PageFault), stop
        return stop

    def _page_fault(
        self, vcpu: int, fault: PageFault, work: o.Operation, user: bool
    ) -> tuple[Faulted | None, int, bool]:
        """Answer a hardware fault: the guest's or None, where to go on, whether it is done."""
        self.tell_logged()
        while True:
            outcome = self.submms[vcpu].fault(fault.gva, fault.kind, user)
            if isinstance(outcome, PlaceTraces):
                self.place(outcome.gfns)
                continue
            self._flush(vcpu)
            if isinstance(outcome, Forward):
                return self._deliver(vcpu, fault.gva, outcome.error, user), 0, False
            if isinstance(outcome, Emulate):
                return self._emulate(vcpu, work, fault.at, user)
            assert isinstance(outcome, Hidden)
            self.log.append(Seen("hidden", vcpu, fault.gva))
            if self.ports:
                self.ports[vcpu].refill(fault.gva, fault.kind, user)  # 816
            return None, fault.at, False

    def _buffer_full(
        self, vcpu: int, work: o.Operation, at: int, user: bool
    ) -> tuple[Faulted | None, int, bool]:
        self.log.append(Seen("buffer full", vcpu))
        if not len(self.cpus[vcpu].write_buffer):
            return self._emulate(vcpu, work, at, user)
        self.tell_logged(vcpu)
        return None, at, False

    def tell_logged(self, *cpu_ids: int) -> None:
        """Read the guest write buffers of these CPUs, of all unless said."""
        for cpu_id in cpu_ids or range(len(self.readers)):
            submm, logged = self.submms[cpu_id], self.readers[cpu_id].take()
            if logged.lost:
                owed = submm.stores_lost()
                for consumer, other in enumerate(self.submms):
                    if owed >> consumer & 1:
                        other.forget_all()
                        self._flush(consumer)
                continue
            for base, offset in self.readers[cpu_id].entries(logged.stores):
                self._finish_store(cpu_id, submm.begin_store([(base | offset, 1)]))
            for gpa, size in logged.stores:
                gfn = gpa >> PAGE_SHIFT
                if submm.flooded(gfn, size == PAGE_BYTES):
                    self.untrace(gfn)

    def _emulate(
        self, vcpu: int, work: o.Operation, at: int, user: bool
    ) -> tuple[Faulted | None, int, bool]:
        submm, cpu = self.submms[vcpu], self.cpus[vcpu]
        accesses = cpu.next_accesses(work, at)
        gpas: list[int] = []
        for gva, _, kind in accesses:
            while isinstance(gpa := submm.guest_address(gva, kind, user), PlaceTraces):
                self.place(gpa.gfns)
            if isinstance(gpa, Forward):
                return self._deliver(vcpu, gva, gpa.error, user), 0, False
            assert isinstance(gpa, int), "frames move here, none is absent or shared"
            gpas.append(gpa)
        written = [
            (gpa, n) for gpa, (_, n, kind) in zip(gpas, accesses, strict=True) if kind == WRITE
        ]
        hpas = [self.memory.hpa(gpa) or self.ram.n_frames << PAGE_SHIFT for gpa in gpas]
        keys = submm.begin_store(written)
        done, at = cpu.complete(work, at, hpas)  # 831
        for (gva, _, kind), hpa in zip(accesses, hpas, strict=True):
            self._used = hpa >> PAGE_SHIFT
            self.oracle.used(vcpu, gva, kind, user, self._used)
        self.log.append(Seen("emulated", vcpu, accesses[-1][0]))
        self._finish_store(vcpu, keys)
        for gpa, _ in written if keys else ():
            if submm.flooded(gpa >> PAGE_SHIFT, _overwrites_page(work, at, gpa)):
                self.untrace(gpa >> PAGE_SHIFT)
        return None, at, done is not None

    def _finish_store(self, vcpu: int, keys: list[Key]) -> None:
        submm = self.submms[vcpu]
        for key, consumers in submm.finish_store(keys):  # 844
            blockers = submm.blockers(consumers)
            for consumer, other in enumerate(self.submms):
                if blockers >> consumer & 1:
                    other.event_all()
                    self.log.append(Seen("drained", consumer, key))
                    self._flush(consumer)
            if blockers:
                consumers = submm.tell(key, consumers)
            for consumer, other in enumerate(self.submms):
                if consumers >> consumer & 1:
                    other.shoot_down(key)
                    self.log.append(Seen("shot down", consumer, key))
                    self._flush(consumer)
        submm.end_store(keys)

    def place(self, gfns: tuple[int, ...]) -> None:
        """Place write traces: in force when every CPU has lost its right to write (T1-T4)."""
        for gfn in gfns:
            if gfn in self.traces:
                continue
            self.traces.place(gfn)
            self.log.append(Seen("traced", -1, gfn))
            for vcpu, submm in enumerate(self.submms):
                submm.revoke_write(gfn)
                self._flush(vcpu)

    def _deliver(self, vcpu: int, gva: int, error: int, user: bool) -> Faulted:
        submm = self.submms[vcpu]
        submm.registers.cr2 = gva
        submm.event_fault(gva)
        self._flush(vcpu)
        self.log.append(Seen("delivered", vcpu, error))
        self.oracle.fault(vcpu, gva, error, user)
        return Faulted(error)

    def _load_root(self, vcpu: int, cr3: int) -> GeneralProtection | None:
        while isinstance(root := self.submms[vcpu].load_root(cr3), PlaceTraces):
            self.place(root.gfns)
        if isinstance(root, GeneralProtection):
            return root
        self._flush(vcpu)
        assert self.cpus[vcpu].load_root(root) is None
        return None

    def _set_modes(self, vcpu: int) -> None:
        # The hardware's WP stays set: a supervisor's store to a read-only page must exit.
        registers = self.submms[vcpu].registers
        cpu = self.cpus[vcpu]
        nxe = bool(registers.efer & EFER_NXE)
        cpu.set_modes(wp=True, pse=False, pge=bool(registers.cr4 & CR4_PGE), nxe=nxe)
        cpu.set_smep(bool(registers.cr4 & CR4_SMEP))
        cpu.flush_all()

    def _flush(self, vcpu: int) -> None:
        shared = self.submms[vcpu].shared.company is not None
        for each in range(len(self.cpus)) if shared else (vcpu,):
            space = self.submms[each].space
            if space.take_reload() and space.root is not None:
                self.log.append(Seen("reloaded", each))
                assert self.cpus[each].load_root(space.root.pfn << PAGE_SHIFT) is None
            for gva in self.submms[each].take_flushes():
                if gva == FLUSH_ALL:
                    self.cpus[each].flush_all()
                elif self.ports and self._update:
                    self.ports[each].renew(gva)  # 876
                else:
                    self.cpus[each].invlpg(gva)

    # ---- what a test asks -----------------------------------------------------------------------

    def take_log(self) -> list[Seen]:
        """Return what the monitor did since the last call."""
        log, self.log = self.log, []
        return log

    def assert_coherent(self) -> None:
        """Assert that the oracle has refused nothing and every part is in order."""
        self.check()
        verdict = self.oracle.verdict()
        assert verdict.coherent, verdict.explain()

    def check(self) -> None:
        """Assert the invariants of all parts, and those between hardware and monitor."""
        self.memory.check()
        self.matrix.check()
        self.oracle.check()
        pages: set[ShadowPage] = set()
        for submm, cpu in zip(self.submms, self.cpus, strict=True):
            submm.check()
            cpu.tlb.check()
            for index in range(self.spec.root_registers if submm.space.root else 0):
                assert submm.space.root is not None
                held = cpu.reg[m.R_TOP + index] & ((1 << 64) - 1)
                assert held == submm.space.entry(submm.space.root, index), "registers are behind"
            frames = [page.pfn for page in submm.space.all_pages()]
            pages.update(submm.space.all_pages())
            for value in cpu.tlb.entries().values():
                gfn = self.memory.guest_of.get(value >> PAGE_SHIFT, -1)
                guarded = value & m.E_MARKED and not self.traces.emulates(gfn)
                escapes = value & m.E_W and gfn in self.traces and not guarded
                assert not escapes, f"frame {gfn} writable in a TLB"
            assert psc_frames(cpu.tlb) <= set(frames), "a dropped shadow page may be walked"
        taken = {page.pfn for page in pages}
        assert len(taken) == len(pages), "a frame serves two shadow pages"
        assert not taken & set(self.memory.guest_of)


def psc_frames(tlb: Tlb) -> set[int]:
    """Return the frames of the tables that the paging-structure cache points at."""
    slots, base = tlb.view[m.TLB_PSC], tlb.view[m.TLB_PSC_BASE]
    rows = tlb.array[base:].reshape(-1, 2, slots)
    keys, values = rows[:, 0].ravel(), rows[:, 1].ravel()
    return {int(value) >> PAGE_SHIFT for key, value in zip(keys, values, strict=True) if key != -1}


def _overwrites_page(work: o.Operation, at: int, gpa: int) -> bool:
    """Tell whether the step just done (`at` is where the rest starts) began a whole page's fill."""
    if not isinstance(work, o.Fill) or gpa & (PAGE_BYTES - 1):
        return False
    return work.n_bytes - (at - 8) >= PAGE_BYTES
