"""A world's seat: what a CPU held for it comes back with it, and nothing is read anew.

Source: A40 ¶51, ¶54; SDM vol. 3, 4.4.1, 27.3.2.4.
"""

from __future__ import annotations

import pytest

from penumbra.actors.machine.cpu import CpuActor
from penumbra.actors.machine.messages import CpuOrder, LoadRoot, Ran, SetModes
from penumbra.actors.machine.seat import WorldSeat
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.formats import FORMATS, P
from penumbra.hw.memory import Ram
from penumbra.hw.tlb import Tlb, TlbGeometry

pytestmark = pytest.mark.shows("V8")

ROOT, OTHER_ROOT, TABLE, NEW_TABLE = 0x1000, 0x2000, 0x3000, 0x4000
MODES = SetModes(wp=True, pse=True, pge=True, nxe=False, pg=True, reload=True)


def test_the_top_level_a_cpu_holds_in_registers_is_restored_and_not_read_again() -> None:
    spec, ram = FORMATS["pae"], Ram(8)
    ram.store(ROOT, 8, TABLE | P)
    ram.store(OTHER_ROOT, 8, NEW_TABLE | P)
    cpu = PhysicalCpu(0, spec, ram, Tlb(spec, TlbGeometry(16, 4)))
    actor = CpuActor(cpu, None)

    class Ref:
        def ask_nowait(self, order: CpuOrder) -> Ran:
            return actor.receive(order)

    seats = [WorldSeat(cpu), WorldSeat(cpu)]
    for seat, root in zip(seats, (ROOT, OTHER_ROOT), strict=True):
        seat.ask_nowait(LoadRoot(root))
        seat.ask_nowait(MODES)
    first, second = seats
    first.take(Ref(), cpu)  # type: ignore[arg-type]
    assert cpu.top_entries[0] == TABLE | P
    first.leave()
    ram.store(ROOT, 8, NEW_TABLE | P)  # another VCPU of the guest, without a load of CR3 here
    second.take(Ref(), cpu)  # type: ignore[arg-type]
    assert cpu.top_entries[0] == NEW_TABLE | P
    second.leave()
    first.take(Ref(), cpu)  # type: ignore[arg-type]
    assert cpu.top_entries[0] == TABLE | P
    first.ask_nowait(LoadRoot(ROOT))
    assert cpu.top_entries[0] == NEW_TABLE | P
