"""What a machine tells those who watch: counters, events, and the taps of the checker.

Observers never change what they observe: nothing here is read by a driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from penumbra.actors.observe.events import EventKind, EventLog
from penumbra.hw import mmu_layout as m
from penumbra.hw.costs import CostProfile
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.streams import AccessStream


class Taps(Protocol):
    """What the oracle is fed with; addresses as in `hw`: hpa, pfn machine, gfn guest."""

    def grant(self, gfn: int, pfn: int) -> None:
        """A guest frame is backed by a machine frame from now on."""

    def registers(self, vcpu: int, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """The guest's control registers at the start."""

    def store(self, hpa: int, size: int, old: int, new: int) -> None:
        """A guest store to a flagged frame has become visible."""

    def event(self, vcpu: int, what: str, value: int) -> None:
        """A coherency event is over: INVLPG (value: gva), CR0, CR3, CR4 (value: the new value)."""

    def fault(self, vcpu: int, gva: int, error: int, user: bool) -> None:
        """A page fault is delivered to the guest."""

    def used(self, vcpu: int, gva: int, kind: int, user: bool, pfn: int) -> None:
        """A single access used a frame."""

    def block(
        self,
        vcpu: int,
        stream_id: int,
        stream: AccessStream,
        start: int,
        used_pfn: npt.NDArray[np.int64],
    ) -> None:
        """Runs `start ..` of a stream used these frames, in user mode."""


class Observer:
    """Counters and events of one machine.

    Attributes:
        counters: Per VCPU, events by name.
        exits: Per VCPU, exits to the monitor by reason.
    """

    def __init__(self, n_vcpus: int, costs: CostProfile, taps: Taps | None) -> None:
        self.taps = taps
        self.events = EventLog()
        self.counters: list[Counter[str]] = [Counter() for _ in range(n_vcpus)]
        self.exits: list[Counter[str]] = [Counter() for _ in range(n_vcpus)]
        self.progress = [0] * n_vcpus
        self._costs = [0] * n_vcpus
        fields = (name for name in costs.__struct_fields__ if name != "source")
        self._unit: dict[str, int] = {name: getattr(costs, name) for name in fields}
        self._cpus: Sequence[PhysicalCpu] = ()

    def watch_cpus(self, cpus: Sequence[PhysicalCpu]) -> None:
        """Read the hardware's own counters from these CPUs, one per VCPU."""
        self._cpus = cpus

    def count(self, vcpu: int, name: str, n: int = 1) -> None:
        """Count `n` events of a name and what they cost."""
        self.counters[vcpu][name] += n
        self._costs[vcpu] += self._unit.get(name, 0) * n

    def exit(self, vcpu: int, reason: str) -> None:
        """Count one exit to the monitor."""
        self.exits[vcpu][reason] += 1
        self.count(vcpu, "exit")

    def cost(self, vcpu: int) -> int:
        """Return what a VCPU has cost so far."""
        reg = self._cpus[vcpu].reg
        unit = self._unit
        return (
            self._costs[vcpu]
            + self.progress[vcpu] * unit["progress"]
            + reg[m.R_MISSES] * unit["tlb_miss"]
            + reg[m.R_WALK_READS] * unit["walk_read"]
            + reg[m.R_SECOND_READS] * unit["second_read"]
        )

    def note(
        self, vcpu: int, kind: EventKind, gva: int = 0, arg0: int = 0, arg1: int = 0, cause: int = 0
    ) -> int:
        """Log one event; return its sequence number, to be the cause of others."""
        return self.events.add(
            self.progress[vcpu], self.cost(vcpu), 0, vcpu, vcpu, kind, gva, arg0, arg1, cause
        )

    def totals(self) -> dict[str, int]:
        """Return all counters of the machine, the hardware's and the progress included."""
        total: Counter[str] = Counter(progress=sum(self.progress))
        for vcpu, counters in enumerate(self.counters):
            total.update(counters)
            total.update(self.hardware(vcpu))
        return {name: total[name] for name in sorted(total)}

    def hardware(self, vcpu: int) -> dict[str, int]:
        """Return what a VCPU's CPU has counted itself."""
        reg = self._cpus[vcpu].reg
        return {
            "references": reg[m.R_REFERENCES],
            "tlb_miss": reg[m.R_MISSES],
            "walk": reg[m.R_WALKS],
            "walk_read": reg[m.R_WALK_READS],
            "psc_hit": reg[m.R_PSC_HITS],
            "second_read": reg[m.R_SECOND_READS],
        }
