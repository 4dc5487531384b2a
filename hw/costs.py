"""Cost profiles: what each event costs, in processor cycles of the modelled machine.

Costs are reported and never feed back: they cannot change what a guest does. A profile is a table
of unit costs by counter name; the cost of a run is the sum of count times unit cost.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

Cycles = Annotated[int, msgspec.Meta(ge=0, le=10**9)]


class CostProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unit costs in cycles, by the name of the counter they are for.

    The default's order of magnitude follows the nanobenchmarks of Adams and Agesen (ASPLOS 2006,
    software against hardware techniques for x86 virtualization) for exits and traced stores; the
    rest is plausible and uncalibrated, so its totals compare schemes and predict no machine.
    """

    source: str = "default, uncalibrated"
    progress: Cycles = 1
    tlb_miss: Cycles = 10
    walk_read: Cycles = 10
    tlb_refill: Cycles = 40
    tlb_update: Cycles = 20
    second_read: Cycles = 10
    guest_fault: Cycles = 1000
    interrupt: Cycles = 0
    exit: Cycles = 1400
    hidden_fault: Cycles = 1000
    emulated_store: Cycles = 500
    log_record: Cycles = 20
    patch_posted: Cycles = 40
    patch_coalesced: Cycles = 30
    patch_applied: Cycles = 60
    patch_lock: Cycles = 40
    overflow_wait: Cycles = 1000
    shootdown: Cycles = 2000
    trace_placed: Cycles = 1500
    coherency_event: Cycles = 100
    resync: Cycles = 300
    resync_entry: Cycles = 60
    prefetch: Cycles = 40
    tlb_flush: Cycles = 200
    invlpg: Cycles = 100
    ipi: Cycles = 1000
    cr3_load: Cycles = 200
    world_switch: Cycles = 3000
    callout: Cycles = 200
    kernel_call: Cycles = 800
    check_action_ipi: Cycles = 1000
    translated: Cycles = 1
    host_page_in: Cycles = 100_000
    host_page_out: Cycles = 100_000
    host_zero_fill: Cycles = 1000
    pages_shared: Cycles = 2000
    pages_unshared: Cycles = 2000
    frames_moved: Cycles = 2000

    def cost(self, counters: Mapping[str, int]) -> int:
        """Return the total of `counters` (names as the fields above; others cost nothing)."""
        return sum(
            n * getattr(self, name)
            for name, n in counters.items()
            if name in self.__struct_fields__ and name != "source"
        )


def prices(profile: CostProfile) -> dict[str, int]:
    """Return the unit costs of a profile by counter, in cycles."""
    return {name: getattr(profile, name) for name in profile.__struct_fields__ if name != "source"}


@cache
def shipped_profiles() -> dict[str, CostProfile]:
    """Return the profiles that come with the package, by name."""
    folder = Path(__file__).parent / "cost_profiles"
    return {
        path.stem: msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), CostProfile)
        for path in sorted(folder.glob("*.toml"))
    }
