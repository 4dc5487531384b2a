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

_COUNTED = {
    "references": m.R_REFERENCES,
    "tlb_miss": m.R_MISSES,
    "walk": m.R_WALKS,
    "walk_read": m.R_WALK_READS,
    "psc_hit": m.R_PSC_HITS,
    "second_read": m.R_SECOND_READS,
}
_MISSES, _WALK_READS = list(_COUNTED).index("tlb_miss"), list(_COUNTED).index("walk_read")
_SECOND_READS = list(_COUNTED).index("second_read")
_NOTHING = np.zeros(m.REG_WORDS, np.int64).data


class Taps(Protocol):
    """What the oracle is fed with; addresses as in `hw`: hpa, pfn machine, gfn guest."""

    def grant_all(self, pfns: Sequence[int]) -> None:
        """The first grants: where guest frames 0, 1, 2 ... lie; numbers as for `grant`."""

    def grant(self, gfn: int, pfn: int) -> None:
        """A guest frame is backed by a machine frame from now on.

        -1: it is no RAM; -2: it is in no machine frame for now (before its content is lost).
        """

    def device(self, gfn: int, pfn: int) -> None:
        """Accesses to a guest frame are to a device, and said to be in `pfn`, where no RAM is."""

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
        self.vm = 0
        self._on_cpu = list(range(n_vcpus))
        # What a VCPU has counted: its CPU's registers, less what they held when it sat down, plus
        # what it had counted before.
        self._regs: list[memoryview] = [_NOTHING] * n_vcpus
        self._before = [[0] * len(_COUNTED) for _ in range(n_vcpus)]

    def sits_down(self, vcpu: int, cpu: PhysicalCpu) -> None:
        """From now on a VCPU runs on this CPU, whose registers count for it."""
        self._on_cpu[vcpu], self._regs[vcpu] = cpu.cpu_id, cpu.reg
        before = self._before[vcpu]
        for i, register in enumerate(_COUNTED.values()):
            before[i] -= cpu.reg[register]

    def gets_up(self, vcpu: int) -> None:
        """A VCPU leaves its CPU and keeps what it has counted there."""
        before, reg = self._before[vcpu], self._regs[vcpu]
        for i, register in enumerate(_COUNTED.values()):
            before[i] += reg[register]
        self._regs[vcpu] = _NOTHING

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
        reg, before = self._regs[vcpu], self._before[vcpu]
        unit = self._unit
        return (
            self._costs[vcpu]
            + self.progress[vcpu] * unit["progress"]
            + (reg[m.R_MISSES] + before[_MISSES]) * unit["tlb_miss"]
            + (reg[m.R_WALK_READS] + before[_WALK_READS]) * unit["walk_read"]
            + (reg[m.R_SECOND_READS] + before[_SECOND_READS]) * unit["second_read"]
        )

    def note(
        self, vcpu: int, kind: EventKind, gva: int = 0, arg0: int = 0, arg1: int = 0, cause: int = 0
    ) -> int:
        """Log one event; return its sequence number, to be the cause of others."""
        return self.events.add(
            self.progress[vcpu], self.cost(vcpu), self.vm, vcpu, self._on_cpu[vcpu], kind, gva,
            arg0, arg1, cause,
        )  # fmt: skip

    def totals(self) -> dict[str, int]:
        """Return all counters of the machine, the hardware's and the progress included."""
        total: Counter[str] = Counter(progress=sum(self.progress))
        for vcpu, counters in enumerate(self.counters):
            total.update(counters)
            total.update(self.hardware(vcpu))
        return {name: total[name] for name in sorted(total)}

    def hardware(self, vcpu: int) -> dict[str, int]:
        """Return what a VCPU's CPU has counted itself."""
        reg, before = self._regs[vcpu], self._before[vcpu]
        return {
            name: reg[register] + before[i] for i, (name, register) in enumerate(_COUNTED.items())
        }
