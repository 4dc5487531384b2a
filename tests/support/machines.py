"""Machines small enough for tests, and a way to run one to its end."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec

from penumbra.actors.check import Verdict
from penumbra.actors.machine.build import build_machine, summarise
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.guest.programs.program import Program
from penumbra.guest.workloads.workload import Workload, named_workload
from penumbra.hw.costs import CostProfile

# One preset of each way to keep derived tables coherent. The others differ from one of these in
# channels, fill or limits: `test_presets.py` and `test_random_machines.py` run them all.
FAMILIES = ("native", "shootdown", "patch", "vtlb", "write-buffer", "out-of-sync", "nested")
# Where a matrix is wide, some of its places are run under these alone.
CORE = ("native", "shootdown", "patch")


SMALL_STORM = named_workload("fork-storm", depth=1, pages=4, rounds=1)
SMALL_CHURN = named_workload("mmap-churn", steps=15, pages=6)
SMALL_STRESS = named_workload("shootdown-stress", threads=2, rounds=3, pages=2)
SMALL_POOL = named_workload("buffer-pool", workers=2, updates=6)
SMALL_SWITCHER = named_workload("process-switcher", processes=3, regions=4, turns=2)
WORKLOADS = {
    workload.name: workload
    for workload in (SMALL_STORM, SMALL_CHURN, SMALL_STRESS, SMALL_POOL, SMALL_SWITCHER)
}


def scheme_with(name: str, **options: Any) -> Scheme:
    """Return a preset with some options changed."""
    preset = PRESETS[name]
    return msgspec.structs.replace(
        preset, options=msgspec.structs.replace(preset.options, **options)
    )


def workload_of(program: Program) -> Workload:
    """Return a workload around a program made in a test."""
    return Workload(program.name, "made in a test", "0", program)


def run_machine(
    workload: Workload,
    scheme: Scheme | str = "patch",
    *,
    seed: int = 1,
    check: bool = True,
    loop: str = "trio",
    invariants: bool = True,
    costs: CostProfile | None = None,
    **config: Any,
) -> tuple[Machine, dict[str, Any], Verdict | None]:
    """Run a machine to its end; assert its parts' invariants; return it, its summary, the verdict.

    Args:
        invariants: False for a switch that breaks an invariant of the channels themselves.
    """
    if isinstance(scheme, str):
        scheme = PRESETS[scheme]
    machine, oracle = build_machine(
        MachineConfig(**config), scheme, workload, costs or CostProfile(), seed, check=check
    )
    anyio.run(machine.run, backend=loop)
    for submm in machine.submms:
        submm.check()
    for cpu in machine.cpus:
        cpu.tlb.check()
    if invariants:
        machine.matrix.check()
    machine.memory.check()
    if machine.second_level is not None:
        machine.second_level.check()
    return machine, summarise(machine, seed), oracle.verdict() if oracle else None
