"""The guest's large pages on whole machines: right and coherent, equal in all schemes."""

from __future__ import annotations

from typing import Any

import pytest
from machines import run_machine, scheme_with, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.machine.machine import Machine
from penumbra.guest.kernel import Kernel
from penumbra.guest.workloads.verify import ARENA_AT, WORD, expect
from penumbra.guest.workloads.workload import Workload, named_workload
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Store, Syscall

SCHEMES = ("native", "shootdown", "patch")
TINY_TLB: dict[str, Any] = {"tlb_entries": 8, "tlb_ways": 4}
BIG_TLB: dict[str, Any] = {"tlb_entries": 1536, "tlb_ways": 12}


def splitting(paging: str, **parameters: int) -> Workload:
    """Return the workload with memory for one large page, the second round for the cheaper one."""
    size = {"mib": 2, "rounds": 2} if paging == "x86-64" else {"mib": 4, "rounds": 1}
    return named_workload("page-splitting", **{**size, **parameters})


def pages_of(machine: Machine) -> tuple[int, int, int, int]:
    """Return how many large pages were mapped, promoted, promoted in place, and split."""
    assert isinstance(machine.guest, Kernel)
    large = machine.guest.large
    return large.n_mapped, large.n_promoted, large.n_in_place, large.n_split


def left_by(summary: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


# Every pair of values of any two columns is there.
@pytest.mark.shows("G7", "C1", "H7", "V6")
@pytest.mark.parametrize(
    ("vcpus", "tlb", "smt", "paging"),
    [
        (1, TINY_TLB, 1, "ia32"),
        (1, BIG_TLB, 2, "x86-64"),
        (2, TINY_TLB, 2, "x86-64"),
        (2, BIG_TLB, 1, "ia32"),
        (4, TINY_TLB, 2, "ia32"),
        (4, BIG_TLB, 1, "x86-64"),
        (8, TINY_TLB, 1, "x86-64"),
        (8, BIG_TLB, 2, "ia32"),
    ],
    ids=lambda value: str(value["tlb_entries"]) if isinstance(value, dict) else str(value),
)
def test_pages_that_are_made_and_split_meanwhile_are_right_and_coherent_in_every_scheme(
    vcpus: int, tlb: dict[str, Any], smt: int, paging: str
) -> None:
    left = set()
    for scheme in ("native", "patch" if smt == 1 else "shootdown"):
        machine, summary, verdict = run_machine(
            splitting(paging), scheme, vcpus=vcpus, smt=smt, paging=paging, **tlb
        )
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        assert {p["ended"] for p in summary["processes"]} == {"exit 0"}
        wanted = (1, 7, 4, 8) if paging == "x86-64" else (1, 3, 2, 4)
        assert pages_of(machine) == wanted
        # Not the progress: who sees a change sooner goes round less often.
        left.add(tuple(left_by(summary)))
    assert len(left) == 1


@pytest.mark.shows("G7", "G4")
def test_every_way_to_flush_leaves_the_same_memory() -> None:
    left = set()
    ways = ("eager", "patch"), ("quiesce", "patch"), ("batched", "patch")
    for flush, scheme in (*ways, ("lazy", "patch"), ("lazy", "native"), ("quiesce", "shootdown")):
        _, summary, verdict = run_machine(
            splitting("x86-64", rounds=1), scheme, vcpus=4, guest_flush=flush, timer_period=5000
        )
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        left.add(tuple(left_by(summary)))
    assert len(left) == 1


@pytest.mark.shows("G7", "G2")
def test_large_pages_under_memory_pressure_are_split_and_paged_and_leave_the_same() -> None:
    workload = splitting("x86-64", mib=20, rounds=1)
    left = set()
    for scheme, frames in (("native", 0), ("native", 800), ("patch", 800)):
        machine, summary, verdict = run_machine(
            workload, scheme, vcpus=4, disk_mib=64, user_frames=frames, timer_period=8000
        )
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        assert (summary["counters"].get("dma", 0) > 500) == bool(frames)
        assert pages_of(machine)[0] == (1 if frames else 10)
        left.add(tuple(left_by(summary)))
    assert len(left) == 1


# Immediate shootdown by the monitor makes up for what the guest leaves out.
@pytest.mark.shows("G7", "G8")
@pytest.mark.parametrize("scheme", ["native", "patch"])
def test_promotion_without_a_flush_loses_stores_which_hardware_may_do_and_the_guest_notices(
    scheme: str,
) -> None:
    _, summary, verdict = run_machine(
        splitting("x86-64", rounds=1), scheme, vcpus=4, guest_bugs=("promote-without-flush",),
        max_progress=5_000_000,
    )  # fmt: skip
    assert verdict is not None
    assert verdict.coherent, verdict.explain()  # each use was of a translation not yet dropped
    assert {mark[0] for mark in summary["marks"]} == {"wrong"}


def one_base_after_another() -> SmallProgram:
    """Large pages at one address, in other frames each time, of each of which a part is used."""

    async def main() -> None:
        span = 4 << 20
        for turn in range(3):
            await map_pages(ARENA_AT, span // PAGE_BYTES)
            await Syscall("madvise", (ARENA_AT, span, 14))
            for page in range(turn, 512, 37):
                await Store(ARENA_AT + page * PAGE_BYTES, WORD, 1000 * turn + page)
            # A child keeps the frames, so that the next turn gets others.
            if await Syscall("fork", (1 + turn,)) < 0:
                return
            for page in range(turn, 512, 37):
                await expect(ARENA_AT + page * PAGE_BYTES, 1000 * turn + page)
            await expect(ARENA_AT + 511 * PAGE_BYTES, 0)
            await Syscall("munmap", (ARENA_AT, span))
        for _ in range(3):
            await Syscall("wait", (-1,))

    def child(turn: int) -> Any:
        async def body() -> None:
            for _ in range(20):
                await Syscall("yield")
            for page in range(turn, 512, 37):
                await expect(ARENA_AT + page * PAGE_BYTES, 1000 * turn + page)

        return body

    return SmallProgram("bases", (main, child(0), child(1), child(2)), peak_pages=4096)


@pytest.mark.shows("G7", "V5")
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
def test_no_piece_of_a_large_page_outlives_the_one_that_takes_its_place(paging: str) -> None:
    left = set()
    for scheme in SCHEMES:
        machine, summary, verdict = run_machine(
            workload_of(one_base_after_another()), scheme, vcpus=2, paging=paging
        )
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        assert pages_of(machine) == (3, 0, 0, 0)
        left.add(tuple(left_by(summary)))
    assert len(left) == 1


def many_at_once() -> SmallProgram:
    """Children that all have the same large pages, each by tables of its own, look at them."""
    n_pages, n_children, turns = 3, 14, 3
    span = n_pages * 512

    async def main() -> None:
        await map_pages(ARENA_AT, span)
        await Syscall("madvise", (ARENA_AT, span * PAGE_BYTES, 14))
        for page in range(0, span, 128):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, page + 1)
        for _ in range(n_children):
            await Syscall("fork", (1,))
        for _ in range(n_children):
            await Syscall("wait", (-1,))

    async def child() -> None:
        for turn in range(turns):
            for page in range(0, span, 128):
                await expect(ARENA_AT + page * PAGE_BYTES, page + 1)
            await Syscall("yield")
            if turn == 1:  # splits one of them, for this process alone
                await Store(ARENA_AT + 512 * PAGE_BYTES, WORD, 513)

    return SmallProgram("many", (main, child), peak_pages=2 * span)


@pytest.mark.shows("G7", "V4")
@pytest.mark.parametrize("scheme", ["shootdown", "patch"])
def test_pieces_of_large_pages_that_had_to_go_from_the_shadow_come_back_right(scheme: str) -> None:
    few = scheme_with(scheme, shadow_pages=64)
    machine, summary, verdict = run_machine(workload_of(many_at_once()), few, vcpus=1)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    assert pages_of(machine) == (3, 0, 0, 14)
    _, roomy, _ = run_machine(workload_of(many_at_once()), scheme, vcpus=1)
    faults = summary["counters"]["hidden_fault"], roomy["counters"]["hidden_fault"]
    assert faults[0] > faults[1]  # that there were too few shadow pages shows
    assert left_by(summary) == left_by(roomy)
