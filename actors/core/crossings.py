"""Overflow met by CPUs that are producers and consumers at once, as stepped programs.

Each CPU stores to an entry of its own, x, y ..., of which it tells all others (a single one tells
itself), while every channel holds a patch for an entry z that was changed before. So all channels
are full, and what is done about it decides whether all this ends:

shootdown   ask the consumer to drop its copy, and wait for its answer (844)
wait        ask it to take what is in the channel, wait for its answer, and post
lost        mark the channel: its consumer drops everything at its next event

A CPU that waits serves what it is asked meanwhile, itself included; else two that ask each other
wait for ever, and one that asks itself does.

Source: A40 ¶91, ¶109, ¶128; `docs/errata.md` EP9, EP19.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from penumbra.actors.core.kinds import consumer_of, producer_of
from penumbra.actors.core.matrix import Matrix
from penumbra.actors.core.producer import Producer
from penumbra.actors.core.races import INVALID, TABLE, derive, entry_of
from penumbra.actors.core.stepper import End, Process, Program, StepMemory
from penumbra.actors.core.topology import Channels, layout_of
from penumbra.actors.core.words import Layout

CPUS: Final = "ABCD"
_OFFSETS: Final = {"x": 8, "y": 16, "w": 24, "z": 32}
_OWN: Final = "xyw"
_DONE, _DROP, _DRAIN = range(3)


@dataclass(frozen=True)
class Crossing:
    """CPUs whose channels are full when they store.

    Attributes:
        policy: What a producer does about a full channel.
        serves: Whether a CPU that waits does what it is asked.
    """

    n: int = 2
    policy: Literal["shootdown", "wait", "lost"] = "shootdown"
    serves: bool = True
    channels: Channels = Channels.PAIR

    @property
    def layout(self) -> Layout:
        return layout_of(self.channels, self.n, 1)

    def program(self) -> Program:
        """Make the processes, the words they start from, and the judge."""
        stage = _Stage(self)
        cpus: dict[str, Process] = {CPUS[i]: partial(stage.run, i) for i in range(self.n)}
        return Program(cpus, stage.judge, stage.initial(), stage.name)


class _Stage:
    def __init__(self, world: Crossing) -> None:
        self.world = world
        self.layout = layout = world.layout
        self.everyone = (1 << world.n) - 1
        names = [f"done[{i}]" for i in range(world.n)]
        names += [f"asked[{i}>{j}]" for i in range(world.n) for j in range(world.n)]
        names += [f"copy[{i}{entry}]" for i in range(world.n) for entry in _OFFSETS]
        names += list(_OFFSETS)
        self._at = {name: layout.n_words + number for number, name in enumerate(names)}
        self._names = {at: name for name, at in self._at.items()}

    def at(self, name: str) -> int:
        return self._at[name]

    def name(self, at: int) -> str:
        return self._names.get(at) or self.layout.name(at)

    def others(self, cpu: int) -> int:
        return self.everyone if self.world.n == 1 else self.everyone & ~(1 << cpu)

    def initial(self) -> dict[int, int]:
        """Fill every channel with a patch for z, as a producer does."""
        words = self.layout.new_array()
        matrix = Matrix(self.world.n, 1, words, channels=self.world.channels)
        for cpu in range(self.world.n):
            producer = matrix.producer(cpu)
            producer.begin([(TABLE, _OFFSETS["z"])])
            producer.stored()
            producer.post_all(self.others(cpu), TABLE, _OFFSETS["z"], derive(1, 0), 1)
            producer.end()
        initial = {at: value for at, value in enumerate(words) if value}
        copies = {
            self.at(f"copy[{cpu}{entry}]"): derive(0, 0)
            for cpu in range(self.world.n)
            for entry in _OFFSETS
            if entry != _OWN[cpu] or self.world.n == 1  # who is not told has derived nothing
        }
        return initial | copies | {self.at("z"): 1}

    def run(self, cpu: int, memory: StepMemory) -> None:
        """Be one CPU: a store, then what the others ask until all have stored, then an event."""
        Cpu(self, memory, cpu).run()

    def judge(self, end: End) -> str | None:
        for cpu in range(self.world.n):
            for entry in _OFFSETS:
                copy = end.memory.get(self.at(f"copy[{cpu}{entry}]"), INVALID)
                current = end.memory.get(self.at(entry), 0)
                if copy != INVALID and entry_of(copy) != current:
                    return f"{CPUS[cpu]} keeps {entry}{entry_of(copy)} for {entry}{current}"
        return None


class Cpu:
    """One CPU of a crossing: its producer, its consumer, its copies."""

    def __init__(self, stage: _Stage, memory: StepMemory, cpu: int) -> None:
        self._stage = stage
        self._memory = memory
        self._cpu = cpu
        self._producer: Producer = producer_of(memory, stage.layout, cpu, ports=memory)
        self._consumer = consumer_of(memory, stage.layout, cpu, ports=memory)

    def run(self) -> None:
        stage, memory, own = self._stage, self._memory, _OWN[self._cpu]
        producer, offset = self._producer, _OFFSETS[own]
        producer.begin([(TABLE, offset)])
        memory[stage.at(own)] = 1  # 831
        producer.stored()
        full = producer.post_all(stage.others(self._cpu), TABLE, offset, derive(1, 0), 1)
        if full:
            self._overflow(full, offset)
        producer.end()
        memory[stage.at(f"done[{self._cpu}]")] = 1
        for cpu in range(stage.world.n):
            self._serve_until(stage.at(f"done[{cpu}]"), 1, always=True)
        self._event()

    def _overflow(self, full: int, offset: int) -> None:
        policy = self._stage.world.policy
        if policy == "lost":
            for cpu in _bits(full):
                self._producer.lose(cpu)
        elif policy == "shootdown":
            for cpu in _bits(full):
                self._ask(cpu, _DROP)
        while policy == "wait" and full:
            for cpu in _bits(self._producer.blockers(full)):
                self._ask(cpu, _DRAIN)
            full = self._producer.post_all(full, TABLE, offset, derive(1, 0), 1)

    def _ask(self, cpu: int, what: int) -> None:
        asked = self._stage.at(f"asked[{self._cpu}>{cpu}]")
        self._memory[asked] = what
        self._serve_until(asked, _DONE)

    def _serve_until(self, at: int, value: int, *, always: bool = False) -> None:
        """Wait for a word, doing meanwhile what is asked of this CPU."""
        stage, memory, n = self._stage, self._memory, self._stage.world.n
        if not (always or stage.world.serves):
            memory.until(at, value)
            return
        what = _DRAIN if stage.world.policy == "wait" else _DROP
        asked = [stage.at(f"asked[{other}>{self._cpu}]") for other in range(n)]
        while seen := memory.until_any((at, value), *((one, what) for one in asked)):
            if what == _DRAIN:
                self._event()
            else:
                memory[stage.at(f"copy[{self._cpu}{_OWN[seen - 1]}]")] = INVALID
            memory[asked[seen - 1]] = _DONE

    def _event(self) -> None:
        """Take everything (Fig. 12)."""
        stage, memory, consumer = self._stage, self._memory, self._consumer
        drained = consumer.event()
        if drained.drop_all:
            for entry in _OFFSETS:
                memory[stage.at(f"copy[{self._cpu}{entry}]")] = INVALID
        for patch in drained.patches:
            (entry,) = (e for e, offset in _OFFSETS.items() if offset == patch.offset)
            current = memory[stage.at(entry)]
            usable = consumer.usable(patch, current)
            copy = patch.derived if usable else derive(current, 0)
            memory[stage.at(f"copy[{self._cpu}{entry}]")] = copy
        consumer.settle()


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
