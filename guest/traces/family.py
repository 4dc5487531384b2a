"""Which process of a recording is whose child, and in which order they were created."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from penumbra.guest.traces.errors import TraceError
from penumbra.guest.traces.syscalls import CallReader

_ADOPTER = 1  # the process that inherits orphans
_PID_LIMIT = 1 << 22


@dataclass
class Member:
    """One process among its kin, by pid.

    Attributes:
        parent: The parent's pid, None for the first process.
        unlogged: Children whose fork the log lacks: what precedes an exec is cut off.
        logged: Children whose fork is in the log, in that order.
    """

    parent: int | None = None
    unlogged: list[int] = field(default_factory=list)
    logged: list[int] = field(default_factory=list)


def family(logs: Mapping[int, CallReader]) -> dict[int, Member]:
    """Connect the logs of one recording; the result is in order of creation.

    A child is known by its parent's call, or, where an exec cut that off, by the parent that its
    own log names, or, where that parent had ended by then, as an orphan of the first process.

    Raises:
        TraceError: A log is missing, or the logs are of more than one recording.
    """
    members = {pid: Member() for pid in logs}
    for pid, log in logs.items():
        for line, child in log.created():
            if child not in members:
                raise log.error(
                    line, f"creates process {child}, whose log is not among those given"
                )
            if members[child].parent is not None or child == pid:
                raise log.error(line, f"creates process {child}, which has another parent")
            members[child].parent = pid
            members[pid].logged.append(child)
    first = _find_first(logs, members)
    for pid in sorted(logs):
        if pid != first and members[pid].parent is None:
            parent = logs[pid].parent_pid
            members[pid].parent = parent if parent in members else first
            members[members[pid].parent or first].unlogged.append(pid)
    ordered = {pid: members[pid] for pid in _creation_order(first, members)}
    for pid in logs:
        if pid not in ordered:
            raise TraceError(logs[pid].file, "whole log", f"process {pid} descends from itself")
    return ordered


def _find_first(logs: Mapping[int, CallReader], members: Mapping[int, Member]) -> int:
    """Find the one process whose parent is not recorded."""
    roots = [
        pid
        for pid, member in members.items()
        if member.parent is None and logs[pid].parent_pid not in members
    ]
    if len(roots) > 1:
        roots = [pid for pid in roots if logs[pid].parent_pid != _ADOPTER] or roots
    if not roots:
        file = next(iter(logs.values())).file
        raise TraceError(file, "whole log", "no log is that of a first process")
    if len(roots) > 1:
        first, second = sorted(roots)[:2]
        raise TraceError(
            logs[second].file,
            "whole log",
            f"process {second} is not related to process {first}: its parent "
            f"{logs[second].parent_pid} has no log among those given",
        )
    return roots[0]


def _creation_order(first: int, members: Mapping[int, Member]) -> Iterator[int]:
    """Yield parents before children and siblings in order; else by pid, which is handed out upward.

    Pids wrap around: those below the first one's are later.
    """
    waiting: list[tuple[int, int, Iterator[int]]] = [(0, first, iter(()))]
    while waiting:
        _, pid, siblings = heapq.heappop(waiting)
        yield pid
        children = iter([*members[pid].unlogged, *members[pid].logged])
        for others in (siblings, children):
            if (following := next(others, None)) is not None:
                heapq.heappush(waiting, ((following - first) % _PID_LIMIT, following, others))
