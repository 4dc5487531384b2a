"""A reference: all that others hold of an actor.

A message gets to the actor in one of three ways, always encoded and decoded, always handled the
same; one never knows from inside the handler which it was:

- told (`offer`, `send`): queued; the actor's task serves the whole box per wake. The reply is
  dropped.
- asked inline (`ask_nowait`, and `ask` while nothing is queued): the handler runs on the caller's
  stack. That costs no turn of the event loop, and no cancellation can come between.
- asked by the queue (`ask` else): the actor's task serves it, the caller waits for the reply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.lowlevel
import msgspec

from .actor import M, R
from .box import FULL
from .cell import Cell
from .envelope import Answer, Envelope
from .errors import AskTimeout
from .mailbox import Door
from .reports import Ended
from .setting import ActorState, ActorStatistics
from .waits import REPLY, Wait

W = TypeVar("W", bound=msgspec.Struct)


class ActorRef(Door[M], Generic[M, R]):
    """Send to one actor, ask it, end it. Made by `ActorSystem.spawn`.

    For use in the event loop that the system runs in, by its handlers and by any task.
    """

    __slots__ = ("_cell", "_unyielded")

    def __init__(self, cell: Cell[M, R]) -> None:
        super().__init__(cell.box, cell.seal)
        self._cell = cell
        self._unyielded = 0

    @property
    def state(self) -> ActorState:
        return self._cell.state

    def ask_nowait(self, message: M) -> R:
        """Serve what is queued, then this message, on the caller's stack; return the reply.

        Raises:
            NotAccepted: The message is not of the declared type; nothing was served.
            Reentered: The actor is on the stack already; nothing was served.
            HandlerFailed: A handler raised, in serving this message or one queued before it.
            Closed: The actor has ended, or is about to.
            Restarting: The actor is being restarted; this message was not served.
            MustQueue: The actor is an `AsyncActor`.
        """
        return self._cell.ask_nowait(message)

    async def ask(self, message: M, within: float | None = None, *, inline: bool = True) -> R:
        """Return the reply to this message: inline while nothing is queued, else by the queue.

        The caller's cancellation never stops the actor half-way. An inline ask passes a checkpoint
        once per `bound` asks only; an ask by the queue always does. If the caller is cancelled or
        the time is over while the question waits for room, it is withdrawn; once queued it will be
        served.

        Args:
            within: Seconds until waiting, for room and for the reply, is given up.
            inline: False: always by the queue, as under a conductor.

        Raises:
            AskTimeout: There was no reply in time.
            Restarting: The actor failed before it came to this question, and is restarted.
            Deadlock: The reply would never come, as the actor waits for the asking one.
            NotAccepted, Reentered, HandlerFailed, Closed: As `ask_nowait`.
        """
        cell = self._cell
        if not inline or cell.box.items or cell.box.control or cell.by_queue:
            return await self._ask_queued(message, within)
        self._unyielded += 1
        if self._unyielded > cell.box.bound:
            self._unyielded = 0
            message = cell.messages.seal(message)  # as it is now, whoever changes it meanwhile
            await anyio.lowlevel.checkpoint()
        return cell.ask_nowait(message)

    async def _ask_queued(self, message: M, within: float | None) -> R:
        cell, answer = self._cell, Answer()
        if not cell.takes_questions:
            raise cell.refusal()
        envelope = cell.envelope(message, answer)
        if within is None:  # a scope costs as much as a turn of the loop
            return await self._wait_for(envelope, answer)
        # A scope itself: `move_on_after` makes it inside a generator, a tenth dearer.
        with anyio.CancelScope(deadline=anyio.current_time() + within):
            return await self._wait_for(envelope, answer)
        raise AskTimeout(self.name, within)

    async def _wait_for(self, envelope: Envelope[M], answer: Answer) -> R:
        box, settle = self._cell.box, self._cell.settle
        wait = Wait(box, REPLY, "")
        wait.begin()
        try:
            if box.put_nowait(envelope) is FULL:
                await box.put(envelope)
            if settle is not None:
                await settle(answer.is_given)
            return cast(R, await answer.wait())
        finally:
            wait.end()

    def watch(self, watcher: ActorRef[W, Any], notice: Callable[[Ended], W]) -> None:
        """Have a message sent to another actor, by its control lane, when this one has ended.

        It is sent at once if this one has ended already; it takes no room from other control
        messages, and is dropped if the watcher has ended or is about to. A restart is no end.

        Args:
            notice: Makes the message.
        """

        def tell(end: Ended) -> None:
            if not watcher.closed:
                watcher._box.put_control_nowait(watcher._seal(notice(end)), beyond_bound=True)

        self._cell.on_end(tell)

    async def wait_ended(self) -> Ended:
        """Pass a checkpoint; wait until the actor has ended, return why."""
        has_ended = anyio.Event()
        self._cell.on_end(lambda _end: has_ended.set())
        await has_ended.wait()
        assert self._cell.ended is not None
        return self._cell.ended

    def close(self) -> None:
        """Take no more messages and no more asks; serve what is queued, then end the task."""
        self._cell.close()

    def cancel(self) -> None:
        """End the task at its next wait; asks still queued get `Closed`, the rest is not served."""
        self._cell.cancel()

    def statistics(self) -> ActorStatistics:
        return self._cell.statistics()

    def check(self) -> None:
        self._cell.check()
