"""How results are shown: the table on stdout, the same as JSON."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from harness import Kind, Line, Result, Row, Summary

from penumbra.actors.console.tables import Cell, Grid, Paper

_SIGNS = {True: ("reached", "green"), False: ("NOT REACHED", "red"), None: ("", "")}


def chosen(lines: Sequence[Line], patterns: Sequence[str]) -> list[Line]:
    """Return the lines that match a pattern, and what their summaries are made of."""
    if not patterns:
        return list(lines)
    wanted = {
        line.name
        for line in lines
        for pattern in patterns
        if fnmatch.fnmatchcase(line.name, pattern)
    }
    for line in lines:
        if isinstance(line, Summary) and line.name in wanted:
            wanted |= set(line.of)
    return [line for line in lines if line.name in wanted]


def print_table(paper: Paper, results: Sequence[Result], facts: dict[str, Any]) -> None:
    """Print the results, the facts, and how many rows are within reach."""
    grid = Grid(
        "",
        ["row", "ratio", "quartiles", "reach", "", "us", "yardstick\nus", "what"],
        left=1,
        last_left=True,
    )
    for result in results:
        grid.rows.append(_row(result))
    paper.grid(grid)
    judged = [result for result in results if result.reached is not None]
    paper.line()
    for line in fact_lines(facts):
        paper.line(line)
    n_reached = sum(1 for result in judged if result.reached)
    absent = [result for result in results if result.absent]
    text = f"{n_reached} of {len(judged)} rows with a reach are within it"
    paper.line(text + (f"; {len(absent)} not measured" if absent else ""), "bold")


def fact_lines(facts: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    usable = facts["processors_usable"]
    return [
        f"{facts['processor']}, {usable} of {facts['processors']} processors, {facts['system']}",
        f"{facts['python']}, {packages}",
        f"{facts['pairs']} pairs a row, load {facts['load_before']} to {facts['load_after']}",
    ]


def _row(result: Result) -> list[Cell]:
    line = result.line
    if not result.ratios:
        return [line.name, "-", "", reach_text(line), (result.absent, "yellow"), "", "", line.text]
    low, high = result.quartiles
    scale = 1.0 if isinstance(line, Row) and line.counts else 1e6
    sign = _SIGNS[result.reached]
    if result.reached and line.stretch is not None and _stretched(result):
        sign = ("stretched", "green")
    return [
        line.name,
        f"{number(result.median)}x",
        f"{number(low)}..{number(high)}",
        reach_text(line),
        sign,
        number(result.unit * scale) if result.unit else "",
        number(result.yardstick * scale) if result.yardstick else "",
        line.text,
    ]


def _stretched(result: Result) -> bool:
    stretch = result.line.stretch
    assert stretch is not None
    speed = result.line.kind is Kind.SPEED
    return result.median >= stretch if speed else result.median <= stretch


def reach_text(line: Line) -> str:
    if line.reach is None:
        return ""
    return f"{'≥' if line.kind is Kind.SPEED else '≤'} {line.reach:g}x"


def number(value: float) -> str:
    """Return a ratio with three digits that count."""
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if value >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def as_json(results: Sequence[Result], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the results as a tree of plain values; ratios of all pairs included."""
    return {
        "format": "penumbra-bench-1",
        "machine": facts,
        "rows": [_json_row(result) for result in results],
    }


def _json_row(result: Result) -> dict[str, Any]:
    line = result.line
    row: dict[str, Any] = {
        "name": line.name,
        "text": line.text,
        "better": "more" if line.kind is Kind.SPEED else "less",
        "reach": line.reach,
        "reached": result.reached,
    }
    if not result.ratios:
        return row | {"absent": result.absent}
    low, high = result.quartiles
    row |= {
        "median": _short(result.median),
        "quartiles": [_short(low), _short(high)],
        "range": [_short(min(result.ratios)), _short(max(result.ratios))],
        "pairs": [_short(ratio) for ratio in result.ratios],
    }
    if isinstance(line, Row):
        unit = "count" if line.counts else "seconds"
        row |= {unit: _short(result.unit), f"yardstick_{unit}": _short(result.yardstick)}
    return row


def _short(value: float) -> float:
    return float(f"{value:.4g}")
