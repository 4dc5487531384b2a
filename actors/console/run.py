"""`penumbra run`: one workload under one scheme."""

from __future__ import annotations

import argparse
from pathlib import Path

from penumbra.actors.console import views
from penumbra.actors.console.compositions import take_schemes
from penumbra.actors.console.config import Source, apply_settings
from penumbra.actors.console.execute import How, Job, Outcome
from penumbra.actors.console.printing import print_json
from penumbra.actors.console.progress import ProgressBars
from penumbra.actors.console.tables import Paper
from penumbra.actors.console.workers import run_all
from penumbra.actors.console.workloads import find_source


def run(arguments: argparse.Namespace) -> int:
    """Run, print, and return the exit code."""
    source = source_of(arguments)
    if arguments.scheme is not None:
        source = source.with_scheme(arguments.scheme, f"--scheme {arguments.scheme}")
    job = Job(source, how_of(arguments))
    with ProgressBars([source.decode().scheme.name], arguments.quiet) as bars:
        [outcome] = run_all([job], 1, bars)
    code = 0 if outcome.passes(arguments.hazards) else 1
    if arguments.json:
        print_json({"command": "run", "exit_code": code, **outcome.as_json()})
    elif arguments.quiet:
        print(verdict_line(outcome))
    else:
        _print(outcome)
    return code


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the configuration that the command line describes."""
    source = find_source(arguments.workload)
    take_schemes(source, arguments.scheme_files)
    if arguments.seed is not None:
        source.set("seed", arguments.seed, f"--seed {arguments.seed}")
    if arguments.vcpus is not None:
        source.set("machine.vcpus", arguments.vcpus, f"--vcpus {arguments.vcpus}")
    apply_settings(source, arguments.settings)
    return source


def how_of(arguments: argparse.Namespace) -> How:
    """Return how the command line wants it run."""
    return How(Path(arguments.runs), arguments.engine, arguments.loop, arguments.check)


def verdict_line(outcome: Outcome) -> str:
    """Return the one line that `--quiet` prints."""
    ended = outcome.summary["ended"]
    notes = [] if ended == "finished" else [ended]
    if outcome.wrong:
        notes.append(views.wrong_values(outcome))
    if outcome.n_hazards:
        notes.append(views.hazards(outcome))
    return "; ".join([f"{outcome.scheme}: {outcome.verdict}", *notes])


def _print(outcome: Outcome) -> None:
    paper = Paper()
    views.heading(paper, [outcome])
    views.schemes(paper, [outcome], outcome)
    paper.line()
    views.verdicts(paper, [outcome])
    views.exits(paper, [outcome])
    views.heat_map(paper, outcome)
    views.folders(paper, [outcome])
