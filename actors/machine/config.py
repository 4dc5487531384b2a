"""What a machine is made of: the `[machine]` table of a configuration, defaults filled in.

Lengths of time here are guest progress. Nothing in this table is a cost.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penumbra.guest.kernel import GUEST_BUGS
from penumbra.hw.formats import FORMATS
from penumbra.hw.tlb import TlbGeometry

_NOT_NEGATIVE = (
    "ipi_latency", "ram_mib", "pool_mib", "disk_mib", "disk_latency", "user_frames", "max_progress",
)  # fmt: skip


class MachineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One virtual machine and the hardware below it.

    Attributes:
        vcpus: Virtual CPUs, each on a physical CPU of its own; 1 .. 16.
        paging: Paging format of guest and hardware.
        ram_mib: Guest RAM; 0 takes what the workload needs.
        pool_mib: Guest frames reserved for page tables; 0 takes an eighth of RAM, at least 8.
        tlb_entries, tlb_ways, psc_slots: Geometry of each CPU's TLB and paging-structure cache.
        smt: Neighbouring CPUs that share one TLB (A40 Fig. 4); 1: each has its own.
        quantum: Progress after which the conductor chooses again.
        timer_period: Progress between the guest's timer interrupts.
        ipi_latency: Progress between the sending of an IPI and its arrival.
        disk_mib: Size of the virtual disk, the guest's swap space; 0: there is none.
        disk_latency: Progress between the start of a DMA transfer and its interrupt.
        user_frames: User page frames the guest uses at most, as if its RAM ended there; 0: all.
        guest_flush: How the guest's CPUs come to flush what one of them unmaps: at once by
            interrupt, with all others stopped first, many in one round, or each at its own next
            CR3 load or timer tick, the frames waiting for it; `patch` is the last with word of what
            to drop, where the scheme carries it, else the first.
        max_progress: Progress of one VCPU at which the machine ends by name; 0 takes ten times the
            workload's recorded references plus 20 million.
        guest_bugs: Bugs the guest kernel is to have (`penumbra list faults`).
        spurious_faults: Deliver the fault of a cached entry with fewer rights without a new walk.
    """

    vcpus: int = 4
    paging: Literal["ia32", "x86-64"] = "x86-64"
    ram_mib: int = 0
    pool_mib: int = 0
    tlb_entries: int = 512
    tlb_ways: int = 8
    psc_slots: int = 16
    smt: int = 1
    quantum: int = 10_000
    timer_period: int = 100_000
    ipi_latency: int = 200
    max_progress: int = 0
    disk_mib: int = 0
    disk_latency: int = 2_000
    user_frames: int = 0
    guest_flush: Literal["eager", "quiesce", "batched", "lazy", "patch"] = "eager"
    spurious_faults: bool = False
    guest_bugs: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Say in one line what cannot be built, naming the field; None if nothing."""
        if not 1 <= self.vcpus <= 16:
            return f"machine.vcpus is {self.vcpus}: must be 1 .. 16"
        if self.smt not in (1, 2, 4):
            return f"machine.smt is {self.smt}: must be 1, 2 or 4"
        for name in ("quantum", "timer_period"):
            if getattr(self, name) < 1:
                return f"machine.{name} is {getattr(self, name)}: must be at least 1"
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                return f"machine.{name} is {getattr(self, name)}: must not be negative"
        if self.disk_mib > 16384:
            return f"machine.disk_mib is {self.disk_mib}: at most 16384"
        if self.ram_mib > 16384:
            return f"machine.ram_mib is {self.ram_mib}: at most 16384"
        if self.paging == "ia32" and self.ram_mib > 3072:
            return f"machine.ram_mib is {self.ram_mib}: at most 3072 with ia32 paging"
        for bug in self.guest_bugs:
            if bug not in GUEST_BUGS:
                return f"machine.guest_bugs: no guest bug {bug!r} (known: {', '.join(GUEST_BUGS)})"
        try:
            TlbGeometry(self.tlb_entries, self.tlb_ways, self.psc_slots)
        except ValueError as error:
            return f"machine: {error}"
        return None

    @property
    def spec_name(self) -> str:
        return FORMATS[self.paging].name
