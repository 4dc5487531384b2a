"""An actor is told, asked inline or asked by the queue, and cannot tell which."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import msgspec
import pytest

from penumbra.actors.runtime import (
    Actor,
    ActorRef,
    ActorState,
    ActorStatistics,
    ActorSystem,
    AskTimeout,
    Closed,
    Ended,
    HandlerFailed,
    MailboxStatistics,
    NotAccepted,
    Outcome,
    Reentered,
    Report,
    Undelivered,
)

pytestmark = pytest.mark.anyio

EndsWith: TypeAlias = Callable[..., AbstractContextManager[None]]


class Add(msgspec.Struct, array_like=True, tag=1):
    n: int


class Read(msgspec.Struct, array_like=True, tag=2):
    pass


class Break(msgspec.Struct, array_like=True, tag=3):
    pass


class Total(msgspec.Struct, array_like=True):
    history: list[int]


class Ledger(Actor[Add | Read | Break, Total]):
    """Keep what was added, in order; negative numbers came by the control lane."""

    def __init__(self) -> None:
        self.history: list[int] = []
        self.during: Callable[[], object] = lambda: None

    def receive(self, message: Add | Read | Break) -> Total:
        match message:
            case Add(n):
                self.history.append(n)
                self.during()
            case Break():
                raise ZeroDivisionError("cannot go on")
            case Read():
                pass
        return Total(self.history)


class WrongReply(Actor[Read, Total]):
    def receive(self, message: Read) -> Total:
        return message  # type: ignore[return-value]


class Silent(Actor[Read, None]):
    def receive(self, message: Read) -> None:
        return None


def test_an_actor_says_its_types_on_its_class_line() -> None:
    assert (Ledger.accepts, Ledger.replies) == (Add | Read | Break, Total)

    class Heir(Ledger):
        pass

    assert (Heir.accepts, Heir.replies) == (Ledger.accepts, Ledger.replies)
    with pytest.raises(TypeError, match="must name its types"):

        class Nameless(Actor):  # type: ignore[type-arg]
            pass


@pytest.mark.shows("K2")
async def test_no_object_crosses_an_inline_ask_either_way() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger)
        total = ref.ask_nowait(Add(1))
        assert total == Total([1])
        total.history.append(99)
        assert await ref.ask(Read()) == Total([1])
        assert await ref.ask(Read(), inline=False) == Total([1])
        ledger.history.append(2)
        assert total == Total([1, 99])


async def test_an_actor_without_replies_answers_none() -> None:
    async with ActorSystem("s") as system:
        ref: ActorRef[Any, Any] = system.spawn(Silent())
        answers = [
            ref.ask_nowait(Read()),
            await ref.ask(Read()),
            await ref.ask(Read(), inline=False),
        ]
        assert answers == [None, None, None]


@pytest.mark.shows("K1")
async def test_an_ask_of_an_idle_actor_needs_no_turn_of_the_loop() -> None:
    async with ActorSystem("s") as system:
        ref = system.spawn(Ledger())
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count_turns)
            await anyio.lowlevel.checkpoint()
            turns = 0
            for _ in range(64):
                await ref.ask(Read())
            assert turns == 0
            for _ in range(130):  # each 65th checks for cancellation and lets others run
                await ref.ask(Read())
            assert turns > 0
            tasks.cancel_scope.cancel()
        assert ref.statistics() == ActorStatistics(
            inline=194,
            mailbox=MailboxStatistics(
                offered=0,
                accepted=0,
                delivered=0,
                refused=0,
                control=0,
                depth=0,
                peak_depth=0,
                wakes=0,
                parked=0,
            ),
        )


async def test_an_inline_ask_serves_what_is_queued_before_it() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger)
        for n in (1, 2, 3):
            ref.offer(Add(n))
        ref.offer_control(Add(-1))
        assert ref.ask_nowait(Add(4)) == Total([-1, 1, 2, 3, 4])
        assert ref.offer(Add(5)) is Outcome.ACCEPTED
        assert await ref.ask(Read()) == Total([-1, 1, 2, 3, 4, 5])
        seen = ref.statistics()
        assert (seen.inline, seen.mailbox.delivered) == (1, 6)


async def test_what_a_handler_adds_to_its_own_box_comes_after_the_ask_that_was_there_before() -> (
    None
):
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger)

        def tell_oneself() -> None:
            ledger.during = lambda: None
            ref.offer(Add(10))

        ledger.during = tell_oneself
        ref.offer(Add(1))
        assert ref.ask_nowait(Add(2)) == Total([1, 2])
    assert ledger.history == [1, 2, 10]


async def test_a_control_message_overtakes_the_rest_of_a_batch_being_served() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger, bound=3)

        def order_at_once() -> None:
            ledger.during = lambda: None
            assert ref.offer_control(Add(-1)) is Outcome.ACCEPTED

        ledger.during = order_at_once
        for n in (1, 2, 3):
            ref.offer(Add(n))
        assert ref.offer(Add(4)) is Outcome.FULL
        await system.wait_quiet()
    assert ledger.history == [1, -1, 2, 3]


async def test_asking_an_actor_on_the_stack_is_refused_by_name() -> None:
    ledger, refusals = Ledger(), []
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger, "ledger")

        def ask_oneself() -> None:
            try:
                ref.ask_nowait(Read())
            except Reentered as refusal:
                refusals.append(refusal.actor)

        ledger.during = ask_oneself
        assert ref.ask_nowait(Add(1)) == Total([1])
        ref.offer(Add(2))
        assert ref.ask_nowait(Read()) == Total([1, 2])
        ref.offer(Add(3))
        await system.wait_quiet()
        assert ref.state is ActorState.IDLE
    assert refusals == ["ledger"] * 3


@pytest.mark.shows("K3")
async def test_a_mutual_ask_ends_by_a_refusal_that_the_second_can_catch() -> None:
    here, there = Ledger(), Ledger()
    async with ActorSystem("s") as system:
        ref_here, ref_there = system.spawn(here), system.spawn(there)
        dropped = []

        def ask_back() -> None:
            try:
                ref_here.ask_nowait(Add(0))
            except Reentered as refusal:
                dropped.append(refusal.actor)

        here.during = lambda: ref_there.ask_nowait(Add(2))
        there.during = ask_back
        assert ref_here.ask_nowait(Add(1)) == Total([1])
    assert (here.history, there.history, dropped) == ([1], [2], ["Ledger-0"])


async def test_a_message_of_another_type_does_not_reach_the_actor() -> None:
    async with ActorSystem("s") as system:
        ref: ActorRef[Any, Any] = system.spawn(Ledger())
        for wrong in (Total([]), Add("one")):  # type: ignore[arg-type]
            with pytest.raises(NotAccepted):
                ref.offer(wrong)
            with pytest.raises(NotAccepted):
                await ref.send(wrong)
            with pytest.raises(NotAccepted):
                ref.ask_nowait(wrong)
            with pytest.raises(NotAccepted):
                await ref.ask(wrong, inline=False)
        assert ref.ask_nowait(Read()) == Total([])


@pytest.mark.shows("K4")
async def test_who_asks_inline_gets_a_typed_failure_and_the_system_the_exception_itself(
    ends_with: EndsWith,
) -> None:
    with ends_with("ZeroDivisionError"):
        async with ActorSystem("s") as system:
            ref, other = system.spawn(Ledger(), "ledger"), system.spawn(Ledger())
            with pytest.raises(HandlerFailed) as failed:
                ref.ask_nowait(Break())
            assert (failed.value.actor, failed.value.cause) == (
                "ledger",
                "ZeroDivisionError: cannot go on",
            )
            assert failed.value.__context__ is None
            # Nothing of the failed actor is served any more, the others live until the next wait.
            with pytest.raises(HandlerFailed):
                ref.ask_nowait(Read())
            assert other.ask_nowait(Read()) == Total([])
            await anyio.sleep_forever()
    assert (ref.state, other.state) == (ActorState.FAILED, ActorState.CLOSED)
    ref.check()


@pytest.mark.shows("K4")
async def test_an_uncaught_failure_of_an_ask_fails_the_asking_actor_too(
    ends_with: EndsWith,
) -> None:
    asking, asked = Ledger(), Ledger()
    with ends_with("HandlerFailed", "ZeroDivisionError"):
        async with ActorSystem("s") as system:
            ref = system.spawn(asked)
            asking.during = lambda: ref.ask_nowait(Break())
            system.spawn(asking).offer(Add(1))
            await anyio.sleep_forever()


@pytest.mark.shows("K4")
@pytest.mark.parametrize(
    ("told_before", "asked", "answer", "end"),
    [
        ([], Break(), "HandlerFailed", ["ZeroDivisionError"]),
        ([Break()], Read(), "Closed", ["ZeroDivisionError"]),
        ([Read()], Read(), "Total", []),
    ],
)
async def test_who_asks_by_the_queue_always_gets_a_word(
    told_before: list[Break | Read],
    asked: Break | Read,
    answer: str,
    end: list[str],
    ends_with: EndsWith,
) -> None:
    answers: list[str] = []

    async def ask(ref: ActorRef[Add | Read | Break, Total]) -> None:
        for message in told_before:
            ref.offer(message)
        try:
            answers.append(type(await ref.ask(asked, inline=False)).__name__)
        except (HandlerFailed, Closed) as error:
            answers.append(type(error).__name__)

    # The asking task is no part of the system, so it outlives it.
    async with anyio.create_task_group() as outside:
        with ends_with(*end):
            async with ActorSystem("s") as system:
                outside.start_soon(ask, system.spawn(Ledger()))
                await anyio.wait_all_tasks_blocked()
    assert answers == [answer]


@pytest.mark.shows("K4")
@pytest.mark.parametrize("started", [False, True])
async def test_a_failure_is_not_lost_where_its_caller_fails_first(
    started: bool, ends_with: EndsWith
) -> None:
    with ends_with("HandlerFailed", "ZeroDivisionError"):
        async with ActorSystem("s") as system:
            ref = system.spawn(Ledger())
            if started:
                await anyio.wait_all_tasks_blocked()
            ref.ask_nowait(Break())


@pytest.mark.shows("K4")
async def test_what_a_failed_actor_did_not_serve_is_reported(ends_with: EndsWith) -> None:
    ledger, reports = Ledger(), list[Report]()
    with ends_with("ZeroDivisionError"):
        async with ActorSystem("s", listener=reports.append) as system:
            ref = system.spawn(ledger, "ledger")
            for message in (Add(1), Break(), Add(2), Add(3)):
                ref.offer(message)
            await anyio.sleep_forever()
    seen = ref.statistics().mailbox
    assert (ledger.history, seen.delivered, seen.undelivered, seen.accepted) == ([1], 2, 2, 4)
    seen.check()
    assert reports == [
        Undelivered("ledger", Add(2), "failed", asked=False),
        Undelivered("ledger", Add(3), "failed", asked=False),
        Ended("ledger", "failed", "ZeroDivisionError: cannot go on", 2),
    ]


async def test_a_reply_of_another_type_is_the_actors_failure(ends_with: EndsWith) -> None:
    with ends_with("NotAccepted"):
        async with ActorSystem("s") as system:
            with pytest.raises(HandlerFailed, match="Read is not accepted here"):
                system.spawn(WrongReply()).ask_nowait(Read())


@pytest.mark.shows("K2", "K4")
async def test_a_callers_cancellation_never_stops_the_actor_half_way() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger)
        with anyio.CancelScope() as inline:
            inline.cancel()
            await ref.ask(Add(1))  # no wait in it, so the cancellation comes afterwards
        ledger.during = lambda: waiting.cancel()
        with anyio.CancelScope() as waiting:
            await ref.ask(Add(2), inline=False)
        ledger.during = lambda: None
        with anyio.CancelScope() as queued:
            queued.cancel()
            await ref.ask(Add(3), inline=False)
        assert queued.cancelled_caught
        assert await ref.ask(Read(), inline=False) == Total([1, 2, 3])
        assert ref.state is ActorState.IDLE


async def test_an_ask_that_takes_too_long_is_given_up_and_still_served() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger, "ledger", bound=1)
        ref.offer(Add(1))
        with pytest.raises(AskTimeout, match="'ledger' did not answer within 0 s") as late:
            await ref.ask(Add(2), within=0)
        assert isinstance(late.value, TimeoutError)
        assert await ref.ask(Read()) == Total([1])
        with pytest.raises(AskTimeout):
            await ref.ask(Add(3), within=0, inline=False)
        assert await ref.ask(Read(), within=60) == Total([1, 3])


async def test_a_closed_actor_serves_what_it_has_and_ends() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger, "ledger")
        for n in (1, 2):
            ref.offer(Add(n))
        ref.close()
        for refused in (ref.offer, ref.offer_control, ref.ask_nowait):
            with pytest.raises(Closed, match="'ledger' is closed"):
                refused(Add(3))
        with pytest.raises(Closed):
            await ref.ask(Add(3))
        await system.wait_quiet()
        while system.tree().actors:
            await anyio.lowlevel.checkpoint()
        assert (ref.state, ref.statistics().mailbox.depth) == (ActorState.CLOSED, 0)
        ref.check()
    assert ledger.history == [1, 2]


async def test_an_actor_may_close_itself_while_it_is_asked() -> None:
    ledger = Ledger()
    async with ActorSystem("s") as system:
        ref = system.spawn(ledger)
        ledger.during = ref.close
        assert ref.ask_nowait(Add(1)) == Total([1])
        with pytest.raises(Closed):
            ref.ask_nowait(Read())


async def test_a_cancelled_actor_leaves_its_mail_unserved_and_its_questions_unanswered() -> None:
    ledger, unanswered = Ledger(), []

    async def ask(ref: ActorRef[Add | Read | Break, Total]) -> None:
        with pytest.raises(Closed):
            await ref.ask(Read(), inline=False)
        unanswered.append("Read")

    async with ActorSystem("s") as system, anyio.create_task_group() as tasks:
        ref = system.spawn(ledger)
        await anyio.wait_all_tasks_blocked()
        ref.cancel()
        ref.offer(Add(1))
        tasks.start_soon(ask, ref)
        await anyio.wait_all_tasks_blocked()
        assert system.tree().actors == ()
    assert (ledger.history, unanswered) == ([], ["Read"])
