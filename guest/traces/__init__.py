"""Recordings of real programs: the `.trace` container and the importer of valgrind's lackey logs.

Reading order: `recording` (what a recording is), `container` (the file), then `lackey` with
`logtext` and `scan` (bytes to references; `compiled` is the way to numba), `runs` (references to
runs), `syscalls` and `calls` (printed calls to modelled ones), `family` (who forked whom); `images`
derives what the streams and calls imply.
"""

from penumbra.guest.traces.container import read_recording as read_recording
from penumbra.guest.traces.container import write_recording as write_recording
from penumbra.guest.traces.errors import TraceError as TraceError
from penumbra.guest.traces.lackey import import_lackey as import_lackey
from penumbra.guest.traces.recording import Call as Call
from penumbra.guest.traces.recording import RecordedProcess as RecordedProcess
from penumbra.guest.traces.recording import Recording as Recording
from penumbra.guest.traces.recording import Region as Region
from penumbra.guest.traces.summary import info as info

__all__ = [
    "Call",
    "RecordedProcess",
    "Recording",
    "Region",
    "TraceError",
    "import_lackey",
    "info",
    "read_recording",
    "write_recording",
]
