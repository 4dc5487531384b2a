"""Patch channels without a monitor (A40 ¶59, ¶126): page tables primary, TLBs secondary."""

from __future__ import annotations

from typing import Any

import pytest
from machines import (
    SMALL_CHURN,
    SMALL_POOL,
    SMALL_STRESS,
    WORKLOADS,
    run_machine,
    scheme_with,
    workload_of,
)
from small_programs import Body, SmallProgram, map_pages

from penumbra.guest.workloads.verify import ARENA_AT, SHARED_AT, WORD
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, SpinUntil, Store, Syscall

N_PAGES = 12


def unmapper(n_siblings: int) -> Workload:
    """Return a program: siblings use pages that the main thread then unmaps one by one."""
    pages, words = ARENA_AT, SHARED_AT

    async def main() -> None:
        await map_pages(words, 1)
        await map_pages(pages, N_PAGES)
        for number in range(N_PAGES):
            await Store(pages + number * PAGE_BYTES, WORD, number + 1)
        for number in range(n_siblings):
            await Syscall("thread_create", (1 + number,))
        for number in range(n_siblings):
            await SpinUntil(words + 8 * (1 + number), WORD, (1 << 64) - 1, 1)
        for number in range(N_PAGES):
            await Syscall("munmap", (pages + number * PAGE_BYTES, PAGE_BYTES))
        await Store(words, WORD, 1)

    def sibling(number: int) -> Body:
        async def use() -> None:
            total = 0
            for page in range(N_PAGES):
                total += await Load(pages + page * PAGE_BYTES, WORD)
            await Store(words + 8 * number, WORD, int(total == N_PAGES * (N_PAGES + 1) // 2))
            await SpinUntil(words, WORD, (1 << 64) - 1, 1)

        return use

    bodies = (main, *(sibling(1 + number) for number in range(n_siblings)))
    return workload_of(SmallProgram("unmapper", bodies))


def memory_of(summary: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


@pytest.mark.shows("P13", "S2", "S3", "A40 ¶59", "A40 ¶126")
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("vcpus", [1, 4])
def test_the_preset_is_coherent_and_leaves_the_memory_of_native(name: str, vcpus: int) -> None:
    left = []
    for scheme in ("native", "native-patch"):
        _, summary, verdict = run_machine(WORKLOADS[name], scheme, vcpus=vcpus)
        assert verdict is not None
        assert verdict.coherent, verdict
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        left.append(memory_of(summary))
    # Siblings that read while a page goes away may see that sooner or later.
    assert name == SMALL_STRESS.name or left[0] == left[1]


@pytest.mark.shows("P13", "P10")
@pytest.mark.parametrize("vcpus", [2, 4, 8])
@pytest.mark.parametrize("capacity", [1, 4, 1024])
@pytest.mark.parametrize("overflow", ["lost", "shootdown"])
def test_each_cpu_drops_what_it_is_told_at_its_own_event_and_few_are_interrupted(
    vcpus: int, capacity: int, overflow: str
) -> None:
    counters = {}
    scheme = scheme_with("native-patch", capacity=capacity, overflow=overflow)
    for one in ("native", scheme):
        _, summary, verdict = run_machine(
            unmapper(vcpus - 1), one, vcpus=vcpus, timer_period=3000, quantum=100
        )
        assert verdict is not None
        assert verdict.coherent, verdict
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        counters[summary["scheme"]] = summary["counters"]
    told, asked = counters["native-patch"], counters["native"]
    assert asked["ipi"] >= N_PAGES * (vcpus - 1)
    assert told["ipi"] < asked["ipi"]
    assert told["patch_posted"] >= vcpus - 1
    assert (told["overflow"] > 0) == (capacity < N_PAGES)
    assert told.get("exit", 0) == 0, "nobody monitors"


@pytest.mark.shows("P13", "P8")
@pytest.mark.parametrize("kind", ["pair-locked", "shared", "per-producer", "per-consumer"])
def test_every_kind_of_channel_carries_the_news(kind: str) -> None:
    _, summary, verdict = run_machine(
        unmapper(3), scheme_with("native-patch", channels=kind), timer_period=3000, quantum=100
    )
    assert verdict is not None
    assert verdict.coherent, verdict
    assert summary["marks"] == []
    assert summary["counters"]["patch_applied"] > 0


@pytest.mark.shows("P13", "G4")
@pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
def test_without_the_preset_an_announcement_is_nothing_and_the_guest_interrupts(
    scheme: str,
) -> None:
    for workload in (unmapper(3), SMALL_CHURN, SMALL_POOL):
        _, summary, verdict = run_machine(workload, scheme, guest_flush="patch", quantum=100)
        assert verdict is not None
        assert verdict.coherent, verdict
        assert (summary["ended"], summary["marks"]) == ("finished", [])
    _, summary, _ = run_machine(unmapper(3), "native", guest_flush="patch", quantum=100)
    assert summary["counters"]["ipi"] > 0
    assert summary["matrix"] == []
