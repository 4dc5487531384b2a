"""What a cell is given by its system, and what it says of itself."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .box import MailboxStatistics, Settle
from .envelope import Tracer
from .reports import Listener
from .supervise import Dismissal, Recovery

if TYPE_CHECKING:
    from .cell import Cell


class ActorState(enum.Enum):
    """What an actor is doing.

    IDLE can be asked. SERVING is in a handler. RESTARTING failed and comes back. CLOSING serves
    what is queued, then is CLOSED. FAILED and CLOSED are never served again.
    """

    IDLE = "idle"
    SERVING = "serving"
    RESTARTING = "restarting"
    CLOSING = "closing"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True)
class ActorStatistics:
    """How an actor was reached: by its mailbox, and by asks on a caller's stack."""

    mailbox: MailboxStatistics
    inline: int
    n_restarts: int = 0


Decision: TypeAlias = "Recovery[Cell[Any, Any]] | Dismissal[Cell[Any, Any]] | None"


class Setting:
    """What a system gives to each of its cells.

    Attributes:
        system: Its name.
        tracer: Told of each message and reply; None if nobody traces.
        tell: Told of failures, restarts, ends and what was not delivered.
        settle: What a task awaits before it waits for an actor; None: nothing.
        conduct: Serve whoever the conductor chooses, return whether there is more to serve at once;
            None: there is no conductor, each task serves its own.
        is_granted: Under a conductor: whether this cell's async handler may run.
        release: Under a conductor: this cell's async handler does not run any more.
        sweep: Under a conductor: end all whose time has come, in the order of their start.
    """

    def __init__(
        self,
        system: str,
        tracer: Tracer | None,
        tell: Listener,
        settle: Settle | None = None,
        conduct: Callable[[], bool] | None = None,
        is_granted: Callable[[Cell[Any, Any]], bool] = lambda _cell: False,
        release: Callable[[Cell[Any, Any]], None] = lambda _cell: None,
        sweep: Callable[[], None] | None = None,
    ) -> None:
        self.system = system
        self.tracer = tracer
        self.tell = tell
        self.settle = settle
        self.conduct = conduct
        self.is_granted = is_granted
        self.release = release
        self.sweep = sweep
