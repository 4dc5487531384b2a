"""A mailbox: typed, encoded, bounded, with a control lane.

    box = Mailbox[Ping | Pong](Ping | Pong, name="player")
    box.offer(Ping(1))                    # synchronous: Outcome.ACCEPTED or Outcome.FULL
    await box.send(Ping(2))               # the same, but waits for room
    while batch := await box.drain():     # everything there is, control lane first; [] = closed
        ...

`send` checks for cancellation and lets others run when it has to wait and after `bound` calls in a
row, not at every call: that makes it cheap, and is less than a trio user expects of an await.
A full mailbox is a value, not an error: what to do about it is for the sender to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import msgspec

from .box import FULL, Box, MailboxStatistics, Outcome
from .codec import Codec
from .keyed_box import KeyedBox
from .overflow import WAIT, Coalesce, Overflow
from .waits import WaitRecord, current

M = TypeVar("M", bound=msgspec.Struct)

DEFAULT_BOUND: Final = 64


class Door(Generic[M]):
    """The senders' side of a box: what a mailbox and a reference to an actor have in common.

    Args:
        box: Where messages go.
        seal: What makes a message the receiver's own.
    """

    __slots__ = ("_box", "_items", "_put", "_seal")

    def __init__(self, box: Box[Any], seal: Callable[[M], object]) -> None:
        self._box = box
        self._seal = seal
        # Looked up once: these are the hot paths.
        self._items = box.items
        self._put = box.put_nowait

    @property
    def name(self) -> str:
        return self._box.name

    @property
    def closed(self) -> bool:
        return self._box.closed

    def offer(self, message: M) -> Outcome:
        """Queue a copy of the message if there is room. Never waits.

        Returns:
            What became of it, by the receiver's overflow policy; FULL: nothing, it was not taken.

        Raises:
            NotAccepted: The message is not of the declared type.
            Closed: The mailbox takes no more.
        """
        sealed = self._seal(message)
        outcome = self._put(sealed)
        return outcome if outcome is not FULL else self._overflow(sealed)

    def offer_control(self, message: M) -> Outcome:
        """Queue a copy of the message ahead of all user messages, however many there are."""
        outcome = self._box.put_control_nowait(self._seal(message))
        if outcome is FULL:
            self._box.refuse()
        return outcome

    async def send(self, message: M) -> None:
        """Queue a copy of the message as it is now, waiting while the mailbox is full.

        Cancelled, the message was not sent.

        Raises:
            NotAccepted: The message is not of the declared type.
            Closed: The mailbox was closed, before or while waiting.
        """
        sealed = self._seal(message)
        box, items = self._box, self._items
        if len(items) < box.room:  # as `Box.put_nowait` does: a call more would cost a tenth of all
            items.append(sealed)
            if box.wake is not None:
                box.rouse()
        else:
            await box.put(sealed)

    def _overflow(self, sealed: object) -> Outcome:
        """Say what becomes of a message offered to a full box."""
        spill = self._box.spill
        outcome = FULL if spill is None else spill(sealed)
        if outcome is FULL:
            self._box.refuse()
        return outcome

    def check(self) -> None:
        self._box.check()


class Mailbox(Door[M]):
    """Messages of one declared type on their way to one consumer.

    Args:
        accepts: The type of the messages: a Struct class, or a union of tagged ones.
        bound: How many messages each lane holds at most.
        name: Who is meant, in errors.
        overflow: `WAIT`, or a `Coalesce` that waits: a mailbox has no handler to shoot down to.
    """

    __slots__ = ()

    def __init__(
        self,
        accepts: Any,
        *,
        bound: int = DEFAULT_BOUND,
        name: str = "mailbox",
        overflow: Overflow = WAIT,
    ) -> None:
        if (overflow.full if isinstance(overflow, Coalesce) else overflow) is not WAIT:
            raise ValueError(f"{name!r} cannot shoot down: a mailbox has no handler, an actor has")
        box = Box[M](name, bound)
        if isinstance(overflow, Coalesce):
            box = KeyedBox[M](name, bound, overflow.key)
        super().__init__(box, Codec[M](accepts).seal)

    async def drain(self) -> list[M]:
        """Take all there is, control messages first, waiting while there is nothing.

        Always a checkpoint; cancelled, nothing was taken. One task may drain at a time.

        Returns:
            The messages, in order; empty only when the mailbox is closed and has nothing left.

        Raises:
            anyio.BusyResourceError: Another task is waiting here.
        """
        self._box.served_by = current.get()
        await self._box.wait()
        while not (batch := self.drain_nowait()) and not self._box.closed:
            await self._box.wait()
        return batch

    def drain_nowait(self) -> list[M]:
        """Take all there is, control messages first; possibly nothing."""
        box = self._box
        urgent = [box.take_one() for _ in range(len(box.control))]
        return urgent + box.take_all()

    def close(self) -> None:
        """Take no more messages; those queued can still be drained. Parked senders get `Closed`."""
        self._box.close()

    def waits(self) -> tuple[WaitRecord, ...]:
        """Return who waits for room here; served by the actor that drained it last, if one did."""
        return tuple(wait.record() for wait in self._box.waits)

    def statistics(self) -> MailboxStatistics:
        return self._box.statistics()
