"""A system: some actors, one task each, under one task group.

    async with ActorSystem("demo") as system:
        counter = system.spawn(Counter())
        counter.offer(Add(1))
        print(await counter.ask(Read()))

Leaving the block waits until nothing is queued, then ends every task; leaving it by an exception,
or `cancel`, ends them at once. A handler that raises ends the whole system with that exception.
There is nothing global: any number of systems live side by side in one application.

Each actor serves its own box on its own task, in the order in which the event loop runs the tasks.
With a `Conductor` that order does not matter: whichever task wakes, or is about to wait, hands one
message at a time to the actor the conductor chooses, until all are quiet. The key of a candidate is
the number of messages it was delivered. Then what one outside task brings about is the same,
message for message, on trio and on asyncio, as long as it waits by `send`, `ask` and `wait_quiet`
only.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import anyio
import anyio.abc
import anyio.lowlevel

from .actor import Actor, M, R
from .cell import ActorState, Cell
from .conductor import Conductor
from .envelope import Observer, Tracer
from .mailbox import DEFAULT_BOUND
from .reference import ActorRef

# Under a conductor: how many messages are served before others in the event loop get a turn.
_TURN: Final = 256


@dataclass(frozen=True)
class ActorRecord:
    """One living actor, and so one task of that name."""

    task: str
    actor: str
    state: ActorState
    depth: int


@dataclass(frozen=True)
class SystemTree:
    """A system and its actors, in order of creation."""

    name: str
    actors: tuple[ActorRecord, ...]


class ActorSystem:
    """Own the tasks of some actors. Enter it once, with `async with`.

    Invariant: inside the block there is exactly one task per living actor, named
    `<system>/<actor>`; after it there is none.

    Args:
        name: Of the system, as its tasks are named.
        conductor: Who chooses the actor that runs next; None: the event loop.
        observer: Told of each message and reply, in the order in which they are served.
    """

    def __init__(
        self, name: str, *, conductor: Conductor | None = None, observer: Observer | None = None
    ) -> None:
        self.name = name
        self._conductor = conductor
        self._tracer = None if observer is None else Tracer(observer)
        self._cells: dict[int, Cell[Any, Any]] = {}
        self._n_spawned = 0
        self._tasks: anyio.abc.TaskGroup | None = None
        self._stack = AsyncExitStack()
        self._served: anyio.Event | None = None

    async def __aenter__(self) -> ActorSystem:
        if self._tasks is not None:
            raise RuntimeError(f"system {self.name!r} has been entered before")
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.push_async_exit(self._leave)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, traceback)

    def spawn(
        self, actor: Actor[M, R], name: str | None = None, *, bound: int = DEFAULT_BOUND
    ) -> ActorRef[M, R]:
        """Start an actor's task; messages are accepted, and asks served, from now on.

        Args:
            name: Unique among living actors of the system; by default `<class>-<number>`.
            bound: How many messages each lane of its mailbox holds at most.

        Raises:
            RuntimeError: The system is not running.
            ValueError: The name is taken.
        """
        if self._tasks is None:
            raise RuntimeError(f"system {self.name!r} has not been entered")
        number = self._n_spawned
        name = name if name is not None else f"{type(actor).__name__}-{number}"
        if any(cell.name == name for cell in self._cells.values()):
            raise ValueError(f"system {self.name!r} already has an actor {name!r}")
        settle = None if self._conductor is None else self.wait_quiet
        cell = Cell(actor, name, bound, self._tracer, settle)
        self._tasks.start_soon(self._run, number, cell, name=f"{self.name}/{name}")
        self._cells[number] = cell
        self._n_spawned += 1
        return ActorRef(cell)

    def tree(self) -> SystemTree:
        """Return the living actors as they are now: one task each."""
        return SystemTree(
            self.name,
            tuple(
                ActorRecord(f"{self.name}/{cell.name}", cell.actor_type, cell.state, cell.box.depth)
                for cell in self._cells.values()
            ),
        )

    async def wait_quiet(self) -> None:
        """Pass a checkpoint; wait until no message is queued at any actor of the system.

        Must not be called from a handler's stack. An actor that failed counts as quiet.
        """
        if self._conductor is not None:
            self._conduct()
        await anyio.lowlevel.checkpoint()
        while any(cell.has_mail for cell in self._cells.values()):
            if self._served is None:
                self._served = anyio.Event()
            await self._served.wait()

    def cancel(self) -> None:
        """End every task of the system, and the block it is the system of, at the next wait."""
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    async def _run(self, number: int, cell: Cell[Any, Any]) -> None:
        serve = cell.serve_nowait if self._conductor is None else self._conduct
        try:
            await cell.run(serve, self._after_serving)
        finally:
            del self._cells[number]
            self._after_serving()

    def _after_serving(self) -> None:
        if self._served is not None:
            self._served.set()
            self._served = None

    def _conduct(self) -> None:
        """Serve one message after the other, each to whom the conductor chooses.

        Stops when nobody has mail, when an actor fails, and after a while; then those that still
        have mail are found by their own tasks, which cannot be waiting.
        """
        assert self._conductor is not None
        for _ in range(_TURN):
            cells = self._cells.items()
            if any(cell.state is ActorState.FAILED for _, cell in cells):
                return
            ready = [(number, cell.box.delivered) for number, cell in cells if cell.has_mail]
            if not ready:
                return
            self._cells[self._conductor.next(ready)].serve_one_nowait()

    async def _leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.wait_quiet()
            for cell in self._cells.values():
                cell.close()
