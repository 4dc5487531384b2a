"""Interrupts on whole machines: their latency, the boundary they are taken at, and the flag."""

from __future__ import annotations

import pytest
from bare_guest import BareGuest, run_bare

from penumbra.actors.machine.machine import Machine
from penumbra.actors.observe.events import EventKind
from penumbra.hw.interrupts import TIMER_VECTOR
from penumbra.hw.operations import ArmTimer, Fill, Halt, Load, SendIpi, SetInterrupts, Store

every_scheme = pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
VECTOR = 0x41


def times(machine: Machine, kind: EventKind, vcpu: int) -> list[int]:
    columns = machine.observer.events.columns()
    rows = (columns["kind"] == kind) & (columns["vcpu"] == vcpu)
    return [int(progress) for progress in columns["progress"][rows]]


@pytest.mark.shows("H9")
@every_scheme
@pytest.mark.parametrize("latency", [0, 1, 150, 900])
@pytest.mark.parametrize("quantum", [1, 40])
def test_an_ipi_is_taken_its_latency_after_it_was_sent(
    scheme: str, latency: int, quantum: int
) -> None:
    async def sends() -> None:
        for _ in range(5):
            await Load(0x1000, 4)
        await SendIpi(0b10, VECTOR)

    async def works() -> None:
        await SetInterrupts(True)
        for _ in range(1500):
            await Load(0x2000, 4)

    guest = BareGuest([sends, works])
    machine = run_bare(guest, scheme, ipi_latency=latency, quantum=quantum)
    (sent,) = times(machine, EventKind.IPI_SENT, 0)
    (taken,) = times(machine, EventKind.INTERRUPT, 1)
    assert [trap[:2] for trap in guest.traps] == [(1, VECTOR)]
    # A receiver that was ahead of the sender takes it at its own next boundary.
    assert sent + latency <= taken <= sent + latency + quantum


@pytest.mark.shows("H9")
@every_scheme
def test_a_masked_interrupt_waits_for_the_operation_after_sti(scheme: str) -> None:
    async def main() -> None:
        await SendIpi(1, VECTOR)
        await SendIpi(1, VECTOR + 1)
        for _ in range(300):
            await Store(0x3000, 4, 1)
            guest.done[0] += 1
        assert guest.traps == []
        assert await SetInterrupts(True) == 0
        for _ in range(10):
            await Load(0x3000, 4)
            guest.done[0] += 1
        assert await SetInterrupts(False) == 1
        await SendIpi(1, VECTOR)
        for _ in range(300):
            await Load(0x3000, 4)

    guest = BareGuest([main])
    run_bare(guest, scheme, ipi_latency=7)
    # In order of arrival; between the two handlers the program gets no further.
    assert guest.traps == [(0, VECTOR, 301), (0, VECTOR + 1, 301)]


@pytest.mark.shows("H9")
@every_scheme
def test_a_timer_ends_a_halt_at_its_time_and_fires_once(scheme: str) -> None:
    async def main() -> None:
        await SetInterrupts(True)
        await ArmTimer(500)
        await Halt()
        guest.done[0] += 1
        await Load(0x1000, 4)

    guest = BareGuest([main])
    machine = run_bare(guest, scheme)
    assert guest.traps == [(0, TIMER_VECTOR, 0)]
    (armed_and_halted,) = times(machine, EventKind.HALT, 0)[:1]
    (taken,) = times(machine, EventKind.INTERRUPT, 0)
    assert 500 <= taken <= armed_and_halted + 500


@pytest.mark.shows("H9")
@every_scheme
def test_a_string_operation_goes_on_after_an_interrupt_where_it_was(scheme: str) -> None:
    seen = []

    async def main() -> None:
        await SetInterrupts(True)
        await SendIpi(1, VECTOR)
        await Fill(0x4000, 8192, 7)
        await SetInterrupts(False)
        seen.extend([await Load(gpa, 8) for gpa in range(0x3FF8, 0x6008, 8)])

    guest = BareGuest([main])
    run_bare(guest, scheme, ipi_latency=100)
    assert [trap[:2] for trap in guest.traps] == [(0, VECTOR)]
    assert seen == [0, *[7] * 1024, 0]
