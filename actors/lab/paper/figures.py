"""A published figure, how the model comes to one of its own, and how far the two are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from penumbra.actors.lab.paper.runs import Measured, Run

Tag = Literal["calibrated", "predicted", "none"]
Unit = Literal["x", "%", "share", "cycles", "reads", "", "verdict"]
Value = float | str
Formula = Callable[[Sequence[Measured]], Value]

CALIBRATED: Final = "calibrated"
PREDICTED: Final = "predicted"
NONE: Final = "none"
_SHOWN: Mapping[Unit, str] = {
    "x": "{:.2f} x", "%": "{:+.1f} %", "cycles": "{:,.0f} cycles", "reads": "{:.2f} reads",
    "share": "{:.0f} %", "": "{:.2f}",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One published number, or range of numbers, and its counterpart.

    Attributes:
        row: Id among the published ratios, R1 .. R15.
        what: What is compared with what.
        published: As the source says it; "-" where it says nothing.
        low, high: The same in `unit`, for the distance; NaN where there is no number.
        tag: Whether the counterpart only repeats what prices were made from.
        runs: What the formula is given, in this order.
        formula: None where the model has no counterpart; `note` then says why.
        note: What has to be known to read the number.
    """

    row: str
    what: str
    published: str
    unit: Unit
    tag: Tag
    runs: tuple[Run, ...] = ()
    formula: Formula | None = None
    low: float = math.nan
    high: float = math.nan
    note: str = ""

    def missing(self, schemes: Container[str]) -> list[str]:
        """Return the schemes that this figure needs and that are not among `schemes`."""
        needed = dict.fromkeys(run.scheme for run in self.runs)
        return [name for name in needed if name not in schemes]


@dataclass(frozen=True)
class Cell:
    """The model's counterpart of a figure.

    Attributes:
        value: The number or word; None where there is none.
        text: As it is printed: with its unit, or why there is nothing.
        off: How far from what is published, in words; empty where that means nothing.
    """

    tag: Tag
    value: Value | None
    text: str
    off: str = ""


def cell_of(figure: Figure, schemes: Container[str], measured: Mapping[Run, Measured]) -> Cell:
    """Return the cell of a figure from the runs it needs."""
    if figure.formula is None:
        return Cell(NONE, None, "not modelled")
    missing = figure.missing(schemes)
    if missing:
        return Cell(NONE, None, f"scheme not built: {', '.join(missing)}")
    given = [measured[run] for run in figure.runs]
    for run, one in zip(figure.runs, given, strict=True):
        problem = one.problem(run)
        if problem:
            return Cell(NONE, None, f"{run.workload} under {run.scheme}: {problem}")
    try:
        value = figure.formula(given)
    except ZeroDivisionError:
        return Cell(NONE, None, "nothing to divide by")
    if isinstance(value, str):
        return Cell(figure.tag, value, value)
    if not math.isfinite(value):
        return Cell(NONE, None, "nothing was counted")
    return Cell(figure.tag, value, shown(value, figure.unit), distance(figure, value))


def shown(value: float, unit: Unit) -> str:
    """Return a number with its unit."""
    return _SHOWN[unit].format(value)


def distance(figure: Figure, value: float) -> str:
    """Say how far a value is from the published number or range, in words."""
    if math.isnan(figure.low):
        return ""
    if figure.low <= value <= figure.high:
        return "within" if figure.low < figure.high else "equal"
    bound = figure.low if value < figure.low else figure.high
    if figure.unit in ("%", "share"):
        return f"{value - bound:+.0f} points"
    return f"{value / bound:.2f} of it" if bound else f"{value:+.2f}"


# -- formulas --------------------------------------------------------------------------------------


def ratio(runs: Sequence[Measured]) -> float:
    """Elapsed cycles of the first run over those of the second."""
    above, below = runs
    return above.elapsed / below.elapsed


def change_percent(runs: Sequence[Measured]) -> float:
    """By how many percent the first run takes longer than the second."""
    return 100 * (ratio(runs) - 1)


def marginal_ratio(n: int) -> Formula:
    """Return: extra cycles of long over short, for two pairs (long, short), one over the other."""

    def formula(runs: Sequence[Measured]) -> float:
        long, short, base_long, base_short = (one.elapsed for one in runs)
        return ((long - short) / n) / ((base_long - base_short) / n)

    return formula


def marginal_difference(n: int) -> Formula:
    """Return: cycles per piece of work, n pieces apart, of the first pair less the second's."""

    def formula(runs: Sequence[Measured]) -> float:
        long, short, base_long, base_short = (one.elapsed for one in runs)
        return ((long - short) - (base_long - base_short)) / n

    return formula


def reads_per_walk(runs: Sequence[Measured]) -> float:
    """Memory references of a hardware walk, on the average, those to a second level included."""
    (run,) = runs
    return (run.count("walk_read") + run.count("second_read")) / run.count("walk")


def invalidation_share(runs: Sequence[Measured]) -> float:
    """Percent of the first run's time that is gone in the second, which invalidates nobody else."""
    whole, without = runs
    return 100 * (1 - without.elapsed / whole.elapsed)


def largest_ratio(runs: Sequence[Measured]) -> float:
    """The largest ratio of neighbours: first over second, third over fourth, ..."""
    return max(_gaps(runs))


def largest_gap_percent(runs: Sequence[Measured]) -> float:
    """By how many percent the worse of two schemes is slower, at most; runs in pairs."""
    return max(100 * (max(gap, 1 / gap) - 1) for gap in _gaps(runs))


def share_without_gap(runs: Sequence[Measured]) -> float:
    """Percent of the pairs whose two runs are within five percent of each other."""
    gaps = _gaps(runs)
    return 100 * sum(max(gap, 1 / gap) <= 1.05 for gap in gaps) / len(gaps)


def _gaps(runs: Sequence[Measured]) -> list[float]:
    return [a.elapsed / b.elapsed for a, b in zip(runs[::2], runs[1::2], strict=True)]
