"""`penumbra paper`: published ratios, and beside each what the model says and how it came to it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penumbra.actors.console.compare import n_workers
from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.execute import INCOHERENT, UNCHECKED, Job, Outcome
from penumbra.actors.console.printing import print_json, program
from penumbra.actors.console.progress import ProgressBars
from penumbra.actors.console.run import how_of, source_of
from penumbra.actors.console.tables import Cell, Grid, Paper
from penumbra.actors.console.workers import run_all
from penumbra.actors.lab.paper import figures as f
from penumbra.actors.lab.paper import table
from penumbra.actors.lab.paper.runs import Columns, Measured, Run
from penumbra.actors.observe import read_columns
from penumbra.actors.vmm.schemes import PRESETS

_PRICES = "list costs"
_STYLES = {f.CALIBRATED: "dim", f.PREDICTED: "bold", f.NONE: "yellow"}


def paper(arguments: argparse.Namespace) -> int:
    """Make every run that the chosen rows need, print, and return the exit code."""
    if arguments.engine is None:
        arguments.engine = "plain"  # the same results, without loading a compiler for short runs
    chosen = _chosen(arguments)
    runs = table.needed(chosen, PRESETS)
    with Tally(len(runs), arguments.quiet) as tally:
        jobs = [_job(run, arguments) for run in runs]
        outcomes = run_all(jobs, n_workers(arguments, len(jobs)), tally) if jobs else []
    measured = {run: _measured(one) for run, one in zip(runs, outcomes, strict=True)}
    cells = [f.cell_of(figure, PRESETS, measured) for figure in chosen]
    problems = [run for run, one in measured.items() if one.problem(run)]
    code = 1 if problems else 0
    if arguments.json:
        print_json(_as_json(chosen, cells, runs, outcomes, arguments.seed) | {"exit_code": code})
    elif arguments.quiet:
        for figure, cell in zip(chosen, cells, strict=True):
            print(f"{figure.row} {figure.what}: published {figure.published}; {cell.text}")
    else:
        _print(chosen, cells, runs, arguments.seed)
    return code


class Tally(ProgressBars):
    """One bar for all runs, which counts those that are done."""

    def __init__(self, n_runs: int, quiet: bool) -> None:
        super().__init__(["runs"], quiet)
        self._n_runs, self._n_done = n_runs, 0

    def start(self, number: int) -> None:
        if not number:
            super().start(0)

    def reach(self, number: int, fraction: float) -> None:
        self.refresh()

    def end(self, number: int, state: str) -> None:
        self._n_done += 1
        super().reach(0, self._n_done / self._n_runs)


def _chosen(arguments: argparse.Namespace) -> list[f.Figure]:
    every = table.figures()
    if arguments.rows is None:
        return every
    wanted = [name.strip().upper() for name in arguments.rows.split(",")]
    unknown = [name for name in wanted if name not in table.SOURCES]
    if unknown:
        cause = f"no row is named {unknown[0]!r} (known: R1 .. R{len(table.SOURCES)})"
        raise UsageError(COMMAND_LINE, f"--rows {arguments.rows}", cause)
    return [figure for figure in every if figure.row in wanted]


def _job(run: Run, arguments: argparse.Namespace) -> Job:
    """Return the job that the run's own command would make."""
    said = argparse.Namespace(
        workload=run.workload, vcpus=run.vcpus, settings=run.all_settings, seed=arguments.seed,
        scheme_files=[],
    )  # fmt: skip
    source = source_of(said).with_scheme(run.scheme, f"--scheme {run.scheme}")
    source.decode()
    return Job(source, how_of(arguments))


def _measured(outcome: Outcome) -> Measured:
    def events() -> Columns:
        return read_columns(Path(outcome.folder))

    checked = None if outcome.verdict == UNCHECKED else outcome.verdict != INCOHERENT
    return Measured(outcome.summary, checked, events)


def _command(run: Run, seed: int | None) -> str:
    words = run.words if seed is None else [*run.words, "--seed", str(seed)]
    return f"{program()} {shlex.join(words)}"


def _made_by(figure: f.Figure, cell: f.Cell, numbers: Mapping[Run, int]) -> list[int]:
    """Return the numbers of the commands that a cell rests on; 0 is the list of prices."""
    if cell.tag == f.CALIBRATED:
        return [0]
    if cell.tag == f.NONE:
        return []
    return sorted({numbers[run] for run in figure.runs if run in numbers})


def _print(
    chosen: Sequence[f.Figure], cells: Sequence[f.Cell], runs: Sequence[Run], seed: int | None
) -> None:
    out = Paper()
    out.line("Published ratios, and what the model says of them", "bold")
    out.line("published: by the source. calibrated: repeats what prices were made from, no result.")
    out.line("predicted: counters of runs x profile. The numbers in brackets are commands, below.")
    out.line()
    numbers = {run: number for number, run in enumerate(runs, 1)}
    grid = Grid("", ["row", "what", "published", "model", "tag", "off", "made by"], left=2)
    grid.last_left = True
    for figure, cell in zip(chosen, cells, strict=True):
        grid.rows.append(_row(figure, cell, _made_by(figure, cell, numbers)))
    out.grid(grid)
    _print_notes(out, chosen)
    out.line()
    out.line("commands", "bold")
    out.line(f"  [0] {program()} {_PRICES}")
    for run, number in numbers.items():
        out.line(f"  [{number}] {_command(run, seed)}")


def _row(figure: f.Figure, cell: f.Cell, made_by: Sequence[int]) -> list[Cell]:
    tag = "-" if cell.tag == f.NONE else cell.tag
    made = f"[{','.join(map(str, made_by))}]" if made_by else ""
    return [
        figure.row, figure.what, figure.published, (cell.text, _STYLES[cell.tag]),
        (tag, _STYLES[cell.tag]), cell.off, made,
    ]  # fmt: skip


def _print_notes(out: Paper, chosen: Sequence[f.Figure]) -> None:
    out.line()
    out.line("sources and remarks", "bold")
    for row, source in table.SOURCES.items():
        figures = [figure for figure in chosen if figure.row == row]
        if figures:
            out.line(f"  {row:<4} {source}")
        for note in dict.fromkeys(figure.note for figure in figures if figure.note):
            out.line(f"       {note}")


def _as_json(
    chosen: Sequence[f.Figure],
    cells: Sequence[f.Cell],
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    seed: int | None,
) -> dict[str, Any]:
    numbers = {run: number for number, run in enumerate(runs, 1)}
    commands: list[dict[str, Any]] = [
        {"number": 0, "command": f"{program()} {_PRICES}", "folder": None}
    ]
    commands += [
        {"number": numbers[run], "command": _command(run, seed), "folder": one.folder}
        for run, one in zip(runs, outcomes, strict=True)
    ]
    rows = [
        {
            "row": figure.row,
            "what": figure.what,
            "source": table.SOURCES[figure.row],
            "published": {"tag": "published", "text": figure.published},
            "model": {"tag": cell.tag, "value": cell.value, "text": cell.text, "off": cell.off},
            "note": figure.note,
            "commands": _made_by(figure, cell, numbers),
        }
        for figure, cell in zip(chosen, cells, strict=True)
    ]
    return {"command": "paper", "rows": rows, "commands": commands}
