"""Four ways to flush other CPUs: each right, each with what it promises, none with a stale use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penumbra.guest.kernel import VECTOR_STOP, KernelOptions
from penumbra.guest.kernel.shootdown import FLUSHES
from penumbra.guest.programs.program import Program
from penumbra.guest.workloads import ForkStorm, MmapChurn, ShootdownStress
from penumbra.hw.formats import IA32, X86_64, FormatSpec
from penumbra.hw.operations import (
    Invlpg,
    Load,
    MappingChanged,
    SendIpi,
    SpinUntil,
    Store,
    Syscall,
)
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, PAGE, mmap, saw, script

STRESS = ShootdownStress(threads=3, rounds=3, pages=12)


def machine_of(
    program: Program, flush: str, n_vcpus: int, spec: FormatSpec = X86_64, **kernel: Any
) -> FlatMachine:
    chosen: dict[str, Any] = {"timer_period": 900, "flush_limit": 8, **kernel}
    options = KernelOptions(flush=flush, **chosen)
    machine = FlatMachine(spec, [program], n_vcpus, sticky=True, seed=n_vcpus, options=options)
    # A lazy kernel leaves old translations on purpose; that no freed frame is used is still seen.
    machine.auditing = flush != "lazy"
    return machine


@pytest.mark.shows("G4")
@pytest.mark.parametrize("flush", FLUSHES)
@pytest.mark.parametrize(("n_vcpus", "spec"), [(1, IA32), (2, X86_64), (4, IA32), (8, X86_64)])
@pytest.mark.parametrize(
    "program",
    [STRESS, ForkStorm(pages=4, children=2, depth=2), MmapChurn(processes=3, steps=20, pages=20)],
    ids=lambda program: program.name,
)
def test_every_way_gives_right_data_and_no_stale_use(
    flush: str, n_vcpus: int, spec: FormatSpec, program: Program
) -> None:
    machine = machine_of(program, flush, n_vcpus, spec)
    ended = machine.run(5_000_000), machine.wrong, machine.reasons, machine.stale
    assert ended == ("finished", [], [], [])
    machine.check_all_returned()


@pytest.mark.shows("G4", "P13")
@pytest.mark.parametrize("n_vcpus", [2, 4, 8])
@pytest.mark.parametrize(
    "program", [STRESS, MmapChurn(processes=3, steps=20, pages=20)], ids=lambda p: p.name
)
def test_pages_told_of_are_dropped_at_the_others_own_events_and_their_frames_wait(
    n_vcpus: int, program: Program
) -> None:
    asked = {}
    for carries in (True, False):
        machine = machine_of(program, "patch", n_vcpus)
        machine.carries = carries
        machine.auditing = not carries
        ended = machine.run(5_000_000), machine.wrong, machine.reasons, machine.stale
        assert ended == ("finished", [], [], [])
        machine.check_all_returned()
        shootdown = machine.kernel.shootdown
        assert (shootdown.n_deferred > 0) == (carries and shootdown_happens(machine))
        asked[carries] = shootdown.n_requests
    assert asked[True] <= asked[False]


@pytest.mark.shows("P13", "G4")
def test_a_tick_pays_for_nothing_that_was_told_after_its_invlpg() -> None:
    machine = machine_of(STRESS, "patch", 2)
    shootdown, (sender, other) = machine.kernel.shootdown, machine.kernel.scheduler.cpus
    space: Any = SimpleNamespace(cpus=sender.bit | other.bit, root_gpa=0x5000)

    def unmap(first: int) -> None:
        telling = shootdown.defer(sender, space, first, 1, [])
        change = telling.send(None)
        assert change == MappingChanged(other.bit, 0x5000, first << 12, 1)
        assert telling.send(other.bit) == Invlpg(first << 12)
        with pytest.raises(StopIteration, match="True"):
            telling.send(None)

    unmap(0x10)
    tick = shootdown.tick(other)
    assert isinstance(tick.send(None), Invlpg)
    unmap(0x20)  # told after what the INVLPG has dropped
    with pytest.raises(StopIteration):
        tick.send(None)
    assert [(debt.first, debt.cpus) for debt in shootdown._debts] == [(0x20, other.bit)]
    with pytest.raises(StopIteration):
        shootdown.tick(sender).send(None)
    assert len(shootdown._debts) == 1, "the sender owes nothing and pays nothing"
    machine.kernel.close()


def shootdown_happens(machine: FlatMachine) -> bool:
    """Tell whether any CPU ever announced a change."""
    return any(vcpu.operations["MappingChanged"] for vcpu in machine.vcpus)


@pytest.mark.shows("G2", "G4")
@pytest.mark.parametrize("flush", FLUSHES)
def test_every_way_goes_together_with_paging(flush: str) -> None:
    machine = machine_of(STRESS, flush, 4, swap_pages=2000, user_frames=24)
    ended = machine.run(5_000_000), machine.wrong, machine.reasons, machine.stale
    assert ended == ("finished", [], [], [])
    machine.check_all_returned()


@pytest.mark.shows("G4")
def test_quiesce_lets_no_other_cpu_run_while_entries_change() -> None:
    machine = machine_of(STRESS, "quiesce", 4)
    shootdown = machine.kernel.shootdown
    ran: list[str] = []

    def watch(operation: Any) -> None:
        stopper = shootdown._stopper
        running = [v for v in machine.vcpus if v.operation is operation]
        # A stopped CPU spins; it answers before that, and again after it was let go.
        if stopper is None or not running or running[0].vcpu_id == stopper.cpu_id:
            return
        if running[0].user and shootdown_is_in_force(machine, shootdown):
            ran.append(f"VCPU {running[0].vcpu_id}: {operation}")

    machine.watch = watch
    assert machine.run(5_000_000) == "finished"
    assert ran == []
    assert shootdown.n_requests > 0


def shootdown_is_in_force(machine: FlatMachine, shootdown: Any) -> bool:
    """Tell whether all other CPUs have said that they stand still."""
    gpa = shootdown._acks - machine.layout.window_gva + (machine.layout.pool_gfn << 12)
    acks = [machine.ram[gpa + vcpu.vcpu_id] for vcpu in machine.vcpus]
    others = [a for v, a in enumerate(acks) if v != shootdown._stopper.cpu_id]
    go = shootdown._go - machine.layout.window_gva + (machine.layout.pool_gfn << 12)
    return all(others) and machine.read(go, 8) == 0


@pytest.mark.shows("G4")
def test_quiesce_stops_every_other_cpu_and_eager_asks_only_those_concerned() -> None:
    vectors = {}
    for flush in ("eager", "quiesce"):
        ipis = machine_of(STRESS, flush, 4).trace_of(SendIpi)
        vectors[flush] = {ipi.targets.bit_count() for ipi in ipis if ipi.vector == VECTOR_STOP}
    assert vectors == {"eager": set(), "quiesce": {3}}


@pytest.mark.shows("G4")
@pytest.mark.parametrize(("flush", "n_rounds"), [("eager", 6), ("batched", 1), ("quiesce", 6)])
def test_batched_flushes_once_for_many_unmappings_and_frees_their_frames_after_it(
    flush: str, n_rounds: int
) -> None:
    flag = ARENA + 64 * PAGE

    async def main() -> None:
        await mmap(flag, 1)
        await mmap(ARENA, 24)
        for page in range(24):
            await Store(ARENA + page * PAGE, 8, 1)
        sibling = await Syscall("thread_create", (1,))
        await SpinUntil(flag, 8, 3, 1)
        await saw(0)
        ranges = [word for n in range(6) for word in (ARENA + 4 * n * PAGE, 2 * PAGE)]
        await saw(await Syscall("munmap", tuple(ranges)))
        await Store(flag, 8, 2)
        await Syscall("thread_join", (sibling,))
        await Load(ARENA + 20 * PAGE, 8)

    async def sibling() -> None:
        for page in range(24):
            await Load(ARENA + page * PAGE, 8)
        await Store(flag, 8, 1)
        await SpinUntil(flag, 8, 3, 2)

    machine = machine_of(script(main, sibling), flush, 2, timer_period=10**6)
    freed_early: list[int] = []
    machine.run_until_mark("saw")
    requests, free = machine.kernel.shootdown.n_requests, machine.kernel.frames.n_free

    def watch(operation: Any) -> None:
        if isinstance(operation, SendIpi):
            freed_early.append(machine.kernel.frames.n_free - free)

    machine.watch = watch
    machine.run_until_mark("saw")
    assert machine.kernel.shootdown.n_requests - requests == n_rounds
    assert machine.kernel.frames.n_free - free == 12
    assert flush != "batched" or freed_early == [0]
    assert machine.run() == "finished"
    reason = f"segmentation fault: nothing is mapped at {ARENA + 20 * PAGE:#x}"
    assert (machine.reasons, machine.stale) == ([reason], [])


@pytest.mark.shows("G4")
def test_lazy_asks_nobody_and_keeps_the_frames_until_the_last_cpu_has_flushed() -> None:
    async def main() -> None:
        await mmap(ARENA, 4)
        await mmap(ARENA + 16 * PAGE, 1)
        await Store(ARENA, 8, 1)
        await Store(ARENA + PAGE, 8, 2)
        sibling = await Syscall("thread_create", (1,))
        await SpinUntil(ARENA + 16 * PAGE, 8, 3, 1)
        await Syscall("munmap", (ARENA, 2 * PAGE))
        await saw(1)
        await Store(ARENA + 16 * PAGE, 8, 2)
        await Syscall("thread_join", (sibling,))

    async def sibling() -> None:
        await saw(await Load(ARENA, 8) + 10)
        await Store(ARENA + 16 * PAGE, 8, 1)
        await SpinUntil(ARENA + 16 * PAGE, 8, 3, 2)

    machine = machine_of(script(main, sibling), "lazy", 2, timer_period=2000)
    shootdown, frames = machine.kernel.shootdown, machine.kernel.frames
    machine.run_until_mark("saw")
    before = frames.n_free
    machine.run_until_mark("saw")
    assert (shootdown.n_deferred, shootdown.n_requests, frames.n_free) == (1, 0, before)
    assert machine.run() == "finished"
    assert (shootdown.n_requests, machine.stale) == (0, [])
    machine.check_all_returned()


@pytest.mark.shows("G4")
def test_lazy_flushes_before_pages_are_mapped_anew() -> None:
    async def main() -> None:
        await mmap(ARENA + 16 * PAGE, 1)
        await mmap(ARENA, 1)
        await Store(ARENA, 8, 1)
        sibling = await Syscall("thread_create", (1,))
        await SpinUntil(ARENA + 16 * PAGE, 8, 3, 1)
        await Syscall("munmap", (ARENA, PAGE))
        await mmap(ARENA, 1)
        await Store(ARENA, 8, 9)
        await Store(ARENA + 16 * PAGE, 8, 2)
        await Syscall("thread_join", (sibling,))

    async def sibling() -> None:
        await Load(ARENA, 8)
        await Store(ARENA + 16 * PAGE, 8, 1)
        await SpinUntil(ARENA + 16 * PAGE, 8, 3, 2)
        await saw(await Load(ARENA, 8))

    machine = machine_of(script(main, sibling), "lazy", 2, timer_period=10**6)
    assert machine.run() == "finished"
    assert [mark.args for mark in machine.marks if mark.what == "saw"] == [(9,)]
    assert machine.kernel.shootdown.n_deferred == 1


def test_a_way_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no such flush 'never'"):
        machine_of(STRESS, "never", 1)
