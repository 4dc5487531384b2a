"""What a machine is made of: the `[machine]` table of a configuration, defaults filled in.

Lengths of time here are guest progress. Nothing in this table is a cost.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penumbra.actors.machine.control import ControlName
from penumbra.actors.vmm.residents import least_host_frames
from penumbra.guest.kernel import GUEST_BUGS
from penumbra.hw.formats import FORMATS
from penumbra.hw.tlb import TlbGeometry

_NOT_NEGATIVE = (
    "ipi_latency", "ram_mib", "pool_mib", "disk_mib", "disk_latency", "user_frames",
    "balloon_frames", "max_progress", "skew", "applications", "application_work",
    "host_frames", "host_moves", "share_pages",
)  # fmt: skip


class MachineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One virtual machine and the hardware below it.

    Attributes:
        vcpus: Virtual CPUs, each on a physical CPU of its own; 1 .. 16.
        paging: Paging format of guest and hardware; 32-bit recordings take `ia32` or `pae`.
        ram_mib: Guest RAM; 0 takes what the workload needs.
        pool_mib: Guest frames reserved for page tables; 0 takes an eighth of RAM, at least 8.
        tlb_entries, tlb_ways, psc_slots: Geometry of each CPU's TLB and paging-structure cache.
        tlb: Who fills the TLBs: the hardware, which walks, or software, to which a miss traps: the
            guest's miss handler, or the monitor (A40 [0013], [0018]).
        smt: Neighbouring CPUs that share one TLB (A40 Fig. 4); 1: each has its own.
        beyond_ram: What an access to a machine address without memory is: all ones, writes
            vanishing, as on a PC; or a machine check, which ends the machine by name.
        quantum: Progress after which the conductor chooses again.
        timer_period: Progress between the guest's timer interrupts.
        ipi_latency: Progress between the sending of an IPI and its arrival.
        disk_mib: Size of the virtual disk, the guest's swap space; 0: there is none.
        disk_latency: Progress between the start of a DMA transfer and its interrupt.
        user_frames: User page frames the guest uses at most, as if its RAM ended there; 0: all.
        balloon_frames: User page frames at most that the guest lends to what is below it and takes
            back, by turns, eight timer ticks each; 0: none.
        guest_flush: How the guest's CPUs come to flush what one of them unmaps: at once by
            interrupt, with all others stopped first, many in one round, or each at its own next
            CR3 load or timer tick, the frames waiting for it; `patch` is the last with word of what
            to drop, where the scheme carries it, else the first.
        control: How a monitor gets control of the guest kernel's privileged instructions: the
            hardware intercepts them, every one traps, or the kernel runs as translated code.
        cpus: Physical CPUs below the VCPUs of all VMs; 0: one each, and no kernel between.
        vms: Virtual machines of this kind on one kernel, each with the workload for itself.
        slice: Progress for which a world keeps its CPU while others wait.
        skew: Progress by which a VCPU may be ahead of its slowest sibling, while worlds share CPUs.
        form: What runs below the monitors: a dedicated kernel, or a host OS.
        applications: Worlds beside the VMs that only compute, each for `application_work` progress.
        max_progress: Progress of one VCPU at which the machine ends by name; 0 takes ten times the
            workload's recorded references plus 20 million.
        host_frames: Machine frames for guest memory under a monitor, from each VM into the pool
            that all of them take from; the kernel swaps what does not fit. 0: all the guest has.
        host_moves: Progress after which the monitor moves a guest frame that is in use to another
            machine frame; 0 never. A test of whatever maps it.
        share_pages: Progress after which the monitor looks for guest frames of equal content and
            lets them share one machine frame until one of them is written; 0 never.
        guest_bugs: Bugs the guest kernel is to have (`penumbra list faults`).
        spurious_faults: Deliver the fault of a cached entry with fewer rights without a new walk.
    """

    vcpus: int = 4
    paging: Literal["ia32", "pae", "x86-64"] = "x86-64"
    ram_mib: int = 0
    pool_mib: int = 0
    tlb_entries: int = 512
    tlb_ways: int = 8
    psc_slots: int = 16
    tlb: Literal["hardware", "software"] = "hardware"
    smt: int = 1
    beyond_ram: Literal["ones", "machine-check"] = "ones"
    quantum: int = 10_000
    timer_period: int = 100_000
    ipi_latency: int = 200
    max_progress: int = 0
    disk_mib: int = 0
    disk_latency: int = 2_000
    user_frames: int = 0
    balloon_frames: int = 0
    guest_flush: Literal["eager", "quiesce", "batched", "lazy", "patch"] = "eager"
    spurious_faults: bool = False
    control: ControlName = "assisted"
    cpus: int = 0
    vms: int = 1
    slice: int = 100_000
    skew: int = 200_000
    form: Literal["kernel", "hosted"] = "kernel"
    applications: int = 0
    application_work: int = 1_000_000
    host_frames: int = 0
    host_moves: int = 0
    share_pages: int = 0
    guest_bugs: tuple[str, ...] = ()

    @property
    def frames_move(self) -> bool:
        """Whether the machine frame behind a guest frame may be another later."""
        return bool(self.host_frames or self.host_moves or self.share_pages)

    def problem(self) -> str | None:
        """Say in one line what cannot be built, naming the field; None if nothing."""
        if not 1 <= self.vcpus <= 16:
            return f"machine.vcpus is {self.vcpus}: must be 1 .. 16"
        if self.smt not in (1, 2, 4):
            return f"machine.smt is {self.smt}: must be 1, 2 or 4"
        if not 0 <= self.cpus <= 16:
            return f"machine.cpus is {self.cpus}: must be 0 .. 16"
        if not 1 <= self.vms <= 16:
            return f"machine.vms is {self.vms}: must be 1 .. 16"
        for name in ("quantum", "timer_period", "slice"):
            if getattr(self, name) < 1:
                return f"machine.{name} is {getattr(self, name)}: must be at least 1"
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                return f"machine.{name} is {getattr(self, name)}: must not be negative"
        if 0 < self.host_frames < (least := least_host_frames(self.vcpus)):
            return f"machine.host_frames is {self.host_frames}: must be 0 or at least {least}"
        if self.disk_mib > 16384:
            return f"machine.disk_mib is {self.disk_mib}: at most 16384"
        if self.ram_mib > 16384:
            return f"machine.ram_mib is {self.ram_mib}: at most 16384"
        if self.paging == "ia32" and self.ram_mib > 3072:
            return f"machine.ram_mib is {self.ram_mib}: at most 3072 with ia32 paging"
        for bug in self.guest_bugs:
            if bug not in GUEST_BUGS:
                return f"machine.guest_bugs: no guest bug {bug!r} (known: {', '.join(GUEST_BUGS)})"
        if self.tlb == "software" and self.tlb_ways < 2:
            return f"machine.tlb_ways is {self.tlb_ways}: at least 2 with machine.tlb software"
        if self.tlb == "software" and self.spurious_faults:
            return "machine.spurious_faults is true: needs machine.tlb hardware, whose walks it is"
        try:
            TlbGeometry(self.tlb_entries, self.tlb_ways, self.psc_slots)
        except ValueError as error:
            return f"machine: {error}"
        return None

    @property
    def spec_name(self) -> str:
        return FORMATS[self.paging].name
