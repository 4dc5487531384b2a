"""A machine: hardware, guest, sub-VMMs and checker put together, and the loop that hands the baton.

Per VM one task each for every physical CPU, VCPU, producer, consumer and guest thread; the
conductor is the only one who chooses. All of them are asked inline, so an exit costs no turn of the
event loop; the loop's own turn comes once in a while, for cancellation and progress reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import anyio.lowlevel

from penumbra.actors.machine.coherence import (
    BareHardware,
    Coherence,
    Monitored,
    ProducerRef,
    hardware_modes,
)
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.cpu import CpuActor
from penumbra.actors.machine.disk import DiskActor
from penumbra.actors.machine.messages import (
    CarryOut,
    DiskOrder,
    DiskReply,
    Grant,
    StartTransfer,
    TakeFinished,
)
from penumbra.actors.machine.nested import Nested
from penumbra.actors.machine.observer import Observer, Taps
from penumbra.actors.machine.processes import ProcessLedger
from penumbra.actors.machine.submm import ConsumerActor, CpuRef, ProducerActor, shadow_modes
from penumbra.actors.machine.thread import ThreadActor
from penumbra.actors.machine.vcpu import ThreadRef, VcpuActor
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
from penumbra.actors.vmm.compose import (
    compose_matrix,
    compose_second_level,
    compose_sub_vmms,
    monitor_frames,
)
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.guest.kernel import Kernel
from penumbra.guest.system import GuestSystem
from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.costs import CostProfile
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.disk import Disk
from penumbra.hw.formats import FORMATS, PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.interrupts import NEVER, InterruptController
from penumbra.hw.memory import FLAG_SPIN, FLAG_TABLE, Ram
from penumbra.hw.streams import AccessStream
from penumbra.hw.tlb import Tlb, TlbGeometry

_TURN_SECONDS = 0.05


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
    ) -> None:
        """Put the hardware and the monitors together.

        Args:
            siblings: Groups of VCPUs whose CPUs share one TLB (A40 Fig. 4).
        """
        self.config = config
        self.scheme = scheme
        self.spec = spec = FORMATS[config.paging]
        shadowed = scheme.shadow != "none"
        self.guest = guest
        n_guest = guest.n_frames
        n_backed = n_guest if guest.backed is None else len(guest.backed)
        n_monitor = monitor_frames(scheme, config.vcpus, n_guest)
        self.ram = Ram(n_backed + n_monitor if shadowed else n_guest)
        self.memory = MemoryManagement(
            self.ram, n_guest, identity=not shadowed, seed=seed, backed=guest.backed
        )
        self.taps = taps(self.ram) if taps else None
        self.observer = Observer(config.vcpus, costs, self.taps)
        self.ledger = ProcessLedger(spec, self.memory, self._swapped_page)
        geometry = TlbGeometry(config.tlb_entries, config.tlb_ways, config.psc_slots)
        tlbs = [Tlb(spec, geometry) for _ in range(config.vcpus)]
        n, smt = config.vcpus, config.smt
        for group in siblings or [range(i, min(i + smt, n)) for i in range(0, n, smt)]:
            for i in group:
                tlbs[i] = tlbs[group[0]]
        self.cpus = [PhysicalCpu(i, spec, self.ram, tlb, streams) for i, tlb in enumerate(tlbs)]
        self.observer.watch_cpus(self.cpus)
        self.interrupts = [InterruptController() for _ in range(config.vcpus)]
        self.disk = Disk(config.disk_mib << (20 - PAGE_SHIFT), config.disk_latency)
        self._disk: ActorRef[DiskOrder, DiskReply] | None = None
        self._disk_due = NEVER
        self.matrix = compose_matrix(scheme, config.vcpus)
        self.traces = WriteTraces(self.matrix)
        self.submms = compose_sub_vmms(scheme, spec, self.memory, self.matrix, self.traces)
        self.second_level = compose_second_level(scheme, self.memory)
        self._conductor = Conductor(chooser or LowestKey(seed))
        self._system: ActorSystem | None = None
        self._vcpus: list[VcpuActor] = []
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
        self._threads[thread_id] = self._system.spawn(actor, f"thread-{thread_id}")

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

    def send_ipi(self, sender: int, targets: int, vector: int, progress: int) -> None:
        due = progress + self.config.ipi_latency
        for target, controller in enumerate(self.interrupts):
            if targets >> target & 1:
                controller.post(due, vector)
                self.observer.count(sender, "ipi")
                self.observer.note(sender, EventKind.IPI_SENT, 0, target, vector)

    def start_dma(self, vcpu_id: int, dma: o.StartDma, progress: int) -> int:
        if self._disk is None:
            return 0
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

    def _swapped_page(self, entry: int) -> bytes | None:
        """Return the page behind a not-present entry of the guest, if it is on its way or out."""
        where = self.guest.on_disk(entry)
        if where is None:
            return None
        in_memory, number = where
        if not in_memory:
            return self.disk.read(number)
        start = self.memory.frame_view[number] << PAGE_SHIFT
        return bytes(self.ram.bytes[start : start + PAGE_BYTES])

    def _post(self, vcpu_id: int, due: int, vector: int) -> None:
        self.interrupts[vcpu_id].post(due, vector)

    def spin(self, vcpu_id: int, hpa: int) -> None:
        self._spins[vcpu_id] = hpa
        self.ram.flags[hpa >> PAGE_SHIFT] |= FLAG_SPIN

    def no_spin(self, vcpu_id: int) -> None:
        frame = self._spins.pop(vcpu_id) >> PAGE_SHIFT
        if all(hpa >> PAGE_SHIFT != frame for hpa in self._spins.values()):
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

    def _build(self, system: ActorSystem) -> None:
        self._system = system
        boot = self.guest.boot(_BootMemory(self.memory))
        cpu_refs = [system.spawn(CpuActor(cpu), f"cpu-{cpu.cpu_id}") for cpu in self.cpus]
        for cpu in self.cpus:
            self._watch(cpu)
        coherences, producers = self._coherences(system, cpu_refs)
        if self.disk.n_blocks:
            traces = self.traces if self.submms else None
            disk = DiskActor(
                self.disk, self.memory, self.cpus, producers, traces, self._post, self.observer
            )
            self._disk = system.spawn(disk, "disk")
        if self.taps is not None:
            for pfn, gfn in self.memory.guest_of.items():
                self.taps.grant(gfn, pfn)
        for i, coherence in enumerate(coherences):
            registers, start = coherence.registers, boot.registers[i]
            registers.cr0, registers.cr4, registers.efer = start.cr0, start.cr4, start.efer
            cpu_refs[i].ask_nowait(
                shadow_modes(registers) if self.submms else hardware_modes(registers)
            )
            coherence.load_root(start.cr3)
            if self.taps is not None:
                self.taps.registers(i, start.cr0, start.cr3, start.cr4, start.efer)
            vcpu = VcpuActor(
                i, boot.idle_threads[i], cpu_refs[i], coherence, self.interrupts[i], self,
                self.observer,
            )  # fmt: skip
            self._vcpus.append(vcpu)
        self._vcpu_refs = [system.spawn(vcpu, f"vcpu-{vcpu.vcpu_id}") for vcpu in self._vcpus]
        for thread_id in boot.idle_threads:
            self.thread(thread_id)

    def _coherences(
        self, system: ActorSystem, cpu_refs: list[CpuRef]
    ) -> tuple[list[Coherence], list[ProducerRef]]:
        if self.second_level:
            second = self.second_level
            return [
                Nested(i, ref, cpu, second, self.observer)
                for i, (ref, cpu) in enumerate(zip(cpu_refs, self.cpus, strict=True))
            ], []
        if not self.submms:
            return [BareHardware(i, ref, self.observer) for i, ref in enumerate(cpu_refs)], []
        consumers = [
            system.spawn(ConsumerActor(submm, ref, self.observer), f"consumer-{submm.vcpu_id}")
            for submm, ref in zip(self.submms, cpu_refs, strict=True)
        ]
        coherences: list[Coherence] = []
        producers: list[ProducerRef] = []
        for submm, ref, cpu in zip(self.submms, cpu_refs, self.cpus, strict=True):
            actor = ProducerActor(submm, self.memory, ref, cpu, consumers, self.observer)
            producer = system.spawn(actor, f"producer-{submm.vcpu_id}")
            producers.append(producer)
            coherences.append(
                Monitored(
                    submm.vcpu_id, submm.registers, producer, consumers, self.traces,
                    self.scheme.shadow == "per-privilege", self.observer,
                )
            )  # fmt: skip
        return coherences, producers

    def _watch(self, cpu: PhysicalCpu) -> None:
        """Connect a CPU's hooks to the machine and, if there is one, the checker."""
        cpu.on_flagged = self._flagged_store
        cpu.reg[m.R_SPURIOUS] = int(self.config.spurious_faults)
        taps, vcpu_id = self.taps, cpu.cpu_id
        if taps is not None:
            cpu.on_used = lambda gva, kind, user, pfn: taps.used(vcpu_id, gva, kind, user, pfn)
            cpu.on_block = lambda sid, stream, start, used: taps.block(
                vcpu_id, sid, stream, start, used
            )

    # ---- running ---------------------------------------------------------------------------------

    async def run(self, on_turn: Callable[[], None] | None = None) -> str:
        """Run until the guest is done or ends for a named reason; return that reason.

        Args:
            on_turn: Called once per turn of the event loop, some twenty times a second.
        """
        try:
            async with ActorSystem("machine") as system:
                self._build(system)
                await self._conduct(on_turn)
                while any(actor.state is ActorState.CLOSING for actor in system.tree().actors):
                    await anyio.lowlevel.checkpoint()
                self.tree = system.tree()
        finally:
            self.guest.close()
        return self.ended

    async def _conduct(self, on_turn: Callable[[], None] | None) -> None:
        turn = time.monotonic()
        while not self.ended:
            self._grant()
            now = time.monotonic()
            if now - turn > _TURN_SECONDS:
                turn = now
                if on_turn:
                    on_turn()
                await anyio.lowlevel.checkpoint()
        self.observer.note(self.running, EventKind.VM_END)

    def _grant(self) -> None:
        """Hand the baton to the VCPU the conductor chooses, for one quantum."""
        keys = [(vcpu.vcpu_id, vcpu.key()) for vcpu in self._vcpus]
        candidates = [(vcpu_id, key) for vcpu_id, key in keys if key is not None]
        if not candidates:
            self.ended = self._why_idle()
            return
        self.running = vcpu_id = self._conductor.next(candidates)
        since = dict(candidates)[vcpu_id]
        if since >= self.config.max_progress:
            self.ended = f"max_progress {self.config.max_progress} reached by VCPU {vcpu_id}"
            return
        self.devices_until(since)
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


class _BootMemory:
    """Guest-physical memory for the boot loader."""

    def __init__(self, memory: MemoryManagement) -> None:
        self._memory = memory

    def write(self, gpa: int, size: int, value: int) -> None:
        self._memory.store(gpa, size, value)

    def write_bytes(self, gpa: int, data: bytes) -> None:
        hpa = self._memory.hpa(gpa)
        assert hpa is not None
        self._memory.ram.bytes[hpa : hpa + len(data)] = data
