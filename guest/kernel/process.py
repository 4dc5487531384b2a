"""Processes, threads and virtual processors, as the kernel's own records. No behaviour."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from penumbra.guest.kernel.tables import AddressSpace
from penumbra.guest.programs.program import Program
from penumbra.guest.threads import GuestCoroutine, GuestThread


class State(enum.Enum):
    RUNNABLE = "runnable"
    BLOCKED = "blocked"
    EXITED = "exited"


@dataclass(eq=False, slots=True)
class Process:
    """A process.

    Attributes:
        reason: Why it was killed; empty while it lives or if it exited by itself.
        dying: Its threads end at their next return to user mode.
        ended: Nothing is left of it but its exit code.
    """

    pid: int
    program: Program
    space: AddressSpace
    parent: Process | None
    threads: list[Thread] = field(default_factory=list)
    children: list[Process] = field(default_factory=list)
    waiters: list[Thread] = field(default_factory=list)
    dying: bool = False
    ended: bool = False
    exit_code: int = 0
    reason: str = ""


class Thread(GuestThread):
    """A guest thread as the scheduler sees it.

    Attributes:
        process: None for the idle threads.
        cpu: Where it runs or last ran.
        on_cpu: Set from the moment a CPU chose it until that CPU runs on another thread's stack.
        user_access: A system call is using a user address; a fault there is the program's.
        bounce: Pool frame that a call of this thread moves data through.
        may_sleep: False while such an access is made with a lock held.
    """

    def __init__(
        self,
        thread_id: int,
        coroutine: GuestCoroutine,
        process: Process | None,
        cpu: Cpu,
    ) -> None:
        super().__init__(thread_id, coroutine, user=process is not None)
        self.process = process
        self.cpu = cpu
        self.state = State.RUNNABLE
        self.on_cpu = False
        self.joiners: list[Thread] = []
        self.user_access = False
        self.may_sleep = True
        self.bounce: int | None = None


@dataclass(eq=False, slots=True)
class Cpu:
    """A virtual processor.

    Attributes:
        current: The thread it runs; `previous` the one it has just left, until that is accounted.
        idle: Whether its idle thread has found nothing to do and no one has woken it since.
        space: The address space whose root is loaded; None is the kernel's own root.
        must_schedule: The running thread shall be looked at before it returns to user mode.
        root_changes: What `space.root_changes` was when its root was last loaded.
    """

    cpu_id: int
    bit: int
    current: Thread | None = None
    idle_thread: Thread | None = None
    previous: Thread | None = None
    queue: deque[Thread] = field(default_factory=deque)
    idle: bool = False
    space: AddressSpace | None = None
    must_schedule: bool = False
    timer_armed: bool = False
    root_changes: int = 0


def running(cpu: Cpu) -> Thread:
    """Return the CPU's current thread; every CPU has one after boot."""
    assert cpu.current is not None
    return cpu.current
