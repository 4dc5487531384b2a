"""`penumbra check`: the MMU against files of results that were obtained elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.interrupts import deferred
from penumbra.actors.console.printing import print_json
from penumbra.actors.lab import snapshots
from penumbra.actors.lab.files import FileRefusedError
from penumbra.actors.lab.mmu_cases import MmuCases, describe, read_cases
from penumbra.actors.lab.one_cpu import refusal
from penumbra.actors.vmm.schemes import PRESETS, Scheme

EXPLAINED = 20
_NAMES_PER_LINE = 10


class Result(NamedTuple):
    """What a check found.

    Attributes:
        counts: How much was checked, by what.
        failed: A name per failure, in order.
        explained: For the first failures: name and one line per difference.
    """

    counts: dict[str, int]
    failed: list[str]
    explained: list[tuple[str, Sequence[str]]]


def check(arguments: argparse.Namespace) -> int:
    """Check a file; 0 if all of it passed, 1 if not."""
    path = Path(arguments.file)
    facts: dict[str, Any] = {"check": arguments.action, "file": arguments.file}
    try:
        if arguments.action == "mmu":
            scheme = _scheme(arguments.scheme)
            facts["scheme"] = scheme.name
            result = _mmu(path, scheme)
        else:
            result = _walk(path)
    except FileRefusedError as error:
        raise UsageError(arguments.file, error.place, error.cause) from None
    except MemoryError:
        cause = "this machine has not the memory that it takes"
        raise UsageError(arguments.file, "read", cause) from None
    if arguments.json:
        explained = [{"name": name, "differences": list(why)} for name, why in result.explained]
        print_json(
            facts
            | result.counts
            | {"passed": not result.failed, "failed": result.failed, "explained": explained}
        )
    else:
        _print(facts, result, arguments.quiet)
    return 1 if result.failed else 0


def _scheme(name: str) -> Scheme:
    scheme = PRESETS.get(name)
    if scheme is None:
        known = ", ".join(PRESETS)
        raise UsageError(COMMAND_LINE, "--scheme", f"no scheme {name!r} (known: {known})")
    cause = refusal(scheme)
    if cause:
        raise UsageError(COMMAND_LINE, "--scheme", cause)
    return scheme


def _mmu(path: Path, scheme: Scheme) -> Result:
    cases = read_cases(path)
    with deferred():
        machine = MmuCases(scheme)
    report = machine.run(cases)
    explained: list[tuple[str, Sequence[str]]] = []
    for case, differences in report.failures[:EXPLAINED]:
        explained.append((f"case {case}", [describe(cases[case]), *differences]))
    failed = [f"case {case}" for case, _ in report.failures]
    if report.stray:
        failed.append("memory")
        at = ", ".join(f"{gpa:#x}" for gpa in report.stray)
        explained.append(("memory", [f"changed by no case's own access, at {at}"]))
    return Result({"cases": report.n_cases}, failed, explained)


def _walk(path: Path) -> Result:
    report = snapshots.check_walk(path)
    failed = [f"snapshot {s} CPU {c} address {linear:#x}" for s, c, linear, _ in report.failures]
    explained: list[tuple[str, Sequence[str]]] = [
        (name, [failure.difference])
        for name, failure in zip(failed[:EXPLAINED], report.failures, strict=False)
    ]
    counts = {
        "snapshots": report.n_snapshots,
        "cpus": report.n_cpus,
        "mappings": report.n_leaves,
    }
    return Result(counts, failed, explained)


def _print(facts: dict[str, Any], result: Result, quiet: bool) -> None:
    counts = ", ".join(f"{n:,} {name}" for name, n in result.counts.items())
    under = f" under {facts['scheme']}" if "scheme" in facts else ""
    verdict = f"{len(result.failed):,} FAILED" if result.failed else "all passed"
    if not quiet:
        for name, differences in result.explained:
            print(f"{name}: {'; '.join(differences)}")
        named = {name for name, _ in result.explained}
        rest = [name for name in result.failed if name not in named]
        for first in range(0, len(rest), _NAMES_PER_LINE):
            print(f"failed too: {', '.join(rest[first : first + _NAMES_PER_LINE])}")
    print(f"{facts['file']}: {counts}{under}: {verdict}")
