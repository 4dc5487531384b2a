"""The order of the protocol's steps, and every way of getting it wrong that is worth showing.

`Order.CORRECT` is the order P1-P9 and C1-C9 of `producer` and `consumer`. A switch takes one step
out of it or moves one: printed forms of the texts, naive forms that lose or misuse updates, and a
few variants that are as correct as the default. Switches combine with `|`. `SWITCHES` says of each
where it acts, which of the six races it opens, and on which memory it shows.

Where exits are atomic (one process under a conductor, overflow served by a plain call) the steps
that only order two running sides do nothing: `ATOMIC` leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntFlag
from types import MappingProxyType
from typing import Final, NamedTuple


class Order(IntFlag):
    """Which steps are left out or moved; `CORRECT` is none."""

    CORRECT = 0
    NO_SOURCE_COMPARE = 1 << 0
    FREE_LAST = 1 << 1
    NO_VERSION = 1 << 2
    NO_PENDING = 1 << 3
    PENDING_READ_LATE = 1 << 4
    BELL_READ_BEFORE_PENDING = 1 << 5
    PENDING_AFTER_STORE = 1 << 6
    PENDING_CLEARED_EARLY = 1 << 7
    NO_COUNT_CHECK = 1 << 8
    NO_RECHECK = 1 << 9
    NO_ENTRY_LOCK = 1 << 10
    IN_USE_FIRST = 1 << 11
    RING_EARLY = 1 << 12
    LEFT_UNMARKED = 1 << 13
    NO_PRODUCER_FENCE = 1 << 14
    NO_CONSUMER_FENCE = 1 << 15
    BELL_FLAG = 1 << 16
    BELL_PLAIN_CLEAR = 1 << 17
    BELL_CLEARED_LATE = 1 << 18
    VOID_ON_COALESCE = 1 << 19
    NO_COALESCING = 1 << 20
    NO_CHANNEL_LOCK = 1 << 21
    RELINK_AS_IS = 1 << 22


ATOMIC: Final = (
    Order.NO_PENDING
    | Order.NO_VERSION
    | Order.NO_RECHECK
    | Order.NO_ENTRY_LOCK
    | Order.NO_PRODUCER_FENCE
    | Order.NO_CONSUMER_FENCE
)


class Kind(Enum):
    """What a switch is: a mistake, the texts' own mistake, or another correct way."""

    FAULT = "fault"
    PRINTED = "printed"
    VARIANT = "variant"


class Memory(Enum):
    """The strongest memory on which a switch shows: SC, or only with store buffers."""

    SC = "sc"
    TSO = "tso"
    NONE = "none"


class Switch(NamedTuple):
    """One row of the catalogue.

    `order` is what to hand to a matrix; a switch that means something only in company has more than
    one bit. `race` is the number of the race it opens, 0 for none of the six.
    """

    order: Order
    kind: Kind
    race: int
    shows: Memory
    place: str
    line: str


_F, _P, _V = Kind.FAULT, Kind.PRINTED, Kind.VARIANT
_SC, _TSO, _NO = Memory.SC, Memory.TSO, Memory.NONE

# fmt: off
SWITCHES: Final[Mapping[str, Switch]] = MappingProxyType({
    "no_source_compare": Switch(
        Order.NO_SOURCE_COMPARE, _F, 1, _SC, "consumer C8",
        "a derived value counts as useful though another producer has changed the entry since",
    ),
    "free_last": Switch(
        Order.FREE_LAST, _P, 2, _SC, "consumer C5",
        "878 as printed: a patch is freed after the entry was read; what coalesces between is lost",
    ),
    "no_version": Switch(
        Order.NO_VERSION, _F, 3, _SC, "producer P5, consumer C3",
        "837 rewrites a patch void first, useful last, unversioned: 1, 2, 1 passes for 1",
    ),
    "no_pending": Switch(
        Order.NO_PENDING, _F, 4, _SC, "producer P1, consumer C1",
        "a store is visible before its patch: an event in between finds nothing to do",
    ),
    "pending_read_late": Switch(
        Order.PENDING_READ_LATE, _F, 4, _SC, "consumer C1",
        "pending is read after the slots: posted and cleared in between, a store is in neither",
    ),
    "bell_read_before_pending": Switch(
        Order.BELL_READ_BEFORE_PENDING, _F, 4, _SC, "consumer C1",
        "the bells are read before pending: rung and cleared in between, a channel is missed",
    ),
    "pending_after_store": Switch(
        Order.PENDING_AFTER_STORE, _F, 4, _SC, "producer P1",
        "pending is published after the store: visible a moment before anything says so",
    ),
    "pending_cleared_early": Switch(
        Order.PENDING_CLEARED_EARLY, _F, 4, _SC, "producer P9",
        "pending is cleared before the consumers are posted",
    ),
    "no_count_check": Switch(
        Order.NO_COUNT_CHECK, _F, 5, _SC, "consumer C8",
        "a derived value is used though a trace has been placed since: a traced page gets writable",
    ),
    "no_recheck": Switch(
        Order.NO_RECHECK, _F, 5, _SC, "consumer C9",
        "a trace placer writes the copies itself, just before an install that does not look",
    ),
    "no_entry_lock": Switch(
        Order.NO_ENTRY_LOCK, _F, 6, _SC, "shared copy",
        "two consumers of one copy: the later install may come from the older read",
    ),
    "in_use_first": Switch(
        Order.IN_USE_FIRST, _F, 0, _SC, "producer P6",
        "842 and the ring before 840: half a patch is read",
    ),
    "ring_early": Switch(
        Order.RING_EARLY, _F, 0, _SC, "producer P7",
        "the bell rings before the patch is in use: the consumer looks and finds nothing",
    ),
    "left_unmarked": Switch(
        Order.LEFT_UNMARKED, _F, 0, _SC, "consumer C4",
        "a patch left in its channel by an event that did not cover it is never looked at again",
    ),
    "no_producer_fence": Switch(
        Order.NO_PRODUCER_FENCE, _F, 2, _TSO, "producer P3",
        "the store waits in its buffer while the in-use mark is read: coalesces with a freed patch",
    ),
    "no_consumer_fence": Switch(
        Order.NO_CONSUMER_FENCE, _F, 2, _TSO, "consumer C6",
        "the free still waits in a buffer when the entry is read: a store coalesces with the patch",
    ),
    "bell_plain_clear": Switch(
        Order.BELL_FLAG | Order.BELL_PLAIN_CLEAR, _F, 0, _TSO, "consumer C2",
        "the bell is a flag, cleared by a plain store that leaves the buffer after the next ring",
    ),
    "bell_cleared_late": Switch(
        Order.BELL_FLAG | Order.BELL_CLEARED_LATE, _F, 0, _SC, "consumer C2",
        "the bell is a flag, cleared after the channel was looked at: a ring in between is lost",
    ),
    "no_channel_lock": Switch(
        Order.NO_CHANNEL_LOCK, _F, 0, _SC, "producer P6",
        "a channel of several producers has no lock: two of them fill the same free slot",
    ),
    "relink_as_is": Switch(
        Order.RELINK_AS_IS, _P, 0, _SC, "consumer drain",
        "a derived table is linked again with patches waiting for it: what it says is old",
    ),
    "bell_flag": Switch(
        Order.BELL_FLAG, _V, 0, _NO, "producer P7, consumer C2",
        "the bell is a flag, cleared by a locked exchange before the channel is looked at",
    ),
    "void_on_coalesce": Switch(
        Order.VOID_ON_COALESCE, _V, 0, _NO, "producer P5",
        "837 does not update: it voids the derived value",
    ),
    "no_coalescing": Switch(
        Order.NO_COALESCING | Order.NO_PRODUCER_FENCE | Order.NO_CONSUMER_FENCE | Order.NO_VERSION,
        _V, 0, _NO, "producer P5",
        "836 and 837 left out: always a new patch; then no fence and no version is needed",
    ),
})
# fmt: on
