"""The matrix: one bounded channel for each producer and each consumer, self pairs included.

                    consumer 0   consumer 1   consumer 2
        producer 0     0>0          0>1          0>2      channels_from(0): what its stores write
        producer 1     1>0          1>1          1>2
        producer 2     2>0          2>1          2>2
                    channels_to(0): what its events read

Each channel has one producer and one consumer and is used by nobody else, which is why it needs no
lock; the other ways to share channels are those of `topology`. The matrix knows nothing of what
base, offset and derived value mean.

Source: A40 Figs 10 and 13A-C, ¶102-103, 123-126; A40c 48, 55, 57-59.
"""

from __future__ import annotations

from typing import Final

from penumbra.actors.core.consumer import Consumer
from penumbra.actors.core.kinds import consumer_of, pairs_by_channel, producer_of
from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import ChannelStatistics, Postpone
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.producer import Producer
from penumbra.actors.core.slots import ring
from penumbra.actors.core.topology import Channels, layout_of
from penumbra.actors.core.words import COUNT, LOST, InUse, Layout, Words

DEFAULT_CAPACITY: Final = 64

Pair = tuple[int, int]
"""(producer, consumer)"""


class Matrix:
    """n producers, n consumers, n x n channels, and the trace count they share.

    Invariant: per channel, patches posted = applied + stored + dropped + in the channel.

    Where several pairs share one channel (`Channels`), a store may coalesce with a patch of another
    producer and takes it over: their statistics add up, each alone does not.

    Args:
        words: Shared words to work on, `Layout.n_words` of them and all zero at first; None = make
            them.
            Words whose trace count is set already are taken as they are.
    """

    def __init__(
        self,
        n: int,
        capacity: int = DEFAULT_CAPACITY,
        words: Words | None = None,
        *,
        in_use: InUse = InUse.FIELD,
        ports: Ports = LOCAL,
        order: Order = Order.CORRECT,
        postpone: Postpone = Postpone.IN_CHANNEL,
        channels: Channels = Channels.PAIR,
    ) -> None:
        self.layout: Layout = layout_of(channels, n, capacity, in_use)
        self.words: Words = self.layout.new_words() if words is None else words
        self._ports = ports
        self._order = order
        self._postpone = postpone
        self._producers: dict[int, Producer] = {}
        self._consumers: dict[int, Consumer] = {}
        if not self.words[COUNT]:
            self.words[COUNT] = 1

    @property
    def n(self) -> int:
        return self.layout.n

    @property
    def capacity(self) -> int:
        return self.layout.capacity

    @property
    def count(self) -> int:
        """The trace count: never 0, never falls."""
        return self.words[COUNT]

    def place_trace(self) -> int:
        """Void every derived value posted so far; return the new count (T2).

        The caller has marked the page as traced before (T1), and asks every VCPU to write-protect
        its copies after (T3). Whatever else makes derived values wrong, such as a frame moved under
        the guest, calls this
        too: the count means "nothing derived before may be used".

        Source: A40 ¶100, 108.
        """
        return self._ports.add(self.words, COUNT, 1)

    def producer(self, index: int) -> Producer:
        """Return the one producer with this index."""
        if index not in self._producers:
            self._producers[index] = self._new_producer(index)
        return self._producers[index]

    def consumer(self, index: int) -> Consumer:
        """Return the one consumer with this index."""
        if index not in self._consumers:
            self._consumers[index] = self._new_consumer(index)
        return self._consumers[index]

    def restart_producer(self, index: int) -> Producer:
        """Replace a producer that died, perhaps between its store and its last post.

        Each of its consumers drops everything at its next event; only then is its pending record
        cleared.
        """
        words = self.words
        for consumer in range(self.n):
            bell, header, *_ = self.layout.channel(index, consumer)
            words[header + LOST] = words[header + LOST] + 1
            ring(words, bell, int(self._order))
        words[self.layout.pending(index)] = 0
        fresh = self._new_producer(index)
        if index in self._producers:
            fresh.inherit(self._producers[index])
        self._producers[index] = fresh
        return fresh

    def restart_consumer(self, index: int) -> Consumer:
        """Replace a consumer; its secondary data must be empty, which is always coherent."""
        fresh = self._new_consumer(index)
        if index in self._consumers:
            fresh.inherit(self._consumers[index])
        self._consumers[index] = fresh
        fresh.drop_all()
        return fresh

    def channels(self) -> list[list[Pair]]:
        """Return all channels, a row for each producer (Fig. 13A)."""
        return [self.channels_from(producer) for producer in range(self.n)]

    def channels_from(self, producer: int) -> list[Pair]:
        """Return the channels a producer writes (Fig. 13B)."""
        return [(producer, consumer) for consumer in range(self.n)]

    def channels_to(self, consumer: int) -> list[Pair]:
        """Return the channels a consumer reads (Fig. 13C)."""
        return [(producer, consumer) for producer in range(self.n)]

    def occupancy(self, producer: int, consumer: int) -> int:
        """Count the patches in a channel now."""
        return self.layout.occupancy(self.words, producer, consumer)

    def statistics(self, producer: int, consumer: int) -> ChannelStatistics:
        """Return what a channel has seen."""
        posted, coalesced, overflows = self.producer(producer).tally(consumer)
        applied, stored, dropped, peak = self.consumer(consumer).tally(producer)
        present = self.occupancy(producer, consumer)
        return ChannelStatistics(
            posted, coalesced, overflows, applied, stored, dropped, present, max(peak, present)
        )

    def n_locks(self, index: int) -> int:
        """Return how often a VCPU, as producer and as consumer, has locked a channel."""
        return self.producer(index).n_locks + self.consumer(index).n_locks

    def check(self) -> None:
        """Assert every invariant; between exits, in one process."""
        assert self.count > 0
        for producer in self._producers.values():
            producer.check()
        for consumer in self._consumers.values():
            consumer.check()
        for pairs in pairs_by_channel(self.layout):
            seen = [self.statistics(*pair) for pair in pairs]
            taken = sum(one.n_applied + one.n_stored + one.n_dropped for one in seen)
            here = sum(one.n_in_channel for one in seen)
            assert sum(one.n_posted for one in seen) == taken + here, (pairs, seen)

    def _new_producer(self, index: int) -> Producer:
        self._check_index(index)
        return producer_of(self.words, self.layout, index, ports=self._ports, order=self._order)

    def _new_consumer(self, index: int) -> Consumer:
        self._check_index(index)
        return consumer_of(
            self.words,
            self.layout,
            index,
            ports=self._ports,
            order=self._order,
            postpone=self._postpone,
        )

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.n:
            raise IndexError(f"no VCPU {index} in a matrix of {self.n}")
