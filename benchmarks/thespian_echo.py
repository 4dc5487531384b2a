"""A Thespian actor in a process of its own, for one row; the package is in extra `bench`.

Apart, because the actor's process imports the module that names its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from harness import Side
from raw import MESSAGE

try:
    from thespian.actors import Actor, ActorExitRequest, ActorSystem
except ImportError:
    Actor = object  # the row asks whether it is there before it comes here

_DONE = "done"
_LOGGING = {"version": 1, "disable_existing_loggers": False}


class Counter(Actor):  # type: ignore[misc]
    """Takes messages; answers the one that asks whether it is done."""

    def receiveMessage(self, message: Any, sender: Any) -> None:
        if message == _DONE:
            self.send(sender, _DONE)


@contextmanager
def thespian_tells(n: int) -> Iterator[Side]:
    """Give a side: seconds per message told, until the last one has been handled."""
    system = ActorSystem("multiprocQueueBase", logDefs=_LOGGING, transientUnique=True)
    try:
        counter = system.createActor(Counter)
        assert system.ask(counter, _DONE, 30) == _DONE

        def side() -> float:
            start = perf_counter()
            for _ in range(n):
                system.tell(counter, MESSAGE)
            assert system.ask(counter, _DONE, 60) == _DONE
            return (perf_counter() - start) / n

        yield side
        system.tell(counter, ActorExitRequest())
    finally:
        system.shutdown()
