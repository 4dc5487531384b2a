"""A guest of several VCPUs on one set of tables: what each scheme makes of the same few operations.

VCPU 0 times its own operations, as in `small_guest`; the others load what shall be derived on them
and halt. Every round is the same for every scheme: the pages are loaded, entries of 16 of them are
changed, then CR3 is loaded, so that what has been derived has to follow or to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import process_time

import anyio
from small_guest import ARENA, ROOT, SmallGuest, entry_at, entry_of

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.kernel.boot import BootState
from penumbra.guest.system import LoaderMemory
from penumbra.guest.threads import GuestCoroutine, GuestThread
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Halt, Load, LoadControl, Store

N_CHANGED = 16
_QUANTUM, _LONG = 1_000, 1 << 30


@dataclass(frozen=True)
class Size:
    """What a cost may grow with.

    Attributes:
        vcpus: VCPUs of the machine.
        pages: Entries of the guest's table that are derived: 16 .. 256.
        capacity: Patches per channel; 0: the scheme's own.
        told: VCPUs that derive from the entries that change, the first one included.
        rounds: How often they change. Who has been shot down derives no more, so that what telling
            many costs shows in the first round alone.
    """

    vcpus: int = 2
    pages: int = 64
    capacity: int = 0
    told: int = 1
    rounds: int = 12


class _Guest(SmallGuest):
    """The small guest with a kernel thread, and a VCPU, more for each further VCPU."""

    def __init__(self, program: GuestCoroutine, others: Sequence[GuestCoroutine]) -> None:
        super().__init__(lambda: program)
        for i, other in enumerate(others, 1):
            self._threads[i] = GuestThread(i, other, user=False)

    def boot(self, memory: LoaderMemory) -> BootState:
        one = super().boot(memory)
        n = len(self._threads)
        return BootState(one.registers * n, tuple(range(n)))


class SchemeRun:
    """One run: seconds per hidden fault, per store, and per event, under a scheme."""

    def __init__(self, scheme: Scheme, size: Size) -> None:
        self.seconds: dict[str, float] = {}
        self._size = size
        self._n_ready = 0
        others = [self._other(number < size.told) for number in range(1, size.vcpus)]
        guest = _Guest(self._program(), others)
        config = MachineConfig(
            vcpus=size.vcpus, quantum=_QUANTUM, timer_period=_LONG, max_progress=_LONG << 3
        )
        machine = Machine(config, scheme, guest, (), CostProfile(), seed=1)
        machine.memory.ram.array.fill(0)  # the host gives memory at the first touch, and slowly
        ended = anyio.run(machine.run, backend="trio")
        assert ended == "finished", ended
        self.counted = machine.observer.totals()

    async def _other(self, derives: bool) -> None:
        if derives:
            for page in range(self._size.pages):
                await Load(ARENA + page * PAGE_BYTES, 8)
        self._n_ready += 1
        while True:
            await Halt()

    async def _program(self) -> None:
        n_pages, n_rounds = self._size.pages, self._size.rounds
        await Load(entry_at(0), 8)  # the way to the tables; what follows has upper levels in place
        await Load(ARENA, 8)
        while self._n_ready < self._size.vcpus - 1:
            await Load(ARENA, 8)
        self.seconds["hidden"] = await self._loads(1, n_pages)
        self.seconds["load"] = await self._loads(1, n_pages)
        stores, events = list[float](), list[float]()
        for number in range(1, n_rounds + 1):
            await self._loads(0, n_pages)
            await Load(entry_at(0), 8)
            start = process_time()
            for page in range(N_CHANGED):
                await Store(entry_at(page), 8, entry_of(page, number))
            between = process_time()
            await LoadControl(3, ROOT)
            events.append(process_time() - between)
            stores.append(between - start)
        self.seconds["store"] = _undisturbed(stores) / N_CHANGED
        self.seconds["event"] = _undisturbed(events)

    async def _loads(self, first: int, stop: int) -> float:
        start = process_time()
        for page in range(first, stop):
            await Load(ARENA + page * PAGE_BYTES, 8)
        return (process_time() - start) / (stop - first)


def _undisturbed(rounds: list[float]) -> float:
    """Return a round's seconds by the lower quartile.

    In some a quantum ends, or others had the processor and its caches in between: the longer the
    rounds the more of them, which would look like growth.
    """
    return sorted(rounds)[len(rounds) // 4]
