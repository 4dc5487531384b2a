"""Cost profiles: what each event costs, in processor cycles of the modelled machine.

Costs are reported and never feed back: they cannot change what a guest does. A profile is a table
of unit costs by counter name; the cost of a run is the sum of count times unit cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class CostProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unit costs in cycles. Guest progress costs `reference` each.

    The default's order of magnitude follows the nanobenchmarks of Adams and Agesen (ASPLOS 2006,
    software against hardware techniques for x86 virtualization) for exits and traced stores; the
    rest is plausible and uncalibrated, so its totals compare schemes and predict no machine.
    """

    source: str = "default, uncalibrated"
    reference: int = 1
    tlb_miss: int = 10
    walk_read: int = 10
    guest_fault: int = 1000
    exit: int = 1400
    hidden_fault: int = 1000
    emulated_store: int = 500
    patch_posted: int = 40
    patch_coalesced: int = 30
    patch_applied: int = 60
    shootdown: int = 2000
    trace_placed: int = 1500
    coherency_event: int = 100
    tlb_flush: int = 200
    invlpg: int = 100
    ipi: int = 1000
    cr3_load: int = 200

    def cost(self, counters: Mapping[str, int]) -> int:
        """Return the total of `counters` (names as the fields above; others cost nothing)."""
        return sum(
            n * getattr(self, name)
            for name, n in counters.items()
            if name in self.__struct_fields__ and name != "source"
        )
