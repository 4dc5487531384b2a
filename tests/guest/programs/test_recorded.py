"""Recordings replayed on the flat machine: references find pages, calls have their effect."""

from __future__ import annotations

import numpy as np
import pytest

from penumbra.guest.kernel import KernelOptions
from penumbra.guest.programs.recorded import RecordedProgram
from penumbra.guest.traces.recording import Call, RecordedProcess, Recording, Region
from penumbra.hw.formats import FORMATS, FormatSpec
from penumbra.hw.streams import FETCH, READ, WRITE, AccessStream, pack_runs
from tests.guest.flat_driver import FlatMachine

PAGE = 4096
CODE, STACK, HEAP, MAP, MOVED = 0x10, 0x8_0000, 0x100, 0x200, 0x300


def stream(index: int, *references: tuple[int, int]) -> AccessStream:
    """Make a stream of (page, kind) runs."""
    pages = list(dict.fromkeys(page for page, _ in references))
    at = np.array([pages.index(page) for page, _ in references], np.int64)
    kinds = np.array([kind for _, kind in references], np.int64)
    ones = np.ones(len(references), np.int64)
    return AccessStream(np.array(pages, np.int64), pack_runs(at, kinds, ones, ones * 0), index + 1)


IMAGE = (Region(CODE, 1, 5), Region(STACK, 2, 3))
PARENT = RecordedProcess(
    0,
    -1,
    True,
    stream(
        0,
        (CODE, FETCH),
        (STACK, WRITE),
        (HEAP, WRITE),
        (MAP, WRITE),
        (MAP + 1, READ),
        (MOVED, READ),
        (CODE, READ),
    ),
    (
        Call(2, "brk", (0,), HEAP * PAGE),
        Call(2, "brk", (HEAP * PAGE + 10,), HEAP * PAGE + 10),
        Call(3, "mmap", (0, 2 * PAGE, 3, 0x22, -1, 0), MAP * PAGE),
        Call(3, "other", (39,)),
        Call(5, "fork", (1,), 1),
        Call(5, "fork", (2,), 2),
        Call(5, "mremap", (MAP * PAGE, 2 * PAGE, 3 * PAGE, 1), MOVED * PAGE),
        Call(6, "wait", (1,), 1),
        Call(6, "wait", (-1,), -1),
        Call(6, "mprotect", (CODE * PAGE, PAGE, 1)),
        Call(7, "munmap", (MOVED * PAGE, 3 * PAGE)),
        Call(7, "exit", (0,)),
    ),
    IMAGE,
)
FORKED = RecordedProcess(
    1,
    0,
    False,
    stream(1, (MAP, WRITE), (STACK + 1, WRITE), (CODE, FETCH)),
    (Call(3, "exit", (1,)),),
)
EXECED = RecordedProcess(
    2,
    0,
    True,
    stream(2, (CODE + 7, FETCH), (MAP, READ), (CODE + 7, READ)),
    (
        Call(1, "mmap", (0, PAGE, 1, 2, 5, 3), MAP * PAGE),
        Call(2, "exec", ()),
        Call(3, "exit", (0,)),
    ),
    (Region(CODE + 7, 1, 5),),
)
FAMILY = Recording((PARENT, FORKED, EXECED), 32, "made by hand", 32)


def machine_for(recording: Recording, spec: FormatSpec, n_vcpus: int) -> FlatMachine:
    return FlatMachine(
        spec,
        [RecordedProgram(recording)],
        n_vcpus,
        sticky=True,
        options=KernelOptions(timer_period=50),
        streams={process.index: process.stream for process in recording.processes},
    )


@pytest.mark.shows("G9")
@pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("n_vcpus", [1, 2, 4])
def test_a_family_is_replayed_where_it_was_recorded(spec: FormatSpec, n_vcpus: int) -> None:
    FAMILY.check()
    machine = machine_for(FAMILY, spec, n_vcpus)
    assert (machine.run(), machine.reasons, machine.stale) == ("finished", [], [])
    machine.check_all_returned()
    assert [process.exit_code for process in machine.kernel.ended] == [0, 1, 0]
    touched = {gva >> 12 for gva, _ in machine.faults}
    assert touched == {CODE, CODE + 7, STACK, STACK + 1, HEAP, MAP, MAP + 1}


def test_a_replay_that_cannot_follow_the_recording_says_so() -> None:
    window_call = Call(0, "mmap", (0, PAGE, 3, 0x22, -1, 0), 1 << 48)
    lost = RecordedProcess(0, -1, True, stream(0, (CODE, READ)), (window_call,), IMAGE)
    machine = machine_for(Recording((lost,), 64, "", 8), FORMATS["ia32"], 1)
    assert machine.run() == "finished"
    assert machine.reasons[0].startswith("ReplayError: mmap")
