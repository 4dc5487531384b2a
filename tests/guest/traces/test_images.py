"""What a recording's streams and calls say about its address spaces."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penumbra.guest.traces.images import PageSet, with_images
from penumbra.guest.traces.recording import Call, RecordedProcess, Recording, Region
from penumbra.guest.traces.runs import number_by_first_use
from penumbra.hw.streams import FETCH, READ, WRITE, AccessStream, pack_runs

PAGE = 4096


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(0, 20))))
def test_a_page_set_is_a_set_of_pages(steps: list[tuple[bool, int, int]]) -> None:
    pages, model = PageSet(), set[int]()
    for is_added, first, end in steps:
        if is_added:
            pages.add(first, end)
            model |= set(range(first, end))
        else:
            pages.remove(first, end)
            model -= set(range(first, end))
        pages.check()
        held = pages.holds(np.arange(25))
        assert set(np.flatnonzero(held).tolist()) == model


def process(
    index: int, parent: int, runs: list[tuple[int, int]], *calls: Call, is_copy: bool = False
) -> RecordedProcess:
    """A process whose runs are (page, kind), one reference each."""
    vpns = np.array([vpn for vpn, _ in runs], np.int64)
    kinds = np.array([kind for _, kind in runs], np.int64)
    pages, place = number_by_first_use(vpns)
    words = pack_runs(place, kinds, np.ones_like(kinds), np.zeros_like(kinds))
    return RecordedProcess(index, parent, not is_copy, AccessStream(pages, words, index + 1), calls)


def recorded(*processes: RecordedProcess) -> Recording:
    recording = with_images(processes, 32, "made by a test")
    recording.check()
    return recording


def test_the_image_is_what_is_touched_while_nothing_is_mapped_there() -> None:
    recording = recorded(
        process(
            0, -1,
            [(1, FETCH), (2, FETCH), (9, READ), (30, WRITE), (31, WRITE), (40, READ), (50, WRITE),
             (51, READ), (30, READ), (60, WRITE)],
            Call(3, "mmap", (0, 2 * PAGE, 3, 0x22, -1, 0), 30 * PAGE),
            Call(3, "brk", (0,), 40 * PAGE + 5),
            Call(3, "brk", (42 * PAGE,), 42 * PAGE),
            Call(7, "mremap", (30 * PAGE, PAGE, 2 * PAGE, 1), 60 * PAGE),
            Call(8, "munmap", (31 * PAGE, PAGE)),
        )
    )  # fmt: skip
    assert recording.processes[0].image == (
        Region(1, 2, 5),
        Region(9, 1, 1),
        Region(30, 1, 1),  # after mremap had moved it away
        Region(40, 1, 1),  # the break began in its middle
        Region(50, 1, 3),
        Region(51, 1, 1),
    )


def test_a_forked_child_inherits_the_mappings_and_its_parent_the_pages_only_the_child_touches() -> (
    None
):
    recording = recorded(
        process(
            0, -1, [(1, FETCH), (20, WRITE), (21, WRITE)],
            Call(1, "mmap", (0, 2 * PAGE, 3, 0x22, -1, 0), 20 * PAGE),
            Call(2, "fork", (1,), 1),
            Call(2, "munmap", (21 * PAGE, PAGE)),
        ),
        process(1, 0, [(21, WRITE), (1, FETCH), (2, READ)], is_copy=True),
    )  # fmt: skip
    assert [p.image for p in recording.processes] == [
        (Region(1, 1, 5), Region(2, 1, 1), Region(21, 1, 3)),
        (Region(1, 1, 5), Region(2, 1, 1)),
    ]


def test_a_child_that_execs_leaves_its_parent_alone() -> None:
    recording = recorded(
        process(0, -1, [(1, FETCH)], Call(1, "fork", (1,), 1)),
        process(1, 0, [(7, FETCH)]),
    )
    assert [p.image for p in recording.processes] == [(Region(1, 1, 5),), (Region(7, 1, 5),)]


def test_children_count_together_until_they_are_waited_for() -> None:
    def family(*calls: Call) -> int:
        return recorded(
            process(0, -1, [(1, FETCH), (2, READ)], *calls),
            process(1, 0, [(vpn, READ) for vpn in range(10)]),
            process(2, 0, [(vpn, READ) for vpn in range(20)]),
        ).peak_pages

    forks = Call(0, "fork", (1,), 1), Call(1, "fork", (2,), 2)
    assert family(*forks) == 2 + 10 + 20
    assert family(forks[0], Call(0, "wait", (1,), 1), forks[1]) == 2 + 20
    assert family(forks[0], Call(0, "wait", (-1,), -1), forks[1]) == 2 + 10 + 20


def test_a_copy_may_hold_what_its_parent_held() -> None:
    recording = recorded(
        process(0, -1, [(1, FETCH), (2, READ)], Call(0, "fork", (1,), 1)),
        process(1, 0, [(2, WRITE), (3, WRITE)], is_copy=True),
    )
    assert recording.peak_pages == 2 + 3
