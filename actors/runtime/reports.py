"""What a system says about its actors' lives, to whoever listens.

Nothing that is lost is lost silently: a failure that is mended, a message that will never be
served. Without a listener these go to the log `penumbra.actors.runtime`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

_LOG = logging.getLogger("penumbra.actors.runtime")


@dataclass(frozen=True)
class Failed:
    """A handler of a supervised actor raised `error`, and this is what its supervisor decided.

    Attributes:
        restarts: Names of the actors that restart, in the order of their start.
        ends: Names of those that end. Neither: the failure ends the system.
        delay: Seconds until the restart.
    """

    actor: str
    error: Exception
    restarts: tuple[str, ...]
    ends: tuple[str, ...]
    delay: float


@dataclass(frozen=True)
class Restarted:
    """An actor serves again, for the `n_restarts`-th time, with the queue it had."""

    actor: str
    n_restarts: int


@dataclass(frozen=True)
class Ended:
    """An actor serves no more.

    Attributes:
        reason: "closed", "cancelled" or "failed".
        cause: The text of what a handler raised, if it failed.
        n_undelivered: How many messages were left; each is reported as `Undelivered`.
    """

    actor: str
    reason: str
    cause: str
    n_undelivered: int


@dataclass(frozen=True)
class Undelivered:
    """A message was accepted and will not be served; who asked was told so.

    Attributes:
        reason: "restarting" for a question, else as in `Ended`.
        asked: True if it was a question.
    """

    actor: str
    message: msgspec.Struct
    reason: str
    asked: bool


Report: TypeAlias = Failed | Restarted | Ended | Undelivered
Listener: TypeAlias = Callable[[Report], None]
"""Told of each report as it happens, on the stack on which it does. Must not raise or send."""


def log(report: Report) -> None:
    """Write what nobody else is told of to the log."""
    match report:
        case Failed(actor, error, restarts):
            _LOG.warning("a handler of %r failed; restarts: %s", actor, restarts, exc_info=error)
        case Undelivered(actor, message, reason, asked) if not asked:
            _LOG.warning("%r (%s) was not given %r", actor, reason, message)
        case _:
            _LOG.debug("%r", report)
