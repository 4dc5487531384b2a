"""mmap and its kin, demand paging, and the ends that bad accesses come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penumbra.guest.kernel import default_layout, page_word
from penumbra.hw.formats import FORMATS, IA32, X86_64, FormatSpec
from penumbra.hw.operations import Block, Fill, Load, Store, Syscall
from penumbra.hw.streams import FETCH, AccessStream
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import (
    ANONYMOUS,
    ARENA,
    FILE,
    NONE,
    PAGE,
    RO,
    RW,
    SHARED,
    Script,
    mmap,
    saw,
    script,
)

specs = pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))


def outcome(machine: FlatMachine) -> tuple[str, list[tuple[int, ...]], list[str]]:
    """Return how the run ended, what programs saw, and why processes were killed."""
    ended = machine.run()
    if ended == "finished":
        machine.check_all_returned()
    assert not machine.stale
    seen = [mark.args for mark in machine.marks if mark.what == "saw"]
    return ended, seen, machine.reasons


def run(spec: FormatSpec, program: Script, **options: Any) -> tuple[str, Any, list[str]]:
    return outcome(FlatMachine(spec, [program], sticky=True, **options))


@pytest.mark.shows("G3")
@specs
def test_anonymous_memory_is_zero_until_written(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 2)
        before = await Load(ARENA + 8, 8)
        await Store(ARENA + PAGE, 4, 7)
        await saw(before, await Load(ARENA + PAGE, 8))

    assert run(spec, script(main)) == ("finished", [(0, 7)], [])


@pytest.mark.shows("G3")
@specs
def test_a_private_file_page_is_shared_until_written_and_then_ones_own(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 2, RW, FILE, 3, 10)
        await mmap(ARENA + 4 * PAGE, 2, RO, FILE, 3, 10)
        first = await Load(ARENA, 8)
        await Store(ARENA, 8, 1)
        await saw(first, await Load(ARENA, 8), await Load(ARENA + 4 * PAGE, 8))
        await Store(ARENA + PAGE, 8, 2)
        await saw(await Load(ARENA + PAGE + 8, 8))

    words = page_word(3, 10), page_word(3, 11)
    expected = [(words[0], 1, words[0]), (words[1],)]
    assert run(spec, script(main)) == ("finished", expected, [])


@pytest.mark.shows("G3")
@specs
def test_shared_memory_and_shared_files_are_one_for_parent_and_child(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 1, RW, SHARED)
        await mmap(ARENA + PAGE, 1, RW, FILE & ~2 | 1, 4)
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await saw(await Load(ARENA, 8), await Load(ARENA + PAGE, 8))

    async def child() -> None:
        await Store(ARENA, 8, 5)
        await Store(ARENA + PAGE, 8, 6)

    assert run(spec, script(main, child)) == ("finished", [(5, 6)], [])


@pytest.mark.shows("G3")
@specs
def test_a_write_after_fork_stays_on_its_side(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Store(ARENA, 8, 1)
        await Syscall("fork", (1,))
        await Store(ARENA, 8, 2)
        await Syscall("wait", (-1,))
        await saw(await Load(ARENA, 8))

    async def child() -> None:
        await saw(await Load(ARENA, 8))
        await Store(ARENA, 8, 3)
        await saw(await Load(ARENA, 8))

    assert run(spec, script(main, child)) == ("finished", [(1,), (3,), (2,)], [])


@pytest.mark.shows("G3", "G4")
@specs
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("munmap", ARENA, PAGE), f"nothing is mapped at {ARENA:#x}"),
        (("mprotect", ARENA, PAGE, RO), f"write to read-only {ARENA:#x}"),
        (("mprotect", ARENA, PAGE, NONE), f"write to read-only {ARENA:#x}"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_a_call_took_away_is_gone_when_it_returns(
    spec: FormatSpec, change: tuple[str, int], reason: str
) -> None:
    async def main() -> None:
        await mmap(ARENA, 2)
        await Store(ARENA, 8, 1)
        await saw(await Syscall(change[0], change[1:]))
        await Store(ARENA, 8, 2)

    expected = ("finished", [(0,)], [f"segmentation fault: {reason}"])
    assert run(spec, script(main)) == expected


@pytest.mark.shows("G3")
@specs
def test_an_inaccessible_page_keeps_its_contents(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 3)
        await Store(ARENA + PAGE, 8, 9)
        await Syscall("mprotect", (ARENA, 3 * PAGE, NONE))
        await Syscall("mprotect", (ARENA + PAGE, PAGE, RW))
        await saw(await Load(ARENA + PAGE, 8))
        await Load(ARENA, 8)

    reason = f"segmentation fault: access to inaccessible {ARENA:#x}"
    assert run(spec, script(main)) == ("finished", [(9,)], [reason])


@pytest.mark.shows("G3")
@specs
def test_mremap_moves_contents_and_leaves_nothing_behind(spec: FormatSpec) -> None:
    new = ARENA + 0x100_0000

    async def main() -> None:
        await mmap(ARENA, 2)
        await Store(ARENA, 8, 1)
        await Store(ARENA + PAGE, 8, 2)
        moved = await Syscall("mremap", (ARENA, 2 * PAGE, 3 * PAGE, 3, new))
        await saw(moved, await Load(new, 8), await Load(new + PAGE, 8), await Load(new + 8192, 8))
        await Load(ARENA, 8)

    reason = f"segmentation fault: nothing is mapped at {ARENA:#x}"
    assert run(spec, script(main)) == ("finished", [(new, 1, 2, 0)], [reason])


@pytest.mark.shows("G3")
@specs
def test_mremap_grows_in_place_when_there_is_room_and_shrinks(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Store(ARENA, 8, 1)
        await saw(await Syscall("mremap", (ARENA, PAGE, 3 * PAGE, 0)))
        await Store(ARENA + 2 * PAGE, 8, 3)
        await saw(await Syscall("mremap", (ARENA, 3 * PAGE, PAGE, 0)))
        await saw(await Syscall("mremap", (ARENA, PAGE, 3 * PAGE, 0)), await Load(ARENA, 8))
        await saw(await Load(ARENA + 2 * PAGE, 8))

    assert run(spec, script(main)) == ("finished", [(ARENA,), (ARENA,), (ARENA, 1), (0,)], [])


@pytest.mark.shows("G3")
@specs
def test_the_break_grows_by_zero_pages_and_gives_them_back(spec: FormatSpec) -> None:
    async def main() -> None:
        await saw(await Syscall("brk", (0,)), await Syscall("brk", (ARENA + 100,)))
        await Syscall("brk", (ARENA + 3 * PAGE,))
        await Store(ARENA + 2 * PAGE, 8, 5)
        await Syscall("brk", (ARENA + PAGE,))
        await Syscall("brk", (ARENA + 3 * PAGE,))
        await saw(await Load(ARENA + 2 * PAGE, 8))

    assert run(spec, script(main)) == ("finished", [(0, ARENA + 100), (0,)], [])


@pytest.mark.shows("G6")
@specs
def test_the_kernels_window_can_neither_be_used_nor_mapped(spec: FormatSpec) -> None:
    window = default_layout(spec, 64, script().used_ranges()).window_gva

    async def main() -> None:
        await saw(await mmap(window, 1), await Syscall("munmap", (window, PAGE)))
        await Load(window, 8)

    reason = f"segmentation fault: user access to the kernel's page at {window:#x}"
    assert run(spec, script(main)) == ("finished", [(-12, -22)], [reason])


@pytest.mark.parametrize(("spec", "reasons"), [
    (IA32, []),
    (X86_64, [f"segmentation fault: execution of non-executable {ARENA:#x}"]),
], ids=["ia32", "x86-64"])  # fmt: skip
def test_execution_wants_the_right_where_the_format_has_it(
    spec: FormatSpec, reasons: list[str]
) -> None:
    async def main() -> None:
        await mmap(ARENA, 1, RW)
        await Block(0, 0, 1)

    fetch = np.array([1 << 14 | FETCH], np.int64)
    stream = AccessStream(np.array([ARENA // PAGE], np.int64), fetch, 1)
    assert run(spec, script(main), streams={0: stream}) == ("finished", [], reasons)


def test_a_process_that_wants_more_memory_than_there_is_is_killed_and_others_go_on() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await mmap(ARENA, 8)
        await Fill(ARENA, PAGE, 1)
        await saw(await Load(ARENA + 8, 8))

    async def glutton() -> None:
        await mmap(ARENA, 0x4000)
        for page in range(0x4000):
            await Store(ARENA + page * PAGE, 8, 1)

    layout = default_layout(X86_64, 64, script().used_ranges(), ram_bytes=10 << 20)
    ended = run(X86_64, script(main, glutton), layout=layout)
    assert ended == ("finished", [(1,)], ["out of memory"])


def test_a_process_that_needs_too_many_tables_is_killed_and_others_go_on() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await saw(await mmap(ARENA, 1))

    async def scattered() -> None:
        for number in range(200):
            gva = (number + 1) << 31
            await mmap(gva, 1)
            await Store(gva, 8, 1)

    layout = default_layout(X86_64, 64, script().used_ranges(), pool_bytes=100 * PAGE)
    ended = run(X86_64, script(main, scattered), layout=layout)
    assert ended == ("finished", [(ARENA,)], ["out of page-table memory"])


@pytest.mark.shows("G2")
def test_clean_pages_of_files_make_room_when_memory_is_short() -> None:
    async def main() -> None:
        for file_id in range(4):
            await mmap(ARENA, 150, RO, FILE, file_id)
            for page in range(150):
                await Load(ARENA + page * PAGE, 8)
            await Syscall("munmap", (ARENA, 150 * PAGE))
        await mmap(ARENA, 1, RO, FILE, 0, 5)
        await saw(await Load(ARENA, 8))

    layout = default_layout(X86_64, 64, ram_bytes=0x280 * PAGE, pool_bytes=0x80 * PAGE)
    assert run(X86_64, script(main), layout=layout) == ("finished", [(page_word(0, 5),)], [])


def test_a_reserved_bit_in_a_programs_tables_kills_it_by_name() -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Store(ARENA, 8, 1)
        await saw()
        await Syscall("yield")
        await Load(ARENA, 8)

    machine = FlatMachine(X86_64, [script(main)])
    machine.run_until_mark("saw")
    root = machine.vcpus[0].cr3
    machine.write(root, 8, machine.read(root, 8) | 1 << 45)
    reason = f"reserved bit set in the page tables of {ARENA:#x}"
    assert machine.run() == "finished"
    assert machine.reasons == [reason]


def test_bad_arguments_are_errors_not_ends() -> None:
    async def main() -> None:
        results = [
            await Syscall("mmap", (ARENA + 1, PAGE, RW, ANONYMOUS, -1, 0)),
            await Syscall("mmap", (ARENA, 0, RW, ANONYMOUS, -1, 0)),
            await Syscall("mmap", (1 << 60, PAGE, RW, ANONYMOUS, -1, 0)),
            await Syscall("munmap", (ARENA, 0)),
            await Syscall("mprotect", (ARENA + 5, PAGE, RW)),
            await Syscall("mremap", (ARENA, 2 * PAGE, 2 * PAGE, 3, ARENA + PAGE)),
            await Syscall("mmap", (1,)),
            await Syscall("no-such-call"),
            await Syscall("wait", (-1,)),
        ]
        await saw(*results)

    expected = (-22, -22, -12, -22, -22, -12, -22, -38, -10)
    assert run(X86_64, script(main)) == ("finished", [expected], [])


@specs
def test_a_fault_on_fresh_memory_costs_few_operations(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 2)
        await Store(ARENA, 8, 1)
        await saw()
        await Store(ARENA + PAGE, 8, 1)
        await saw()

    machine = FlatMachine(spec, [script(main)])
    counts = []
    for _ in range(2):
        machine.run_until_mark("saw")
        counts.append(sum(machine.vcpus[0].operations.values()))
    machine.kernel.close()
    # The faulting store, nine of the handler, its return, the store again, and the mark.
    assert counts[1] - counts[0] == 12
