"""The guest kernel: what the machine calls when a VCPU traps.

Reading order of this package: layout, frames, balloon, areas, tables (what there is); words,
shootdown, scheduler (how CPUs agree); large_pages; swap, disk, paging (what goes to the disk and
comes back); faults, memory_calls, advice_calls, process_calls, thread_calls (what is done); this
file (the doors).

The contract with whoever drives the VCPUs:

- every trap (fault, interrupt, system call) enters in supervisor mode with interrupts disabled, its
  coroutine pushed by `GuestThread.trap`; kernel code enables interrupts itself where it can be
  long;
- an interrupt is taken between two operations, or inside a block or a spin, if interrupts are
  enabled, but not between `SetInterrupts(True)` and the operation after it (the STI shadow);
- a `Halt` ends when an interrupt is taken (`retry=None`); a `SpinUntil` lets other VCPUs run;
- `SwitchThread(n)` makes `threads[n]` the VCPU's thread: its `next(None)` follows;
- guest RAM is zero at the start.

`Mark`s the kernel emits: "process_start" (pid, root gpa), "thread" (thread id, pid), "process_exec"
(pid, old root gpa, new root gpa), "process_exit" (pid, root gpa, exit code; the text says why it
was killed; its memory is still whole).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from penumbra.guest.kernel.advice_calls import AdviceCalls
from penumbra.guest.kernel.areas import Area
from penumbra.guest.kernel.balloon import Balloon
from penumbra.guest.kernel.boot import (
    BootMemory,
    BootState,
    KernelWindow,
    StartRegisters,
    control_registers,
)
from penumbra.guest.kernel.bugs import check_bugs
from penumbra.guest.kernel.device_calls import DeviceDriver
from penumbra.guest.kernel.disk import DiskDriver
from penumbra.guest.kernel.faults import Faults
from penumbra.guest.kernel.file_calls import FileCalls
from penumbra.guest.kernel.frames import Frames, OutOfMemory, TablePool
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.layout import MAX_VCPUS, Layout
from penumbra.guest.kernel.memory_calls import MemoryCalls
from penumbra.guest.kernel.page_cache import PageCache
from penumbra.guest.kernel.paging import Paging
from penumbra.guest.kernel.process import Cpu, Process, Thread
from penumbra.guest.kernel.process_calls import ProcessCalls
from penumbra.guest.kernel.scheduler import Scheduler
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.slots import Slots
from penumbra.guest.kernel.swap import SwapSpace
from penumbra.guest.kernel.tables import AddressSpace, Tables
from penumbra.guest.kernel.thread_calls import ThreadCalls
from penumbra.guest.kernel.vectors import VECTOR_DISK, VECTOR_SHOOTDOWN, VECTOR_STOP
from penumbra.guest.kernel.words import Words
from penumbra.guest.programs.program import Program
from penumbra.guest.threads import GuestCoroutine, KernelPanic
from penumbra.hw.formats import PF_RSVD, PF_U, FormatSpec
from penumbra.hw.interrupts import DEVICE_VECTORS
from penumbra.hw.operations import Mark, SetInterrupts

ENOSYS, EINVAL = -38, -22
_Handler: TypeAlias = Callable[[Thread, tuple[int, ...]], Awaitable[int | None]]


@dataclass(frozen=True)
class KernelOptions:
    """What can be chosen about a kernel.

    Attributes:
        timer_period: Length of a time slice, in progress.
        flush_limit: Ranges of more pages are flushed by a CR3 load instead of INVLPGs.
        global_pages: Whether the kernel's window is mapped with G.
        bugs: Names of `GUEST_BUGS` to have.
        swap_pages: Blocks of the disk to swap to; 0: nothing is ever paged out.
        flush: How other CPUs come to flush: one of `shootdown.FLUSHES`.
        user_frames: User frames to use at most, as if RAM ended there; 0: all.
        balloon_frames: User frames to lend to whatever is below the guest, at most.
    """

    timer_period: int = 100_000
    flush_limit: int = 32
    global_pages: bool = True
    bugs: frozenset[str] = field(default_factory=frozenset)
    swap_pages: int = 0
    flush: str = "eager"
    user_frames: int = 0
    balloon_frames: int = 0


class Kernel:
    """One guest operating system.

    Invariant: those of its parts; `check()` asserts them all. Holds between any two operations.

    Attributes:
        threads: Every live thread by id, for whoever drives them.
    """

    def __init__(
        self,
        spec: FormatSpec,
        layout: Layout,
        n_vcpus: int,
        programs: Sequence[Program],
        options: KernelOptions | None = None,
    ) -> None:
        """Make a kernel that starts one process per program at boot.

        Raises:
            ValueError: More VCPUs than the kernel knows how to address, or an unknown bug.
        """
        options = options or KernelOptions()
        if not 1 <= n_vcpus <= MAX_VCPUS:
            raise ValueError(f"{n_vcpus} VCPUs: a guest has 1 to {MAX_VCPUS}")
        check_bugs(options.bugs)
        self.spec = spec
        self.layout = layout
        self._programs = tuple(programs)
        self.pool = TablePool(layout.pool_gfn, layout.pool_frames)
        first = layout.first_user_gfn
        n_frames = layout.n_frames - first
        self.frames = Frames(first, min(n_frames, options.user_frames or n_frames))
        self.device = DeviceDriver(spec)
        self.frames.device_gfn = self.device.gfn
        words = Words(self.pool, layout)
        self._window = KernelWindow(spec, layout, self.pool, global_pages=options.global_pages)
        self.tables = Tables(spec, layout, self.pool, self._window.root_entries)
        root_gpa = self._window.root_gpa
        self.shootdown = Shootdown(
            words, root_gpa, options.flush_limit, options.bugs, self.frames, options.flush, n_vcpus
        )
        self.cache = PageCache(self.frames, self._areas)
        self.balloon = Balloon(self.frames, options.balloon_frames)
        self.frames.reclaim = self._reclaim
        slots = Slots(spec, layout, self._window.slots_table_gva)
        self.swap = SwapSpace(spec, options.swap_pages)
        self.large = LargePages(
            self.tables, self.frames, self.pool, slots, self.shootdown, self.swap, options.bugs
        )
        memory = MemoryCalls(
            self.tables, layout, self.frames, self.pool, self.cache, self.shootdown, options.bugs,
            self.swap, self.large,
        )  # fmt: skip
        self.threads: dict[int, Thread] = {}
        self.scheduler = Scheduler(n_vcpus, root_gpa, options.timer_period, self._reap)
        self.scheduler.flushed = self.shootdown.flushed
        self.disk = DiskDriver(self.scheduler)
        self.paging = Paging(
            self.tables, self.frames, self.cache, self.shootdown, words, self.swap, self.disk,
            self.scheduler, self._spaces, self.large,
        )  # fmt: skip
        self.faults = Faults(
            self.tables, self.frames, self.cache, slots, self.shootdown, self.paging, self.swap,
            self.large,
        )  # fmt: skip
        for cpu in self.scheduler.cpus:
            self._add_idle_thread(cpu)
        self.processes = ProcessCalls(
            self.tables, self.frames, words, memory, self.shootdown, self.scheduler, self.threads,
            self.paging, self.swap, self.large,
        )  # fmt: skip
        self._thread_calls = ThreadCalls(self.processes, self.scheduler, words, self.paging)
        self._file_calls = FileCalls(memory, self.faults, self.pool, layout)
        self._calls = _call_table(memory, self.processes, self._thread_calls, self._file_calls)
        advice = AdviceCalls(memory, self.large, self.shootdown)
        self._calls["madvise"] = (advice.madvise, 3, 3)
        self._calls["device_interrupts"] = (self.device.device_interrupts, 1, 1)

    @property
    def n_frames(self) -> int:
        """Frames of guest-physical memory, from 0."""
        return self.layout.n_frames

    @property
    def backed(self) -> None:
        """Every frame is RAM."""
        return

    @property
    def ended(self) -> list[Process]:
        """The processes that have ended, in order of creation."""
        return [process for process in self.processes.processes.values() if process.ended]

    @property
    def finished(self) -> bool:
        """Whether every process has ended."""
        return all(process.ended for process in self.processes.processes.values())

    def boot(self, memory: BootMemory) -> BootState:
        """Write what must be in memory, make the first processes, and say where VCPUs start."""
        self._window.write(memory)
        for program in self._programs:
            root = self.tables.take_root()
            self._window.write_root(memory, root.gpa)
            space = AddressSpace(root, self.tables.new_levels(), self.processes.take_lock())
            self.processes.lay_image(space, program.image(0))
            process = self.processes.add_process(program, space, None)
            self.processes.add_thread(process, 0, ())
        cr0, cr4, efer = control_registers(self.spec)
        idle_threads = tuple(range(len(self.scheduler.cpus)))
        start = StartRegisters(cr0, self._window.root_gpa, cr4, efer)
        return BootState((start,) * len(idle_threads), idle_threads)

    # -- the doors ------------------------------------------------------------------------------

    def page_fault(self, vcpu_id: int, thread_id: int, gva: int, error: int) -> GuestCoroutine:
        """Handle a page fault at byte address `gva` with the hardware's error code."""
        return self._page_fault(self._thread(vcpu_id, thread_id), gva, error)

    def protection_fault(self, vcpu_id: int, thread_id: int, what: str) -> GuestCoroutine:
        """Handle a general-protection fault (privileged operation, non-canonical address)."""
        return self._protection_fault(self._thread(vcpu_id, thread_id), what)

    def syscall(
        self, vcpu_id: int, thread_id: int, name: str, args: tuple[int, ...]
    ) -> GuestCoroutine:
        """Serve a system call; the coroutine's value is the program's."""
        return self._syscall(self._thread(vcpu_id, thread_id), name, args)

    def interrupt(self, vcpu_id: int, thread_id: int, vector: int) -> GuestCoroutine:
        """Serve an interrupt."""
        return self._interrupt(self._thread(vcpu_id, thread_id), vector)

    def on_disk(self, entry: int) -> tuple[bool, int] | None:
        """Return where a swapped page is, (in memory, frame or block), or None."""
        return self.paging.where(entry)

    def close(self) -> None:
        """End every coroutine; the guest cannot run any more."""
        for thread in self.threads.values():
            thread.close()

    def check(self) -> None:
        self.pool.check()
        self.frames.check()
        self.balloon.check()
        self.cache.check()
        self.paging.check()
        self.scheduler.check()
        for process in self.processes.processes.values():
            process.space.areas.check()
        self.large.check(space for _, space in self._spaces())
        for thread in self.threads.values():
            thread.check()

    # -- behind the doors -----------------------------------------------------------------------

    async def _page_fault(self, thread: Thread, gva: int, error: int) -> None:
        if not error & PF_U and not (thread.user_access and not self.layout.in_window(gva)):
            raise KernelPanic(f"kernel page fault at {gva:#x}, error {error:#x}")
        if error & PF_U and self.layout.in_window(gva):
            reason = f"segmentation fault: user access to the kernel's page at {gva:#x}"
        elif error & PF_RSVD:
            reason = f"reserved bit set in the page tables of {gva:#x}"
        else:
            await SetInterrupts(True)
            try:
                reason = await self.faults.resolve(thread, gva, error)
            except OutOfMemory as error_:
                reason = str(error_)
        if reason:
            if thread.user_access:
                await self._thread_calls.abandon_user_access(thread)
                await self._file_calls.drop_bounce(thread)
            await self.processes.kill(thread, reason)
        if thread.trapped_from_user:
            await self.processes.leave(thread)

    async def _protection_fault(self, thread: Thread, what: str) -> None:
        if not thread.trapped_from_user:
            raise KernelPanic(f"general protection fault in the kernel: {what}")
        await self.processes.kill(thread, f"general protection fault: {what}")

    async def _syscall(self, thread: Thread, name: str, args: tuple[int, ...]) -> int | None:
        if name == "other":
            result: int | None = 0
        else:
            await SetInterrupts(True)
            result = await self._serve(thread, name, args)
            await SetInterrupts(False)
        await self.processes.leave(thread)
        return result

    async def _serve(self, thread: Thread, name: str, args: tuple[int, ...]) -> int | None:
        handler, n_least, n_most = self._calls.get(name, (None, 0, 0))
        if handler is None:
            return ENOSYS
        if not n_least <= len(args) <= n_most:
            return EINVAL
        try:
            return await handler(thread, args)
        except OutOfMemory as error:
            await self._file_calls.drop_bounce(thread)
            await self.processes.kill(thread, str(error))
            return None

    async def _interrupt(self, thread: Thread, vector: int) -> None:
        if vector == VECTOR_SHOOTDOWN:
            await self.shootdown.serve(thread.cpu)
        elif vector == VECTOR_STOP:
            await self.shootdown.serve_stop(thread.cpu)
        elif vector in DEVICE_VECTORS:
            await self.device.serve(vector)
        elif vector == VECTOR_DISK:
            await self.disk.serve()
            thread.cpu.must_schedule = True  # who slept goes before who computes
        else:
            await self.shootdown.tick(thread.cpu)
            if thread.cpu.cpu_id == 0:
                await self.balloon.tick()
            thread.cpu.must_schedule = True
        if thread.trapped_from_user:
            await self.processes.leave(thread)

    async def _idle(self, cpu: Cpu) -> None:
        """Be a VCPU's first thread; VCPU 0's announces and starts the first processes."""
        if cpu.cpu_id == 0:
            for process in list(self.processes.processes.values()):
                start = (process.pid, process.space.root_gpa)
                await Mark("process_start", start, process.program.name)
                for thread in process.threads:
                    await Mark("thread", (thread.thread_id, process.pid))
                    await self.scheduler.enqueue(thread)
        await self.scheduler.idle(cpu)

    def _add_idle_thread(self, cpu: Cpu) -> None:
        thread = Thread(cpu.cpu_id, self._idle(cpu), None, cpu)
        thread.on_cpu = True
        cpu.idle_thread = cpu.current = thread
        self.threads[thread.thread_id] = thread

    def _thread(self, vcpu_id: int, thread_id: int) -> Thread:
        thread = self.threads[thread_id]
        assert thread.cpu.cpu_id == vcpu_id, f"thread {thread_id} is not on VCPU {vcpu_id}"
        return thread

    def _reclaim(self) -> bool:
        return self.balloon.give_back(len(self.balloon)) or self.cache.reclaim()

    def _areas(self) -> list[Area]:
        return list(self.processes.areas())

    def _spaces(self) -> list[tuple[int, AddressSpace]]:
        return self.processes.spaces()

    def _reap(self, thread: Thread) -> None:
        self.processes.reap(thread)


_MANY = 64


def _call_table(
    memory: MemoryCalls, processes: ProcessCalls, threads: ThreadCalls, files: FileCalls
) -> dict[str, tuple[_Handler | None, int, int]]:
    """Return handler, least and most number of arguments by the call's name."""
    return {
        "mmap": (memory.mmap, 6, 6),
        "munmap": (memory.munmap, 2, _MANY),
        "mprotect": (memory.mprotect, 3, 3),
        "mremap": (memory.mremap, 4, 5),
        "brk": (memory.brk, 1, 1),
        "fork": (processes.fork, 1, _MANY),
        "exec": (processes.exec, 2, _MANY),
        "exit": (processes.exit, 0, 1),
        "crash": (processes.crash, 0, 0),
        "wait": (processes.wait, 1, 1),
        "thread_create": (threads.thread_create, 1, _MANY),
        "thread_join": (threads.thread_join, 1, 1),
        "thread_exit": (processes.thread_exit, 0, 0),
        "yield": (threads.yield_cpu, 0, 0),
        "futex_wait": (threads.futex_wait, 2, 2),
        "futex_wake": (threads.futex_wake, 2, 2),
        "pread": (files.pread, 4, 4),
        "pwrite": (files.pwrite, 4, 4),
        "getpid": (processes.getpid, 0, 0),
    }
