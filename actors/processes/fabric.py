"""Worker processes of one app, each with derived values that are kept coherent with shared words.

    supervisor                                  worker process
    fabric = WorkerFabric(n, n_primary)         worker = Worker(seat, derive)
    Process(target, (fabric.seat(i), ...))      worker.store(entry, value)   all others are told
    ... one has died: fabric.bury(i)            worker.event()               a coherency event
    Process(target, (fabric.seat(i), ...))      worker.read(entry)           the derived value
                                                worker.wait()                until there is news

The primary words are shared; what is derived from them lies in each worker's own memory and may lag
until its next `event`. After an event a worker has seen every store that had ended before it.

Nobody waits for anybody: a full channel makes its consumer drop all it has derived (`lose`), so
that a worker that is stopped or dead holds up no other. What a killed worker leaves is its pending
record; until it is buried, events derive those entries anew. Who takes a seat starts with nothing
derived.

    words   matrix (`core.words`) | per seat 8: asleep, holder | primary

Source: A40 ¶57, ¶126, ¶128.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import index
from time import monotonic
from types import TracebackType
from typing import Final

import anyio.lowlevel

from penumbra.actors.core import DEFAULT_CAPACITY, Consumer, Layout, Matrix, Outcome, Producer
from penumbra.actors.core.shared_words import FENCED, UNFENCED, ProcessPorts, SharedWords
from penumbra.actors.runtime.doorbell import Doorbell

Derive = Callable[[int], int]
"""From a primary word to what is derived from it, 64 bits each; the same in every process."""

N_POLLS: Final = 64
"""How often a worker looks for news before it goes to sleep."""

_ASLEEP: Final = 0
_HOLDER: Final = 1
_SEAT_WORDS: Final = 8
_BASE: Final = 0
_MAX_WORD: Final = (1 << 64) - 1


class SeatTaken(RuntimeError):
    """Another process holds this seat, or held it and was not buried; nothing was changed."""


@dataclass(frozen=True)
class Plan:
    """Where everything stands in the shared words."""

    n: int
    n_primary: int
    capacity: int
    coalesces: bool
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        if self.n_primary < 1:
            raise ValueError(f"n_primary = {self.n_primary}: must be at least 1")
        object.__setattr__(self, "layout", Layout(self.n, self.capacity))

    def at_seat(self, index: int) -> int:
        return self.layout.n_words + _SEAT_WORDS * index

    @property
    def at_primary(self) -> int:
        return self.at_seat(self.n)

    @property
    def n_words(self) -> int:
        return self.at_primary + self.n_primary

    def matrix(self, words: memoryview[int], ports: ProcessPorts) -> Matrix:
        order = FENCED if self.coalesces else UNFENCED
        return Matrix(self.n, self.capacity, words, ports=ports, order=order)


@dataclass(frozen=True)
class Seat:
    """One worker's place in a fabric, to be handed to its process as an argument."""

    plan: Plan
    name: str
    index: int
    bells: tuple[Doorbell, ...]


class WorkerFabric:
    """The supervisor's side: it makes the words, hands out seats and clears away the dead.

    Args:
        n: Seats; one worker each at a time.
        n_primary: 64-bit words of primary data, zero at first.
        coalesces: A store to an entry whose last patch was not taken yet rewrites that patch. It
            costs a fence per store, and channels overflow when more than `capacity` *entries* are
            stored to between two events, not more than `capacity` stores.
    """

    def __init__(
        self,
        n: int,
        n_primary: int,
        *,
        capacity: int = DEFAULT_CAPACITY,
        coalesces: bool = False,
    ) -> None:
        self.plan = plan = Plan(n, n_primary, capacity, coalesces)
        self._ports = ProcessPorts()
        self._shared = SharedWords.create(plan.n_words)
        self._words = self._shared.words
        self._matrix = plan.matrix(self._words, self._ports)
        self._bells = tuple(Doorbell() for _ in range(n))
        self.primary = self._words[plan.at_primary :]

    def __enter__(self) -> WorkerFabric:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def seat(self, index: int) -> Seat:
        """Return what the worker's process is to be given."""
        self._check(index)
        return Seat(self.plan, self._shared.name, index, self._bells)

    def bury(self, index: int) -> None:
        """Clear away what a worker left that was killed; its seat may be taken again.

        The caller has waited until the process was gone. Every other worker drops at its next event
        what it has derived: nobody can say which of the dead one's stores they were told of.
        """
        self._check(index)
        self._matrix.restart_producer(index)
        seat = self.plan.at_seat(index)
        self._words[seat + _ASLEEP] = 0
        self._words[seat + _HOLDER] = 0
        _wake(self._words, self._ports.fence, _sleepers(self.plan, self._bells, index))

    def close(self) -> None:
        """Let go of words and bells; workers that still run keep theirs."""
        self.primary.release()
        self._shared.close()
        for bell in self._bells:
            bell.close()

    def _check(self, index: int) -> None:
        if not 0 <= index < self.plan.n:
            raise IndexError(f"no seat {index} in a fabric of {self.plan.n}")


class Worker:
    """One process's side: stores to primary words, and what it has derived from them.

    Invariant: after `event`, what is derived for an entry is derived from a value that the entry
    had when the event began, or later.

    Attributes:
        primary: The shared words; read freely, write through `store`.
        derived: What is derived now, by entry.
        n_taken: Values taken from patches; `n_derived` counts the others, `n_drops` overflows met.

    Raises:
        SeatTaken: Somebody sits there.
    """

    def __init__(self, seat: Seat, derive: Derive) -> None:
        ports = ProcessPorts()
        self._fence = ports.fence
        self._shared = SharedWords.attach(seat.name, seat.plan.n_words)
        self._words = self._shared.words
        plan = seat.plan
        self._n_primary = plan.n_primary
        self._seat = plan.at_seat(seat.index)
        holder = self._words[self._seat + _HOLDER]
        if holder:
            self._shared.close()
            raise SeatTaken(f"seat {seat.index} is held by process {holder}: bury it first")
        self._words[self._seat + _HOLDER] = os.getpid()
        self.index = seat.index
        self._bell = seat.bells[seat.index]
        self._sleepers = _sleepers(plan, seat.bells, seat.index)
        self._derive = derive
        matrix = plan.matrix(self._words, ports)
        self.producer: Producer = matrix.producer(seat.index)
        self.consumer: Consumer = matrix.restart_consumer(seat.index)
        self._others = [i for i in range(plan.n) if i != seat.index]
        self.primary = self._words[plan.at_primary :]
        self.derived: dict[int, int] = {}
        self.n_taken = self.n_derived = self.n_drops = 0

    def store(self, entry: int, value: int) -> None:
        """Change a primary word and tell all other workers; never waits (P1-P9).

        Raises:
            IndexError, TypeError, ValueError: There is no such entry, or the value, or what is
                derived from it, is no word. Nothing was stored.
        """
        self._check(entry)
        derived = _word(self._derive(_word(value, "value")), "derived value")
        producer = self.producer
        producer.begin(((_BASE, entry),))
        self.primary[entry] = value
        producer.stored()
        for consumer in self._others:
            posted = producer.post_nowait(consumer, _BASE, entry, derived, value)
            if posted is Outcome.FULL:
                producer.lose(consumer)
        producer.end()
        self.derived[entry] = derived
        _wake(self._words, self._fence, self._sleepers)

    def read(self, entry: int) -> int:
        """Return what is derived for an entry: as of the last event, or of now if it was not."""
        derived = self.derived.get(entry)
        if derived is None:
            self._check(entry)
            self.consumer.begin_fill()
            derived = self.derived[entry] = self._derive(self.primary[entry])
            self.consumer.settle()
            self.n_derived += 1
        return derived

    def event(self, covers: Callable[[int], bool] | None = None) -> None:
        """Make what is derived coherent with every store that has ended (C1-C9).

        Args:
            covers: Which entries the event is about; None = all. The others may go on lagging.

        Raises:
            Exception: `covers` or `derive` has failed, or the event was interrupted: what had been
                derived is dropped, which is always coherent.
        """
        try:
            self._take(covers)
        except BaseException:
            self.consumer.drop_all()
            self.derived.clear()
            raise

    def _take(self, covers: Callable[[int], bool] | None) -> None:
        consumer = self.consumer
        drained = consumer.event(None if covers is None else lambda _, entry: covers(entry))
        if drained.drop_all:
            self.derived.clear()
            self.n_drops += 1
        for patch in drained.patches:
            entry = patch.offset
            if entry not in self.derived:
                continue
            current = self.primary[entry]
            if consumer.usable(patch, current):
                self.derived[entry] = patch.derived
                self.n_taken += 1
            else:
                self.derived[entry] = self._derive(current)
                self.n_derived += 1
        consumer.settle()

    def wait(self, timeout: float | None = None, n_polls: int = N_POLLS) -> bool:
        """Wait until somebody has told something since the last event; False if time is over.

        Looks a few times, then sleeps.
        """
        if self._has_news(n_polls):
            return True
        until = None if timeout is None else monotonic() + timeout
        try:
            while self._may_sleep():
                rest = None if until is None else until - monotonic()
                if not self._bell.wait(rest):
                    return self.consumer.is_rung
        finally:
            self._words[self._seat + _ASLEEP] = 0
        return True

    async def wait_news(self, n_polls: int = N_POLLS) -> None:
        """Like `wait`, in trio's or asyncio's event loop."""
        if self._has_news(n_polls):
            await anyio.lowlevel.checkpoint()
            return
        try:
            while self._may_sleep():
                await self._bell.wait_rung()
        finally:
            self._words[self._seat + _ASLEEP] = 0

    def leave(self) -> None:
        """Give the seat back."""
        self._words[self._seat + _HOLDER] = 0
        self.primary.release()
        del self.producer, self.consumer
        self._shared.close()

    def _check(self, entry: int) -> None:
        if not 0 <= entry < self._n_primary:
            raise IndexError(f"no primary word {entry} among {self._n_primary}")

    def _has_news(self, n_polls: int) -> bool:
        for _ in range(n_polls):
            if self.consumer.is_rung:
                return True
            os.sched_yield()
        return False

    def _may_sleep(self) -> bool:
        """Say that this worker sleeps, then look once more: a store from now on rings."""
        self._words[self._seat + _ASLEEP] = 1
        self._fence()
        return not self.consumer.is_rung


def _word(value: int, what: str) -> int:
    if not 0 <= index(value) <= _MAX_WORD:
        raise ValueError(f"{what} {value:#x}: not an unsigned 64-bit word")
    return value


def _sleepers(plan: Plan, bells: tuple[Doorbell, ...], waker: int) -> list[tuple[int, Doorbell]]:
    """Return for each other worker the word that says that it sleeps, and its bell."""
    return [(plan.at_seat(i) + _ASLEEP, bell) for i, bell in enumerate(bells) if i != waker]


def _wake(
    words: memoryview[int], fence: Callable[[], None], sleepers: list[tuple[int, Doorbell]]
) -> None:
    """Ring for those who sleep; what they are to find has been stored."""
    fence()
    for asleep, bell in sleepers:
        if words[asleep]:
            bell.ring()
