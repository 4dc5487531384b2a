"""A guest without a kernel, tables or processes: one supervisor program per VCPU, paging off.

Traps are noted, and a handler of the test's own may follow; then the program goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import anyio

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.kernel.boot import BootState, StartRegisters
from penumbra.guest.system import LoaderMemory
from penumbra.guest.threads import GuestCoroutine, GuestThread, KernelPanic
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import CR0_PE
from penumbra.hw.operations import Halt, Operation

Program = Callable[[], Coroutine[Any, Any, None]]


class BareThread(GuestThread):
    """A thread that leaves out an instruction that was refused."""

    refused = False

    def trap(self, coroutine: GuestCoroutine, retry: Operation | None, *, interrupts: bool) -> None:
        super().trap(coroutine, None if self.refused else retry, interrupts=interrupts)
        self.refused = False


class BareGuest:
    """Programs on bare CPUs of two-level paging, which is off at the start.

    Attributes:
        traps: What was taken: (VCPU, what, how many operations its program had finished).
        done: How many operations each program says it has finished.
    """

    def __init__(self, programs: Sequence[Program], n_frames: int = 16) -> None:
        self.traps: list[tuple[int, object, int]] = []
        self.done = [0] * len(programs)
        self._n_frames = n_frames
        self._ended = 0
        self._threads = {
            i: BareThread(i, self._run(program), user=False) for i, program in enumerate(programs)
        }

    async def _run(self, program: Program) -> None:
        await program()
        self._ended += 1
        while True:
            await Halt()

    @property
    def n_frames(self) -> int:
        return self._n_frames

    @property
    def backed(self) -> Sequence[int] | None:
        return None

    @property
    def threads(self) -> Mapping[int, GuestThread]:
        return self._threads

    @property
    def finished(self) -> bool:
        return self._ended == len(self._threads)

    def boot(self, memory: LoaderMemory) -> BootState:
        start = StartRegisters(CR0_PE | 1 << 4, 0, 0)
        return BootState((start,) * len(self._threads), tuple(self._threads))

    def page_fault(self, vcpu_id: int, thread_id: int, gva: int, error: int) -> GuestCoroutine:
        return self._panic(f"page fault at {gva:#x}")

    def protection_fault(self, vcpu_id: int, thread_id: int, what: str) -> GuestCoroutine:
        self._threads[thread_id].refused = True
        return self._note(vcpu_id, what)

    def syscall(
        self, vcpu_id: int, thread_id: int, name: str, args: tuple[int, ...]
    ) -> GuestCoroutine:
        return self._panic(f"system call {name}")

    def interrupt(self, vcpu_id: int, thread_id: int, vector: int) -> GuestCoroutine:
        return self._note(vcpu_id, vector)

    def on_disk(self, entry: int) -> tuple[bool, int] | None:
        return None

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()

    def check(self) -> None:
        for thread in self._threads.values():
            thread.check()

    async def _note(self, vcpu_id: int, what: object) -> None:
        self.traps.append((vcpu_id, what, self.done[vcpu_id]))

    async def _panic(self, reason: str) -> None:
        raise KernelPanic(reason)


def run_bare(guest: BareGuest, scheme: str = "native", **config: Any) -> Machine:
    """Run a guest to its end; it must have finished."""
    machine = start_bare(guest, scheme, **config)
    assert machine.ended == "finished"
    return machine


def start_bare(guest: BareGuest, scheme: str = "native", **config: Any) -> Machine:
    """Run a guest until it ends, whatever for."""
    chosen = MachineConfig(
        vcpus=len(guest.threads), paging="ia32", max_progress=1_000_000, **config
    )
    machine = Machine(chosen, PRESETS[scheme], guest, (), CostProfile(), 1)
    anyio.run(machine.run)
    return machine
