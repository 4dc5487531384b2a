"""Where every shared word of a patch-channel matrix stands.

Words are unsigned 64-bit integers, reached only as `words[at]` and `words[at] = value`: a
memoryview cast to "Q" in one process, shared memory between two, the stepper's memory when
schedules are listed. Each word is written by one side only, `in_use` excepted: the producer sets
it, the consumer clears it. All words start at zero, but for the trace count, which starts at 1
because 0 says "void".

    word 0      trace count (number of traces placed, and of remaps: whatever voids derived values)
    pending     8 words per producer: record (0, or sequence << 2 | entries), 3 x (base, offset)
    bells       n words per consumer, its bell row: a counter for each producer
    channels    n x n, producer by producer: 8 words of header (lost, tail), then the slots
    marks       one word per slot, only when the in-use indicators stand outside the channels

    slot        0 version  1 base  2 offset  3 derived  4 source  5 usefulness  6 in use  7 unused

A slot is one cache line. The patch number of the text is the slot's index in its channel. `tail`
counts the slots passed by the producer, so that a consumer need look only at the slots passed since
its last event, and at those it left in use itself: an event costs the patches present, not the
capacity.

Source: A40 Figs 9 and 10, ¶98-103.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol, TypeAlias

COUNT: Final = 0
VOID: Final = 0

MAX_ENTRIES: Final = 3
MAX_LISTED: Final = 1 << 20
PENDING_WORDS: Final = 8
_FIRST_PENDING: Final = 8

LOST: Final = 0
TAIL: Final = 1
HEADER_WORDS: Final = 8

VERSION: Final = 0
BASE: Final = 1
OFFSET: Final = 2
DERIVED: Final = 3
SOURCE: Final = 4
USEFULNESS: Final = 5
IN_USE: Final = 6
SLOT_WORDS: Final = 8

_SLOT_FIELDS: Final = (
    "version",
    "base",
    "offset",
    "derived",
    "source",
    "usefulness",
    "in_use",
    "unused",
)

Channel: TypeAlias = tuple[int, int, int, int, int, int]
"""bell, header, first slot, first in-use word, distance of in-use words, capacity."""


class Words(Protocol):
    """Shared memory as 64-bit words; aligned loads and stores of one word are never torn."""

    def __getitem__(self, at: int, /) -> int: ...
    def __setitem__(self, at: int, value: int, /) -> None: ...


def rows_of(words: Words) -> Callable[[slice], list[int]] | None:
    """Return what reads a row of words, each once and in order; None if they come one by one."""
    if isinstance(words, list):
        return words.__getitem__
    if isinstance(words, memoryview):
        return lambda row: words[row].tolist()
    return None


class InUse(IntEnum):
    """Where a patch says that it is in use.

    In the form `BASE` the word holds base + 1 and is stored last: 0 is the special value, which no
    base has, and step 842 is part of step 840.

    Source: A40 ¶101.
    """

    FIELD = 0
    BASE = 1
    OUTSIDE = 2


@dataclass(frozen=True)
class Layout:
    """Addresses, in words, for `n` producers, `n` consumers and `capacity` slots per channel.

    Invariant: no two of the regions named above overlap, and all end at `n_words`.
    """

    n: int
    capacity: int
    in_use: InUse = InUse.FIELD

    def __post_init__(self) -> None:
        if self.n < 1 or self.capacity < 1:
            raise ValueError(f"n = {self.n}, capacity = {self.capacity}: both must be at least 1")

    @property
    def _bells(self) -> int:
        return _FIRST_PENDING + PENDING_WORDS * self.n

    @property
    def _channels(self) -> int:
        return -(-(self._bells + self.n * self.n) // 8) * 8

    @property
    def _channel_words(self) -> int:
        return HEADER_WORDS + SLOT_WORDS * self.capacity

    @property
    def _marks(self) -> int:
        return self._channels + self.n * self.n * self._channel_words

    @property
    def n_words(self) -> int:
        outside = self.n * self.n * self.capacity if self.in_use is InUse.OUTSIDE else 0
        return self._marks + outside

    def pending(self, producer: int) -> int:
        """Return the address of a producer's pending record."""
        return _FIRST_PENDING + PENDING_WORDS * producer

    def bell(self, producer: int, consumer: int) -> int:
        return self._bells + self.n * consumer + producer

    def header(self, producer: int, consumer: int) -> int:
        return self._channels + (self.n * producer + consumer) * self._channel_words

    def channel(self, producer: int, consumer: int) -> Channel:
        """Return what a producer or a consumer must know of one channel."""
        header = self.header(producer, consumer)
        slots = header + HEADER_WORDS
        bell = self.bell(producer, consumer)
        match self.in_use:
            case InUse.FIELD:
                marks, stride = slots + IN_USE, SLOT_WORDS
            case InUse.BASE:
                marks, stride = slots + BASE, SLOT_WORDS
            case InUse.OUTSIDE:
                marks = self._marks + (self.n * producer + consumer) * self.capacity
                stride = 1
        return bell, header, slots, marks, stride, self.capacity

    def occupancy(self, words: Words, producer: int, consumer: int) -> int:
        """Count the patches that a producer has posted and a consumer has not taken."""
        *_, marks, stride, capacity = self.channel(producer, consumer)
        return sum(1 for k in range(capacity) if words[marks + k * stride])

    def name(self, at: int) -> str:
        """Name the word at an address: `bell[0>1]` (from 0 to 1), `in_use[0>1:3]` (slot 3)."""
        if at < _FIRST_PENDING:
            return "count" if at == COUNT else f"unused[{at}]"
        if at < self._bells:
            producer, word = divmod(at - _FIRST_PENDING, PENDING_WORDS)
            return f"pending[{producer}]" + (f".{word}" if word else "")
        if at < self._channels:
            consumer, producer = divmod(at - self._bells, self.n)
            return f"bell[{producer}>{consumer}]" if consumer < self.n else f"unused[{at}]"
        if at < self._marks:
            pair, word = divmod(at - self._channels, self._channel_words)
            return self._name_in_channel(pair, word)
        pair, slot = divmod(at - self._marks, self.capacity)
        return f"in_use[{self._pair(pair)}:{slot}]" if at < self.n_words else f"outside[{at}]"

    def _name_in_channel(self, pair: int, word: int) -> str:
        if word < HEADER_WORDS:
            return f"{('lost', 'tail')[word] if word <= TAIL else 'unused'}[{self._pair(pair)}]"
        slot, field = divmod(word - HEADER_WORDS, SLOT_WORDS)
        return f"{self._field_name(field)}[{self._pair(pair)}:{slot}]"

    def _field_name(self, field: int) -> str:
        if field == BASE and self.in_use is InUse.BASE:
            return "in_use"
        if field == IN_USE and self.in_use is not InUse.FIELD:
            return "unused"
        return _SLOT_FIELDS[field]

    def _pair(self, pair: int) -> str:
        return "{}>{}".format(*divmod(pair, self.n))

    def new_words(self) -> Words:
        """Make the words of a matrix that lives in one process, all zero.

        A list while they are few: its elements cost half of a memoryview's, but all its memory is
        taken at once. Nothing checks that they stay below 2**64 there; producers store what the
        guest's entries hold.
        """
        return [0] * self.n_words if self.n_words <= MAX_LISTED else self.new_array()

    def new_array(self) -> memoryview[int]:
        """Make such words as one piece of memory, which compiled code can work on."""
        return memoryview(bytearray(8 * self.n_words)).cast("Q")
