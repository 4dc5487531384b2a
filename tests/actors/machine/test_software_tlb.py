"""Machines whose TLBs software fills: the guest's miss handler, or the monitor. Nobody can tell."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from machines import SMALL_STRESS, WORKLOADS, run_machine, scheme_with
from small_programs import SmallProgram, map_pages

import penumbra.guest
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.tlbs import ManagedByMonitor
from penumbra.guest.workloads.verify import ARENA_AT, WORD
from penumbra.guest.workloads.workload import Workload, named_workload, recorded_workload
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import CompareExchange, Copy, Exchange, Fill, Load, Store

WORKERS = Path(next(iter(penumbra.guest.__path__))) / "recordings" / "workers.trace"
SCHEMES = ("native", "shootdown", "patch")
# What depends on who walks. A miss handler reads no paging-structure cache.
BY_WALKER = {"psc_hit", "walk", "walk_read", "tlb_miss", "tlb_refill", "tlb_update"}
THRASH = named_workload("swap-thrash", processes=2, threads=2, pages=32, rounds=2)


def both(workload: Workload, scheme: Any, **config: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Run on hardware that walks and on hardware that does not; both runs must be coherent."""
    runs = []
    for tlb in ("hardware", "software"):
        machine, summary, verdict = run_machine(workload, scheme, tlb=tlb, **config)
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert verdict.n_checked
        assert summary["ended"] == "finished"
        runs.append((machine, summary))
    return runs


def without(counters: dict[str, int], names: set[str]) -> dict[str, int]:
    return {name: n for name, n in counters.items() if name not in names}


@pytest.mark.shows("H12", "H4", "C1", "C5")
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_guests_miss_handler_leaves_every_bit_of_memory_as_a_walker_does(
    workload: str, paging: str
) -> None:
    (walker, by_walker), (handler, by_handler) = both(
        WORKLOADS[workload], "native", paging=paging, tlb_entries=32, tlb_ways=4, psc_slots=0
    )
    assert bytes(walker.ram.bytes) == bytes(handler.ram.bytes)
    counters = by_handler["counters"]
    # One for each miss, and for each first write through a clean entry or write of a shared page.
    assert counters["tlb_refill"] >= counters["tlb_miss"] > 0
    assert without(counters, {"tlb_refill"}) == by_walker["counters"]
    for walker_cpu, handler_cpu in zip(walker.cpus, handler.cpus, strict=True):
        assert walker_cpu.tlb.entries() == handler_cpu.tlb.entries()


@pytest.mark.shows("H12", "S3", "C1", "C5", "A40 Fig. 8: 816", "A40 Fig. 12: 876")
@pytest.mark.parametrize(("scheme", "paging"), [("shootdown", "ia32"), ("patch", "x86-64")])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_monitor_that_fills_the_tlb_takes_the_same_faults_and_sends_the_same_patches(
    workload: str, paging: str, scheme: str
) -> None:
    (walker, by_walker), (monitor, by_monitor) = both(
        WORKLOADS[workload], scheme, paging=paging, tlb_entries=32, tlb_ways=4
    )
    assert bytes(walker.ram.bytes) == bytes(monitor.ram.bytes)
    assert by_monitor["processes"] == by_walker["processes"]
    counters, others = by_monitor["counters"], by_walker["counters"]
    differ = BY_WALKER | {"exit", "invlpg"}
    assert without(counters, differ) == without(others, differ)
    # What exits more are misses that the shadow answers; the rest are the same exits.
    exits = dict(by_monitor["exits"])
    misses = exits.pop("tlb miss", 0)
    assert exits == by_walker["exits"]
    # 816: a hidden fault writes its entry at once, so the instruction misses no more.
    assert counters["tlb_refill"] == misses + counters["hidden_fault"]
    # 876: `update` rewrites entries where they are; `invalidate` drops them, as INVLPG does.
    if scheme == "patch":
        assert counters["invlpg"] + counters["tlb_update"] == others["invlpg"]
    else:
        assert counters["invlpg"] == others["invlpg"]
    assert (counters.get("tlb_update", 0) > 0) == (scheme == "patch")


@pytest.mark.shows("H12", "H7")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("smt", [2, 4])
def test_siblings_share_a_tlb_that_software_fills(scheme: str, smt: int) -> None:
    (_, walker), (machine, summary) = both(SMALL_STRESS, scheme, vcpus=4, smt=smt)
    assert machine.cpus[0].tlb is machine.cpus[1].tlb
    assert summary["processes"] == walker["processes"]


@pytest.mark.shows("H12", "H8", "G2")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pages_go_to_disk_by_the_bits_a_miss_handler_sets(scheme: str) -> None:
    (_, walker), (_, summary) = both(
        THRASH, scheme, vcpus=2, user_frames=16, disk_mib=1, disk_latency=700, timer_period=3000,
        tlb_entries=16, tlb_ways=4, psc_slots=0,
    )  # fmt: skip
    assert summary["processes"] == walker["processes"]
    assert summary["counters"]["dma"] == walker["counters"]["dma"] > 100


@pytest.mark.shows("H12", "G9")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="too slow without numba")
@pytest.mark.parametrize("scheme", ["native", "patch"])
def test_a_recording_replays_alike_through_blocks_that_stop_at_each_miss(scheme: str) -> None:
    (_, walker), (_, summary) = both(
        recorded_workload(WORKERS), scheme, paging="ia32", tlb_entries=512, tlb_ways=8
    )
    assert summary["processes"] == walker["processes"]
    assert summary["progress"] == walker["progress"]


def crossings() -> SmallProgram:
    """Access memory in every way that touches two pages at once, in a TLB of two entries."""

    async def main() -> None:
        await map_pages(ARENA_AT, 4)
        edge = ARENA_AT + PAGE_BYTES - 3
        await Store(edge, WORD, 0x1122_3344_5566_7788)
        assert await Exchange(edge, WORD, 5) == 0x1122_3344_5566_7788
        assert await CompareExchange(edge, WORD, 5, 6) == 5
        assert await Load(edge, WORD) == 6
        await Fill(ARENA_AT, PAGE_BYTES + 64, 9)
        await Copy(ARENA_AT + 2 * PAGE_BYTES, ARENA_AT, PAGE_BYTES + 64)
        assert await Load(ARENA_AT + 3 * PAGE_BYTES + 56, WORD) == 9

    return SmallProgram("crossings", (main,))


@pytest.mark.shows("H12", "H2")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
def test_accesses_across_pages_and_locked_ones_end_in_a_tlb_of_two_entries(
    scheme: str, paging: str
) -> None:
    workload = Workload("crossings", "made in a test", "0", crossings())
    (_, walker), (_, summary) = both(
        workload, scheme, vcpus=1, paging=paging, tlb_entries=2, tlb_ways=2
    )
    assert {process["ended"] for process in summary["processes"]} == {"exit 0"}
    assert summary["processes"] == walker["processes"]


@pytest.mark.shows("H12", "C2", "A40 Fig. 12: 876")
@pytest.mark.parametrize("scheme", ["shootdown", "patch"])
def test_a_monitor_that_leaves_out_876_is_found_out(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(self: ManagedByMonitor, gvas: list[int]) -> None:
        pass

    monkeypatch.setattr(ManagedByMonitor, "changed", forgets)
    _, summary, verdict = run_machine(
        SMALL_STRESS, scheme_with(scheme), tlb="software", max_progress=400_000
    )
    assert verdict is not None
    assert not verdict.coherent or summary["ended"] != "finished"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"tlb_entries": 16, "tlb_ways": 1}, "machine.tlb_ways is 1: at least 2"),
        ({"spurious_faults": True}, "machine.spurious_faults is true: needs machine.tlb hardware"),
    ],
)
def test_what_a_tlb_filled_by_software_cannot_do_is_refused(
    config: dict[str, Any], text: str
) -> None:
    assert MachineConfig(**config).problem() is None
    problem = MachineConfig(tlb="software", **config).problem()
    assert problem is not None
    assert problem.startswith(text)
