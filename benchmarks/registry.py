"""Every row there is, group by group; a group is one file."""

from __future__ import annotations

import rows_engine
import rows_exits
import rows_messages
import rows_patches
import rows_processes
import rows_runs
import rows_schemes
import rows_start
from harness import Line

GROUPS: dict[str, tuple[Line, ...]] = {
    "messages": rows_messages.LINES,
    "patches": rows_patches.LINES,
    "processes": rows_processes.LINES,
    "engine": rows_engine.LINES,
    "exits": rows_exits.LINES,
    "schemes": rows_schemes.LINES,
    "runs": rows_runs.LINES,
    "start": rows_start.LINES,
}


def all_lines() -> list[Line]:
    return [line for lines in GROUPS.values() for line in lines]
