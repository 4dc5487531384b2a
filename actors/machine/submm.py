"""The task actors of a sub-VMM: its producer and its consumer.

The producer of VCPU i makes the traced stores of i and tells the consumers; where a channel is full
it asks that consumer to shoot the entry down before it goes on. The consumer of VCPU j owns j's
secondary data: nobody else writes j's shadow, and the flushes of j's CPU follow each change.

Source: A40 Figs 5, 6, 11, 12; VMM-A to VMM-D, 396, 399.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penumbra.actors.machine.logged import LogTeller
from penumbra.actors.machine.messages import (
    Complete,
    ConsumerOrder,
    ConsumerReply,
    DeviceStore,
    DeviceStored,
    Drain,
    DropTable,
    EmulateStore,
    FaultDelivered,
    Followed,
    ForgetAll,
    ForgetFrame,
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
    Refused,
    Repair,
    Repaired,
    RevokeWrite,
    RootLoaded,
    SetModes,
    ShootDown,
    Stored,
    StoreWanted,
    TellLogged,
    TracesWanted,
    TruePageFault,
)
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.machine.tlbs import TlbManagement
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import Actor, ActorRef
from penumbra.actors.vmm.fill import (
    BringFrame,
    Emulate,
    Forward,
    Hidden,
    MachineCheck,
    PlaceTraces,
)
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import CR4_PGE, CR4_SMEP, EFER_NXE, PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.operations import Fill, Physical
from penumbra.hw.streams import WRITE

_DEVICE_BYTES = 8
ConsumerRef = ActorRef[ConsumerOrder, ConsumerReply]


def shadow_modes(registers: GuestRegisters) -> SetModes:
    """Return the mode bits of hardware that walks shadow tables.

    WP stays set, so that a supervisor's store to a read-only page exits; PSE, so that a shadow page
    may be large whatever the guest's CR4.
    """
    pge, nxe = bool(registers.cr4 & CR4_PGE), bool(registers.efer & EFER_NXE)
    return SetModes(True, True, pge, nxe, True, smep=bool(registers.cr4 & CR4_SMEP))


class ConsumerActor(Actor[ConsumerOrder, ConsumerReply]):
    """Keeps one VCPU's shadow and TLB: hidden faults, coherency events, requests of other CPUs."""

    def __init__(
        self, submm: SecondaryData, seat: Seat, tlb: TlbManagement, observer: Observer
    ) -> None:
        self._submm = submm
        self._cpu = seat
        self._tlb = tlb
        self._observer = observer
        self._vcpu = submm.vcpu_id
        self._others: list[ConsumerActor] = []

    def receive(self, message: ConsumerOrder) -> ConsumerReply:
        if isinstance(message, Repair):
            return self._repair(message)
        if isinstance(message, Missed):
            inside = self._tlb.missed(message.gva, message.kind, message.user)
            return Repaired() if inside else Followed()
        if isinstance(message, PageInvalidated):
            self._submm.event_invlpg(message.gva)
        elif isinstance(message, FaultDelivered):
            self._submm.registers.cr2 = message.gva
            self._submm.event_fault(message.gva)
        elif isinstance(message, RootLoaded):
            return self._load_root(message.cr3)
        elif isinstance(message, ModeLoaded):
            return self._load_mode(message)
        elif isinstance(message, PrivilegeChanged):
            root = self._submm.privilege(message.user)
            if root is not None:
                self._cpu.ask_nowait(LoadRoot(root))
        elif isinstance(message, ShootDown):
            self._submm.shoot_down((message.base, message.offset))
            self._observer.note(self._vcpu, EventKind.SHOOTDOWN, 0, message.base, message.offset)
        elif isinstance(message, Drain):
            self._submm.event_all()
        elif isinstance(message, RevokeWrite):
            self._submm.revoke_write(message.gfn)
        elif isinstance(message, DropTable):
            self._submm.drop_table(message.gfn)
        elif isinstance(message, ForgetAll):
            self._submm.forget_all()
        elif isinstance(message, ForgetFrame):
            self._submm.forget_frame(message.gfn)
        return self._followed()

    def _repair(self, message: Repair) -> ConsumerReply:
        outcome = self._submm.fault(message.gva, message.kind, message.user)
        if isinstance(outcome, Forward):
            return TruePageFault(message.gva, outcome.error, message.kind)
        if isinstance(outcome, PlaceTraces):
            return TracesWanted(outcome.gfns)
        if isinstance(outcome, MachineCheck):
            return MachineChecked(outcome.gva, outcome.gpa)
        if isinstance(outcome, BringFrame):
            return FrameWanted(outcome.gfn, outcome.write)
        self._flush()
        if isinstance(outcome, Emulate):
            return StoreWanted(outcome.device)
        assert isinstance(outcome, Hidden)
        self._tlb.filled(message.gva, message.kind, message.user)
        self._observer.count(self._vcpu, "hidden_fault")
        self._observer.note(self._vcpu, EventKind.HIDDEN_FAULT, message.gva, message.kind)
        return Repaired(self._submm.take_remote())

    def _load_root(self, cr3: int) -> ConsumerReply:
        root = self._submm.load_root(cr3)
        if isinstance(root, PlaceTraces):
            return TracesWanted(root.gfns)
        if isinstance(root, GeneralProtection):
            return Refused(root.reason)
        reply = self._followed()
        self._cpu.ask_nowait(LoadRoot(root))
        return reply

    def _load_mode(self, message: ModeLoaded) -> ConsumerReply:
        flushes = self._submm.load_mode(message.register, message.value)
        if isinstance(flushes, GeneralProtection):
            return Refused(flushes.reason)
        if flushes:
            self._cpu.ask_nowait(shadow_modes(self._submm.registers))
        return self._followed()

    def _followed(self) -> Followed:
        """Flush what the shadow's changes ask for and report the patches applied."""
        self._flush()
        n = self._submm.take_applied()
        if n:
            self._observer.count(self._vcpu, "patch_applied", n)
            self._observer.note(self._vcpu, EventKind.PATCH_APPLIED, 0, n)
        return Followed(n, self._submm.take_remote())

    def shares_with(self, everyone: list[ConsumerActor]) -> None:
        """These have one shadow: what one of them changes may be cached by each (A40c 62)."""
        self._others = [one for one in everyone if one is not self]

    def _flush(self) -> None:
        self._flush_own()
        for other in self._others:
            if other._flush_own():
                self._observer.count(self._vcpu, "ipi")

    def _flush_own(self) -> bool:
        """Let the CPU drop what has changed in the shadow, and load what it holds in registers."""
        for name, n in self._submm.take_counts().items():
            self._observer.count(self._vcpu, name, n)
        reload = self._submm.take_reload()
        if reload is not None:
            self._cpu.ask_nowait(LoadRoot(reload))
        flushes = self._submm.take_flushes()
        if not flushes:
            return False
        if flushes == [FLUSH_ALL]:
            self._observer.count(self._vcpu, "tlb_flush")
            self._cpu.ask_nowait(Invalidate((), everything=True))
        else:
            self._tlb.changed(flushes)
        return True


class ProducerActor(Actor[ProducerOrder, ProducerReply]):
    """Makes one VCPU's traced stores and tells every consumer concerned."""

    def __init__(
        self,
        submm: SecondaryData,
        memory: MemoryManagement,
        seat: Seat,
        store_for_device: Callable[[int, int, int], None],
        consumers: list[ConsumerRef],
        observer: Observer,
        log: LogTeller | None = None,
    ) -> None:
        self._submm = submm
        self._log = log
        self._memory = memory
        self._cpu = seat
        self._store_for_device = store_for_device
        self._consumers = consumers
        self._observer = observer
        self._vcpu = submm.vcpu_id

    def receive(self, message: ProducerOrder) -> ProducerReply:
        if isinstance(message, DeviceStore):
            return self._device_store(message)
        if isinstance(message, TellLogged):
            assert self._log is not None, "this VCPU's CPU has no guest write buffer"
            return self._log.tell(self)
        return self._emulate(message)

    def _device_store(self, message: DeviceStore) -> DeviceStored:
        """Make a device's stores to a traced table, one aligned word after the other.

        A word that does not change is left out: storing it could tell nobody anything new.
        """
        submm, memory, data = self._submm, self._memory, message.data
        cause = self._observer.note(self._vcpu, EventKind.TRACED_STORE, 0, message.gpa)
        for at in range(0, len(data), _DEVICE_BYTES):
            gpa, word = message.gpa + at, int.from_bytes(data[at : at + _DEVICE_BYTES], "little")
            if memory.load(gpa, _DEVICE_BYTES) == word:
                continue
            keys = submm.begin_store([(gpa, _DEVICE_BYTES)])
            self._store_for_device(self._reach(gpa), _DEVICE_BYTES, word)  # 831
            self._observer.count(self._vcpu, "emulated_store")
            self._tell(keys, cause)
        return DeviceStored()

    def _emulate(self, message: EmulateStore) -> ProducerReply:
        """Make one indivisible step of an access: a store, or any to a device (330).

        Source: A40 Fig. 11, steps 830-848; ¶38.
        """
        submm, observer, vcpu = self._submm, self._observer, self._vcpu
        accesses = self._cpu.cpu.next_accesses(message.work, message.at)
        if isinstance(message.work, Physical):
            return self._physical(message, *accesses[0])
        gpas = []
        for gva, _, kind in accesses:
            gpa = submm.guest_address(gva, kind, message.user)
            if isinstance(gpa, Forward):
                return TruePageFault(gva, gpa.error, kind)
            if isinstance(gpa, PlaceTraces):
                return TracesWanted(gpa.gfns)
            if isinstance(gpa, BringFrame):
                return FrameWanted(gpa.gfn, gpa.write)
            gpas.append(gpa)
        unready = self._unready(gpas, accesses)
        if unready is not None:
            return unready
        written = [
            (gpa, n)
            for gpa, (_, n, kind) in zip(gpas, accesses, strict=True)
            if kind == WRITE and not self._at_device(gpa)
        ]
        hpas = tuple(self._reach(gpa) for gpa in gpas)
        keys = submm.begin_store(written)
        ran = self._cpu.ask_nowait(Complete(message.work, message.user, message.at, hpas))  # 831
        for (gva, _, kind), hpa in zip(accesses, hpas, strict=True):
            if observer.taps is not None:
                observer.taps.used(vcpu, gva, kind, message.user, hpa >> PAGE_SHIFT)
        if len(written) < sum(kind == WRITE for _, _, kind in accesses) or not written:
            observer.note(vcpu, EventKind.DEVICE_ACCESS, accesses[-1][0], gpas[-1])
        if written:
            observer.count(vcpu, "emulated_store")
            cause = observer.note(
                vcpu,
                EventKind.TRACED_STORE if keys else EventKind.EMULATED_STORE,
                accesses[-1][0],
                written[0][0],
            )
            self._tell(keys, cause)
        return Stored(ran, self._flooded(message, [gpa for gpa, _ in written]) if keys else ())

    def _unready(
        self, gpas: list[int], accesses: Sequence[tuple[int, int, int]]
    ) -> FrameWanted | None:
        """Return the first frame of an access that it cannot be made in where it is now."""
        for gpa, (_, _, kind) in zip(gpas, accesses, strict=True):
            if not self._memory.ready(gpa >> PAGE_SHIFT, kind == WRITE):
                return FrameWanted(gpa >> PAGE_SHIFT, kind == WRITE)
        return None

    def _physical(self, message: EmulateStore, gpa: int, n: int, kind: int) -> Stored | FrameWanted:
        """Make an access whose guest-physical address the guest names itself."""
        to_memory = kind == WRITE and not self._at_device(gpa)
        unready = None if self._at_device(gpa) else self._unready([gpa], [(gpa, n, kind)])
        if unready is not None:
            return unready
        keys = self._submm.begin_store([(gpa, n)] if to_memory else [])
        ran = self._cpu.ask_nowait(
            Complete(message.work, message.user, message.at, (self._reach(gpa),))  # 831
        )
        if keys:
            self._observer.count(self._vcpu, "emulated_store")
            cause = self._observer.note(self._vcpu, EventKind.TRACED_STORE, 0, gpa)
            self._tell(keys, cause)
        return Stored(ran, self._flooded(message, [gpa]) if keys else ())

    def tell_entry(self, gpa: int, cause: int) -> None:
        """Tell whoever derives from the guest entry at `gpa`, whose store is long visible."""
        self._tell(self._submm.begin_store([(gpa, 1)]), cause)

    def _tell(self, keys: list[Key], cause: int) -> None:
        owed = self._submm.finish_store(keys)
        self._note_told(keys, dict(owed), cause)
        for key, consumers in owed:  # 844
            blockers = self._submm.blockers(consumers)
            if blockers:
                self._wait_for(blockers)
                consumers = self._submm.tell(key, consumers)
            self._shoot_down(key, consumers, cause)
        self._submm.end_store(keys)

    def _note_told(self, keys: list[Key], owed: dict[Key, int], cause: int) -> None:
        """Note who has been told of which entry; who is neither told nor shot down stands by."""
        for key in keys:
            told = self._submm.consumers(key) & ~owed.get(key, 0)
            if told:
                self._observer.note(
                    self._vcpu, EventKind.PATCH_POSTED, 0, key[0] | key[1], told, cause
                )

    def _wait_for(self, consumers: int) -> None:
        """Let consumers take what is in the channel now: it only makes them more coherent."""
        for consumer, ref in enumerate(self._consumers):
            if consumers >> consumer & 1:
                self._observer.count(self._vcpu, "overflow_wait")
                if consumer != self._vcpu:
                    self._observer.count(self._vcpu, "ipi")
                ref.ask_nowait(Drain())

    def _reach(self, gpa: int) -> int:
        """Return where the CPU makes an emulated access: RAM, the device's address, or nothing."""
        if self._at_device(gpa):
            return gpa
        hpa = self._memory.hpa(gpa)
        return self._memory.ram.n_frames << PAGE_SHIFT if hpa is None else hpa

    def _at_device(self, gpa: int) -> bool:
        return self._memory.is_device(gpa >> PAGE_SHIFT)

    def _shoot_down(self, key: tuple[int, int], consumers: int, cause: int) -> None:
        vcpu, observer = self._vcpu, self._observer
        for consumer, ref in enumerate(self._consumers):
            if consumers >> consumer & 1:
                observer.count(vcpu, "shootdown")
                if consumer != vcpu:
                    observer.count(vcpu, "ipi")
                ref.ask_nowait(ShootDown(*key))

    def _flooded(self, message: EmulateStore, gpas: list[int]) -> tuple[int, ...]:
        """Return the guest tables to untrace after this store: of two, if it crossed a page."""
        work, at = message.work, message.at
        left = work.n_bytes - at if isinstance(work, Fill) else 0
        return tuple(
            gfn
            for gfn, inside in dict(divmod(gpa, PAGE_BYTES) for gpa in gpas).items()
            if self._submm.flooded(gfn, not inside and left >= PAGE_BYTES)
        )
