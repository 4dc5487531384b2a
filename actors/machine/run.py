"""Run one workload under one scheme, from configuration to result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import anyio

from penumbra.actors.check import Verdict
from penumbra.actors.machine.build import summarise
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.several import (
    build_rig,
    merge_summaries,
    merge_verdicts,
)
from penumbra.actors.observe.events import EventLog
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.compiled import engine_name
from penumbra.hw.costs import CostProfile


@dataclass
class RunResult:
    """What a run gave.

    Attributes:
        summary: Deterministic and JSON-able: the same for the same seed and configuration on any
            engine and event loop, with and without the checker.
        verdict: The checker's, or None if it was off.
        wall: Seconds by phase; not reproducible.
    """

    summary: dict[str, Any]
    events: EventLog
    verdict: Verdict | None
    wall: dict[str, float]
    engine: str


def simulate(
    *,
    machine: MachineConfig,
    scheme: Scheme,
    workload: Workload,
    costs: CostProfile,
    seed: int = 0,
    check: bool = True,
    loop: Literal["trio", "asyncio"] = "trio",
    on_progress: Callable[[float], None] | None = None,
) -> RunResult:
    """Run a workload to its end in an event loop of its own.

    Args:
        on_progress: Told now and then how much of the recording's references is done, 0 to 1
            (for coroutine workloads: 0).

    Raises:
        ConfigurationError: The parts do not go together.
    """
    started = time.perf_counter()
    rig = build_rig(machine, scheme, workload, costs, seed, check=check)
    n_references = machine.vms * sum(stream.n_references for stream in workload.streams)

    def on_turn() -> None:
        if on_progress is not None:
            done = sum(
                one.observer.hardware(i)["references"]
                for one in rig.machines
                for i in range(machine.vcpus)
            )
            on_progress(min(1.0, done / n_references) if n_references else 0.0)

    built_at = time.perf_counter()
    anyio.run(rig.run, on_turn, backend=loop)
    ended_at = time.perf_counter()
    summaries = [summarise(one, seed) for one in rig.machines]
    verdicts = [oracle.verdict() for oracle in rig.oracles]
    wall = {"build": built_at - started, "run": ended_at - built_at}
    if rig.kernel is None:
        summary, verdict = summaries[0], verdicts[0] if verdicts else None
    else:
        summary = merge_summaries(summaries, rig.kernel, rig.trespasses)
        verdict = merge_verdicts(verdicts, rig.trespasses) if verdicts else None
    return RunResult(summary, rig.events, verdict, wall, engine_name())
