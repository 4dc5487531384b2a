"""Calls about processes: fork, exec, exit, wait; and how threads begin and end.

Memory of a process that has ended is taken back by its last thread, after that thread has loaded
the kernel's own root: every other thread had done so before it stopped counting as a user of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from penumbra.guest.kernel.areas import Area, image_object
from penumbra.guest.kernel.frames import Frames, OutOfMemory
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.memory_calls import MemoryCalls
from penumbra.guest.kernel.paging import Paging
from penumbra.guest.kernel.process import Process, State, Thread
from penumbra.guest.kernel.scheduler import Scheduler
from penumbra.guest.kernel.shootdown import Shootdown
from penumbra.guest.kernel.swap import SwapSpace
from penumbra.guest.kernel.tables import AddressSpace, Tables
from penumbra.guest.kernel.vectors import VECTOR_RESCHEDULE
from penumbra.guest.kernel.words import Words, acquire, release
from penumbra.guest.programs.program import Image, Program
from penumbra.guest.threads import KernelPanic
from penumbra.hw.formats import P, W
from penumbra.hw.operations import Mark, SendIpi, SetInterrupts, Store

ECHILD, EINVAL, EBUSY = -10, -22, -16


class ProcessCalls:
    """Makes and ends processes and threads.

    Invariant: a process that has not ended has at least one thread, and its address space as many
    users as threads that still may load it.

    Attributes:
        processes: Every process that ever was, by id.
        threads: Every thread that is not yet reaped, by id; idle threads included.
    """

    def __init__(
        self,
        tables: Tables,
        frames: Frames,
        words: Words,
        memory: MemoryCalls,
        shootdown: Shootdown,
        scheduler: Scheduler,
        threads: dict[int, Thread],
        paging: Paging,
        swap: SwapSpace,
        large: LargePages,
    ) -> None:
        self._large = large
        self._paging = paging
        self._swap = swap
        self._tables = tables
        self._frames = frames
        self._words = words
        self._memory = memory
        self._shootdown = shootdown
        self._scheduler = scheduler
        self.threads = threads
        self.processes: dict[int, Process] = {}
        self._n_threads = len(threads)

    def areas(self) -> Iterator[Area]:
        """Return the areas of all processes that have not ended."""
        for process in self.processes.values():
            if not process.ended:
                yield from process.space.areas

    def spaces(self) -> list[tuple[int, AddressSpace]]:
        """Return the address spaces that are in use, by process id, upwards."""
        return [
            (process.pid, process.space)
            for process in self.processes.values()
            if not process.ended and not process.space.gone
        ]

    # -- making ---------------------------------------------------------------------------------

    def add_process(self, program: Program, space: AddressSpace, parent: Process | None) -> Process:
        process = Process(len(self.processes) + 1, program, space, parent)
        self.processes[process.pid] = process
        if parent is not None:
            parent.children.append(process)
        return process

    def add_thread(self, process: Process, entry: int, args: tuple[int, ...]) -> Thread:
        """Make a thread that starts at an entry of its program; the caller puts it in a queue."""
        coroutine = process.program.start(entry, args)
        thread = Thread(self._n_threads, coroutine, process, self._scheduler.shortest())
        self._n_threads += 1
        if process.threads:
            thread.ends_by = "thread_exit"
        thread.begin_in_kernel(self._begin(thread))
        process.threads.append(thread)
        process.space.users += 1
        self.threads[thread.thread_id] = thread
        return thread

    async def _begin(self, thread: Thread) -> None:
        """Be the first thing a new thread does, in the kernel and with interrupts disabled."""
        await self._scheduler.finish_switch(thread)
        await self.leave(thread)

    async def fork(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(entry, arguments...) -> pid of a child that starts there on a copy of this memory."""
        parent = process_of(thread)
        space = await self.new_space()
        await acquire(parent.space.lock)
        try:
            await self._copy_space(thread, parent.space, space)
        except OutOfMemory:
            await release(parent.space.lock)
            await self._drop_space(space)
            raise
        # Before the release: from here on the child's areas keep shared objects alive.
        child = self.add_process(parent.program, space, parent)
        await release(parent.space.lock)
        await Mark("process_start", (child.pid, space.root_gpa), parent.program.name)
        await self.start(self.add_thread(child, args[0], args[1:]))
        return child.pid

    async def start(self, thread: Thread) -> None:
        """Announce a new thread and put it into a queue."""
        await Mark("thread", (thread.thread_id, process_of(thread).pid))
        await self._scheduler.enqueue(thread)

    async def new_space(self) -> AddressSpace:
        """Return an address space with the kernel's window and nothing else.

        Raises:
            OutOfMemory: The pool is exhausted.
        """
        lock = self._words.take()
        try:
            root = await self._tables.new_root()
        except OutOfMemory:
            self._words.drop(lock)
            raise
        return AddressSpace(root, self._tables.new_levels(), lock)

    def take_lock(self) -> int:
        """Return a lock word for an address space made at boot."""
        return self._words.take()

    def lay_image(self, space: AddressSpace, image: Image) -> None:
        """Map a program's image into an empty address space."""
        for region in image.regions:
            first = region.first_vpn
            area = Area(
                first, first + region.n_pages, region.prot, False, image_object(image.number), first
            )
            space.areas.insert(area)
            if image.underlies:
                space.underlay.insert(area)
        space.heap_end = image.heap

    async def _copy_space(self, thread: Thread, old: AddressSpace, new: AddressSpace) -> None:
        """Let `new` share every private page of `old`, copying on write; flush what was lowered.

        Shared areas need no entries: the child finds their pages in the page cache.
        """
        new.underlay = old.underlay
        new.heap_end = old.heap_end
        lowered: list[int] = []
        failure: OutOfMemory | None = None
        await self._shootdown.stop_others(thread.cpu)
        for area in old.areas:
            new.areas.insert(area)
            if area.shared or failure:
                continue
            try:
                await self._share_entries(old, new, area, lowered)
            except OutOfMemory as error:
                failure = error
        if lowered:
            first, n_pages = lowered[0], lowered[-1] - lowered[0] + 1
            await self._shootdown.flush(thread.cpu, old, first, n_pages)
            await self._shootdown.flush_late(thread.cpu, old, first, n_pages)
        else:
            await self._shootdown.resume_others(thread.cpu)
        if failure:
            raise failure

    async def _share_entries(
        self, old: AddressSpace, new: AddressSpace, area: Area, lowered: list[int]
    ) -> None:
        tables = self._tables
        for slot in tables.live(old, area.first, area.stop):
            if slot.n_pages > 1:
                await self._large.share(new, slot, lowered)
                continue
            target = await tables.make(new, slot.vpn)
            entry = await tables.load(slot)
            if entry & P and entry & W:
                entry = await tables.change(slot, entry, entry & ~W) & ~W
                lowered.append(slot.vpn)
            number = self._swap.slot_of(entry)
            if number is not None:
                self._swap.share(number)
            else:
                self._frames.share(tables.frame(entry))
            target.table.live.add(target.position)
            await Store(target.gva, tables.entry_bytes, entry)

    # -- exec -----------------------------------------------------------------------------------

    async def exec(self, thread: Thread, args: tuple[int, ...]) -> int | None:
        """(image, entry, arguments...): go on at an entry of the program with a fresh image."""
        process = process_of(thread)
        if len(process.threads) > 1:
            return EBUSY
        old, space = process.space, await self.new_space()
        self.lay_image(space, process.program.image(args[0]))
        space.users = 1
        await SetInterrupts(False)
        process.space = space
        await self._scheduler.load(thread.cpu, space)
        await SetInterrupts(True)
        old.users -= 1
        await Mark("process_exec", (process.pid, old.root_gpa, space.root_gpa))
        await self._drop_space(old)
        thread.replace_program(process.program.start(args[1], args[2:]))
        return None

    async def _drop_space(self, space: AddressSpace) -> None:
        await self._paging.guard()
        await self._memory.clear(space)
        space.gone = True
        await self._paging.unguard()
        self._tables.drop_root(space.root)
        self._words.drop(space.lock)

    # -- ending ---------------------------------------------------------------------------------

    async def exit(self, thread: Thread, args: tuple[int, ...]) -> None:
        """(code): end the process. Does not return."""
        await self.kill(thread, "", args[0] if args else 0)

    async def crash(self, thread: Thread, _args: tuple[int, ...]) -> None:
        """End the process because its program raised. Does not return."""
        await self.kill(thread, thread.crash_reason or "crashed")

    async def kill(self, thread: Thread, reason: str, code: int = -1) -> None:
        """End the process of `thread`, the running one, for a named reason. Does not return."""
        process = process_of(thread)
        if not process.dying:
            process.dying = True
            process.reason = reason
            process.exit_code = code
            for other in list(process.threads):
                if other.state is State.BLOCKED:
                    await self._scheduler.wake(other)
                elif other.on_cpu and other is not thread:
                    other.cpu.must_schedule = True
                    await SendIpi(other.cpu.bit, VECTOR_RESCHEDULE)
        await self.thread_exit(thread, ())

    async def thread_exit(self, thread: Thread, _args: tuple[int, ...]) -> None:
        """End this thread, and the process with the last one. Does not return."""
        process, space = process_of(thread), process_of(thread).space
        await SetInterrupts(False)
        await self._scheduler.load(thread.cpu, None)
        await SetInterrupts(True)
        process.threads.remove(thread)
        space.users -= 1
        if not process.threads:
            root_gpa = space.root_gpa
            await Mark("process_exit", (process.pid, root_gpa, process.exit_code), process.reason)
            await self._drop_space(space)
            await self._end(process)
        for joiner in thread.joiners:
            await self._scheduler.wake(joiner)
        await SetInterrupts(False)
        thread.state = State.EXITED
        await self._scheduler.switch_away(thread)
        raise KernelPanic(f"thread {thread.thread_id} ran after its end")

    async def _end(self, process: Process) -> None:
        process.ended = True
        for child in process.children:
            child.parent = None
        if process.parent is None:
            return
        waiters, process.parent.waiters = process.parent.waiters, []
        for waiter in waiters:
            await self._scheduler.wake(waiter)

    async def leave(self, thread: Thread) -> None:
        """Do what is due before a return to user mode. Interrupts are disabled."""
        await self._scheduler.look(thread)
        if thread.process is not None and thread.process.dying:
            await self.thread_exit(thread, ())

    def reap(self, thread: Thread) -> None:
        """Forget a thread that has ended and left its CPU."""
        del self.threads[thread.thread_id]
        thread.close()

    # -- waiting --------------------------------------------------------------------------------

    async def wait(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(pid or -1) -> pid of a child that has ended, waiting for one."""
        process = process_of(thread)
        while not process.dying:
            mine = [c for c in process.children if args[0] in (-1, c.pid)]
            if not mine:
                return ECHILD
            for child in mine:
                if child.ended:
                    process.children.remove(child)
                    return child.pid
            thread.state = State.BLOCKED
            process.waiters.append(thread)
            await self._scheduler.block(thread)
        return EINVAL

    async def getpid(self, thread: Thread, _args: tuple[int, ...]) -> int:
        return process_of(thread).pid


def process_of(thread: Thread) -> Process:
    assert thread.process is not None
    return thread.process
