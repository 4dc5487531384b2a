"""What a receiver declares about its own full box, as values.

    class Screen(Actor[Frame | Clear, None]):
        overflow = Coalesce(key=lambda message: message.line, full=SHOOT_DOWN)

`WAIT`: an offer is told that the box is full, a `send` waits for room. `Coalesce`: a message takes
the place of a queued one with the same key, full or not; without one to replace, `full` decides.
`SHOOT_DOWN`: a message that finds the box full calls the receiver, on the sender's stack: what is
queued is served, then the message. So nothing is lost, nothing grows, and the sender pays.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias


class Full(enum.Enum):
    """What a full box means to who brings a message."""

    WAIT = "wait"
    SHOOT_DOWN = "shoot down"


WAIT: Final = Full.WAIT
SHOOT_DOWN: Final = Full.SHOOT_DOWN


@dataclass(frozen=True)
class Coalesce:
    """Keep only the latest message of each key, at the place of the first.

    A message without a key, and a question, is a fence: nothing after it replaces anything before
    it. The control lane does not coalesce.

    Attributes:
        key: Of a message as its receiver sees it; None: it has none. Must not raise.
        full: What a box means that is full of other keys.
    """

    key: Callable[[Any], Hashable | None]
    full: Full = WAIT


Overflow: TypeAlias = Full | Coalesce
