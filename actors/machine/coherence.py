"""What a VCPU does about its translations when something happens: bare hardware, or a monitor.

Both answer the same calls, so the VCPU's driver knows no scheme. `BareHardware` lets the CPU walk
the guest's own tables (`native`). `Monitored` asks the VCPU's consumer and producer; every scheme
with shadow tables is one composition of policies behind them.
"""

from __future__ import annotations

from typing import Protocol

from penumbra.actors.machine.control import Control
from penumbra.actors.machine.frames import FramesOf
from penumbra.actors.machine.logged import WriteBuffers
from penumbra.actors.machine.mappings import give_trace_up
from penumbra.actors.machine.messages import (
    Complete,
    ConsumerOrder,
    ConsumerReply,
    EmulateStore,
    FaultDelivered,
    Followed,
    FrameWanted,
    Invalidate,
    LoadRoot,
    MachineChecked,
    Missed,
    ModeLoaded,
    PageInvalidated,
    PrivilegeChanged,
    ProducerOrder,
    ProducerReply,
    Ran,
    Refill,
    Refused,
    Repair,
    Repaired,
    RevokeWrite,
    RootLoaded,
    SetModes,
    Stored,
    StoreWanted,
    TablesFreed,
    TracesWanted,
    TruePageFault,
)
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.machine.submm import ConsumerRef
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import ActorRef
from penumbra.actors.vmm.shared_shadow import mode_of
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import GuestRegisters, registers_flush
from penumbra.hw.control import reloads_top
from penumbra.hw.exits import Done, GeneralProtection, PageFault, TlbMiss
from penumbra.hw.formats import CR0_PG, CR0_WP, CR4_PGE, CR4_PSE, CR4_SMEP, EFER_NXE, PAGE_SHIFT
from penumbra.hw.operations import LoadPhysical, MappingChanged, Operation, Physical

ProducerRef = ActorRef[ProducerOrder, ProducerReply]


class Coherence(Protocol):
    """What the driver of one VCPU asks for. Each coherency event is over when the call returns."""

    registers: GuestRegisters

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | MachineChecked | Ran | None:
        """Answer a hardware fault: deliver it, take this progress, or run again (None)."""

    def tlb_miss(
        self, miss: TlbMiss, work: Operation, user: bool
    ) -> TruePageFault | MachineChecked | Ran | None:
        """Answer a miss of a TLB that software manages, as `page_fault` answers."""

    def buffer_full(self, work: Operation, user: bool, at: int) -> TruePageFault | Ran | None:
        """Make room in the CPU's guest write buffer; answer as `page_fault` does."""

    def deliver(self, gva: int) -> None:
        """A page fault goes to the guest: a coherency event at that page."""

    def invlpg(self, gva: int) -> None:
        """The guest executed INVLPG."""

    def load_root(self, cr3: int) -> GeneralProtection | None:
        """The guest loads CR3; return why its CPU refuses, if it does."""
        ...

    def load_mode(self, register: int, value: int) -> GeneralProtection | None:
        """The guest loads CR0 or CR4; return why its CPU refuses, if it does."""
        ...

    def physical(self, work: Physical) -> int | GeneralProtection:
        """Do an access at a guest-physical address; return what was there, 0 for a plain store."""
        ...

    def mapping_changed(self, work: MappingChanged) -> int:
        """The guest says what its tables map otherwise; return who will follow by itself."""
        ...

    def privilege(self, user: bool) -> None:
        """The VCPU entered or left user mode."""

    def note_exit(self, reason: str) -> None:
        """The hardware trapped into the monitor for `reason`."""

    def privileged(self, reason: str) -> None:
        """The guest's kernel executed what a monitor may have to have control of."""

    def ran_supervisor(self, spent: int) -> None:
        """The guest's kernel made progress of its own."""


def hardware_modes(
    registers: GuestRegisters, *, flush: bool = True, reload: bool = False
) -> SetModes:
    """Return what the hardware's mode bits are without a monitor: the guest's own."""
    return SetModes(
        bool(registers.cr0 & CR0_WP),
        bool(registers.cr4 & CR4_PSE),
        bool(registers.cr4 & CR4_PGE),
        bool(registers.efer & EFER_NXE),
        bool(registers.cr0 & CR0_PG),
        flush,
        reload,
        smep=bool(registers.cr4 & CR4_SMEP),
    )


def value_of(ran: Ran) -> int | GeneralProtection:
    """Return what an operation that is over has read, or why it was refused."""
    assert isinstance(ran.exit, Done | GeneralProtection)
    return ran.exit.value if isinstance(ran.exit, Done) else ran.exit


class BareHardware:
    """No monitor: events act on the CPU and faults go to the guest as the hardware raised them."""

    def __init__(self, vcpu_id: int, cpu: Seat, observer: Observer) -> None:
        self.registers = GuestRegisters()
        self._vcpu = vcpu_id
        self._cpu = cpu
        self._observer = observer

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | Ran | None:
        return TruePageFault(fault.gva, fault.error, fault.kind)

    def tlb_miss(self, miss: TlbMiss, work: Operation, user: bool) -> TruePageFault | Ran | None:
        self._observer.count(self._vcpu, "tlb_refill")
        stop = self._cpu.ask_nowait(Refill(miss.gva, miss.kind, user)).exit
        return self.page_fault(stop, work, user) if isinstance(stop, PageFault) else None

    def buffer_full(self, work: Operation, user: bool, at: int) -> TruePageFault | Ran | None:
        raise AssertionError("no entry of a guest's own tables is marked")

    def deliver(self, gva: int) -> None:
        # The hardware's own fault has dropped what was cached for the page (SDM vol. 3, 4.10.4.1).
        self.registers.cr2 = gva

    def invlpg(self, gva: int) -> None:
        self._cpu.ask_nowait(Invalidate((gva,)))

    def load_root(self, cr3: int) -> GeneralProtection | None:
        refused = self._cpu.ask_nowait(LoadRoot(cr3)).exit
        if isinstance(refused, GeneralProtection):
            return refused
        self.registers.cr3 = cr3
        return None

    def load_mode(self, register: int, value: int) -> GeneralProtection | None:
        registers = self.registers
        before = registers.cr0, registers.cr4
        reload = reloads_top(*before, register, value)
        flush = registers_flush(registers, register, value)
        ran = self._cpu.ask_nowait(hardware_modes(registers, flush=flush, reload=reload))
        if isinstance(ran.exit, GeneralProtection):
            registers.cr0, registers.cr4 = before
            return ran.exit
        return None

    def physical(self, work: Physical) -> int | GeneralProtection:
        return value_of(self._cpu.ask_nowait(Complete(work, False, 0, (work.gpa,))))

    def mapping_changed(self, work: MappingChanged) -> int:
        return 0

    def privilege(self, user: bool) -> None:
        pass

    def note_exit(self, reason: str) -> None:
        pass

    def privileged(self, reason: str) -> None:
        pass

    def ran_supervisor(self, spent: int) -> None:
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
        control: Control,
        observer: Observer,
        buffers: WriteBuffers,
        frames: FramesOf,
        *,
        shares: bool = False,
        devices: range = range(0),
    ) -> None:
        self.registers = registers
        self._frames = frames
        self._vcpu = vcpu_id
        self._producer = producer
        self._consumers = consumers
        self._consumer = consumers[vcpu_id]
        self._traces = traces
        self._per_privilege = per_privilege
        self._control = control
        self._shares = shares
        self._devices = devices
        self._observer = observer
        self._buffers = buffers

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | MachineChecked | Ran | None:
        self._untrace_all(self._buffers.tell_all(self._vcpu))  # a fill may link what is behind
        while True:
            reply = self._ask(Repair(fault.gva, fault.kind, user))
            if type(reply) is Repaired:
                self.note_exit("hidden fault")
                return None
            if type(reply) is StoreWanted:
                if reply.device:
                    self.note_exit("device")
                else:
                    self._traced_store(user)
                return self._emulate(work, user, fault.at)
            if isinstance(reply, TruePageFault):
                self.note_exit("true fault")
                return reply
            if isinstance(reply, MachineChecked):
                self.note_exit("machine check")
                return reply
            assert isinstance(reply, FrameWanted | TracesWanted)
            self._provide(reply)

    def tlb_miss(
        self, miss: TlbMiss, work: Operation, user: bool
    ) -> TruePageFault | MachineChecked | Ran | None:
        reply = self._consumer.ask_nowait(Missed(miss.gva, miss.kind, user))
        if isinstance(reply, Repaired):
            self.note_exit("tlb miss")
            return None
        return self.page_fault(PageFault(miss.gva, 0, miss.at, miss.kind), work, user)

    def buffer_full(self, work: Operation, user: bool, at: int) -> TruePageFault | Ran | None:
        self.note_exit("buffer full")
        if self._buffers.is_empty(self._vcpu):
            return self._emulate(work, user, at)  # one store needs more records than there are
        self._untrace_all(self._buffers.tell_one(self._vcpu))
        return None

    def _ask(self, order: ConsumerOrder) -> ConsumerReply:
        """Ask this VCPU's consumer; CPUs that still walk what it freed flush at once."""
        reply = self._consumer.ask_nowait(order)
        if (type(reply) is Repaired or type(reply) is Followed) and reply.remote:
            for i, consumer in enumerate(self._consumers):
                if reply.remote >> i & 1:
                    self._observer.count(self._vcpu, "ipi")
                    consumer.ask_nowait(TablesFreed())
        return reply

    def _emulate(self, work: Operation, user: bool, at: int) -> TruePageFault | Ran:
        while True:
            reply = self._producer.ask_nowait(EmulateStore(work, user, at))
            if type(reply) is Stored:
                for gfn in reply.drop:
                    self._untrace(gfn)
                return reply.ran
            if isinstance(reply, TruePageFault):
                return reply
            assert isinstance(reply, FrameWanted | TracesWanted)
            self._provide(reply)

    def _provide(self, wanted: FrameWanted | TracesWanted) -> None:
        """Do what passive code cannot, and needs before it is asked again."""
        if isinstance(wanted, FrameWanted):
            self._frames.want(wanted.gfn, wanted.write)
        else:
            self._place(wanted.gfns)

    def _traced_store(self, user: bool) -> None:
        """Count how a store to a traced page came here: translated code is the kernel's only."""
        if user:
            self.note_exit("traced store")
        else:
            self.privileged("traced store")

    def _place(self, gfns: tuple[int, ...]) -> None:
        """Place write traces; they are in force when every CPU has answered (T1-T4)."""
        for gfn in gfns:
            if gfn in self._traces:
                continue
            self._frames.separate(gfn)
            self._traces.place(gfn)
            self._observer.count(self._vcpu, "trace_placed")
            self._observer.note(self._vcpu, EventKind.TRACE_PLACED, 0, gfn)
            for consumer in self._consumers:
                consumer.ask_nowait(RevokeWrite(gfn))

    def tell_logged(self) -> None:
        """Bring in what this VCPU's CPU has logged."""
        self._untrace_all(self._buffers.tell_one(self._vcpu))

    def _untrace_all(self, gfns: list[int]) -> None:
        for gfn in gfns:
            self._untrace(gfn)

    def _untrace(self, gfn: int) -> None:
        give_trace_up(gfn, self._consumers, self._traces, self._observer, self._vcpu)

    def deliver(self, gva: int) -> None:
        self._event()
        self._ask(FaultDelivered(gva))

    def invlpg(self, gva: int) -> None:
        self._event()
        self._ask(PageInvalidated(gva))

    def load_root(self, cr3: int) -> GeneralProtection | None:
        self._event()
        return self._load_root(cr3)

    def _load_root(self, cr3: int) -> GeneralProtection | None:
        while isinstance(reply := self._ask(RootLoaded(cr3)), TracesWanted):
            self._place(reply.gfns)
        return GeneralProtection(reply.reason) if isinstance(reply, Refused) else None

    def load_mode(self, register: int, value: int) -> GeneralProtection | None:
        self._event()
        paged, mode = self.registers.paging, mode_of(self.registers)
        reply = self._ask(ModeLoaded(register, value))
        if isinstance(reply, Refused):
            return GeneralProtection(reply.reason)
        # Who shares its shadow shares another one in another mode.
        in_another = self._shares and mode_of(self.registers) != mode
        if in_another or self.registers.paging != paged:
            return self._load_root(self.registers.cr3)
        if self._per_privilege:  # another mode may have another root
            self._ask(PrivilegeChanged(False))
        return None

    def physical(self, work: Physical) -> int | GeneralProtection:
        gfn = work.gpa >> PAGE_SHIFT
        if gfn in self._devices:
            self.note_exit("device")
        elif gfn in self._traces and not isinstance(work, LoadPhysical):
            self._traced_store(user=False)
        ran = self._emulate(work, False, 0)
        assert isinstance(ran, Ran)
        return value_of(ran)

    def mapping_changed(self, work: MappingChanged) -> int:
        return 0

    def privilege(self, user: bool) -> None:
        if self._per_privilege:
            self.note_exit("privilege")
            self._ask(PrivilegeChanged(user))

    def _event(self) -> None:
        self._observer.count(self._vcpu, "coherency_event")
        self._untrace_all(self._buffers.tell_all(self._vcpu))

    def note_exit(self, reason: str) -> None:
        self._observer.exit(self._vcpu, reason)

    def privileged(self, reason: str) -> None:
        if reason in self._control.exits:
            self._observer.exit(self._vcpu, reason)
        elif reason in self._control.callouts:
            self._observer.count(self._vcpu, "callout")

    def ran_supervisor(self, spent: int) -> None:
        if self._control.translates:
            self._observer.count(self._vcpu, "translated", spent)
