"""An actor may wait in its handler: one message at a time, never inline, and never for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
    ActorSystem,
    AskTimeout,
    AsyncActor,
    Closed,
    Conductor,
    Deadlock,
    HandlerFailed,
    LowestKey,
    Mailbox,
    MustQueue,
    Orders,
    Report,
    Restarted,
    Restarting,
    RestartPolicy,
    Strategy,
    Undelivered,
    WaitRecord,
)

EndsWith: TypeAlias = Callable[..., AbstractContextManager[None]]
BACKENDS = ("trio", "asyncio")


class Go(msgspec.Struct, array_like=True, tag=1):
    n: int


class Done(msgspec.Struct, array_like=True):
    n: int


class Walker(AsyncActor[Go, Done]):
    """Do, for each message, what its test says; note beginnings and ends."""

    def __init__(self, walk: Callable[[int], Awaitable[int]]) -> None:
        self.walk = walk
        self.steps: list[str] = []

    async def receive(self, message: Go) -> Done:
        self.steps.append(f"begin {message.n}")
        n = await self.walk(message.n)
        self.steps.append(f"end {message.n}")
        return Done(n)


Ref: TypeAlias = ActorRef[Go, Done]


async def stroll(n: int) -> int:
    """Pass some checkpoints."""
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    return n


@pytest.mark.anyio
@pytest.mark.shows("K2")
async def test_messages_are_handled_one_after_the_other() -> None:
    walker = Walker(stroll)
    async with ActorSystem("s") as system:
        ref = system.spawn(walker, "walker", bound=2)
        replies: list[Done] = []

        async def ask(n: int) -> None:
            replies.append(await ref.ask(Go(n)))

        async with anyio.create_task_group() as tasks:
            for n in range(5):
                tasks.start_soon(ask, n)
        with pytest.raises(MustQueue, match="await ask"):
            ref.ask_nowait(Go(9))
        await ref.send(Go(5))
        await system.wait_quiet()
        assert ref.state is ActorState.IDLE
        ref.check()
    assert sorted(reply.n for reply in replies) == list(range(5))
    order = [step.split()[1] for step in walker.steps]
    assert order[::2] == order[1::2]
    assert walker.steps[-2:] == ["begin 5", "end 5"]


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_a_failure_is_the_supervisors_and_who_asked_is_told() -> None:
    reports: list[Report] = []

    async def stumble(n: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 1 // n

    async with ActorSystem("s", listener=reports.append) as system:
        ref = system.supervise("top").spawn(lambda: Walker(stumble), "walker")
        ref.offer(Go(1))
        with pytest.raises(HandlerFailed, match="ZeroDivisionError"):
            await ref.ask(Go(0))
        ref.offer(Go(1))
        await system.wait_quiet()
        assert (await ref.ask(Go(1)), ref.statistics().n_restarts) == (Done(1), 1)
        ref.check()


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_a_handler_in_the_middle_is_stopped_when_its_group_restarts() -> None:
    reports: list[Report] = []
    heard: list[str] = []
    ends: list[int] = []

    async def wait_for_ever(n: int) -> int:
        if n == 1:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await stroll(0)
                ends.append(n)
        return n

    class Fuse(Actor[Go, Done]):
        def receive(self, message: Go) -> Done:
            assert message.n
            return Done(0)

    async with ActorSystem("s", listener=reports.append) as system:
        top = system.supervise("top", RestartPolicy(Strategy.ALL))
        ref, fuse = top.spawn(lambda: Walker(wait_for_ever), "walker"), top.spawn(Fuse, "fuse")

        async def ask() -> None:
            with pytest.raises(Restarting):
                await ref.ask(Go(1))
            heard.append("restarting")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            ref.offer(Go(2))
            fuse.offer(Go(0))
        assert (await ref.ask(Go(3)), heard, ends) == (Done(3), ["restarting"], [1])
        ref.check()
    assert Undelivered("walker", Go(1), "interrupted", asked=True) in reports
    assert [report.actor for report in reports if isinstance(report, Restarted)] == [
        "walker",
        "fuse",
    ]


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_who_asked_a_cancelled_actor_is_told_that_it_is_closed() -> None:
    reports: list[Report] = []
    heard: list[str] = []

    async def wait_for_ever(_n: int) -> int:
        await anyio.sleep_forever()
        return 0

    async with ActorSystem("s", listener=reports.append) as system:
        ref = system.spawn(Walker(wait_for_ever), "walker")

        async def ask(n: int) -> None:
            with pytest.raises(Closed):
                await ref.ask(Go(n))
            heard.append("closed")

        async with anyio.create_task_group() as tasks:
            for n in range(3):
                tasks.start_soon(ask, n)
            await anyio.wait_all_tasks_blocked()
            ref.cancel()
        assert heard == ["closed"] * 3
    kinds = sorted(report.reason for report in reports if isinstance(report, Undelivered))
    assert kinds == ["cancelled", "cancelled", "interrupted"]
    ref.statistics().mailbox.check()


# Who waits for whom.


@pytest.mark.anyio
@pytest.mark.shows("K3", "K4")
async def test_a_cycle_of_questions_is_refused_by_name_and_only_to_who_closes_it() -> None:
    refs: list[Ref] = []
    cycles: list[tuple[tuple[str, str, str], ...]] = []

    async def pass_on(n: int) -> int:
        try:
            return 1 + (await refs[(n + 1) % 3].ask(Go(n + 1))).n
        except Deadlock as deadlock:
            cycles.append(deadlock.cycle)
            return 0

    async with ActorSystem("ring") as system:
        refs.extend(system.spawn(Walker(pass_on), name) for name in "abc")
        assert await refs[0].ask(Go(0)) == Done(2)
        assert system.waits() == ()
    assert cycles == [
        (
            ("ring/c", "a reply of", "a"),
            ("ring/a", "a reply of", "b"),
            ("ring/b", "a reply of", "c"),
        )
    ]


@pytest.mark.anyio
@pytest.mark.shows("K3", "K4")
async def test_a_cycle_of_sends_into_full_boxes_is_refused_by_name() -> None:
    refs: list[Ref] = []
    told: list[str] = []

    async def flood(n: int) -> int:
        if n < 2:
            try:
                for _ in range(3):
                    await refs[1 - n].send(Go(9))
            except Deadlock as deadlock:
                told.append(str(deadlock))
        return 0

    async with ActorSystem("s") as system:
        refs.extend(system.spawn(Walker(flood), name, bound=1) for name in "ab")
        for n, ref in enumerate(refs):
            ref.offer(Go(n))
        await system.wait_quiet()
        for ref in refs:
            ref.statistics().mailbox.check()
    assert len(told) == 1
    assert told[0] in (
        "deadlock: s/a waits for room at 'b', s/b waits for room at 'a'",
        "deadlock: s/b waits for room at 'a', s/a waits for room at 'b'",
    )


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_asking_oneself_is_the_shortest_cycle() -> None:
    refs: list[Ref] = []

    async def ask_oneself(n: int) -> int:
        with pytest.raises(Deadlock, match=r"^deadlock: s/me waits for a reply of 'me'$"):
            await refs[0].ask(Go(n))
        return n

    async with ActorSystem("s") as system:
        refs.append(system.spawn(Walker(ask_oneself), "me"))
        assert await refs[0].ask(Go(4)) == Done(4)


@pytest.mark.anyio
async def test_a_cycle_with_a_deadline_is_left_to_its_deadline() -> None:
    refs: list[Ref] = []

    async def ask_back(n: int) -> int:
        if n == 2:  # the question given up, which is served all the same
            return n
        if n:
            return (await refs[0].ask(Go(0))).n
        try:
            await refs[1].ask(Go(2), within=0)
        except AskTimeout:
            return 42
        return 0

    async with ActorSystem("s") as system:
        refs.extend(system.spawn(Walker(ask_back), name) for name in "ab")
        assert await refs[1].ask(Go(1), within=60) == Done(42)


@pytest.mark.anyio
async def test_the_graph_shows_who_waits_and_where() -> None:
    gate = anyio.Event()
    box = Mailbox[Go](Go, name="post", bound=1)
    refs: list[Ref] = []

    async def wait_at_gate(n: int) -> int:
        await gate.wait()
        return n

    async def ask_gate(n: int) -> int:
        return (await refs[0].ask(Go(n))).n

    async def collect(n: int) -> int:
        await box.drain()
        await gate.wait()
        return n

    async with ActorSystem("s") as system:
        refs.append(system.spawn(Walker(wait_at_gate), "keeper", bound=1))
        visitor = system.spawn(Walker(ask_gate), "visitor")
        collector = system.spawn(Walker(collect), "collector")
        visitor.offer(Go(1))
        collector.offer(Go(1))
        await anyio.wait_all_tasks_blocked()
        box.offer(Go(1))
        await anyio.wait_all_tasks_blocked()
        box.offer(Go(2))
        refs[0].offer(Go(2))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(box.send, Go(3), name="postman")
            tasks.start_soon(refs[0].send, Go(3), name="guest")
            await anyio.wait_all_tasks_blocked()
            assert system.waits() == (
                WaitRecord("s/visitor", "a reply of", "keeper", "s/keeper", False),
                WaitRecord("guest", "room at", "keeper", "s/keeper", False),
            )
            assert box.waits() == (WaitRecord("postman", "room at", "post", "s/collector", False),)
            gate.set()
            await anyio.wait_all_tasks_blocked()
            box.drain_nowait()
        await system.wait_quiet()
        assert system.waits() == ()


# Under a conductor.


def relay(backend: str, conductor: Conductor) -> tuple[list[Any], list[str]]:
    """Run actors that ask, tell, fill boxes and fail; return all messages, and all reports."""
    trace: list[Any] = []
    reports: list[str] = []
    refs: list[Ref] = []
    totals: list[ActorRef[Go, Done]] = []

    class Total(Actor[Go, Done]):
        def __init__(self) -> None:
            self.n = 0

        def receive(self, message: Go) -> Done:
            self.n += message.n
            return Done(self.n)

    class Runner(AsyncActor[Go, Done]):
        def __init__(self) -> None:
            self.n_seen = 0

        async def receive(self, message: Go) -> Done:
            self.n_seen += 1
            if self.n_seen == 5:
                raise LookupError
            await stroll(0)
            total = await totals[0].ask(message)
            for ref in refs[1:]:
                if message.n and ref is not refs[message.n % 3]:
                    await ref.send(Go(message.n - 1))
            if message.n % 2 and refs:
                try:
                    total = await refs[0].ask(Go(0))
                except (Restarting, HandlerFailed, Deadlock) as error:
                    reports.append(str(error))
            return total

    def observe(seq: int, sender: str, receiver: str, encoded: bytes) -> None:
        trace.append((seq, sender, receiver, encoded))

    async def main() -> None:
        system = ActorSystem(
            "s",
            conductor=conductor,
            observer=observe,
            listener=lambda report: reports.append(str(report)),
        )
        async with system:
            totals.append(system.spawn(Total(), "total", bound=2))
            top = system.supervise("top", RestartPolicy(Strategy.REST, max_restarts=10**6))
            refs.extend(top.spawn(Runner, f"runner {i}", bound=4) for i in range(3))
            for n in (4, 3, 2):
                for ref in refs:
                    ref.offer(Go(n))
            await system.wait_quiet()
            for ref in refs:
                await ref.send(Go(1))
                try:
                    await ref.ask(Go(2))
                except (Restarting, HandlerFailed) as error:
                    reports.append(str(error))

    anyio.run(main, backend=backend)
    return trace, reports


@pytest.mark.shows("K2", "K5")
@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_messages_though_handlers_wait(seed: int) -> None:
    runs = [relay(backend, Conductor(LowestKey(seed))) for backend in (*BACKENDS, *BACKENDS)]
    assert len(runs[0][0]) > 60
    assert any("Restarted" in report for report in runs[0][1])
    assert runs[1:] == runs[:1] * 3


def test_other_seeds_give_other_runs() -> None:
    assert len({str(relay("trio", Conductor(LowestKey(seed)))) for seed in range(6)}) > 3


@pytest.mark.shows("K2")
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_orders_of_waiting_handlers_can_be_gone_through(backend: str) -> None:
    async def auction(conductor: Conductor) -> tuple[int, ...]:
        bids: list[int] = []

        class House(Actor[Go, Done]):
            def receive(self, message: Go) -> Done:
                bids.append(message.n)
                return Done(len(bids))

        async with ActorSystem("auction", conductor=conductor) as system:
            house = system.spawn(House())

            async def bid(n: int) -> int:
                await stroll(0)
                return (await house.ask(Go(n))).n

            for n in range(3):
                system.spawn(Walker(bid)).offer(Go(n))
        return tuple(bids)

    ends = [anyio.run(auction, Conductor(chooser), backend=backend) for chooser in Orders()]
    assert len(set(ends)) == 6
