"""What happens to whom when a handler fails: policies, decided without waiting.

A supervisor has members, in the order of their start: actors, or other supervisors. When a member
fails, its strategy names who restarts (`ONE`: it alone; `ALL`: every member; `REST`: it and those
started after it), after a delay that grows from restart to restart. A supervisor that has mended
`max_restarts` failures within `within` seconds does not mend the next: it fails as a member of its
parent, the uppermost ends the system with the exception; or, by `END`, its concerned members end.

The cells do what is decided here (`cell.py`), their tasks do the waiting.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

C = TypeVar("C")


class Strategy(enum.Enum):
    """Who restarts when a member fails."""

    ONE = "one"
    ALL = "all"
    REST = "rest"


class Exhausted(enum.Enum):
    """What a supervisor does about one failure too many."""

    ESCALATE = "escalate"
    END = "end"


@dataclass(frozen=True)
class RestartPolicy:
    """How a supervisor mends.

    Attributes:
        strategy: Who restarts.
        max_restarts: How many failures are mended `within` so many seconds.
        first_delay: Seconds before the first restart in that time; each further one takes `factor`
            times as long, but `longest_delay` at most.
        exhausted: What comes of one failure more.
    """

    strategy: Strategy = Strategy.ONE
    max_restarts: int = 3
    within: float = 5.0
    first_delay: float = 0.0
    factor: float = 2.0
    longest_delay: float = 30.0
    exhausted: Exhausted = Exhausted.ESCALATE

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}, must not be negative")
        if not (self.within > 0 and self.first_delay >= 0 and self.longest_delay >= 0):
            raise ValueError("within must be positive, and delays must not be negative")
        if not self.factor >= 1:
            raise ValueError(f"factor is {self.factor}, must be at least 1")


DEFAULT_POLICY: Final = RestartPolicy()


@dataclass(frozen=True, eq=False)
class Recovery(Generic[C]):
    """A restart that has been decided and waits for its time.

    Attributes:
        leader: Whose task waits and then restarts all; it is one of `members`.
        delay: Seconds to wait.
        members: Who restarts, in the order of their start.
    """

    leader: C
    delay: float
    members: tuple[C, ...]


@dataclass(frozen=True)
class Dismissal(Generic[C]):
    """These members end, the others go on."""

    members: tuple[C, ...]


class Group(Generic[C]):
    """The members of one supervisor, and what it has mended lately. Knows cells by identity only.

    Invariant: every failure noted in `_mended` is less than `within` seconds older than the latest.
    """

    def __init__(self, policy: RestartPolicy, parent: Group[C] | None) -> None:
        self.policy = policy
        self._parent = parent
        self._members: list[C | Group[C]] = []
        self._mended: deque[float] = deque()
        if parent is not None:
            parent._members.append(self)

    def add(self, cell: C) -> None:
        self._members.append(cell)

    def remove(self, cell: C) -> None:
        self._members.remove(cell)

    def cells(self) -> list[C]:
        """Return all below, in the order of their start."""
        return _flat(self._members)

    def decide(self, cell: C, now: float) -> Recovery[C] | Dismissal[C] | None:
        """Decide what a failure of `cell`, a member, leads to; None: to the end of the system."""
        return self._decide(cell, cell, now)

    def _decide(
        self, member: C | Group[C], leader: C, now: float
    ) -> Recovery[C] | Dismissal[C] | None:
        policy = self.policy
        concerned = _flat(self._concerned(member))
        while self._mended and self._mended[0] <= now - policy.within:
            self._mended.popleft()
        if len(self._mended) < policy.max_restarts:
            delay = policy.first_delay
            for _ in self._mended:
                delay = min(delay * policy.factor, policy.longest_delay)
            self._mended.append(now)
            return Recovery(leader, min(delay, policy.longest_delay), tuple(concerned))
        if policy.exhausted is Exhausted.END:
            return Dismissal(tuple(concerned))
        return None if self._parent is None else self._parent._decide(self, leader, now)

    def _concerned(self, member: C | Group[C]) -> list[C | Group[C]]:
        if self.policy.strategy is Strategy.ONE:
            return [member]
        if self.policy.strategy is Strategy.ALL:
            return self._members
        return self._members[self._members.index(member) :]


def _flat(members: Sequence[C | Group[C]]) -> list[C]:
    flat: list[C] = []
    for member in members:
        flat += member.cells() if isinstance(member, Group) else [member]
    return flat
