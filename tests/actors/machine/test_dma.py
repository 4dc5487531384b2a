"""DMA past the MMU: a transfer into a live page table is coherent under every scheme."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from machines import FAMILIES, scheme_with, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.check import Verdict
from penumbra.actors.machine.build import build_machine, summarise
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.guest.kernel import Thread
from penumbra.guest.workloads.verify import ARENA_AT, SHARED_AT, WORD, expect
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.operations import FinishedDma, SetInterrupts, SpinUntil, StartDma, Store, Syscall

SCHEMES = FAMILIES
_N_PAGES = 8
_MASK = (1 << 64) - 1


def table_turner() -> SmallProgram:
    """One thread reads pages over and over in turns with the one that reverses their order."""

    async def when(n: int) -> None:
        await SpinUntil(SHARED_AT, WORD, _MASK, n)

    async def look(turned: bool) -> None:
        for page in range(_N_PAGES):
            word = _N_PAGES - page if turned else page + 1
            await expect(ARENA_AT + page * PAGE_BYTES, word)

    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        await map_pages(ARENA_AT, _N_PAGES)
        for page in range(_N_PAGES):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, page + 1)
        await Syscall("thread_create", (1,))
        await when(1)
        for turn in (1, 2, 3):
            if await Syscall("turn_tables", ()) != 0:
                await expect(0, 0)
            await look(bool(turn % 2))
            await Store(SHARED_AT, WORD, 2 * turn)
            await when(2 * turn + 1)

    async def sibling() -> None:
        await look(False)
        await Store(SHARED_AT, WORD, 1)
        for turn in (1, 2, 3):
            await when(2 * turn)
            await look(bool(turn % 2))
            await Store(SHARED_AT, WORD, 2 * turn + 1)

    return SmallProgram("table-turner", (main, sibling))


def run_turner(
    scheme: Scheme, *, flush: bool = True, **config: Any
) -> tuple[Machine, dict[str, Any], Verdict]:
    """Run the program on a machine whose kernel has a call that turns its table by DMA."""
    machine, oracle = build_machine(
        MachineConfig(disk_mib=1, disk_latency=300, **config), scheme,
        workload_of(table_turner()), CostProfile(), 1,
    )  # fmt: skip
    assert oracle is not None
    kernel = machine.kernel

    async def transfer(gpa: int, to_disk: bool) -> None:
        ticket = await StartDma(0, gpa, to_disk)
        while (finished := await FinishedDma()) == 0:
            pass
        assert ticket == finished

    async def turn(thread: Thread, _: tuple[int, ...]) -> int:
        assert thread.process is not None
        space = thread.process.space
        first = kernel.tables.find(space, ARENA_AT >> PAGE_SHIFT)
        assert first is not None
        table_gpa = first.table.gfn << PAGE_SHIFT
        await SetInterrupts(False)
        await transfer(table_gpa, True)
        width, data = machine.spec.entry_bytes, bytearray(machine.disk.read(0))
        at = [(first.position + page) * width for page in range(_N_PAGES)]
        entries = [bytes(data[a : a + width]) for a in at]
        for a, entry in zip(at, reversed(entries), strict=True):
            data[a : a + width] = entry
        machine.disk.write(0, bytes(data))
        await transfer(table_gpa, False)
        if flush:
            await kernel.shootdown.flush(thread.cpu, space, first.vpn, _N_PAGES)
        return 0

    kernel._calls["turn_tables"] = (turn, 0, 0)  # a call only this test's guest has
    anyio.run(machine.run)
    machine.matrix.check()
    for submm in machine.submms:
        submm.check()
    machine.disk.check()
    return machine, summarise(machine, 1), oracle.verdict()


@pytest.mark.shows("H8", "C3")
@pytest.mark.parametrize(
    ("vcpus", "capacity", "paging"),
    [(1, 64, "ia32"), (2, 64, "x86-64"), (4, 1, "ia32"), (8, 4, "x86-64")],
)
def test_dma_into_a_live_page_table_is_seen_by_every_scheme(
    paging: str, vcpus: int, capacity: int
) -> None:
    left = set()
    for name in SCHEMES:
        _, summary, verdict = run_turner(
            scheme_with(name, capacity=capacity), vcpus=vcpus, paging=paging, tlb_entries=16,
            tlb_ways=4, timer_period=2000,
        )  # fmt: skip
        assert summary["ended"] == "finished"
        assert summary["marks"] == []
        assert verdict.coherent, verdict
        assert summary["counters"]["dma"] == 6
        left.add((summary["progress"], *(p["digest"] for p in summary["processes"])))
    assert len(left) == 1


@pytest.mark.shows("H8")
def test_dma_into_a_table_goes_through_the_producer_of_who_started_it() -> None:
    _, summary, _ = run_turner(PRESETS["patch"], vcpus=2)
    assert summary["counters"]["patch_posted"] >= 3 * _N_PAGES
    _, immediate, _ = run_turner(PRESETS["shootdown"], vcpus=2)
    assert immediate["counters"]["shootdown"] >= 3 * _N_PAGES


def test_the_test_above_would_notice_a_missing_flush() -> None:
    _, summary, _ = run_turner(PRESETS["native"], flush=False, vcpus=2)
    assert summary["marks"]


def test_without_a_disk_every_transfer_is_refused() -> None:
    machine, _ = build_machine(
        MachineConfig(vcpus=1), PRESETS["native"], workload_of(table_turner()), CostProfile(), 1
    )
    assert machine.start_dma(0, StartDma(0, 0, False), 0) == 0
    assert machine.finished_dma(0) == 0
    machine.kernel.close()
