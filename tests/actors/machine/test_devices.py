"""Device registers at guest-physical addresses, the same under every scheme.

Source: A40 ¶38; VTLB p. 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from device_programs import (
    WINDOW_AT,
    keep,
    kept,
    load,
    map_window,
    program,
    put,
    store,
)
from machines import run_machine, workload_of
from small_programs import Body, SmallProgram, map_pages

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.run import simulate
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.kernel.device_calls import DEVICE_FILE
from penumbra.guest.workloads.verify import ARENA_AT
from penumbra.hw import device_window as w
from penumbra.hw.costs import CostProfile
from penumbra.hw.interrupts import DEVICE_TIMER_VECTOR
from penumbra.hw.operations import (
    Block,
    CompareExchange,
    Copy,
    Exchange,
    Fill,
    Load,
    SpinUntil,
    Store,
    Syscall,
    XorMemory,
)
from penumbra.hw.streams import FETCH, READ, WRITE, AccessStream

pytestmark = pytest.mark.shows("V11")

MONITORED = [name for name in PRESETS if not name.startswith("native")]
_M64 = (1 << 64) - 1


def pack(page: int, kind: int, offset: int = 0, count: int = 1) -> int:
    return page << 40 | count << 14 | offset << 2 | kind


def stream_of(pages: npt.NDArray[np.int64], runs: list[int]) -> AccessStream:
    return AccessStream(pages, np.array(runs, np.int64), 1)


def under_all(
    made: SmallProgram, ended: str = "exit 0", streams: Any = (), **config: Any
) -> dict[str, Any]:
    """Run a program under every preset; assert equal progress, memory and readings.

    Returns:
        The summaries by scheme.
    """
    seen: dict[str, Any] = {}
    work = replace(workload_of(made), streams=streams)
    for scheme in PRESETS:
        machine, summary, verdict = run_machine(work, scheme, **config)
        assert verdict is not None
        assert verdict.coherent, f"{scheme}: {verdict.explain()}"
        machine.kernel.check()
        machine.devices.window.check()
        assert summary["ended"] == "finished"
        assert summary["processes"][0]["ended"].startswith(ended), scheme
        seen[scheme] = summary
    first = seen["native"]
    for scheme, summary in seen.items():
        for key in ("progress", "processes", "marks", "printed"):
            assert summary[key] == first[key], (scheme, key)
        accesses = summary["counters"].get("device_access", 0)
        assert accesses == first["counters"].get("device_access", 0), scheme
        if scheme in MONITORED:
            # One exit serves both halves of a read-modify-write.
            n_exits = summary["exits"].get("device", 0)
            assert accesses <= 2 * n_exits, scheme
        else:
            assert summary["exits"] == {}
    return seen


@pytest.mark.parametrize("paging", ["ia32", "pae", "x86-64"])
def test_registers_are_read_and_written_alike_under_every_scheme(paging: str) -> None:
    async def main() -> None:
        await put("hello, ")
        await store(w.SCRATCH, 0x1122334455667788)
        await store(w.SCRATCH + 2, 0xAB, 1)
        values = [await load(at) for at in (w.ID, w.VERSION_AT, w.SCRATCH, w.CONSOLE)]
        values += [await load(w.SCRATCH + 6, 2), await load(0x7F8)]
        began = await load(w.COUNTER)
        values += [await load(w.COUNTER) - began]
        for slot, value in enumerate(values):
            await keep(slot, value)
        await put("window\n")

    summaries = under_all(program("registers", main), paging=paging, vcpus=2)
    summary = summaries["native"]
    assert kept(summary) == [2 << 32, w.VERSION, 0x1122334455AB7788, 7, 0x1122, 0, 1]
    assert summary["printed"] == ["hello, window"]


@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
def test_every_kind_of_access_is_emulated_as_the_hardware_makes_it(paging: str) -> None:
    at, buffer = WINDOW_AT + w.SCRATCH, ARENA_AT

    async def main() -> None:
        await map_pages(buffer, 2)
        await store(w.SCRATCH, 5)
        values = [await Exchange(at, 8, 6), await CompareExchange(at, 8, 6, 0xF0)]
        values += [await CompareExchange(at, 8, 6, 1), await XorMemory(at, 4, 0xFF)]
        values += [await load(w.SCRATCH)]
        await Fill(at, 8, 77)
        values += [await load(w.SCRATCH)]
        await Copy(buffer + 0x1000, WINDOW_AT, 0x1000)  # every register, each at its own time
        values += [await Load(buffer + 0x1000 + w.SCRATCH, 8)]
        values += [await Load(buffer + 0x1000 + w.VERSION_AT, 8)]
        began = await Load(buffer + 0x1000 + w.COUNTER, 8)
        values += [await load(w.COUNTER) - began - (0x1000 - w.COUNTER) // 8]
        await Store(buffer + 0xFF8, 8, 99)
        await Copy(at, buffer + 0xFF8, 8)
        values += [await load(w.SCRATCH)]
        for slot, value in enumerate(values):
            await keep(slot, value)

    summaries = under_all(program("accesses", main), paging=paging, vcpus=1)
    *read, late, copied = kept(summaries["native"])
    assert read == [5, 6, 0xF0, 0xF0, 0x0F, 77, 77, w.VERSION]
    assert copied == 99
    assert late == 3  # the three loads since, no more


@pytest.mark.parametrize(
    ("operation", "ended"),
    [
        (Load(WINDOW_AT + w.SCRATCH + 4, 8), "general protection fault: 8 bytes at 0x424"),
        (Store(WINDOW_AT - 4, 8, 1), "general protection fault: an access crosses"),
        (SpinUntil(WINDOW_AT + w.COUNTER, 8, _M64, 1), "general protection fault: a spin"),
    ],
)
def test_what_is_no_access_to_one_register_is_refused_by_name(
    operation: Load | Store | SpinUntil, ended: str
) -> None:
    async def main() -> None:
        await map_pages(WINDOW_AT - 0x1000, 1)
        await Store(WINDOW_AT - 8, 8, 1)
        await operation

    under_all(program("refused", main), ended, vcpus=1)


def test_blocks_reach_the_registers_run_by_run_and_cannot_fetch() -> None:
    pages = np.array([ARENA_AT >> 12, WINDOW_AT >> 12], np.int64)
    runs = [pack(0, WRITE), pack(1, WRITE, w.SCRATCH), pack(1, READ, w.COUNTER, 5), pack(0, WRITE)]
    fetch = [pack(0, WRITE), pack(1, FETCH), pack(0, WRITE, 8)]
    streams = (stream_of(pages, runs), stream_of(pages, fetch))

    async def main() -> None:
        await map_pages(ARENA_AT, 1)
        await map_window(prot=7)
        await Block(0, 0, 4)
        await keep(0, await load(w.SCRATCH))
        await Block(1, 0, 3)

    ended = "general protection fault: an instruction fetch"
    summaries = under_all(program("blocks", main), ended, streams=streams, vcpus=1)
    assert kept(summaries["native"]) == [(1 << 40) + 1]
    assert summaries["native"]["counters"]["device_access"] == 3


def test_the_timer_fires_once_and_the_next_interrupt_waits_for_the_end_of_the_last() -> None:
    async def main() -> None:
        await store(w.TIMER, 3000)
        left = await load(w.REMAINING)
        await store(w.TIMER, 0)  # disarmed in time
        served = 0
        for _ in range(2):
            await store(w.TIMER, 200)
            served = await Syscall("device_interrupts", (DEVICE_TIMER_VECTOR,))
            while await Syscall("device_interrupts", (DEVICE_TIMER_VECTOR,)) == served:
                await Load(ARENA_AT + 0x8000, 8)
        for slot, value in enumerate((left, served, await load(w.REMAINING))):
            await keep(slot, value)

    async def whole() -> None:
        await map_pages(ARENA_AT + 0x8000, 1)
        await main()

    summaries = under_all(program("timer", whole), vcpus=1)
    assert kept(summaries["native"]) == [2999, 1, 0]


def test_a_command_interrupts_whom_it_names_and_no_vector_of_the_kernels_can_be_sent() -> None:
    async def main() -> None:
        await store(w.COMMAND + 4, 0b0110, 4)  # high half first, as to a local APIC
        await store(w.COMMAND, 0x51, 4)
        await store(w.COMMAND, 0x52 | 3 << 18)
        await store(w.COMMAND, 0x53 | 1 << 18, 4)
        await store(w.COMMAND, 0xFE | 2 << 18, 4)
        await keep(0, await load(w.ERROR))
        await store(w.ERROR, 0)
        await keep(1, await load(w.ERROR))
        for vector, n in ((0x51, 2), (0x52, 3), (0x53, 1)):
            while await Syscall("device_interrupts", (vector,)) < n:
                await Syscall("yield")
        for vector in (0x51, 0x52, 0x53, 0xFE):
            await keep(vector, await Syscall("device_interrupts", (vector,)))
        await keep(0x60, await load(w.IN_SERVICE))

    summaries = under_all(program("command", main), vcpus=4)
    assert kept(summaries["native"]) == [w.ILLEGAL_VECTOR, 0, 2, 3, 1, 0, 0]


def test_a_mapping_of_the_window_can_be_protected_forked_moved_and_taken_away() -> None:
    moved = WINDOW_AT + 0x10000

    async def child() -> None:
        await store(w.SCRATCH, await load(w.SCRATCH) + 1)
        await Syscall("exit", (0,))

    async def main() -> None:
        await store(w.SCRATCH, 41)
        await Syscall("wait", (await Syscall("fork", (1,)),))
        await Syscall("mprotect", (WINDOW_AT, 0x1000, 1))
        await keep(0, await load(w.SCRATCH))
        await Syscall("mremap", (WINDOW_AT, 0x1000, 0x2000, 3, moved))
        await keep(1, await Load(moved + w.SCRATCH, 8))
        await Syscall("munmap", (moved, 0x2000))
        await map_pages(moved, 1)
        await Store(moved + w.SCRATCH, 8, 7)  # memory again
        await keep(2, await Load(moved + w.SCRATCH, 8))
        await keep(3, await map_window())
        await keep(4, await load(w.SCRATCH))

    summaries = under_all(program("mapping", main, child), vcpus=2)
    assert kept(summaries["native"]) == [42, 42, 7, WINDOW_AT, 42]


@pytest.mark.parametrize(
    ("body", "ended"),
    [
        (lambda: map_window(prot=1), "segmentation fault: write to read-only"),
        (
            lambda: Syscall("mremap", (WINDOW_AT, 0x1000, 0x2000, 1)),
            "bus error: the device window has no page",
        ),
    ],
)
def test_the_guests_own_rights_and_limits_decide_first(body: Body, ended: str) -> None:
    async def main() -> None:
        await body()
        await Store(WINDOW_AT + (0x1000 if "bus" in ended else 0) + w.SCRATCH, 8, 1)

    under_all(program("rights", main), ended, vcpus=1)


@pytest.mark.parametrize(
    ("how", "value"),
    [((0x1000, 3, 2, 0), -22), ((0x2000, 3, 1, 0), -22), ((0x1000, 3, 1, 1), -22)],
)
def test_mmap_refuses_what_the_window_cannot_be(how: tuple[int, ...], value: int) -> None:
    length, prot, flags, offset = how

    async def main() -> None:
        got = await Syscall("mmap", (ARENA_AT, length, prot, flags, DEVICE_FILE, offset))
        await keep(0, got & _M64)

    _, summary, _ = run_machine(workload_of(program("refused", main)), "patch", vcpus=1)
    assert kept(summary) == [value & _M64]


@pytest.mark.shows("V7", "V10")
def test_the_console_of_a_vm_among_several_passes_the_kernel() -> None:
    async def main() -> None:
        await put(f"line {await load(w.ID) >> 32}\nrest")

    for scheme in PRESETS:
        config = MachineConfig(vcpus=2, vms=2, cpus=2, slice=500, quantum=200)
        made = workload_of(program("printing", main))
        result = simulate(
            machine=config, scheme=PRESETS[scheme], workload=made, costs=CostProfile(), seed=3
        )
        summary = result.summary
        assert result.verdict is not None
        assert result.verdict.coherent, scheme
        assert summary["printed"] == ["line 2", "rest"] * 2
        said = summary["console"]
        for vm in (0, 1):
            own = [line for line in said if line.startswith(f"VM {vm}: ")]
            assert f"VM {vm}: line 2" in own
            assert own[-1] == f"VM {vm}: rest"
        if scheme in MONITORED:
            assert summary["counters"]["kernel_call"] >= 4


def test_no_shadow_ever_maps_the_window_and_a_hole_is_no_device() -> None:
    """716: what is neither memory nor a device reads as ones, or is a machine check."""

    async def main() -> None:
        await store(w.SCRATCH, 1)

    for scheme in MONITORED:
        machine, summary, _ = run_machine(workload_of(program("unmapped", main)), scheme, vcpus=2)
        assert summary["exits"]["device"] > 0
        window = machine.memory.devices.start
        assert machine.memory.hpa(window << 12) is None
        found = [entry for submm in machine.submms for entry in submm.entries()]
        assert all(entry.pfn != window for entry in found)
        if machine.second_level:
            assert machine.second_level.entry(window) == 0
