"""Bare CPUs: refused loads of control registers are #GP and nothing more; absent memory."""

from __future__ import annotations

import pytest
from bare_guest import BareGuest, run_bare, start_bare

from penumbra.hw.formats import CR0_PE, CR0_PG, CR4_PAE, CR4_PGE, CR4_SMEP
from penumbra.hw.operations import Load, LoadControl, ReadControl, Store

CR0_ET, NW, CD = 1 << 4, 1 << 29, 1 << 30
REFUSED = [
    LoadControl(0, CR0_PG | CR0_ET),
    LoadControl(0, CR0_PE | NW),
    LoadControl(4, 1 << 13),
    LoadControl(4, CR4_PGE | 1 << 31),
    LoadControl(4, CR4_PAE),
    LoadControl(2, 0x1000),
    LoadControl(5, 0),
    ReadControl(7),
]


@pytest.mark.shows("H2", "I12")
@pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
def test_each_refused_load_is_a_fault_that_changes_no_register(scheme: str) -> None:
    seen: list[object] = []

    async def main() -> None:
        await LoadControl(3, 0x5018)
        await LoadControl(4, CR4_PGE | CR4_SMEP)
        for operation in REFUSED:
            await operation
            seen.append([await ReadControl(number) for number in (0, 3, 4)])

    guest = BareGuest([main])
    machine = run_bare(guest, scheme)
    assert [vcpu for vcpu, _, _ in guest.traps] == [0] * len(REFUSED)
    assert [str(what).partition(":")[0] for _, what, _ in guest.traps] == [
        "CR0 0x80000010", "CR0 0x20000001", "CR4 0x2000", "CR4 0x80000080", "CR4 0x20",
        "CR2 cannot be loaded", "CR5 cannot be loaded", "there is no CR7",
    ]  # fmt: skip
    assert seen == [[CR0_PE | CR0_ET, 0x5018, CR4_PGE | CR4_SMEP]] * len(REFUSED)
    counters = machine.observer.totals()
    assert counters["mode_change"] == 1  # a refused load is no event


@pytest.mark.shows("H2", "I12")
@pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
def test_what_cannot_be_set_is_read_back_as_it_is(scheme: str) -> None:
    seen = []

    async def main() -> None:
        for value in (CR0_PE | 1 << 6 | 1 << 28, CR0_PE | CD | NW, CR0_PE | CD):
            await LoadControl(0, value)
            seen.append(await ReadControl(0))
        await LoadControl(3, (1 << 40) | 0x7000)
        seen.append(await ReadControl(3))

    run_bare(BareGuest([main]), scheme)
    assert seen == [
        CR0_PE | CR0_ET, CR0_PE | CR0_ET | CD | NW, CR0_PE | CR0_ET | CD, 0x7000,
    ]  # fmt: skip


@pytest.mark.shows("H1", "V11")
@pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
@pytest.mark.parametrize("tlb", ["hardware", "software"])
def test_an_address_without_memory_reads_ones_or_ends_the_machine_by_name(
    scheme: str, tlb: str
) -> None:
    seen = []

    async def main() -> None:
        await Store(0x20_0000, 4, 5)
        seen.append(await Load(0x20_0000, 4))

    run_bare(BareGuest([main]), scheme, tlb=tlb)
    assert seen == [0xFFFF_FFFF]
    ended = start_bare(BareGuest([main]), scheme, tlb=tlb, beyond_ram="machine-check").ended
    # A monitor maps what the VM has not to a frame that no machine has.
    assert ended.startswith("machine check at 0x200000: no memory at 0x")
    assert len(seen) == 1
