"""A virtual machine under a virtual TLB, without an event loop: see `tests/actors/vmm/bench.py`.

bench = VtlbBench(X86_64)
bench.map(bench.root, GVA, gfn=40)
bench.begin()
bench.access(0, GVA)            a hidden fault fills, the oracle judges
bench.active(GVA, user=True)    the active entry, as the hardware reads it
"""

from __future__ import annotations

from typing import Any, cast

import msgspec

from penumbra.actors.vmm.compose import compose_virtual_tlbs
from penumbra.actors.vmm.fill import Forward, Hidden, MachineCheck
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.schemes import VTLB, SchemeOptions
from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.vtlb.tables import Hierarchy
from penumbra.hw import operations as o
from penumbra.hw.exits import GeneralProtection, PageFault
from penumbra.hw.formats import (
    CR4_PGE,
    EFER_NXE,
    IA32,
    PAGE_SHIFT,
    X86_64,
    A,
    D,
    FormatSpec,
    P,
    U,
    W,
)
from penumbra.hw.tlb import TlbGeometry
from tests.actors.vmm.bench import Bench, Faulted, Seen, psc_frames

FORMATS = (IA32, X86_64)
LINK = P | W | U | A
USED = P | W | U | A | D
GVA = 0x1000
NEIGHBOUR = 0x2000  # a second page under the same table
FRAME, OTHER, THIRD = 40, 41, 42


class MachineCheckedError(Exception):
    """The monitor raised a machine check (716, 838)."""


class VtlbBench(Bench):
    """One VM whose VCPUs have virtual TLBs.

    Attributes:
        root: Guest frame of the root table every VCPU starts on.
    """

    def __init__(
        self,
        spec: FormatSpec = IA32,
        *,
        n_vcpus: int = 1,
        n_frames: int = 64,
        tlb: TlbGeometry | None = None,
        contiguous: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(spec, n_vcpus=n_vcpus, n_frames=n_frames, tlb=tlb)
        if contiguous:
            self.memory = MemoryManagement(self.ram, n_frames, identity=True, seed=1)
            self.memory._free = self.memory._free[-64 * n_vcpus :]
            for gfn in range(n_frames):
                self.oracle.grant(gfn, gfn)
        chosen = msgspec.convert({"shadow_pages": 64, **options}, SchemeOptions)
        scheme = msgspec.structs.replace(VTLB, options=chosen)
        self.vtlbs = compose_virtual_tlbs(scheme, spec, self.memory, n_vcpus)
        # The driver code of the base asks the same contract of them.
        self.submms = cast("list[SubVmm]", self.vtlbs)
        self.root = self.frame()

    def begin(self, *roots: int, **registers: int) -> None:
        """Start every VCPU on `root`, or on roots of their own, and forget the log."""
        self.start(*(roots or (self.root,)), **registers)
        self.take_log()

    # ---- what the drivers do --------------------------------------------------------------------

    def level(self, vcpu: int, user: bool) -> None:
        """Enter or leave user mode (method 500, 508)."""
        root = self.vtlbs[vcpu].privilege(user)
        if root is not None:
            self.cpus[vcpu].load_root(root)

    def do(self, vcpu: int, work: o.Operation, *, user: bool = False) -> int | Faulted:
        self.level(vcpu, user)
        return super().do(vcpu, work, user=user)

    def _fetch(self, vcpu: int, gva: int, user: bool) -> int | Faulted:
        self.level(vcpu, user)
        return super()._fetch(vcpu, gva, user)

    def _page_fault(
        self, vcpu: int, fault: PageFault, work: o.Operation, user: bool
    ) -> tuple[Faulted | None, int, bool]:
        outcome = self.vtlbs[vcpu].fault(fault.gva, fault.kind, user)
        self._flush(vcpu)
        if isinstance(outcome, MachineCheck):
            raise MachineCheckedError(f"{outcome.gva:#x} {outcome.gpa:#x}")
        if isinstance(outcome, Forward):
            return self._deliver(vcpu, fault.gva, outcome.error, user), 0, False
        assert isinstance(outcome, Hidden)
        self.log.append(Seen("hidden", vcpu, fault.gva))
        return None, fault.at, False

    def _flush(self, vcpu: int) -> None:
        self._tell(vcpu)
        remote = self.vtlbs[vcpu].take_remote()
        for other in range(len(self.vtlbs)):
            if remote >> other & 1:
                self.log.append(Seen("remote", other))
                self._tell(other)

    def _tell(self, vcpu: int) -> None:
        reload = self.vtlbs[vcpu].take_reload()
        if reload is not None:
            assert self.cpus[vcpu].load_root(reload) is None
        for gva in self.vtlbs[vcpu].take_flushes():
            self.log.append(Seen("flushed", vcpu, gva))
            if gva == FLUSH_ALL:
                self.cpus[vcpu].flush_all()
            else:
                self.cpus[vcpu].invlpg(gva)

    def _set_modes(self, vcpu: int) -> None:
        registers, cpu = self.vtlbs[vcpu].registers, self.cpus[vcpu]
        pge, nxe = bool(registers.cr4 & CR4_PGE), bool(registers.efer & EFER_NXE)
        cpu.set_modes(wp=True, pse=True, pge=pge, nxe=nxe)
        cpu.flush_all()

    def _load_mode(self, vcpu: int, register: int, value: int) -> GeneralProtection | None:
        vtlb = self.vtlbs[vcpu]
        paged = vtlb.registers.paging
        changed = vtlb.load_mode(register, value)
        if isinstance(changed, GeneralProtection):
            return changed
        if changed:
            self._set_modes(vcpu)
        self._flush(vcpu)
        if vtlb.registers.paging != paged:
            self._load_root(vcpu, vtlb.registers.cr3)
        else:
            self.level(vcpu, False)
        self.oracle.event(vcpu, f"CR{register}", value)
        return None

    def load_root(self, vcpu: int, address: int) -> None:
        """Load the hardware's CR3."""
        self.cpus[vcpu].load_root(address)

    # ---- what a test asks -----------------------------------------------------------------------

    def pair(self, vcpu: int = 0) -> tuple[Hierarchy, Hierarchy]:
        """Return the user and the supervisor hierarchy of a VCPU."""
        return self.vtlbs[vcpu].state.pair.both

    def active(self, gva: int, *, user: bool, level: int = 0, vcpu: int = 0) -> int:
        """Return the active entry for an address at a level, 0 if there is none."""
        h = self.vtlbs[vcpu].state.pair.of(user)
        for table, index in h.path(gva):
            if table.level == level:
                return h.entry(table, index)
        return 0

    def both(self, gva: int, level: int = 0, vcpu: int = 0) -> tuple[int, int]:
        """Return the rights (P, W, U) of the user's and the supervisor's entry for an address."""
        mask = P | W | U
        return (
            self.active(gva, user=True, level=level, vcpu=vcpu) & mask,
            self.active(gva, user=False, level=level, vcpu=vcpu) & mask,
        )

    def mapped(self, gva: int, *, user: bool = True, vcpu: int = 0) -> int | None:
        """Return the guest frame the active leaf of an address maps, None if there is none."""
        entry = self.active(gva, user=user, vcpu=vcpu)
        pfn = (entry & self.spec.frame_mask) >> PAGE_SHIFT
        return self.memory.guest_of.get(pfn) if entry & P else None

    def hidden(self) -> int:
        """Return how many hidden faults there were since the log was taken, and take it."""
        return sum(seen.what == "hidden" for seen in self.take_log())

    def set(self, gva: int, *, level: int = 0, on: int = 0, off: int = 0) -> None:
        """Change bits of a guest entry by a guest store; nothing exits."""
        at = self.where(self.root, gva, level)
        self.poke(0, at, self.entry(at) & ~off | on)

    def bits(self, gva: int, level: int = 0) -> int:
        """Return A and D of a guest entry."""
        return self.entry(self.where(self.root, gva, level)) & (A | D)

    def refused(self) -> bool:
        """Tell whether the oracle has refused something."""
        return not self.oracle.verdict().coherent

    def check(self) -> None:
        self.memory.check()
        self.oracle.check()
        for vtlb, cpu in zip(self.vtlbs, self.cpus, strict=True):
            vtlb.check()
            cpu.tlb.check()
            tables = [h.tables() for pair in vtlb.state.pairs.all() for h in pair.both]
            frames = {table.pfn for each in tables for table in each}
            assert psc_frames(cpu.tlb) <= frames, "a freed active table may be walked"


def two_pages(
    spec: FormatSpec, flags: int = USED, *, link: int = LINK, **options: Any
) -> VtlbBench:
    """Return a VM that runs on a root mapping GVA and, under the same table, NEIGHBOUR."""
    bench = VtlbBench(spec, **options)
    bench.map(bench.root, GVA, FRAME, flags, link=link)
    bench.map(bench.root, NEIGHBOUR, OTHER, USED, link=link)
    bench.begin()
    return bench
