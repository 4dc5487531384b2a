"""`penumbra litmus FILE.json`: TLB litmus tests under some schemes, and what each showed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import anyio

from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.execute import engine_chosen
from penumbra.actors.console.printing import print_json
from penumbra.actors.console.tables import Grid, Paper, count
from penumbra.actors.lab.litmus import Finding, LitmusRunner, Plan, Way
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.litmus import LitmusError, LitmusTest, Outcome, read_tests
from penumbra.hw.compiled import ENGINE_VARIABLE

SCHEMES = tuple(PRESETS)
_N_EXPLAINED = 20


def litmus(arguments: argparse.Namespace) -> int:
    """Run every test under every scheme asked for; 1 if one shows what it must not."""
    plan = _plan(arguments)
    schemes = _schemes(arguments.scheme)
    try:
        tests = read_tests(Path(arguments.file))
    except LitmusError as error:
        raise UsageError(error.file, error.place, error.cause) from None
    # These machines live for some ten operations: a compiled engine would not earn its start.
    with engine_chosen(None if os.environ.get(ENGINE_VARIABLE) else "plain"):
        findings = anyio.run(_explore, tests, schemes, plan, backend="asyncio")
    if arguments.json:
        print_json(_document(arguments.file, plan, findings))
    else:
        _print(findings, quiet=arguments.quiet)
    return 0 if all(finding.passed for finding in findings) else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    wish, seed = arguments.schedules, arguments.seed or 0
    if wish == "all":
        return Plan(seed=seed)
    if not wish.isascii() or not wish.isdecimal() or not 1 <= int(wish[:10]) <= 10**9:
        raise UsageError(
            COMMAND_LINE, f"--schedules {wish}", "must be 'all' or a number from 1 to a milliard"
        )
    return Plan(n_random=int(wish), seed=seed)


def _schemes(wish: str | None) -> list[str]:
    names: list[str] = list(dict.fromkeys(wish.split(",") if wish is not None else SCHEMES))
    for name in names:
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise UsageError(COMMAND_LINE, f"--scheme {wish}", f"no {name!r} among {known}")
    return names


async def _explore(
    tests: Sequence[LitmusTest], schemes: Sequence[str], plan: Plan
) -> list[Finding]:
    return [
        await LitmusRunner(test, PRESETS[name]).explore(plan) for name in schemes for test in tests
    ]


# ---- on paper ------------------------------------------------------------------------------------


def _print(findings: Sequence[Finding], *, quiet: bool) -> None:
    paper = Paper()
    failed = [finding for finding in findings if not finding.passed]
    if not quiet:
        grid = Grid(
            "litmus tests",
            ["scheme", "passed", "failed", "runs", "cut", "stale reached", "of"],
        )
        for name in dict.fromkeys(finding.scheme for finding in findings):
            grid.rows.append(_row(name, [each for each in findings if each.scheme == name]))
        paper.grid(grid)
        for line in _notes(findings):
            paper.line(_printable(line))
    for number, finding in enumerate(failed):
        explained = number < _N_EXPLAINED and not quiet
        named = f"FAILED {finding.test.id} under {finding.scheme}: {finding.test.title}"
        paper.line(_printable(named))
        for line in _explanation(finding) if explained else ():
            paper.line(_printable(f"  {line}"))
    if quiet and not failed:
        paper.line(f"{len(findings)} passed")


def _printable(line: str) -> str:
    """Return a line without what a file's texts might tell a terminal to do."""
    return "".join(sign if sign.isprintable() else "?" for sign in line)


def _row(name: str, findings: Sequence[Finding]) -> list[str]:
    n_passed = sum(finding.passed for finding in findings)
    stale = [reached for finding in findings for reached in finding.stale.values()]
    return [
        name,
        count(n_passed),
        count(len(findings) - n_passed),
        count(sum(finding.n_runs for finding in findings)),
        count(sum(finding.cut for finding in findings)),
        count(sum(stale)),
        count(len(stale)),
    ]


def _notes(findings: Sequence[Finding]) -> Iterable[str]:
    for name in dict.fromkeys(finding.scheme for finding in findings):
        missed = [
            finding.test.id
            for finding in findings
            if finding.scheme == name and not all(finding.stale.values())
        ]
        if missed:
            yield f"stale outcomes not reached under {name}: {', '.join(missed)}"
    for finding in findings:
        where = f"{finding.test.id} under {finding.scheme}"
        if finding.cut:
            of = "more than can be counted" if finding.n_orders is None else count(finding.n_orders)
            yield f"cut: {where}: {count(finding.n_runs)} random runs; orders: {of}"
        for outcome in finding.speculative:
            yield f"as by speculation: {where}: {_shown(finding.test, outcome)}"


def _explanation(finding: Finding) -> Iterable[str]:
    test = finding.test
    for outcome, way in finding.wrong.items():
        yield f"outcome {_shown(test, outcome)} is not permitted"
        yield from _way(test, way)
    for way, text in finding.objections:
        yield text
        yield from _way(test, way)
    permitted = [*test.allowed, *test.allowed_extra]
    yield f"permitted: {'; '.join(_shown(test, outcome) for outcome in permitted)}"
    if test.sdm or test.rationale:
        yield f"SDM {test.sdm}: {test.rationale}"


def _way(test: LitmusTest, way: Way) -> Iterable[str]:
    """Yield a schedule, and what each CPU did at its turns."""
    on = f", on hardware that {way.hardware.value}" if way.hardware.value else ""
    yield f"schedule {','.join(map(str, way.schedule))}{on}"
    programs = [[step for step in program if "id" not in step.__struct_fields__]
                for program in test.programs]  # fmt: skip
    for cpu in way.schedule:
        if programs[cpu]:
            yield f"  CPU {cpu}  {_step(programs[cpu].pop(0))}"


def _step(step: Any) -> str:
    fields = ((name, getattr(step, name)) for name in step.__struct_fields__)
    words = [
        f"{'as' if name == 'name' else name} {value:#x}"
        if isinstance(value, int) and name != "cpl"
        else f"{'as' if name == 'name' else name} {value}"
        for name, value in fields
        if value != ""
    ]
    return " ".join([str(step.__struct_config__.tag), *words])


def _shown(test: LitmusTest, outcome: Outcome) -> str:
    return " ".join(f"{name}={value}" for name, value in zip(test.observed, outcome, strict=True))


# ---- as JSON -------------------------------------------------------------------------------------


def _document(file: str, plan: Plan, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "file": file,
        "schedules": plan.n_random or "all",
        "seed": plan.seed,
        "passed": sum(finding.passed for finding in findings),
        "failed": sum(not finding.passed for finding in findings),
        "tests": [_record(finding) for finding in findings],
    }


def _record(finding: Finding) -> dict[str, Any]:
    test = finding.test
    return {
        "id": test.id,
        "scheme": finding.scheme,
        "passed": finding.passed,
        "orders": finding.n_orders,
        "runs": finding.n_runs,
        "cut": finding.cut,
        "observed": list(test.observed),
        "outcomes": [
            {"values": list(outcome), **_way_record(finding.outcomes[outcome])}
            for outcome in sorted(finding.outcomes)
        ],
        "allowed": [list(outcome) for outcome in test.allowed],
        "allowed_extra": [list(outcome) for outcome in test.allowed_extra],
        "wrong": [list(outcome) for outcome in sorted(finding.wrong)],
        "speculative": [list(outcome) for outcome in finding.speculative],
        "stale_reached": [list(o) for o, reached in finding.stale.items() if reached],
        "stale_not_reached": [list(o) for o, reached in finding.stale.items() if not reached],
        "objections": [{"text": text, **_way_record(way)} for way, text in finding.objections],
    }


def _way_record(way: Way) -> dict[str, Any]:
    return {"schedule": list(way.schedule), "hardware": way.hardware.name.lower()}
