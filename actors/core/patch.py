"""What goes into a channel, what comes out of it, and what a channel has seen: plain records.

Source: A40 Fig. 9, ¶99-101.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

import msgspec

NO_SLOT: Final = -1
NO_PRODUCER: Final = -1


class ProtocolError(RuntimeError):
    """The caller broke the order of calls; nothing was read or written."""


class Outcome(IntEnum):
    """What became of a post. `FULL`: nothing was written, the caller owes a shootdown (844)."""

    POSTED = 0
    COALESCED = 1
    FULL = 2


class Postpone(Enum):
    """Where a patch waits that the event does not cover (868).

    Source: A40 ¶117, step 870.
    """

    IN_CHANNEL = "channel"
    IN_STORE = "store"


class Patch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A primary entry has changed: read it, and make what was derived from it coherent.

    Base and offset alone oblige; the derived value is an offer, to be taken only if
    `Consumer.usable` says so. Nothing here promises that the entry still differs from what it was.

    Attributes:
        usefulness: Trace count when the value was derived; 0 = there is no derived value.
        source: The primary entry it was derived from.
        producer: Whose channel it came from, or whose pending record; -1 from the private store.
        number: Slot in its channel; -1 if it came from none.
    """

    base: int
    offset: int
    derived: int = 0
    source: int = 0
    usefulness: int = 0
    producer: int = NO_PRODUCER
    number: int = NO_SLOT


class Drained(msgspec.Struct, frozen=True, array_like=True):
    """What a coherency event obliges its VCPU to do before the next instruction.

    `drop_all`: drop all secondary data, then there are no patches. Else make coherent what each
    patch names, in this order or any other.
    """

    patches: list[Patch]
    drop_all: bool = False


class ChannelStatistics(msgspec.Struct, frozen=True):
    """What one channel has seen.

    Invariant: `n_posted == n_applied + n_stored + n_dropped + n_in_channel`; a post is counted in
    exactly one of `n_posted`, `n_coalesced` and `n_overflows`.

    Attributes:
        n_applied: Patches handed to an event that covered them, straight from the channel.
        n_stored: Patches moved to the consumer's private store.
        n_dropped: Patches freed because all secondary data was dropped.
        peak: Largest number of patches ever in the channel at once.
    """

    n_posted: int
    n_coalesced: int
    n_overflows: int
    n_applied: int
    n_stored: int
    n_dropped: int
    n_in_channel: int
    peak: int
