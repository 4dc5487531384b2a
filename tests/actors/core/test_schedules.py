"""The stepper itself: what SC and TSO allow, how schedules read, what the enumeration counts."""

from __future__ import annotations

import random

import pytest

from penumbra.actors.core.schedules import ScheduleError, explore, run_schedule, wander
from penumbra.actors.core.stepper import End, Model, Program, StepMemory

X, Y = 1, 2
NAMES = {X: "x", Y: "y", 3: "lock"}


def nothing(_end: End) -> None:
    return None


def store_buffering(fenced: bool) -> Program:
    """Each process stores to its own word, then reads the other's: 0 and 0 needs store buffers."""

    def process(mine: int, other: int, memory: StepMemory) -> int:
        memory[mine] = 1
        if fenced:
            memory.fence()
        return memory[other]

    def judge(end: End) -> str | None:
        return "both read 0" if set(end.results.values()) == {0} else None

    return Program(
        {"P": lambda memory: process(X, Y, memory), "Q": lambda memory: process(Y, X, memory)},
        judge,
        name=lambda at: NAMES[at],
    )


def message_passing() -> Program:
    """Data, then flag; who sees the flag sees the data: stores leave a buffer in order."""

    def send(memory: StepMemory) -> None:
        memory[X] = 1
        memory[Y] = 1

    def receive(memory: StepMemory) -> tuple[int, int]:
        return memory[Y], memory[X]

    def judge(end: End) -> str | None:
        return "flag without data" if end.results["Q"] == (1, 0) else None

    return Program({"P": send, "Q": receive}, judge)


@pytest.mark.shows("P7")
@pytest.mark.parametrize(
    ("fenced", "model", "fails"),
    [
        (False, Model.SC, False),
        (False, Model.TSO, True),
        (True, Model.TSO, False),
    ],
)
def test_only_store_buffers_without_fence_let_both_sides_miss_the_other(
    fenced: bool, model: Model, fails: bool
) -> None:
    verdict = explore(store_buffering(fenced), model)
    assert bool(verdict.n_failing) is fails


def test_every_interleaving_on_sc_is_counted_once() -> None:
    verdict = explore(store_buffering(fenced=False))
    assert (verdict.n_schedules, verdict.n_failing) == (6, 0)


@pytest.mark.parametrize("model", Model)
def test_stores_of_one_process_become_visible_in_order(model: Model) -> None:
    assert explore(message_passing(), model).n_failing == 0


def test_a_failing_schedule_is_shortest_and_can_be_replayed() -> None:
    program = store_buffering(fenced=False)
    verdict = explore(program, Model.TSO)
    assert verdict.reason == "both read 0"
    end = run_schedule(program, verdict.failure, Model.TSO)
    assert end.results == {"P": 0, "Q": 0}
    assert end.memory == {X: 1, Y: 1}


@pytest.mark.parametrize("schedule", ["P*Q*p*q*", "P2 Q2 p q", "P>y Q>x PQ pq"])
def test_a_schedule_can_be_written_in_several_ways(schedule: str) -> None:
    end = run_schedule(store_buffering(fenced=False), schedule, Model.TSO)
    assert end.results == {"P": 0, "Q": 0}


def test_with_an_exclamation_mark_a_process_drains_as_it_goes() -> None:
    end = run_schedule(store_buffering(fenced=True), "P!>=x P!* Q!*", Model.TSO)
    assert end.results == {"P": 0, "Q": 1}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("P!* Q", "the schedule ends before P: its end, 0 stores waiting; Q: fence, 1 stores"),
        ("R", "no such step: 'R'"),
        ("P!>z Q*", "P ended before >z"),
        ("P!4 Q*", "P ended before 4"),
        ("p P* Q*", "P has 0 stores waiting, not 1"),
        ("P* Q*", "P is blocked at fence"),
    ],
)
def test_an_impossible_schedule_says_where_it_fails(schedule: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        run_schedule(store_buffering(fenced=True), schedule, Model.TSO)


def locked(order: str) -> Program:
    def process(memory: StepMemory, order: str) -> None:
        for at in order:
            memory.lock(memory, int(at))
        memory[3] = memory[3] + 1
        for at in order:
            memory.unlock(memory, int(at))

    def judge(end: End) -> str | None:
        return None if end.memory[3] == 2 else f"counted {end.memory[3]}"

    return Program(
        {"P": lambda memory: process(memory, "12"), "Q": lambda memory: process(memory, order)},
        judge,
    )


@pytest.mark.parametrize("model", Model)
def test_locks_exclude_and_locks_taken_crosswise_deadlock(model: Model) -> None:
    assert explore(locked("12"), model).n_failing == 0
    crosswise = explore(locked("21"), model)
    assert crosswise.n_failing > 0
    assert crosswise.reason == "deadlock"


def test_an_enumeration_beyond_its_limit_says_so() -> None:
    with pytest.raises(OverflowError, match="more than 3 states"):
        explore(store_buffering(fenced=False), limit=3)


def test_a_process_is_named_by_one_capital_letter() -> None:
    with pytest.raises(ValueError, match="not 'p1'"):
        explore(Program({"p1": lambda memory: memory[X]}, nothing))


def test_a_random_walk_returns_a_schedule_that_replays_to_the_same_end() -> None:
    program = store_buffering(fenced=False)
    draw = random.Random(7)
    for _ in range(20):
        end, schedule = wander(program, draw.randrange, Model.TSO)
        assert run_schedule(program, schedule, Model.TSO) == end
