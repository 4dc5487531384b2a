"""What accompanies a message that expects an answer, or that somebody traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import anyio

from .waits import current

M = TypeVar("M")

Observer: TypeAlias = Callable[[int, str, str, bytes], None]
"""Told of each message when its handler is about to run, and of each reply when it has: sequence
number, sender, receiver, encoded value. "" is outside any handler of the system. Must not raise."""


class Answer:
    """A place for the reply to one question; given at most once, awaited by at most one task."""

    __slots__ = ("_error", "_event", "_given", "_reply")

    def __init__(self) -> None:
        self._given = False
        self._reply: Any = None
        self._error: Exception | None = None
        self._event: anyio.Event | None = None

    def give(self, reply: Any) -> None:
        self._settle(reply, None)

    def fail(self, error: Exception) -> None:
        self._settle(None, error)

    async def wait(self) -> Any:
        """Return the reply, or raise the error given instead. Waiting ends by either."""
        if not self._given:
            self._event = anyio.Event()
            await self._event.wait()
        return self.take()

    def is_given(self) -> bool:
        return self._given

    def take(self) -> Any:
        assert self._given
        if self._error is not None:
            raise self._error
        return self._reply

    def _settle(self, reply: Any, error: Exception | None) -> None:
        assert not self._given
        self._given, self._reply, self._error = True, reply, error
        if self._event is not None:
            self._event.set()


class Envelope(Generic[M]):
    """A message with its sender, the bytes that crossed, and where its reply goes (None: nowhere).

    `encoded` and `sender` are kept only where messages are traced.
    """

    __slots__ = ("answer", "encoded", "message", "sender")

    def __init__(self, message: M, encoded: bytes, sender: str, answer: Answer | None) -> None:
        self.message = message
        self.encoded = encoded
        self.sender = sender
        self.answer = answer


class Tracer:
    """Number what an observer is told, and know whose handler is running.

    Handlers on the stack do not wait, so one name says it: that of the innermost. Async handlers
    have a task of their own each, which knows its name.
    """

    __slots__ = ("_observer", "_seq", "running")

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._seq = 0
        self.running = ""

    @property
    def sender(self) -> str:
        """Name of the actor that acts now; "" outside all actors."""
        if self.running:
            return self.running
        party = current.get()
        return "" if party is None else party.actor

    def record(self, sender: str, receiver: str, encoded: bytes) -> None:
        self._observer(self._seq, sender, receiver, encoded)
        self._seq += 1
