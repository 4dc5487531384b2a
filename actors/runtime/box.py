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

import enum
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

import anyio
import anyio.lowlevel

from .errors import Closed, Deadlock
from .waits import ROOM, Channel, Wait

T = TypeVar("T")


@dataclass(frozen=True)
class MailboxStatistics:
    """What has gone through a box so far; counts are over both lanes.

    Invariant: each message is in exactly one place, `offered == delivered + coalesced + shot_down +
    reported + depth + parked`; and `accepted == delivered + undelivered + depth`.

    Attributes:
        offered: Messages that senders brought, whatever became of them.
        accepted: Messages that entered the box, as entries of their own.
        delivered: Messages that the consumer took.
        refused: Offered while full or closed, or withdrawn by a cancelled sender.
        control: The part of `accepted` that came by the control lane.
        depth: Messages in the box now.
        peak_depth: The largest `depth` so far.
        wakes: How often a waiting consumer was woken.
        parked: Senders waiting for room now.
        coalesced: Messages superseded, while queued, by a later one of the same key.
        shot_down: Messages that found the box full and were served on their sender's stack.
        undelivered: Accepted messages that will never be served: each was reported.
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
    coalesced: int = 0
    shot_down: int = 0
    undelivered: int = 0

    @property
    def reported(self) -> int:
        """Messages not served, of which somebody was told: their sender, or the system."""
        return self.refused + self.undelivered

    def check(self) -> None:
        """Assert that every message is in exactly one place."""
        gone = self.delivered + self.coalesced + self.shot_down + self.reported
        assert self.offered == gone + self.depth + self.parked
        assert self.accepted == self.delivered + self.undelivered + self.depth
        assert min(self.delivered, self.refused, self.undelivered, self.coalesced) >= 0


class Outcome(enum.Enum):
    """What became of an offer; false only if nothing did."""

    ACCEPTED = "accepted"
    COALESCED = "coalesced"
    SHOT_DOWN = "shot down"
    FULL = "full"

    def __bool__(self) -> bool:
        return self is not Outcome.FULL


# As globals: looking a member up on its enum costs more than the comparison itself.
ACCEPTED: Final = Outcome.ACCEPTED
COALESCED: Final = Outcome.COALESCED
SHOT_DOWN: Final = Outcome.SHOT_DOWN
FULL: Final = Outcome.FULL

Settle: TypeAlias = Callable[[Callable[[], bool]], Awaitable[None]]
"""What a sender awaits before it waits, under a conductor: given whether it still has to."""


class _Parked(Generic[T]):
    """A sender that waits for room, with what it brings."""

    __slots__ = ("answered", "item", "taken", "task")

    def __init__(self, item: T) -> None:
        self.item = item
        self.task = anyio.get_current_task()
        self.answered = anyio.Event()
        self.taken = False


class Box(Channel, Generic[T]):
    """Queue items for one consumer; refuse to grow beyond `bound` in either lane.

    Invariant: senders are parked only while the user lane is full, or while being cancelled; a
    closed box has none parked.

    Args:
        settle: What a sender awaits before it waits, in place of a bare checkpoint; see `Settle`.

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
        spill: What to try with an item that finds the box full; None: nothing. May return FULL.
    """

    def __init__(self, name: str, bound: int, settle: Settle | None = None) -> None:
        if bound < 1:
            raise ValueError(f"bound of {name!r} is {bound}, must be at least 1")
        super().__init__(name)
        self.items: list[T] = []
        self.control: list[T] = []
        self.bound = bound
        self._settle = settle
        self.room = bound
        self.closed = False
        self._parked: deque[_Parked[T]] = deque()
        self.wake: anyio.Event | None = None
        self.spill: Callable[[T], Outcome] | None = None
        # `accepted` and `offered` follow from these, so accepting counts nothing.
        self.delivered = 0
        self._refused = 0
        self._undelivered = 0
        self._coalesced = 0
        self._shot_down = 0
        self._n_control = 0
        self._peak = 0
        self._wakes = 0

    # The senders' side.

    def put_nowait(self, item: T) -> Outcome:
        """Queue the item, or return FULL, having done and counted nothing.

        Raises:
            Closed: Nothing was queued; counted as refused.
        """
        if len(self.items) >= self.room and self._is_full():
            return FULL
        self.items.append(item)
        if self.wake is not None:
            self.rouse()
        return ACCEPTED

    def put_control_nowait(self, item: T, *, beyond_bound: bool = False) -> Outcome:
        """As `put_nowait`, by the control lane, whose room does not depend on the user lane's.

        Args:
            beyond_bound: For what must not be refused and is bounded otherwise: notices of death.
        """
        self._refuse_if_closed()
        if len(self.control) >= self.bound and not beyond_bound:
            return FULL
        self.control.append(item)
        self._n_control += 1
        self.rouse()
        return ACCEPTED

    async def put(self, item: T) -> None:
        """Queue the item after a checkpoint, parking while the box is full.

        Cancelled at any of its waits, nothing was queued. (The one exception: a native
        `asyncio.Task.cancel()` that strikes between acceptance and resumption; the item stays.)

        Raises:
            Closed: The box was closed before there was room; nothing was queued.
            Deadlock: There would never be room; nothing was queued.
        """
        self._refuse_if_closed()
        try:
            if self._settle is not None:
                await self._settle_for_room(self._settle)
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
        if self.put_nowait(item) is FULL and (self.spill is None or self.spill(item) is FULL):
            await self._park(item)

    async def _settle_for_room(self, settle: Settle) -> None:
        if self._has_room():
            return await settle(self._has_room)
        wait = Wait(self, ROOM, "")
        wait.begin()
        try:
            return await settle(self._has_room)
        finally:
            wait.end()

    async def _park(self, item: T) -> None:
        parked = _Parked(item)
        wait = Wait(self, ROOM, parked.task.name or "")
        try:
            wait.begin()
        except Deadlock:
            self._refused += 1
            raise
        self._parked.append(parked)
        try:
            await parked.answered.wait()
        finally:
            wait.end()
            if not parked.answered.is_set():
                self._parked.remove(parked)
                self._refused += 1
        self._loop_turned()
        if not parked.taken:
            raise Closed(self.name)

    def _has_room(self) -> bool:
        return self.closed or len(self.items) < self.bound

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

    def count_shot_down(self) -> None:
        """Count a message that found the box full and is served on its sender's stack."""
        self._shot_down += 1

    # The consumer's side.

    async def wait(self) -> None:
        """Pass a checkpoint; while there is nothing to take, wait until somebody rouses us.

        May return with nothing to take: what was there can have been taken inline meanwhile.

        Raises:
            anyio.BusyResourceError: Another task waits here already.
        """
        if self.items or self.control or self.closed:
            await anyio.lowlevel.checkpoint()
            self._consumer_turned()
            return
        if self.wake is not None:
            raise anyio.BusyResourceError("waiting for messages at")
        wake = self.wake = anyio.Event()
        try:
            await wake.wait()
        finally:
            if self.wake is wake:
                self.wake = None
        self._consumer_turned()

    def _consumer_turned(self) -> None:
        # Under a conductor no sender's way may depend on when the loop let the consumer run.
        if self._settle is None:
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

    def withdraw(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out, as undelivered, what will never be served; the caller reports each."""
        self._note_peak()
        gone: list[T] = []
        for lane in (self.control, self.items):
            gone += filter(unwanted, lane)
            lane[:] = [item for item in lane if not unwanted(item)]
        self._undelivered += len(gone)
        if gone and self._parked:
            self._admit()
        return gone

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
        accepted = self.delivered + self._undelivered + self.depth
        superseded = self._coalesced + self._shot_down
        return MailboxStatistics(
            offered=accepted + superseded + self._refused + len(self._parked),
            accepted=accepted,
            delivered=self.delivered,
            refused=self._refused,
            control=self._n_control,
            depth=self.depth,
            peak_depth=self._peak,
            wakes=self._wakes,
            parked=len(self._parked),
            coalesced=self._coalesced,
            shot_down=self._shot_down,
            undelivered=self._undelivered,
        )

    def check(self) -> None:
        self.statistics().check()
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
                self._queue(parked.item)
                parked.taken = True
                parked.answered.set()

    def _queue(self, item: T) -> None:
        self.items.append(item)

    def _note_peak(self) -> None:
        # The lanes shrink only where they are taken from, and all those places come by here first.
        depth = len(self.items) + len(self.control)
        if depth > self._peak:
            self._peak = depth
