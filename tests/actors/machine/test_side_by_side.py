"""Several machines in one application: none knows of another, whatever the event loop."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from machines import SMALL_POOL, SMALL_STRESS, SMALL_SWITCHER, run_machine

from penumbra.actors.machine.build import build_machine, summarise
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.costs import CostProfile

JOBS: list[tuple[Workload, str, int]] = [
    (SMALL_STRESS, "patch", 1),
    (SMALL_STRESS, "patch", 2),
    (SMALL_POOL, "shootdown", 1),
    (SMALL_SWITCHER, "vtlb", 1),
]


@pytest.mark.shows("K5")
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_machines_that_run_in_one_application_do_what_each_does_alone(loop: str) -> None:
    alone = [run_machine(work, scheme, seed=seed, vcpus=2)[1] for work, scheme, seed in JOBS]
    machines: list[Machine] = []
    for workload, scheme, seed in JOBS:
        machine, _ = build_machine(
            MachineConfig(vcpus=2), PRESETS[scheme], workload, CostProfile(), seed
        )
        machines.append(machine)
    turns: list[int] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for number, machine in enumerate(machines):
                group.start_soon(run, number, machine)

    async def run(number: int, machine: Machine) -> None:
        turns.append(number)
        await machine.run(on_turn=lambda: turns.append(number))
        turns.append(number)

    anyio.run(main, backend=loop)
    together: list[dict[str, Any]] = [
        summarise(machine, seed) for machine, (_, _, seed) in zip(machines, JOBS, strict=True)
    ]
    assert together == alone
    assert turns != sorted(turns), "they took turns"
