"""The one timing loop: a row and its yardstick, one right after the other, many times.

A row opens to a *sampler*: each call returns the seconds of the yardstick and of the row for the
same unit of work. Rows of a group take turns, pair by pair, so that a slow minute of the machine
falls on all of them; within a pair the order changes from one to the next. What is reported is the
median of the pairs' ratios with its quartiles, never a time.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum

Side = Callable[[], float]
"""Do the work once; return its seconds per unit."""

Sampler = Callable[[], tuple[float, float]]
"""Return the seconds per unit of the yardstick and of the row."""

Opener = Callable[[], AbstractContextManager[Sampler]]

PAIRS = 9


class Unavailable(Exception):
    """A row cannot be measured here; the text says why, in a few words."""


class Kind(Enum):
    """What the ratio says, and so which way is better."""

    SPEED = "yardstick's time ÷ row's"
    TIME = "row's time ÷ yardstick's"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: `group/row`, matched by the command line's patterns.
        text: What is measured, and against what.
        reach: At least (`SPEED`), or at most (`TIME`); None: shown for orientation.
        stretch: A further reach, named in the table when it is met.
        counts: Both sides are counts, not seconds.
    """

    name: str
    text: str
    kind: Kind
    reach: float | None
    open: Opener
    stretch: float | None = None
    counts: bool = False


@dataclass(frozen=True)
class Summary:
    """A line made of other lines' ratios, pair by pair: their worst, or their median."""

    name: str
    text: str
    kind: Kind
    reach: float | None
    of: tuple[str, ...]
    worst: bool = True
    stretch: float | None = None


Line = Row | Summary


@dataclass
class Result:
    """What a line gave.

    Attributes:
        ratios: One per pair.
        unit: Median seconds per unit of the row; 0.0 for a summary.
        yardstick: The same of what it is held against.
        absent: Why there are no ratios.
    """

    line: Line
    ratios: list[float] = field(default_factory=list)
    unit: float = 0.0
    yardstick: float = 0.0
    absent: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the pairs; with one pair, that one."""
        if len(self.ratios) == 1:
            return self.ratios[0], self.ratios[0]
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def reached(self) -> bool | None:
        """Whether the median is within reach; None if there is none, or nothing was measured."""
        if self.line.reach is None or not self.ratios:
            return None
        if self.line.kind is Kind.SPEED:
            return self.median >= self.line.reach
        return self.median <= self.line.reach


def pair(yardstick: Side, row: Side) -> Sampler:
    """Return a sampler of two sides that alternate which goes first."""
    n_taken = 0

    def sample() -> tuple[float, float]:
        nonlocal n_taken
        n_taken += 1
        if n_taken & 1:
            first = _quiet(yardstick)
            return first, _quiet(row)
        second = _quiet(row)
        return _quiet(yardstick), second

    return sample


def sides(yardstick: Side, row: Side) -> Opener:
    """Return the opener of a row that needs nothing set up."""

    @contextmanager
    def opened() -> Iterator[Sampler]:
        yield pair(yardstick, row)

    return opened


def _quiet(side: Side) -> float:
    gc.collect()
    return side()


def measure(lines: Sequence[Line], n_pairs: int, tell: Callable[[str], None]) -> list[Result]:
    """Measure one group's rows in turn, then sum up; `tell` hears what comes next."""
    results = {line.name: Result(line) for line in lines}
    pairs: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        samplers: dict[str, Sampler] = {}
        for line in lines:
            if isinstance(line, Row):
                tell(f"{line.name}: setting up")
                try:
                    samplers[line.name] = stack.enter_context(line.open())
                except Unavailable as error:
                    results[line.name].absent = str(error)
        for number in range(1, n_pairs + 1):
            for name, sample in samplers.items():
                tell(f"{name}: pair {number} of {n_pairs}")
                pairs.setdefault(name, []).append(sample())
    for name, taken in pairs.items():
        result = results[name]
        speed = result.line.kind is Kind.SPEED
        result.ratios = [base / row if speed else row / base for base, row in taken]
        result.yardstick = statistics.median(base for base, _ in taken)
        result.unit = statistics.median(row for _, row in taken)
    for line in lines:
        if isinstance(line, Summary):
            _sum_up(line, results)
    return list(results.values())


def _sum_up(line: Summary, results: dict[str, Result]) -> None:
    """Fill in a summary: the worst row is the one whose median is worst."""
    parts = [results[name] for name in line.of]
    missing = [part.line.name for part in parts if not part.ratios]
    if missing:
        absent = next(part.absent for part in parts if not part.ratios)
        results[line.name].absent = absent
        return
    if line.worst:
        pick = min if line.kind is Kind.SPEED else max
        results[line.name].ratios = list(pick(parts, key=lambda part: part.median).ratios)
    else:
        columns = zip(*(part.ratios for part in parts), strict=True)
        results[line.name].ratios = [statistics.median(column) for column in columns]
