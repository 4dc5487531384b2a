"""What `trace info` says, of a small recording and of the shipped one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import penumbra.guest
from penumbra.guest.traces import Call, RecordedProcess, Recording, info, read_recording
from penumbra.guest.traces.images import with_images
from penumbra.guest.traces.summary import default_ram_bytes
from penumbra.hw.streams import FETCH, WRITE, AccessStream, pack_runs

RECORDINGS = Path(next(iter(penumbra.guest.__path__))) / "recordings"
SHIPPED = RECORDINGS / "pipeline.trace"
WORKERS = RECORDINGS / "workers.trace"
STACK_TOP = 0xFF000


@pytest.fixture(scope="module")
def shipped() -> Recording:
    """The recording that comes with the package."""
    return read_recording(SHIPPED)


def test_the_summary_counts_everything_once() -> None:
    runs = pack_runs(
        *(np.array(column, np.int64) for column in ([0, 1], [FETCH, WRITE], [9, 2], [0, 8]))
    )
    stream = AccessStream(np.array([5, 6], np.int64), runs, 1)
    calls = (Call(0, "brk", (0,), 4096), Call(1, "other", (3,)), Call(2, "exit", (0,)))
    recording = with_images([RecordedProcess(0, -1, True, stream, calls)], 32, "a test")
    assert info(recording) == {
        "bits": 32,
        "provenance": "a test",
        "processes": 1,
        "references": 11,
        "runs": 2,
        "pages": 2,
        "calls": {"brk": 1, "exit": 1, "other": 1},
        "peak_pages": 2,
        "peak_bytes": 8192,
        "guest_ram_bytes": 64 << 20,
        "by_process": [
            {
                "index": 0,
                "parent": -1,
                "starts_at_exec": True,
                "references": 11,
                "fetches": 9,
                "runs": 2,
                "write_runs": 1,
                "pages": 2,
                "image_pages": 2,
                "calls": 3,
            }
        ],
    }


def test_the_shipped_recording_is_a_family_that_forks_execs_maps_and_waits(
    shipped: Recording,
) -> None:
    shipped.check()
    summary = info(shipped)
    assert summary["bits"] == 64
    assert summary["processes"] == 11
    assert {"mmap", "munmap", "mprotect", "brk", "fork", "wait", "exit"} <= set(summary["calls"])
    assert summary["calls"]["fork"] == summary["calls"]["wait"] == 10
    copies = [p for p in shipped.processes if not p.starts_at_exec]
    assert 0 < len(copies) < 10
    assert all(p.calls[-1].name == "exit" for p in shipped.processes)
    assert default_ram_bytes(shipped) == 64 << 20


@pytest.mark.shows("G9")
def test_the_other_one_is_of_32_bits_with_its_stacks_near_4_gib() -> None:
    workers = read_recording(WORKERS)
    workers.check()
    summary = info(workers)
    assert (summary["bits"], summary["processes"]) == (32, 26)
    assert summary["calls"]["fork"] == summary["calls"]["wait"] == 25
    assert sum(not p.starts_at_exec for p in workers.processes) == 15
    depths = [0]
    for process in workers.processes[1:]:
        depths.append(depths[process.parent] + 1)
    assert max(depths) == 4
    assert all(STACK_TOP - 0x4000 < int(p.stream.pages.max()) < 1 << 20 for p in workers.processes)
    assert default_ram_bytes(workers) == 64 << 20


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.trace")), ids=lambda path: path.stem)
def test_a_shipped_recording_is_small_and_holds_no_path(path: Path) -> None:
    assert path.stat().st_size < 3 << 20
    assert not re.search(r"(^|[\s=])/", read_recording(path).provenance)
