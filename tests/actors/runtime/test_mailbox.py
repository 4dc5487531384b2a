"""A mailbox loses nothing it accepted, however senders and the consumer are cancelled or closed."""

from __future__ import annotations

import random

import anyio
import anyio.lowlevel
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.actors.runtime import Closed, Mailbox, MailboxStatistics, Outcome

pytestmark = pytest.mark.anyio


class Note(msgspec.Struct, array_like=True):
    sender: int
    n: int


class Letter(msgspec.Struct, array_like=True):
    pages: list[int]


def notes(*numbers: int, sender: int = 0) -> list[Note]:
    """Return one note per number."""
    return [Note(sender, n) for n in numbers]


def numbers(batch: list[Note]) -> list[int]:
    """Return what the notes of a batch say."""
    return [note.n for note in batch]


def test_an_offer_is_accepted_until_the_box_is_full() -> None:
    box = Mailbox[Note](Note, bound=2)
    outcomes = [box.offer(note) for note in notes(1, 2, 3)]
    assert outcomes == [Outcome.ACCEPTED, Outcome.ACCEPTED, Outcome.FULL]
    assert [bool(outcome) for outcome in outcomes] == [True, True, False]
    assert box.drain_nowait() == notes(1, 2)
    assert box.statistics() == MailboxStatistics(
        offered=3,
        accepted=2,
        delivered=2,
        refused=1,
        control=0,
        depth=0,
        peak_depth=2,
        wakes=0,
        parked=0,
    )


@pytest.mark.shows("K2")
def test_a_message_is_what_it_was_when_it_was_offered() -> None:
    box = Mailbox[Letter](Letter)
    letter = Letter([1])
    box.offer(letter)
    letter.pages.append(2)
    box.offer_control(letter)
    letter.pages.append(3)
    assert box.drain_nowait() == [Letter([1, 2]), Letter([1])]


@pytest.mark.shows("K2")
async def test_a_message_is_what_it_was_when_its_sender_began_to_wait() -> None:
    box = Mailbox[Letter](Letter, bound=1)
    letter = Letter([1])
    await box.send(letter)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(box.send, letter)
        await anyio.wait_all_tasks_blocked()
        letter.pages.append(2)
        assert await box.drain() == [Letter([1])]
        assert await box.drain() == [Letter([1])]


def test_control_messages_pass_a_full_box_and_come_out_first() -> None:
    box = Mailbox[Note](Note, bound=2)
    for note in notes(1, 2):
        box.offer(note)
    assert box.offer(Note(0, 3)) is Outcome.FULL
    assert [box.offer_control(note) for note in notes(7, 8, 9)] == [
        Outcome.ACCEPTED,
        Outcome.ACCEPTED,
        Outcome.FULL,
    ]
    box.check()
    assert numbers(box.drain_nowait()) == [7, 8, 1, 2]
    seen = box.statistics()
    assert (seen.control, seen.delivered, seen.refused, seen.peak_depth) == (2, 4, 2, 4)


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Mailbox[Note](Note, bound=0)


async def test_one_wake_takes_the_whole_box() -> None:
    box = Mailbox[Note](Note)
    batches: list[list[Note]] = []

    async def consume() -> None:
        while batch := await box.drain():
            batches.append(batch)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        for start in (0, 10, 20):
            await anyio.wait_all_tasks_blocked()
            for n in range(start, start + 10):
                box.offer(Note(0, n))
        await anyio.wait_all_tasks_blocked()
        box.close()
    assert [numbers(batch) for batch in batches] == [
        list(range(start, start + 10)) for start in (0, 10, 20)
    ]
    # Three for thirty messages, and one for the end.
    assert box.statistics().wakes == 4


async def test_a_sender_waits_for_room_and_goes_on_when_the_consumer_made_some() -> None:
    box = Mailbox[Note](Note, bound=2)
    seen: list[Note] = []
    async with anyio.create_task_group() as tasks:

        async def send_all() -> None:
            for note in notes(*range(5)):
                await box.send(note)
            box.close()

        tasks.start_soon(send_all)
        await anyio.wait_all_tasks_blocked()
        assert (box.statistics().depth, box.statistics().parked) == (2, 1)
        box.check()
        while batch := await box.drain():
            assert len(batch) <= 2
            seen += batch
    assert seen == notes(*range(5))


async def test_senders_that_wait_are_served_in_their_order_and_not_overtaken() -> None:
    box = Mailbox[Note](Note, bound=1)
    box.offer(Note(0, 0))
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        for sender in (1, 2, 3):
            tasks.start_soon(box.send, Note(sender, 0))
            await anyio.wait_all_tasks_blocked()
        while len(seen) < 4:
            seen += [note.sender for note in box.drain_nowait()]
            box.check()
            if len(seen) < 4:  # who waits has moved up at once: there is no room to overtake
                assert box.offer(Note(9, 9)) is Outcome.FULL
    assert seen == [0, 1, 2, 3]


async def test_many_senders_lose_nothing_and_keep_each_its_order() -> None:
    box = Mailbox[Note](Note, bound=4)
    seen: list[Note] = []
    n_open = 10

    async def send_all(sender: int) -> None:
        nonlocal n_open
        for n in range(50):
            await box.send(Note(sender, n))
        n_open -= 1
        if not n_open:
            box.close()

    async with anyio.create_task_group() as tasks:
        for sender in range(10):
            tasks.start_soon(send_all, sender)
        while batch := await box.drain():
            assert len(batch) <= 4
            seen += batch
            box.check()
    assert sorted(seen, key=lambda note: note.sender) == [
        Note(sender, n) for sender in range(10) for n in range(50)
    ]
    assert box.statistics().delivered == box.statistics().offered == 500


@pytest.mark.shows("K4")
async def test_a_sender_cancelled_while_it_waits_has_not_sent() -> None:
    box = Mailbox[Note](Note, bound=1)
    box.offer(Note(0, 0))
    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def send(note: Note) -> None:
            with scope:
                await box.send(note)

        tasks.start_soon(send, Note(1, 1))
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(box.send, Note(2, 2))
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        box.check()
        assert await box.drain() == [Note(0, 0)]
        assert await box.drain() == [Note(2, 2)]
    seen = box.statistics()
    assert (seen.offered, seen.delivered, seen.refused, seen.depth) == (3, 2, 1, 0)


async def test_a_sender_passes_a_checkpoint_once_per_bound() -> None:
    box = Mailbox[Note](Note, bound=8)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1
            box.drain_nowait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        await anyio.lowlevel.checkpoint()
        turns = 0
        for n in range(80):
            await box.send(Note(0, n))
        assert 9 <= turns <= 30
        tasks.cancel_scope.cancel()


@pytest.mark.shows("K4")
async def test_a_sender_cancelled_at_its_periodic_checkpoint_has_not_sent() -> None:
    box = Mailbox[Note](Note, bound=4)
    n_sent = 0
    with anyio.CancelScope() as scope:
        scope.cancel()
        while True:
            await box.send(Note(0, n_sent))
            n_sent += 1
            box.drain_nowait()
    assert n_sent == 4
    seen = box.statistics()
    assert (seen.offered, seen.delivered, seen.refused) == (5, 4, 1)


@pytest.mark.shows("K4")
async def test_a_consumer_cancelled_while_it_waits_has_taken_nothing() -> None:
    box = Mailbox[Note](Note)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await box.drain()
    box.offer(Note(0, 1))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await box.drain()
    assert scope.cancelled_caught
    box.check()
    assert await box.drain() == [Note(0, 1)]


async def test_two_tasks_cannot_wait_for_the_same_messages() -> None:
    box = Mailbox[Note](Note)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(box.drain)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await box.drain()
        box.close()


async def test_a_closed_box_takes_no_more_but_gives_what_it_has() -> None:
    box = Mailbox[Note](Note, name="porch")
    box.offer(Note(0, 1))
    box.close()
    for offer in (box.offer, box.offer_control):
        with pytest.raises(Closed, match="'porch' is closed"):
            offer(Note(0, 2))
    with pytest.raises(Closed):
        await box.send(Note(0, 3))
    assert await box.drain() == [Note(0, 1)]
    assert await box.drain() == []
    box.close()
    assert box.statistics() == MailboxStatistics(
        offered=4,
        accepted=1,
        delivered=1,
        refused=3,
        control=0,
        depth=0,
        peak_depth=1,
        wakes=0,
        parked=0,
    )


async def test_closing_wakes_all_who_wait() -> None:
    full, empty = Mailbox[Note](Note, bound=1), Mailbox[Note](Note)
    full.offer(Note(0, 0))
    ended: list[str] = []

    async def send(name: str) -> None:
        with pytest.raises(Closed):
            await full.send(Note(0, 1))
        ended.append(name)

    async def drain() -> None:
        assert await empty.drain() == []
        ended.append("consumer")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send, "first")
        tasks.start_soon(send, "second")
        tasks.start_soon(drain)
        await anyio.wait_all_tasks_blocked()
        full.close()
        empty.close()
        full.check()
        empty.check()
    assert sorted(ended) == ["consumer", "first", "second"]
    seen = full.statistics()
    assert (seen.offered, seen.refused, seen.depth, seen.parked) == (3, 2, 1, 0)


# Both event loops by hand: Hypothesis and a test that is a coroutine do not go together.
@pytest.mark.parametrize("backend", ["trio", "asyncio"])
@settings(max_examples=30, deadline=None)
@given(
    bound=st.integers(1, 5),
    n_senders=st.integers(1, 5),
    seed=st.integers(0, 1 << 32),
    closes=st.booleans(),
)
@pytest.mark.shows("K4")
def test_every_message_is_delivered_or_queued_or_refused_whoever_is_cancelled(
    backend: str, bound: int, n_senders: int, seed: int, closes: bool
) -> None:
    called, delivered, queued, refused = anyio.run(
        _storm, bound, n_senders, seed, closes, backend=backend
    )
    assert called == delivered + queued + refused


async def _storm(bound: int, n_senders: int, seed: int, closes: bool) -> tuple[int, int, int, int]:
    """Send from several tasks that give up at random; count calls by hand, on both ends."""
    box = Mailbox[Note](Note, bound=bound)
    draw = random.Random(seed)
    called = delivered = refused = 0

    async def send_one(note: Note) -> None:
        nonlocal called, refused
        called += 1
        accepted = False
        try:
            if draw.random() < 0.3:
                accepted = bool(box.offer(note))
            else:
                await box.send(note)
                accepted = True
        except Closed:
            pass
        finally:
            refused += not accepted
            box.check()

    async def send_some(sender: int) -> None:
        for n in range(draw.randrange(20)):
            with anyio.CancelScope() as scope:
                if draw.random() < 0.3:
                    scope.cancel()
                await send_one(Note(sender, n))

    async def drain_some() -> None:
        nonlocal delivered
        for _ in range(draw.randrange(20)):
            with anyio.CancelScope() as scope:
                if draw.random() < 0.3:
                    scope.cancel()
                delivered += len(await box.drain())
            box.check()
        if closes:
            box.close()

    async with anyio.create_task_group() as tasks:
        for sender in range(n_senders):
            tasks.start_soon(send_some, sender)
        tasks.start_soon(drain_some)
        for _ in range(100):  # more turns than there are messages: whoever waits now waits on
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    box.check()
    seen = box.statistics()
    assert (seen.offered, seen.delivered, seen.refused) == (called, delivered, refused)
    return called, delivered, seen.depth, refused
