"""What an exit costs, end to end, against a question and its answer between two bare trio tasks.

End to end is from the guest's operation to its completion, every task asked and answered on the
way, messages encoded and decoded, counted and logged; the checker is off. Scheme `patch`, x86-64.

hidden: a load of a page the guest maps and the shadow does not hold yet.
traced store: a store to a page-table entry that this VCPU has derived: fault, emulation, one patch.
event: a CR3 load that finds 16 patches; each entry maps another frame now, so 16 leaves follow.
guest fault: a first store to a page: a true fault to the guest, its handler, the retry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from time import process_time

import anyio
import raw
from harness import Kind, Line, Row, Side, sides
from small_guest import ARENA, N_PAGES, ROOT, SmallGuest, entry_at, entry_of

from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PATCH
from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import ARENA_AT, FIXED, PRIVATE_ANONYMOUS, RW
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, LoadControl, Store, Syscall

N_PATCHES, N_EVENTS = 16, 30
N_TOUCHED, N_CALLS = 200, 300
_LONG = 1 << 30
CONFIG = MachineConfig(vcpus=1, quantum=_LONG, timer_period=_LONG, max_progress=_LONG << 3)


class SmallMachine:
    """One run of the small guest: seconds per event by kind, and what the machine has counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        guest = SmallGuest(self._program)
        machine = Machine(CONFIG, PATCH, guest, (), CostProfile(), seed=1)
        ended = anyio.run(machine.run, backend="trio")
        assert ended == "finished", ended
        counted = machine.observer.totals()
        assert counted["hidden_fault"] >= N_PAGES, counted
        assert counted["patch_applied"] >= N_EVENTS * N_PATCHES, counted
        assert counted["emulated_store"] >= N_EVENTS * N_PATCHES, counted

    async def _program(self) -> None:
        seconds = self.seconds
        await Load(entry_at(0), 8)  # the way to the tables; what follows has upper levels in place
        await Load(ARENA, 8)
        seconds["hidden"] = await self._loads()
        seconds["load"] = await self._loads()
        stored = loaded = 0.0
        for number in range(1, N_EVENTS + 1):
            start = process_time()
            for page in range(N_PATCHES):
                await Store(entry_at(page), 8, entry_of(page, number))
            between = process_time()
            await LoadControl(3, ROOT)
            loaded += process_time() - between
            stored += between - start
        seconds["traced"] = stored / (N_EVENTS * N_PATCHES)
        seconds["event"] = loaded / N_EVENTS
        start = process_time()
        for _ in range(N_EVENTS):
            await LoadControl(3, ROOT)
        seconds["event-0"] = (process_time() - start) / N_EVENTS

    async def _loads(self) -> float:
        start = process_time()
        for page in range(1, N_PAGES):
            await Load(ARENA + page * PAGE_BYTES, 8)
        return (process_time() - start) / (N_PAGES - 1)


Snapshot = tuple[Counter[str], int]
"""What a machine has counted, and the operations its threads have issued."""


class TouchProgram:
    """A user program that touches fresh pages, and then asks its kernel for next to nothing.

    Attributes:
        fault, call: Seconds per page touched, and per system call.
        per_fault: What is counted per page touched, operations included.
        n_call_operations: Operations per system call.
    """

    name = "touch"
    peak_pages = N_TOUCHED + 64

    def __init__(self) -> None:
        self.look: Callable[[], Snapshot] | None = None
        self.fault = self.call = self.n_call_operations = 0.0
        self.per_fault: dict[str, float] = {}

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [(ARENA_AT >> 12, N_TOUCHED)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._run()

    async def _run(self) -> None:
        look, n = self.look, N_TOUCHED - 1
        assert look is not None
        n_bytes = N_TOUCHED * PAGE_BYTES
        await Syscall("mmap", (ARENA_AT, n_bytes, RW, PRIVATE_ANONYMOUS | FIXED, -1, 0))
        await Store(ARENA_AT, 8, 1)
        before, n_before = look()
        start = process_time()
        for page in range(1, N_TOUCHED):
            await Store(ARENA_AT + page * PAGE_BYTES, 8, page)
        self.fault = (process_time() - start) / n
        after, n_after = look()
        self.per_fault = {name: (after[name] - before[name]) / n for name in after}
        self.per_fault["operation"] = (n_after - n_before) / n
        start = process_time()
        for _ in range(N_CALLS):
            await Syscall("getpid")
        self.call = (process_time() - start) / N_CALLS
        self.n_call_operations = (look()[1] - n_after) / N_CALLS


def touch(look: Callable[[Machine], Snapshot]) -> TouchProgram:
    """Run that program under the guest kernel; `look` is called between its phases."""
    program = TouchProgram()
    workload = Workload(program.name, "made for a row", "0", program)
    machine, _ = build_machine(CONFIG, PATCH, workload, CostProfile(), seed=1, check=False)
    program.look = lambda: look(machine)
    machine.memory.ram.array.fill(0)  # the host gives memory at the first touch, and slowly
    ended = anyio.run(machine.run, backend="trio")
    assert ended == "finished", ended
    assert machine.observer.totals()["guest_fault"] >= N_TOUCHED
    return program


def _nothing(_: Machine) -> Snapshot:
    return Counter(), 0


def small(name: str) -> float:
    return SmallMachine().seconds[name]


def guest_fault() -> float:
    return touch(_nothing).fault


def system_call() -> float:
    return touch(_nothing).call


def row(name: str, what: str, reach: float | None, side: Side) -> Row:
    text = f"{what} ÷ raw trio ask"
    return Row(f"exits/{name}", text, Kind.TIME, reach, sides(raw.ask, side))


LINES: tuple[Line, ...] = (
    row("hidden-fault", "one hidden fault", 2.0, partial(small, "hidden")),
    row("traced-store", "one traced store told to one consumer", 2.0, partial(small, "traced")),
    row("event-16", "one coherency event with 16 patches", 3.0, partial(small, "event")),
    row("guest-fault", "one guest page fault, served by the guest kernel", 12.0, guest_fault),
    row("system-call", "one system call that does next to nothing", None, system_call),
    row("load", "one load that hits the TLB", None, partial(small, "load")),
)
