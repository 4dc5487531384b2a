"""Who runs next: the only place where a choice between runnable candidates is made.

A candidate is a pair of integers: an id, given in order of creation, and a key, usually how far it
has come. The conductor hands the baton to one of them; how it chooses is a `Chooser`:

- `LowestKey(seed)`: who is furthest behind; ties are drawn from the seed.
- `Listed(ids)`: as a schedule says, for litmus tests and for replaying.
- each chooser of `Orders()`: all possible orders, one after the other, to exhaust a small scenario.

Choices depend on nothing but the candidates and the chooser: not on the order in which candidates
are named, nor on the event loop, the hash seed or the version of Python. So a run is repeated by
repeating its seed, or by `Listed(conductor.schedule)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

from .errors import ScheduleMismatch

Candidate: TypeAlias = tuple[int, int]

_MASK = (1 << 64) - 1


class Chooser(Protocol):
    """Choose one of some candidates."""

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """Return the id of one of `candidates`: at least one, in order of id, each id once."""
        ...


class Conductor:
    """Ask a chooser, and keep what it chose.

    Attributes:
        schedule: The ids chosen so far, if `record` was asked for; `Listed` replays them.
    """

    def __init__(self, chooser: Chooser, *, record: bool = False) -> None:
        self._choose = chooser.choose
        self._record = record
        self.schedule: list[int] = []

    def next(self, candidates: Iterable[Candidate]) -> int:
        """Return the id of the candidate that runs next.

        Args:
            candidates: Those that can run, at least one, in any order, each id once.
        """
        ordered = sorted(candidates)
        if not ordered:
            raise ValueError("nobody can run: the caller ends the run, by name, before asking")
        chosen = self._choose(ordered)
        if self._record:
            self.schedule.append(chosen)
        return chosen


class LowestKey:
    """Choose the candidate with the lowest key; draw among equals.

    A draw is made only where there is more than one to choose from.
    """

    def __init__(self, seed: int) -> None:
        self._draw = SeededDraw(seed)

    def choose(self, candidates: Sequence[Candidate]) -> int:
        lowest = min(key for _, key in candidates)
        tied = [candidate_id for candidate_id, key in candidates if key == lowest]
        return tied[0] if len(tied) == 1 else tied[self._draw.below(len(tied))]


class Listed:
    """Choose as a list of ids says, one entry per choice.

    Args:
        schedule: The ids, in order.
        then: Who chooses when the list has ended; None: that is an error.
    """

    def __init__(self, schedule: Iterable[int], then: Chooser | None = None) -> None:
        self._schedule = tuple(schedule)
        self._then = then
        self._step = 0

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """Return the next entry.

        Raises:
            ScheduleMismatch: It is not a candidate, or there is none; the same step comes again.
        """
        ids = tuple(candidate_id for candidate_id, _ in candidates)
        if self._step < len(self._schedule):
            wanted = self._schedule[self._step]
            if wanted not in ids:
                raise ScheduleMismatch(self._step, wanted, ids)
            self._step += 1
            return wanted
        if self._then is None:
            raise ScheduleMismatch(self._step, None, ids)
        return self._then.choose(candidates)


class Orders:
    """Go through all orders in which a scenario can run; keys are disregarded.

        for chooser in Orders():
            run_scenario_from_its_start(Conductor(chooser))

    Depth first: each round replays a prefix of the choices of the round before, takes the next
    alternative at its end, and then always the first candidate. Ends when there is no alternative
    left, so the scenario must end in every order, and must offer the same candidates after the same
    choices (checked).
    """

    def __iter__(self) -> Iterator[Replay]:
        prefix: list[Branch] = []
        while True:
            replay = Replay(prefix)
            yield replay
            prefix = replay.taken
            while prefix and prefix[-1].is_last:
                prefix.pop()
            if not prefix:
                return
            prefix[-1] = prefix[-1].following()


class Branch:
    """One choice on the way through `Orders`: which of `ids` was taken."""

    __slots__ = ("ids", "index")

    def __init__(self, ids: tuple[int, ...], index: int) -> None:
        self.ids = ids
        self.index = index

    @property
    def is_last(self) -> bool:
        return self.index == len(self.ids) - 1

    def following(self) -> Branch:
        return Branch(self.ids, self.index + 1)


class Replay:
    """Choose along a prefix, then always the first; remember what there was to choose from."""

    def __init__(self, prefix: Sequence[Branch]) -> None:
        self._prefix = tuple(prefix)
        self.taken: list[Branch] = []

    def choose(self, candidates: Sequence[Candidate]) -> int:
        ids = tuple(candidate_id for candidate_id, _ in candidates)
        step = len(self.taken)
        branch = self._prefix[step] if step < len(self._prefix) else Branch(ids, 0)
        if branch.ids != ids:
            raise ScheduleMismatch(step, branch.ids[branch.index], ids)
        self.taken.append(branch)
        return ids[branch.index]


class SeededDraw:
    """Small integers from a seed: SplitMix64, written out so that no library can change it."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def below(self, bound: int) -> int:
        """Return a number from 0 to `bound` - 1; its bias is below `bound` / 2**64."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
        return (mixed * bound) >> 64
