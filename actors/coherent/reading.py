"""Who is reading: how a source learns on whose behalf it is read.

A derivation is an ordinary coroutine that reads its sources; which keys it read is what its value
depends on. The source finds the derivation under way in a context variable, so helper functions and
tasks that a derivation starts are heard, too, and nothing can be forgotten. The variable holds what
the current task is doing, never data; see `docs/decisions/0006`.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import ContextVar
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from .source import Source


class Absent(Enum):
    """What stands in place of a value where there is none."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"

    def __bool__(self) -> bool:
        return False


AbsentType = Literal[Absent.ABSENT]
ABSENT: Final[AbsentType] = Absent.ABSENT


class Change(msgspec.Struct, frozen=True):
    """One primary entry has changed: what a derived value used, and what is true now.

    However many writes lie between, there is one `Change`: patches coalesce.

    Attributes:
        old: What the derived value was made from; ABSENT: there was no such key.
        new: What the source holds now; ABSENT: the key is gone.
    """

    source: str
    key: Any
    old: Any
    new: Any


class Reading(Protocol):
    """On whose behalf the current task reads."""

    def read_value(self, source: Source[Any, Any], key: Hashable) -> Any:
        """Return the value of a key as this reader is to see it, or ABSENT; note that it read."""
        ...

    def read_keys(self, source: Source[Any, Any]) -> list[Any]:
        """Return the keys as this reader is to see them; note that it read them."""
        ...

    @property
    def open(self) -> bool:
        """False once the derivation has ended: a task that outlives it reads for itself."""
        ...


_reading: ContextVar[Reading | None] = ContextVar("penumbra_coherent_reading", default=None)
enter_reading = _reading.set
leave_reading = _reading.reset


def current_reading() -> Reading | None:
    """Return the derivation that the current task works for, or None."""
    reading = _reading.get()
    return reading if reading is not None and reading.open else None
