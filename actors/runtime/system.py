"""A system: some actors, one task each, under one task group.

    async with ActorSystem("demo") as system:
        counter = system.spawn(Counter())
        counter.offer(Add(1))
        print(await counter.ask(Read()))

Leaving the block waits until nothing is queued, then ends every task; leaving it by an exception,
or `cancel`, ends them at once. A handler that raises ends the whole system with that exception,
unless its actor was spawned by a supervisor:

        workers = system.supervise("workers", RestartPolicy(Strategy.ONE, first_delay=0.1))
        worker = workers.spawn(lambda: Worker(disk))      # made anew at each restart

There is nothing global: any number of systems live side by side in one application.

Each actor serves its own box on its own task, in the order in which the event loop runs the tasks.
With a `Conductor` that order does not matter: whichever task wakes, or is about to wait, hands one
message at a time to the actor the conductor chooses, until all are quiet. The key of a candidate is
the number of messages it was delivered. Then what one outside task brings about is the same,
message for message, on trio and on asyncio, as long as it waits by `send`, `ask` and `wait_quiet`
only.

Under a conductor an async handler runs alone, from its choice to its return or its next wait for
another actor; what else it waits for, everybody waits for. It waits in one task at a time. No time
passes there: how long a restart takes is the conductor's choice, and a supervisor's clock advances
by the delays alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import anyio
import anyio.abc
import anyio.lowlevel

from .actor import Actor, AsyncActor, M, R
from .async_cell import AsyncCell
from .cell import Cell
from .conductor import Conductor
from .envelope import Observer, Tracer
from .mailbox import DEFAULT_BOUND
from .reference import ActorRef
from .reports import Listener, log
from .setting import ActorState, Decision, Setting
from .supervise import DEFAULT_POLICY, Group, Recovery, RestartPolicy
from .waits import WaitRecord, current

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
        listener: Told of failures that are mended, restarts, ends, and messages that will not be
            served; by default the log is.
    """

    def __init__(
        self,
        name: str,
        *,
        conductor: Conductor | None = None,
        observer: Observer | None = None,
        listener: Listener = log,
    ) -> None:
        self.name = name
        self._conductor = conductor
        self._granted: set[Cell[Any, Any]] = set()  # whose async handlers run, under a conductor
        self._virtual_time = 0.0
        tracer = None if observer is None else Tracer(observer)
        if conductor is None:
            self._setting = Setting(name, tracer, listener)
        else:
            self._setting = Setting(
                name,
                tracer,
                listener,
                self._settle,
                self._conduct,
                self._granted.__contains__,
                self._granted.discard,
                self._sweep,
            )
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
        self,
        actor: Actor[M, R] | AsyncActor[M, R],
        name: str | None = None,
        *,
        bound: int = DEFAULT_BOUND,
    ) -> ActorRef[M, R]:
        """Start an actor's task; messages are accepted, and asks served, from now on.

        Args:
            name: Unique among living actors of the system; by default `<class>-<number>`.
            bound: How many messages each lane of its mailbox holds at most.

        Raises:
            RuntimeError: The system is not running.
            ValueError: The name is taken.
        """
        return self._spawn(actor, name, bound, None, None)

    def supervise(self, name: str, policy: RestartPolicy = DEFAULT_POLICY) -> Supervisor:
        """Return a supervisor whose failures end the system."""
        return Supervisor(self, name, Group(policy, None))

    def _spawn(
        self,
        actor: Actor[M, R] | AsyncActor[M, R],
        name: str | None,
        bound: int,
        make: Callable[[], Any] | None,
        group: Group[Cell[Any, Any]] | None,
    ) -> ActorRef[M, R]:
        if self._tasks is None:
            raise RuntimeError(f"system {self.name!r} has not been entered")
        number = self._n_spawned
        name = name if name is not None else f"{type(actor).__name__}-{number}"
        if any(cell.name == name and cell.ended is None for cell in self._cells.values()):
            raise ValueError(f"system {self.name!r} already has an actor {name!r}")
        kind = AsyncCell[M, R] if isinstance(actor, AsyncActor) else Cell[M, R]
        decide = None if group is None else self._decider(group)
        cell = kind(actor, name, bound, self._setting, make, decide)
        self._tasks.start_soon(self._run, number, cell, name=f"{self.name}/{name}")
        self._cells[number] = cell
        self._n_spawned += 1
        if group is not None:
            group.add(cell)
            cell.on_end(lambda _end: group.remove(cell))
        return ActorRef(cell)

    def _decider(self, group: Group[Cell[Any, Any]]) -> Callable[[Cell[Any, Any]], Decision]:
        def decide(cell: Cell[Any, Any]) -> Decision:
            if self._conductor is None:
                return group.decide(cell, anyio.current_time())
            decision = group.decide(cell, self._virtual_time)
            if isinstance(decision, Recovery):
                self._virtual_time += decision.delay
            return decision

        return decide

    def tree(self) -> SystemTree:
        """Return the living actors as they are now: one task each."""
        return SystemTree(
            self.name,
            tuple(
                ActorRecord(f"{self.name}/{cell.name}", cell.actor_type, cell.state, cell.box.depth)
                for cell in self._cells.values()
                if cell.ended is None
            ),
        )

    def waits(self) -> tuple[WaitRecord, ...]:
        """Return who waits now at an actor of the system, actor by actor: edges of the graph."""
        return tuple(wait.record() for cell in self._cells.values() for wait in cell.box.waits)

    async def wait_quiet(self) -> None:
        """Pass a checkpoint; wait until no message is queued at any actor of the system.

        Must not be called from a handler. An actor that failed counts as quiet, one that will be
        restarted does not if it has mail.
        """
        if self._conductor is not None:
            self._conduct()
        await anyio.lowlevel.checkpoint()
        while any(cell.busy for cell in self._cells.values()):
            if self._served is None:
                self._served = anyio.Event()
            await self._served.wait()

    def cancel(self) -> None:
        """End every task of the system, and the block it is the system of, at the next wait."""
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    async def _run(self, number: int, cell: Cell[Any, Any]) -> None:
        try:
            await cell.run(self._after_serving)
        finally:
            del self._cells[number]
            self._after_serving()

    def _after_serving(self) -> None:
        if self._served is not None:
            self._served.set()
            self._served = None

    # Under a conductor.

    def _conduct(self) -> bool:
        """Take one step after the other, each of whom the conductor chooses.

        Stops when nobody is ready, when an async handler runs, when an actor fails for good, and
        after a while; only then returns True: the caller, or another task, has to go on.
        """
        assert self._conductor is not None
        if self._granted:
            return False
        for _ in range(_TURN):
            self._sweep()
            cells = self._cells.items()
            if any(cell.failure is not None for _, cell in cells):
                return False
            ready = [(number, cell.box.delivered) for number, cell in cells if cell.ready]
            if not ready:
                break
            cell = self._cells[self._conductor.next(ready)]
            if isinstance(cell, AsyncCell) and cell.needs_grant:
                self._granted.add(cell)
                cell.granted()
                return False
            cell.step_nowait()
        else:
            self._nudge_all()
            return True
        self._nudge_all()
        return False

    def _sweep(self) -> None:
        # No choice of the conductor's: an end changes nothing for others but by a notice, which is
        # a message. `_cells` itself is left alone, the tasks leave it when they end.
        for cell in self._cells.values():
            if cell.ended is None and cell.is_over and cell.state is not ActorState.SERVING:
                cell.end()

    def _nudge_all(self) -> None:
        # Who waits here for a handler to end could miss its next message.
        for cell in self._cells.values():
            if not (isinstance(cell, AsyncCell) and cell.resumes_when is not None):
                cell.nudge()

    async def _settle(self, is_there: Callable[[], bool]) -> None:
        """Wait for what an actor will do: with all others from outside, alone from a handler."""
        party = current.get()
        for cell in self._cells.values():
            if cell.party is party and isinstance(cell, AsyncCell):
                return await self._hand_over(cell, is_there)
        return await self.wait_quiet()

    async def _hand_over(self, cell: AsyncCell[Any, Any], is_there: Callable[[], bool]) -> None:
        """Let others run; return when the conductor has chosen this handler again."""
        cell.resumes_when = is_there
        self._granted.discard(cell)
        try:
            while cell not in self._granted:
                is_more = self._conduct()
                if is_more:
                    await anyio.lowlevel.checkpoint()
                elif cell not in self._granted:
                    await cell.nudged()
        finally:
            cell.resumes_when = None
            self._granted.add(cell)  # if cancelled, it runs on all the same

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


class Supervisor:
    """Spawn actors that are restarted by a policy, and further supervisors below this one.

    Made by `ActorSystem.supervise`; see `supervise` for what a policy says. It has no task: the
    actor that failed waits for the delay, on its own task, and restarts all who are concerned.
    """

    def __init__(self, system: ActorSystem, name: str, group: Group[Cell[Any, Any]]) -> None:
        self.name = name
        self._system = system
        self._group = group

    def spawn(
        self,
        make: Callable[[], Actor[M, R] | AsyncActor[M, R]],
        name: str | None = None,
        *,
        bound: int = DEFAULT_BOUND,
    ) -> ActorRef[M, R]:
        """Start the actor that `make` returns; at each restart another that it returns then.

        Reference, name, mailbox and what is queued in it outlive the actor; what it kept does not.

        Raises:
            RuntimeError, ValueError: As `ActorSystem.spawn`, and whatever `make` raises.
        """
        return self._system._spawn(make(), name, bound, make, self._group)

    def supervise(self, name: str, policy: RestartPolicy = DEFAULT_POLICY) -> Supervisor:
        """Return a supervisor whose failures are failures of a member of this one."""
        return Supervisor(self._system, name, Group(policy, self._group))

    @property
    def actors(self) -> tuple[str, ...]:
        """Names of the living actors below, in the order of their start."""
        return tuple(cell.name for cell in self._group.cells())
