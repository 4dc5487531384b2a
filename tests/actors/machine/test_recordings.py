"""Recorded 32-bit programs replay on IA-32 and PAE paging, at their own addresses, alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from machines import FAMILIES, run_machine

import penumbra.guest
from penumbra.guest.traces import import_lackey
from penumbra.guest.workloads.workload import Workload, recorded_workload

WORKERS = Path(next(iter(penumbra.guest.__path__))) / "recordings" / "workers.trace"

# A stack on the last page below 4 GiB; the calls are those that only 32-bit programs make.
PARENT = """\
==700== Parent PID: 650
I  00108000,3
 S fffffff8,8
SYSCALL[700,1](45) sys_brk ( 0x0 ) --> [pre-success] Success(0x4035000)
SYSCALL[700,1](45) sys_brk ( 0x4037000 ) --> [pre-success] Success(0x4037000)
 S 04036ff0,4
SYSCALL[700,1](90) old_mmap ( 0x0, 8192, 3, 34, -1, 0 ) --> [pre-success] Success(0x483c000)
SYSCALL[700,1](192) sys_mmap2 ( 0x0, 8192, 3, 33, 4294967295, 0 ) --> [pre-success] Success(0x483f000)
 S 0483d000,4
 S 0483f000,4
SYSCALL[700,1](2) sys_fork ( )   fork: process 700 created child 701
 --> [pre-success] Success(0x2bd)
SYSCALL[700,1](190) sys_fork ( )   fork: process 700 created child 702
 --> [pre-success] Success(0x2be)
 S 0483d008,4
 S fffff000,4
SYSCALL[700,1](7) sys_waitpid ( 701, 0xffffff00, 0 ) --> [async] ...
SYSCALL[700,1](7) ... [async] --> Success(0x2bd)
SYSCALL[700,1](114) sys_wait4 ( -1, 0xffffff00, 0, 0x0 ) --> [async] ...
SYSCALL[700,1](114) ... [async] --> Success(0x2be)
SYSCALL[700,1](163) sys_mremap ( 0x483c000, 8192, 245760, 0x1 ) --> [pre-success] Success(0x4a6e000)
 S 04aa9000,4
SYSCALL[700,1](252) exit_group( 0 ) --> [pre-success] Success(0x0)
"""  # noqa: E501
CHILD = """\
==701== Parent PID: 700
 --> [pre-success] Success(0x0)
I  00108003,3
 S 0483f004,4
 S 0483d004,4
 S fffffff0,4
SYSCALL[701,1](252) exit_group( 1 ) --> [pre-success] Success(0x0)
"""
PROGRAM = """\
==702== Parent PID: 700
I  00400000,3
 S ff000000,4
SYSCALL[702,1](252) exit_group( 2 ) --> [pre-success] Success(0x0)
"""


def replayed(
    workload: Workload, scheme: str, vcpus: int, paging: str = "ia32"
) -> list[tuple[Any, ...]]:
    """Run a recording under the oracle; return what must be the same under every scheme."""
    _, summary, verdict = run_machine(workload, scheme, vcpus=vcpus, paging=paging)
    assert verdict is not None
    assert verdict.coherent, verdict
    assert summary["ended"] == "finished"
    keys = ("pid", "ended", "pages", "digest")
    return [tuple(process[key] for key in keys) for process in summary["processes"]]


@pytest.mark.shows("G9", "H2", "H3", "S3")
@pytest.mark.parametrize("vcpus", [1, 3])
def test_calls_of_32_bits_and_a_stack_at_the_top_replay_under_every_scheme(
    vcpus: int, tmp_path: Path
) -> None:
    logs = [tmp_path / name for name in ("parent", "child", "program")]
    for log, text in zip(logs, (PARENT, CHILD, PROGRAM), strict=True):
        log.write_text(text, newline="\n")
    recording = import_lackey(logs, tmp_path / "small.trace")
    assert recording.bits == 32
    assert recording.calls_by_name == {
        "mmap": 2, "mremap": 1, "brk": 2, "fork": 2, "exit": 3, "wait": 2,
    }  # fmt: skip
    assert int(recording.processes[0].stream.pages.max()) == 0xFFFFF
    workload = recorded_workload(tmp_path / "small.trace")
    native, *others = [
        replayed(workload, scheme, vcpus, paging)
        for paging in ("ia32", "pae")
        for scheme in FAMILIES
    ]
    assert sorted(row[1] for row in native) == ["exit 0", "exit 1", "exit 2"]
    assert all(other == native for other in others)


@pytest.mark.shows("G9", "H2", "H3", "S3")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="too slow without numba")
def test_the_shipped_32_bit_recording_replays_alike_under_every_scheme() -> None:
    workload = recorded_workload(WORKERS)
    native, *others = [replayed(workload, scheme, 4) for scheme in FAMILIES]
    assert len(native) == 26
    assert all(other == native for other in others)
    assert replayed(workload, "patch", 4, "pae") == native
