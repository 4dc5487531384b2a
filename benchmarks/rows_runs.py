"""Whether a whole run costs what its parts cost: a shipped recording, checked, under `patch`.

From the time of the run, without building and decoding, are taken: the engine and the checker,
timed call by call, and each counted event at its unit cost. Unit costs come from small guests
measured right before the run, each without what the others explain:

    operation       one that the TLB serves: asked of the thread, executed, its value handed back
    hidden fault, traced store, event (a CR3 load without patches), patch applied
    kernel entry    getpid, without its operations: for system calls and interrupts
    guest fault     without its operations, its traced store and its hidden faults

What is left, of either sign, is what nobody has accounted for. Processor time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import anyio
from harness import Kind, Line, Row, Sampler
from rows_exits import N_PATCHES, SmallMachine, touch

from penumbra import guest
from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.thread import ThreadActor
from penumbra.actors.vmm.schemes import PATCH
from penumbra.guest.workloads.workload import Workload, recorded_workload
from penumbra.hw.costs import CostProfile

_COUNTED = ("hidden_fault", "emulated_store", "coherency_event", "patch_applied", "guest_fault")
_ENTRIES = ("syscall", "interrupt")


def counts(machine: Machine) -> Counter[str]:
    """Return what the machine has counted of what has a unit cost."""
    totals = machine.observer.totals()
    found = Counter({name: totals.get(name, 0) for name in _COUNTED})
    found["entry"] = sum(totals.get(name, 0) for name in _ENTRIES)
    return found


@contextmanager
def operations_counted() -> Iterator[Callable[[], int]]:
    """Count the operations that guest threads issue."""
    n = 0
    receive = ThreadActor.receive

    def counting(self: ThreadActor, message: Any) -> Any:
        nonlocal n
        n += 1
        return receive(self, message)

    ThreadActor.receive = counting  # type: ignore[method-assign]
    try:
        yield lambda: n
    finally:
        ThreadActor.receive = receive  # type: ignore[method-assign]


def unit_costs() -> dict[str, float]:
    """Return seconds per event, each without what the others explain."""
    seconds = SmallMachine().seconds
    unit = {"operation": seconds["load"]}
    unit["hidden_fault"] = seconds["hidden"] - unit["operation"]
    unit["emulated_store"] = seconds["traced"] - unit["operation"]
    unit["coherency_event"] = seconds["event-0"] - unit["operation"]
    unit["patch_applied"] = (seconds["event"] - seconds["event-0"]) / N_PATCHES
    with operations_counted() as n:
        program = touch(lambda machine: (counts(machine), n()))
    unit["entry"] = program.call - program.n_call_operations * unit["operation"]
    explained = sum(n_per * unit[name] for name, n_per in program.per_fault.items() if name in unit)
    unit["guest_fault"] = program.fault - explained
    return unit


class Timed:
    """Adds up the time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = process_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += process_time() - start

        return timed


def account(workload: Workload, unit: dict[str, float]) -> dict[str, float]:
    """Run it; return the seconds of the whole and of each part."""
    config = MachineConfig(vcpus=4)
    machine, oracle = build_machine(config, PATCH, workload, CostProfile(), seed=1)
    assert oracle is not None
    engine, checker = Timed(), Timed()
    for cpu in machine.cpus:
        cpu._run_block = engine.wrap(cpu._run_block)
    for name in ("store", "event", "fault", "used", "block"):
        setattr(oracle, name, checker.wrap(getattr(oracle, name)))
    with operations_counted() as n:
        start = process_time()
        ended = anyio.run(machine.run, backend="trio")
        whole = process_time() - start
        n_operations = n()
    assert ended == "finished", ended
    assert oracle.verdict().coherent
    parts = {name: n * unit[name] for name, n in counts(machine).items()}
    parts["operation"] = n_operations * unit["operation"]
    return {"whole": whole, "engine": engine.seconds, "checker": checker.seconds, **parts}


@contextmanager
def whole_run() -> Iterator[Sampler]:
    path = Path(guest.__path__[0]) / "recordings" / "pipeline.trace"
    workload = recorded_workload(path)

    def sample() -> tuple[float, float]:
        seconds = account(workload, unit_costs())
        whole = seconds.pop("whole")
        return whole, abs(whole - sum(seconds.values()))

    account(workload, unit_costs())  # compiles
    yield sample


LINES: tuple[Line, ...] = (
    Row("runs/unaccounted", "share of a run that engine, checker and unit costs leave unexplained",
        Kind.TIME, 0.15, whole_run),
)  # fmt: skip
