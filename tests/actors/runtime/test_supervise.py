"""A failed actor comes back as its policy says, with its queue; who is concerned is told."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import msgspec
import pytest
import trio
import trio.testing

from penumbra.actors.runtime import (
    Actor,
    ActorRef,
    ActorState,
    ActorSystem,
    Closed,
    Conductor,
    Ended,
    Exhausted,
    Failed,
    HandlerFailed,
    LowestKey,
    Report,
    Restarted,
    Restarting,
    RestartPolicy,
    Strategy,
    Undelivered,
)
from penumbra.actors.runtime.supervise import Dismissal, Group, Recovery

EndsWith: TypeAlias = Callable[..., AbstractContextManager[None]]


class Put(msgspec.Struct, array_like=True, tag=1):
    n: int


class Read(msgspec.Struct, array_like=True, tag=2):
    pass


class Break(msgspec.Struct, array_like=True, tag=3):
    pass


class Gone(msgspec.Struct, array_like=True, tag=4):
    name: str
    reason: str


class Kept(msgspec.Struct, array_like=True):
    life: int
    numbers: list[int]


class Shelf(Actor[Put | Read | Break | Gone, Kept]):
    """Keep numbers for one life; note everything in a log that outlives it."""

    def __init__(self, log: list[tuple[int, object]], lives: list[int]) -> None:
        lives[0] += 1
        self.life = lives[0]
        self.log = log
        self.numbers: list[int] = []
        self.during: Callable[[], object] = lambda: None

    def receive(self, message: Put | Read | Break | Gone) -> Kept:
        match message:
            case Put(n):
                self.numbers.append(n)
                self.log.append((self.life, n))
            case Gone(name, reason):
                self.log.append((self.life, f"{name} {reason}"))
            case Break():
                raise ZeroDivisionError("broken")
            case Read():
                pass
        return Kept(self.life, self.numbers)


Ref: TypeAlias = ActorRef[Put | Read | Break | Gone, Kept]


class Shelves:
    """Make shelves and remember what all of them noted."""

    def __init__(self) -> None:
        self.log: list[tuple[int, object]] = []
        self.lives: list[int] = [0]
        self.current: Shelf | None = None

    def __call__(self) -> Shelf:
        self.current = Shelf(self.log, self.lives)
        return self.current


# Decisions, without an event loop.


def decided(decision: object) -> Any:
    """Return a decision as a value."""
    if isinstance(decision, Recovery):
        return ("restart", decision.leader, decision.members, decision.delay)
    return ("end", decision.members) if isinstance(decision, Dismissal) else decision


@pytest.mark.parametrize(
    ("strategy", "restarted"),
    [
        (Strategy.ONE, ("b",)),
        (Strategy.ALL, ("a", "b", "c", "d")),
        (Strategy.REST, ("b", "c", "d")),
    ],
)
def test_a_strategy_names_who_restarts(strategy: Strategy, restarted: tuple[str, ...]) -> None:
    group = Group[str](RestartPolicy(strategy), None)
    for cell in ("a", "b"):
        group.add(cell)
    below = Group[str](RestartPolicy(max_restarts=0), group)
    for cell in ("c", "d"):
        below.add(cell)
    assert decided(group.decide("b", 0.0)) == ("restart", "b", restarted, 0.0)
    assert group.cells() == ["a", "b", "c", "d"]


def test_a_supervisor_that_gives_up_fails_as_a_member_of_its_parent() -> None:
    top = Group[str](RestartPolicy(Strategy.REST, max_restarts=1), None)
    top.add("before")
    below = Group[str](RestartPolicy(max_restarts=1), top)
    for cell in ("c", "d"):
        below.add(cell)
    top.add("after")
    assert [decided(below.decide("d", 0.0)) for _ in range(3)] == [
        ("restart", "d", ("d",), 0.0),
        ("restart", "d", ("c", "d", "after"), 0.0),
        None,
    ]


def test_one_failure_too_many_can_end_the_member_alone() -> None:
    group = Group[str](RestartPolicy(max_restarts=0, exhausted=Exhausted.END), None)
    for cell in ("a", "b"):
        group.add(cell)
    assert decided(group.decide("b", 0.0)) == ("end", ("b",))
    group.remove("b")
    assert group.cells() == ["a"]


def test_delays_grow_to_a_limit_and_only_recent_failures_count() -> None:
    policy = RestartPolicy(max_restarts=4, within=10, first_delay=1, factor=3, longest_delay=5)
    group = Group[str](policy, None)
    group.add("a")
    delays = [decided(group.decide("a", now)) for now in (0.0, 1.0, 2.0, 3.0)]
    assert delays == [("restart", "a", ("a",), delay) for delay in (1, 3, 5, 5)]
    assert group.decide("a", 9.9) is None
    # At 11 the failures of 0 and 1 are 10 seconds old and more: two are left.
    assert decided(group.decide("a", 11.0)) == ("restart", "a", ("a",), 5)
    assert decided(group.decide("a", 40.0)) == ("restart", "a", ("a",), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_restarts", -1),
        ("within", 0.0),
        ("first_delay", -1.0),
        ("longest_delay", float("nan")),
        ("factor", 0.5),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="must"):
        RestartPolicy(**{field: value})  # type: ignore[arg-type]


# In a system.


@pytest.mark.anyio
@pytest.mark.shows("K1", "K4")
async def test_what_is_queued_survives_a_restart_and_questions_are_answered() -> None:
    shelves, reports = Shelves(), list[Report]()
    async with ActorSystem("s", listener=reports.append) as system:
        ref = system.supervise("top").spawn(shelves, "shelf")
        for message in (Put(1), Break(), Put(2)):
            ref.offer(message)
        with pytest.raises(Restarting, match="'shelf' is restarting"):
            await ref.ask(Read(), inline=False)
        ref.offer(Put(3))
        await system.wait_quiet()
        assert await ref.ask(Read()) == Kept(2, [2, 3])
        seen = ref.statistics()
        assert seen.n_restarts == 1
        seen.mailbox.check()
    assert shelves.log == [(1, 1), (2, 2), (2, 3)]
    error = reports[0].error if isinstance(reports[0], Failed) else None
    assert isinstance(error, ZeroDivisionError)
    assert reports[0] == Failed("shelf", error, ("shelf",), (), 0.0)
    assert reports[1:] == [
        Undelivered("shelf", Read(), "restarting", asked=True),
        Restarted("shelf", 1),
        Ended("shelf", "closed", "", 0),
    ]


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_who_asks_inline_is_told_at_once_and_again_while_the_actor_restarts() -> None:
    shelves = Shelves()
    async with ActorSystem("s", listener=lambda _report: None) as system:
        ref = system.supervise("top").spawn(shelves, "shelf")
        with pytest.raises(HandlerFailed, match="broken"):
            ref.ask_nowait(Break())
        assert ref.state is ActorState.RESTARTING
        with pytest.raises(Restarting):
            ref.ask_nowait(Read())
        with pytest.raises(Restarting):
            await ref.ask(Read(), inline=False)
        ref.check()
        ref.offer(Put(7))
        await system.wait_quiet()
        assert ref.ask_nowait(Read()) == Kept(2, [7])
        ref.check()


@pytest.mark.anyio
@pytest.mark.shows("K4")
@pytest.mark.parametrize(
    ("strategy", "lives"),
    [(Strategy.ONE, [1, 4, 3]), (Strategy.ALL, [4, 5, 6]), (Strategy.REST, [1, 4, 5])],
)
async def test_who_restarts_forgets_and_who_does_not_keeps(
    strategy: Strategy, lives: list[int]
) -> None:
    shelves = Shelves()
    async with ActorSystem("s", listener=lambda _report: None) as system:
        top = system.supervise("top", RestartPolicy(strategy))
        refs = [top.spawn(shelves, f"shelf {i}") for i in range(3)]
        assert top.actors == ("shelf 0", "shelf 1", "shelf 2")
        for n, ref in enumerate(refs):
            ref.ask_nowait(Put(n))
        refs[1].offer(Break())
        for ref in refs:
            ref.offer(Put(9))
        await system.wait_quiet()
        kept = [ref.ask_nowait(Read()) for ref in refs]
        assert [each.life for each in kept] == lives
        # The number 9 got to each, to the old one or to the new one.
        old = [[0, 9], [1, 9], [2, 9]]
        for n, each in enumerate(kept):
            assert each.numbers in ([old[n]] if each.life <= 3 else [[9], []])
        assert [n for _, n in shelves.log].count(9) == 3
        for ref in refs:
            ref.check()


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_who_is_on_the_stack_when_it_is_to_be_restarted_is_so_when_it_returns() -> None:
    shelves = Shelves()
    asked: list[Ref] = []

    class Asking(Actor[Put, None]):
        n_made = 0

        def __init__(self) -> None:
            Asking.n_made += 1

        def receive(self, message: Put) -> None:
            if message.n == 0:
                with pytest.raises(HandlerFailed):
                    asked[0].ask_nowait(Break())
                asked[0].offer(Put(5))
            else:
                asked[0].offer(message)

    async with ActorSystem("s", listener=lambda _report: None) as system:
        top = system.supervise("top", RestartPolicy(Strategy.ALL))
        asked.append(top.spawn(shelves, "asked"))
        asking = top.spawn(Asking, "asking")
        for n in range(3):
            asking.offer(Put(n))
        await system.wait_quiet()
        assert asking.statistics().n_restarts == 1
    assert Asking.n_made == 2
    assert shelves.log == [(2, 5), (2, 1), (2, 2)]


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_one_failure_too_many_ends_the_system_with_the_exception(
    ends_with: EndsWith,
) -> None:
    reports: list[Report] = []
    with ends_with("ZeroDivisionError"):
        async with ActorSystem("s", listener=reports.append) as system:
            top = system.supervise("top", RestartPolicy(max_restarts=2))
            ref = top.spawn(Shelves(), "shelf")
            for _ in range(4):
                ref.offer(Break())
            await anyio.sleep_forever()
    assert ref.state is ActorState.FAILED
    assert [type(report).__name__ for report in reports] == [
        *("Failed", "Restarted") * 2,
        "Failed",
        "Undelivered",
        "Ended",
    ]


@pytest.mark.anyio
@pytest.mark.shows("K4", "K5")
async def test_a_failure_can_end_one_actor_and_leave_the_others(ends_with: EndsWith) -> None:
    reports: list[Report] = []
    shelves = Shelves()
    with ends_with():
        async with ActorSystem("s", listener=reports.append) as system:
            policy = RestartPolicy(max_restarts=0, exhausted=Exhausted.END)
            top = system.supervise("top", policy)
            ref, other = top.spawn(Shelves(), "shelf"), top.spawn(shelves, "other")
            ref.watch(other, lambda end: Gone(end.actor, end.reason))
            ref.offer(Break())
            ref.offer(Put(1))
            assert await ref.wait_ended() == Ended(
                "shelf", "failed", "ZeroDivisionError: broken", 1
            )
            await system.wait_quiet()
            assert top.actors == ("other",)
            assert other.ask_nowait(Read()) == Kept(1, [])
            with pytest.raises(HandlerFailed):
                ref.ask_nowait(Read())
            with pytest.raises(Closed):
                ref.offer(Put(2))
    assert shelves.log == [(1, "shelf failed")]
    assert Undelivered("shelf", Put(1), "failed", asked=False) in reports


@pytest.mark.anyio
async def test_a_maker_that_fails_is_one_more_failure() -> None:
    made: list[int] = []

    def make() -> Shelf:
        made.append(len(made))
        if len(made) == 2:
            raise LookupError("no wood")
        return Shelf([], [0])

    reports: list[Report] = []
    async with ActorSystem("s", listener=reports.append) as system:
        ref = system.supervise("top").spawn(make, "shelf")
        ref.offer(Break())
        ref.offer(Put(1))
        await system.wait_quiet()
        assert await ref.ask(Read()) == Kept(1, [1])
    causes = [type(report.error) for report in reports if isinstance(report, Failed)]
    assert (causes, len(made)) == ([ZeroDivisionError, LookupError], 3)


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["close", "cancel"])
@pytest.mark.shows("K4")
async def test_an_actor_ended_while_it_restarts_ends_and_the_others_come_back(how: str) -> None:
    shelves = Shelves()
    async with ActorSystem("s", listener=lambda _report: None) as system:
        top = system.supervise("top", RestartPolicy(Strategy.ALL))
        ref, other = top.spawn(shelves, "leader"), top.spawn(shelves, "other")
        await anyio.wait_all_tasks_blocked()
        other.offer(Put(1))
        ref.offer(Put(2))
        with pytest.raises(HandlerFailed):
            ref.ask_nowait(Break())
        ref.offer(Put(3))
        getattr(ref, how)()
        end = await ref.wait_ended()
        await system.wait_quiet()
        assert top.actors == ("other",)
        assert other.state is ActorState.IDLE
        other.check()
        assert end == Ended(
            "leader", *(("closed", "", 0) if how == "close" else ("cancelled", "", 1))
        )
        assert [n for _, n in shelves.log if n == 1] == [1]


@pytest.mark.anyio
async def test_a_watcher_hears_of_every_kind_of_end_even_with_a_full_control_lane() -> None:
    shelves = Shelves()
    async with ActorSystem("s", listener=lambda _report: None) as system:
        watcher = system.spawn(shelves(), "watcher", bound=1)
        await anyio.wait_all_tasks_blocked()
        ends = {
            "close": system.spawn(Shelf([], [0]), "a"),
            "cancel": system.spawn(Shelf([], [0]), "b"),
        }
        for how, ref in ends.items():
            ref.watch(watcher, lambda end: Gone(end.actor, end.reason))
            getattr(ref, how)()
        watcher.offer_control(Put(0))
        assert not watcher.offer_control(Put(1))
        for ref in ends.values():
            await ref.wait_ended()
        ends["close"].watch(watcher, lambda end: Gone(end.actor, "long ago"))
        await system.wait_quiet()
        watcher.check()
    assert shelves.log[0] == (1, 0)
    assert sorted(str(what) for _, what in shelves.log[1:]) == [
        "a closed",
        "a long ago",
        "b cancelled",
    ]


# Time.


class JumpingLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose clock jumps to the next timer as soon as nothing else is to do."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._jumping = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen"
        self._jumping.now += timeout
        return super().select(0)


async def fall_down_thrice() -> list[float]:
    """Return when a shelf that breaks at once, always, came back."""
    times: list[float] = []
    start = anyio.current_time()

    def listen(report: Report) -> None:
        if isinstance(report, Restarted):
            times.append(anyio.current_time() - start)

    policy = RestartPolicy(max_restarts=3, within=1000, first_delay=10, factor=3, longest_delay=60)
    async with ActorSystem("s", listener=listen) as system:
        ref = system.supervise("top", policy).spawn(Shelves(), "shelf")
        for _ in range(3):
            ref.offer(Break())
        ref.offer(Put(1))
        await system.wait_quiet()
        assert ref.ask_nowait(Read()) == Kept(4, [1])
    return times


@pytest.mark.trio
@pytest.mark.shows("K4", "K7")
async def test_backoff_takes_its_time_on_trio(autojump_clock: trio.testing.MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    assert await fall_down_thrice() == pytest.approx([10, 40, 100])


@pytest.mark.shows("K4", "K5")
def test_backoff_takes_its_time_on_asyncio() -> None:
    times = anyio.run(
        fall_down_thrice, backend="asyncio", backend_options={"loop_factory": JumpingLoop}
    )
    assert times == pytest.approx([10, 40, 100])


# Under a conductor.


def fail_by_seed(backend: str, seed: int) -> tuple[list[object], list[object]]:
    """Return what was served and what was reported, in order, where one of three fails at times."""
    trace: list[object] = []
    reports: list[object] = []

    class Frail(Actor[Put, Kept]):
        """Break at every fourth message of a life; else pass on one less."""

        def __init__(self) -> None:
            self.n_seen = 0

        def receive(self, message: Put) -> Kept:
            self.n_seen += 1
            if self.n_seen == 4:
                raise ZeroDivisionError(message.n)
            if message.n:
                for ref in refs:
                    ref.offer(Put(message.n - 1))
            return Kept(0, [self.n_seen])

    refs: list[ActorRef[Put, Kept]] = []

    def observe(seq: int, sender: str, receiver: str, encoded: bytes) -> None:
        trace.append((seq, sender, receiver, encoded))

    def listen(report: Report) -> None:
        reports.append(str(report))

    async def main() -> None:
        conductor = Conductor(LowestKey(seed))
        async with ActorSystem(
            "s", conductor=conductor, observer=observe, listener=listen
        ) as system:
            policy = RestartPolicy(Strategy.REST, max_restarts=1000, first_delay=100)
            top = system.supervise("top", policy)
            refs.extend(top.spawn(Frail, f"frail {i}") for i in range(3))
            for ref in refs:
                ref.offer(Put(3))
            for ref in refs:
                with anyio.move_on_after(60) as scope:
                    try:
                        await ref.ask(Put(1))
                    except (Restarting, HandlerFailed) as error:
                        reports.append(str(error))
                assert not scope.cancelled_caught
            await system.wait_quiet()
            refs[1].close()
            await refs[0].send(Put(2))
            await system.wait_quiet()

    anyio.run(main, backend=backend)
    return trace, reports


@pytest.mark.shows("K2", "K5")
@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_messages_restarts_included(seed: int) -> None:
    runs = [fail_by_seed(backend, seed) for backend in ("trio", "asyncio", "trio", "asyncio")]
    assert len(runs[0][0]) > 40
    assert sum("Restarted" in str(report) for report in runs[0][1]) > 10
    assert runs[1:] == runs[:1] * 3


def test_other_seeds_give_other_failures() -> None:
    assert len({str(fail_by_seed("trio", seed)) for seed in range(6)}) > 3
