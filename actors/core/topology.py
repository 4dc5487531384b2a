"""Which producers and consumers share a patch channel, and where its words then stand.

pair           one channel for each producer and consumer: no lock (the preferred embodiment)
pair-locked    the same, each with a mutual exclusion lock
shared         one channel for all producers and all consumers, with a lock
per-producer   one channel for each producer, read by all consumers: no lock, for each word still
               has one writer; a slot has an in-use word for each consumer, and is free when all
               are clear
per-consumer   one channel for each consumer, written by all producers, with a lock

A patch in a channel with several consumers is freed when each one told has taken it. Pending
records, bells and `lost` marks are the same in all: one per pair, or per producer, and written by
one side. So a consumer still learns from its bell row which channels to look at.

Source: A40 ¶58, ¶120, ¶127.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from penumbra.actors.core.words import (
    HEADER_WORDS,
    IN_USE,
    SLOT_WORDS,
    Channel,
    InUse,
    Layout,
    Words,
)

MAX_SHARERS: Final = 64
"""Consumers of one locked channel: its in-use indicator is a word with a bit for each."""

LOCK: Final = 0
TOP: Final = 1
POSTER: Final = 0


class Channels(Enum):
    """Who shares a channel. The value is its name in a configuration."""

    PAIR = "pair"
    PAIR_LOCKED = "pair-locked"
    SHARED = "shared"
    PER_PRODUCER = "per-producer"
    PER_CONSUMER = "per-consumer"

    @property
    def is_locked(self) -> bool:
        return self in (Channels.PAIR_LOCKED, Channels.SHARED, Channels.PER_CONSUMER)


@dataclass(frozen=True)
class BroadcastLayout(Layout):
    """One channel per producer: headers and in-use words per pair, the slots once.

    Invariant: as of `Layout`; the in-use words of a pair are an array outside the channel.
    """

    in_use: InUse = InUse.OUTSIDE

    @property
    def _slots(self) -> int:
        return self._channels + self.n * self.n * HEADER_WORDS

    @property
    def _marks(self) -> int:
        return self._slots + self.n * self.capacity * SLOT_WORDS

    def header(self, producer: int, consumer: int) -> int:
        return self._channels + (self.n * producer + consumer) * HEADER_WORDS

    def channel(self, producer: int, consumer: int) -> Channel:
        bell, header = self.bell(producer, consumer), self.header(producer, consumer)
        slots = self._slots + producer * self.capacity * SLOT_WORDS
        marks = self._marks + (self.n * producer + consumer) * self.capacity
        return bell, header, slots, marks, 1, self.capacity

    def name(self, at: int) -> str:
        if self._channels <= at < self._slots:
            pair, word = divmod(at - self._channels, HEADER_WORDS)
            return self._name_in_channel(pair, word)
        if self._slots <= at < self._marks:
            slot, field = divmod(at - self._slots, SLOT_WORDS)
            producer, k = divmod(slot, self.capacity)
            return f"{self._field_name(field)}[{producer}>*:{k}]"
        return super().name(at)


@dataclass(frozen=True)
class LockedLayout(Layout):
    """Channels with a lock, each used by one pair, by all producers of a consumer, or by all.

    After the bells stands `lost`, a word per pair, then the channels: a header with the lock and
    `top`, and the slots. `top` bounds the slots in use from above. A slot's in-use word has a bit
    for each consumer that has still to take the patch; its version word, which a lock makes
    needless, says who posted last.

    Invariant: as of `Layout`; all words of a channel but `lock` are used with the lock held.
    """

    kind: Channels = Channels.SHARED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > MAX_SHARERS:
            raise ValueError(f"n = {self.n}: a locked channel has at most {MAX_SHARERS} consumers")

    @property
    def _losses(self) -> int:
        return self._bells + self.n * self.n

    @property
    def _channels(self) -> int:
        return -(-(self._losses + self.n * self.n) // 8) * 8

    @property
    def n_channels(self) -> int:
        each = {Channels.PAIR_LOCKED: self.n * self.n, Channels.PER_CONSUMER: self.n}
        return each.get(self.kind, 1)

    @property
    def _marks(self) -> int:
        return self._channels + self.n_channels * self._channel_words

    @property
    def n_words(self) -> int:
        return self._marks

    def number(self, producer: int, consumer: int) -> int:
        """Return which channel a producer and a consumer share."""
        match self.kind:
            case Channels.PAIR_LOCKED:
                return self.n * producer + consumer
            case Channels.PER_CONSUMER:
                return consumer
            case _:
                return 0

    def header(self, producer: int, consumer: int) -> int:
        """Return where the header of their channel stands: its lock, then `top`."""
        return self._channels + self.number(producer, consumer) * self._channel_words

    def lost(self, producer: int, consumer: int) -> int:
        return self._losses + self.n * consumer + producer

    def channel(self, producer: int, consumer: int) -> Channel:
        """As of `Layout`, but that only the first word of the header, `lost`, is there."""
        slots = self.header(producer, consumer) + HEADER_WORDS
        bell, lost = self.bell(producer, consumer), self.lost(producer, consumer)
        return bell, lost, slots, slots + IN_USE, SLOT_WORDS, self.capacity

    def occupancy(self, words: Words, producer: int, consumer: int) -> int:
        slots = self.header(producer, consumer) + HEADER_WORDS
        return sum(
            1
            for slot in range(slots, slots + self.capacity * SLOT_WORDS, SLOT_WORDS)
            if words[slot + IN_USE] >> consumer & 1 and words[slot + POSTER] == producer
        )

    def name(self, at: int) -> str:
        """Name a word; those of a channel with braces, since nobody alone writes them."""
        if self._losses <= at < self._channels:
            consumer, producer = divmod(at - self._losses, self.n)
            return f"lost[{producer}>{consumer}]" if consumer < self.n else f"unused[{at}]"
        if self._channels <= at < self._marks:
            number, word = divmod(at - self._channels, self._channel_words)
            if word < HEADER_WORDS:
                return f"{('lock', 'top')[word] if word <= TOP else 'unused'}{{{number}}}"
            slot, field = divmod(word - HEADER_WORDS, SLOT_WORDS)
            name = "poster" if field == POSTER else self._field_name(field)
            return f"{name}{{{number}:{slot}}}"
        return super().name(at)


def layout_of(kind: Channels, n: int, capacity: int, in_use: InUse = InUse.FIELD) -> Layout:
    """Return the layout of a matrix of this kind.

    Args:
        in_use: Where a patch says that it is in use: a choice of the kind `pair` alone, for the
            others have an indicator per consumer, or a lock that makes the order of no account.

    Raises:
        ValueError: Another form of in-use was asked for, or a size is out of range.
    """
    if kind is Channels.PAIR:
        return Layout(n, capacity, in_use)
    if in_use is not InUse.FIELD:
        raise ValueError(f"{kind.value} channels have one form of in-use, not {in_use.name}")
    if kind is Channels.PER_PRODUCER:
        return BroadcastLayout(n, capacity)
    return LockedLayout(n, capacity, kind=kind)
