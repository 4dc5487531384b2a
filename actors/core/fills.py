"""Becoming and ceasing to be a consumer while a producer stores, as stepped programs.

Whoever derives from an entry is told of changes only while it is registered (832), so the order of
registering and reading decides. R derives a copy of x once, at any moment, while A stores to x; or
it has a copy, leaves it for a time and comes back to it.

Source: A40 Fig. 8, steps 802-814, ¶95; `docs/errata.md` EP4, EP5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penumbra.actors.core.kinds import consumer_of, producer_of
from penumbra.actors.core.races import INVALID, TABLE, derive, entry_of
from penumbra.actors.core.stepper import End, Program, StepMemory
from penumbra.actors.core.words import COUNT, Layout

_OFFSET: Final = 8


@dataclass(frozen=True)
class Filling:
    """A store against a fill, or against a copy that is left and taken up again.

    Attributes:
        reads_first: 802 before 812, as printed: the entry is read before the consumer is there.
        fences: A fence between registering and reading; it takes store buffers to need it.
        leaves: R has a copy from the start, stops being a consumer, and comes back.
        keeps: It keeps its copy meanwhile; else the copy goes first, and is derived anew.
    """

    reads_first: bool = False
    fences: bool = True
    leaves: bool = False
    keeps: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(1, 1)

    def at(self, name: str) -> int:
        return self.layout.n_words + ("x", "interest", "copy", "done").index(name)

    def name(self, at: int) -> str:
        n = self.layout.n_words
        return ("x", "interest", "copy", "done")[at - n] if at >= n else self.layout.name(at)

    def program(self) -> Program:
        """Make the processes, the words they start from, and the judge."""
        initial = {COUNT: 1}
        if self.leaves:
            initial |= {self.at("copy"): derive(0, 0), self.at("interest"): 1}
        return Program({"A": self._store, "R": self._consume}, self._judge, initial, self.name)

    def _store(self, memory: StepMemory) -> None:
        producer = producer_of(memory, self.layout, 0, ports=memory)
        producer.begin([(TABLE, _OFFSET)])
        memory[self.at("x")] = 1  # 831
        producer.stored()
        if memory[self.at("interest")]:  # 832
            producer.post_nowait(0, TABLE, _OFFSET, derive(1, 0), 1)
        producer.end()
        memory[self.at("done")] = 1

    def _consume(self, memory: StepMemory) -> None:
        consumer = consumer_of(memory, self.layout, 0, ports=memory)
        if self.leaves and self.keeps:
            memory[self.at("interest")] = 0
            memory[self.at("interest")] = 1
        else:
            if self.leaves:
                memory[self.at("copy")] = INVALID
                memory[self.at("interest")] = 0
            self._fill(memory)
        memory.until(self.at("done"), 1)
        for patch in consumer.event().patches:
            current = memory[self.at("x")]
            usable = consumer.usable(patch, current)
            memory[self.at("copy")] = patch.derived if usable else derive(current, 0)

    def _fill(self, memory: StepMemory) -> None:
        early = memory[self.at("x")] if self.reads_first else 0  # 802
        memory[self.at("interest")] = 1  # 812
        if self.fences:
            memory.fence()
        entry = early if self.reads_first else memory[self.at("x")]
        memory[self.at("copy")] = derive(entry, 0)  # 814

    def _judge(self, end: End) -> str | None:
        copy = end.memory.get(self.at("copy"), INVALID)
        current = end.memory.get(self.at("x"), 0)
        if copy != INVALID and entry_of(copy) != current:
            return f"R keeps x{entry_of(copy)} for x{current}"
        return None
