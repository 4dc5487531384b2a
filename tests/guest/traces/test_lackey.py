"""Logs in, a whole recording out; and what is refused, with file, line and cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from penumbra.guest.traces import (
    Call,
    Recording,
    Region,
    TraceError,
    import_lackey,
    read_recording,
)
from penumbra.hw.streams import (
    COUNT_SHIFT,
    FETCH,
    MAX_COUNT,
    OFFSET_SHIFT,
    PAGE_SHIFT,
    READ,
    WRITE,
)

ImportLogs = Callable[..., Recording]
PAGE = 4096

SHELL = """\
I  00108000,3
 S 1fff000768,8
@(12) sys_brk ( 0x0 ) --> [pre-success] Success(0x4035000)
@(12) sys_brk ( 0x4056000 ) --> [pre-success] Success(0x4056000)
I  00108003,2
 M 04035010,8
@(257) sys_openat ( 4294967196, 0x4028f00(/lib/c.so), 524288 ) --> [async] ...
@(257) ... [async] --> Success(0x3)
@(9) sys_mmap ( 0x0, 5000, 1, 2050, 3, 0 ) --> [pre-success] Success(0x4837000)
@(9) sys_mmap ( 0x4838000, 4096, 3, 2066, 3, 4096 ) --> [pre-success] Success(0x4838000)
@(3) sys_close ( 3 )[sync] --> Success(0x0)
 L 04837ffc,8
@(10) sys_mprotect ( 0x4837000, 100, 1 )[sync] --> Success(0x0)
@(11) sys_munmap ( 0x4837000, 0 )[sync] --> Failure(0x16)
I  00108005,2
@(56) sys_clone ( 1200011, 0x0, 0x0, 0x4a27a10, 0x0 )   clone(fork): process 700 created child 702
 --> [pre-success] Success(0x2be)
I  00108007,2
@(56) sys_clone ( 4111, 0x0, 0x0, 0x4a27a10, 0x0 )   clone(fork): process 700 created child 701
 --> [pre-success] Success(0x2bd)
@(61) sys_wait4 ( 4294967295, 0x1fff00019c, 0, 0x0 ) --> [async] ...
@(61) ... [async] --> Success(0x2bd)
I  00108009,2
@(61) sys_wait4 ( 4294967295, 0x1fff00019c, 1, 0x0 ) --> [async] ...
@(61) ... [async] --> Success(0x0)
I  00108009,2
@(231) exit_group( 3 ) --> [pre-success] Success(0x0)
==700==
"""
SUBSHELL = """\
 --> [pre-success] Success(0x0)
I  00108007,2
 S 04035018,8
 L 1fff000700,8
@(9) sys_mmap ( 0x0, 8192, 3, 34, 4294967295, 0 ) --> [pre-success] Success(0x5000000)
 S 05000000,4
@(25) sys_mremap ( 0x5000000, 8192, 20480, 0x1 ) --> [pre-success] Success(0x6000000)
@(11) sys_munmap ( 0x6000000, 4096 )[sync] --> Success(0x0)
@(60) exit( 258 ) --> [pre-success] Success(0x0)
==702==
"""
PROGRAM = """\
I  00400000,4
@(2) sys_open ( 0x4028f00(/lib/other.so), 0 ) --> [async] ...
@(2) ... [async] --> Success(0x3)
@(9) sys_mmap ( 0x0, 4096, 1, 1, 3, 0 ) --> [pre-success] Success(0x4837000)
@(257) sys_openat ( 4294967196, 0x4028f00(/lib/c.so), 0 ) --> [async] ...
@(257) ... [async] --> Success(0x4)
@(9) sys_mmap ( 0x0, 4096, 1, 1, 4, 8192 ) --> [pre-success] Success(0x4838000)
"""


def runs_of(recording: Recording, index: int) -> list[tuple[int, int, int, int]]:
    """Runs of a process as (page, kind, count, offset)."""
    stream = recording.processes[index].stream
    return [
        (
            int(stream.pages[word >> PAGE_SHIFT]),
            word & 3,
            (word >> COUNT_SHIFT) & MAX_COUNT,
            (word >> OFFSET_SHIFT) & 4095,
        )
        for word in stream.runs.tolist()
    ]


@pytest.mark.shows("G9")
def test_a_shell_a_forked_subshell_and_a_program_become_one_recording(
    import_logs: ImportLogs,
) -> None:
    recording = import_logs(
        {(702, 700): SUBSHELL, (701, 700): PROGRAM, (700, 650): SHELL}, provenance="a shell"
    )
    recording.check()
    assert recording.bits == 64
    assert recording.provenance == "a shell [valgrind 3.19.0 lackey]"
    assert [(p.parent, p.starts_at_exec) for p in recording.processes] == [
        (-1, True),
        (0, False),
        (0, True),
    ]
    shell, subshell, program = recording.processes
    assert runs_of(recording, 0) == [
        (0x108, FETCH, 1, 0),
        (0x1FFF000, WRITE, 1, 0x768),
        (0x108, FETCH, 1, 3),
        (0x4035, WRITE, 1, 0x10),
        (0x4837, READ, 1, 0xFFC),
        (0x4838, READ, 1, 0),
        (0x108, FETCH, 1, 5),
        (0x108, FETCH, 1, 7),
        (0x108, FETCH, 1, 9),
        (0x108, FETCH, 1, 9),
    ]
    assert shell.calls == (
        Call(2, "brk", (0,), 0x4035000),
        Call(2, "brk", (0x4056000,), 0x4056000),
        Call(4, "other", (257,)),
        Call(4, "mmap", (0, 2 * PAGE, 1, 2, 0, 0), 0x4837000),
        Call(4, "mmap", (0x4838000, PAGE, 3, 0x12, 0, 1), 0x4838000),
        Call(4, "other", (3,)),
        Call(6, "mprotect", (0x4837000, PAGE, 1)),
        Call(6, "other", (11,), -0x16),
        Call(7, "fork", (1,), 1),
        Call(8, "fork", (2,), 2),
        Call(8, "wait", (2,), 2),
        Call(9, "other", (61,)),
        Call(10, "exit", (3,)),
    )
    assert shell.image == (Region(0x108, 1, 5), Region(0x1FFF000, 1, 3))
    assert runs_of(recording, 1) == [
        (0x108, FETCH, 1, 7),
        (0x4035, WRITE, 1, 0x18),
        (0x1FFF000, READ, 1, 0x700),
        (0x5000, WRITE, 1, 0),
    ]
    assert subshell.calls == (
        Call(3, "mmap", (0, 2 * PAGE, 3, 0x22, -1, 0), 0x5000000),
        Call(4, "mremap", (0x5000000, 2 * PAGE, 5 * PAGE, 1), 0x6000000),
        Call(4, "munmap", (0x6000000, PAGE)),
        Call(4, "exit", (2,)),
    )
    assert subshell.image == (Region(0x108, 1, 5), Region(0x1FFF000, 1, 1))
    assert program.calls == (
        Call(1, "other", (2,)),
        Call(1, "mmap", (0, PAGE, 1, 1, 1, 0), 0x4837000),
        Call(1, "other", (257,)),
        Call(1, "mmap", (0, PAGE, 1, 1, 0, 2), 0x4838000),  # the shell's file again
        Call(1, "exit", (128 + 9,)),  # its log just ends
    )


def test_a_32_bit_program_maps_forks_and_waits_by_its_own_calls(import_logs: ImportLogs) -> None:
    recording = import_logs(
        {
            (50, 49): """\
I  08049000,3
@(192) sys_mmap2 ( 0x0, 16384, 3, 2, 3, 2 ) --> [pre-success] Success(0x4000000)
@( 90) old_mmap ( 0x0, 8192, 3, 34, -1, 0 ) --> [pre-success] Success(0x4004000)
 S fedec8b0,4
@(2) sys_fork ( )   fork: process 50 created child 51
 --> [pre-success] Success(0x33)
@(7) sys_waitpid ( 51, 0xfedec8b0, 0 ) --> [async] ...
@(7) ... [async] --> Success(0x33)
@(190) sys_fork ( )   fork: process 50 created child 52
 --> [pre-success] Success(0x34)
@(284) sys_waitid( 0, 0, 0xfedec828, 4, 0x0 ) --> [async] ...
@(284) ... [async] --> Success(0x0)
@(999) --50-- WARNING: unhandled x86-linux syscall: 999
--50-- You may be able to write your own handler.
 --> [pre-fail] Failure(0x26)
@(252) exit_group( 0 ) --> [pre-success] Success(0x0)
""",
            (51, 50): " --> [pre-success] Success(0x0)\nI  08049010,2\n@(1) exit( 3 ) -->"
            " [pre-success] Success(0x0)\n",
            (52, 50): " --> [pre-success] Success(0x0)\n",
        }
    )
    assert recording.bits == 32
    assert recording.processes[0].calls == (
        Call(1, "mmap", (0, 4 * PAGE, 3, 2, 0, 2), 0x4000000),
        Call(1, "mmap", (0, 2 * PAGE, 3, 0x22, -1, 0), 0x4004000),
        Call(2, "fork", (1,), 1),
        Call(2, "wait", (1,), 1),
        Call(2, "fork", (2,), 2),
        Call(2, "wait", (2,), 2),
        Call(2, "other", (999,), -0x26),
        Call(2, "exit", (0,)),
    )
    assert [p.calls for p in recording.processes[1:]] == [
        (Call(1, "exit", (3,)),),
        (Call(0, "exit", (137,)),),
    ]


HANDLER = """\
I  00108100,1
@(15) sys_rt_sigreturn ( ) --> [pre-success] NoWriteResult
"""
EXIT = "@(231) exit_group( 0 ) --> [pre-success] Success(0x0)\n"
NO_CHILD = "@(61) ... [async] --> Failure(0xa)\n"
WAIT = "@(61) sys_wait4 ( 4294967295, 0x1fff00019c, 0, 0x0 ) --> [async] ... \n"


@pytest.mark.parametrize(
    ("after_fork", "waits"),
    [
        (WAIT + HANDLER + "I  00108009,2\nI  0010800b,2\n" + EXIT, [1]),
        (WAIT + HANDLER + "I  00108009,2\nI  0010800b,2\n" + WAIT + NO_CHILD, [1]),
        (WAIT + HANDLER + "I  00108007,2\n" + WAIT + "@(61) ... [async] --> Success(0x2bd)\n", [1]),
        (WAIT + HANDLER + "I  00108007,2\n" + WAIT, []),
        (WAIT, []),
    ],
    ids=["returned", "returned, next fails", "made again", "made again, killed", "killed"],
)
def test_a_wait_whose_result_a_signal_swallowed_counts_when_it_had_returned(
    import_logs: ImportLogs, after_fork: str, waits: list[int]
) -> None:
    fork = "@(57) sys_fork ( )   fork: process 700 created child 701\n --> [x] Success(0x2bd)\n"
    recording = import_logs({(700, 1): fork + after_fork, (701, 700): ""})
    calls = recording.processes[0].calls
    assert [call.args[0] for call in calls if call.name == "wait"] == waits


def test_files_are_told_apart_through_directories_duplicates_and_unknown_descriptors(
    import_logs: ImportLogs,
) -> None:
    def opened(path: str, fd: int) -> str:
        return (
            f"@(257) sys_openat ( 4294967196, 0x1({path}), 0 ) --> [async] ... \n"
            f"@(257) ... [async] --> Success(0x{fd:x})\n"
        )

    def mapped(fd: int) -> str:
        return f"@(9) sys_mmap ( 0x0, 1, 1, 1, {fd}, 0 ) --> [pre-success] Success(0x7000000)\n"

    body = (
        opened("a\nI am --> Success(0x5)", 3) + mapped(3)
        + "@(80) sys_chdir ( 0x1(/elsewhere) )[sync] --> Success(0x0)\n"
        + opened("a\nI am --> Success(0x5)", 4) + mapped(4)
        + "@(32) sys_dup ( 3 )[sync] --> Success(0x5)\n" + mapped(5)
        + mapped(6) + mapped(6) + "@(3) sys_close ( 6 )[sync] --> Success(0x0)\n" + mapped(6)
        + "@(319) sys_memfd_create ( 0x1, 0 )[sync] --> Success(0x4)\n" + mapped(4)
        + "@(29) sys_shmget ( 0, 10000, 896 )[sync] --> Success(0x9)\n"
        + "@(30) sys_shmat ( 9, 0x0, 0 )[sync] --> Success(0x8000000)\n"
        + "@(67) sys_shmdt ( 0x8000000 )[sync] --> Success(0x0)\n"
    )  # fmt: skip
    calls = import_logs({(5, 4): body}).processes[0].calls
    assert [call.args[4] for call in calls if call.name == "mmap"] == [0, 1, 0, 2, 2, 3, 4, 5]
    assert [call for call in calls if call.name != "other"][-3:] == [
        Call(0, "mmap", (0, 3 * PAGE, 3, 1, 5, 0), 0x8000000),
        Call(0, "munmap", (0x8000000, 3 * PAGE)),
        Call(0, "exit", (137,)),
    ]


def test_a_process_killed_by_a_named_signal_exits_with_it_and_one_that_left_unrecorded_with_0(
    import_logs: ImportLogs,
) -> None:
    killed = "I  00108000,3\n==7== Process terminating with default action of signal 15 (SIGTERM)\n"
    assert import_logs({(7, 6): killed}).processes[0].calls == (Call(1, "exit", (143,)),)
    left = "I  00108000,3\n@(59) sys_execve ( 0x1(/bin/true), 0x2, 0x3 )\n"
    assert import_logs({(7, 6): left}).processes[0].calls == (
        Call(1, "exec", ()),
        Call(1, "exit", (0,)),
    )


def test_references_no_user_address_space_can_hold_are_left_out(import_logs: ImportLogs) -> None:
    recording = import_logs(
        {
            (7, 6): "I  00108000,3\n L dead000000000000,8\n L 7ffffffffffc,8\n"
            "@(12) sys_brk ( 0x0 ) --> [pre-success] Success(0x4035000)\n S 7ffffffffff8,8\n"
        }
    )
    assert runs_of(recording, 0) == [(0x108, FETCH, 1, 0), (0x7FFFFFFFF, WRITE, 1, 0xFF8)]
    assert recording.processes[0].calls[0].at == 1


@pytest.mark.parametrize(
    ("body", "line", "cause"),
    [
        ("I  00108000,3\nhello\n", 8, "not a line of a lackey log: 'hello'"),
        ("I  0010800g,3\n", 7, "not a line of a lackey log: 'I  0010800g,3'"),
        ("SYSCALL[x\n", 7, "not a line of a lackey log"),
        ("@(39) x()[sync] --> Success(0x0)\nSYSCALL[7,2](39) x()\n", 8, "a second thread"),
        ("SYSCALL[9,1](39) x()\n", 7, "process 9 in the log of process 7"),
        ("@(0) ... [async] --> Success(0x0)\n", 7, "call 0 completes but was not waiting"),
        ("@(9) sys_mmap ( 1, 2 ) --> [x] Success(0x1000)\n", 7, "cannot read mmap: mmap with 2"),
        ("@(11) sys_munmap ( oh, 2 ) --> [x] Success(0x0)\n", 7, "cannot read munmap"),
        (
            "@(56) sys_clone ( 3d0f00, 0x1, 0x2, 0x3, 0x4 ) --> [x] Success(0x8)\n",
            7,
            "starts a thread",
        ),
        (
            "@(57) sys_fork ( )   fork: process 7 created child 8\n --> [x] Success(0x8)\n",
            7,
            "creates process 8, whose log is not among those given",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_line_and_cause(
    import_logs: ImportLogs, body: str, line: int, cause: str
) -> None:
    with pytest.raises(TraceError) as caught:
        import_logs({(7, 6): body})
    assert caught.value.file.endswith("log.7")
    assert caught.value.place == f"line {line}"
    assert cause in caught.value.cause
    assert "\n" not in str(caught.value)


def test_a_mapping_no_kernel_makes_is_refused(import_logs: ImportLogs) -> None:
    with pytest.raises(TraceError, match="call 0, munmap: 0x5 is no page-aligned user address"):
        import_logs({(7, 6): "@(11) sys_munmap ( 0x5, 4096 )[sync] --> Success(0x0)\n"})


def test_two_logs_of_one_process_and_no_log_are_refused(
    import_logs: ImportLogs, tmp_path: Path
) -> None:
    import_logs({(7, 6): ""})
    (tmp_path / "copy").write_text((tmp_path / "log.7").read_text())
    with pytest.raises(TraceError, match="copy: whole log: process 7 has another log"):
        import_lackey([tmp_path / "log.7", tmp_path / "copy"])
    with pytest.raises(TraceError, match="at least one log"):
        import_lackey([])
    (tmp_path / "empty").write_text("")
    with pytest.raises(TraceError, match="empty: whole log: empty"):
        import_lackey([tmp_path / "empty"])


def test_an_import_writes_its_recording_and_a_failed_one_writes_nothing(
    import_logs: ImportLogs, tmp_path: Path
) -> None:
    recording = import_logs({(7, 6): "I  00108000,3\n"})
    out = tmp_path / "out.trace"
    written = import_lackey([tmp_path / "log.7"], out)
    assert written == recording == read_recording(out)
    with pytest.raises(TraceError, match="exists already"):
        import_lackey([tmp_path / "log.7"], out)
    (tmp_path / "log.7").write_text("nonsense\n")
    with pytest.raises(TraceError, match="line 1: not a line"):
        import_lackey([tmp_path / "log.7"], tmp_path / "never.trace")
    assert not (tmp_path / "never.trace").exists()
