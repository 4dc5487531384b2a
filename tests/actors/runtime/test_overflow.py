"""A receiver says what its full box means; whatever it says, every message is in one place."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias

import anyio
import anyio.lowlevel
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penumbra.actors.runtime import (
    SHOOT_DOWN,
    WAIT,
    Actor,
    ActorRef,
    ActorSystem,
    AsyncActor,
    Closed,
    Coalesce,
    Full,
    Mailbox,
    Outcome,
    RestartPolicy,
)


class Pixel(msgspec.Struct, array_like=True, tag=1):
    place: int
    colour: int


class Clear(msgspec.Struct, array_like=True, tag=2):
    pass


class Seen(msgspec.Struct, array_like=True):
    n: int


def place_of(message: Pixel | Clear) -> Hashable | None:
    """Return which pixel a message is about; Clear is about all."""
    return message.place if isinstance(message, Pixel) else None


def pixels(*pairs: tuple[int, int]) -> list[Pixel | Clear]:
    """Return one pixel per pair."""
    return [Pixel(place, colour) for place, colour in pairs]


class Screen(Actor[Pixel | Clear, Seen]):
    """Note what it is told; do something more, once, when it is told of pixel 99."""

    def __init__(self) -> None:
        self.seen: list[Pixel | Clear] = []
        self.during: Callable[[], object] = lambda: None

    def receive(self, message: Pixel | Clear) -> Seen:
        self.seen.append(message)
        if message == Pixel(99, 0):
            self.during()
        if message == Pixel(13, 13):
            raise ZeroDivisionError
        return Seen(len(self.seen))


class Latest(Screen):
    overflow = Coalesce(place_of)


class Eager(Screen):
    overflow = SHOOT_DOWN


class Both(Screen):
    overflow = Coalesce(place_of, full=SHOOT_DOWN)


Ref: TypeAlias = ActorRef[Pixel | Clear, Seen]


# By key.


def test_a_later_message_takes_the_place_of_the_queued_one_of_its_key() -> None:
    box = Mailbox[Pixel | Clear](Pixel | Clear, bound=2, overflow=Coalesce(place_of))
    outcomes = [box.offer(p) for p in pixels((1, 1), (2, 1), (1, 2), (3, 1), (2, 2))]
    assert outcomes == [
        Outcome.ACCEPTED,
        Outcome.ACCEPTED,
        Outcome.COALESCED,
        Outcome.FULL,
        Outcome.COALESCED,
    ]
    assert [bool(outcome) for outcome in outcomes] == [True, True, True, False, True]
    box.check()
    seen = box.statistics()
    assert (seen.offered, seen.coalesced, seen.refused, seen.depth) == (5, 2, 1, 2)
    assert box.drain_nowait() == pixels((1, 2), (2, 2))
    assert box.offer(Pixel(1, 3)) is Outcome.ACCEPTED


def test_a_message_without_a_key_is_a_fence() -> None:
    box = Mailbox[Pixel | Clear](Pixel | Clear, overflow=Coalesce(place_of))
    for message in (Pixel(1, 1), Clear(), Pixel(1, 2), Pixel(1, 3)):
        box.offer(message)
    box.offer_control(Pixel(1, 4))
    box.offer_control(Pixel(1, 5))
    assert box.drain_nowait() == [
        *pixels((1, 4), (1, 5), (1, 1)),
        Clear(),
        Pixel(1, 3),
    ]


def test_a_mailbox_cannot_shoot_down_and_an_async_actor_cannot_be_shot_down() -> None:
    for policy in (SHOOT_DOWN, Coalesce(place_of, full=SHOOT_DOWN)):
        with pytest.raises(ValueError, match="has no handler"):
            Mailbox[Pixel](Pixel, overflow=policy)
        with pytest.raises(TypeError, match="cannot be shot down"):

            class Slow(AsyncActor[Pixel, Seen]):
                overflow = policy


class KeyedMailbox(RuleBasedStateMachine):
    """A mailbox against a list whose entry of the same key, after the last fence, is replaced."""

    @initialize(bound=st.integers(1, 4))
    def open(self, bound: int) -> None:
        self.box = Mailbox[Pixel | Clear](Pixel | Clear, bound=bound, overflow=Coalesce(place_of))
        self.bound = bound
        self.model: list[Pixel | Clear] = []
        self.n_offered = 0
        self.n_fixed = 0

    @rule(place=st.integers(0, 4), colour=st.integers(0, 99))
    def offer(self, place: int, colour: int) -> None:
        self.n_offered += 1
        outcome = self.box.offer(Pixel(place, colour))
        clears = [i + 1 for i, m in enumerate(self.model) if isinstance(m, Clear)]
        for i in range(max([self.n_fixed, *clears]), len(self.model)):
            if place_of(self.model[i]) == place:
                self.model[i] = Pixel(place, colour)
                assert outcome is Outcome.COALESCED
                return
        if len(self.model) < self.bound:
            self.model.append(Pixel(place, colour))
            assert outcome is Outcome.ACCEPTED
        else:
            assert outcome is Outcome.FULL

    @rule()
    def clear(self) -> None:
        self.n_offered += 1
        if self.box.offer(Clear()):
            self.model.append(Clear())

    @rule()
    def take_one(self) -> None:
        if self.model:
            assert self.box._box.take_one() == self.model.pop(0)
            self.n_fixed = max(self.n_fixed - 1, 0)

    @rule()
    def take_one_and_hand_it_back(self) -> None:
        if self.model:
            self.box._box.hand_back([self.box._box.take_one()])

    @rule(n_served=st.integers(0, 4))
    def take_all_and_hand_back_the_rest(self, n_served: int) -> None:
        batch = self.box._box.take_all()
        assert batch == self.model
        self.box._box.hand_back(batch[n_served:])
        self.model = batch[n_served:]
        self.n_fixed = len(self.model)  # what is handed back is not replaced any more

    @invariant()
    def every_message_is_in_one_place(self) -> None:
        self.box.check()
        assert self.box.statistics().offered == self.n_offered
        assert self.box._items == self.model


TestKeyedMailbox = KeyedMailbox.TestCase
TestKeyedMailbox.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.anyio
async def test_a_sender_that_waited_replaces_what_was_queued_meanwhile() -> None:
    box = Mailbox[Pixel | Clear](Pixel | Clear, bound=1, overflow=Coalesce(place_of))
    box.offer(Pixel(1, 1))
    async with anyio.create_task_group() as tasks:
        for colour in (1, 2, 3):
            tasks.start_soon(box.send, Pixel(2, colour))
            await anyio.wait_all_tasks_blocked()
        assert await box.drain() == pixels((1, 1))
        await anyio.wait_all_tasks_blocked()
        box.check()
        assert await box.drain() == pixels((2, 1))
        assert await box.drain() == pixels((2, 2))
        assert await box.drain() == pixels((2, 3))
    assert box.statistics().offered == 4


@pytest.mark.anyio
async def test_a_sender_to_keys_passes_a_checkpoint_once_per_bound() -> None:
    box = Mailbox[Pixel | Clear](Pixel | Clear, bound=8, overflow=Coalesce(place_of))
    with anyio.CancelScope() as scope:
        scope.cancel()
        for n in range(100):
            await box.send(Pixel(0, n))
    assert scope.cancelled_caught
    seen = box.statistics()
    assert (seen.offered, seen.coalesced, seen.refused, seen.depth) == (9, 7, 1, 1)


@pytest.mark.anyio
async def test_a_question_sees_what_was_told_before_it_and_nothing_after() -> None:
    screen = Latest()
    async with ActorSystem("s") as system:
        ref = system.spawn(screen)
        answers: list[int] = []

        async def ask() -> None:
            answers.append((await ref.ask(Clear(), inline=False)).n)

        async with anyio.create_task_group() as tasks:
            screen.during = lambda: [ref.offer(p) for p in pixels((1, 1), (1, 2))]
            ref.offer(Pixel(99, 0))
            await system.wait_quiet()
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
        assert screen.seen == [Pixel(99, 0), Pixel(1, 2), Clear()]
        assert answers == [3]


# Shootdown.


@pytest.mark.anyio
@pytest.mark.shows("K3")
async def test_a_full_box_is_served_on_the_stack_of_who_finds_it_full() -> None:
    screen = Eager()
    async with ActorSystem("s") as system:
        ref = system.spawn(screen, bound=2)
        outcomes = [ref.offer(p) for p in pixels((1, 1), (2, 2), (3, 3), (4, 4))]
        assert outcomes == [
            Outcome.ACCEPTED,
            Outcome.ACCEPTED,
            Outcome.SHOT_DOWN,
            Outcome.ACCEPTED,
        ]
        assert screen.seen == pixels((1, 1), (2, 2), (3, 3))
        ref.check()
        await system.wait_quiet()
        seen = ref.statistics().mailbox
        assert (seen.offered, seen.delivered, seen.shot_down, seen.refused) == (4, 3, 1, 0)


@pytest.mark.anyio
@pytest.mark.shows("K3")
async def test_coalescing_comes_before_the_shootdown() -> None:
    screen = Both()
    async with ActorSystem("s") as system:
        ref = system.spawn(screen, bound=2)
        for pixel in pixels((1, 1), (2, 1), (1, 2), (2, 2)):
            ref.offer(pixel)
        assert screen.seen == []
        assert ref.offer(Pixel(3, 1)) is Outcome.SHOT_DOWN
        assert screen.seen == pixels((1, 2), (2, 2), (3, 1))
        seen = ref.statistics().mailbox
        assert (seen.offered, seen.delivered, seen.coalesced, seen.shot_down) == (5, 2, 2, 1)


@pytest.mark.anyio
@pytest.mark.shows("K3")
async def test_overflow_of_oneself_and_of_each_other_ends_and_says_so() -> None:
    here, there = Eager(), Eager()
    outcomes: list[Outcome] = []
    async with ActorSystem("s") as system:
        ref_here = system.spawn(here, bound=1)
        ref_there = system.spawn(there, bound=1)

        def flood(ref: Ref) -> None:
            outcomes.extend(ref.offer(Pixel(n, 0)) for n in range(3))

        def flood_both() -> None:
            flood(ref_here)
            ref_there.offer(Pixel(99, 0))
            flood(ref_there)

        here.during = flood_both
        there.during = lambda: flood(ref_here)
        ref_here.offer(Pixel(99, 0))
        await system.wait_quiet()
        # Itself: one fits. The other: served at once, where its own flood finds us on the stack.
        assert outcomes == [
            *(Outcome.ACCEPTED, Outcome.FULL, Outcome.FULL),
            *(Outcome.FULL,) * 3,
            *(Outcome.SHOT_DOWN, Outcome.ACCEPTED, Outcome.SHOT_DOWN),
        ]
        for ref, screen in ((ref_here, here), (ref_there, there)):
            ref.check()
            seen = ref.statistics().mailbox
            assert len(screen.seen) == seen.delivered + seen.shot_down


@pytest.mark.anyio
@pytest.mark.shows("K3", "K4")
async def test_a_failure_met_in_a_shootdown_is_the_receivers_and_nothing_is_lost() -> None:
    screens: list[Eager] = []

    def make() -> Eager:
        screens.append(Eager())
        return screens[-1]

    async with ActorSystem("s", listener=lambda _report: None) as system:
        ref = system.supervise("top", RestartPolicy(max_restarts=9)).spawn(make, bound=2)
        for pixel in pixels((1, 1), (13, 13)):
            ref.offer(pixel)
        assert ref.offer(Pixel(2, 2)) is Outcome.ACCEPTED  # behind the one that failed
        await system.wait_quiet()
        for pixel in pixels((3, 3), (4, 4)):
            ref.offer(pixel)
        assert ref.offer(Pixel(13, 13)) is Outcome.SHOT_DOWN  # and failed
        assert ref.offer(Pixel(5, 5)) is Outcome.ACCEPTED
        await system.wait_quiet()
        ref.check()
        seen = ref.statistics().mailbox
        assert (seen.offered, seen.delivered, seen.shot_down) == (7, 6, 1)
    assert [screen.seen for screen in screens] == [
        pixels((1, 1), (13, 13)),
        pixels((2, 2), (3, 3), (4, 4), (13, 13)),
        pixels((5, 5)),
    ]


@pytest.mark.anyio
@pytest.mark.shows("K3")
async def test_a_sender_shoots_down_after_a_checkpoint_and_does_not_wait() -> None:
    screen = Eager()
    async with ActorSystem("s") as system:
        ref = system.spawn(screen, bound=1)
        for n in range(10):
            await ref.send(Pixel(n, n))
        with anyio.CancelScope() as scope:
            ref.offer(Pixel(10, 10))
            scope.cancel()
            await ref.send(Pixel(11, 11))
        assert scope.cancelled_caught
        await system.wait_quiet()
        seen = ref.statistics().mailbox
        assert (seen.offered, seen.refused, seen.parked) == (12, 1, 0)
        assert seen.delivered + seen.shot_down == 11
    assert screen.seen == pixels(*((n, n) for n in range(11)))


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([Screen, Latest, Eager, Both]),
    bound=st.integers(1, 4),
    messages=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30),
)
@pytest.mark.shows("K3")
def test_whatever_the_policy_the_last_of_each_key_arrives_and_all_is_counted(
    backend: str, kind: type[Screen], bound: int, messages: list[tuple[int, bool]]
) -> None:
    screen = kind()

    async def main() -> None:
        async with ActorSystem("s") as system:
            ref = system.spawn(screen, bound=bound)
            for colour, (place, waits) in enumerate(messages):
                if waits or not ref.offer(Pixel(place, colour)):
                    await ref.send(Pixel(place, colour))
                ref.check()
            await system.wait_quiet()
            seen = ref.statistics().mailbox
            assert seen.delivered + seen.shot_down == len(screen.seen)
            assert seen.offered == len(screen.seen) + seen.coalesced + seen.refused
            assert len(messages) == len(screen.seen) + seen.coalesced
            ref.close()
            with pytest.raises(Closed):
                ref.offer(Clear())

    anyio.run(main, backend=backend)
    last = {place: colour for colour, (place, _) in enumerate(messages)}
    arrived = {p.place: p.colour for p in screen.seen if isinstance(p, Pixel)}
    assert arrived == last


def test_the_default_is_to_wait() -> None:
    assert (Screen.overflow, Coalesce(place_of).full) == (WAIT, Full.WAIT)
