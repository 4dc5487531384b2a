"""A bounded queue with a control lane: what waits, under mailboxes and actors.

One consumer, any number of senders, one event loop (not thread-safe: come from another thread by
`anyio.from_thread`). Putting is synchronous; only who finds the box full, or nothing to take,
waits, on an `anyio.Event`, so the same box works on trio and on asyncio.

What makes it cheap: the price of a message is the turn of the event loop, not the copying. So the
consumer takes the whole box per wake, and senders put at most `bound` items between two turns.

What makes it safe: a sender that finds the box full parks *with* its item; the consumer moves
parked items in, first come first served, at the moment it makes room. So nobody overtakes those who
wait, and a sender that is cancelled while parked has not sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

from .errors import Closed

T = TypeVar("T")


@dataclass(frozen=True)
class MailboxStatistics:
    """What has gone through a box so far; counts are over both lanes.

    Invariant: `offered == accepted + refused + parked` and `accepted == delivered + depth`.

    Attributes:
        offered: Messages that senders brought, whatever became of them.
        accepted: Messages that entered the box.
        delivered: Messages that the consumer took.
        refused: Offered while full or closed, or withdrawn by a cancelled sender.
        control: The part of `accepted` that came by the control lane.
        depth: Messages in the box now.
        peak_depth: The largest `depth` so far.
        wakes: How often a waiting consumer was woken.
        parked: Senders waiting for room now.
    """

    offered: int
    accepted: int
    delivered: int
    refused: int
    control: int
    depth: int
    peak_depth: int
    wakes: int
    parked: int


class _Parked(Generic[T]):
    """A sender that waits for room, with what it brings."""

    __slots__ = ("answered", "item", "taken", "task")

    def __init__(self, item: T) -> None:
        self.item = item
        self.task = anyio.get_current_task()
        self.answered = anyio.Event()
        self.taken = False


class Box(Generic[T]):
    """Queue items for one consumer; refuse to grow beyond `bound` in either lane.

    Invariant: senders are parked only while the user lane is full, or while being cancelled; a
    closed box has none parked.

    Args:
        settle: What a sender awaits before it waits, in place of a bare checkpoint.

    Attributes (to be read only, from outside, except by `Door.send`):
        items: The user lane: the same list for the life of the box.
        control: The control lane, likewise.
        bound: How many items either lane takes.
        closed: True if it takes no more.
        delivered: How many items were taken.
        room: How long the user lane may get before a sender must leave the fast path: `bound`, less
            what was taken since the loop last turned; 0 once closed. So one comparison tests for
            full, closed, and a checkpoint that is due.
        wake: What the consumer waits on, if it waits.
    """

    def __init__(
        self, name: str, bound: int, settle: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        if bound < 1:
            raise ValueError(f"bound of {name!r} is {bound}, must be at least 1")
        self.name = name
        self.items: list[T] = []
        self.control: list[T] = []
        self.bound = bound
        self._settle = settle
        self.room = bound
        self.closed = False
        self._parked: deque[_Parked[T]] = deque()
        self.wake: anyio.Event | None = None
        # `accepted` and `offered` follow from these, so accepting counts nothing.
        self.delivered = 0
        self._refused = 0
        self._n_control = 0
        self._peak = 0
        self._wakes = 0

    # The senders' side.

    def put_nowait(self, item: T) -> bool:
        """Queue the item, or return False when the box is full, having done and counted nothing.

        Raises:
            Closed: Nothing was queued; counted as refused.
        """
        if len(self.items) >= self.room and self._is_full():
            return False
        self.items.append(item)
        if self.wake is not None:
            self.rouse()
        return True

    def put_control_nowait(self, item: T) -> bool:
        """As `put_nowait`, by the control lane, whose room does not depend on the user lane's."""
        self._refuse_if_closed()
        if len(self.control) >= self.bound:
            return False
        self.control.append(item)
        self._n_control += 1
        self.rouse()
        return True

    async def put(self, item: T) -> None:
        """Queue the item after a checkpoint, parking while the box is full.

        Cancelled at any of its waits, nothing was queued. (The one exception: a native
        `asyncio.Task.cancel()` that strikes between acceptance and resumption; the item stays.)

        Raises:
            Closed: The box was closed before there was room; nothing was queued.
        """
        self._refuse_if_closed()
        try:
            if self._settle is not None:
                await self._settle()
            else:
                await anyio.lowlevel.checkpoint()
                if len(self.items) >= self.bound:
                    # Once more: a consumer that was roused takes its turn in this one or the next,
                    # and parking costs more than a turn.
                    await anyio.lowlevel.checkpoint()
        except BaseException:
            self._refused += 1
            raise
        self._loop_turned()
        if not self.put_nowait(item):
            await self._park(item)

    async def _park(self, item: T) -> None:
        parked = _Parked(item)
        self._parked.append(parked)
        try:
            await parked.answered.wait()
        finally:
            if not parked.answered.is_set():
                self._parked.remove(parked)
                self._refused += 1
        self._loop_turned()
        if not parked.taken:
            raise Closed(self.name)

    def _is_full(self) -> bool:
        self._refuse_if_closed()
        return len(self.items) >= self.bound

    def _refuse_if_closed(self) -> None:
        if self.closed:
            self._refused += 1
            raise Closed(self.name)

    def _loop_turned(self) -> None:
        self.room = 0 if self.closed else self.bound

    def refuse(self) -> None:
        """Count an offer that found the box full."""
        self._refused += 1

    # The consumer's side.

    async def wait(self) -> None:
        """Pass a checkpoint; while there is nothing to take, wait until somebody rouses us.

        May return with nothing to take: what was there can have been taken inline meanwhile.

        Raises:
            anyio.BusyResourceError: Another task waits here already.
        """
        if self.items or self.control or self.closed:
            await anyio.lowlevel.checkpoint()
            self._loop_turned()
            return
        if self.wake is not None:
            raise anyio.BusyResourceError("waiting for messages at")
        wake = self.wake = anyio.Event()
        try:
            await wake.wait()
        finally:
            if self.wake is wake:
                self.wake = None
        self._loop_turned()

    def rouse(self) -> None:
        """Wake the consumer if it waits, whether or not there is something to take."""
        if self.wake is not None:
            self._wakes += 1
            self.wake.set()
            self.wake = None

    def take_all(self) -> list[T]:
        """Take the whole user lane, in order; parked senders move up."""
        self._note_peak()
        batch = self.items.copy()
        self.items.clear()
        self.room -= len(batch)
        self.delivered += len(batch)
        if self._parked:
            self._admit()
        return batch

    def take_one(self) -> T:
        """Take one item, from the control lane if it has any. Something must be there."""
        self._note_peak()
        self.delivered += 1
        if self.control:
            return self.control.pop(0)
        item = self.items.pop(0)
        self.room -= 1
        if self._parked:
            self._admit()
        return item

    def hand_back(self, rest: list[T]) -> None:
        """Put the unserved rest of a batch in front again; the lane may then exceed its bound."""
        self.delivered -= len(rest)
        self.items[:0] = rest

    def close(self) -> None:
        """Take no more; parked senders are refused, what is queued can still be taken."""
        self.closed = True
        self.room = 0
        self._refused += len(self._parked)
        while self._parked:
            self._parked.popleft().answered.set()
        self.rouse()

    # Both.

    @property
    def depth(self) -> int:
        return len(self.items) + len(self.control)

    def statistics(self) -> MailboxStatistics:
        self._note_peak()
        accepted = self.delivered + self.depth
        return MailboxStatistics(
            offered=accepted + self._refused + len(self._parked),
            accepted=accepted,
            delivered=self.delivered,
            refused=self._refused,
            control=self._n_control,
            depth=self.depth,
            peak_depth=self._peak,
            wakes=self._wakes,
            parked=len(self._parked),
        )

    def check(self) -> None:
        assert not (self.closed and self._parked)
        for parked in self._parked:
            assert not parked.answered.is_set()
            assert len(self.items) >= self.bound or parked.task.has_pending_cancellation()
        assert self.wake is None or not (self.items or self.control)
        assert self.room <= (0 if self.closed else self.bound)

    def _admit(self) -> None:
        for parked in tuple(self._parked):
            if len(self.items) >= self.bound:
                return
            # A cancelled sender gets here before it can leave; to take its item would be to send
            # what its caller is about to learn was not sent.
            if not parked.task.has_pending_cancellation():
                self._parked.remove(parked)
                self.items.append(parked.item)
                parked.taken = True
                parked.answered.set()

    def _note_peak(self) -> None:
        # The lanes shrink only where they are taken from, and all those places come by here first.
        depth = len(self.items) + len(self.control)
        if depth > self._peak:
            self._peak = depth
