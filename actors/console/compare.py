"""`penumbra compare`: one workload under several schemes, side by side."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

from penumbra.actors.console import views, wins
from penumbra.actors.console.config import Source
from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.execute import Job, Outcome
from penumbra.actors.console.printing import print_json, program
from penumbra.actors.console.progress import ProgressBars
from penumbra.actors.console.resume import recall
from penumbra.actors.console.run import how_of, source_of, verdict_line
from penumbra.actors.console.tables import Paper
from penumbra.actors.console.workers import run_all
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.hw.costs import CostProfile

_MOST_WORKERS = 2
_MAX_DIFFERING = 10


def compare(arguments: argparse.Namespace) -> int:
    """Run every scheme, print, and return the exit code."""
    source = source_of(arguments)
    names = _scheme_names(arguments, source)
    base_name = arguments.base or names[0]
    if base_name not in names:
        raise UsageError(
            COMMAND_LINE, f"--base {base_name}", f"is none of those compared: {', '.join(names)}"
        )
    jobs = [Job(source.with_scheme(name, "--schemes"), how_of(arguments)) for name in names]
    configs = [job.source.decode() for job in jobs]
    workers = n_workers(arguments, len(jobs))
    with ProgressBars(names, arguments.quiet) as bars:
        outcomes = resume_all(jobs, workers, bars, fresh=arguments.fresh)
    base = outcomes[names.index(base_name)]
    differ = views.memory(outcomes)
    passed = all(outcome.passes(arguments.hazards) for outcome in outcomes)
    code = 0 if passed and not differ else 1
    costs = configs[0].costs
    if arguments.json:
        print_json(_as_json(outcomes, base, differ, code, costs))
    elif arguments.quiet:
        for outcome in outcomes:
            print(verdict_line(outcome))
        if differ:
            print(_memory_line(outcomes, differ))
    else:
        _print(outcomes, base, differ, arguments, costs)
    return code


def resume_all(
    jobs: Sequence[Job],
    n_workers: int | None = None,
    bars: ProgressBars | None = None,
    *,
    fresh: bool = False,
    executor: Executor | None = None,
) -> list[Outcome]:
    """Return the outcomes of all jobs in order, running only those not found complete.

    Args:
        fresh: Run all; what is found complete is then compared with.
        n_workers, bars, executor: As for `run_all`.

    Raises:
        UsageError, Interrupted, WorkerFailed: As `run_all` does.
    """
    bars = bars or ProgressBars([""] * len(jobs), quiet=True)
    found = {} if fresh else {i: one for i, job in enumerate(jobs) if (one := recall(job))}
    for number, outcome in found.items():
        bars.start(number)
        bars.end(number, outcome.verdict)
    missing = [number for number in range(len(jobs)) if number not in found]
    if missing:
        ran = run_all(
            [jobs[number] for number in missing], n_workers, bars.of(missing), executor=executor
        )
        found |= dict(zip(missing, ran, strict=True))
    return [found[number] for number in range(len(jobs))]


def _scheme_names(arguments: argparse.Namespace, source: Source) -> list[str]:
    """Return the schemes to compare: those asked for, else all presets and the file's own."""
    if arguments.schemes is not None:
        names = [name.strip() for name in arguments.schemes.split(",")]
    else:
        own = source.tables.get("scheme", {})
        named = [own["name"]] if isinstance(own, dict) and isinstance(own.get("name"), str) else []
        names = list(dict.fromkeys([*PRESETS, *named, *source.listed]))
    option = f"--schemes {arguments.schemes}"
    if not all(names):
        raise UsageError(COMMAND_LINE, option, "a name is empty")
    if len(set(names)) < len(names):
        raise UsageError(COMMAND_LINE, option, "a scheme is named twice")
    return names


def n_workers(arguments: argparse.Namespace, n_jobs: int) -> int:
    """Return how many processes run `n_jobs` jobs, as `--jobs` asks or else a few."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(COMMAND_LINE, f"--jobs {arguments.jobs}", "must be at least 1")
    return min(n_jobs, arguments.jobs or min(_MOST_WORKERS, os.cpu_count() or 1))


def _as_json(
    outcomes: Sequence[Outcome],
    base: Outcome,
    differ: list[dict[str, Any]],
    code: int,
    costs: CostProfile,
) -> dict[str, Any]:
    cost = base.summary["cost"]
    return {
        "command": "compare",
        "exit_code": code,
        "workload": base.workload,
        "seed": base.summary["seed"],
        "base": base.scheme,
        "wins": wins.as_json(outcomes, costs),
        "memory": {"agree": not differ, "differ": differ},
        "schemes": [
            outcome.as_json() | {"ratio": outcome.summary["cost"] / cost if cost else None}
            for outcome in outcomes
        ],
    }


def _print(
    outcomes: Sequence[Outcome],
    base: Outcome,
    differ: list[dict[str, Any]],
    arguments: argparse.Namespace,
    costs: CostProfile,
) -> None:
    paper = Paper()
    views.heading(paper, outcomes)
    views.schemes(paper, outcomes, base)
    paper.line(f"ratio: cost over that of {base.scheme}; costs are a model's, not a measurement's")
    paper.line()
    views.verdicts(paper, outcomes)
    paper.line(_memory_line(outcomes, differ), "bold red" if differ else "green")
    for process in differ[:_MAX_DIFFERING]:
        paper.line(views.disagreement(process))
    views.exits(paper, outcomes)
    for outcome in outcomes:
        views.heat_map(paper, outcome)
    wins.show(paper, outcomes, costs)
    views.folders(paper, outcomes)
    if n_reused := sum(outcome.reused for outcome in outcomes):
        again = f"{n_reused} of {len(outcomes)} schemes were complete from before and not run again"
        paper.line(f"{again} (--fresh runs all)")
    paper.line()
    paper.line("try next", "bold")
    for command in _next(outcomes, arguments):
        paper.line(f"  {command}")


def _memory_line(outcomes: Sequence[Outcome], differ: list[dict[str, Any]]) -> str:
    n = len(outcomes[0].summary["processes"])
    if not differ:
        return f"memory: agree ({n} processes end with the same pages under every scheme)"
    return f"memory: {len(differ)} of {n} processes end differently"


def _next(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> list[str]:
    """Return three commands that lead on from here, each below a word on why."""
    workload = shlex.quote(arguments.workload)
    small = f"compare {workload} --schemes shootdown,patch --set scheme.options.capacity=1"
    other = "fork-storm" if outcomes[0].workload != "fork-storm" else "shootdown-stress"
    commands = [
        (small, "channels of one patch: they overflow"),
        (f"compare {other} --vcpus 8", "another guest, more VCPUs"),
        (
            "run shootdown-stress --set scheme.options.order=left_unmarked",
            "a mistake in the protocol, and what the checker says of it",
        ),
    ]
    return [line for command, why in commands for line in (f"# {why}", f"{program()} {command}")]
