"""Typed messages from one process to another: encoded, bounded, woken by a doorbell.

    line = Line(capacity=64, record_bytes=128)      in whoever starts the two
    sender = Sender(line.end(), Order)              in one process
    sender.offer(order) -> bool                     False: full, nothing was sent
    receiver = Receiver(line.end(), Order)          in another
    for order in receiver.drain(): ...              receiver.wait() sleeps until there are some

What is delivered is what `offer` said yes to, once and in order. A killed sender leaves no half
message. What a killed receiver had drained but not handled is gone: at most once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Generic, TypeVar

import msgspec

from penumbra.actors.core.ring import RingReader, RingWriter, ring_words
from penumbra.actors.core.shared_words import ProcessPorts, SharedWords
from penumbra.actors.processes.fabric import N_POLLS
from penumbra.actors.runtime.codec import members_of
from penumbra.actors.runtime.doorbell import Doorbell
from penumbra.actors.runtime.errors import NotAccepted

T = TypeVar("T")

_ASLEEP: Final = 0
_RING: Final = 8


@dataclass(frozen=True)
class LineEnd:
    """What a process needs to send or to receive; to be handed to it as an argument."""

    name: str
    capacity: int
    record_bytes: int
    bell: Doorbell

    @property
    def n_words(self) -> int:
        return _RING + ring_words(self.capacity, self.record_bytes)


class Line:
    """The words and the bell of one line; whoever makes it outlives both ends, or replaces them.

    Args:
        capacity: Messages that may be on their way.
        record_bytes: Length of the longest message, encoded.
    """

    def __init__(self, capacity: int = 64, record_bytes: int = 248) -> None:
        n_words = _RING + ring_words(capacity, record_bytes)
        self._shared = SharedWords.create(n_words)
        self._end = LineEnd(self._shared.name, capacity, record_bytes, Doorbell())

    def end(self) -> LineEnd:
        return self._end

    def close(self) -> None:
        self._shared.close()
        self._end.bell.close()


class _End:
    def __init__(self, end: LineEnd) -> None:
        self._fence = ProcessPorts().fence
        self._shared = SharedWords.attach(end.name, end.n_words)
        self._words = self._shared.words
        self._ring_words = self._words[_RING:]
        self._bell = end.bell


class Sender(_End, Generic[T]):
    """The one process that sends.

    Args:
        declared: The messages' class, a msgspec Struct, or a union of such.
    """

    def __init__(self, end: LineEnd, declared: Any) -> None:
        self._declared = frozenset(members_of(declared))
        super().__init__(end)
        self._encode = msgspec.msgpack.Encoder().encode
        self._ring = RingWriter(self._ring_words, end.capacity, end.record_bytes)
        self._offer = self._ring.offer

    def offer(self, message: T) -> bool:
        """Send a message; False = the line is full, and nothing was sent. Never waits.

        Raises:
            NotAccepted: It is of another class.
            ValueError: Encoded, it is longer than a record.
        """
        if message.__class__ not in self._declared:
            raise NotAccepted(message, "declared is another class")
        if not self._offer(self._encode(message)):
            return False
        self._fence()
        if self._words[_ASLEEP]:
            self._bell.ring()
        return True

    def offer_all(self, messages: Iterable[T]) -> int:
        """Send messages up to the first that finds the line full, with one look at the sleeper.

        Returns:
            How many were sent.
        """
        offer, encode, declared = self._offer, self._encode, self._declared
        n_sent = 0
        try:
            for message in messages:
                if message.__class__ not in declared:
                    raise NotAccepted(message, "declared is another class")
                if not offer(encode(message)):
                    break
                n_sent += 1
        finally:
            self._fence()
            if self._words[_ASLEEP]:
                self._bell.ring()
        return n_sent

    def close(self) -> None:
        self._ring.close()
        self._ring_words.release()
        self._shared.close()


class Receiver(_End, Generic[T]):
    """The one process that receives.

    Args:
        declared: As the sender declares it.
    """

    def __init__(self, end: LineEnd, declared: Any) -> None:
        super().__init__(end)
        self._decode = msgspec.msgpack.Decoder(declared).decode
        self._ring = RingReader(self._ring_words, end.capacity, end.record_bytes)

    def drain(self) -> list[T]:
        """Take all messages there are, oldest first.

        Raises:
            msgspec.ValidationError: One is not as declared; all that were there are gone.
        """
        decode = self._decode
        return [decode(record) for record in self._ring.drain()]

    def wait(self, timeout: float | None = None, n_polls: int = N_POLLS) -> bool:
        """Wait until there is a message: look a few times, then sleep; False if time is over."""
        ring = self._ring
        for _ in range(n_polls):
            if not ring.is_empty:
                return True
            os.sched_yield()
        until = None if timeout is None else monotonic() + timeout
        try:
            self._words[_ASLEEP] = 1
            self._fence()
            while ring.is_empty:
                rest = None if until is None else until - monotonic()
                if not self._bell.wait(rest):
                    return not ring.is_empty
        finally:
            self._words[_ASLEEP] = 0
        return True

    def close(self) -> None:
        self._ring.close()
        self._ring_words.release()
        self._shared.close()
