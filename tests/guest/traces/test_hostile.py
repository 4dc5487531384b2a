"""Whatever stands in a log: a recording that can be written and read again, or one TraceError."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penumbra.guest.traces import TraceError, import_lackey, read_recording

LOG = """\
==700== Using Valgrind-3.19.0 and LibVEX; rerun with -h for copyright info
==700== Parent PID: 650
I  00108000,3
 S fec84a94,8
SYSCALL[700,1](45) sys_brk ( 0x4056000 ) --> [pre-success] Success(0x4056000)
SYSCALL[700,1](192) sys_mmap2 ( 0x0, 8192, 3, 34, 4294967295, 0 ) --> [pre-success] Success(0x4835000)
 S 04835ffe,4
SYSCALL[700,1](90) old_mmap ( 0x0, 12288, 3, 34, -1, 0 ) --> [pre-success] Success(0x483c000)
SYSCALL[700,1](163) sys_mremap ( 0x483c000, 12288, 245760, 0x1 ) --> [pre-success] Success(0x4a6e000)
SYSCALL[700,1](125) sys_mprotect ( 0x4a6e000, 8192, 1 )[sync] --> Success(0x0)
SYSCALL[700,1](397) sys_shmget ( 0, 5000, 896 ) --> [pre-success] Success(0x3)
SYSCALL[700,1](398) sys_shmat ( 3, 0x0, 0 ) --> [pre-success] Success(0x5000000)
SYSCALL[700,1](295) sys_openat ( 4294967196, 0x4028f00(/lib/c.so), 0 ) --> [async] ...
SYSCALL[700,1](295) ... [async] --> Success(0x3)
SYSCALL[700,1](120) sys_clone ( 1200011, 0x0, 0x0, 0x0, 0x48365a8 )   clone(fork): process 700 created child 701
 --> [pre-success] Success(0x2bd)
SYSCALL[700,1](7) sys_waitpid ( 701, 0xfee8d7c4, 0 ) --> [async] ...
SYSCALL[700,1](7) ... [async] --> Success(0x2bd)
SYSCALL[700,1](91) sys_munmap ( 0x4a6e000, 245760 )[sync] --> Success(0x0)
SYSCALL[700,1](252) exit_group( 0 ) --> [pre-success] Success(0x0)
==700==
"""  # noqa: E501
CHILD = """\
==701== Parent PID: 700
 --> [pre-success] Success(0x0)
I  00108007,2
SYSCALL[701,1](252) exit_group( 1 ) --> [pre-success] Success(0x0)
"""
NUMBERS = [m.span() for m in re.finditer(r"0x[0-9a-f]+|-?\b\d+\b", LOG)]
HUGE = ["-1", "0", "4095", str(2**31), str(2**32), str(2**63), str(2**64), "9" * 30, "9" * 5000,
        "0x" + "f" * 16, "0x" + "f" * 40, "-" + "9" * 30, "x"]  # fmt: skip

a_log = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


def used_or_refused(folder: Path, *texts: bytes) -> None:
    """Import logs; what is accepted must survive the file, of what is not nothing is written."""
    paths = [folder / f"log.{number}" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    out = folder / "out.trace"
    out.unlink(missing_ok=True)
    try:
        recording = import_lackey(paths, out)
    except TraceError:
        assert not out.exists()
        return
    recording.check()
    assert read_recording(out) == recording


def test_the_log_that_is_spoilt_below_is_good_as_it_is(tmp_path: Path) -> None:
    used_or_refused(tmp_path, LOG.encode(), CHILD.encode())
    recording = read_recording(tmp_path / "out.trace")
    assert (recording.bits, recording.n_references) == (32, 5)
    assert recording.calls_by_name == {
        "mmap": 3, "munmap": 1, "mprotect": 1, "mremap": 1, "brk": 1, "fork": 1, "exit": 2,
        "wait": 1, "other": 2,
    }  # fmt: skip


@a_log
@given(noise=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_bytes_are_used_or_refused(tmp_path: Path, noise: bytes) -> None:
    used_or_refused(tmp_path, noise)
    used_or_refused(tmp_path, LOG.encode() + noise + b"\n", CHILD.encode())


@a_log
@given(
    edits=st.lists(st.tuples(st.sampled_from(NUMBERS), st.sampled_from(HUGE)), max_size=3),
    cut=st.integers(0, len(LOG)),
)
@example(edits=[], cut=0)
def test_any_number_may_be_huge_and_any_tail_missing(
    tmp_path: Path, edits: list[tuple[tuple[int, int], str]], cut: int
) -> None:
    text = LOG[: len(LOG) - cut]
    for (start, end), value in sorted(edits, reverse=True):
        text = text[:start] + value + text[end:]
    used_or_refused(tmp_path, text.encode(), CHILD.encode())


@a_log
@given(order=st.permutations(range(LOG.count("\n"))), length=st.integers(1, LOG.count("\n")))
def test_lines_in_any_order_are_used_or_refused(
    tmp_path: Path, order: list[int], length: int
) -> None:
    lines = LOG.splitlines(keepends=True)
    text = "".join(lines[number] for number in order[:length])
    used_or_refused(tmp_path, text.encode(), CHILD.encode())


@pytest.mark.parametrize("value", HUGE)
def test_each_number_alone_may_be_anything(tmp_path: Path, value: str) -> None:
    for start, end in NUMBERS:
        text = LOG[:start] + value + LOG[end:]
        used_or_refused(tmp_path, text.encode(), CHILD.encode())
