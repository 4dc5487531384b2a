"""The protocol's dangerous moments as small stepped programs.

A world has primary entries x, y in one table, producers A, B ... that store to them, and consumers
R, S ... that keep a copy of each. A copy holds what was derived: the entry's value, and whether it
is writable, which it must not be once a trace (placed by T) is in force. Consumers take a few free
events at any moment, and a last one after all stores. An end is wrong when

- a copy differs from its entry after the last event: an update was lost for good;
- a copy, right after an event that covered it, is older than what its VCPU had seen of the entry
  before the event (asked of `monotone` worlds, where values rise);
- a copy is writable though a trace is in force.

`scenes` has, for each fault of `SWITCHES`, a world and a schedule in which it goes wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from penumbra.actors.core.kinds import consumer_of, producer_of
from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Drained, Patch, Postpone
from penumbra.actors.core.producer import Producer
from penumbra.actors.core.shared import SharedCopy
from penumbra.actors.core.stepper import End, Process, Program, StepMemory
from penumbra.actors.core.topology import Channels, layout_of
from penumbra.actors.core.words import COUNT, InUse, Layout

TABLE: Final = 0x1000
PRODUCERS: Final = "ABCD"
CONSUMERS: Final = "RSUV"
ENTRIES: Final = "xyz"
INVALID: Final = 0
_WRITTEN_BY_PRODUCER: Final = frozenset(
    ["pending", "lost", "tail", "version", "base", "offset", "derived", "source", "usefulness"]
)
_WRITABLE: Final = 1
_NOT_WRITABLE: Final = (1 << 64) - 1 - _WRITABLE


def derive(entry: int, traced: int) -> int:
    """Make the copy of an entry: its value, writable unless traced; never `INVALID`."""
    return (entry + 1) << 1 | (0 if traced else _WRITABLE)


def entry_of(copy: int) -> int:
    """Return the entry a copy was derived from."""
    return (copy >> 1) - 1


@dataclass(frozen=True)
class World:
    """What is played, and by whom.

    Attributes:
        stores: For each producer what it stores, in its order: "x1 y1 x2"; "xy3" is one store that
            touches both entries.
        n_free: Events each consumer takes at any moment; then one after all stores.
        free_covers: The entries that the free events cover; "" = none.
        shared: Whether all consumers share one copy.
        relinks: Whether R's copies are detached: events do not cover them, and each is followed
            by linking them again.
        placer: Whether T places a trace: "" not; "asks" consumer R; "writes" the copies itself.
    """

    stores: tuple[str, ...] = ("x1",)
    n_consumers: int = 1
    n_free: int = 1
    free_covers: str = ENTRIES
    shared: bool = False
    relinks: bool = False
    placer: str = ""
    monotone: bool = True
    capacity: int = 1
    order: Order = Order.CORRECT
    in_use: InUse = InUse.FIELD
    postpone: Postpone = Postpone.IN_CHANNEL
    channels: Channels = Channels.PAIR

    @property
    def entries(self) -> str:
        return "".join(entry for entry in ENTRIES if any(entry in text for text in self.stores))

    @property
    def layout(self) -> Layout:
        n = max(len(self.stores), self.n_consumers)
        return layout_of(self.channels, n, self.capacity, self.in_use)

    def with_order(self, order: Order) -> World:
        return replace(self, order=order)

    def program(self) -> Program:
        """Make the processes, the words they start from, and the judge."""
        stage = Stage(self)
        processes: dict[str, Process] = {}
        for i in range(len(self.stores)):
            processes[PRODUCERS[i]] = stage.producer(i)
        for i in range(self.n_consumers):
            processes[CONSUMERS[i]] = stage.consumer(i)
        if self.placer:
            processes["T"] = stage.place_trace
        initial = {COUNT: 1}
        for i in range(self.n_consumers):
            initial |= {stage.copy_at(i, entry): derive(0, 0) for entry in self.entries}
        return Program(processes, stage.judge, initial, stage.name, stage.owner)


class Stage:
    """A world's words beyond the matrix, and its processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.layout = layout = world.layout
        self._names: dict[str, int] = {}
        for name in ("traced", "asked", "answered", *world.entries):
            self._add(name)
        for i in range(layout.n):
            self._add(f"done[{i}]")
        for i in range(world.n_consumers):
            for entry in world.entries:
                self._add(f"lock[{i}{entry}]")
                self._add(f"copy[{i}{entry}]")
        self._counts_rings = not world.order & Order.BELL_FLAG
        self._by_address = {at: name for name, at in self._names.items()}

    def _add(self, name: str) -> None:
        self._names[name] = self.layout.n_words + len(self._names)

    def at(self, name: str) -> int:
        return self._names[name]

    def name(self, at: int) -> str:
        return self._by_address.get(at) or self.layout.name(at)

    def owner(self, at: int) -> str:
        """Name the one process that writes a word; "" when there are several, or it is not sure."""
        word, _, rest = self.name(at).partition("[")
        if word in _WRITTEN_BY_PRODUCER or (word == "bell" and self._counts_rings):
            return PRODUCERS[int(rest[0])]
        if word == "copy" and not self.world.shared and not self.world.placer:
            return CONSUMERS[int(rest[0])]
        return ""

    def copy_at(self, consumer: int, entry: str) -> int:
        return self.at(f"copy[{0 if self.world.shared else consumer}{entry}]")

    def traced(self, memory: StepMemory) -> int:
        return memory[self.at("traced")] if self.world.placer else 0

    def producer(self, index: int) -> Process:
        """Make a producer: Fig. 11 for each store, then done."""
        world = self.world

        def run(memory: StepMemory) -> None:
            producer = producer_of(memory, self.layout, index, ports=memory, order=world.order)
            for store in world.stores[index].split():
                entries, value = store.rstrip("0123456789"), int(store.lstrip(ENTRIES))
                producer.begin([(TABLE, offset_of(entry)) for entry in entries])
                for entry in entries:
                    memory[self.at(entry)] = value  # 831
                producer.stored()
                derived = derive(value, self.traced(memory))
                for entry in entries:
                    self._post(producer, offset_of(entry), derived, value)
                producer.end()
            memory[self.at(f"done[{index}]")] = 1

        return run

    def _post(self, producer: Producer, offset: int, derived: int, value: int) -> None:
        everyone = (1 << self.world.n_consumers) - 1
        full = producer.post_all(everyone, TABLE, offset, derived, value)
        for consumer in range(self.world.n_consumers):
            if full >> consumer & 1:
                producer.lose(consumer)

    def consumer(self, index: int) -> Process:
        """Make a consumer: free events, perhaps the answer to a trace placer, the last event."""
        world = self.world

        def run(memory: StepMemory) -> list[tuple[str, int, int]]:
            vcpu = Vcpu(self, memory, index)
            used: list[tuple[str, int, int]] = []
            watched = [e for e in world.entries if world.monotone and e in world.free_covers]
            for _ in range(world.n_free):
                seen = [memory[self.at(entry)] for entry in watched]
                vcpu.event("" if world.relinks else world.free_covers)
                if world.relinks:
                    vcpu.link_again()
                copies = [vcpu.copies[entry].value for entry in watched]
                used += zip(watched, seen, copies, strict=True)
            if world.placer == "asks":
                memory.until(self.at("asked"), 1)
                vcpu.protect()
                memory[self.at("answered")] = 1
            for producer in range(len(world.stores)):
                memory.until(self.at(f"done[{producer}]"), 1)
            vcpu.event(ENTRIES)
            return used

        return run

    def place_trace(self, memory: StepMemory) -> None:
        """Place a trace (T1-T4)."""
        memory[self.at("traced")] = 1
        memory.add(memory, COUNT, 1)
        if self.world.placer == "asks":
            memory[self.at("asked")] = 1
            memory.until(self.at("answered"), 1)
            return
        memory.fence()
        for consumer in range(self.world.n_consumers):
            for entry in self.world.entries:
                memory.and_(self.copy_at(consumer, entry), _NOT_WRITABLE)

    def judge(self, end: End) -> str | None:
        """Say what is wrong with an end."""
        for consumer in range(self.world.n_consumers):
            letter = CONSUMERS[consumer]
            for entry in self.world.entries:
                current = end.memory.get(self.at(entry), 0)
                copy = end.memory[self.copy_at(consumer, entry)]
                if copy != INVALID and entry_of(copy) != current:
                    return f"{letter} keeps {entry}{entry_of(copy)} for {entry}{current}"
                if copy & _WRITABLE and end.memory.get(self.at("traced"), 0):
                    return f"{letter} may write what is traced"
            used = end.results[letter]
            assert isinstance(used, list)
            for entry, seen, copy in used:
                if copy != INVALID and entry_of(copy) < seen:
                    return f"{letter} saw {entry}{seen}, then used {entry}{entry_of(copy)}"
        return None


class Vcpu:
    """A consumer with its copies: what the driver of a real one does at an event."""

    def __init__(self, stage: Stage, memory: StepMemory, index: int) -> None:
        world = stage.world
        self._stage = stage
        self._memory = memory
        self._consumer = consumer_of(
            memory,
            stage.layout,
            index,
            ports=memory,
            order=world.order,
            postpone=world.postpone,
        )
        order = world.order if world.shared else world.order | Order.NO_ENTRY_LOCK
        self.copies = {
            entry: SharedCopy(memory, stage.copy_at(index, entry) - 1, ports=memory, order=order)
            for entry in world.entries
        }

    def event(self, covers: str) -> None:
        """Take a coherency event that covers the named entries (Fig. 12)."""
        offsets = {offset_of(entry) for entry in covers}
        everything = covers == ENTRIES
        self._follow_all(
            self._consumer.event(None if everything else lambda _, offset: offset in offsets)
        )

    def link_again(self) -> None:
        """Link again what is derived from the table, all drained first (EP7)."""
        self._follow_all(self._consumer.drain_bases((TABLE,)))

    def _follow_all(self, drained: Drained) -> None:
        if drained.drop_all:
            for copy in self.copies.values():
                copy.invalidate()
        self._follow(drained.patches)
        if self._consumer.settle():
            self.protect()

    def _follow(self, patches: Sequence[Patch]) -> None:
        for patch in patches:
            for entry, copy in self.copies.items():
                if (patch.base, patch.offset) == (TABLE, offset_of(entry)):
                    copy.refresh(partial(self._derive, patch, entry))

    def _derive(self, patch: Patch, entry: str) -> int:
        current = self._memory[self._stage.at(entry)]
        if self._consumer.usable(patch, current):
            return patch.derived
        return derive(current, self._stage.traced(self._memory))

    def protect(self) -> None:
        for entry in self.copies:
            at = self._stage.copy_at(self._consumer.index, entry)
            self._memory.and_(at, _NOT_WRITABLE)


def offset_of(entry: str) -> int:
    return 8 * (1 + ENTRIES.index(entry))
