"""A workload: a program with its access streams, and a hash that says which it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from penumbra.guest.programs.program import Program
from penumbra.guest.programs.recorded import RecordedProgram
from penumbra.guest.traces import read_recording
from penumbra.guest.workloads.registry import WORKLOADS, make_workload
from penumbra.hw.streams import AccessStream


@dataclass(frozen=True)
class Workload:
    """What a machine runs.

    Attributes:
        content_hash: Hex digest of the recording's bytes, or of the name and parameters.
        bits: Address width the program needs: 32, 64, or 0 if it runs on either.
    """

    name: str
    about: str
    content_hash: str
    program: Program
    streams: tuple[AccessStream, ...] = ()
    bits: int = 0
    parameters: dict[str, int] = field(default_factory=dict)


def named_workload(name: str, **parameters: int) -> Workload:
    """Return a coroutine workload by name, defaults for what `parameters` leaves out.

    Raises:
        ValueError: No such workload or parameter.
    """
    program = make_workload(name, **parameters)
    text = json.dumps([name, parameters], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Workload(name, WORKLOADS[name][0], digest, program, (), 0, dict(parameters))


def recorded_workload(path: Path) -> Workload:
    """Return the workload of a recording.

    Raises:
        TraceError: The file is damaged, truncated, of another version, or not there.
    """
    recording = read_recording(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = path.stem
    streams = tuple(process.stream for process in recording.processes)
    about = f"recorded: {recording.provenance.splitlines()[0]}" if recording.provenance else ""
    return Workload(name, about, digest, RecordedProgram(recording, name), streams, recording.bits)
