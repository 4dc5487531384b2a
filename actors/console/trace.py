"""`penumbra trace`: recordings of real programs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from penumbra.actors.console.errors import UsageError
from penumbra.actors.console.printing import print_json
from penumbra.actors.console.progress import working
from penumbra.actors.console.record import record
from penumbra.actors.console.tables import Grid, Paper, count
from penumbra.actors.console.workloads import shipped_recordings
from penumbra.guest.traces import Recording, TraceError, import_lackey, info, read_recording
from penumbra.guest.traces.container import refuse_existing
from penumbra.hw.compiled import ENGINE_VARIABLE, engine_name

_MIB = 1 << 20


def trace(arguments: argparse.Namespace) -> int:
    """Record a command, import a recording, or say what one holds."""
    try:
        _check_engine()
        if arguments.action == "record":
            _record(arguments)
        elif arguments.action == "import":
            out = Path(arguments.out)
            refuse_existing(out, arguments.force)
            logs = [Path(log) for log in arguments.lackey]
            with working(f"reading {len(logs)} logs", arguments.quiet):
                recording = import_lackey(logs, out, arguments.provenance, arguments.force)
            _report(arguments, out, recording)
        else:
            path = shipped_recordings().get(arguments.file) or Path(arguments.file)
            _report(arguments, path, read_recording(path))
    except TraceError as error:
        raise UsageError(error.file, error.place, error.cause) from None
    except BrokenPipeError:  # of our own output: who read it has enough
        raise
    except OSError as error:
        file = str(error.filename or arguments.action)
        raise UsageError(file, "read", error.strerror or str(error)) from None
    return 0


def _check_engine() -> None:
    try:
        engine_name()
    except ValueError:
        given = os.environ[ENGINE_VARIABLE]
        raise UsageError(
            "environment", ENGINE_VARIABLE, f"{given!r} is neither numba nor plain"
        ) from None


def _record(arguments: argparse.Namespace) -> None:
    words = arguments.words
    if words[0] == "--":  # which argparse leaves there before Python 3.12.5
        del words[0]
    out = Path(arguments.out or f"{Path(words[0]).name}.trace")
    recording, code = record(
        words,
        out,
        provenance=arguments.provenance,
        overwrite=arguments.force,
        keep_logs=arguments.keep_logs and Path(arguments.keep_logs),
        max_mib=arguments.max_mib,
        quiet=arguments.quiet or arguments.json,
    )
    if code and not arguments.json:
        print(f"{words[0]} ended with code {code}; recorded all the same", file=sys.stderr)
    _report(arguments, out, recording)


def _report(arguments: argparse.Namespace, path: Path, recording: Recording) -> None:
    facts = info(recording)
    if arguments.json:
        print_json({"file": str(path), **facts})
    elif arguments.quiet:
        print(f"{path}: {facts['processes']} processes, {facts['references']} references")
    else:
        _print(path, facts)
    sys.stdout.flush()


def _print(path: Path, facts: dict[str, Any]) -> None:
    paper = Paper()
    paper.line(str(path), "bold")
    calls = ", ".join(f"{name} {n:,}" for name, n in facts["calls"].items())
    lines = {
        "recorded": facts["provenance"] or "not said",
        "processes": f"{facts['processes']:,} of {facts['bits']} bits",
        "references": f"{facts['references']:,} in {facts['runs']:,} page runs",
        "pages": f"{facts['pages']:,} touched, counted per process; "
        f"at most {facts['peak_pages']:,} at once",
        "calls": calls or "none",
        "guest RAM": f"{facts['guest_ram_bytes'] // _MIB} MiB unless machine.ram_mib says more",
    }
    for name, text in lines.items():
        paper.line(f"{name:11}{text}")
    grid = Grid(
        "",
        ["process", "parent", "starts at", "references", "fetches", "runs", "writing",
         "pages", "image", "calls"],
        left=3,
    )  # fmt: skip
    for process in facts["by_process"]:
        numbers = [
            count(process[key])
            for key in ("references", "fetches", "runs", "write_runs", "pages", "image_pages",
                        "calls")
        ]  # fmt: skip
        start = "exec" if process["starts_at_exec"] else "fork"
        parent = str(process["parent"]) if process["parent"] >= 0 else "-"
        grid.rows.append([str(process["index"]), parent, start, *numbers])
    paper.line()
    paper.grid(grid)
