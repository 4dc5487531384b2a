"""The litmus runner: one test, one scheme, every order of its operations.

Each order is a run of a whole machine, with the drivers and the hardware of any other run; only the
chooser differs. A barrier belongs to the schedule: `AtBarriers` keeps a CPU that waits at one from
being chosen. A test fails if an outcome is none that the architecture permits, or if the checker
objects on the way; an outcome that is permitted and not reached is reported only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from penumbra.actors.check import Oracle
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.observer import Taps
from penumbra.actors.runtime import Candidate, Chooser, Listed, ScheduleMismatch, SeededDraw
from penumbra.actors.runtime import Orders as AllOrders
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.litmus import Interleaving, LitmusGuest, LitmusTest, Outcome, image_of
from penumbra.guest.litmus.barriers import Orders
from penumbra.hw.costs import CostProfile
from penumbra.hw.memory import Ram

Schedule = tuple[int, ...]


class Hardware(Enum):
    """What real processors do differently and the architecture leaves open."""

    USUAL = ""
    SPURIOUS = "faults by a cached entry's rights without a new walk"
    TAGGED = "tags entries by logical CPU, so that siblings share none"


@dataclass(frozen=True)
class Way:
    """How an outcome is reached: the CPU of each operation, in order, and on which hardware."""

    schedule: Schedule
    hardware: Hardware = Hardware.USUAL


Build = Callable[..., Machine]
MAX_SCHEDULES = 3_500  # two programs of seven operations without a barrier have 3432
_SHADOW_PAGES, _MAX_PROGRESS = 64, 10_000
_COSTS = CostProfile()


@dataclass(frozen=True)
class Plan:
    """Which orders of a test are run.

    Attributes:
        n_random: So many orders drawn with `seed`; 0: all of them.
        bound: The most that are run of a test if all are asked for; of more, so many are drawn.
    """

    n_random: int = 0
    seed: int = 0
    bound: int = MAX_SCHEDULES


@dataclass
class Finding:
    """What one test showed under one scheme.

    Attributes:
        outcomes: Each outcome seen, with the first way that led to it.
        n_orders: How many orders the test has; None: too many to count.
        cut: All orders were asked for and not all were run.
        objections: What the checker said, with the way to it; the first only.
    """

    test: LitmusTest
    scheme: str
    n_orders: int | None
    cut: bool = False
    n_runs: int = 0
    outcomes: dict[Outcome, Way] = field(default_factory=dict)
    objections: list[tuple[Way, str]] = field(default_factory=list)

    @property
    def wrong(self) -> dict[Outcome, Way]:
        """Outcomes that the architecture does not permit."""
        permitted = {*self.test.allowed, *self.test.allowed_extra}
        return {seen: way for seen, way in self.outcomes.items() if seen not in permitted}

    @property
    def passed(self) -> bool:
        return not self.wrong and not self.objections

    @property
    def stale(self) -> dict[Outcome, bool]:
        """Outcomes only a TLB gives, and whether they were reached."""
        only = sorted(set(self.test.sticky) - set(self.test.flat))
        return {outcome: outcome in self.outcomes for outcome in only}

    @property
    def speculative(self) -> list[Outcome]:
        """Permitted outcomes that need speculation, which this hardware does not have."""
        if self.test.allowed_nospec is None:
            return []
        usual = {*self.test.allowed_nospec, *self.test.allowed_extra, *self.wrong}
        return sorted(set(self.outcomes) - usual)


class AtBarriers:
    """Choose among those CPUs that have an operation to do and wait at no barrier.

    Invariant: `schedule` holds the CPU of each operation done so far.
    """

    def __init__(self, interleaving: Interleaving, chooser: Chooser) -> None:
        self._interleaving = interleaving
        self._chooser = chooser
        self.schedule: list[int] = []

    def choose(self, candidates: Sequence[Candidate]) -> int:
        ready = [one for one in candidates if self._interleaving.can_run(one[0])]
        if not ready:
            return candidates[0][0]  # every program is at its end: it halts
        chosen = self._chooser.choose(ready)
        self.schedule.append(chosen)
        return chosen


class Drawn:
    """Draw an order: each is as likely as any other, if they can be counted."""

    def __init__(self, orders: Orders, interleaving: Interleaving, draw: SeededDraw) -> None:
        self._orders = orders
        self._interleaving = interleaving
        self._draw = draw

    def choose(self, candidates: Sequence[Candidate]) -> int:
        if not self._orders.countable:
            return candidates[self._draw.below(len(candidates))][0]
        at = tuple(self._interleaving.at)
        drawn = self._draw.below(self._orders.left(at))
        for cpu, _ in candidates:
            drawn -= self._orders.after(at, cpu)
            if drawn < 0:
                return cpu
        raise AssertionError("the orders left are those of the candidates")


class LitmusRunner:
    """Runs one test under one scheme, machine after machine.

    Args:
        check: Let the checker watch every run.
        build: Makes a machine; a test's own may make a broken one.
    """

    def __init__(
        self, test: LitmusTest, scheme: Scheme, *, check: bool = True, build: Build = Machine
    ) -> None:
        self._test = test
        self._check = check
        self._build = build
        self._image = image_of(test)
        # A small shadow: a machine is made for each order.
        options = msgspec.structs.replace(scheme.options, shadow_pages=_SHADOW_PAGES)
        self._scheme = msgspec.structs.replace(scheme, options=options)
        self.orders = Orders(test.steps)
        # More entries than the test can fill, in one set: nothing is ever evicted.
        entries = 4 + sum(map(len, test.programs))
        self._config = MachineConfig(
            vcpus=len(test.programs), paging="ia32", tlb_entries=entries, tlb_ways=entries,
            psc_slots=8, quantum=1, max_progress=_MAX_PROGRESS,
        )  # fmt: skip

    async def explore(self, plan: Plan) -> Finding:
        """Run the orders of a plan.

        Where not all stale outcomes were reached and the hardware could do otherwise, the orders
        are run once more on hardware that does.
        """
        finding = Finding(self._test, self._scheme.name, self.orders.total)
        n_orders = finding.n_orders
        finding.cut = not plan.n_random and (n_orders is None or n_orders > plan.bound)
        for hardware in self._hardware():
            if hardware is Hardware.USUAL or not all(finding.stale.values()):
                for make_chooser in self._choosers(plan, finding.cut):
                    await self._run(finding, make_chooser, hardware)
        return finding

    def _hardware(self) -> list[Hardware]:
        """Return the kinds of hardware on which this test may end differently."""
        if self._scheme.shadow not in ("none", "nested"):
            return [Hardware.USUAL]  # a monitor hides such faults, and its siblings share no root
        tagged = [Hardware.TAGGED] if self._test.smt_siblings else []
        return [Hardware.USUAL, Hardware.SPURIOUS, *tagged]

    async def replay(self, schedule: Sequence[int], hardware: Hardware = Hardware.USUAL) -> Finding:
        """Run one listed order.

        Raises:
            ScheduleMismatch: The test has no such order.
        """
        way = Interleaving(self._test.steps)
        for step, cpu in enumerate((*schedule, None)):
            if cpu is None and not way.ready():
                break
            if cpu is None or not way.can_run(cpu):
                raise ScheduleMismatch(step, cpu, tuple(way.ready()))
            way.did(cpu)
        finding = Finding(self._test, self._scheme.name, self.orders.total)
        await self._run(finding, lambda _: Listed(schedule), hardware)
        return finding

    def _choosers(self, plan: Plan, cut: bool) -> Iterator[Callable[[Interleaving], Chooser]]:
        if not plan.n_random and not cut:
            for chooser in AllOrders():
                yield lambda _, chooser=chooser: chooser  # type: ignore[misc]
            return
        draw = SeededDraw(plan.seed)
        for _ in range(plan.n_random or plan.bound):
            yield lambda interleaving: Drawn(self.orders, interleaving, draw)

    async def _run(
        self,
        finding: Finding,
        make_chooser: Callable[[Interleaving], Chooser],
        hardware: Hardware,
    ) -> None:
        guest = LitmusGuest(self._test, self._image)
        chooser = AtBarriers(guest.interleaving, make_chooser(guest.interleaving))
        spurious = hardware is Hardware.SPURIOUS
        siblings = () if hardware is Hardware.TAGGED else self._test.smt_siblings
        config = msgspec.structs.replace(self._config, spurious_faults=spurious)
        oracles: list[Oracle] = []

        def make_taps(ram: Ram) -> Taps:
            oracles.append(Oracle(config.spec_name, config.vcpus, ram.bytes, ram.flags))
            return oracles[0]

        machine = self._build(
            config, self._scheme, guest, (), _COSTS, 0, make_taps if self._check else None,
            chooser, siblings,
        )  # fmt: skip
        ended = await machine.run()
        way = Way(tuple(chooser.schedule), hardware)
        finding.n_runs += 1
        if ended != "finished":
            self._object(finding, way, f"the machine ended: {ended}")
            return
        finding.outcomes.setdefault(guest.outcome, way)
        if oracles and not (verdict := oracles[0].verdict()).coherent:
            self._object(finding, way, f"the checker: {verdict.violations[0]}")

    def _object(self, finding: Finding, way: Way, text: str) -> None:
        if not finding.objections:
            finding.objections.append((way, text))
