"""Demand paging from the virtual disk on whole machines: right, coherent, equal in all schemes."""

from __future__ import annotations

from typing import Any

import pytest
from machines import CORE, FAMILIES, run_machine, scheme_with, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.guest.workloads.verify import ARENA_AT, SHARED_AT, WORD, expect
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Store, Syscall

THRASH = named_workload("swap-thrash", processes=2, threads=2, pages=32, rounds=2)
SMALL: dict[str, Any] = {
    "user_frames": 16,
    "disk_mib": 1,
    "disk_latency": 700,
    "timer_period": 3000,
}


def left_by(summary: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


@pytest.mark.shows("G2", "H8", "C1", "A40 Fig 1", "S2")
@pytest.mark.parametrize(
    ("paging", "vcpus", "tlb", "capacity", "schemes"),
    [
        ("ia32", 1, 8, 1, FAMILIES),
        ("ia32", 2, 16, 64, CORE),
        ("ia32", 4, 8, 2, CORE),
        ("pae", 2, 16, 1, FAMILIES),
        ("pae", 4, 8, 64, CORE),
        ("x86-64", 1, 8, 64, CORE),
        ("x86-64", 2, 16, 2, CORE),
        ("x86-64", 4, 8, 1, FAMILIES),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, tuple) else str(value),
)
def test_a_working_set_of_eight_times_the_memory_is_right_and_coherent_in_every_scheme(
    paging: str, vcpus: int, tlb: int, capacity: int, schemes: tuple[str, ...]
) -> None:
    runs = set()
    for name in schemes:
        _, summary, verdict = run_machine(
            THRASH, scheme_with(name, capacity=capacity), paging=paging, vcpus=vcpus,
            tlb_entries=tlb, tlb_ways=4, **SMALL,
        )  # fmt: skip
        assert verdict is not None
        assert verdict.coherent, verdict
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        assert {p["ended"] for p in summary["processes"]} == {"exit 0"}
        assert summary["counters"]["dma"] > 100
        runs.add((summary["progress"], *left_by(summary)))
    assert len(runs) == 1


@pytest.mark.shows("G2")
def test_what_a_process_leaves_does_not_depend_on_how_much_memory_there_is() -> None:
    _, small, verdict = run_machine(THRASH, "patch", vcpus=8, **SMALL)
    _, large, _ = run_machine(THRASH, "patch", vcpus=8)
    assert verdict is not None
    assert verdict.coherent
    assert "dma" not in large["counters"]
    assert left_by(small) == left_by(large)


def hot_page() -> SmallProgram:
    """A sibling reads one page without pause while the main thread goes over many others."""
    n_pages, rounds = 30, 4

    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        await map_pages(ARENA_AT, n_pages)
        await Store(SHARED_AT + WORD, WORD, 1)
        sibling = await Syscall("thread_create", (1,))
        for _ in range(rounds):
            for page in range(n_pages):
                await Store(ARENA_AT + page * PAGE_BYTES, WORD, page + 7)
        await Store(SHARED_AT, WORD, 1)
        await Syscall("thread_join", (sibling,))

    async def reader() -> None:
        while not await Load(SHARED_AT, WORD):
            if not await expect(SHARED_AT + WORD, 1):
                return

    return SmallProgram("hot-page", (main, reader))


# Under immediate shootdown the monitor itself makes the sibling's translation go.
@pytest.mark.shows("G2", "G8")
@pytest.mark.parametrize("scheme", ["native", "patch"])
def test_clearing_a_without_a_flush_lets_a_page_go_that_is_in_use_and_is_noticed(
    scheme: str,
) -> None:
    small: dict[str, Any] = {**SMALL, "timer_period": 1_000_000, "tlb_entries": 64, "vcpus": 2}
    _, right, verdict = run_machine(workload_of(hot_page()), scheme, **small)
    assert verdict is not None
    assert (right["ended"], right["marks"], verdict.coherent) == ("finished", [], True)
    _, wrong, _ = run_machine(
        workload_of(hot_page()), scheme, guest_bugs=("skip-shootdown",), max_progress=300_000,
        **small,
    )  # fmt: skip
    assert wrong["marks"] or wrong["ended"] != "finished"
