"""Hostile and broken guests: each ends, alone and by name, under every scheme."""

from __future__ import annotations

import anyio
import msgspec
import pytest
from machines import FAMILIES, SMALL_STRESS, run_machine, scheme_with, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.machine.build import ConfigurationError, build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.guest.kernel.process import Thread
from penumbra.guest.workloads.verify import ARENA_AT, WORD
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import FORMATS, PAGE_BYTES, P, U, W
from penumbra.hw.operations import Invlpg, Load, Store, Syscall

SCHEMES = FAMILIES
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def program(body: object, peak_pages: int = 64) -> SmallProgram:
    return SmallProgram("hostile", (body,), peak_pages)  # type: ignore[arg-type]


@every_scheme
def test_a_guest_that_loops_for_ever_ends_at_max_progress(scheme: str) -> None:
    async def loop() -> None:
        await map_pages(ARENA_AT, 1)
        while True:
            await Store(ARENA_AT, WORD, 1)

    _, summary, verdict = run_machine(workload_of(program(loop)), scheme, max_progress=20_000)
    assert summary["ended"].startswith("max_progress 20000 reached by VCPU ")
    assert verdict is not None
    assert verdict.coherent


@every_scheme
def test_a_process_that_takes_all_memory_is_killed_by_name_and_the_guest_goes_on(
    scheme: str,
) -> None:
    async def hog() -> None:
        await map_pages(ARENA_AT, 4000)
        if await Syscall("fork", (1,)) >= 0:
            await Syscall("wait", (-1,))

    async def child() -> None:
        for page in range(4000):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, page + 1)

    hogs = SmallProgram("hog", (hog, child))
    _, summary, verdict = run_machine(
        workload_of(hogs), scheme, ram_mib=12, pool_mib=8, vcpus=2, timer_period=5000
    )
    ends = [process["ended"] for process in summary["processes"]]
    assert summary["ended"] == "finished"
    assert ends[0] == "exit 0"
    assert "memory" in ends[1]
    assert verdict is not None
    assert verdict.coherent


@every_scheme
@pytest.mark.parametrize(
    ("operation", "why"),
    [
        (Load(0x1234_5000, 8), "segmentation fault: nothing is mapped at 0x12345000"),
        (Load(1 << 63, 8), "general protection fault: non-canonical address 0x8000000000000000"),
        (Invlpg(0), "general protection fault: Invlpg in user mode"),
    ],
    ids=["unmapped", "non-canonical", "privileged"],
)
def test_a_forbidden_operation_kills_its_process_by_name(
    scheme: str, operation: Load | Invlpg, why: str
) -> None:
    async def body() -> None:
        await operation

    _, summary, _ = run_machine(workload_of(program(body)), scheme, vcpus=2)
    assert (summary["ended"], summary["processes"][0]["ended"]) == ("finished", why)


@every_scheme
def test_a_program_that_raises_kills_its_process_only(scheme: str) -> None:
    async def body() -> None:
        await map_pages(ARENA_AT, 1)
        raise ZeroDivisionError("what a program can do")

    _, summary, _ = run_machine(workload_of(program(body)), scheme, vcpus=1)
    assert summary["ended"] == "finished"
    assert "ZeroDivisionError: what a program can do" in summary["processes"][0]["ended"]


@every_scheme
def test_a_guest_whose_threads_all_wait_ends_as_a_named_deadlock(scheme: str) -> None:
    async def body() -> None:
        await map_pages(ARENA_AT, 1)
        await Syscall("futex_wait", (ARENA_AT, 0))

    _, summary, _ = run_machine(workload_of(program(body)), scheme, vcpus=2)
    assert summary["ended"].startswith("guest deadlock: VCPU 0 halted, VCPU 1 halted")


# What is written over a leaf entry, and how the machine ends.
GARBAGE = {
    "beyond RAM": (
        0x7FFF_F000 | P | W | U,
        "guest kernel panic: a page table names frame 0x7ffff, which the kernel has not given",
    ),
    "reserved bit": (
        1 << 51 | P | W | U,
        "guest kernel panic: a page table names frame 0x8000000000, which the kernel has not given",
    ),
    "nothing": (0, "guest kernel panic: garbage 0x0 in the page-table entry of 0x20000000"),
}


@every_scheme
@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_a_guest_table_ends_that_guest_by_name(scheme: str, what: str) -> None:
    """The program has its kernel write garbage over the leaf entry of its own page."""
    garbage, how = GARBAGE[what]
    seen = []

    async def body() -> None:
        await map_pages(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, 7)
        await Syscall("scribble", (ARENA_AT, garbage))
        seen.append(await Load(ARENA_AT, WORD))

    ended, _ = _run_scribbling(program(body), PRESETS[scheme])
    assert ended == how
    # Where nothing is, reads return all ones, as on a PC.
    assert seen == ([(1 << 64) - 1] if what == "beyond RAM" else [])


@pytest.mark.shows("I5", "Fig 7D 838", "ET14")
def test_as_printed_an_address_outside_the_vm_ends_it_with_a_machine_check() -> None:
    async def body() -> None:
        await map_pages(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, 7)
        await Syscall("scribble", (ARENA_AT, GARBAGE["beyond RAM"][0]))
        await Load(ARENA_AT, WORD)

    ended, _ = _run_scribbling(program(body), scheme_with("vtlb", errata=("ET14",)))
    assert ended == f"machine check at {ARENA_AT:#x}: no memory at 0x7ffff000"


@every_scheme
def test_a_kernel_that_destroys_its_own_window_ends_the_machine_by_name(scheme: str) -> None:
    async def body() -> None:
        await map_pages(ARENA_AT, 1)
        await Syscall("scribble", (0, 0))
        await Store(ARENA_AT, WORD, 7)

    ended, _ = _run_scribbling(program(body), PRESETS[scheme])
    assert ended.startswith("guest kernel panic: kernel page fault at 0xffff")


def _run_scribbling(small: SmallProgram, scheme: Scheme) -> tuple[str, str]:
    """Run with one more system call, `scribble(gva, entry)`; gva 0 is the window's root entry."""
    spec = FORMATS["x86-64"]
    machine, oracle = build_machine(
        MachineConfig(vcpus=2), scheme, workload_of(small), CostProfile(), 1
    )
    kernel, layout = machine.kernel, machine.kernel.layout

    async def scribble(thread: Thread, args: tuple[int, ...]) -> int:
        gva, garbage = args
        assert thread.process is not None
        gfn = thread.process.space.root_gpa >> 12
        target = gva or layout.window_gva
        for level in range(spec.top, 0 if gva else spec.top, -1):
            entry = await Load(layout.direct(gfn) + 8 * spec.levels[level].index(target), 8)
            gfn = (entry & spec.frame_mask) >> 12
        level = 0 if gva else spec.top
        await Store(layout.direct(gfn) + 8 * spec.levels[level].index(target), 8, garbage)
        await Invlpg(target)
        return 0

    kernel._calls["scribble"] = (scribble, 2, 2)
    anyio.run(machine.run)
    assert oracle is not None
    assert oracle.verdict().coherent, oracle.verdict()
    record = machine.ledger.records[min(machine.ledger.records)]
    return machine.ended, record.ended


@pytest.mark.shows("K4", "P6")
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_a_cancelled_machine_leaves_no_task_and_no_half_done_exit(loop: str) -> None:
    async def endless() -> None:
        await map_pages(ARENA_AT, 4)
        while True:
            for page in range(4):
                await Store(ARENA_AT + page * PAGE_BYTES, WORD, 1)
            await Syscall("mprotect", (ARENA_AT, 4 * PAGE_BYTES, 1))
            await Syscall("mprotect", (ARENA_AT, 4 * PAGE_BYTES, 3))

    machine, oracle = build_machine(
        MachineConfig(vcpus=2), PRESETS["patch"], workload_of(program(endless)), CostProfile(), 1
    )

    async def main() -> None:
        with anyio.CancelScope() as scope:
            await machine.run(on_turn=scope.cancel)
        assert scope.cancelled_caught
        assert not machine.ended

    anyio.run(main, backend=loop)
    assert oracle is not None
    assert oracle.verdict().coherent
    machine.matrix.check()
    for submm in machine.submms:
        submm.check()
    machine.kernel.check()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("vcpus", 0, "machine.vcpus is 0: must be 1 .. 16"),
        ("vcpus", 17, "machine.vcpus is 17"),
        ("tlb_entries", 48, "TLB of 48 entries in 8 ways"),
        ("psc_slots", 3, "paging-structure cache of 3 slots"),
        ("quantum", 0, "machine.quantum is 0"),
        ("ram_mib", 4, "machine: "),
    ],
)
def test_a_machine_that_cannot_be_is_refused_in_one_line(field: str, value: int, text: str) -> None:
    config = msgspec.convert({field: value}, MachineConfig)
    with pytest.raises(ConfigurationError, match=text) as caught:
        build_machine(config, PRESETS["patch"], SMALL_STRESS, CostProfile(), 1)
    assert "\n" not in str(caught.value)
