"""What is in a recording, as plain values for `trace info`."""

from __future__ import annotations

from typing import Any

import numpy as np

from penumbra.guest.traces.recording import RecordedProcess, Recording
from penumbra.hw.streams import COUNT_SHIFT, FETCH, MAX_COUNT, WRITE

PAGE_BYTES = 4096
LEAST_RAM_BYTES = 64 << 20


def info(recording: Recording) -> dict[str, Any]:
    """Summarise a recording; the result holds only str, int, bool, list and dict."""
    peak_bytes = recording.peak_pages * PAGE_BYTES
    return {
        "bits": recording.bits,
        "provenance": recording.provenance,
        "processes": recording.n_processes,
        "references": recording.n_references,
        "runs": recording.n_runs,
        "pages": recording.n_pages,
        "calls": recording.calls_by_name,
        "peak_pages": recording.peak_pages,
        "peak_bytes": peak_bytes,
        "guest_ram_bytes": default_ram_bytes(recording),
        "by_process": [_process_info(process) for process in recording.processes],
    }


def default_ram_bytes(recording: Recording) -> int:
    """Return the guest RAM a replay gets unless told: half as much again as can be resident."""
    return max(LEAST_RAM_BYTES, recording.peak_pages * PAGE_BYTES * 3 // 2)


def _process_info(process: RecordedProcess) -> dict[str, Any]:
    kinds = process.stream.runs & 3
    counts = (process.stream.runs >> COUNT_SHIFT) & MAX_COUNT
    return {
        "index": process.index,
        "parent": process.parent,
        "starts_at_exec": process.starts_at_exec,
        "references": process.stream.n_references,
        "fetches": int(counts[kinds == FETCH].sum()),
        "runs": len(process.stream.runs),
        "write_runs": int(np.count_nonzero(kinds == WRITE)),
        "pages": len(process.stream.pages),
        "image_pages": sum(region.n_pages for region in process.image),
        "calls": len(process.calls),
    }
