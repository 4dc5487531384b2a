"""Who waits for whom: the graph of actors and channels, and the cycles in it.

There are two things to wait for here: room in a channel (`ROOM`), and the reply to a question
(`REPLY`). Both are noted where they begin and forgotten where they end, by the channel and by the
party that waits, so the graph costs nothing while nobody waits. Only actors with async handlers,
and what their handlers start, can be part of a cycle: whoever serves a channel inside a handler
that waits does not serve it meanwhile.

A wait that would close a cycle in which nobody's patience ends (no deadline around any of the
waits) is refused: it would last for ever. This takes a handler to need all that it waits for; who
races waits against each other, and would cancel the one that closes a cycle, must set a deadline.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import anyio

from .errors import Deadlock

ROOM: Final = "room at"
REPLY: Final = "a reply of"


@dataclass(frozen=True)
class WaitRecord:
    """One edge of the graph, as it was: `who` waits for `what` `channel`.

    Attributes:
        who: `<system>/<actor>`, or the name of a task outside all actors ("" where unknown).
        what: "room at" or "a reply of".
        channel: Name of the mailbox or actor.
        served_by: The actor that serves the channel; "" if unknown.
        has_deadline: True if the wait ends by itself.
    """

    who: str
    what: str
    channel: str
    served_by: str
    has_deadline: bool


class Party:
    """Somebody who waits, and for whom is waited: an actor.

    Attributes:
        name: `<system>/<actor>`.
        actor: Its name within its system.
        waits: What it waits for now.
    """

    __slots__ = ("actor", "name", "waits")

    def __init__(self, system: str, actor: str) -> None:
        self.name = f"{system}/{actor}"
        self.actor = actor
        self.waits: list[Wait] = []


current: ContextVar[Party | None] = ContextVar("current", default=None)
"""The actor whose task this is; None outside all actors."""


class Channel:
    """What is waited at: a box, as the graph sees it.

    Attributes:
        served_by: Who takes from it; None: unknown.
        waits: Who waits there now, in order.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.served_by: Party | None = None
        self.waits: list[Wait] = []


class Wait:
    """Somebody's waiting at a channel, from `begin` to `end`."""

    __slots__ = ("channel", "has_deadline", "task", "what", "who")

    def __init__(self, channel: Channel, what: str, task: str) -> None:
        self.channel = channel
        self.what = what
        self.who = current.get()
        self.task = task
        self.has_deadline = False

    def begin(self) -> None:
        """Take part in the graph.

        Raises:
            Deadlock: This wait would never end; it has not begun.
        """
        if self.who is not None:
            self.has_deadline = anyio.current_effective_deadline() != math.inf
            cycle = None if self.has_deadline else _way(self, self.who, set())
            if cycle is not None:
                raise Deadlock(tuple((wait.name, wait.what, wait.channel.name) for wait in cycle))
            self.who.waits.append(self)
        self.channel.waits.append(self)

    def end(self) -> None:
        self.channel.waits.remove(self)
        if self.who is not None:
            self.who.waits.remove(self)

    @property
    def name(self) -> str:
        return self.who.name if self.who is not None else self.task

    def record(self) -> WaitRecord:
        served_by = self.channel.served_by
        return WaitRecord(
            self.name,
            self.what,
            self.channel.name,
            "" if served_by is None else served_by.name,
            self.has_deadline,
        )


def _way(first: Wait, to: Party, seen: set[Party]) -> list[Wait] | None:
    """Return the waits that lead from this one to a party, or None if none do."""
    server = first.channel.served_by
    if server is to:
        return [first]
    if server is None or server in seen:
        return None
    seen.add(server)
    for wait in server.waits:
        if not wait.has_deadline and (rest := _way(wait, to, seen)) is not None:
            return [first, *rest]
    return None
