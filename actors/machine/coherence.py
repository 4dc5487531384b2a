"""What a VCPU does about its translations when something happens: bare hardware, or a monitor.

Both answer the same calls, so the VCPU's driver knows no scheme. `BareHardware` lets the CPU walk
the guest's own tables (`native`). `Monitored` asks the VCPU's consumer and producer; every scheme
with shadow tables is one composition of policies behind them.
"""

from __future__ import annotations

from typing import Protocol

from penumbra.actors.machine.messages import (
    Complete,
    DropTable,
    EmulateStore,
    FaultDelivered,
    Invalidate,
    LoadRoot,
    ModeLoaded,
    PageInvalidated,
    PrivilegeChanged,
    ProducerOrder,
    ProducerReply,
    Ran,
    Repair,
    Repaired,
    RevokeWrite,
    RootLoaded,
    SetModes,
    Stored,
    TracesWanted,
    TruePageFault,
)
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.submm import ConsumerRef, CpuRef
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import ActorRef
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import GuestRegisters, registers_flush
from penumbra.hw.exits import Done, PageFault
from penumbra.hw.formats import CR0_PG, CR0_WP, CR4_PGE, CR4_PSE, EFER_NXE, PAGE_SHIFT
from penumbra.hw.operations import LoadPhysical, Operation, Physical

ProducerRef = ActorRef[ProducerOrder, ProducerReply]


class Coherence(Protocol):
    """What the driver of one VCPU asks for. Each coherency event is over when the call returns."""

    registers: GuestRegisters

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | Ran | None:
        """Answer a hardware fault: deliver it, take this progress, or run again (None)."""

    def deliver(self, gva: int) -> None:
        """A page fault goes to the guest: a coherency event at that page."""

    def invlpg(self, gva: int) -> None:
        """The guest executed INVLPG."""

    def load_root(self, cr3: int) -> None:
        """The guest loaded CR3."""

    def load_mode(self, register: int, value: int) -> None:
        """The guest loaded CR0 or CR4."""

    def physical(self, work: Physical) -> int:
        """Do an access to guest-physical memory; return what was there, 0 for a plain store."""
        ...

    def privilege(self, user: bool) -> None:
        """The VCPU entered or left user mode."""

    def note_exit(self, reason: str) -> None:
        """A privileged operation trapped for `reason`."""


def hardware_modes(registers: GuestRegisters, *, flush: bool = True) -> SetModes:
    """Return what the hardware's mode bits are without a monitor: the guest's own."""
    return SetModes(
        bool(registers.cr0 & CR0_WP),
        bool(registers.cr4 & CR4_PSE),
        bool(registers.cr4 & CR4_PGE),
        bool(registers.efer & EFER_NXE),
        bool(registers.cr0 & CR0_PG),
        flush,
    )


class BareHardware:
    """No monitor: events act on the CPU and faults go to the guest as the hardware raised them."""

    def __init__(self, vcpu_id: int, cpu: CpuRef, observer: Observer) -> None:
        self.registers = GuestRegisters()
        self._vcpu = vcpu_id
        self._cpu = cpu
        self._observer = observer

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | Ran | None:
        return TruePageFault(fault.gva, fault.error, fault.kind)

    def deliver(self, gva: int) -> None:
        # The hardware's own fault has dropped what was cached for the page (SDM vol. 3, 4.10.4.1).
        self.registers.cr2 = gva

    def invlpg(self, gva: int) -> None:
        self._cpu.ask_nowait(Invalidate((gva,)))

    def load_root(self, cr3: int) -> None:
        self.registers.cr3 = cr3
        self._cpu.ask_nowait(LoadRoot(cr3))

    def load_mode(self, register: int, value: int) -> None:
        flush = registers_flush(self.registers, register, value)
        self._cpu.ask_nowait(hardware_modes(self.registers, flush=flush))

    def physical(self, work: Physical) -> int:
        ran = self._cpu.ask_nowait(Complete(work, False, 0, (work.gpa,)))
        assert isinstance(ran.exit, Done)
        return ran.exit.value

    def privilege(self, user: bool) -> None:
        pass

    def note_exit(self, reason: str) -> None:
        pass


class Monitored:
    """Shadow tables: every fault and every event exits to the VCPU's sub-VMM."""

    def __init__(
        self,
        vcpu_id: int,
        registers: GuestRegisters,
        producer: ProducerRef,
        consumers: list[ConsumerRef],
        traces: WriteTraces,
        per_privilege: bool,
        observer: Observer,
    ) -> None:
        self.registers = registers
        self._vcpu = vcpu_id
        self._producer = producer
        self._consumers = consumers
        self._consumer = consumers[vcpu_id]
        self._traces = traces
        self._per_privilege = per_privilege
        self._observer = observer

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | Ran | None:
        while True:
            reply = self._consumer.ask_nowait(Repair(fault.gva, fault.kind, user))
            if isinstance(reply, TracesWanted):
                self._place(reply.gfns)
            elif isinstance(reply, TruePageFault):
                self.note_exit("true fault")
                return reply
            elif isinstance(reply, Repaired):
                self.note_exit("hidden fault")
                return None
            else:
                self.note_exit("traced store")
                return self._emulate(work, user, fault.at)

    def _emulate(self, work: Operation, user: bool, at: int) -> TruePageFault | Ran:
        while True:
            reply = self._producer.ask_nowait(EmulateStore(work, user, at))
            if isinstance(reply, Stored):
                for gfn in reply.drop:
                    self._untrace(gfn)
                return reply.ran
            if isinstance(reply, TruePageFault):
                return reply
            assert isinstance(reply, TracesWanted)
            self._place(reply.gfns)

    def _place(self, gfns: tuple[int, ...]) -> None:
        """Place write traces; they are in force when every CPU has answered (T1-T4)."""
        for gfn in gfns:
            if gfn in self._traces:
                continue
            self._traces.place(gfn)
            self._observer.count(self._vcpu, "trace_placed")
            self._observer.note(self._vcpu, EventKind.TRACE_PLACED, 0, gfn)
            for consumer in self._consumers:
                consumer.ask_nowait(RevokeWrite(gfn))

    def _untrace(self, gfn: int) -> None:
        for consumer in self._consumers:
            consumer.ask_nowait(DropTable(gfn))
        self._traces.remove(gfn)
        self._observer.count(self._vcpu, "trace_removed")
        self._observer.note(self._vcpu, EventKind.TRACE_REMOVED, 0, gfn)

    def deliver(self, gva: int) -> None:
        self._event()
        self._consumer.ask_nowait(FaultDelivered(gva))

    def invlpg(self, gva: int) -> None:
        self._event()
        self._consumer.ask_nowait(PageInvalidated(gva))

    def load_root(self, cr3: int) -> None:
        self._event()
        self._load_root(cr3)

    def _load_root(self, cr3: int) -> None:
        while isinstance(reply := self._consumer.ask_nowait(RootLoaded(cr3)), TracesWanted):
            self._place(reply.gfns)

    def load_mode(self, register: int, value: int) -> None:
        self._event()
        paged = self.registers.paging
        self._consumer.ask_nowait(ModeLoaded(register, value))
        if self.registers.paging != paged:
            self._load_root(self.registers.cr3)

    def physical(self, work: Physical) -> int:
        if work.gpa >> PAGE_SHIFT in self._traces and not isinstance(work, LoadPhysical):
            self.note_exit("traced store")
        ran = self._emulate(work, False, 0)
        assert isinstance(ran, Ran) and isinstance(ran.exit, Done)
        return ran.exit.value

    def privilege(self, user: bool) -> None:
        if self._per_privilege:
            self.note_exit("privilege")
            self._consumer.ask_nowait(PrivilegeChanged(user))

    def _event(self) -> None:
        self._observer.count(self._vcpu, "coherency_event")

    def note_exit(self, reason: str) -> None:
        self._observer.exit(self._vcpu, reason)
