"""Whole machines on PAE: every workload, in every scheme, and a root whose entries come and go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import msgspec
import pytest
from machines import WORKLOADS, run_machine, scheme_with, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.machine.build import ConfigurationError, build_machine, plan_layout
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.vtlb.virtual_tlb import VirtualTlb
from penumbra.guest.kernel.process import Thread
from penumbra.guest.workloads.verify import ARENA_AT, SHARED_AT, WORD, expect
from penumbra.hw import mmu_layout as m
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import CR0_WP, PAGE_BYTES, A, D, P, U, W
from penumbra.hw.operations import Load, LoadControl, SpinUntil, Store, Syscall

SCHEMES = ("native", "shootdown", "patch", "vtlb")
ONE_SHADOW = msgspec.structs.replace(PRESETS["patch"], name="one-shadow", shadow="shared")
GIB = 1 << 30
TURNS = 4
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def left_by(summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


def check_registers(machine: Machine) -> None:
    """Assert that each CPU holds what its shadow root says."""
    for submm, cpu in zip(machine.submms, machine.cpus, strict=bool(machine.submms)):
        if isinstance(submm, VirtualTlb):
            h = submm.state.pair.of(submm.state.user)
            assert h.address == cpu.reg[m.R_ROOT] < 1 << 32
            for index in range(4):
                assert cpu.reg[m.R_TOP + index] == h.entry(h.root, index)
            submm.check()
            continue
        assert isinstance(submm, SubVmm)
        root = submm.space.root
        assert root is not None
        assert root.pfn << 12 == cpu.reg[m.R_ROOT] < 1 << 32
        for index in range(4):
            assert cpu.reg[m.R_TOP + index] == submm.space.entry(root, index)
        submm.check()


@pytest.mark.shows("H3", "S3", "C1")
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize(
    ("vcpus", "tlb", "smt", "schemes"),
    [
        (1, 8, 1, (*SCHEMES, "nested")),
        (4, 64, 2, ("native", scheme_with("patch", capacity=1), "vtlb-smp", ONE_SHADOW)),
        (8, 1536, 1, ("native", "shootdown", "out-of-sync", "write-buffer", "vtlb-eager")),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, tuple) else str(value),
)
def test_every_workload_is_coherent_on_pae_and_leaves_what_it_leaves_on_ia32(
    workload: str, vcpus: int, tlb: int, smt: int, schemes: tuple[str | Scheme, ...]
) -> None:
    ways = 12 if tlb == 1536 else 4
    shape: dict[str, Any] = {"vcpus": vcpus, "tlb_entries": tlb, "tlb_ways": ways, "smt": smt}
    seen = set()
    for scheme in schemes:
        machine, summary, verdict = run_machine(WORKLOADS[workload], scheme, paging="pae", **shape)
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        check_registers(machine)
        seen.add((summary["progress"], *left_by(summary)))
    ((_, *left),) = seen
    _, short, _ = run_machine(WORKLOADS[workload], "native", paging="ia32", check=False, **shape)
    assert left_by(short) == left


def comes_and_goes() -> SmallProgram:
    """Two threads use one region after the other, each in a GiB of its own, and unmap it again.

    So entries of the root appear while the sibling runs on registers that lack them, and vanish,
    with the table below given away, while it holds them.
    """
    word, mask = SHARED_AT, (1 << 64) - 1

    async def main() -> None:
        await map_pages(word, 1)
        sibling = await Syscall("thread_create", (1,))
        for turn in range(TURNS):
            gva = GIB * (1 + turn % 2)
            await map_pages(gva, 3)
            await Store(gva + PAGE_BYTES, WORD, turn + 1)
            await Store(word, WORD, 2 * turn + 1)
            await SpinUntil(word, WORD, mask, 2 * turn + 2)
            await expect(gva + 2 * PAGE_BYTES, turn + 7)
            await Syscall("munmap", (gva, 3 * PAGE_BYTES))
        await Syscall("thread_join", (sibling,))

    async def other() -> None:
        for turn in range(TURNS):
            gva = GIB * (1 + turn % 2)
            await SpinUntil(word, WORD, mask, 2 * turn + 1)
            await expect(gva + PAGE_BYTES, turn + 1)
            await Store(gva + 2 * PAGE_BYTES, WORD, turn + 7)
            await Store(word, WORD, 2 * turn + 2)

    return SmallProgram("comes-and-goes", (main, other))


@every_scheme
@pytest.mark.shows("H3", "G4", "C1")
@pytest.mark.parametrize("flush", ["eager", "quiesce", "batched", "lazy"])
@pytest.mark.parametrize("smt", [1, 2])
def test_entries_of_the_root_that_come_and_go_are_followed_by_every_cpu(
    scheme: str, flush: str, smt: int
) -> None:
    machine, summary, verdict = run_machine(
        workload_of(comes_and_goes()), scheme, paging="pae", vcpus=2, smt=smt, guest_flush=flush,
        timer_period=2_000_000, max_progress=1_000_000,
    )  # fmt: skip
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    check_registers(machine)
    (process,) = machine.kernel.processes.processes.values()
    # One for the GiB of the shared word, whose page is never unmapped, and two in each turn.
    assert process.space.root_changes == 1 + 2 * TURNS + 1


@every_scheme
@pytest.mark.shows("H3", "G4")
@pytest.mark.parametrize("flush", ["eager", "quiesce", "batched", "lazy"])
def test_no_cpu_walks_on_from_a_register_whose_table_was_given_away(
    scheme: str, flush: str
) -> None:
    word, mask = SHARED_AT, (1 << 64) - 1

    async def main() -> None:
        await map_pages(word, 1)
        sibling = await Syscall("thread_create", (1,))
        await map_pages(GIB, 1)
        await Store(GIB, WORD, 7)
        await Store(word, WORD, 1)
        await SpinUntil(word, WORD, mask, 2)
        await Syscall("munmap", (GIB, PAGE_BYTES))
        # The directory given away last serves this page as its table; what the page holds would,
        # to whoever still walks from it, be the entry of another page.
        await map_pages(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, 0x12_0000 | P | W | U | A | D)
        await Store(word, WORD, 3)
        await Syscall("thread_join", (sibling,))

    async def other() -> None:
        await SpinUntil(word, WORD, mask, 1)
        await expect(GIB, 7)
        await Store(word, WORD, 2)
        await SpinUntil(word, WORD, mask, 3)
        await Load(GIB, WORD)

    machine, summary, verdict = run_machine(
        workload_of(SmallProgram("reuse", (main, other))), scheme, paging="pae", vcpus=2,
        guest_flush=flush, timer_period=2_000_000, max_progress=1_000_000,
    )  # fmt: skip
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    ended = [process["ended"] for process in summary["processes"]]
    assert ended == ["segmentation fault: nothing is mapped at 0x40000000"]
    machine.kernel.check()


@every_scheme
@pytest.mark.shows("H3")
def test_processes_share_a_frame_of_roots_and_each_lies_at_32_bytes(scheme: str) -> None:
    machine, _, verdict = run_machine(WORKLOADS["fork-storm"], scheme, paging="pae", vcpus=2)
    assert verdict is not None
    assert verdict.coherent
    roots = {process.space.root_gpa for process in machine.kernel.processes.processes.values()}
    assert len(roots) > 1
    assert len({root >> 12 for root in roots}) == 1
    assert all(root % 32 == 0 for root in roots)


def scribbling(
    scheme: str | Scheme, register: int, value: int | None, garbage: int
) -> tuple[str, str, list[int]]:
    """Run a program whose kernel overwrites the first entry of its root, then loads a register.

    Returns:
        How the machine ended, the process, and what its accesses to a page under it gave.
    """
    chosen = PRESETS[scheme] if isinstance(scheme, str) else scheme
    seen: list[int] = []

    async def body() -> None:
        await map_pages(ARENA_AT, 1)
        await Store(ARENA_AT, WORD, 7)
        await Syscall("scribble", ())
        seen.append(await Load(ARENA_AT, WORD))
        await Syscall("load", ())
        seen.append(await Load(ARENA_AT, WORD))

    machine, oracle = build_machine(
        MachineConfig(vcpus=1, paging="pae", max_progress=10_000), chosen,
        workload_of(SmallProgram("scribbling", (body,))), CostProfile(), 1,
    )  # fmt: skip
    kernel = machine.kernel

    async def scribble(thread: Thread, _args: tuple[int, ...]) -> int:
        assert thread.process is not None
        await Store(thread.process.space.root.gva, 8, garbage)
        return 0

    async def load(thread: Thread, _args: tuple[int, ...]) -> int:
        assert thread.process is not None
        await LoadControl(register, thread.process.space.root_gpa if value is None else value)
        return 0

    kernel._calls["scribble"] = (scribble, 0, 0)
    kernel._calls["load"] = (load, 0, 0)
    anyio.run(machine.run)
    assert oracle is not None
    assert oracle.verdict().coherent, oracle.verdict().explain()
    record = next(iter(machine.ledger.records.values()))
    return machine.ended, record.ended, seen


@every_scheme
@pytest.mark.shows("H3", "P5")
@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 52, 63])
def test_a_reserved_bit_in_an_entry_of_the_root_refuses_the_load_of_cr3(
    scheme: str, bit: int
) -> None:
    garbage = P | 1 << bit
    ended, _, seen = scribbling(scheme, 3, None, garbage)
    assert ended == (
        "guest kernel panic: general protection fault in the kernel: "
        f"reserved bits in top-level entry 0: {garbage:#x}"
    )
    assert seen == [7]  # the store alone changed nothing


CR0 = 1 << 31 | 1 | CR0_WP
CR4 = 1 << 5 | 1 << 7


@every_scheme
@pytest.mark.shows("H3", "P5")
@pytest.mark.parametrize(
    ("register", "value"),
    [
        (0, CR0 | 1 << 30),
        (0, CR0 | 3 << 29),
        (4, CR4 | 1 << 4),
        (4, CR4 ^ 1 << 7),
        (4, CR4 | 1 << 20),
    ],
    ids=["CD", "CD and NW", "PSE", "PGE", "SMEP"],
)
def test_a_change_of_the_modes_that_count_loads_the_root_again(
    scheme: str, register: int, value: int
) -> None:
    ended, _, seen = scribbling(scheme, register, value, P | W)
    assert ended.endswith("reserved bits in top-level entry 0: 0x3")
    assert seen == [7]


@pytest.mark.parametrize("scheme", [*SCHEMES, ONE_SHADOW], ids=lambda s: getattr(s, "name", s))
@pytest.mark.shows("H3")
@pytest.mark.parametrize(("register", "value"), [(0, CR0 ^ CR0_WP), (4, CR4)], ids=["WP", "same"])
def test_a_change_of_no_such_mode_leaves_the_registers(
    scheme: str | Scheme, register: int, value: int
) -> None:
    ended, _, seen = scribbling(scheme, register, value, P | W)
    # The program goes on; what it ends by is the load of CR3 at the next change of process.
    assert seen == [7, 7]
    assert ended == "finished"


@every_scheme
@pytest.mark.shows("H3")
def test_an_entry_cleared_in_memory_serves_until_the_load_and_then_faults_for_ever(
    scheme: str,
) -> None:
    ended, _, seen = scribbling(scheme, 3, None, 0)
    # The kernel finds its tables whole, so it knows of no reason and the program tries again.
    assert ended == "max_progress 10000 reached by VCPU 0"
    assert seen == [7]


@pytest.mark.shows("H3")
def test_a_64_bit_recording_is_refused_on_pae_and_a_32_bit_one_may_have_either() -> None:
    small = WORKLOADS["mmap-churn"]
    for bits, paging, text in (
        (64, "pae", "is a 64-bit program: it needs 'x86-64'"),
        (32, "x86-64", "is a 32-bit program: it needs 'ia32' or 'pae'"),
    ):
        machine = msgspec.convert({"paging": paging}, MachineConfig)
        with pytest.raises(ConfigurationError, match=text) as caught:
            plan_layout(machine, replace(small, bits=bits))
        assert "\n" not in str(caught.value)
    for paging in ("ia32", "pae"):
        plan_layout(msgspec.convert({"paging": paging}, MachineConfig), replace(small, bits=32))
