"""Cancelled at any wait whatever, the runtime loses no message and says so of each it drops.

`Injector` counts the waits of the tasks it is given, as they happen, and cancels the task that
comes to the k-th. Each scenario below runs for k = 1, 2, ... until it has fewer than k waits; after
each run every message must be in exactly one place, counted by the test at both ends:

    offered = delivered + coalesced + shot down + reported
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from typing import Any, Final, TypeAlias

import anyio
import msgspec
import pytest

from penumbra.actors.runtime import (
    SHOOT_DOWN,
    Actor,
    ActorError,
    ActorRef,
    ActorSystem,
    AsyncActor,
    Closed,
    Coalesce,
    Mailbox,
    MailboxStatistics,
    Report,
    RestartPolicy,
    Strategy,
    Undelivered,
)

BACKENDS = ("trio", "asyncio")
MOST_WAITS: Final = 400


class Injector:
    """Cancel, at the k-th wait of all tasks it is given, the task that waits.

    Attributes:
        n_waits: How many waits there were so far.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self.n_waits = 0

    async def run(self, cancel: Callable[[], None], task: Coroutine[Any, Any, None]) -> None:
        """Run the body of a task; `cancel` cancels it."""
        await _Counted(self, cancel, task)

    async def run_scoped(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the body of a task in a scope of its own, which is what is cancelled."""
        with anyio.CancelScope() as scope:
            await self.run(scope.cancel, make())

    def waits(self, cancel: Callable[[], None]) -> None:
        self.n_waits += 1
        if self.n_waits == self._k:
            cancel()


class _Counted:
    """Hands on between a coroutine and the event loop whatever either gives the other."""

    def __init__(
        self, injector: Injector, cancel: Callable[[], None], task: Coroutine[Any, Any, None]
    ) -> None:
        self._injector = injector
        self._cancel = cancel
        self._task = task

    def __await__(self) -> Generator[Any, Any, None]:
        step: Callable[[], Any] = lambda: self._task.send(None)  # noqa: E731
        while True:
            try:
                trap = step()
            except StopIteration:
                return
            self._injector.waits(self._cancel)
            try:
                sent = yield trap
            except BaseException as error:  # to be raised where the task waits
                step = _thrower(self._task, error)
            else:
                step = _sender(self._task, sent)


def _thrower(task: Coroutine[Any, Any, None], error: BaseException) -> Callable[[], Any]:
    return lambda: task.throw(error)


def _sender(task: Coroutine[Any, Any, None], sent: Any) -> Callable[[], Any]:
    return lambda: task.send(sent)


class InjectedSystem(ActorSystem):
    """A system whose actors' tasks are injected; what is cancelled is the actor."""

    def __init__(self, injector: Injector, listener: Callable[[Report], None]) -> None:
        super().__init__("s", listener=listener)
        self._injector = injector

    async def _run(self, number: int, cell: Any) -> None:
        await self._injector.run(cell.cancel, super()._run(number, cell))


Scenario: TypeAlias = Callable[[Injector], Awaitable[None]]


def run_with_each_cancellation(backend: str, scenario: Scenario) -> int:
    """Run the scenario for every k; return the number of runs."""

    async def once(injector: Injector) -> None:
        with anyio.fail_after(20):
            await scenario(injector)

    for k in range(1, MOST_WAITS):
        injector = Injector(k)
        anyio.run(once, injector, backend=backend)
        if injector.n_waits < k:
            return k
    raise AssertionError("the scenario does not end")


class Item(msgspec.Struct, array_like=True, frozen=True):
    sender: int
    n: int
    is_bad: bool = False


class Reply(msgspec.Struct, array_like=True):
    n: int


class Books:
    """Who brought what, and what became of it, as the test itself sees it."""

    def __init__(self) -> None:
        self.brought: list[Item] = []
        self.sent: Counter[Item] = Counter()  # the sender was told nothing to the contrary
        self.handled: Counter[Item] = Counter()
        self.undelivered: Counter[Item] = Counter()

    def listen(self, report: Report) -> None:
        if (
            isinstance(report, Undelivered)
            and report.actor == "clerk"
            and report.reason != "interrupted"
        ):
            assert isinstance(report.message, Item)
            self.undelivered[report.message] += 1

    def audit(self, seen: MailboxStatistics) -> None:
        """Compare the statistics of the only receiver, which has ended, with the books."""
        seen.check()
        assert (seen.depth, seen.parked) == (0, 0)
        assert seen.offered == len(self.brought)
        assert seen.offered == (seen.delivered + seen.coalesced + seen.shot_down + seen.reported)
        assert seen.delivered + seen.shot_down == self.handled.total()
        assert seen.undelivered == self.undelivered.total()
        assert max(self.handled.values(), default=1) == 1
        assert not (self.handled & self.undelivered)
        lost = self.sent - self.handled - self.undelivered
        assert lost.total() == seen.coalesced
        assert seen.refused == len(self.brought) - self.sent.total() - sum(
            item not in self.sent for item in (*self.handled, *self.undelivered)
        )


async def send_all(books: Books, send: Callable[[Item], Awaitable[None]], items: range) -> None:
    """Send items one after the other, noting those of which no error was heard."""
    for n in items:
        item = Item(items.start, n, n % 10 == 7)
        books.brought.append(item)
        try:
            await send(item)
        except Closed:
            continue
        books.sent[item] += 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.shows("K4")
def test_a_mailbox_loses_nothing(backend: str, keyed: bool) -> None:
    async def scenario(injector: Injector) -> None:
        books = Books()
        if keyed:
            overflow = Coalesce(lambda item: item.n % 4)
            box = Mailbox[Item](Item, bound=2, overflow=overflow)
        else:
            box = Mailbox[Item](Item, bound=2)

        async def consume() -> None:
            while batch := await box.drain():
                books.handled.update(batch)

        async with anyio.create_task_group() as tasks:
            for start in (0, 100):
                tasks.start_soon(
                    injector.run_scoped,
                    lambda start=start: send_all(books, box.send, range(start, start + 6)),
                )
            tasks.start_soon(injector.run_scoped, consume)
            await anyio.wait_all_tasks_blocked()
            # Whoever was not cancelled is done, or waits for one who was.
            box.close()
        books.handled.update(box.drain_nowait())
        books.audit(box.statistics())

    assert run_with_each_cancellation(backend, scenario) > 5


def by_place(item: Item) -> Hashable | None:
    """Return which place an item is for."""
    return None if item.is_bad else item.n % 4


class Clerk(Actor[Item, Reply]):
    """Book what comes, fail at what is bad."""

    def __init__(self, books: Books) -> None:
        self.books = books

    def receive(self, message: Item) -> Reply:
        self.books.handled[message] += 1
        if message.is_bad:
            raise ValueError(message.n)
        return Reply(message.n)


class CoalescingClerk(Clerk):
    overflow = Coalesce(by_place)


class EagerClerk(Clerk):
    overflow = Coalesce(by_place, full=SHOOT_DOWN)


class SlowClerk(AsyncActor[Item, Reply]):
    """As `Clerk`, after some waits."""

    def __init__(self, books: Books) -> None:
        self.books = books

    async def receive(self, message: Item) -> Reply:
        self.books.handled[message] += 1
        for _ in range(2):
            await anyio.lowlevel.checkpoint()
        if message.is_bad:
            raise ValueError(message.n)
        return Reply(message.n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Clerk, CoalescingClerk, EagerClerk, SlowClerk])
@pytest.mark.shows("K3", "K4")
def test_a_supervised_actor_loses_nothing(
    backend: str, kind: Callable[[Books], Clerk | SlowClerk]
) -> None:
    n_restarts = 0

    async def scenario(injector: Injector) -> None:
        nonlocal n_restarts
        books = Books()
        async with InjectedSystem(injector, books.listen) as system:
            top = system.supervise("top", RestartPolicy(Strategy.ALL, max_restarts=100))
            ref: ActorRef[Item, Reply] = top.spawn(lambda: kind(books), "clerk", bound=2)
            other = top.spawn(lambda: kind(Books()), bound=2)

            async def ask_all() -> None:
                for n in range(200, 206):
                    item = Item(200, n, n % 10 == 3)
                    books.brought.append(item)
                    try:
                        await ref.ask(item, inline=False)
                    except ActorError as error:
                        # Refused at the door, before it was brought to the box.
                        if item not in books.handled and item not in books.undelivered:
                            refused_at_door.append((item, error))
                    else:
                        books.sent[item] += 1

            refused_at_door: list[tuple[Item, ActorError]] = []
            async with anyio.create_task_group() as tasks:
                for start in (0, 100):
                    tasks.start_soon(
                        injector.run_scoped,
                        lambda start=start: send_all(books, ref.send, range(start, start + 10)),
                    )
                tasks.start_soon(injector.run_scoped, ask_all)
                tasks.start_soon(
                    injector.run_scoped, lambda: send_all(Books(), other.send, range(300, 304))
                )
        n_restarts += ref.statistics().n_restarts
        ref.check()
        other.check()
        seen = ref.statistics().mailbox
        n_at_door = len(books.brought) - seen.offered
        assert 0 <= n_at_door <= len(refused_at_door)
        for item, _ in refused_at_door[:n_at_door]:
            books.brought.remove(item)
        books.audit(seen)

    assert run_with_each_cancellation(backend, scenario) > 20
    assert n_restarts > 20
