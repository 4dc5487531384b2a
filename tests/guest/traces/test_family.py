"""Who forked whom, when the logs themselves lost some of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penumbra.guest.traces import Call, Recording, TraceError

ImportLogs = Callable[..., Recording]


def fork(child: int, parent: int) -> str:
    return (
        f"@(57) sys_fork ( )   fork: process {parent} created child {child}\n"
        f" --> [pre-success] Success({child:#x})\n"
    )


COPY = " --> [pre-success] Success(0x0)\n"
RUN = "I  00108000,3\n"


def shape(recording: Recording) -> list[tuple[int, bool]]:
    return [(process.parent, process.starts_at_exec) for process in recording.processes]


def test_processes_are_numbered_in_order_of_creation_across_a_wrap_of_pids(
    import_logs: ImportLogs,
) -> None:
    recording = import_logs(
        {
            (12, 32000): COPY + RUN,  # after the wrap
            (32000, 31000): RUN + fork(32001, 32000) + fork(12, 32000),
            (32005, 32001): COPY,
            (32001, 32000): COPY + fork(32005, 32001),
        }
    )
    assert shape(recording) == [(-1, True), (0, False), (1, False), (0, False)]
    assert len(recording.processes[3].stream.runs) == 1


def test_a_fork_that_an_exec_cut_off_happens_at_the_start_and_its_child_has_its_own_image(
    import_logs: ImportLogs,
) -> None:
    recording = import_logs({(7, 6): RUN + fork(9, 7), (8, 7): COPY + RUN, (9, 7): COPY + RUN})
    assert shape(recording) == [(-1, True), (0, True), (0, False)]
    assert recording.processes[0].calls == (
        Call(0, "fork", (1,), 1),
        Call(1, "fork", (2,), 2),
        Call(1, "exit", (137,)),
    )


def test_an_orphan_adopted_before_its_exec_belongs_to_the_first_process(
    import_logs: ImportLogs,
) -> None:
    recording = import_logs({(7, 6): RUN, (8, 7): RUN, (9, 1): RUN})
    assert shape(recording) == [(-1, True), (0, True), (0, True)]


def test_reaping_an_adopted_orphan_is_no_wait_for_a_child(import_logs: ImportLogs) -> None:
    reaper = RUN + fork(8, 7) + "@(61) sys_wait4 ( -1, 0x0, 0, 0x0 )[sync] --> Success(0x9)\n"
    recording = import_logs({(7, 6): reaper, (8, 7): COPY + fork(9, 8), (9, 8): COPY})
    assert [call.name for call in recording.processes[0].calls] == ["fork", "other", "exit"]


def test_waits_that_do_not_tell_stay_open_where_several_children_can_be_meant(
    import_logs: ImportLogs,
) -> None:
    unknown = "@(247) sys_waitid( 0, 0, 0x1, 4, 0x0 )[sync] --> Success(0x0)\n"
    known = "@(61) sys_wait4 ( -1, 0x0, 0, 0x0 )[sync] --> Success(0xa)\n"
    body = fork(8, 7) + fork(9, 7) + fork(10, 7) + 3 * unknown + known + fork(11, 7) + unknown
    recording = import_logs({(7, 6): body, **{(pid, 7): COPY for pid in (8, 9, 10, 11)}})
    waits = [call for call in recording.processes[0].calls if call.name in ("wait", "other")]
    assert [(call.name, call.args[0]) for call in waits] == [
        ("wait", -1),
        ("wait", -1),
        ("other", 247),
        ("wait", 3),
        ("wait", 4),
    ]


@pytest.mark.parametrize(
    ("bodies", "cause"),
    [
        ({(7, 6): RUN, (9, 5): RUN}, "process 9 is not related to process 7"),
        ({(7, 6): fork(8, 7) + fork(8, 7), (8, 7): COPY}, "creates process 8, which has another"),
        ({(7, 6): fork(7, 7)}, "creates process 7, which has another parent"),
        ({(7, 8): fork(8, 7), (8, 7): fork(7, 8)}, "no log is that of a first process"),
        ({(5, 4): RUN, (7, 8): fork(8, 7), (8, 7): fork(7, 8)}, "descends from itself"),
    ],
)
def test_logs_that_are_no_one_family_are_refused(
    import_logs: ImportLogs, bodies: dict[tuple[int, int], str], cause: str
) -> None:
    with pytest.raises(TraceError, match=cause):
        import_logs(bodies)
