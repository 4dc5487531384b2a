"""Page replacement: right data with many times the pages there are frames, and clean ends."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.guest.kernel import KernelOptions
from penumbra.guest.programs.program import Program
from penumbra.guest.workloads import MmapChurn, ShootdownStress, SwapThrash
from penumbra.hw.formats import FORMATS, X86_64, FormatSpec
from penumbra.hw.operations import Load, Store, Syscall
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, NONE, PAGE, RO, RW, mmap, saw, script

specs = pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
FILE_RO = 0x12


def machine_of(
    program: Program, n_vcpus: int = 1, frames: int = 24, spec: FormatSpec = X86_64, **kernel: Any
) -> FlatMachine:
    chosen: dict[str, Any] = {"timer_period": 900, "swap_pages": 4096, **kernel}
    options = KernelOptions(user_frames=frames, **chosen)
    return FlatMachine(spec, [program], n_vcpus, sticky=True, seed=n_vcpus, options=options)


def outcome(machine: FlatMachine) -> tuple[str, list[tuple[int, ...]], list[str]]:
    ended = machine.run(5_000_000)
    assert ended == "finished"
    assert not machine.stale
    assert not machine.wrong
    machine.check_all_returned()
    return ended, [m.args for m in machine.marks if m.what == "saw"], machine.reasons


@pytest.mark.shows("G2")
@specs
@pytest.mark.parametrize("n_vcpus", [1, 2, 4, 8])
def test_a_working_set_of_six_times_the_memory_runs_to_the_right_answer(
    spec: FormatSpec, n_vcpus: int
) -> None:
    machine = machine_of(SwapThrash(), n_vcpus, spec=spec)
    assert outcome(machine) == ("finished", [], [])
    paging = machine.kernel.paging
    assert paging.n_evicted > paging.n_written > 0
    assert machine.kernel.disk.n_reads > 100


@pytest.mark.shows("G2", "G4")
@pytest.mark.parametrize("n_vcpus", [1, 4])
@pytest.mark.parametrize(
    "program",
    [
        ShootdownStress(threads=3, rounds=3, pages=12),
        MmapChurn(processes=3, steps=30, pages=10),
    ],
    ids=lambda program: program.name,
)
def test_remapping_and_copy_on_write_are_right_while_pages_come_and_go(
    program: Program, n_vcpus: int
) -> None:
    machine = machine_of(program, n_vcpus, frames=20)
    assert outcome(machine) == ("finished", [], [])
    assert machine.kernel.paging.n_evicted > 0


def _fill(n: int, at: int = ARENA) -> Any:
    async def fill() -> None:
        for page in range(n):
            await Store(at + page * PAGE, 8, page + 1)

    return fill()


@pytest.mark.shows("G2", "G3")
@specs
def test_a_page_that_is_out_keeps_its_contents_through_fork_move_and_protection(
    spec: FormatSpec,
) -> None:
    far = ARENA + 0x80_0000

    async def main() -> None:
        await mmap(ARENA, 2)
        await _fill(2)
        await mmap(far, 60)
        await _fill(60, far)  # the two pages are out now
        await Syscall("fork", (1,))
        await Syscall("mprotect", (ARENA, 2 * PAGE, NONE))
        await Syscall("mprotect", (ARENA, 2 * PAGE, RO))
        moved = ARENA + 0x40_0000
        await Syscall("mremap", (ARENA, 2 * PAGE, 2 * PAGE, 3, moved))
        await saw(await Load(moved, 8), await Load(moved + PAGE, 8))
        await Syscall("wait", (-1,))
        await saw(*[await Load(far + page * PAGE, 8) for page in range(60)])
        await Store(moved, 8, 9)

    async def child() -> None:
        await Store(ARENA, 8, 7)
        await saw(await Load(ARENA, 8), await Load(ARENA + PAGE, 8))

    ended, seen, reasons = outcome(machine_of(script(main, child), spec=spec))
    assert (ended, sorted(seen)) == ("finished", sorted([(1, 2), (7, 2), tuple(range(1, 61))]))
    assert reasons == [f"segmentation fault: write to read-only {ARENA + 0x40_0000:#x}"]


@pytest.mark.shows("G2")
def test_a_dirty_page_made_inaccessible_and_accessible_again_is_not_taken_for_clean() -> None:
    async def main() -> None:
        await mmap(ARENA, 40)
        await _fill(40)
        await Load(ARENA, 8)  # back from the disk, clean
        await Store(ARENA, 8, 77)  # dirty
        await Syscall("mprotect", (ARENA, PAGE, NONE))
        await Syscall("mprotect", (ARENA, PAGE, RW))
        for page in range(1, 40):
            await Load(ARENA + page * PAGE, 8)
        await saw(await Load(ARENA, 8))

    assert outcome(machine_of(script(main))) == ("finished", [(77,)], [])


@pytest.mark.shows("G2")
def test_a_page_that_was_only_read_goes_without_being_written() -> None:
    async def main() -> None:
        await mmap(ARENA, 40)
        await _fill(40)
        for _ in range(4):
            for page in range(40):
                await Load(ARENA + page * PAGE, 8)

    machine = machine_of(script(main))
    assert outcome(machine) == ("finished", [], [])
    paging = machine.kernel.paging
    assert 40 - 24 <= paging.n_written <= 40 < 100 < paging.n_evicted


@pytest.mark.shows("G2")
def test_pages_of_files_are_dropped_and_read_again_without_any_swap_space_used() -> None:
    async def main() -> None:
        await mmap(ARENA, 60, RO, FILE_RO, 3)
        first = [await Load(ARENA + page * PAGE, 8) for page in range(60)]
        again = [await Load(ARENA + page * PAGE, 8) for page in range(60)]
        await saw(int(first == again))

    machine = machine_of(script(main))
    assert outcome(machine) == ("finished", [(1,)], [])
    assert machine.kernel.disk.n_writes == 0


def test_when_the_swap_space_is_full_the_process_that_wants_more_is_killed_by_name() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await mmap(ARENA, 30)
        await _fill(30)
        await saw(await Load(ARENA + 5 * PAGE, 8))

    async def glutton() -> None:
        await mmap(ARENA, 100)
        await _fill(100)

    machine = machine_of(script(main, glutton), swap_pages=40)
    assert outcome(machine) == ("finished", [(6,)], ["out of memory"])


@pytest.mark.shows("G5")
def test_a_thread_that_waits_for_the_disk_lets_others_run() -> None:
    async def main() -> None:
        await mmap(ARENA, 60)
        await _fill(60)
        await Syscall("fork", (1,))
        for page in range(60):
            await Load(ARENA + page * PAGE, 8)
        await saw(1)
        await Syscall("wait", (-1,))

    async def child() -> None:
        for _ in range(3):
            await Syscall("yield")
        await saw(2)

    machine = machine_of(script(main, child), timer_period=1_000_000)
    assert outcome(machine) == ("finished", [(2,), (1,)], [])


def test_a_futex_on_a_page_that_is_out_sleeps_and_wakes() -> None:
    async def main() -> None:
        await mmap(ARENA, 60)
        await _fill(60)
        sibling = await Syscall("thread_create", (1,))
        woken = 0
        while not woken:
            for page in range(1, 60):
                await Load(ARENA + page * PAGE, 8)
            woken = await Syscall("futex_wake", (ARENA, 1))
        await saw(woken)
        await Syscall("thread_join", (sibling,))

    async def sleeper() -> None:
        await saw(await Syscall("futex_wait", (ARENA, 1)))

    ended, seen, _ = outcome(machine_of(script(main, sleeper)))
    assert (ended, sorted(seen)) == ("finished", [(0,), (1,)])


@pytest.mark.parametrize("n_vcpus", [1, 3])
def test_a_process_that_ends_while_its_pages_are_on_their_way_gives_everything_back(
    n_vcpus: int,
) -> None:
    async def main() -> None:
        for _ in range(3):
            await Syscall("fork", (1,))
        for _ in range(3):
            await Syscall("wait", (-1,))

    async def child() -> None:
        await mmap(ARENA, 40)
        await Syscall("thread_create", (2,))
        await _fill(30)
        await Syscall("exit", (3,))

    async def sibling() -> None:
        while True:
            for page in range(40):
                await Load(ARENA + page * PAGE, 8)

    assert outcome(machine_of(script(main, child, sibling), n_vcpus)) == ("finished", [], [])
