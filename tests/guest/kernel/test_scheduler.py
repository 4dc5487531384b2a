"""Who runs where: preemption, migration, sleeping and waking, the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.guest.kernel import KernelOptions
from penumbra.guest.programs.sync import Barrier, add
from penumbra.guest.workloads import ForkStorm, MmapChurn
from penumbra.hw.formats import FORMATS, IA32, X86_64, FormatSpec
from penumbra.hw.operations import ArmTimer, Load, Operation, SpinUntil, Store, Syscall
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, mmap, saw, script

FLAG, COUNT, BARRIER = ARENA, ARENA + 8, ARENA + 16


@pytest.mark.shows("G5")
def test_a_program_that_spins_is_preempted_for_the_one_it_waits_for() -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Syscall("thread_create", (1,))
        await SpinUntil(FLAG, 8, 1, 1)
        await saw(await Load(FLAG, 8))

    async def other() -> None:
        await Store(FLAG, 8, 1)

    machine = FlatMachine(X86_64, [script(main, other)], 1)
    assert machine.run() == "finished"
    assert [mark.args for mark in machine.marks if mark.what == "saw"] == [(1,)]


@pytest.mark.shows("G5")
def test_waiting_threads_move_to_whichever_cpu_is_idle() -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        threads = [await Syscall("thread_create", (1, n)) for n in range(8)]
        for thread_id in threads:
            await Syscall("thread_join", (thread_id,))
        await saw(await Load(COUNT, 4))

    async def worker(number: int) -> None:
        for _ in range(10 * (number + 1)):
            await add(COUNT, 1)
            await Syscall("yield")

    for n_vcpus in (1, 2, 4):
        machine = FlatMachine(IA32, [script(main, worker)], n_vcpus, sticky=True, seed=n_vcpus)
        assert machine.run() == "finished"
        machine.check_all_returned()
        assert [mark.args for mark in machine.marks if mark.what == "saw"] == [(360,)]
        busy = [vcpu for vcpu in machine.vcpus if vcpu.operations["CompareExchange"] > 10]
        assert len(busy) == n_vcpus


@pytest.mark.shows("G5")
@pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
def test_no_wake_up_is_lost_at_a_barrier(spec: FormatSpec) -> None:
    n_threads, n_rounds = 4, 12

    async def main() -> None:
        await mmap(ARENA, 1)
        for number in range(1, n_threads):
            await Syscall("thread_create", (1, number))
        await worker(0)

    async def worker(_number: int) -> None:
        barrier = Barrier(BARRIER, n_threads)
        for round_number in range(1, n_rounds + 1):
            await add(COUNT, 1)
            await barrier.wait()
            if await Load(COUNT, 4) != round_number * n_threads:
                await saw(round_number)
            await barrier.wait()

    for seed in range(12):
        machine = FlatMachine(
            spec,
            [script(main, worker)],
            1 + seed % 4,
            seed=seed,
            quantum=1 + seed * 3,
            ipi_latency=1 + seed * 20,
        )
        assert machine.run(1_000_000) == "finished"
        assert not [mark for mark in machine.marks if mark.what == "saw"]


@pytest.mark.shows("G5")
def test_an_idle_machine_arms_no_timer_and_comes_to_rest() -> None:
    async def main() -> None:
        await Syscall("wait", (-1,))

    machine = FlatMachine(X86_64, [script(main)], 4)
    armed = [operation.after for operation in machine.trace_of(ArmTimer)]
    assert (armed, [vcpu.due for vcpu in machine.vcpus]) == ([3000, 0], [None] * 4)


def test_a_blocked_program_without_a_waker_is_seen_as_such() -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Syscall("futex_wait", (FLAG, 0))

    assert FlatMachine(X86_64, [script(main)], 2).run() == "nothing can happen"


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> list[Operation]:
        programs: list[Any] = [ForkStorm(pages=4, depth=1), MmapChurn(steps=10)]
        options = KernelOptions(timer_period=300)
        machine = FlatMachine(IA32, programs, 3, sticky=True, seed=seed, options=options)
        done: list[Operation] = []
        machine.watch = done.append
        assert machine.run() == "finished"
        return done

    assert run(5) == run(5)
    assert run(5) != run(6)
