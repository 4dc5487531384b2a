"""Which interleavings of the programs there are: every order in which barriers let CPUs go on.

A barrier is passed when every CPU whose program has that id has come to it; the n-th time an id
stands in a program it meets the n-th of the others. Coming to a barrier and passing it is no step:
only operations are, so no two orders differ in barriers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import TypeAlias

_MAX_POINTS = 20_000

Step: TypeAlias = str | None
"""The id of a barrier, or None: an operation."""


class Interleaving:
    """How far each CPU of a test has come.

    Invariant: no CPU stands at a barrier that it could pass.
    """

    def __init__(self, programs: Sequence[Sequence[Step]]) -> None:
        self._programs = programs
        self._ids = [Counter(step for step in program if step is not None) for program in programs]
        self._passed: list[Counter[str]] = [Counter() for _ in programs]
        self.at = [0] * len(programs)
        self._pass_barriers()

    def can_run(self, cpu: int) -> bool:
        """Tell whether a CPU has an operation to do and no barrier before it."""
        return self.at[cpu] < len(self._programs[cpu]) and self._barrier(cpu) is None

    def ready(self) -> list[int]:
        """Return the CPUs of which any may be next."""
        return [cpu for cpu in range(len(self.at)) if self.can_run(cpu)]

    def did(self, cpu: int) -> None:
        """Note that a CPU has done its next operation."""
        assert self.can_run(cpu)
        self.at[cpu] += 1
        self._pass_barriers()

    @property
    def waiting(self) -> list[str]:
        """Return the barriers at which CPUs wait."""
        barriers = (self._barrier(cpu) for cpu in range(len(self.at)))
        return sorted({barrier for barrier in barriers if barrier is not None})

    def _barrier(self, cpu: int) -> Step:
        program, at = self._programs[cpu], self.at[cpu]
        return program[at] if at < len(program) else None

    def _pass_barriers(self) -> None:
        while passable := [barrier for barrier in self.waiting if self._all_there(barrier)]:
            for cpu in range(len(self.at)):
                if self._barrier(cpu) == passable[0]:
                    self.at[cpu] += 1
                    self._passed[cpu][passable[0]] += 1

    def _all_there(self, barrier: str) -> bool:
        """Tell whether all are there who have this barrier more often than it was passed."""
        n_passed = max(passed[barrier] for passed in self._passed)
        return all(
            self._barrier(cpu) == barrier
            for cpu, ids in enumerate(self._ids)
            if ids[barrier] > n_passed
        )

    def check(self) -> None:
        assert not any(self._all_there(barrier) for barrier in self.waiting)


def deadlock(programs: Sequence[Sequence[Step]]) -> list[str]:
    """Return the barriers at which every order of the programs ends before their end, if any."""
    way = Interleaving(programs)
    while ready := way.ready():
        way.did(ready[0])
    return way.waiting


class Orders:
    """Counts the orders there are, from the start or from any point on."""

    def __init__(self, programs: Sequence[Sequence[Step]]) -> None:
        self._programs = programs
        self._cached = cache(self._left)
        self.countable = prod(len(program) + 1 for program in programs) <= _MAX_POINTS

    def left(self, at: Sequence[int]) -> int:
        """Return how many orders are left at a point; only if `countable`."""
        return self._cached(tuple(at))

    @property
    def total(self) -> int | None:
        """How many orders there are; None: more than are worth counting."""
        return self.left(Interleaving(self._programs).at) if self.countable else None

    def after(self, at: Sequence[int], cpu: int) -> int:
        """Return how many orders are left if `cpu` is next at this point."""
        way = self._at(at)
        way.did(cpu)
        return self.left(way.at)

    def _left(self, at: tuple[int, ...]) -> int:
        ready = self._at(at).ready()
        return sum(self.after(at, cpu) for cpu in ready) if ready else 1

    def _at(self, at: Sequence[int]) -> Interleaving:
        """Return an interleaving that has come so far, by whatever order."""
        way = Interleaving(self._programs)
        while list(at) != way.at:
            way.did(next(cpu for cpu in way.ready() if way.at[cpu] < at[cpu]))
        return way
