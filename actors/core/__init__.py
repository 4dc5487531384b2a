"""Patch channels as passive state machines: event in, effects out; no waiting, no page tables.

Primary data is changed by stores; secondary data is derived from it and may lag until a coherency
event says it must not. Whoever stores (a producer) posts a *patch*, "this entry has changed", into
a bounded channel for each consumer. At its event the consumer takes the patches that matter, and
the caller makes its secondary data follow.

    producer.begin([(base, offset)])        consumer.event(covers) -> patches
    ... the store ...                       ... read each entry, update or invalidate;
    producer.stored() -> trace count            consumer.usable(patch, entry) ...
    producer.post_all(consumers, ...)       consumer.settle()
    producer.end()

Reading order: `words` (the memory), `patch`, `producer` (P1-P9), `consumer` (C1-C9), `matrix`,
`order` (what goes wrong otherwise), `shared`; the functions both sides stand on are `slots`. Then
`topology` with `locked` and `broadcast`: other ways to share channels. Beside them, to show the
order right: `stepper`, `schedules`, `races` and `scenes`.

Source: A40 Figs 9-13C, ¶98-128.
"""

from penumbra.actors.core.consumer import EVERY_BIT as EVERY_BIT
from penumbra.actors.core.consumer import Consumer as Consumer
from penumbra.actors.core.consumer import Covers as Covers
from penumbra.actors.core.matrix import DEFAULT_CAPACITY as DEFAULT_CAPACITY
from penumbra.actors.core.matrix import Matrix as Matrix
from penumbra.actors.core.order import ATOMIC as ATOMIC
from penumbra.actors.core.order import SWITCHES as SWITCHES
from penumbra.actors.core.order import Order as Order
from penumbra.actors.core.order import Switch as Switch
from penumbra.actors.core.patch import ChannelStatistics as ChannelStatistics
from penumbra.actors.core.patch import Drained as Drained
from penumbra.actors.core.patch import Outcome as Outcome
from penumbra.actors.core.patch import Patch as Patch
from penumbra.actors.core.patch import Postpone as Postpone
from penumbra.actors.core.patch import ProtocolError as ProtocolError
from penumbra.actors.core.ports import LOCAL as LOCAL
from penumbra.actors.core.ports import LocalPorts as LocalPorts
from penumbra.actors.core.ports import Ports as Ports
from penumbra.actors.core.producer import Producer as Producer
from penumbra.actors.core.shared import SharedCopy as SharedCopy
from penumbra.actors.core.topology import Channels as Channels
from penumbra.actors.core.words import InUse as InUse
from penumbra.actors.core.words import Layout as Layout
from penumbra.actors.core.words import Words as Words

__all__ = [
    "ATOMIC",
    "DEFAULT_CAPACITY",
    "EVERY_BIT",
    "LOCAL",
    "SWITCHES",
    "ChannelStatistics",
    "Channels",
    "Consumer",
    "Covers",
    "Drained",
    "InUse",
    "Layout",
    "LocalPorts",
    "Matrix",
    "Order",
    "Outcome",
    "Patch",
    "Ports",
    "Postpone",
    "Producer",
    "ProtocolError",
    "SharedCopy",
    "Switch",
    "Words",
]
