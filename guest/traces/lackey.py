"""Import programs recorded by valgrind's lackey tool.

Record with one log per process:

    valgrind --tool=lackey --trace-mem=yes --basic-counts=no --trace-syscalls=yes \\
        --trace-children=yes --log-file=LOG.%p PROGRAM ...

A log starts where its process last executed a program, or at its fork where it never did: an exec
cuts off what the same process logged before. Forks in the part cut off are not lost, as each log
names its parent: such a child is taken to have been forked at the start of what is left, and to
start with an image of its own. References beyond the user's address space, which can only have
faulted, are left out. A segment that a 32-bit program attaches through `ipc` counts as part of its
image, and so as private: the address is returned in memory, which a log does not show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penumbra.guest.traces.calls import CallTranslator, World
from penumbra.guest.traces.container import refuse_existing, write_recording
from penumbra.guest.traces.descriptors import Descriptors
from penumbra.guest.traces.errors import TraceError
from penumbra.guest.traces.family import family
from penumbra.guest.traces.images import with_images
from penumbra.guest.traces.logtext import read_blocks
from penumbra.guest.traces.recording import MAX_VPN, Call, RecordedProcess, Recording
from penumbra.guest.traces.runs import RunBuilder
from penumbra.guest.traces.syscalls import CallReader

_SIGKILL = 9  # leaves no word in the log


@dataclass(frozen=True)
class Log:
    """One process's log, read but not yet connected to the others."""

    pid: int
    text: CallReader
    runs: RunBuilder
    highest: int


def import_lackey(
    paths: Iterable[Path], out: Path | None = None, provenance: str = "", overwrite: bool = False
) -> Recording:
    """Read a recording from its logs, one per process, in any order.

    Args:
        paths: All logs of one recording.
        out: Where to write it as a `.trace`; nothing is written when the import fails.
        provenance: What was recorded and how; valgrind's version is added. Nothing of the logs'
            own command lines is kept: they hold paths.
        overwrite: Replace `out` if it exists.

    Raises:
        TraceError: A log cannot be read or used; file, line and cause are named.
    """
    if out is not None:
        refuse_existing(out, overwrite)
    logs: dict[int, Log] = {}
    for path in paths:
        log = _read_log(Path(path))
        if log.pid in logs:
            cause = f"process {log.pid} has another log, {logs[log.pid].text.file}"
            raise TraceError(str(path), "whole log", cause)
        logs[log.pid] = log
    if not logs:
        raise TraceError("(no log)", "arguments", "a recording has at least one log")
    bits = 64 if any(log.highest >= 1 << 32 for log in logs.values()) else 32
    bare = Recording(_processes(logs), bits, _provenance(provenance, logs))
    if (problem := bare.problem()) is not None:
        raise TraceError(next(iter(logs.values())).text.file, "all logs together", problem)
    recording = with_images(bare.processes, bits, bare.provenance)
    if out is not None:
        write_recording(recording, out, overwrite)
    return recording


def _read_log(path: Path) -> Log:
    text, runs, highest, n_references = CallReader(str(path)), RunBuilder(), 0, 0
    limit = np.uint64(MAX_VPN[64] << 12)
    for block in read_blocks(path):
        calls = [
            before
            for line, before, words in block.others
            if text.feed(line, n_references + before, words)
        ]
        kind, address, size = block.kind, block.address, block.size
        fits = address <= limit - size.astype(np.uint64)
        if not fits.all():
            n_fit = np.concatenate(([0], np.cumsum(fits)))
            calls = n_fit[calls].tolist()
            kind, address, size = kind[fits], address[fits], size[fits]
        runs.add(kind, address, size, calls)
        highest = max(highest, int(address.max(initial=0)))
        n_references += len(fits)
    if text.pid is None:
        raise TraceError(str(path), "whole log", "empty: no line of it names its process")
    return Log(text.pid, text, runs, highest)


def _processes(logs: dict[int, Log]) -> tuple[RecordedProcess, ...]:
    members = family({pid: log.text for pid, log in logs.items()})
    world = World({pid: index for index, pid in enumerate(members)})
    inherited: dict[int, Descriptors] = {}
    processes: list[RecordedProcess] = []
    for index, (pid, member) in enumerate(members.items()):
        log = logs[pid]
        parent = -1 if member.parent is None else world.index[member.parent]
        starts_at_exec = not log.text.starts_at_fork or index not in inherited
        descriptors = Descriptors(index) if starts_at_exec else inherited[index]
        children = {world.index[child] for child in (*member.unlogged, *member.logged)}
        translator = CallTranslator(log.text, world, descriptors, children)
        stream, places = log.runs.finish(index + 1)
        unlogged = [world.index[child] for child in member.unlogged]
        calls = translator.translate(places, [Call(0, "fork", (n,), n) for n in unlogged])
        inherited.update(translator.forked)
        calls += _end(calls, len(stream.runs), log.text.signal)
        processes.append(RecordedProcess(index, parent, starts_at_exec, stream, calls))
    return tuple(processes)


def _end(calls: tuple[Call, ...], n_runs: int, signal: int | None) -> tuple[Call, ...]:
    """Return the exit that a log lacks: of a killed process, or of one that went on unrecorded."""
    last = calls[-1].name if calls else ""
    if last == "exit":
        return ()
    code = 0 if last == "exec" else 128 + (signal or _SIGKILL)
    return (Call(n_runs, "exit", (code,)),)


def _provenance(given: str, logs: dict[int, Log]) -> str:
    versions = sorted({log.text.version for log in logs.values() if log.text.version})
    tool = f"valgrind {', '.join(versions)} lackey" if versions else "valgrind lackey"
    return f"{given} [{tool}]" if given else tool
