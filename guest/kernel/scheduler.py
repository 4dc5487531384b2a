"""The scheduler: a run queue per CPU, timer preemption, migration to whoever is idle.

Kernel code is never preempted: an interrupt that finds the CPU in kernel mode only marks it, and
the thread is looked at when it returns to user mode. A thread gives the CPU away in `switch_away`
alone:

    choose the next thread    load its root (set the CPU's bit before, clear the old one after)
    SwitchThread              from here on the next thread's coroutine runs, in `finish_switch`:
    account the one left      only now may another CPU take it: its stack is no longer in use

Waking is free of the lost wake-up because code between two awaits is atomic: an idle CPU looks for
work and marks itself idle in one piece, with interrupts disabled; who enqueues work sees the mark
and sends an interrupt. `SetInterrupts(True)` and the `Halt` after it are the STI-HLT idiom: the
machine takes no interrupt between the two, so the interrupt ends the Halt.
"""

from __future__ import annotations

from collections.abc import Callable

from penumbra.guest.kernel.process import Cpu, State, Thread, running
from penumbra.guest.kernel.tables import AddressSpace
from penumbra.guest.kernel.vectors import VECTOR_RESCHEDULE
from penumbra.guest.threads import KernelPanic
from penumbra.hw.operations import ArmTimer, Halt, LoadControl, SendIpi, SetInterrupts, SwitchThread


class Scheduler:
    """Decides which thread runs where.

    Invariant: a runnable thread is on a CPU, or in exactly one queue, or just left (`previous`);
    the idle threads are in no queue.
    """

    def __init__(
        self,
        n_vcpus: int,
        kernel_root_gpa: int,
        timer_period: int,
        reap: Callable[[Thread], None],
    ) -> None:
        self.cpus = [Cpu(cpu_id, 1 << cpu_id) for cpu_id in range(n_vcpus)]
        self._kernel_root_gpa = kernel_root_gpa
        self._timer_period = timer_period
        self._reap = reap
        self.flushed: Callable[[Cpu], None] = lambda _: None

    def place(self, thread: Thread) -> int:
        """Put a runnable thread into a queue.

        Returns:
            The bit of the idle CPU to wake, 0 if none was idle. The caller sends the interrupt.
        """
        assert thread.state is State.RUNNABLE and not thread.on_cpu
        cpu = thread.cpu
        if not cpu.idle:
            cpu = next((other for other in self.cpus if other.idle), cpu)
        cpu.queue.append(thread)
        if not cpu.idle:
            return 0
        cpu.idle = False
        return cpu.bit

    def shortest(self) -> Cpu:
        """Return the CPU with the least to do, for a thread that has not run yet."""
        return min(self.cpus, key=lambda cpu: len(cpu.queue) + (cpu.current is not cpu.idle_thread))

    async def enqueue(self, thread: Thread) -> None:
        """Put a runnable thread into a queue and wake an idle CPU for it."""
        wake = self.place(thread)
        if wake:
            await SendIpi(wake, VECTOR_RESCHEDULE)

    async def wake(self, thread: Thread) -> None:
        """Make a blocked thread runnable."""
        if thread.state is not State.BLOCKED:
            return
        thread.state = State.RUNNABLE
        if not thread.on_cpu:  # else whoever runs after it on that CPU finds it runnable
            await self.enqueue(thread)

    async def block(self, thread: Thread) -> None:
        """Give the CPU away until woken.

        The caller has set `State.BLOCKED` in one piece with the check that made it wait.
        Returns with interrupts enabled.
        """
        await SetInterrupts(False)
        await self.switch_away(thread)
        await SetInterrupts(True)

    async def look(self, thread: Thread) -> None:
        """Give the CPU to a waiting thread if there is one. Interrupts are disabled."""
        while thread.cpu.must_schedule:
            await self.switch_away(thread)

    async def switch_away(self, thread: Thread) -> None:
        """Run what is next; return when `thread` is chosen again. Interrupts are disabled."""
        cpu = thread.cpu
        cpu.must_schedule = False
        target = self._choose(cpu, thread)
        if target is thread:
            await self._arm(cpu)
            return
        target.on_cpu = True
        await self.load(cpu, target.process.space if target.process is not None else None)
        cpu.previous = thread
        cpu.current = target
        target.cpu = cpu
        await SwitchThread(target.thread_id)
        await self.finish_switch(thread)

    async def finish_switch(self, thread: Thread) -> None:
        """Account for the thread this CPU has just left; `thread` runs in its place."""
        cpu = thread.cpu
        previous = cpu.previous
        assert previous is not None
        cpu.previous = None
        previous.on_cpu = False
        if previous.state is State.EXITED:
            self._reap(previous)
        elif previous.state is State.RUNNABLE and previous is not cpu.idle_thread:
            await self.enqueue(previous)
        await self._arm(cpu)

    async def load(self, cpu: Cpu, space: AddressSpace | None) -> None:
        """Load an address space's root, or the kernel's own (None). Interrupts are disabled."""
        old = cpu.space
        if space is old:
            return
        if space is not None:
            space.cpus |= cpu.bit
        cpu.space = space
        changes = 0 if space is None else space.root_changes
        await LoadControl(3, self._kernel_root_gpa if space is None else space.root_gpa)
        cpu.root_changes = changes
        self.flushed(cpu)
        if old is not None:
            old.cpus &= ~cpu.bit

    async def idle(self, cpu: Cpu) -> None:
        """Be the idle thread of `cpu`."""
        thread = running(cpu)
        while True:
            if any(other.queue for other in self.cpus):
                await self.switch_away(thread)
                continue
            cpu.idle = True
            await SetInterrupts(True)
            await Halt()
            await SetInterrupts(False)
            cpu.idle = False

    def _choose(self, cpu: Cpu, thread: Thread) -> Thread:
        if cpu.queue:
            return cpu.queue.popleft()
        if thread.state is State.RUNNABLE and thread is not cpu.idle_thread:
            return thread
        longest = max(self.cpus, key=lambda other: len(other.queue))
        if longest.queue:
            return longest.queue.popleft()
        if cpu.idle_thread is None:
            raise KernelPanic(f"VCPU {cpu.cpu_id} has no idle thread")
        return cpu.idle_thread

    async def _arm(self, cpu: Cpu) -> None:
        """Start a time slice, or none for the idle thread."""
        busy = cpu.current is not cpu.idle_thread
        if busy or cpu.timer_armed:
            cpu.timer_armed = busy
            await ArmTimer(self._timer_period if busy else 0)

    def check(self) -> None:
        queued = [thread for cpu in self.cpus for thread in cpu.queue]
        assert len({id(thread) for thread in queued}) == len(queued)
        for thread in queued:
            assert thread.state is State.RUNNABLE and not thread.on_cpu
        for cpu in self.cpus:
            assert running(cpu).cpu is cpu
