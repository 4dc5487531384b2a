"""A reference machine for the guest kernel's tests: no VMM, n VCPUs on a bytearray, deterministic.

It shares no code with the product's hardware. Two kinds of TLB, because a kernel must be right
under both: none at all (`flat`: every access walks), and one that never forgets until it is told to
(`sticky`: leaf entries and paging-structure entries are kept until INVLPG or a CR3 load; a rights
miss walks again before it faults, a fault drops the entry). A large page is one entry of the
sticky TLB, and INVLPG of any of its addresses drops it.

`audit` states the rule that shootdowns are for: whenever an address space's lock is free, no TLB of
a VCPU that has it loaded holds a leaf entry that the tables do not back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from penumbra.guest.kernel import (
    VECTOR_DISK,
    VECTOR_TIMER,
    Kernel,
    KernelOptions,
    Layout,
    default_layout,
)
from penumbra.guest.programs.program import Program
from penumbra.guest.threads import GuestThread, KernelPanic
from penumbra.hw import operations as op
from penumbra.hw.formats import FormatSpec
from penumbra.hw.operations import Operation
from penumbra.hw.streams import AccessStream

PAGE = 4096
_P, _W, _U, _A, _D, _PS, _G, _NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
_FRAME = ((1 << 52) - 1) & ~0xFFF
_RESERVED = 0xFFF << 40
_Kind = TypeVar("_Kind")


class PageFault(Exception):
    def __init__(self, gva: int, error: int) -> None:
        super().__init__(f"page fault at {gva:#x}, error {error:#x}")
        self.gva = gva
        self.error = error


@dataclass
class Translation:
    """A leaf as cached: frame and combined rights."""

    gfn: int
    writable: bool
    user: bool
    no_exec: bool
    dirty: bool
    is_global: bool
    large: bool = False

    def allows(self, write: bool, user: bool, fetch: bool) -> bool:
        return (
            (self.writable or not write)
            and (self.user or not user)
            and not (fetch and self.no_exec)
        )


@dataclass
class Vcpu:
    vcpu_id: int
    thread: GuestThread
    thread_id: int
    cr3: int
    user: bool = False
    interrupts: bool = False
    shadow: bool = False
    operation: Operation | None = None
    result: Any = None
    progress: int = 0
    timer: int = 0
    finished: list[int] = field(default_factory=list)  # tickets of transfers
    waiting: list[tuple[int, int]] = field(default_factory=list)  # (due, vector)
    told: list[op.MappingChanged] = field(default_factory=list)
    tlb: dict[int, Translation] = field(default_factory=dict)
    large: dict[int, Translation] = field(default_factory=dict)
    paging_structures: dict[int, tuple[int, int]] = field(default_factory=dict)
    top: list[int] = field(default_factory=list)  # PAE: the four registers
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def due(self) -> int | None:
        """Progress at which the next interrupt can be taken."""
        times = [due for due, _ in self.waiting]
        if self.timer:
            times.append(self.timer)
        return min(times) if times else None


class FlatMachine:
    """Runs one kernel to its end."""

    def __init__(
        self,
        spec: FormatSpec,
        programs: list[Program],
        n_vcpus: int = 1,
        *,
        sticky: bool = False,
        seed: int = 0,
        quantum: int = 40,
        ipi_latency: int = 30,
        layout: Layout | None = None,
        options: KernelOptions | None = None,
        streams: dict[int, AccessStream] | None = None,
    ) -> None:
        self.spec = spec
        used = [r for program in programs for r in program.used_ranges()]
        peak = sum(program.peak_pages for program in programs)
        self.layout = layout or default_layout(spec, peak, used)
        self.ram = bytearray(self.layout.ram_bytes)
        self.sticky = sticky
        self.random = random.Random(seed)
        self.quantum = quantum
        self.ipi_latency = ipi_latency
        self.streams = streams or {}
        self.disk: dict[int, bytes] = {}
        self.disk_latency = 150
        self.transfers: list[tuple[int, int, Vcpu, op.StartDma]] = []
        self.n_transfers = 0
        self.carries = False  # does `MappingChanged` reach the other CPUs?
        self.marks: list[op.Mark] = []
        self.stale: list[str] = []
        self.auditing = sticky
        self.faults: list[tuple[int, int]] = []
        self.watch: Callable[[Operation], None] = lambda _: None
        options = options or KernelOptions(timer_period=3000)
        self.kernel = Kernel(spec, self.layout, n_vcpus, programs, options)
        state = self.kernel.boot(self)
        self.vcpus = [
            Vcpu(n, self.kernel.threads[tid], tid, state.registers[n].cr3)
            for n, tid in enumerate(state.idle_threads)
        ]
        for vcpu in self.vcpus:
            self._load_root(vcpu, vcpu.cr3)

    def _load_root(self, vcpu: Vcpu, cr3: int) -> None:
        vcpu.cr3 = cr3
        vcpu.tlb = {vpn: t for vpn, t in vcpu.tlb.items() if t.is_global}
        vcpu.large = {key: t for key, t in vcpu.large.items() if t.is_global}
        vcpu.paging_structures.clear()
        if self.spec.name == "pae":
            assert cr3 % 32 == cr3 >> 32 == 0
            vcpu.top = [self.read(cr3 + 8 * i, 8) for i in range(4)]
            for entry in vcpu.top:  # else the load is a general-protection fault
                assert not entry & 1 or not entry & (0x1E6 | _RESERVED | 0xFFF << 52)

    # -- memory ---------------------------------------------------------------------------------

    def write(self, gpa: int, size: int, value: int) -> None:
        self.ram[gpa : gpa + size] = value.to_bytes(size, "little")

    def read(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.ram[gpa : gpa + size], "little")

    def walk(
        self, vcpu: Vcpu, gva: int, *, set_bits: bool, write: bool = False
    ) -> Translation | None:
        """Walk the tables; with `set_bits` also use and fill the paging-structure cache."""
        width, leaf = self.spec.entry_bytes, self.spec.levels[0]
        key = gva >> self.spec.levels[1].shift
        rights, table = _W | _U, vcpu.cr3 & _FRAME
        cached = vcpu.paging_structures.get(key) if self.sticky and set_bits else None
        if cached is not None:
            table, rights = cached
        else:
            for level in reversed(self.spec.levels[1:]):
                if vcpu.top and level is self.spec.levels[-1]:
                    entry = vcpu.top[gva >> 30]
                    if not entry & _P:
                        return None
                    table = entry & _FRAME
                    continue
                gpa = table + level.index(gva) * width
                entry = self.read(gpa, width)
                if not entry & _P:
                    return None
                if set_bits and entry & _RESERVED:
                    raise PageFault(gva, 9 | vcpu.user << 2)
                if set_bits and not entry & _A:
                    self.write(gpa, width, entry | _A)
                rights = rights & entry & (_W | _U) | (rights | entry) & _NX
                if entry & _PS and level is self.spec.levels[1]:
                    return self._large_leaf(gpa, entry, gva, rights, write, set_bits=set_bits)
                table = entry & _FRAME
            if self.sticky and set_bits:
                vcpu.paging_structures[key] = (table, rights)
        gpa = table + leaf.index(gva) * width
        entry = self.read(gpa, width)
        if not entry & _P:
            return None
        rights = rights & entry & (_W | _U) | (rights | entry) & _NX
        dirty = bool(entry & _D) or (write and bool(rights & _W))
        if set_bits:
            self.write(gpa, width, entry | _A | (_D if dirty else 0))
        return Translation(
            (entry & _FRAME) >> 12,
            bool(rights & _W),
            bool(rights & _U),
            bool(rights & _NX),
            dirty,
            bool(entry & _G),
        )

    def _large_leaf(
        self, gpa: int, entry: int, gva: int, rights: int, write: bool, *, set_bits: bool
    ) -> Translation:
        dirty = bool(entry & _D) or (write and bool(rights & _W))
        if set_bits:
            self.write(gpa, self.spec.entry_bytes, entry | _A | (_D if dirty else 0))
        inside = gva & ((1 << self.spec.levels[1].shift) - 1)
        return Translation(
            (entry & _FRAME) + inside >> 12,
            bool(rights & _W),
            bool(rights & _U),
            bool(rights & _NX),
            dirty,
            bool(entry & _G),
            True,
        )

    def _cached(self, vcpu: Vcpu, vpn: int) -> Translation | None:
        key, inside = self._large_key(vpn)
        large = vcpu.large.get(key)
        return vcpu.tlb.get(vpn) or (large and replace(large, gfn=large.gfn + inside))

    def _large_key(self, vpn: int) -> tuple[int, int]:
        return divmod(vpn, 1 << (self.spec.levels[1].shift - 12))

    def _keep(self, vcpu: Vcpu, vpn: int, fresh: Translation) -> None:
        key, inside = self._large_key(vpn)
        if fresh.large:
            vcpu.large[key] = replace(fresh, gfn=fresh.gfn - inside)
        else:
            vcpu.tlb[vpn] = fresh

    def _forget(self, vcpu: Vcpu, vpn: int) -> None:
        vcpu.tlb.pop(vpn, None)
        vcpu.large.pop(self._large_key(vpn)[0], None)

    def translate(self, vcpu: Vcpu, gva: int, write: bool, fetch: bool = False) -> int:
        vpn = gva >> 12
        found = self._cached(vcpu, vpn)
        if found and found.allows(write, vcpu.user, fetch) and (found.dirty or not write):
            if found.user and not self.kernel.frames.references(found.gfn):
                self.stale.append(f"VCPU {vcpu.vcpu_id} uses the freed frame of page {vpn:#x}")
            return found.gfn << 12 | gva & 0xFFF
        self._forget(vcpu, vpn)
        fresh = self.walk(vcpu, gva, set_bits=True, write=write)
        if fresh is None or not fresh.allows(write, vcpu.user, fetch):
            vcpu.paging_structures.pop(gva >> self.spec.levels[1].shift, None)
            again = self.walk(vcpu, gva, set_bits=False)
            if again is not None and again.allows(write, vcpu.user, fetch):
                return self.translate(vcpu, gva, write, fetch)
            error = bool(fresh) | write << 1 | vcpu.user << 2 | (fetch and self.spec.has_nx) << 4
            raise PageFault(gva, error)
        if self.sticky:
            self._keep(vcpu, vpn, fresh)
        return fresh.gfn << 12 | gva & 0xFFF

    def audit(self) -> None:
        """Note every cached translation that the tables do not back although nobody is at work."""
        for vcpu in self.vcpus:
            space = next(
                (p.space for p in self.kernel.processes.processes.values()
                 if not p.ended and p.space.root_gpa == vcpu.cr3), None,
            )  # fmt: skip
            if space is None or self._locked(space.lock):
                continue
            n = 1 << (self.spec.levels[1].shift - 12)
            pages = [*vcpu.tlb.items(), *((key * n, one) for key, one in vcpu.large.items())]
            for vpn, cached in pages:
                now = self.walk(vcpu, vpn << 12, set_bits=False)
                if not cached.user or (
                    now is not None
                    and now.gfn == cached.gfn
                    and now.writable >= cached.writable
                    and now.no_exec <= cached.no_exec
                ):
                    continue
                self.stale.append(f"VCPU {vcpu.vcpu_id} page {vpn:#x}: {cached} against {now}")

    def _locked(self, lock: int) -> bool:
        gpa = lock - self.layout.window_gva + (self.layout.pool_gfn << 12)
        return self.read(gpa, 8) != 0

    # -- running --------------------------------------------------------------------------------

    def run(self, max_progress: int = 50_000_000) -> str:
        """Run until nothing can happen any more; return how it ended. The guest is over then."""
        ended = self._run(max_progress)
        self.kernel.close()
        return ended

    def _run(self, max_progress: int) -> str:
        try:
            while True:
                vcpu = self._candidate()
                if vcpu is None:
                    return "finished" if self.kernel.finished else "nothing can happen"
                if vcpu.progress > max_progress:
                    return "progress limit"
                for _ in range(self.random.randint(1, self.quantum)):
                    if not self._step(vcpu):
                        break
        except KernelPanic as panic:
            return f"panic: {panic}"

    def run_until_mark(self, what: str) -> None:
        """Step one operation at a time until one more such mark has been made."""
        n_marks = len(self.marks)
        while not any(mark.what == what for mark in self.marks[n_marks:]):
            vcpu = self._candidate()
            assert vcpu is not None, f"the guest came to rest before {what!r}"
            self._step(vcpu)

    def _candidate(self) -> Vcpu | None:
        best: Vcpu | None = None
        for vcpu in self.vcpus:
            if isinstance(vcpu.operation, op.Halt) and not vcpu.user:
                if not vcpu.interrupts or vcpu.due is None:
                    continue
                vcpu.progress = max(vcpu.progress, vcpu.due)
            if best is None or vcpu.progress < best.progress:
                best = vcpu
        return best

    def _step(self, vcpu: Vcpu) -> bool:
        """Execute one operation or deliver one event; tell whether the quantum may go on."""
        if vcpu.operation is None:
            vcpu.operation = vcpu.thread.next(vcpu.result)
            vcpu.result = None
        if vcpu.interrupts and not vcpu.shadow and self._deliver(vcpu):
            return True
        operation = vcpu.operation
        if isinstance(operation, op.Halt) and not vcpu.user:
            vcpu.shadow = False
            return self._deliver(vcpu)
        vcpu.shadow = False
        vcpu.operations[type(operation).__name__] += 1
        self.watch(operation)
        if vcpu.user and isinstance(operation, _PRIVILEGED):
            what = f"{type(operation).__name__} in user mode"
            handler = self.kernel.protection_fault(vcpu.vcpu_id, vcpu.thread_id, what)
            self._trap(vcpu, handler, operation)
            return True
        try:
            done = self._execute(vcpu, operation)
        except PageFault as fault:
            self._forget(vcpu, fault.gva >> 12)
            self.faults.append((fault.gva, fault.error))
            handler = self.kernel.page_fault(vcpu.vcpu_id, vcpu.thread_id, fault.gva, fault.error)
            self._trap(vcpu, handler, vcpu.operation)
            return True
        vcpu.progress += 0 if isinstance(operation, op.Mark) else 1
        return done

    def _deliver(self, vcpu: Vcpu) -> bool:
        if vcpu.timer and vcpu.timer <= vcpu.progress:
            vcpu.timer, vector = 0, VECTOR_TIMER
        else:
            ready = sorted(event for event in vcpu.waiting if event[0] <= vcpu.progress)
            if not ready:
                return False
            vcpu.waiting.remove(ready[0])
            vector = ready[0][1]
            self._carry_out(vcpu)
        retry = None if isinstance(vcpu.operation, op.Halt) else vcpu.operation
        self._trap(vcpu, self.kernel.interrupt(vcpu.vcpu_id, vcpu.thread_id, vector), retry)
        return True

    def _trap(self, vcpu: Vcpu, handler: Any, retry: Operation | None) -> None:
        vcpu.thread.trap(handler, retry, interrupts=vcpu.interrupts)
        vcpu.user = vcpu.interrupts = False
        vcpu.operation = vcpu.result = None

    def _execute(self, vcpu: Vcpu, operation: Operation) -> bool:
        """Execute; on success the operation is over. Returns False to end the quantum."""
        match operation:
            case op.Load(gva, size):
                vcpu.result = self.read(self.translate(vcpu, gva, False), size)
            case op.Store(gva, size, value):
                self.write(self.translate(vcpu, gva, True), size, value)
            case op.Exchange(gva, size, value):
                gpa = self.translate(vcpu, gva, True)
                vcpu.result = self.read(gpa, size)
                self.write(gpa, size, value)
            case op.CompareExchange(gva, size, expected, value):
                gpa = self.translate(vcpu, gva, True)
                vcpu.result = self.read(gpa, size)
                if vcpu.result == expected:
                    self.write(gpa, size, value)
            case op.Fill(gva, n_bytes, value):
                gpa = self.translate(vcpu, gva, True)
                assert gva % PAGE + n_bytes <= PAGE
                self.ram[gpa : gpa + n_bytes] = value.to_bytes(8, "little") * (n_bytes // 8)
                vcpu.progress += n_bytes // 8
            case op.Copy(dst, src, n_bytes):
                words = [  # every page before the first byte moves: a fault begins again
                    (self.translate(vcpu, src + at, False), self.translate(vcpu, dst + at, True))
                    for at in range(0, n_bytes, 8)
                ]
                for source, target in words:
                    self.ram[target : target + 8] = self.ram[source : source + 8]
                vcpu.progress += n_bytes // 8
            case op.SpinUntil(gva, size, mask, value):
                if self.read(self.translate(vcpu, gva, False), size) & mask != value:
                    return False
            case op.Block():
                if not self._block(vcpu, operation):
                    return True
            case op.SwitchThread(thread_id):
                vcpu.thread, vcpu.thread_id = self.kernel.threads[thread_id], thread_id
            case op.Syscall(name, args):
                handler = self.kernel.syscall(vcpu.vcpu_id, vcpu.thread_id, name, args)
                self._trap(vcpu, handler, None)
            case op.TrapReturn(to_user, interrupts):
                vcpu.user, vcpu.interrupts = to_user, interrupts
                if self.auditing and to_user:
                    self.audit()
            case _:
                self._execute_system(vcpu, operation)
        vcpu.operation = None
        return True

    def _tell(self, change: op.MappingChanged) -> int:
        """Tell every CPU named, if anybody is told at all."""
        if not self.carries:
            return 0
        for vcpu in self.vcpus:
            if change.cpus >> vcpu.vcpu_id & 1:
                vcpu.told.append(change)
        return change.cpus

    def _follow(self, vcpu: Vcpu) -> None:
        for change in vcpu.told:
            for vpn in range(change.gva >> 12, (change.gva >> 12) + change.n_pages):
                if change.root == vcpu.cr3:
                    vcpu.tlb.pop(vpn, None)
        vcpu.told.clear()

    def _execute_system(self, vcpu: Vcpu, operation: Operation) -> None:
        match operation:
            case op.Invlpg(gva):
                self._follow(vcpu)
                self._forget(vcpu, gva >> 12)
                vcpu.paging_structures.clear()
            case op.LoadControl(3, value):
                self._follow(vcpu)
                self._load_root(vcpu, value)
            case op.SetInterrupts(enabled):
                vcpu.result = int(vcpu.interrupts)
                vcpu.shadow = enabled and not vcpu.interrupts
                vcpu.interrupts = enabled
            case op.SendIpi(targets, vector):
                for other in self.vcpus:
                    if targets >> other.vcpu_id & 1:
                        other.waiting.append((vcpu.progress + self.ipi_latency, vector))
            case op.ArmTimer(after):
                vcpu.timer = vcpu.progress + after if after else 0
            case op.StartDma():
                self.n_transfers += 1
                due = vcpu.progress + self.disk_latency
                self.transfers.append((due, self.n_transfers, vcpu, operation))
                vcpu.waiting.append((due, VECTOR_DISK))
                vcpu.result = self.n_transfers
            case op.FinishedDma():
                vcpu.result = vcpu.finished.pop(0) if vcpu.finished else 0
            case op.MappingChanged():
                vcpu.result = self._tell(operation)
            case op.Mark():
                self.marks.append(operation)
            case _:
                raise AssertionError(f"unknown operation {operation}")

    def _carry_out(self, owner: Vcpu) -> None:
        """Let the disk do what is due when its owner takes an interrupt, and never earlier."""
        for transfer in list(self.transfers):
            due, ticket, vcpu, dma = transfer
            if vcpu is not owner or due > vcpu.progress:
                continue
            self.transfers.remove(transfer)
            vcpu.finished.append(ticket)
            if dma.to_disk:
                self.disk[dma.block] = bytes(self.ram[dma.gpa : dma.gpa + PAGE])
            else:
                self.ram[dma.gpa : dma.gpa + PAGE] = self.disk.get(dma.block, bytes(PAGE))

    def _block(self, vcpu: Vcpu, block: op.Block) -> bool:
        """Execute some runs; tell whether the block is over."""
        stream = self.streams[block.stream]
        for at in range(block.start, min(block.stop, block.start + self.quantum)):
            run = int(stream.runs[at])
            gva = int(stream.pages[run >> 40]) << 12
            vcpu.operation = op.Block(block.stream, at, block.stop)
            gpa = self.translate(vcpu, gva, run & 3 == 1, run & 3 == 2)
            if run & 3 == 1:
                self.write(gpa + (run >> 2 & 0xFF8), 8, stream.salt << 40 | at)
            vcpu.progress += run >> 14 & ((1 << 26) - 1)
            vcpu.operation = op.Block(block.stream, at + 1, block.stop)
        return block.stop <= block.start + self.quantum

    def trace_of(self, kind: type[_Kind]) -> list[_Kind]:
        """Run to the end and return every operation of one kind that was executed."""
        found: list[_Kind] = []
        self.watch = lambda operation: (
            found.append(operation) if isinstance(operation, kind) else None
        )
        assert self.run() == "finished"
        return found

    # -- what tests ask -------------------------------------------------------------------------

    @property
    def wrong(self) -> list[op.Mark]:
        return [mark for mark in self.marks if mark.what == "wrong"]

    @property
    def reasons(self) -> list[str]:
        """Why processes were killed, in the order of their ends."""
        return [mark.text for mark in self.marks if mark.what == "process_exit" and mark.text]

    def check_all_returned(self) -> None:
        """Assert that the ended processes have given everything back."""
        self.kernel.check()
        cached = len(self.kernel.cache)
        assert self.kernel.frames.n_free + cached == self.kernel.frames.n_frames
        assert self.kernel.swap.n_used == 0
        assert self.kernel.pool.n_promised == 0


_PRIVILEGED = (
    op.Invlpg,
    op.LoadControl,
    op.ReadControl,
    op.SendIpi,
    op.Halt,
    op.SetInterrupts,
    op.ArmTimer,
    op.SwitchThread,
    op.StartDma,
    op.FinishedDma,
)
