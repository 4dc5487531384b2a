"""What an actor is: a passive handler of one closed set of messages.

An actor decides and does not wait: `receive` takes a message and returns a reply at once. What
waits for it, queues for it and owns its task is its reference (`reference.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar, get_args, get_origin

import msgspec

M = TypeVar("M", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct | None)


class Actor(ABC, Generic[M, R]):
    """Handle messages of type `M`, replying with `R`.

        class Counter(Actor[Add | Read, Total | None]):
            def receive(self, message: Add | Read) -> Total | None: ...

    Both types are taken from that class line, where they must be concrete: Struct classes, tagged
    where there are several; `None` is a reply, too.
    """

    accepts: Any
    replies: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            if get_origin(base) is Actor:
                cls.accepts, cls.replies = get_args(base)
        if not hasattr(cls, "accepts"):
            raise TypeError(f"{cls.__qualname__} must name its types: Actor[messages, replies]")

    @abstractmethod
    def receive(self, message: M) -> R:
        """Handle one message, which is the receiver's own copy. Must not wait."""
