"""A system has one task per actor, ends as one, and under a conductor repeats itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import anyio
import msgspec
import pytest
import trio
import trio.testing

from penumbra.actors.runtime import (
    Actor,
    ActorRecord,
    ActorRef,
    ActorState,
    ActorSystem,
    Conductor,
    Listed,
    LowestKey,
    Orders,
    SystemTree,
)

EndsWith: TypeAlias = Callable[..., AbstractContextManager[None]]
Trace: TypeAlias = list[tuple[int, str, str, bytes]]
BACKENDS = ("trio", "asyncio")


class Ball(msgspec.Struct, array_like=True, tag=1):
    n_left: int


class Count(msgspec.Struct, array_like=True, tag=2):
    pass


class Seen(msgspec.Struct, array_like=True):
    n: int


class Player(Actor[Ball | Count, Seen]):
    """Throw each ball on to all others, until it has been thrown often enough."""

    def __init__(self) -> None:
        self.others: list[ActorRef[Ball | Count, Seen]] = []
        self.n_seen = 0

    def receive(self, message: Ball | Count) -> Seen:
        if isinstance(message, Ball):
            self.n_seen += 1
            if message.n_left:
                for other in self.others:
                    assert other.offer(Ball(message.n_left - 1))
        return Seen(self.n_seen)


class Referee(Actor[Count, Seen]):
    """Sum up what the players have seen, by asking each inline."""

    def __init__(self, players: list[ActorRef[Ball | Count, Seen]]) -> None:
        self.players = players

    def receive(self, message: Count) -> Seen:
        return Seen(sum(player.ask_nowait(message).n for player in self.players))


def team(system: ActorSystem, n_players: int) -> list[ActorRef[Ball | Count, Seen]]:
    """Spawn players who know each other."""
    players = [Player() for _ in range(n_players)]
    refs = [system.spawn(player, f"player {i}") for i, player in enumerate(players)]
    for i, player in enumerate(players):
        player.others = refs[:i] + refs[i + 1 :]
    return refs


def task_names(prefix: str) -> list[str]:
    """Name the running tasks that begin so, as the event loop knows them."""
    names = [info.name or "" for info in anyio.get_running_tasks()]
    return sorted(name for name in names if name.startswith(prefix))


@pytest.mark.anyio
@pytest.mark.shows("K1")
async def test_there_is_exactly_one_task_for_each_actor_and_none_afterwards() -> None:
    async with ActorSystem("court") as system:
        refs = team(system, 3)
        refs[1].offer(Ball(0))
        assert system.tree() == SystemTree(
            "court",
            tuple(
                ActorRecord(f"court/player {i}", "Player", ActorState.IDLE, depth)
                for i, depth in enumerate((0, 1, 0))
            ),
        )
        await anyio.wait_all_tasks_blocked()
        assert task_names("court/") == [record.task for record in system.tree().actors]
        refs[0].ask_nowait(Count())
        await refs[2].ask(Count(), inline=False)
        assert task_names("court/") == ["court/player 0", "court/player 1", "court/player 2"]
    assert task_names("court/") == []
    assert system.tree() == SystemTree("court", ())
    assert {ref.state for ref in refs} == {ActorState.CLOSED}


@pytest.mark.anyio
@pytest.mark.shows("K1", "K5")
async def test_leaving_by_an_error_ends_every_task_at_once(ends_with: EndsWith) -> None:
    with ends_with("LookupError"):
        async with ActorSystem("court") as system:
            refs = team(system, 2)
            refs[0].offer(Ball(1 << 40))  # would go on for ever
            raise LookupError("enough")
    assert task_names("court/") == []


@pytest.mark.anyio
@pytest.mark.shows("K4", "K5")
async def test_cancelling_a_system_or_what_is_around_it_ends_it_without_an_error() -> None:
    async with ActorSystem("court") as system:
        team(system, 2)[0].offer(Ball(1 << 40))
        system.cancel()
    with anyio.CancelScope() as scope:
        async with ActorSystem("court") as system:
            team(system, 2)[0].offer(Ball(1 << 40))
            scope.cancel()
    assert scope.cancelled_caught
    assert task_names("court/") == []


@pytest.mark.anyio
async def test_leaving_normally_serves_all_that_is_queued() -> None:
    async with ActorSystem("court") as system:
        refs = team(system, 2)
        refs[0].offer(Ball(99))
    assert sum(ref.statistics().mailbox.delivered for ref in refs) == 100


@pytest.mark.anyio
@pytest.mark.shows("K5")
async def test_systems_live_side_by_side_and_fail_apart(ends_with: EndsWith) -> None:
    class Broken(Actor[Count, Seen]):
        def receive(self, message: Count) -> Seen:
            raise LookupError

    async with ActorSystem("east") as east:
        (player,) = team(east, 1)
        with ends_with("LookupError"):
            async with ActorSystem("west") as west:
                team(west, 1)[0].offer(Ball(0))
                broken = west.spawn(Broken())
                await anyio.wait_all_tasks_blocked()
                assert task_names("east/") == ["east/player 0"]
                assert task_names("west/") == ["west/Broken-1", "west/player 0"]
                broken.offer(Count())
                await anyio.sleep_forever()
        assert task_names("west/") == []
        assert await player.ask(Count(), inline=False) == Seen(0)


@pytest.mark.anyio
async def test_a_handler_may_spawn() -> None:
    class Parent(Actor[Count, Seen]):
        def receive(self, message: Count) -> Seen:
            return system.spawn(Player(), "child").ask_nowait(message)

    async with ActorSystem("home") as system:
        assert system.spawn(Parent(), "parent").ask_nowait(Count()) == Seen(0)
        await anyio.wait_all_tasks_blocked()
        assert task_names("home/") == ["home/child", "home/parent"]


@pytest.mark.anyio
async def test_names_are_unique_among_the_living() -> None:
    system = ActorSystem("court")
    with pytest.raises(RuntimeError, match="has not been entered"):
        system.spawn(Player())
    async with system:
        ref = system.spawn(Player(), "one")
        with pytest.raises(ValueError, match="already has an actor 'one'"):
            system.spawn(Player(), "one")
        ref.close()
        await anyio.wait_all_tasks_blocked()
        system.spawn(Player(), "one")
    with pytest.raises(RuntimeError, match="has been entered before"):
        await system.__aenter__()


@pytest.mark.anyio
async def test_waiting_for_quiet_sees_mail_that_was_served_inline() -> None:
    async with ActorSystem("court") as system:
        (player,) = team(system, 1)
        player.offer(Ball(0))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(system.wait_quiet)
            player.ask_nowait(Count())
        assert player.statistics().mailbox.depth == 0


# Traces.


def play(backend: str, conductor: Conductor | None, n_players: int, n_throws: int) -> Trace:
    """Play a game from its start and return what was served, in order."""
    trace: Trace = []

    async def main() -> None:
        def observe(seq: int, sender: str, receiver: str, encoded: bytes) -> None:
            trace.append((seq, sender, receiver, encoded))

        async with ActorSystem("court", conductor=conductor, observer=observe) as system:
            refs = team(system, n_players)
            referee = system.spawn(Referee(refs), "referee")
            for ref in refs:
                ref.offer(Ball(n_throws))
            await referee.ask(Count())
            for ref in refs:
                await ref.send(Ball(1))
            referee.offer(Count())
            await system.wait_quiet()
            await refs[0].ask(Count())

    anyio.run(main, backend=backend)
    return trace


@pytest.mark.shows("K2", "K5")
@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_messages_on_trio_and_asyncio(seed: int) -> None:
    games = [play(backend, Conductor(LowestKey(seed)), 4, 4) for backend in (*BACKENDS, *BACKENDS)]
    assert len(games[0]) > 400  # more than one turn of the conductor
    assert [seq for seq, *_ in games[0]] == list(range(len(games[0])))
    assert games[1:] == games[:1] * 3


def test_other_seeds_give_other_orders_of_the_same_messages() -> None:
    games = [play("trio", Conductor(LowestKey(seed)), 3, 2) for seed in range(8)]
    assert len({str(game) for game in games}) > 4
    assert len({len(game) for game in games}) == 1


def test_a_recorded_schedule_replays_a_game_on_the_other_event_loop() -> None:
    conductor = Conductor(LowestKey(3), record=True)
    game = play("trio", conductor, 3, 2)
    assert play("asyncio", Conductor(Listed(conductor.schedule)), 3, 2) == game


class Bid(msgspec.Struct, array_like=True):
    bidder: int


class House(Actor[Bid, None]):
    """Note who bids, in order."""

    def __init__(self) -> None:
        self.bids: list[int] = []

    def receive(self, message: Bid) -> None:
        self.bids.append(message.bidder)


class Bidder(Actor[Bid, None]):
    """Pass a bid on to the house."""

    def __init__(self, house: ActorRef[Bid, None]) -> None:
        self.house = house

    def receive(self, message: Bid) -> None:
        self.house.offer(message)


@pytest.mark.shows("K2")
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_orders_of_a_small_scenario_can_be_gone_through(backend: str) -> None:
    async def auction(conductor: Conductor) -> tuple[int, ...]:
        house = House()
        async with ActorSystem("auction", conductor=conductor) as system:
            ref = system.spawn(house)
            bidders = [system.spawn(Bidder(ref)) for _ in range(3)]
            for number, bidder in enumerate(bidders):
                bidder.offer(Bid(number))
        return tuple(house.bids)

    ends = [anyio.run(auction, Conductor(chooser), backend=backend) for chooser in Orders()]
    assert set(ends) == set(itertools.permutations(range(3)))


def told_then_asked(backend: str, how: str) -> tuple[Trace, Any]:
    """Ask a referee, whose players have mail, in one of three ways."""
    trace: Trace = []
    replies: list[Seen] = []

    async def main() -> None:
        def observe(seq: int, sender: str, receiver: str, encoded: bytes) -> None:
            trace.append((seq, sender, receiver, encoded))

        async with ActorSystem("court", observer=observe) as system:
            (player,) = team(system, 1)
            referee = system.spawn(Referee([player]), "referee")
            await anyio.wait_all_tasks_blocked()
            if how == "inline":
                replies.append(referee.ask_nowait(Count()))
            else:
                replies.append(await referee.ask(Count(), inline=how == "awaited"))

    anyio.run(main, backend=backend)
    return trace, replies


@pytest.mark.shows("K2")
def test_an_inline_ask_gives_the_same_result_and_trace_as_a_queued_one() -> None:
    count, seen = msgspec.msgpack.encode(Count()), msgspec.msgpack.encode(Seen(0))
    whole = [
        (0, "", "referee", count),
        (1, "referee", "player 0", count),
        (2, "player 0", "referee", seen),
        (3, "referee", "", seen),
    ]
    for backend in BACKENDS:
        for how in ("inline", "awaited", "queued"):
            assert told_then_asked(backend, how) == (whole, [Seen(0)])


@pytest.mark.shows("K5")
def test_asyncio_users_need_no_trio() -> None:
    script = """
import sys
sys.modules["trio"] = None  # importing it fails
import anyio, msgspec
from penumbra.actors.runtime import Actor, ActorSystem

class Ping(msgspec.Struct, array_like=True):
    n: int

class Echo(Actor[Ping, Ping]):
    def receive(self, message):
        return message

async def main():
    async with ActorSystem("s") as system:
        ref = system.spawn(Echo())
        await ref.send(Ping(1))
        print(await ref.ask(Ping(2)), await ref.ask(Ping(3), inline=False))

anyio.run(main, backend="asyncio")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("Ping(n=2) Ping(n=3)\n", "")


@pytest.mark.trio
@pytest.mark.shows("K7")
async def test_a_system_runs_under_pytest_trio_with_its_clock(
    autojump_clock: trio.testing.MockClock,
) -> None:
    assert autojump_clock.autojump_threshold == 0
    async with ActorSystem("court") as system:
        (player,) = team(system, 1)
        await trio.sleep(3600)
        assert await player.ask(Ball(0), within=1, inline=False) == Seen(1)
        await trio.testing.wait_all_tasks_blocked()
        assert task_names("court/") == ["court/player 0"]
