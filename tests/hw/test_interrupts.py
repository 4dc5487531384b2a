"""Interrupts come in order of due time, never early, each once; the timer fires once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.hw.interrupts import NEVER, TIMER_VECTOR, InterruptController


def drain(controller: InterruptController, progress: int) -> list[int]:
    """Take interrupts until none is due; one that never stops coming is a failure."""
    taken: list[int] = []
    while (vector := controller.take(progress)) is not None:
        taken.append(vector)
        assert len(taken) < 1000
    return taken


@pytest.mark.shows("H9")
def test_an_interrupt_is_taken_at_the_first_boundary_at_or_after_its_time() -> None:
    controller = InterruptController()
    controller.post(10, 0x41)
    assert controller.next_due == 10
    assert [controller.take(progress) for progress in (0, 9, 10, 11)] == [None, None, 0x41, None]
    assert controller.next_due == NEVER


@pytest.mark.shows("H9")
def test_interrupts_due_together_come_in_order_of_arrival_the_timer_last() -> None:
    controller = InterruptController()
    controller.arm_timer(5)
    for vector in (0x43, 0x41, 0x43):
        controller.post(5, vector)
    assert drain(controller, 5) == [0x43, 0x41, 0x43, TIMER_VECTOR]


@pytest.mark.shows("H9")
def test_a_timer_due_before_an_interrupt_comes_first() -> None:
    controller = InterruptController()
    controller.post(5, 0x41)
    controller.arm_timer(4)
    assert drain(controller, 9) == [TIMER_VECTOR, 0x41]


@pytest.mark.shows("H9")
def test_the_timer_fires_once_and_a_new_deadline_replaces_the_old() -> None:
    controller = InterruptController()
    controller.arm_timer(5)
    controller.arm_timer(8)
    assert (controller.take(7), controller.next_due) == (None, 8)
    assert [controller.take(8), controller.take(99)] == [TIMER_VECTOR, None]
    controller.arm_timer(9)
    controller.arm_timer(None)
    assert (controller.take(99), controller.next_due) == (None, NEVER)


posts = st.lists(st.tuples(st.integers(0, 20), st.integers(0x21, 0x30)))


@pytest.mark.shows("H9")
@given(posts=posts, timer=st.none() | st.integers(0, 20), steps=st.lists(st.integers(0, 6)))
def test_every_interrupt_posted_is_taken_exactly_once_and_in_order(
    posts: list[tuple[int, int]], timer: int | None, steps: list[int]
) -> None:
    controller = InterruptController()
    for due, vector in posts:
        controller.post(due, vector)
    controller.arm_timer(timer)
    rest = sorted(
        [(due, i, vector) for i, (due, vector) in enumerate(posts)]
        + ([] if timer is None else [(timer, len(posts), TIMER_VECTOR)])
    )
    progress = 0
    for step in [*steps, 21]:
        progress += step
        assert controller.next_due == (rest[0][0] if rest else NEVER)
        due_now = [vector for due, _, vector in rest if due <= progress]
        assert drain(controller, progress) == due_now
        del rest[: len(due_now)]
    assert rest == []
