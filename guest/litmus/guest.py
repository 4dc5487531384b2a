"""A litmus test as a guest: on each CPU one thread, whose operations are the test's.

There is no kernel. A fault is the result of the operation that faulted, and the program goes on
with the next one. Stores to entries name physical addresses; the test need not map its tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penumbra.guest.kernel.boot import BootState, StartRegisters
from penumbra.guest.litmus import format as f
from penumbra.guest.litmus.barriers import Interleaving
from penumbra.guest.litmus.image import MemoryImage
from penumbra.guest.system import LoaderMemory
from penumbra.guest.threads import GuestCoroutine, GuestThread, KernelPanic
from penumbra.hw import operations as o
from penumbra.hw.formats import PAGE_SHIFT


class LitmusThread(GuestThread):
    """A thread whose privilege each operation chooses, and whose faults are not retried."""

    def __init__(self, thread_id: int) -> None:
        self.user = False
        super().__init__(thread_id, _nothing(), user=True)

    @property
    def in_user(self) -> bool:
        return super().in_user and self.user

    def trap(
        self, coroutine: GuestCoroutine, retry: o.Operation | None, *, interrupts: bool
    ) -> None:
        # What a program awaits is the value of the handler: a trap here is as a call.
        super().trap(coroutine, None, interrupts=interrupts)


class LitmusGuest:
    """One execution of one test.

    Invariant: `interleaving` is as far as the operations that were handed out.

    Attributes:
        registers: What the operations gave so far, by the register's name.
    """

    def __init__(self, test: f.LitmusTest, image: MemoryImage) -> None:
        self._test = test
        self._image = image
        self.interleaving = Interleaving(test.steps)
        self.registers: dict[str, str] = {}
        self._n_ended = 0
        self._threads: dict[int, LitmusThread] = {}
        for cpu in range(len(test.programs)):
            thread = LitmusThread(cpu)
            thread.replace_program(self._run(cpu, thread))
            self._threads[cpu] = thread

    @property
    def outcome(self) -> f.Outcome:
        """The observed registers' values; the guest must have finished."""
        return tuple(self.registers[name] for name in self._test.observed)

    # ---- what a machine asks of a guest ----------------------------------------------------------

    @property
    def n_frames(self) -> int:
        return self._image.n_frames

    @property
    def backed(self) -> Sequence[int]:
        return tuple(self._image.frames)

    @property
    def threads(self) -> Mapping[int, GuestThread]:
        return self._threads

    @property
    def finished(self) -> bool:
        return self._n_ended == len(self._threads)

    def boot(self, memory: LoaderMemory) -> BootState:
        for gfn, data in self._image.frames.items():
            memory.write_bytes(gfn << PAGE_SHIFT, data)
        starts = (StartRegisters(int(c.cr0), int(c.cr3), int(c.cr4)) for c in self._test.init.cpus)
        return BootState(tuple(starts), tuple(self._threads))

    def page_fault(self, vcpu_id: int, thread_id: int, gva: int, error: int) -> GuestCoroutine:
        return _give(f"PF:{error:#x}")

    def protection_fault(self, vcpu_id: int, thread_id: int, what: str) -> GuestCoroutine:
        return _give("GP")

    def syscall(
        self, vcpu_id: int, thread_id: int, name: str, args: tuple[int, ...]
    ) -> GuestCoroutine:
        reason = self._threads[thread_id].crash_reason
        return _panic(f"CPU {vcpu_id}: {reason or f'system call {name}'}")

    def interrupt(self, vcpu_id: int, thread_id: int, vector: int) -> GuestCoroutine:
        return _panic(f"CPU {vcpu_id}: interrupt {vector}")

    def on_disk(self, entry: int) -> tuple[bool, int] | None:
        return None

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()

    def check(self) -> None:
        self.interleaving.check()
        for thread in self._threads.values():
            thread.check()

    # ---- a CPU's program -------------------------------------------------------------------------

    async def _run(self, cpu: int, thread: LitmusThread) -> None:
        for step in self._test.programs[cpu]:
            if isinstance(step, f.Barrier):
                continue  # the conductor does not choose this CPU before it is passed
            self.interleaving.did(cpu)
            thread.user = isinstance(step, f.Access) and step.cpl == 3
            name, result = getattr(step, "name", ""), _result(step, await _operation(step))
            if name:
                self.registers[name] = result
        thread.user = False
        self._n_ended += 1
        while True:
            await o.Halt()


def _operation(step: f.LitmusOperation) -> o.Operation:
    match step:
        case f.Read():
            return o.Load(int(step.la), 4)
        case f.Write():
            return o.Store(int(step.la), 4, int(step.val))
        case f.SetEntry():
            return o.StorePhysical(int(step.pa), 4, int(step.val))
        case f.GetEntry():
            return o.LoadPhysical(int(step.pa), 4)
        case f.XchgEntry():
            return o.ExchangePhysical(int(step.pa), 4, int(step.val))
        case f.Invlpg():
            return o.Invlpg(int(step.la))
        case f.MovCr0():
            return o.LoadControl(0, int(step.val))
        case f.MovCr3():
            return o.LoadControl(3, int(step.val))
        case f.MovCr4():
            return o.LoadControl(4, int(step.val))
        case f.Barrier():
            raise AssertionError("a barrier is no operation")


def _result(step: f.LitmusOperation, value: Any) -> str:
    if isinstance(value, str):
        return value  # a fault
    if isinstance(step, f.GetEntry | f.XchgEntry):
        return hex(value & step.mask)
    return hex(value) if isinstance(step, f.Read) else "ok"


async def _nothing() -> None:
    pass


async def _give(value: str) -> str:
    return value


async def _panic(reason: str) -> None:
    raise KernelPanic(reason)
