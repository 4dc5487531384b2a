"""Guests with bugs on whole machines: each one's mistake is named, and none of a right guest."""

from __future__ import annotations

from typing import Any

import pytest
from machines import run_machine, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.check import Verdict
from penumbra.guest.kernel import GUEST_BUGS
from penumbra.guest.workloads.verify import ARENA_AT, RW, SHARED_AT, WORD
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Store, Syscall

PAGES, ROUNDS = 3, 4
STRESS = named_workload("shootdown-stress", threads=2, rounds=2, pages=4)
QUICK: dict[str, Any] = {"quantum": 40, "ipi_latency": 1000, "timer_period": 20_000}


def frames_taken() -> SmallProgram:
    """A thread reads pages that another remaps, while a second process takes every free frame."""

    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        await map_pages(ARENA_AT, PAGES)
        await Syscall("fork", (2,))
        sibling = await Syscall("thread_create", (1,))
        for turn in range(ROUNDS):
            for page in range(PAGES):
                await Store(ARENA_AT + page * PAGE_BYTES, WORD, turn + 1)
            for _ in range(60):
                await Load(ARENA_AT, WORD)
            await map_pages(ARENA_AT, PAGES)
        await Store(SHARED_AT, WORD, 1)
        await Syscall("thread_join", (sibling,))
        await Syscall("wait", (-1,))

    async def reader() -> None:
        while not await Load(SHARED_AT, WORD):
            for page in range(PAGES):
                await Load(ARENA_AT + page * PAGE_BYTES, WORD)

    async def taker() -> None:
        at = ARENA_AT + 0x100_0000
        for _ in range(4 * ROUNDS):
            await map_pages(at, 4)
            for page in range(4):
                await Store(at + page * PAGE_BYTES, WORD, 99)

    return SmallProgram("frames-taken", (main, reader, taker))


def right_lost() -> SmallProgram:
    """A thread goes on writing to a page that its sibling has made read-only."""

    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        await map_pages(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, 1)
        sibling = await Syscall("thread_create", (1,))
        while not await Load(SHARED_AT, WORD):
            pass
        await Syscall("mprotect", (ARENA_AT, PAGE_BYTES, 1))
        for _ in range(100):
            await Load(SHARED_AT, WORD)
        await Syscall("mprotect", (ARENA_AT, PAGE_BYTES, RW))
        await Store(SHARED_AT, WORD, 2)
        await Syscall("thread_join", (sibling,))

    async def writer() -> None:
        while await Load(SHARED_AT, WORD) < 2:
            await Store(ARENA_AT + WORD, WORD, 7)
            if not await Load(SHARED_AT, WORD):
                await Store(SHARED_AT, WORD, 1)

    return SmallProgram("right-lost", (main, writer))


def judged(program: SmallProgram, scheme: str = "native", *bugs: str) -> Verdict:
    _, _, verdict = run_machine(
        workload_of(program), scheme, vcpus=4, guest_bugs=bugs, max_progress=60_000, **QUICK
    )
    assert verdict is not None
    assert verdict.coherent, verdict.explain()  # the hardware did nothing wrong
    assert bool(verdict.hazards) == bool(verdict.n_hazards)
    return verdict


@pytest.mark.shows("C3", "G8")
@pytest.mark.parametrize(
    ("bug", "scheme", "kind"),
    [
        ("skip-shootdown", "native", "missing"),
        ("skip-shootdown", "patch", "missing"),
        ("skip-local-invlpg", "native", "missing"),
        ("skip-local-invlpg", "patch", "missing"),
        ("late-shootdown", "native", "late"),
        ("late-shootdown", "patch", "late"),
        ("reuse-before-flush", "native", "late"),
        ("reuse-before-flush", "patch", "late"),
        ("short-range", "native", "wrong range"),  # a monitor's own invalidations make up for it
    ],
)
def test_the_kernels_bug_is_named_by_the_flush_that_was_not_what_it_should_be(
    bug: str, kind: str, scheme: str
) -> None:
    verdict = judged(frames_taken(), scheme, bug)
    assert kind in {hazard.kind for hazard in verdict.hazards}
    text = verdict.explain()
    assert f"hazard: {kind} flush: PTE at gpa 0x" in text
    assert "used the old translation, guest frame 0x" in text


@pytest.mark.shows("C3", "G8")
def test_a_store_through_a_right_that_was_taken_away_is_named() -> None:
    assert not judged(right_lost()).hazards
    hazards = judged(right_lost(), "native", "skip-shootdown").hazards
    lost = [one for one in hazards if "the page had lost the right" in one.why]
    assert lost
    assert {(one.access, one.gva & ~0xFFF) for one in lost} == {("write", ARENA_AT)}
    assert all(one.by != one.vcpu for one in lost)


@pytest.mark.shows("C3", "G7", "G8")
def test_promotion_without_a_flush_is_named() -> None:
    splitting = named_workload("page-splitting", rounds=1)
    _, _, verdict = run_machine(
        splitting, "native", vcpus=4, guest_bugs=("promote-without-flush",), max_progress=5_000_000
    )
    assert verdict is not None
    assert verdict.coherent
    assert verdict.hazards


@pytest.mark.shows("C3", "G4")
@pytest.mark.parametrize("flush", ["eager", "quiesce", "batched", "lazy"])
@pytest.mark.parametrize("scheme", ["native", "patch"])
def test_a_right_guest_has_no_hazard_however_many_stale_uses_it_makes(
    scheme: str, flush: str
) -> None:
    for workload in (workload_of(frames_taken()), workload_of(right_lost()), STRESS):
        _, summary, verdict = run_machine(workload, scheme, vcpus=4, guest_flush=flush, **QUICK)
        assert verdict is not None
        assert (summary["ended"], verdict.coherent) == ("finished", True)
        assert (verdict.n_hazards, verdict.hazards) == (0, ()), verdict.explain()
        if flush == "eager" and workload.name == "frames-taken":
            assert verdict.n_stale > 100


@pytest.mark.shows("C3")
def test_a_monitor_that_brings_every_store_into_every_shadow_hides_what_the_guest_leaves_out() -> (
    None
):
    assert not judged(frames_taken(), "shootdown", "skip-shootdown").hazards


@pytest.mark.shows("G8")
def test_a_guest_that_reads_garbage_ends_with_its_words_and_not_by_an_exception() -> None:
    pool = named_workload("buffer-pool")
    _, summary, verdict = run_machine(
        pool, "native", vcpus=4, guest_bugs=("skip-local-invlpg",), max_progress=200_000
    )
    assert verdict is not None
    assert verdict.hazards
    assert {mark[0] for mark in summary["marks"]} == {"wrong"}


def test_the_same_run_names_the_same_hazards() -> None:
    first, second = (judged(frames_taken(), "native", "late-shootdown") for _ in range(2))
    assert first == second


# `early-acknowledge` leaves a window in which its CPU is in the handler and uses no user page; the
# flat machine of the kernel's own tests sees it, as a use is what a hazard is.
def test_every_bug_has_its_test_here() -> None:
    named = {"skip-shootdown", "skip-local-invlpg", "late-shootdown", "reuse-before-flush"}
    named |= {"short-range", "promote-without-flush"}
    assert set(GUEST_BUGS) - named == {"early-acknowledge"}
    assert not judged(frames_taken(), "native", "early-acknowledge").hazards
