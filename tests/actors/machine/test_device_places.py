"""The device window where nothing is simple: no paging, large pages, tables in it, odd schemes.

Source: A40 ¶38; VTLB p. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from bare_guest import BareGuest, Program, start_bare
from device_programs import WINDOW_AT, keep, kept, load, program, store
from machines import run_machine, scheme_with, workload_of
from small_programs import map_pages

from penumbra.actors.check import Oracle
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.hw import device_window as w
from penumbra.hw.formats import CR0_PE, CR0_PG, CR4_PSE, IA32, PS, A, D, P, U
from penumbra.hw.formats import W as WRITABLE
from penumbra.hw.memory import Ram
from penumbra.hw.operations import (
    Exchange,
    ExchangePhysical,
    Load,
    LoadControl,
    LoadPhysical,
    SpinUntil,
    Store,
    StorePhysical,
    Syscall,
)

pytestmark = pytest.mark.shows("V11")

BASE = w.window_base(IA32)
ROOT, TABLE, ONES = 0x1000, 0x2000, 0xFFFF_FFFF
LINK = P | WRITABLE | U | A | D


def bare(body: Program, **config: int) -> list[Machine]:
    """Run a program without a kernel under every preset; return the machines, ended."""
    machines = []
    for scheme in PRESETS:
        machine = start_bare(BareGuest([body]), scheme, **config)
        for submm in machine.submms:
            submm.check()
        machine.memory.check()
        machines.append(machine)
    return machines


async def paging_on(*entries: tuple[int, int]) -> None:
    """Write 4-byte entries, map the first 4 MiB to themselves, and switch paging on."""
    for at, entry in (*entries, (ROOT, LINK | PS)):
        await StorePhysical(at, 4, entry)
    await LoadControl(4, CR4_PSE)
    await LoadControl(3, ROOT)
    await LoadControl(0, CR0_PE | CR0_PG)


def test_without_paging_and_by_physical_addresses_the_window_answers() -> None:
    read: list[int] = []

    async def body() -> None:
        await Store(BASE + w.SCRATCH, 8, 6)
        values = [await Exchange(BASE + w.SCRATCH, 4, 7), await Load(BASE + w.SCRATCH, 8)]
        values += [await LoadPhysical(BASE + w.SCRATCH, 4)]
        values += [await ExchangePhysical(BASE + w.SCRATCH, 8, 9)]
        await StorePhysical(BASE + w.SCRATCH + 1, 1, 1)
        values += [await Load(BASE + w.SCRATCH, 8), await LoadPhysical(BASE - 8, 8)]
        read[:] = values

    for machine in bare(body):
        assert machine.ended == "finished"
        assert read == [6, 7, 7, 7, 0x109, (1 << 64) - 1]
        exits = sum(one["device"] for one in machine.observer.exits)
        assert exits == (0 if machine.scheme.name.startswith("native") else 7)


def test_a_physical_access_across_registers_is_a_protection_fault() -> None:
    async def body() -> None:
        await StorePhysical(BASE + w.SCRATCH + 6, 4, 1)

    for machine in bare(body):
        assert machine.ended == "finished"
        guest = machine.guest
        assert isinstance(guest, BareGuest)
        assert [what for _, what, _ in guest.traps] == [
            "4 bytes at 0x426 of the device window are not in one register"
        ]


def test_a_large_page_around_the_window_reaches_it_and_leaves_the_rest_a_hole() -> None:
    read: list[int] = []
    gva = 0x0080_0000

    async def body() -> None:
        await paging_on((ROOT + 8, BASE & -(1 << 22) | LINK | PS))
        near = gva | BASE & ((1 << 22) - 1)
        await Store(near + w.SCRATCH, 8, 5)
        values = [await Load(near + w.SCRATCH, 8), await Load(near + 0x1000, 4)]
        await Store(near - 8, 8, 3)
        read[:] = [*values, await Load(near - 8, 4), await Load(near + w.SCRATCH, 4)]

    for machine in bare(body):
        assert (machine.ended, read) == ("finished", [5, ONES, ONES, 5]), machine.scheme.name


def test_a_page_that_turns_into_the_window_and_back_follows_the_guests_flushes() -> None:
    gva, entry = 0x0040_3000, TABLE + 3 * 4
    read: list[int] = []

    async def body() -> None:
        await paging_on((ROOT + 4, TABLE | LINK), (entry, 0x5000 | LINK))
        await Store(gva + w.SCRATCH, 4, 11)
        values = []
        for frame in (BASE, 0x5000, BASE):
            await Store(entry, 4, frame | LINK)  # through the identity mapping: a guest store
            await LoadControl(3, ROOT)
            values += [await Load(gva + w.SCRATCH, 4)]
            await Store(gva + w.SCRATCH, 4, values[-1] + 1)
        read[:] = [*values, await LoadPhysical(0x5000 + w.SCRATCH, 4)]

    for machine in bare(body):
        assert (machine.ended, read) == ("finished", [0, 11, 1, 12]), machine.scheme.name


@pytest.mark.shows("I4")
def test_an_emulated_access_sets_a_and_d_as_the_hardwares_own_does() -> None:
    entry = TABLE + 3 * 4
    read: list[int] = []

    async def body() -> None:
        await paging_on((ROOT + 4, TABLE | P | WRITABLE), (entry, BASE | P | WRITABLE))
        values = []
        for work in (Load(0x0040_3000 + w.ID, 4), Store(0x0040_3000 + w.SCRATCH, 4, 1)):
            await work
            values += [await LoadPhysical(entry, 4) & 0xFFF, await LoadPhysical(ROOT + 4, 4) & A]
        read[:] = values

    for machine in bare(body):
        assert machine.ended == "finished"
        assert read == [P | WRITABLE | A, A, P | WRITABLE | A | D, A], machine.scheme.name


def test_a_spin_where_nothing_is_waits_for_ever_and_breaks_nothing() -> None:
    async def body() -> None:
        await SpinUntil(BASE - 0x1000, 8, 1, 0)

    ends = {machine.ended for machine in bare(body)}
    assert ends == {"guest deadlock: VCPU 0 spinning, no interrupt pending"}


def test_a_walk_finds_ones_in_the_window_and_reaches_no_register() -> None:
    read: list[int] = []

    async def body() -> None:
        await paging_on((ROOT + 4, BASE | LINK))
        read[:] = [await Load(0x0040_0000 + w.SCRATCH, 4)]

    for machine in bare(body):
        assert (machine.ended, read) == ("finished", [ONES]), machine.scheme.name
        assert machine.devices.ports[0].n_accesses == 0


def test_a_root_in_the_window_is_a_root_of_ones() -> None:
    async def body() -> None:
        await paging_on()
        await LoadControl(3, BASE)
        await Load(0x1000, 4)

    machines = bare(body)
    assert {machine.ended for machine in machines} == {"guest kernel panic: page fault at 0x1000"}


VARIANTS: Sequence[Scheme] = [
    scheme_with("patch", prefetch=8, prefetch_invlpg=True),
    scheme_with("patch", capacity=1, stale="invalidate"),
    scheme_with("vtlb", prefetch=4, drop="all"),
    scheme_with("vtlb", sharing="vm", levels="one"),
    scheme_with("out-of-sync", prefetch=8, prefetch_invlpg=True, share_roles=False),
    scheme_with("write-buffer"),
    scheme_with("native"),
]


@pytest.mark.parametrize(
    "config", [{"tlb": "software"}, {"smt": 2, "tlb_entries": 8, "tlb_ways": 2}]
)
def test_no_variant_of_a_scheme_maps_it_whoever_fills_the_tlb(config: dict[str, Any]) -> None:
    async def main() -> None:
        await map_pages(WINDOW_AT - 0x2000, 2)
        for lap in range(4):
            await Store(WINDOW_AT - 0x1000, 8, lap)
            await store(w.SCRATCH, await load(w.SCRATCH) + 1)
            await Syscall("mprotect", (WINDOW_AT - 0x1000, 0x2000, 1 + 2 * (lap % 2 == 0)))
            await Syscall("mprotect", (WINDOW_AT - 0x1000, 0x2000, 3))
        await keep(0, await load(w.SCRATCH))

    seen = set()
    for scheme in VARIANTS:
        machine, summary, verdict = run_machine(
            workload_of(program("laps", main)), scheme, vcpus=2, **config
        )
        assert verdict is not None
        assert verdict.coherent, f"{scheme.name}: {verdict.explain()}"
        assert kept(summary) == [4]
        assert summary["counters"]["device_access"] == 9
        if machine.submms:
            assert summary["exits"]["device"] == 9
        seen.add((summary["progress"], summary["processes"][0]["digest"]))
    assert len(seen) == 1


def test_the_checker_takes_neither_a_hole_for_the_window_nor_the_window_for_a_hole() -> None:
    """The frame that is used must be the device's own: a monitor may confuse the two."""
    ram, window = Ram(8), BASE >> 12
    for entry, used, right in (
        (BASE, window, True),
        (BASE, 0xFFFFF, False),
        (BASE, 3, False),
        (0xFFFF_F000, 0xFFFFF, True),
        (0xFFFF_F000, window, False),
        (0x3000, window, False),
    ):
        oracle = Oracle("ia32", 1, ram.bytes, ram.flags_array)
        for gfn in range(8):
            oracle.grant(gfn, gfn)
        oracle.device(window, window)
        ram.store(ROOT, 4, TABLE | LINK)
        ram.store(TABLE, 4, entry | LINK)
        oracle.registers(0, CR0_PE | CR0_PG, ROOT, 0, 0)
        oracle.used(0, 0, 0, False, used)
        assert oracle.verdict().coherent == right, (entry, used)
