"""Where there is no memory: all ones and nothing stored, or a machine check; no host's error."""

from __future__ import annotations

import numpy as np
import pytest

from penumbra.hw import operations as o
from penumbra.hw.exits import Done, MachineCheck
from penumbra.hw.streams import AccessStream, pack_runs

from .rig import ENGINES, FETCH, PAGE, READ, WRITE, Rig

HERE, NEXT, BEYOND = 0x40_1000, 0x40_2000, 0x12345
ONES = (1 << 64) - 1

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def machine(engine: str, *, checks: bool) -> Rig:
    """Return a CPU on which HERE has memory and NEXT has none."""
    columns = np.array([[0, READ, 1, 8], [1, READ, 3, 16], [0, WRITE, 1, 24]], np.int64)
    stream = AccessStream(np.array([HERE >> 12, NEXT >> 12], np.int64), pack_runs(*columns.T), 1)
    rig = Rig(engine=engine, streams=[stream])
    rig.map(HERE, 9)
    rig.map(NEXT, BEYOND)
    rig.cpu.machine_checks = checks
    return rig


@pytest.mark.shows("H1")
@pytest.mark.parametrize(
    "work",
    [
        o.Load(NEXT + 8, 8), o.Store(NEXT + 8, 8, 5), o.Exchange(NEXT + 8, 8, 5),
        o.XorMemory(NEXT + 8, 8, 5), o.CompareExchange(NEXT + 8, 8, ONES, 5),
    ],
)  # fmt: skip
def test_an_access_beyond_ram_reads_ones_or_is_a_machine_check(
    engine: str, work: o.Operation
) -> None:
    ones = Done() if isinstance(work, o.Store) else Done(ONES)
    assert machine(engine, checks=False).cpu.run(work, True) == ones
    rig = machine(engine, checks=True)
    assert rig.cpu.run(work, True) == MachineCheck(NEXT + 8, BEYOND * PAGE + 8)


@pytest.mark.shows("H1")
def test_an_access_half_beyond_ram_moves_no_byte(engine: str) -> None:
    rig = machine(engine, checks=True)
    assert rig.cpu.run(o.Store(NEXT - 4, 8, ONES), True) == MachineCheck(NEXT, BEYOND * PAGE)
    assert rig.ram.load(10 * PAGE - 4, 4) == 0


@pytest.mark.shows("H1")
def test_string_operations_stop_where_memory_ends(engine: str) -> None:
    rig = machine(engine, checks=True)
    assert rig.cpu.run(o.Fill(HERE, 2 * PAGE, 7), True) == MachineCheck(NEXT, BEYOND * PAGE)
    assert rig.ram.load(10 * PAGE - 8, 8) == 7
    assert rig.cpu.run(o.Copy(HERE, NEXT, 64), True) == MachineCheck(NEXT, BEYOND * PAGE)
    assert rig.ram.load(9 * PAGE, 8) == 7


@pytest.mark.shows("H1")
def test_a_block_names_its_first_run_beyond_ram(engine: str) -> None:
    wanted = MachineCheck(NEXT + 16, BEYOND * PAGE + 16)
    assert machine(engine, checks=True).cpu.run(o.Block(0, 0, 3), True) == wanted
    assert machine(engine, checks=False).cpu.run(o.Block(0, 0, 3), True) == Done()
    inside = machine(engine, checks=True)
    assert inside.cpu.run(o.Block(0, 0, 1), True) == Done()


@pytest.mark.shows("H1")
def test_with_memory_everywhere_the_policy_changes_nothing(engine: str) -> None:
    rig = machine(engine, checks=True)
    assert rig.cpu.run(o.Store(HERE, 8, 5), True) == Done()
    assert rig.cpu.run(o.Load(HERE, 8), True) == Done(5)
    assert rig.cpu.translate(HERE, FETCH, True) == 9
