"""A machine: hardware, guest, sub-VMMs and checker put together, and the loop that hands the baton.

Per VM one task each for every physical CPU, VCPU, producer, consumer and guest thread; the
conductor is the only one who chooses. All of them are asked inline, so an exit costs no turn of the
event loop; the loop's own turn comes once in a while, for cancellation and progress reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import anyio.lowlevel

from penumbra.actors.core import SWITCHES, Matrix, Order
from penumbra.actors.machine.coherence import BareHardware, Coherence, Monitored
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.cpu import CpuActor
from penumbra.actors.machine.messages import Grant, SetModes
from penumbra.actors.machine.observer import Observer, Taps
from penumbra.actors.machine.processes import ProcessLedger
from penumbra.actors.machine.submm import ConsumerActor, CpuRef, ProducerActor
from penumbra.actors.machine.thread import ThreadActor
from penumbra.actors.machine.vcpu import ThreadRef, VcpuActor
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import (
    ActorState,
    ActorSystem,
    Chooser,
    Conductor,
    LowestKey,
    SystemTree,
)
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import ImmediateShootdown, PatchChannels, Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.subvmm import Shared, SubVmm
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.guest.kernel import Kernel, KernelOptions, Layout
from penumbra.guest.programs.program import Program
from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.costs import CostProfile
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.formats import CR4_PGE, EFER_NXE, FORMATS, PAGE_SHIFT
from penumbra.hw.interrupts import InterruptController
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
        layout: Layout,
        programs: Sequence[Program],
        streams: Sequence[AccessStream],
        costs: CostProfile,
        seed: int,
        taps: Callable[[Ram], Taps] | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        self.config = config
        self.scheme = scheme
        self.spec = spec = FORMATS[config.paging]
        shadowed = scheme.shadow != "none"
        n_guest = layout.n_frames
        n_shadow = (scheme.options.shadow_pages + 8) * config.vcpus if shadowed else 0
        self.ram = Ram(n_guest + n_shadow)
        self.memory = MemoryManagement(self.ram, n_guest, identity=not shadowed, seed=seed)
        self.taps = taps(self.ram) if taps else None
        self.observer = Observer(config.vcpus, costs, self.taps)
        options = KernelOptions(timer_period=config.timer_period, bugs=frozenset(config.guest_bugs))
        self.kernel = Kernel(spec, layout, config.vcpus, programs, options)
        self.ledger = ProcessLedger(spec, self.memory)
        geometry = TlbGeometry(config.tlb_entries, config.tlb_ways, config.psc_slots)
        tlbs = [Tlb(spec, geometry) for _ in range(0, config.vcpus, config.smt)]
        self.cpus = [
            PhysicalCpu(i, spec, self.ram, tlbs[i // config.smt], streams)
            for i in range(config.vcpus)
        ]
        self.observer.watch_cpus(self.cpus)
        self.interrupts = [InterruptController() for _ in range(config.vcpus)]
        self.matrix = Matrix(
            config.vcpus, scheme.options.capacity, order=order_named(scheme.options.order)
        )
        self.submms: list[SubVmm] = []
        if shadowed:
            traces = WriteTraces(self.matrix)
            shared = Shared(
                spec, scheme, self.memory, self.matrix, traces, _propagation(scheme, self.matrix)
            )
            self.submms = [SubVmm(i, shared) for i in range(config.vcpus)]
        self._conductor = Conductor(chooser or LowestKey(seed))
        self._system: ActorSystem | None = None
        self._vcpus: list[VcpuActor] = []
        self._threads: dict[int, ThreadRef] = {}
        self._spins: dict[int, int] = {}
        self.running: int = 0
        self.ended = ""
        self.tree = SystemTree("machine", ())

    # ---- Board: what the VCPUs see ---------------------------------------------------------------

    def thread(self, thread_id: int) -> ThreadRef:
        if thread_id not in self._threads:
            self._spawn_thread(thread_id)
        return self._threads[thread_id]

    def _spawn_thread(self, thread_id: int) -> None:
        assert self._system is not None
        actor = ThreadActor(self.kernel.threads[thread_id], self.kernel)
        self._threads[thread_id] = self._system.spawn(actor, f"thread-{thread_id}")

    def _close_ended_threads(self) -> None:
        """End the tasks of guest threads that the kernel has reaped."""
        if len(self._threads) > len(self.kernel.threads):
            for ended in [i for i in self._threads if i not in self.kernel.threads]:
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
        boot = self.kernel.boot(_BootMemory(self.memory))
        cpu_refs = [system.spawn(CpuActor(cpu), f"cpu-{cpu.cpu_id}") for cpu in self.cpus]
        for cpu in self.cpus:
            self._watch(cpu)
        coherences = self._coherences(system, cpu_refs)
        if self.taps is not None:
            for gfn in range(self.memory.n_guest_frames):
                self.taps.grant(gfn, self.memory.frame_view[gfn])
        for i, coherence in enumerate(coherences):
            registers = coherence.registers
            registers.cr0, registers.cr4, registers.efer = boot.cr0, boot.cr4, boot.efer
            pge, nxe = bool(boot.cr4 & CR4_PGE), bool(boot.efer & EFER_NXE)
            cpu_refs[i].ask_nowait(SetModes(True, False, pge, nxe, True))
            coherence.load_root(boot.cr3)
            if self.taps is not None:
                self.taps.registers(i, boot.cr0, boot.cr3, boot.cr4, boot.efer)
            vcpu = VcpuActor(
                i, boot.idle_threads[i], cpu_refs[i], coherence, self.interrupts[i], self,
                self.observer,
            )  # fmt: skip
            self._vcpus.append(vcpu)
        self._vcpu_refs = [system.spawn(vcpu, f"vcpu-{vcpu.vcpu_id}") for vcpu in self._vcpus]
        for thread_id in boot.idle_threads:
            self.thread(thread_id)

    def _coherences(self, system: ActorSystem, cpu_refs: list[CpuRef]) -> list[Coherence]:
        if not self.submms:
            return [BareHardware(i, ref, self.observer) for i, ref in enumerate(cpu_refs)]
        consumers = [
            system.spawn(ConsumerActor(submm, ref, self.observer), f"consumer-{submm.vcpu_id}")
            for submm, ref in zip(self.submms, cpu_refs, strict=True)
        ]
        coherences: list[Coherence] = []
        for submm, ref, cpu in zip(self.submms, cpu_refs, self.cpus, strict=True):
            actor = ProducerActor(submm, self.memory, ref, cpu, consumers, self.observer)
            producer = system.spawn(actor, f"producer-{submm.vcpu_id}")
            coherences.append(
                Monitored(
                    submm.vcpu_id, submm.registers, producer, consumers, submm.shared.traces,
                    self.observer,
                )
            )  # fmt: skip
        return coherences

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
            self.kernel.close()
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
        limit = min(since + self.config.quantum, self.config.max_progress)
        baton = self._vcpu_refs[vcpu_id].ask_nowait(Grant(since, limit))
        self._close_ended_threads()
        if baton.ended:
            self.ended = baton.ended

    def _why_idle(self) -> str:
        if self.kernel.finished:
            return "finished"
        waits = ", ".join(f"VCPU {vcpu.vcpu_id} {vcpu.wait.value}" for vcpu in self._vcpus)
        return f"guest deadlock: {waits}, no interrupt pending"


def order_named(names: str) -> Order:
    """Return the patch channel order for switch names joined by `+`; `correct` is none.

    Raises:
        ValueError: No such switch.
    """
    order = Order.CORRECT
    for name in names.split("+"):
        if name == "correct":
            continue
        if name not in SWITCHES:
            raise ValueError(f"no patch order switch {name!r}: see `penumbra list faults`")
        order |= SWITCHES[name].order
    return order


def _propagation(scheme: Scheme, matrix: Matrix) -> Propagation:
    return PatchChannels(matrix) if scheme.propagate == "patch" else ImmediateShootdown()


class _BootMemory:
    """Guest-physical memory for the boot loader."""

    def __init__(self, memory: MemoryManagement) -> None:
        self._memory = memory

    def write(self, gpa: int, size: int, value: int) -> None:
        self._memory.store(gpa, size, value)
