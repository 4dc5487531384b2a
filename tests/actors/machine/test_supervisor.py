"""Supervisor access to user pages with CR0.WP, and user access to supervisor pages."""

from __future__ import annotations

import pytest
from machines import FAMILIES, run_machine, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.machine.build import plan_layout
from penumbra.actors.machine.config import MachineConfig
from penumbra.guest.kernel import page_word
from penumbra.guest.workloads.verify import ARENA_AT, WORD, expect
from penumbra.hw.operations import Load, Store, Syscall

_FILE = 4


def supervisor_writer() -> SmallProgram:
    """The kernel writes a page that parent and child share copy-on-write, for the child."""

    async def main() -> None:
        await map_pages(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, 1)
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await expect(ARENA_AT, 1)
        await Syscall("pwrite", (_FILE, 0, ARENA_AT, WORD))
        await Syscall("pread", (_FILE, 0, ARENA_AT + WORD, WORD))
        await expect(ARENA_AT + WORD, 1)

    async def child() -> None:
        await Syscall("pread", (_FILE, 2, ARENA_AT, WORD))
        await expect(ARENA_AT, page_word(_FILE, 2))

    return SmallProgram("supervisor-writer", (main, child))


@pytest.mark.shows("G6")
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_supervisor_store_to_a_shared_page_faults_and_copies_in_every_scheme(
    paging: str, vcpus: int
) -> None:
    left = set()
    for scheme in FAMILIES:
        _, summary, verdict = run_machine(
            workload_of(supervisor_writer()), scheme, paging=paging, vcpus=vcpus
        )
        assert verdict is not None
        assert verdict.coherent, verdict
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        left.add((summary["progress"], *(p["digest"] for p in summary["processes"])))
    assert len(left) == 1


@pytest.mark.shows("G6")
@pytest.mark.parametrize("scheme", FAMILIES)
def test_a_user_access_to_a_supervisor_page_ends_the_process_by_name(scheme: str) -> None:
    window: list[int] = []

    async def main() -> None:
        await Load(window[0], WORD)

    workload = workload_of(SmallProgram("trespasser", (main,)))
    window.append(plan_layout(MachineConfig(), workload).window_gva)
    _, summary, verdict = run_machine(workload, scheme, vcpus=1)
    assert verdict is not None
    assert verdict.coherent
    reason = f"segmentation fault: user access to the kernel's page at {window[0]:#x}"
    assert [p["ended"] for p in summary["processes"]] == [reason]
