"""Which scheme wins where, and what makes the difference: from counts and unit costs alone.

Schemes without a monitor (no exits) are left out where others are compared: they do less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from penumbra.actors.console.execute import Outcome
from penumbra.actors.console.tables import Grid, Paper, count
from penumbra.hw.costs import CostProfile

_MOST_CAUSES = 8
_MOST_NAMED = 2
_BY_USERS = ("patch_posted", "patch_coalesced", "resync", "buffered_store")
_MEASURES = {
    "cost": "",
    "exits": "exit",
    "hidden faults": "hidden_fault",
    "guest faults": "guest_fault",
    "patches": "patch_posted",
    "coalesced patches": "patch_coalesced",
    "shootdowns": "shootdown",
    "resyncs": "resync",
    "buffered stores": "buffered_store",
    "IPIs": "ipi",
    "TLB misses": "tlb_miss",
    "walk reads": "walk_read",
}


@dataclass(frozen=True)
class Win:
    """One measure: who has least of it, and who most."""

    measure: str
    best: tuple[str, ...]
    least: int
    worst: tuple[str, ...]
    most: int


@dataclass(frozen=True)
class Cause:
    """One cause of a difference in cost.

    Attributes:
        counts: Of the cheapest, and of the dearest.
        cycles: How many more it costs the dearest; negative: fewer.
    """

    name: str
    counts: tuple[int, int]
    unit: int
    cycles: int


@dataclass(frozen=True)
class Difference:
    """The cheapest and the dearest scheme, and all causes, the greatest first."""

    cheapest: Outcome
    dearest: Outcome
    causes: tuple[Cause, ...]

    @property
    def cycles(self) -> int:
        return int(self.dearest.summary["cost"] - self.cheapest.summary["cost"])


def compared(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return those that have a monitor, or all if no two have."""
    monitored = [outcome for outcome in outcomes if outcome.summary["exits"]]
    return monitored if len(monitored) > 1 else list(outcomes)


def wins(outcomes: Sequence[Outcome]) -> list[Win]:
    """Return every measure in which the compared schemes differ."""
    found = []
    for measure, counter in _MEASURES.items():
        amounts = {outcome.scheme: _amount(outcome, counter) for outcome in compared(outcomes)}
        if counter in _BY_USERS:
            amounts = {scheme: n for scheme, n in amounts.items() if n}
        if len(set(amounts.values())) > 1:
            found.append(_win(measure, amounts))
    return found


def _win(measure: str, amounts: dict[str, int]) -> Win:
    least, most = min(amounts.values()), max(amounts.values())
    best = tuple(scheme for scheme, n in amounts.items() if n == least)
    worst = tuple(scheme for scheme, n in amounts.items() if n == most)
    return Win(measure, best, least, worst, most)


def _amount(outcome: Outcome, counter: str) -> int:
    summary = outcome.summary
    return int(summary["counters"].get(counter, 0) if counter else summary["cost"])


def difference(outcomes: Sequence[Outcome], costs: CostProfile) -> Difference | None:
    """Return what makes the dearest scheme dearer than the cheapest; None if nothing does."""
    ranked = sorted(compared(outcomes), key=lambda outcome: outcome.summary["cost"])
    cheapest, dearest = ranked[0], ranked[-1]
    if cheapest.summary["cost"] == dearest.summary["cost"]:
        return None
    few, many = (_priced(outcome, costs) for outcome in (cheapest, dearest))
    causes = []
    for name in dict.fromkeys((*few, *many)):
        counts = few.get(name, (0, 0))[0], many.get(name, (0, 0))[0]
        unit = (few.get(name) or many[name])[1]
        if counts[0] != counts[1]:
            causes.append(Cause(name, counts, unit, (counts[1] - counts[0]) * unit))
    causes.sort(key=lambda cause: (-abs(cause.cycles), cause.name))
    return Difference(cheapest, dearest, tuple(causes))


def _priced(outcome: Outcome, costs: CostProfile) -> dict[str, tuple[int, int]]:
    """Return count and unit cost of all that costs something; exits by their reasons."""
    units = msgspec.to_builtins(costs)
    del units["source"]
    counters = outcome.summary["counters"]
    priced = {
        name: (counters[name], unit) for name, unit in units.items() if unit and counters.get(name)
    }
    exits = priced.pop("exit", None)
    if exits is not None:
        for reason, n in outcome.summary["exits"].items():
            priced[f"exit: {reason}"] = (n, exits[1])
    return priced


def as_json(outcomes: Sequence[Outcome], costs: CostProfile) -> dict[str, Any]:
    """Return what `--json` prints of this."""
    found = difference(outcomes, costs)
    return {
        "compared": [outcome.scheme for outcome in compared(outcomes)],
        "measures": [msgspec.to_builtins(win) for win in wins(outcomes)],
        "difference": found
        and {
            "cheapest": found.cheapest.scheme,
            "dearest": found.dearest.scheme,
            "cycles": found.cycles,
            "causes": [msgspec.to_builtins(cause) for cause in found.causes],
        },
    }


def show(paper: Paper, outcomes: Sequence[Outcome], costs: CostProfile) -> None:
    """Print which scheme wins where, and why the dearest is dearer than the cheapest."""
    found = wins(outcomes)
    if len(outcomes) < 2 or not found:
        return
    paper.line()
    table = Grid("which wins where, and why", ["measure", "best", "least", "worst", "most"], left=2)
    for win in found:
        row = [win.measure, _named(win.best), count(win.least), _named(win.worst), count(win.most)]
        table.rows.append(row)
    paper.grid(table)
    rest = [outcome.scheme for outcome in outcomes if outcome not in compared(outcomes)]
    if rest:
        paper.line(f"left out, because nothing there exits to a monitor: {', '.join(rest)}")
    why = difference(outcomes, costs)
    if why is not None:
        paper.line()
        _show_difference(paper, why)


def _show_difference(paper: Paper, why: Difference) -> None:
    cheap, dear = why.cheapest, why.dearest
    times = dear.summary["cost"] / cheap.summary["cost"] if cheap.summary["cost"] else 0
    head = ["cause", cheap.scheme, dear.scheme, "unit", "cycles more", "share"]
    table = Grid(
        f"{dear.scheme} costs {times:.2f} times what {cheap.scheme} does:"
        f" {count(why.cycles)} cycles more",
        head,
    )
    for cause in why.causes[:_MOST_CAUSES]:
        table.rows.append(_row(cause.name, *cause.counts, cause.unit, cause.cycles, why.cycles))
    rest = sum(cause.cycles for cause in why.causes[_MOST_CAUSES:])
    if rest:
        table.rows.append(["all others", "", "", "", _signed(rest), f"{rest / why.cycles:.0%}"])
    paper.grid(table)


def _row(name: str, few: int, many: int, unit: int, cycles: int, of: int) -> list[str]:
    share = f"{cycles / of:.0%}"
    return [name, count(few), count(many), count(unit), _signed(cycles), share]


def _signed(n: int) -> str:
    return f"-{count(-n)}" if n < 0 else count(n)


def _named(schemes: tuple[str, ...]) -> str:
    if len(schemes) <= _MOST_NAMED:
        return ", ".join(schemes)
    return f"{schemes[0]} and {len(schemes) - 1} more"
