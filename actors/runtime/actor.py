"""What an actor is: a passive handler of one closed set of messages.

An actor decides and does not wait: `receive` takes a message and returns a reply at once. What
waits for it, queues for it and owns its task is its reference (`reference.py`). An application's
actor that must wait in its handler, for a file, a server, another actor, is an `AsyncActor`: that
costs it the inline ask, and it is served on its own task only, one message after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

import msgspec

from .overflow import SHOOT_DOWN, WAIT, Coalesce, Overflow

M = TypeVar("M", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct | None)


class Actor(ABC, Generic[M, R]):
    """Handle messages of type `M`, replying with `R`.

        class Counter(Actor[Add | Read, Total | None]):
            def receive(self, message: Add | Read) -> Total | None: ...

    Both types are taken from that class line, where they must be concrete: Struct classes, tagged
    where there are several; `None` is a reply, too.

    Attributes:
        overflow: What a full box means, and which messages replace each other.
    """

    accepts: Any
    replies: Any
    overflow: ClassVar[Overflow] = WAIT

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _declare(cls, Actor)

    @abstractmethod
    def receive(self, message: M) -> R:
        """Handle one message, which is the receiver's own copy. Must not wait."""


class AsyncActor(ABC, Generic[M, R]):
    """As `Actor`, but its handler may wait; so it is always asked by the queue.

    The next message is handled when the handler has returned. What it started must have ended by
    then: its tasks belong to task groups of its own. Its box cannot be shot down, as there may be a
    handler in the middle.
    """

    accepts: Any
    replies: Any
    overflow: ClassVar[Overflow] = WAIT

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _declare(cls, AsyncActor)
        policy = cls.overflow
        if (policy.full if isinstance(policy, Coalesce) else policy) is SHOOT_DOWN:
            raise TypeError(f"{cls.__qualname__} waits in its handler: it cannot be shot down")

    @abstractmethod
    async def receive(self, message: M) -> R:
        """Handle one message, which is the receiver's own copy."""


def _declare(cls: Any, base: type) -> None:
    for declared in cls.__dict__.get("__orig_bases__", ()):
        if get_origin(declared) is base:
            cls.accepts, cls.replies = get_args(declared)
    if not hasattr(cls, "accepts"):
        raise TypeError(f"{cls.__qualname__} must name its types: Actor[messages, replies]")
