"""Run a random configuration and say what is wrong with it: whatever must hold of every run."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
from isolation import foreign_translations
from random_machines import drawn, refusal, token

from penumbra.actors.check import Verdict
from penumbra.actors.console.config import RunConfig
from penumbra.actors.machine.build import summarise
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.several import Rig, build_rig, merge_verdicts
from penumbra.actors.vmm.schemes import NATIVE, SchemeOptions
from penumbra.guest.kernel import Kernel
from penumbra.guest.workloads.workload import named_workload

# What a fork catches of its siblings' pages is a race of this workload's own.
RACES_BY_ITSELF = ("shootdown-stress",)
# Which number a process gets, and which flags of others it leaves standing, is a race of this one:
# only the first process, which waits for all, must leave the same whatever the timing was.
RACES_BUT_IN_THE_FIRST = ("fork-storm",)
_FIRST_PID = 1
_TURNS_PER_LOOK = 20


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        summaries: One for each VM.
        left: Of each process of each VM: VM, number, end, pages, digest of its memory.
    """

    summaries: list[dict[str, Any]]
    verdict: Verdict

    @property
    def progress(self) -> list[int]:
        return [summary["progress"] for summary in self.summaries]

    @property
    def left(self) -> list[tuple[Any, ...]]:
        return [
            (vm, p["pid"], p["ended"], p["pages"], p["digest"])
            for vm, summary in enumerate(self.summaries)
            for p in summary["processes"]
        ]


def run_case(case: RunConfig, loop: str = "trio") -> Outcome:
    """Run one to its end under the oracle; assert every part's invariants."""
    name, *parameters = case.workload.values()
    keys = list(case.workload)[1:]
    workload = named_workload(str(name), **dict(zip(keys, map(int, parameters), strict=True)))
    rig = build_rig(case.machine, case.scheme, workload, case.costs, case.seed)
    turns = itertools.count(1)

    def on_turn() -> None:
        if next(turns) % _TURNS_PER_LOOK == 0:
            check_isolation(rig)

    anyio.run(rig.run, on_turn, backend=loop)
    for machine in rig.machines:
        _check_parts(machine)
    verdict = merge_verdicts([oracle.verdict() for oracle in rig.oracles], rig.trespasses)
    check_isolation(rig)
    return Outcome([summarise(one, case.seed) for one in rig.machines], verdict)


def _check_parts(machine: Machine) -> None:
    for submm in machine.submms:
        submm.check()
    for cpu in machine.cpus:
        cpu.tlb.check()
        cpu.write_buffer.check()
    machine.matrix.check()
    machine.memory.check()
    if machine.second_level is not None:
        machine.second_level.check()
    if isinstance(machine.guest, Kernel) and machine.ended == "finished":
        machine.guest.check()


def check_isolation(rig: Rig) -> None:
    """Assert that no VM has used a frame of another, or could; looked at once a second."""
    assert not rig.trespasses, rig.trespasses
    foreign = foreign_translations(rig)
    assert not foreign, foreign


def complaint(case: RunConfig, *, twice: bool = False) -> str | None:
    """Say what does not hold of a run of this configuration, or None.

    Args:
        twice: Run it again, on the other event loop, and hold the summaries against each other.
    """
    try:
        outcome = run_case(case)
        if twice and run_case(case, "asyncio").summaries != outcome.summaries:
            return "the same seed gave another summary"
        return _judged(outcome) or differs_from_native(case, outcome)
    except Exception:
        return traceback.format_exc()


def _judged(outcome: Outcome) -> str | None:
    ends = [summary["ended"] for summary in outcome.summaries]
    if set(ends) != {"finished"}:
        return f"ended: {ends}"
    if not outcome.verdict.coherent:
        return outcome.verdict.explain()
    marks = [summary["marks"] for summary in outcome.summaries]
    if any(marks):
        return f"the guest found something wrong: {marks}"
    return None


def differs_from_native(case: RunConfig, outcome: Outcome) -> str | None:
    """Say where memory is not what `native` leaves on the same machine, or None."""
    if case.workload["name"] in RACES_BY_ITSELF or case.scheme.name == NATIVE.name:
        return None
    native = run_case(msgspec.structs.replace(case, scheme=NATIVE))
    theirs, ours = native.left, outcome.left
    if case.workload["name"] in RACES_BUT_IN_THE_FIRST and native.progress != outcome.progress:
        theirs, ours = ([p for p in left if p[1] == _FIRST_PID] for left in (theirs, ours))
    if theirs == ours:
        return None
    found = [pair for pair in zip(theirs, ours, strict=False) if len(set(pair)) > 1]
    return f"memory is not that of native: {found or (len(theirs), len(ours))}"


def smaller(case: RunConfig, fails: Callable[[RunConfig], bool]) -> RunConfig:
    """Return the case with every field at its default that need not differ for it to fail."""
    changed = True
    while changed:
        changed = False
        for candidate in _nearer(case):
            if refusal(candidate) is None and fails(candidate):
                case, changed = candidate, True
                break
    return case


def _nearer(case: RunConfig) -> Iterator[RunConfig]:
    replace = msgspec.structs.replace
    for owner, plain in ((case.machine, MachineConfig()), (case.scheme.options, SchemeOptions())):
        for name in owner.__struct_fields__:
            if name == "vcpus" or getattr(owner, name) == getattr(plain, name):
                continue
            nearer = replace(owner, **{name: getattr(plain, name)})
            if isinstance(nearer, MachineConfig):
                yield replace(case, machine=nearer)
            else:
                yield replace(case, scheme=replace(case.scheme, options=nearer))
    for vcpus in (1, 2, 3, 4):
        if vcpus < case.machine.vcpus:
            yield replace(case, machine=replace(case.machine, vcpus=vcpus))
    if case.seed:
        yield replace(case, seed=0)


@dataclass
class Campaign:
    """Draws run one after another until a deadline; what fails is kept with its token.

    Args:
        seconds: Of wall time; the run that is on at the end is finished.
        twice_each: Of so many draws one is run twice.
        on_run: Told the number of a draw, the draw and its complaint.
    """

    seconds: float
    twice_each: int = 8
    on_run: Callable[[int, RunConfig, str | None], None] | None = None

    def __post_init__(self) -> None:
        self.n_runs = 0
        self.failures: list[tuple[RunConfig, str]] = []

    def run(self, first: int) -> None:
        """Run the draws from number `first` on."""
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            self._visit(drawn(first + self.n_runs))

    def _visit(self, case: RunConfig) -> None:
        self.n_runs += 1
        wrong = complaint(case, twice=self.n_runs % self.twice_each == 0)
        if wrong:
            self.failures.append((case, wrong))
        if self.on_run:
            self.on_run(self.n_runs, case, wrong)

    def report(self) -> str:
        """Return each failure as the file that replays it and what was wrong."""
        parts = [f"{token(case)}\n# {wrong}" for case, wrong in self.failures]
        return f"{len(parts)} of {self.n_runs} failed\n\n" + "\n\n".join(parts)
