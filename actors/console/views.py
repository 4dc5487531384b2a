"""How outcomes look: the table of schemes, where exits come from, the channels as a heat map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from penumbra.actors.console.execute import COHERENT, INCOHERENT, Outcome
from penumbra.actors.console.tables import Cell, Grid, Paper, count
from penumbra.actors.console.version import version

_COLUMNS = {
    "exits": "exit",
    "patches": "patch_posted",
    "coalesced": "patch_coalesced",
    "applied": "patch_applied",
    "shoot-\ndowns": "shootdown",
    "IPIs": "ipi",
    "TLB\nmisses": "tlb_miss",
}
_STYLES = {COHERENT: "green", INCOHERENT: "bold red"}
_BLOCKS = "▁▂▃▄▅▆▇█"
# Dark to bright in even steps, also for the colour-blind, with legible text on each.
_HEAT = ("white on #352a87", "white on #0f5cdd", "black on #1eb4ae", "black on #a5be6b",
         "black on #f9fb0e")  # fmt: skip
_WIDE_MATRIX = 8
WIDTH = 120
_MAX_EXPLAINED = 40


def heading(paper: Paper, outcomes: Sequence[Outcome]) -> None:
    """Print what has been run."""
    first = outcomes[0]
    summary = first.summary
    vcpus = f"{summary['vcpus']} VCPU{'s' if summary['vcpus'] != 1 else ''}"
    parts = (
        f"penumbra {version()}", first.workload, f"{vcpus} {summary['paging']}",
        f"seed {summary['seed']}", f"progress {count(summary['progress'])}",
    )  # fmt: skip
    paper.line("  ".join(parts), "bold")
    paper.line()


def schemes(paper: Paper, outcomes: Sequence[Outcome], base: Outcome) -> None:
    """Print the table of schemes, one row each; costs relate to `base`."""
    ended = any(outcome.summary["ended"] != "finished" for outcome in outcomes)
    head = ["scheme", *_COLUMNS, "cost", "ratio", "verdict", *(["ended"] if ended else [])]
    grid = Grid("", head)
    for outcome in outcomes:
        counters, cost = outcome.summary["counters"], outcome.summary["cost"]
        row: list[Cell] = [outcome.scheme]
        row += [count(counters.get(name, 0)) for name in _COLUMNS.values()]
        row += [count(cost), ratio(outcome, base)]
        row.append((outcome.verdict, _STYLES.get(outcome.verdict, "yellow")))
        if ended:
            row.append(outcome.summary["ended"])
        grid.rows.append(row)
    grid.last_left = ended
    paper.grid(grid)


def ratio(outcome: Outcome, base: Outcome) -> str:
    """Return an outcome's cost over that of another."""
    other = base.summary["cost"]
    return f"{outcome.summary['cost'] / other:.2f}" if other else "-"


def verdicts(paper: Paper, outcomes: Sequence[Outcome]) -> None:
    """Print what the checker says of each scheme, and what guests found wrong themselves."""
    width = max(len(outcome.scheme) for outcome in outcomes)
    for outcome in outcomes:
        line = f"{outcome.scheme:{width}}  {outcome.verdict}: {_checked(outcome)}"
        paper.line(line, _STYLES.get(outcome.verdict, ""))
        for line in outcome.explanation[1:_MAX_EXPLAINED]:
            paper.line(f"{'':{width}}  {line}")
        if len(outcome.explanation) > _MAX_EXPLAINED:
            paper.line(f"{'':{width}}  ... all of it is in {outcome.folder}/verdict.json")
        if outcome.n_hazards:
            paper.line(f"{'':{width}}  {hazards(outcome)}", "yellow")
        if outcome.wrong:
            paper.line(f"{'':{width}}  {wrong_values(outcome)}", _STYLES[INCOHERENT])


def _checked(outcome: Outcome) -> str:
    """Say in one line what the checker has looked at."""
    checker = outcome.checker
    if checker is None:
        return "nothing has been checked (--no-check)"
    return (
        f"{count(checker['n_references'])} references and {count(checker['n_faults'])} faults"
        f" checked, {count(checker['n_stale'])} by older translations;"
        f" {count(checker['n_violations'])} violations"
    )


def hazards(outcome: Outcome) -> str:
    """Say how often the guest used what its OS had revoked, and by what kinds of flush."""
    assert outcome.checker is not None
    kinds = sorted({hazard["kind"] for hazard in outcome.checker["hazards"]})
    n = count(outcome.n_hazards)
    return f"hazards of the guest: {n} uses of revoked translations ({', '.join(kinds)} flush)"


def wrong_values(outcome: Outcome) -> str:
    """Say what the guest found wrong in its own memory."""
    _, arguments, text = outcome.wrong[0]
    shown = ", ".join(hex(value) for value in arguments)
    n = len(outcome.wrong)
    return f"wrong values found by the guest: at least {n}; the first: {text} ({shown})"


def exits(paper: Paper, outcomes: Sequence[Outcome]) -> None:
    """Print where exits come from: a row per reason, a column per scheme, most frequent first."""
    with_exits = [outcome for outcome in outcomes if outcome.summary["exits"]]
    if not with_exits:
        return
    reasons: dict[str, int] = {}
    for outcome in with_exits:
        for reason, n in outcome.summary["exits"].items():
            reasons[reason] = reasons.get(reason, 0) + n
    cells = {outcome.scheme: _exit_cells(outcome, reasons) for outcome in with_exits}
    head = "reason"
    rest = list(cells)
    while rest:
        n = _n_fitting(max(map(len, (head, *reasons))), [(name, cells[name]) for name in rest])
        shown, rest = rest[:n], rest[n:]
        grid = Grid("where exits come from", [head, *shown])
        for reason in sorted(reasons, key=lambda name: (-reasons[name], name)):
            grid.rows.append([reason, *(cells[scheme][reason] for scheme in shown)])
        paper.line()
        paper.grid(grid)


def _exit_cells(outcome: Outcome, reasons: Iterable[str]) -> dict[str, str]:
    found = outcome.summary["exits"]
    whole = sum(found.values())
    return {
        reason: f"{count(found[reason])} {found[reason] / whole:4.0%}" if reason in found else "-"
        for reason in reasons
    }


def _n_fitting(first: int, columns: Sequence[tuple[str, dict[str, str]]]) -> int:
    """Return how many columns fit beside a first one of that width; at least one."""
    width = first
    for n, (name, cells) in enumerate(columns):
        width += 2 + max(len(name), *(len(cell) for cell in cells.values()))
        if width > WIDTH and n:
            return n
    return len(columns)


def heat_map(paper: Paper, outcome: Outcome) -> None:
    """Print how full each channel has been, if the scheme has any."""
    matrix: list[list[dict[str, Any]]] = outcome.summary["matrix"]
    if not matrix:
        return
    overflows = sum(channel["n_overflows"] for row in matrix for channel in row)
    prefix, in_all = ("vcpu", " / posted in all") if len(matrix) <= _WIDE_MATRIX else ("", "")
    n = len(matrix[0])
    names = [f"{prefix}{vcpu}" for vcpu in range(n)]
    grid = Grid(
        f"{outcome.scheme}: channels, patches at the fullest{in_all}; "
        f"{outcome.capacity} fit, {count(overflows)} overflows",
        ["from \\ to", *names],
    )
    for i, row in enumerate(matrix):
        name = names[i % n] if len(matrix) == n else f"VM {i // n}, {names[i % n]}"
        grid.rows.append([name, *(_channel(channel, outcome.capacity, n) for channel in row)])
    paper.line()
    paper.grid(grid)


def _channel(channel: dict[str, Any], capacity: int, n: int) -> Cell:
    posted, peak = channel["n_posted"], channel["peak"]
    if not posted:
        return "."
    fill = min(1.0, peak / capacity)
    glyph = _BLOCKS[min(len(_BLOCKS) - 1, int(fill * len(_BLOCKS)))]
    style = _HEAT[min(len(_HEAT) - 1, int(fill * len(_HEAT)))]
    text = f"{glyph}{peak}/{count(posted)}" if n <= _WIDE_MATRIX else f"{glyph}{peak}"
    return text, style


def folders(paper: Paper, outcomes: Sequence[Outcome]) -> None:
    """Print where each run's folder is."""
    paper.line()
    width = max(len(outcome.scheme) for outcome in outcomes)
    for outcome in outcomes:
        again = "  (run before, with the same result)" if outcome.repeats else ""
        again = "  (taken from the folder: run before)" if outcome.reused else again
        paper.line(f"{outcome.scheme:{width}}  {outcome.folder}/{again}")


def memory(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the guest processes that did not end alike, with what each scheme left of them."""
    by_scheme = {
        outcome.scheme: {
            (process.get("vm", 0), process["pid"]): process
            for process in outcome.summary["processes"]
        }
        for outcome in outcomes
    }
    pids = sorted({pid for processes in by_scheme.values() for pid in processes})
    differ = []
    for pid in pids:
        ends = {
            scheme: (processes[pid]["digest"], processes[pid]["ended"]) if pid in processes else ()
            for scheme, processes in by_scheme.items()
        }
        if len(set(ends.values())) > 1:
            name = next(p[pid]["name"] for p in by_scheme.values() if pid in p)
            ended = {scheme: [*end] for scheme, end in ends.items()}
            differ.append({"vm": pid[0], "pid": pid[1], "name": name, "ends": ended})
    return differ


def disagreement(process: dict[str, Any]) -> str:
    """Return one differing process as a line."""
    ends = (
        f"{scheme}: {', '.join(part or '(still running)' for part in end) or 'never started'}"
        for scheme, end in process["ends"].items()
    )
    where = f"VM {process['vm']}, " if process["vm"] else ""
    return f"  {where}process {process['pid']} ({process['name']})  {'; '.join(ends)}"
