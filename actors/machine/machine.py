"""A machine: hardware, guest, sub-VMMs and checker put together, and the loop that hands the baton.

Per VM one task each for every physical CPU, VCPU, producer, consumer and guest thread; the
conductor is the only one who chooses. All of them are asked inline, so an exit costs no turn of the
event loop; the loop's own turn comes once in a while, for cancellation and progress reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import anyio.lowlevel

from penumbra.actors.machine.actions import ActionQueue, RaiseInterrupt
from penumbra.actors.machine.coherence import (
    BareHardware,
    Coherence,
    Monitored,
    ProducerRef,
    hardware_modes,
)
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.control import CONTROLS
from penumbra.actors.machine.devices import Devices
from penumbra.actors.machine.disk import DiskActor
from penumbra.actors.machine.dma import DmaPort
from penumbra.actors.machine.frames import FixedFrames, FrameKeeper, FramesOf
from penumbra.actors.machine.ground import Place, frames_wanted, lay_out
from penumbra.actors.machine.hardware import NOBODY, Hardware
from penumbra.actors.machine.logged import LogTeller, SeatedBuffer, WriteBuffers
from penumbra.actors.machine.mappings import SecondLevelMappings, ShadowMappings
from penumbra.actors.machine.messages import (
    CarryOut,
    DiskOrder,
    DiskReply,
    Grant,
    StartTransfer,
    TakeFinished,
)
from penumbra.actors.machine.native_patch import NativePatch
from penumbra.actors.machine.nested import Nested
from penumbra.actors.machine.observer import Observer, Taps
from penumbra.actors.machine.processes import ProcessLedger
from penumbra.actors.machine.seat import FixedSeat, Seat
from penumbra.actors.machine.submm import ConsumerActor, ProducerActor, shadow_modes
from penumbra.actors.machine.thread import ThreadActor
from penumbra.actors.machine.tlbs import ManagedByHardware, ManagedByMonitor, TlbManagement
from penumbra.actors.machine.vcpu import ThreadRef, VcpuActor, Wait
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import (
    ActorRef,
    ActorState,
    ActorSystem,
    Chooser,
    Conductor,
    LowestKey,
    SystemTree,
)
from penumbra.actors.vmm.buffer_faults import BufferFault, buffer_fault_named
from penumbra.actors.vmm.compose import (
    compose_buffer,
    compose_matrix,
    compose_readers,
    compose_second_level,
    compose_sub_vmms,
    compose_traces,
)
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.kernel import Kernel
from penumbra.guest.system import GuestSystem
from penumbra.hw import operations as o
from penumbra.hw.costs import CostProfile
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.device_window import window_frames
from penumbra.hw.disk import Disk
from penumbra.hw.formats import FORMATS, PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.interrupts import NEVER, InterruptController
from penumbra.hw.memory import FLAG_SPIN, FLAG_TABLE, Ram
from penumbra.hw.streams import READ, AccessStream

_TURN_SECONDS = 0.05


class KernelCalls(Protocol):
    """What a monitor calls the kernel for, if there is one."""

    def posted(self, machine: Machine, vcpu_id: int, vector: int) -> None:
        """An action waits in a VCPU's queue."""

    def device_called(self, machine: Machine, vcpu_id: int) -> None:
        """A VCPU used a device of the physical machine."""

    def reported(self, machine: Machine, text: str) -> None:
        """Something to tell the console."""


class Machine:
    """One virtual machine on its own conductor.

    Invariant: exactly one VCPU runs at a time, and between two grants every exit is complete.
    """

    def __init__(
        self,
        config: MachineConfig,
        scheme: Scheme,
        guest: GuestSystem,
        streams: Sequence[AccessStream],
        costs: CostProfile,
        seed: int,
        taps: Callable[[Ram], Taps] | None = None,
        chooser: Chooser | None = None,
        siblings: Sequence[Sequence[int]] = (),
        place: Place | None = None,
    ) -> None:
        """Put the hardware and the monitors together.

        Args:
            siblings: Groups of VCPUs whose CPUs share one TLB (A40 Fig. 4).
            place: Where a VM of several lies on the hardware they share; None: alone, each VCPU on
                a CPU of its own.
        """
        self.config = config
        self.scheme = scheme
        self.spec = spec = FORMATS[config.paging]
        shadowed = scheme.shadow != "none"
        self.guest = guest
        self.streams = streams
        self.hardware = (place and place.hardware) or Hardware(
            config, frames_wanted(config, scheme, guest), config.vcpus, siblings,
            buffer=compose_buffer(scheme),
        )  # fmt: skip
        self.ram = self.hardware.ram
        ground = lay_out(config, scheme, self.hardware, place, guest.n_frames, seed)
        self.memory = MemoryManagement(
            self.ram, guest.n_frames, identity=not shadowed, seed=seed, backed=guest.backed,
            frames=ground.frames, absent=ground.absent, devices=window_frames(spec),
        )  # fmt: skip
        self.taps = taps(self.ram) if taps else None
        self.observer = Observer(config.vcpus, costs, self.taps)
        if place is not None:
            self.observer.vm, self.observer.events = place.vm_id, place.events
        self.ledger = ProcessLedger(spec, self.memory, self._swapped_page)
        self.cpus = self.hardware.cpus
        self.interrupts = [InterruptController() for _ in range(config.vcpus)]
        self.actions = [ActionQueue() for _ in range(config.vcpus)]
        self.devices = Devices(self)
        self.kernel_calls: KernelCalls | None = None
        self.disk = Disk(config.disk_mib << (20 - PAGE_SHIFT), config.disk_latency)
        self._disk: ActorRef[DiskOrder, DiskReply] | None = None
        self._disk_due = NEVER
        self._dma: DmaPort | None = None
        self.matrix = compose_matrix(scheme, config.vcpus)
        self.traces = compose_traces(scheme, self.matrix)
        self.submms = compose_sub_vmms(scheme, spec, self.memory, self.matrix, self.traces)
        self.second_level = compose_second_level(scheme, self.memory)
        self.frames: FramesOf = FixedFrames(self.memory, self.taps)
        if ground.pool is not None:
            self.frames = FrameKeeper(
                self.memory, ground.pool, self.traces, self.submms, self.observer, config, seed,
                place.vm_id if place else 0, lambda: self.running,
            )  # fmt: skip
        self._conductor = Conductor(chooser or LowestKey(seed))
        self._system: ActorSystem | None = None
        self._prefix = ""
        self._vcpus: list[VcpuActor] = []
        self._monitors: list[Monitored] = []
        self._threads: dict[int, ThreadRef] = {}
        self._spins: dict[int, int] = {}
        self.running: int = 0
        self.ended = ""
        self.tree = SystemTree("machine", ())

    @property
    def kernel(self) -> Kernel:
        """The guest of a machine that runs a whole operating system."""
        assert isinstance(self.guest, Kernel)
        return self.guest

    # ---- Board: what the VCPUs see ---------------------------------------------------------------

    def thread(self, thread_id: int) -> ThreadRef:
        if thread_id not in self._threads:
            self._spawn_thread(thread_id)
        return self._threads[thread_id]

    def _spawn_thread(self, thread_id: int) -> None:
        assert self._system is not None
        actor = ThreadActor(self.guest.threads[thread_id], self.guest)
        self._threads[thread_id] = self._system.spawn(actor, f"{self._prefix}thread-{thread_id}")

    def _close_ended_threads(self) -> None:
        """End the tasks of guest threads that the kernel has reaped."""
        if len(self._threads) > len(self.guest.threads):
            for ended in [i for i in self._threads if i not in self.guest.threads]:
                self._threads.pop(ended).close()

    def mark(self, vcpu_id: int, mark: o.Mark) -> None:
        kind = {"process_start": EventKind.PROCESS_START, "process_exit": EventKind.PROCESS_EXIT}
        arg0, arg1 = (*mark.args, 0, 0)[:2]
        self.observer.note(vcpu_id, kind.get(mark.what, EventKind.MARK), 0, arg0, arg1)
        if mark.what == "thread":
            self.thread(mark.args[0])
        self.ledger.mark(mark)
        if self.kernel_calls is not None and mark.what == "process_exit":
            ended = self.ledger.records[mark.args[0]]
            self.kernel_calls.reported(self, f"process {ended.pid} ({ended.name}): {ended.ended}")

    def send_ipi(self, sender: int, targets: int, vector: int, progress: int) -> None:
        due = progress + self.config.ipi_latency
        for target in range(self.config.vcpus):
            if targets >> target & 1:
                self._post(target, due, vector)
                self.observer.count(sender, "ipi")
                self.observer.note(sender, EventKind.IPI_SENT, 0, target, vector)

    def start_dma(self, vcpu_id: int, dma: o.StartDma, progress: int) -> int:
        if self._disk is None:
            return 0
        if self.kernel_calls is not None:
            self.kernel_calls.device_called(self, vcpu_id)
        ticket = self._disk.ask_nowait(
            StartTransfer(vcpu_id, dma.block, dma.gpa, dma.to_disk, progress)
        ).value
        if ticket:
            self._disk_due = min(self._disk_due, progress + self.config.disk_latency)
        return ticket

    def finished_dma(self, vcpu_id: int) -> int:
        return 0 if self._disk is None else self._disk.ask_nowait(TakeFinished(vcpu_id)).value

    def devices_until(self, progress: int) -> None:
        if self._disk_due <= progress:
            assert self._disk is not None
            self._disk_due = self._disk.ask_nowait(CarryOut(progress)).value

    def release_frame(self, vcpu_id: int, gpa: int) -> int:
        gfn = gpa >> PAGE_SHIFT
        assert self._dma is not None
        if self.memory.hpa(gpa) is None and not self.memory.is_absent(gfn):
            return 0
        self._dma.store(vcpu_id, gpa & ~(PAGE_BYTES - 1), bytes(PAGE_BYTES))
        self.frames.release(gfn)
        self.observer.count(vcpu_id, "frames_released")
        return 1

    def _swapped_page(self, entry: int) -> bytes | None:
        """Return the page behind a not-present entry of the guest, if it is on its way or out."""
        where = self.guest.on_disk(entry)
        if where is None:
            return None
        in_memory, number = where
        if not in_memory:
            return self.disk.read(number)
        return self.memory.page(number)

    def _post(self, vcpu_id: int, due: int, vector: int) -> None:
        """Raise a virtual interrupt: at once, or by way of the kernel's action queue."""
        if self.kernel_calls is None:
            self.interrupts[vcpu_id].post(due, vector)
        else:
            self.actions[vcpu_id].post(RaiseInterrupt(due, vector))
            self.kernel_calls.posted(self, vcpu_id, vector)

    def _store_for_device(self, hpa: int, size: int, value: int) -> None:
        """Store to machine memory what a device writes: no translation, but seen if flagged."""
        ram = self.ram
        pfn = hpa >> PAGE_SHIFT
        old = ram.load(hpa, size)
        ram.store(hpa, size, value)
        if pfn < ram.n_frames and ram.flags[pfn]:
            self._flagged_store(hpa, size, old, value)

    def spin(self, vcpu_id: int, hpa: int, gva: int) -> bool:
        sharers = self.memory.guests(hpa >> PAGE_SHIFT) if self.memory.n_unready else ()
        if len(sharers) > 1:  # whoever writes the word will do it in another frame
            gpa = self.submms[vcpu_id].guest_address(gva, READ, False) if self.submms else None
            gfn = gpa >> PAGE_SHIFT if isinstance(gpa, int) else NOBODY
            for each in [gfn] if gfn in sharers else sharers:
                self.frames.separate(each)
            return False
        self._spins[vcpu_id] = hpa
        if hpa >> PAGE_SHIFT < self.ram.n_frames:  # else nobody can ever write it
            self.ram.flags[hpa >> PAGE_SHIFT] |= FLAG_SPIN
        return True

    def no_spin(self, vcpu_id: int) -> None:
        frame = self._spins.pop(vcpu_id) >> PAGE_SHIFT
        alone = all(hpa >> PAGE_SHIFT != frame for hpa in self._spins.values())
        if alone and frame < self.ram.n_frames:
            self.ram.flags[frame] &= 0xFF ^ FLAG_SPIN

    def _flagged_store(self, hpa: int, size: int, old: int, new: int) -> None:
        flags = self.ram.flags[hpa >> PAGE_SHIFT]
        if flags & FLAG_TABLE and self.taps is not None:
            self.taps.store(hpa, size, old, new)
        if flags & FLAG_SPIN:
            progress = self.observer.progress[self.running]
            for vcpu_id, word in list(self._spins.items()):
                if word < hpa + size and hpa < word + 8:
                    self._vcpus[vcpu_id].word_written(progress)

    # ---- putting together ------------------------------------------------------------------------

    def build_alone(self, system: ActorSystem, prefix: str = "") -> None:
        """Spawn the CPUs' tasks and the VM's; each VCPU keeps a CPU of its own."""
        refs = self.hardware.spawn(system, prefix)
        for cpu in self.cpus:
            self.sits_down(cpu.cpu_id, cpu)
        seats = [FixedSeat(ref, cpu) for ref, cpu in zip(refs, self.cpus, strict=True)]
        self.build(system, seats, prefix)

    def build(self, system: ActorSystem, seats: Sequence[Seat], prefix: str = "") -> None:
        """Spawn the VM's tasks and load the guest; VCPU i has `seats[i]`.

        Args:
            prefix: Put before the name of each task of this VM.
        """
        self._system, self._prefix = system, prefix
        self.frames.start()
        boot = self.guest.boot(_BootMemory(self.memory, self.frames))
        coherences, producers = self._coherences(system, seats)
        untold = self._buffer_fault() & BufferFault.DMA_UNTOLD
        traces = self.traces if self.submms and not untold else None
        self._dma = DmaPort(self.memory, self._store_for_device, producers, traces, self.frames)
        if self.disk.n_blocks:
            disk = DiskActor(self.disk, self._dma, self._post, self.observer)
            self._disk = system.spawn(disk, f"{prefix}disk")
        if self.taps is not None:
            for gfn in self.memory.devices:
                self.taps.device(gfn, gfn)
        for i, coherence in enumerate(coherences):
            registers, start = coherence.registers, boot.registers[i]
            registers.cr0, registers.cr4, registers.efer = start.cr0, start.cr4, start.efer
            coherence.load_root(start.cr3)
            # Only now: where the top level is held in registers, paging needs them loaded.
            seats[i].ask_nowait(
                shadow_modes(registers) if self.submms else hardware_modes(registers)
            )
            if self.taps is not None:
                self.taps.registers(i, start.cr0, start.cr3, start.cr4, start.efer)
            vcpu = VcpuActor(
                i, boot.idle_threads[i], seats[i], coherence, self.interrupts[i],
                self.actions[i], self,                self.observer,
            )  # fmt: skip
            self._vcpus.append(vcpu)
        self._vcpu_refs = [
            system.spawn(vcpu, f"{prefix}vcpu-{vcpu.vcpu_id}") for vcpu in self._vcpus
        ]
        for thread_id in boot.idle_threads:
            self.thread(thread_id)

    def _coherences(
        self, system: ActorSystem, seats: Sequence[Seat]
    ) -> tuple[list[Coherence], list[ProducerRef]]:
        prefix = self._prefix
        if self.second_level:
            level, control = self.second_level, CONTROLS[self.config.control]
            self.frames.attach(
                SecondLevelMappings(level, seats, self.observer, lambda: self.running)
            )
            return [
                Nested(i, seat, level, control, self.observer, self.spec, self.memory, self.frames)
                for i, seat in enumerate(seats)
            ], []
        if not self.submms:
            return self._unmonitored(seats), []
        consumer_actors = [
            ConsumerActor(submm, seat, self._tlb_management(submm.vcpu_id, seat), self.observer)
            for submm, seat in zip(self.submms, seats, strict=True)
        ]
        consumers = [
            system.spawn(one, f"{prefix}consumer-{i}") for i, one in enumerate(consumer_actors)
        ]
        if self.scheme.shadow == "shared":
            for consumer in consumer_actors:
                consumer.shares_with(consumer_actors)
        producers: list[ProducerRef] = []
        readers = compose_readers(
            self.scheme, self.spec, self.memory, self.traces, [SeatedBuffer(seat) for seat in seats]
        )
        own_only = bool(self._buffer_fault() & BufferFault.OWN_BUFFER_ONLY)
        buffers = WriteBuffers(readers, producers, own_only=own_only)
        self.frames.attach(
            ShadowMappings(consumers, self.traces, buffers, self.observer, lambda: self.running)
        )
        for submm, seat in zip(self.submms, seats, strict=True):
            log = None
            if readers:
                reader = readers[submm.vcpu_id]
                log = LogTeller(reader, submm, consumers, self.observer)
            maker = ProducerActor(
                submm, self.memory, seat, self._store_for_device, consumers, self.observer, log
            )
            producer = system.spawn(maker, f"{prefix}producer-{submm.vcpu_id}")
            producers.append(producer)
            self._monitors.append(
                Monitored(
                    submm.vcpu_id, submm.registers, producer, consumers, self.traces,
                    self.scheme.shadow == "per-privilege", CONTROLS[self.config.control],
                    self.observer, buffers, self.frames, shares=self.scheme.shadow == "shared",
                    devices=self.memory.devices,
                )
            )  # fmt: skip
        return [*self._monitors], producers

    def _unmonitored(self, seats: Sequence[Seat]) -> list[Coherence]:
        if self.scheme.detect != "announced":
            return [BareHardware(i, seat, self.observer) for i, seat in enumerate(seats)]
        return [
            NativePatch(i, seat, self.observer, self.matrix, self.scheme.options)
            for i, seat in enumerate(seats)
        ]

    def _buffer_fault(self) -> BufferFault:
        return buffer_fault_named(self.scheme.options.buffer.fault)

    def _tlb_management(self, vcpu_id: int, seat: Seat) -> TlbManagement:
        if self.config.tlb == "hardware":
            return ManagedByHardware(vcpu_id, seat, self.observer)
        update = self.scheme.apply == "update"
        return ManagedByMonitor(vcpu_id, seat, self.observer, update=update)

    def sits_down(self, vcpu_id: int, cpu: PhysicalCpu) -> None:
        """A VCPU runs on this CPU from now on: its streams, its hooks, its counters."""
        cpu.streams = self.streams
        cpu.on_flagged = self._flagged_store
        cpu.attach_device(self.devices.ports[vcpu_id])
        cpu.load_second_level(self.second_level.root if self.second_level else 0)
        self.observer.sits_down(vcpu_id, cpu)
        cpu.on_used = cpu.on_block = None
        taps = self.taps
        if taps is not None:
            cpu.on_used = lambda gva, kind, user, pfn: taps.used(vcpu_id, gva, kind, user, pfn)
            cpu.on_block = lambda sid, stream, start, used: taps.block(
                vcpu_id, sid, stream, start, used
            )

    def tell_logged(self, vcpu_id: int) -> None:
        """A VCPU is about to leave its CPU: bring in what the CPU has logged for it."""
        if self.submms:
            self._monitors[vcpu_id].tell_logged()

    # ---- running ---------------------------------------------------------------------------------

    async def run(self, on_turn: Callable[[], None] | None = None) -> str:
        """Run until the guest is done or ends for a named reason; return that reason.

        Args:
            on_turn: Called once per turn of the event loop, some twenty times a second.
        """
        try:
            async with ActorSystem("machine") as system:
                self.build_alone(system)
                await self._conduct(on_turn)
                self.tree = await settled_tree(system)
        finally:
            self.close()
        return self.ended

    def close(self) -> None:
        """End the guest's coroutines."""
        self.guest.close()

    async def _conduct(self, on_turn: Callable[[], None] | None) -> None:
        turn = time.monotonic()
        while not self.ended:
            ready = self.ready()
            if ready:
                self.grant(self._conductor.next([(i, key) for i, key, _ in ready]))
            now = time.monotonic()
            if now - turn > _TURN_SECONDS:
                turn = now
                if on_turn:
                    on_turn()
                await anyio.lowlevel.checkpoint()
        self.observer.note(self.running, EventKind.VM_END)

    def ready(self) -> list[tuple[int, int, bool]]:
        """Return (VCPU, progress at which it can go on, whether it sleeps until then).

        If there is none the machine has ended, and `ended` says why.
        """
        found = [
            (vcpu.vcpu_id, key, vcpu.wait is not Wait.NOTHING)
            for vcpu in self._vcpus
            if (key := vcpu.key()) is not None
        ]
        if not found and not self.ended:
            self.ended = self._why_idle()
        return found

    def grant(self, vcpu_id: int) -> None:
        """Hand the baton to a VCPU that is ready, for one quantum."""
        since = self._vcpus[vcpu_id].key()
        assert since is not None
        self.running = vcpu_id
        if since >= self.config.max_progress:
            self.ended = f"max_progress {self.config.max_progress} reached by VCPU {vcpu_id}"
            return
        self.devices_until(since)
        self.frames.until(since)
        limit = min(since + self.config.quantum, self.config.max_progress, self._disk_due)
        baton = self._vcpu_refs[vcpu_id].ask_nowait(Grant(since, limit))
        self._close_ended_threads()
        if baton.ended:
            self.ended = baton.ended

    def _why_idle(self) -> str:
        if self.guest.finished:
            return "finished"
        waits = ", ".join(f"VCPU {vcpu.vcpu_id} {vcpu.wait.value}" for vcpu in self._vcpus)
        return f"guest deadlock: {waits}, no interrupt pending"


async def settled_tree(system: ActorSystem) -> SystemTree:
    """Return the tasks of a system once those that were closed have ended."""
    while any(actor.state is ActorState.CLOSING for actor in system.tree().actors):
        await anyio.lowlevel.checkpoint()
    return system.tree()


class _BootMemory:
    """Guest-physical memory for the boot loader."""

    def __init__(self, memory: MemoryManagement, frames: FramesOf) -> None:
        self._memory = memory
        self._frames = frames

    def write(self, gpa: int, size: int, value: int) -> None:
        self._frames.want(gpa >> PAGE_SHIFT, True)
        self._memory.store(gpa, size, value)

    def write_bytes(self, gpa: int, data: bytes) -> None:
        self._frames.want(gpa >> PAGE_SHIFT, True)
        hpa = self._memory.hpa(gpa)
        assert hpa is not None
        self._memory.ram.bytes[hpa : hpa + len(data)] = data
