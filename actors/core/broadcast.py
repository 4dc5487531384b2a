"""A producer whose one channel is read by every consumer; it needs no lock.

The words of a slot have one writer, this producer, and each of its in-use words has one consumer:
all that two sides share is shared by two. The steps are P1-P9, with P5 and P6 done once for all
consumers and P7 for each:

    P5  the entry's own slot, if anybody has not taken it yet (836): rewrite what was derived, the
        version odd meanwhile; base and offset stand
    P6  else a slot whose in-use words are all clear (838): fill it whole (840)
    P7  for each consumer told: its in-use word if it is clear (842), its `tail`, its bell

A slot one consumer has not taken is free for nobody, so one idle consumer fills the channel of
all: what a channel per pair avoids, at n times the memory.

Source: A40 ¶58, ¶127; Fig. 11.
"""

from __future__ import annotations

from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Outcome
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.producer import Producer
from penumbra.actors.core.slots import coalesce, ring
from penumbra.actors.core.topology import BroadcastLayout
from penumbra.actors.core.words import (
    BASE,
    DERIVED,
    OFFSET,
    SLOT_WORDS,
    SOURCE,
    TAIL,
    USEFULNESS,
    VOID,
    Words,
)

_NO_COALESCING = int(Order.NO_COALESCING)


class BroadcastProducer(Producer):
    """One VCPU's producer, with one channel.

    Invariant: `_told[k]` names every consumer whose in-use word of slot k may be set.
    """

    def __init__(
        self,
        words: Words,
        layout: BroadcastLayout,
        index: int,
        *,
        ports: Ports = LOCAL,
        order: Order = Order.CORRECT,
    ) -> None:
        super().__init__(words, layout, index, ports=ports, order=order)
        self._channels = [end.channel for end in self._ends]
        self._tallies = [end.tally for end in self._ends]
        everyone = (1 << layout.n) - 1
        self._told = [everyone] * layout.capacity  # a dead predecessor may have told anyone
        self._slot_of: dict[tuple[int, int], int] = {}
        self._key_of: list[tuple[int, int] | None] = [None] * layout.capacity
        self._cursor = 0

    def post_nowait(
        self, consumer: int, base: int, offset: int, derived: int | None = None, source: int = 0
    ) -> Outcome:
        k = self._place(base, offset, derived, source)
        return Outcome.FULL if self._count_full(k, consumer) else self._hand(k, consumer)

    def post_all(
        self, consumers: int, base: int, offset: int, derived: int | None = None, source: int = 0
    ) -> int:
        k = self._place(base, offset, derived, source)
        for consumer in range(len(self._channels)):
            if consumers >> consumer & 1 and not self._count_full(k, consumer):
                self._hand(k, consumer)
        return consumers if k < 0 else 0

    def blockers(self, consumers: int) -> int:
        for k in range(len(self._told)):
            consumers |= self._holders(k)
        return consumers

    def check(self) -> None:
        super().check()
        words = self._words
        for consumer, (_, _, _, marks, _, capacity) in enumerate(self._channels):
            for k in range(capacity):
                told = self._told[k] >> consumer & 1
                assert told or not words[marks + k], f"slot {k}: nobody has told {consumer}"

    def _holders(self, k: int) -> int:
        """Return the consumers that have not taken slot k."""
        words, told, left = self._words, self._told[k], 0
        while told:
            bit = told & -told
            told ^= bit
            if words[self._channels[bit.bit_length() - 1][3] + k]:
                left |= bit
        self._told[k] = left
        return left

    def _place(self, base: int, offset: int, derived: int | None, source: int) -> int:
        """Write the patch into a slot, not yet in use for anybody new; -1 = there is none."""
        self._check_stored()
        words, key = self._words, (base, offset)
        usefulness = VOID if derived is None else self._count
        k = -1 if self._order & _NO_COALESCING else self._slot_of.get(key, -1)
        slots = self._channels[0][2]
        if k >= 0 and self._holders(k):  # 836
            slot = slots + k * SLOT_WORDS
            coalesce(words, slot, derived or 0, source, usefulness, self._order)  # 837
            return k
        k = self._free()  # 838
        if k < 0:
            return -1
        slot = slots + k * SLOT_WORDS
        words[slot + BASE] = base  # 840
        words[slot + OFFSET] = offset
        words[slot + DERIVED] = derived or 0
        words[slot + SOURCE] = source
        words[slot + USEFULNESS] = usefulness
        old = self._key_of[k]
        if old is not None and self._slot_of.get(old) == k:
            del self._slot_of[old]
        self._key_of[k] = key
        self._slot_of[key] = k
        return k

    def _free(self) -> int:
        n = len(self._told)
        for step in range(n):
            k = (self._cursor + step) % n
            if not self._holders(k):
                self._cursor = (k + 1) % n
                return k
        return -1

    def _count_full(self, k: int, consumer: int) -> bool:
        if k < 0:
            self._tallies[consumer][Outcome.FULL] += 1
        return k < 0

    def _hand(self, k: int, consumer: int) -> Outcome:
        """Tell one consumer of slot k (842, P7)."""
        words = self._words
        bell, header, _, marks, _, capacity = self._channels[consumer]
        outcome = Outcome.COALESCED if words[marks + k] else Outcome.POSTED
        if outcome is Outcome.POSTED:
            self._told[k] |= 1 << consumer
            words[marks + k] = 1  # 842
            tail = words[header + TAIL]
            words[header + TAIL] = tail + (k - tail) % capacity + 1
        ring(words, bell, self._order)
        self._tallies[consumer][outcome] += 1
        return outcome
