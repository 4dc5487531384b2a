"""Worker processes under one fabric: real parallelism, real deaths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import hammer
import pytest
from hammer import HANG, N_ENTRIES, SPAWN, Crew, derive, received, stored

from penumbra.actors.core.shared_words import stores_are_ordered
from penumbra.actors.processes import Plan, SeatTaken, Worker, WorkerFabric

pytestmark = pytest.mark.skipif(
    not stores_are_ordered(), reason="plain stores have no order on this machine"
)


@contextmanager
def crew_of(n: int, capacity: int = 64, coalesces: bool = False) -> Iterator[Crew]:
    """Make a fabric for `hammer`'s workers; kill at the end whoever still runs."""
    primary = hammer.primary_words(n)
    with WorkerFabric(n, primary, capacity=capacity, coalesces=coalesces) as fabric:
        crew = Crew(fabric)
        try:
            yield crew
        finally:
            crew.stop()


@pytest.fixture
def fabric() -> Iterator[WorkerFabric]:
    with WorkerFabric(3, 8, capacity=2) as made:
        yield made


@contextmanager
def workers(fabric: WorkerFabric, *seats: int) -> Iterator[list[Worker]]:
    """Sit down in this process."""
    made = [Worker(fabric.seat(index), derive) for index in seats]
    try:
        yield made
    finally:
        for worker in made:
            worker.leave()


# ---- between processes ---------------------------------------------------------------------------


@pytest.mark.shows("P7", "P10", "A40c 55", "A40c 56", "A40c 65", "A40c 66", "A40c 71", "A40c 72")
@pytest.mark.parametrize("coalesces", [False, True], ids=["unfenced", "fenced"])
@pytest.mark.parametrize("capacity", [1, 64])
def test_two_processes_hammer_one_channel_and_nothing_is_lost_or_torn(
    capacity: int, coalesces: bool
) -> None:
    n_stores, paced_by = (20_000, -1) if capacity == 1 else (4_000, 1)
    with crew_of(2, capacity, coalesces) as crew:
        report = crew.start_consumer(1, (0,), n_stores)
        crew.start(hammer.store_all, 0, n_stores, paced_by)
        seen = received(report)
        crew.end()
    assert (seen.torn, seen.lost, seen.differing) == ([], [], [])
    assert seen.n_events > 10
    if capacity == 1:
        assert seen.n_drops > 0, "no overflow: not the case this is about"
    else:
        assert seen.n_taken > 0, "no derived value was ever used: nothing could be torn"


@pytest.mark.shows("P7", "P6")
def test_a_killed_producer_costs_the_others_nothing_and_its_seat_is_taken_again() -> None:
    n_stores = 8_000
    with crew_of(3) as crew:
        report = crew.start_consumer(2, (0, 1), n_stores)
        ours, theirs = SPAWN.Pipe()
        victim = crew.start(hammer.store_forever, 0, 500, theirs)
        crew.start(hammer.store_all, 1, n_stores)
        assert received(ours) == 500
        crew.kill(victim)
        crew.fabric.bury(0)
        crew.start(hammer.store_all, 0, n_stores)
        seen = received(report)
        crew.end()
    assert (seen.torn, seen.lost, seen.differing) == ([], [], [])
    assert seen.n_drops > 0


@pytest.mark.shows("P7", "P6")
def test_a_killed_consumer_holds_up_nobody_and_its_successor_starts_empty() -> None:
    n_stores = 4_000
    with crew_of(2, capacity=4) as crew:
        ours, theirs = SPAWN.Pipe()
        victim = crew.start(hammer.consume_forever, 1, theirs)
        received(ours)
        crew.kill(victim)
        crew.start(hammer.store_all, 0, n_stores).join(HANG)
        with pytest.raises(SeatTaken, match=f"seat 1 is held by process {victim.pid}"):
            Worker(crew.fabric.seat(1), derive)
        crew.fabric.bury(1)
        with workers(crew.fabric, 1) as [successor]:
            assert successor.derived == {}
            successor.event()
            values = [stored(successor.read(entry)) for entry in range(N_ENTRIES)]
        crew.end()
    assert values == [hammer.last_store(0, entry, n_stores) for entry in range(N_ENTRIES)]


@pytest.mark.shows("P6", "P9")
def test_a_store_whose_producer_was_killed_in_it_is_seen_before_and_after_the_burial() -> None:
    with crew_of(2) as crew, workers(crew.fabric, 1) as [worker]:
        assert worker.read(3) == 0
        ours, theirs = SPAWN.Pipe()
        victim = crew.start(hammer.die_in_a_store, 0, 3, 77, theirs)
        assert received(ours) == 77
        crew.kill(victim)
        assert not worker.consumer.is_rung
        for _ in range(2):
            worker.event()
            assert stored(worker.derived[3]) == 77
        assert worker.n_drops == 0
        crew.fabric.bury(0)
        worker.event()
        assert (worker.n_drops, worker.derived) == (1, {})
        assert worker.consumer.is_empty
        assert stored(worker.read(3)) == 77


@pytest.mark.shows("P7")
def test_whoever_sleeps_is_woken_by_every_store() -> None:
    n_rounds = 1_000
    with crew_of(2) as crew, workers(crew.fabric, 0) as [worker]:
        crew.start(hammer.echo, 1, n_rounds)
        for i in range(1, n_rounds + 1):
            worker.store(0, i)
            while stored(worker.read(1)) < i:
                assert worker.wait(HANG, n_polls=0), f"round {i}: not woken"
                worker.event()
        crew.end()


@pytest.mark.shows("K5")
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_whoever_sleeps_in_an_event_loop_is_woken_there(loop: str) -> None:
    n_rounds = 50
    with crew_of(2) as crew, workers(crew.fabric, 0) as [worker]:
        crew.start(hammer.echo, 1, n_rounds)

        async def play() -> None:
            for i in range(1, n_rounds + 1):
                worker.store(0, i)
                while stored(worker.read(1)) < i:
                    with anyio.fail_after(HANG):
                        await worker.wait_news(n_polls=0)
                    worker.event()

        anyio.run(play, backend=loop)
        crew.end()


# ---- one process, several seats ------------------------------------------------------------------


@pytest.mark.shows("P11")
def test_a_store_reaches_the_others_at_their_events_and_its_own_worker_at_once(
    fabric: WorkerFabric,
) -> None:
    with workers(fabric, 0, 1, 2) as [first, second, third]:
        for worker in (first, second):
            assert worker.read(5) == 0
        first.store(5, 9)
        assert [w.derived.get(5) for w in (first, second, third)] == [derive(9), 0, None]
        second.event(lambda entry: entry != 5)
        assert second.derived == {5: 0}
        second.event()
        third.event()
        assert [w.derived for w in (second, third)] == [{5: derive(9)}, {}]
        assert (second.n_taken, third.n_taken) == (1, 0)


@pytest.mark.shows("P9")
def test_a_value_derived_by_one_worker_is_not_taken_after_another_has_stored(
    fabric: WorkerFabric,
) -> None:
    with workers(fabric, 0, 1, 2) as [first, second, third]:
        third.read(5)
        second.store(5, 1)
        first.store(5, 2)  # its channel is read first
        third.event()
        assert third.derived == {5: derive(2)}
        assert (third.n_taken, third.n_derived) == (1, 2)


@pytest.mark.shows("P10")
def test_a_full_channel_makes_its_consumer_drop_all_and_holds_up_nobody(
    fabric: WorkerFabric,
) -> None:
    with workers(fabric, 0, 1) as [first, second]:
        assert second.read(7) == 0
        for i in range(1, 9):
            first.store(6, i)
        second.event()
        assert (second.derived, second.n_drops) == ({}, 1)
        first.store(6, 9)
        assert stored(second.read(6)) == 9
        second.event()
        assert second.n_drops == 1


def test_waiting_ends_at_news_at_old_news_and_when_time_is_over(fabric: WorkerFabric) -> None:
    with workers(fabric, 0, 1) as [first, second]:
        second.event()
        assert second.wait(0) is False
        first.store(0, 1)
        assert second.wait(0) is True
        second.event()
        assert second.wait(0, n_polls=0) is False


@pytest.mark.parametrize(
    ("entry", "value", "error"),
    [(-1, 0, IndexError), (8, 0, IndexError), (0, -1, ValueError), (0, 1 << 64, ValueError),
     (0, 1.5, TypeError), (0, "1", TypeError)],
)  # fmt: skip
def test_a_store_of_what_is_no_word_stores_nothing(
    fabric: WorkerFabric, entry: int, value: int, error: type[Exception]
) -> None:
    with workers(fabric, 0, 1) as [first, second]:
        with pytest.raises(error):
            first.store(entry, value)
        assert fabric.primary.tolist() == [0] * 8
        assert second.consumer.is_empty
        first.store(0, 1)


def test_a_derived_value_that_is_no_word_stores_nothing(fabric: WorkerFabric) -> None:
    worker = Worker(fabric.seat(0), lambda value: -value)
    with pytest.raises(ValueError, match="derived value -0x2: not an unsigned 64-bit word"):
        worker.store(0, 2)
    assert worker.primary[0] == 0
    worker.leave()


@pytest.mark.shows("P6")
@pytest.mark.parametrize("fails", ["covers", "derive"])
def test_an_event_that_fails_half_way_leaves_nothing_derived_that_could_be_stale(
    fabric: WorkerFabric, fails: str
) -> None:
    failing = False

    def fragile(value: int) -> int:
        if failing and fails == "derive":
            raise OSError("fragile")
        return derive(value)

    def covers(entry: int) -> bool:
        if failing and fails == "covers" and entry == 1:
            raise OSError("fragile")
        return True

    worker = Worker(fabric.seat(1), fragile)
    with workers(fabric, 0, 2) as [first, third]:
        for entry in range(3):
            worker.read(entry)
        third.store(1, 8)
        first.store(0, 9)
        first.store(1, 9)
        third.store(2, 8)
        failing = True
        with pytest.raises(OSError, match="fragile"):
            worker.event(covers)
        failing = False
        assert worker.derived == {}
        worker.event(covers)
        values = [stored(worker.read(entry)) for entry in range(3)]
        first.store(0, 10)
        worker.event(covers)
        values.append(stored(worker.derived[0]))
    assert values == [9, 9, 8, 10]
    worker.leave()


def test_a_primary_word_that_is_none_is_not_read(fabric: WorkerFabric) -> None:
    with workers(fabric, 0) as [worker]:
        for entry in (-1, 8):
            with pytest.raises(IndexError, match=f"no primary word {entry} among 8"):
                worker.read(entry)
        assert worker.derived == {}


def test_a_seat_is_one_workers_until_it_leaves(fabric: WorkerFabric) -> None:
    with workers(fabric, 0), pytest.raises(SeatTaken, match="seat 0 is held by process"):
        Worker(fabric.seat(0), derive)
    with workers(fabric, 0) as [worker]:
        assert worker.derived == {}


def test_a_fabric_without_seats_or_words_is_refused() -> None:
    for n, n_primary, capacity in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            Plan(n, n_primary, capacity, coalesces=False)
    with WorkerFabric(1, 1) as fabric:
        for index in (-1, 1):
            with pytest.raises(IndexError, match=f"no seat {index} in a fabric of 1"):
                fabric.seat(index)
            with pytest.raises(IndexError, match=f"no seat {index} in a fabric of 1"):
                fabric.bury(index)
