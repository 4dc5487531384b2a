"""The two sides of a channel by its layout: the one place that knows which classes go together."""

from __future__ import annotations

from penumbra.actors.core.broadcast import BroadcastProducer
from penumbra.actors.core.consumer import Consumer
from penumbra.actors.core.locked import LockedConsumer, LockedProducer
from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Postpone
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.producer import Producer
from penumbra.actors.core.topology import BroadcastLayout, LockedLayout
from penumbra.actors.core.words import Layout, Words


def producer_of(
    words: Words,
    layout: Layout,
    index: int,
    *,
    ports: Ports = LOCAL,
    order: Order = Order.CORRECT,
) -> Producer:
    """Make the producer of one VCPU for channels of this layout."""
    if isinstance(layout, LockedLayout):
        return LockedProducer(words, layout, index, ports=ports, order=order)
    if isinstance(layout, BroadcastLayout):
        return BroadcastProducer(words, layout, index, ports=ports, order=order)
    return Producer(words, layout, index, ports=ports, order=order)


def consumer_of(
    words: Words,
    layout: Layout,
    index: int,
    *,
    ports: Ports = LOCAL,
    order: Order = Order.CORRECT,
    postpone: Postpone = Postpone.IN_CHANNEL,
) -> Consumer:
    """Make the consumer of one VCPU for channels of this layout."""
    if isinstance(layout, LockedLayout):
        return LockedConsumer(words, layout, index, ports=ports, order=order, postpone=postpone)
    return Consumer(words, layout, index, ports=ports, order=order, postpone=postpone)


def pairs_by_channel(layout: Layout) -> list[list[tuple[int, int]]]:
    """Return the (producer, consumer) pairs, those together whose patches are counted together."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for producer in range(layout.n):
        for consumer in range(layout.n):
            groups.setdefault(layout.header(producer, consumer), []).append((producer, consumer))
    return list(groups.values())
