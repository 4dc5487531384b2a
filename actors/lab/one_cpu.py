"""One virtual CPU without an event loop, on bare hardware or under a monitor's shadow tables.

What the drivers of `actors/machine` do between the parts is done here in plain calls, for a guest
that executes single accesses: no sibling, no interrupt, no store to its own tables.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from penumbra.actors.vmm.compose import (
    compose_buffer,
    compose_matrix,
    compose_readers,
    compose_sub_vmms,
    compose_traces,
)
from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.fill import Emulate, Forward, PlaceTraces
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.nested import SecondLevel, frames_for
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.walk import GuestRegisters, GuestWalker
from penumbra.hw import operations as o
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import BufferFull, Done, Exit, PageFault
from penumbra.hw.formats import CR0_WP, CR4_PGE, CR4_PSE, PAGE_BYTES, PAGE_SHIFT, FormatSpec
from penumbra.hw.memory import Ram
from penumbra.hw.streams import FETCH, READ, WRITE
from penumbra.hw.tlb import Tlb, TlbGeometry

_SMALL_TLB = TlbGeometry(16, 4, 4)
_MONITOR_FRAMES = 64


class Fetch(msgspec.Struct, frozen=True):
    """An instruction fetch of `size` bytes: no operation of a guest, which only names data."""

    gva: int
    size: int


Access = o.Load | o.Store | o.Exchange | o.XorMemory | Fetch


class OneCpu(Protocol):
    """What a single access runs on. Addresses are guest-physical.

    Attributes:
        ram: Machine memory.
        frame_map: int64[n], the machine frame behind each guest frame.
        used: Where the last access went: the address of its first byte on each page.
    """

    ram: Ram
    frame_map: npt.NDArray[np.int64]
    used: list[int]

    def start(self, cr0: int, cr3: int, cr4: int) -> None:
        """Begin with these registers, and with nothing cached or derived."""

    def access(self, work: Access, user: bool) -> Exit:
        """Run one access to its end or to the fault that the guest sees."""
        ...


class Bare:
    """The hardware walks the guest's own tables."""

    def __init__(self, spec: FormatSpec, n_frames: int, ram: Ram | None = None) -> None:
        self.ram = ram or Ram(n_frames)
        self.frame_map = np.arange(n_frames, dtype=np.int64)
        self.used: list[int] = []
        self._cpu = PhysicalCpu(0, spec, self.ram, Tlb(spec, _SMALL_TLB))
        self._cpu.on_used = self._note

    def _note(self, gva: int, kind: int, user: bool, pfn: int) -> None:
        self.used.append((pfn << PAGE_SHIFT) | (gva & (PAGE_BYTES - 1)))

    def start(self, cr0: int, cr3: int, cr4: int) -> None:
        _set_modes(self._cpu, cr0, cr4, pse=bool(cr4 & CR4_PSE))
        self._cpu.flush_all()
        self._cpu.load_root(cr3)

    def access(self, work: Access, user: bool) -> Exit:
        self.used.clear()
        return _run(self._cpu, work, user)


class Nested(Bare):
    """The hardware walks the guest's own tables through a second-level table."""

    def __init__(self, spec: FormatSpec, n_frames: int) -> None:
        ram = Ram(n_frames + frames_for(n_frames))
        super().__init__(spec, n_frames, ram)
        self._memory = MemoryManagement(ram, n_frames, identity=False, seed=1)
        self.frame_map = self._memory.frame_map
        self._second_level = SecondLevel(self._memory)
        self._cpu.load_second_level(self._second_level.root)
        self._registers = GuestRegisters()
        self._walker = GuestWalker(spec, self._memory)

    def _note(self, gva: int, kind: int, user: bool, pfn: int) -> None:
        gfn = _guest_frame(self._memory, self._walker, self._registers, gva, pfn)
        super()._note(gva, kind, user, gfn)

    def start(self, cr0: int, cr3: int, cr4: int) -> None:
        self._registers = GuestRegisters(cr0=cr0, cr3=cr3, cr4=cr4)
        super().start(cr0, cr3, cr4)

    def access(self, work: Access, user: bool) -> Exit:
        while True:
            stop = super().access(work, user)
            if not isinstance(stop, PageFault) or stop.gpa < 0:
                return stop
            self._second_level.back(stop.gpa)


class Monitored:
    """A sub-VMM between guest and hardware: the CPU walks shadow tables in machine RAM."""

    def __init__(self, spec: FormatSpec, scheme: Scheme, n_frames: int) -> None:
        self.ram = Ram(n_frames + _MONITOR_FRAMES)
        self._memory = MemoryManagement(self.ram, n_frames, identity=False, seed=1)
        self.frame_map = self._memory.frame_map
        self.used: list[int] = []
        self._spec, self._scheme = spec, scheme
        buffer = compose_buffer(scheme)
        self._cpu = PhysicalCpu(0, spec, self.ram, Tlb(spec, _SMALL_TLB), buffer=buffer)
        self._cpu.on_used = self._note
        self._pfns: list[tuple[int, int]] = []
        self._walker = GuestWalker(spec, self._memory)
        self._submm = self._build()

    def _build(self) -> SecondaryData:
        """Return a sub-VMM that has derived nothing and traces nothing."""
        scheme, spec, memory = self._scheme, self._spec, self._memory
        matrix = compose_matrix(scheme, 1)
        self._traces = traces = compose_traces(scheme, matrix)
        self._readers = compose_readers(scheme, spec, memory, traces, [self._cpu.write_buffer])
        memory.take_all_back()
        return compose_sub_vmms(scheme, spec, memory, matrix, traces)[0]

    def _note(self, gva: int, kind: int, user: bool, pfn: int) -> None:
        self._pfns.append((gva, pfn))

    def start(self, cr0: int, cr3: int, cr4: int) -> None:
        submm = self._submm = self._build()
        submm.registers.cr0, submm.registers.cr4 = cr0, cr4
        # The hardware's WP stays set: a supervisor's store to a read-only page must exit.
        _set_modes(self._cpu, cr0 | CR0_WP, cr4, pse=True)
        self._cpu.flush_all()
        while isinstance(root := submm.load_root(cr3), PlaceTraces):
            self._place(root.gfns)
        assert isinstance(root, int), root
        self._cpu.load_root(root)

    def access(self, work: Access, user: bool) -> Exit:
        if (root := self._submm.privilege(user)) is not None:
            self._cpu.load_root(root)
        while True:
            self._pfns.clear()
            stop: Exit | None = _run(self._cpu, work, user)
            if isinstance(stop, PageFault):
                stop = self._page_fault(stop, work, user)
            elif isinstance(stop, BufferFull):
                stop = self._buffer_full(work, user)
            if stop is not None:
                self.used = [self._guest_address(gva, pfn) for gva, pfn in self._pfns]
                return stop

    def _page_fault(self, fault: PageFault, work: Access, user: bool) -> Exit | None:
        """Answer a hardware fault; None is to run again."""
        self._tell_logged()
        while isinstance(outcome := self._submm.fault(fault.gva, fault.kind, user), PlaceTraces):
            self._place(outcome.gfns)
        self._flush()
        if isinstance(outcome, Forward):
            return self._deliver(fault.gva, outcome.error, fault.kind)
        if isinstance(outcome, Emulate):
            assert not isinstance(work, Fetch), "a fetch is never emulated"
            return self._emulate(work, user)
        return None

    def _buffer_full(self, work: Access, user: bool) -> Exit | None:
        """Make room for the next store's records; None is to run again."""
        if len(self._cpu.write_buffer):
            self._tell_logged()
            return None
        assert not isinstance(work, Fetch), "a fetch stores nothing"
        return self._emulate(work, user)

    def _tell_logged(self) -> None:
        """Read the guest write buffer; the only consumer is this VCPU."""
        for reader in self._readers:
            logged = reader.take()
            if logged.lost and self._submm.stores_lost():
                self._submm.forget_all()
            for base, offset in reader.entries(logged.stores):
                self._finish(self._submm.begin_store([(base | offset, 1)]))

    def _deliver(self, gva: int, error: int, kind: int) -> PageFault:
        self._submm.event_fault(gva)
        self._flush()
        return PageFault(gva, error, 0, kind)

    def _emulate(self, work: o.Operation, user: bool) -> Exit:
        accesses = self._cpu.next_accesses(work, 0)
        hpas: list[int] = []
        parts: list[tuple[int, int]] = []
        for gva, n, kind in accesses:
            while isinstance(gpa := self._submm.guest_address(gva, kind, user), PlaceTraces):
                self._place(gpa.gfns)
            if isinstance(gpa, Forward):
                return self._deliver(gva, gpa.error, kind)
            assert isinstance(gpa, int), "no frame moves here"
            hpa = self._memory.hpa(gpa)
            hpas.append(NOWHERE << PAGE_SHIFT if hpa is None else hpa)
            if kind == WRITE:
                parts.append((gpa, n))
        keys = self._submm.begin_store(parts)
        done, _ = self._cpu.complete(work, 0, hpas)  # 831
        assert done is not None, "a single access is complete in one step"
        self._finish(keys)
        self._flush()
        self._pfns = [
            (gva, hpa >> PAGE_SHIFT) for (gva, _, _), hpa in zip(accesses, hpas, strict=True)
        ]
        return done

    def _finish(self, keys: list[Key]) -> None:
        for key, _ in self._submm.finish_store(keys):  # 844: the only consumer is this VCPU
            self._submm.shoot_down(key)
        self._submm.end_store(keys)

    def _place(self, gfns: tuple[int, ...]) -> None:
        for gfn in gfns:
            if gfn not in self._traces:
                self._traces.place(gfn)
                self._submm.revoke_write(gfn)
        self._flush()

    def _flush(self) -> None:
        for gva in self._submm.take_flushes():
            if gva == FLUSH_ALL:
                self._cpu.flush_all()
            else:
                self._cpu.invlpg(gva)

    def _guest_address(self, gva: int, pfn: int) -> int:
        """Return the guest-physical address behind a machine frame that was used."""
        registers = self._submm.registers
        gfn = _guest_frame(self._memory, self._walker, registers, gva, pfn)
        return (gfn << PAGE_SHIFT) | (gva & (PAGE_BYTES - 1))


def _guest_frame(
    memory: MemoryManagement, walker: GuestWalker, registers: GuestRegisters, gva: int, pfn: int
) -> int:
    """Return the guest frame behind a machine frame that an access to `gva` used.

    All frames beyond RAM share one machine frame; which one it was, the guest's tables say.
    """
    gfn = memory.guest_of.get(pfn, -1)
    if gfn < 0 and pfn == NOWHERE:
        walker.resolve(registers, gva, READ, False)
        gfn = walker.frame(gva)
    return gfn


def refusal(scheme: Scheme) -> str | None:
    """Say why a scheme has no form with one CPU here, or None."""
    if scheme.shadow in ("none", "per-cpu", "per-privilege", "shared", "nested"):
        return None
    return f"scheme {scheme.name!r}: single accesses run natively or on shadows of one CPU"


def one_cpu(spec: FormatSpec, scheme: Scheme, n_frames: int) -> OneCpu:
    """Build what a scheme's guest runs on, with `n_frames` guest frames."""
    if scheme.shadow == "nested":
        return Nested(spec, n_frames)
    return Bare(spec, n_frames) if scheme.shadow == "none" else Monitored(spec, scheme, n_frames)


def _set_modes(cpu: PhysicalCpu, cr0: int, cr4: int, *, pse: bool) -> None:
    cpu.set_modes(wp=bool(cr0 & CR0_WP), pse=pse, pge=bool(cr4 & CR4_PGE), nxe=False)


def _run(cpu: PhysicalCpu, work: Access, user: bool) -> Exit:
    return _fetch(cpu, work, user) if isinstance(work, Fetch) else cpu.run(work, user)


def _fetch(cpu: PhysicalCpu, work: Fetch, user: bool) -> Exit:
    """Fetch instruction bytes, page by page; nothing is read: what they are does not matter."""
    last = (work.gva + work.size - 1) & 0xFFFF_FFFF
    pages = [work.gva] if work.gva >> PAGE_SHIFT == last >> PAGE_SHIFT else [work.gva, last & -4096]
    for gva in pages:
        pfn = cpu.translate(gva, FETCH, user)
        if pfn < 0:
            return cpu.fault(FETCH)
        assert cpu.on_used is not None
        cpu.on_used(gva, FETCH, user, pfn)
    return Done()
