"""The producer: one guest store in, patches out.

    P1 begin     pending := every (base, offset) the store touches
    P2           the caller does the store (831)
    P3 stored    [fence]
    P4           read the trace count; the caller derives (or not)
    per consumer of the trace (832, 834):
    P5 post      a patch in use for this entry (836): version odd; derived, source, usefulness;
                 version even (837)
    P6           else a free slot (838): filled whole (840), then in use (842), then `tail`
    P7           after P5 or P6: bell := bell + 1
    P8           else FULL: the caller owes a shootdown (844), or `lose`: lost + 1, then the bell
    P9 end       after the last consumer was posted, rung and acknowledged: pending := 0

The consumer may read all the while. What it must find lies in the words; the private part is hints
only, so a producer made anew over the same words goes on where the old one was
(`Matrix.restart_producer`).

A post costs O(1): the slot of an entry comes from a hint, a free one from `tail`, which steps over
slots still in use. Only a nearly full channel is searched.

Source: A40 Fig. 11, steps 830-848; ¶120 for the order of the last two stores of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Outcome, ProtocolError
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.slots import post, ring
from penumbra.actors.core.words import (
    COUNT,
    LOST,
    MAX_ENTRIES,
    VOID,
    Channel,
    Layout,
    Words,
)

_NO_PENDING: Final = int(Order.NO_PENDING)
_NOT_AT_BEGIN: Final = int(Order.NO_PENDING | Order.PENDING_AFTER_STORE)
_PENDING_AFTER_STORE: Final = int(Order.PENDING_AFTER_STORE)
_PENDING_CLEARED_EARLY: Final = int(Order.PENDING_CLEARED_EARLY)

_OUTCOMES: Final = (Outcome.POSTED, Outcome.COALESCED, Outcome.FULL)

_NOTHING: Final[tuple[int, int]] = (-1, -1)
_IDLE, _BEGUN, _STORED = range(3)


class End(NamedTuple):
    """What a producer keeps for one of its channels.

    Attributes:
        hint: Which slot was last used for an entry; may have forgotten.
        keys: Its inverse, by slot.
        tally: Posts by the codes of their outcomes.
    """

    channel: Channel
    hint: dict[tuple[int, int], int]
    keys: list[tuple[int, int]]
    tally: list[int]

    def forget(self) -> None:
        """Forget which slot holds which entry."""
        self.hint.clear()
        self.keys[:] = [_NOTHING] * len(self.keys)


class Producer:
    """One VCPU's producer: a column of channels, one to each consumer, its own included.

    Invariant: every hint names the slot last used for its entry.
    """

    def __init__(
        self,
        words: Words,
        layout: Layout,
        index: int,
        *,
        ports: Ports = LOCAL,
        order: Order = Order.CORRECT,
    ) -> None:
        self.index = index
        self._words = words
        self._pending = layout.pending(index)
        self._order = int(order)
        self._fence: Callable[[], None] | None = (
            None if ports is LOCAL or order & Order.NO_PRODUCER_FENCE else ports.fence
        )
        self._ends = [
            End(layout.channel(index, consumer), {}, [_NOTHING] * layout.capacity, [0, 0, 0])
            for consumer in range(layout.n)
        ]
        self._entries: Sequence[tuple[int, int]] = ()
        self._sequence = 0
        self._count = 0
        self._phase = _IDLE

    def begin(self, entries: Sequence[tuple[int, int]]) -> None:
        """Say which primary entries the coming store touches (P1): at most three (base, offset).

        A store of up to 8 bytes touches at most 3 entries of 4 bytes (misaligned), or 2 of 8; an
        aligned one 2 or 1. A longer store is several stores.

        Raises:
            ProtocolError: The last store has not ended, or there are no or too many entries.
        """
        n = len(entries)
        if self._phase != _IDLE or not 0 < n <= MAX_ENTRIES:
            raise ProtocolError(f"begin with {n} entries in phase {self._phase}")
        self._phase = _BEGUN
        if self._order & _NOT_AT_BEGIN:
            self._entries = entries
        elif n == 1:  # what nearly every store is
            words, at = self._words, self._pending
            words[at + 1], words[at + 2] = entries[0]
            self._sequence = sequence = self._sequence + 1
            words[at] = sequence << 2 | 1
        else:
            self._publish(entries)

    def stored(self) -> int:
        """Say that the store is done (831), and learn the trace count to derive under (P3, P4).

        What the caller derives, it derives from what it reads after this call.
        """
        if self._phase != _BEGUN:
            raise ProtocolError(f"stored in phase {self._phase}")
        self._phase = _STORED
        if self._order & _PENDING_AFTER_STORE:
            self._publish(self._entries)
        if self._fence is not None:
            self._fence()
        self._count = count = self._words[COUNT]
        if self._order & _PENDING_CLEARED_EARLY:
            self._words[self._pending] = 0
        return count

    def post_nowait(
        self, consumer: int, base: int, offset: int, derived: int | None = None, source: int = 0
    ) -> Outcome:
        """Tell one consumer that a primary entry has changed.

        The primary data must already hold the new value. Never waits and never drops: `FULL` means
        that nothing was written and the caller owes this consumer a shootdown before `end` (844).

        Args:
            base: Where the page table, or whatever holds the entry, begins; below 2**64 - 1.
            offset: The entry in it.
            derived: What the producer derived for its own copy, or None when it derived nothing.
            source: The entry's value that it was derived from.

        Source: A40 Fig. 11, steps 836-842.
        """
        if self._phase != _STORED:
            raise ProtocolError(f"post in phase {self._phase}: the store must be done first")
        channel, hint, keys, tally = self._ends[consumer]
        usefulness = self._count
        if derived is None:
            derived, usefulness = 0, VOID
        code = post(
            self._words, channel, hint, keys, base, offset, derived, source, usefulness, self._order
        )
        tally[code] += 1
        return _OUTCOMES[code]

    def post_all(
        self, consumers: int, base: int, offset: int, derived: int | None = None, source: int = 0
    ) -> int:
        """Post to every consumer whose bit is set; return the bits of those that are full (834)."""
        full = 0
        while consumers:
            bit = consumers & -consumers
            consumers ^= bit
            consumer = bit.bit_length() - 1
            if self.post_nowait(consumer, base, offset, derived, source) is Outcome.FULL:
                full |= bit
        return full

    def lose(self, consumer: int) -> None:
        """Tell a consumer to drop everything at its next event, instead of a shootdown (P8).

        `lost` counts like the bell, so that no clearing can meet the next loss.

        Source: A40 ¶128, "a lack of free patches may be handled differently".
        """
        bell, header, *_ = self._ends[consumer].channel
        self._words[header + LOST] = self._words[header + LOST] + 1
        ring(self._words, bell, self._order)

    def blockers(self, consumers: int) -> int:
        """Return the consumers that must take their patches before these have room (bit sets)."""
        return consumers

    @property
    def n_locks(self) -> int:
        """How often a channel has been locked: never where each has one producer."""
        return 0

    def _check_stored(self) -> None:
        if self._phase != _STORED:
            raise ProtocolError(f"post in phase {self._phase}: the store must be done first")

    def end(self) -> None:
        """Say that every consumer is posted, rung, or has acknowledged its shootdown (P9, 848)."""
        if self._phase != _STORED:
            raise ProtocolError(f"end in phase {self._phase}")
        self._phase = _IDLE
        if not self._order & _NO_PENDING:
            self._words[self._pending] = 0

    def tally(self, consumer: int) -> tuple[int, int, int]:
        """Return how many posts to a consumer were new, coalesced, and refused as full."""
        posted, coalesced, full = self._ends[consumer].tally
        return posted, coalesced, full

    def inherit(self, previous: Producer) -> None:
        """Go on counting where the producer that this one replaces stopped."""
        for end, before in zip(self._ends, previous._ends, strict=True):
            end.tally[:] = before.tally

    def check(self) -> None:
        for _, hint, keys, _ in self._ends:
            for key, k in hint.items():
                assert keys[k] == key, f"hint {key}: slot {k} is another's, {keys[k]}"
        if self._phase == _IDLE:
            assert not self._words[self._pending], "idle with a pending record"

    def _publish(self, entries: Sequence[tuple[int, int]]) -> None:
        words, at = self._words, self._pending
        word = at
        for base, offset in entries:
            words[word + 1] = base
            words[word + 2] = offset
            word += 2
        self._sequence = sequence = self._sequence + 1
        words[at] = sequence << 2 | len(entries)
