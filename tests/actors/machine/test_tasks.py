"""The tasks of a machine while it runs, and that none of them outlives it."""

from __future__ import annotations

import pytest
import trio
from machines import SMALL_STRESS

from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.runtime import SystemTree
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import Workload, named_workload
from penumbra.hw.costs import CostProfile

PARTS = ("cpu", "vcpu", "producer", "consumer")


LONG_STRESS = named_workload("shootdown-stress", threads=2, rounds=60, pages=4)


def stress(workload: Workload = SMALL_STRESS) -> Machine:
    machine, _ = build_machine(
        MachineConfig(vcpus=2), PRESETS["patch"], workload, CostProfile(), 1, check=False
    )
    return machine


def look(machine: Machine, seen: list[tuple[SystemTree, list[int]]]) -> None:
    """Note the machine's tree and its guest's live threads, at every grant of the baton."""
    grant = machine.grant

    def noting(vcpu_id: int) -> None:
        grant(vcpu_id)
        assert machine._system is not None
        seen.append((machine._system.tree(), sorted(machine._threads)))

    machine.grant = noting  # type: ignore[method-assign]


@pytest.mark.shows("K1")
@pytest.mark.trio
async def test_a_running_machine_has_one_task_for_each_part_and_each_live_guest_thread() -> None:
    machine = stress()
    seen: list[tuple[SystemTree, list[int]]] = []
    look(machine, seen)
    living = trio.lowlevel.current_statistics().tasks_living
    assert await machine.run() == "finished"
    assert trio.lowlevel.current_statistics().tasks_living == living
    parts = {f"machine/{part}-{i}" for part in PARTS for i in (0, 1)}
    most = 0
    for tree, threads in seen:
        # One that the guest has ended may still be closing.
        names = [actor.task for actor in tree.actors if actor.state.name != "CLOSING"]
        assert len(names) == len(set(names))
        assert set(names) == parts | {f"machine/thread-{thread}" for thread in threads}
        most = max(most, len(threads))
    assert most > 2  # more than the idle ones


@pytest.mark.shows("K1", "K4")
@pytest.mark.trio
async def test_a_cancelled_machine_leaves_no_task_behind() -> None:
    machine = stress(LONG_STRESS)  # many turns of the loop
    living = trio.lowlevel.current_statistics().tasks_living
    with trio.CancelScope() as scope:
        turns = iter(range(3))
        grant = machine.grant

        def cancel_soon(vcpu_id: int) -> None:
            grant(vcpu_id)
            if next(turns, None) is None:
                scope.cancel()

        machine.grant = cancel_soon  # type: ignore[method-assign]
        await machine.run()
    assert scope.cancelled_caught
    assert machine.ended == ""
    assert trio.lowlevel.current_statistics().tasks_living == living
