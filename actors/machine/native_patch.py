"""Patch channels without a monitor: the OS's page tables are primary data, the TLBs secondary.

Where the guest's flush policy would interrupt other CPUs it says what has changed; each CPU told
gets a patch, (root, page), and does the INVLPG itself at its own next coherency event. Between the
two it may use what it has cached, as it might until the interrupt came; so the guest keeps the
frames until all have had an event (`guest.kernel.shootdown`, way `patch`).

A CPU that has loaded another root since has dropped the page with it: then a patch asks nothing.

Source: A40 ¶59, ¶126.
"""

from __future__ import annotations

from penumbra.actors.core import Matrix
from penumbra.actors.machine.coherence import BareHardware
from penumbra.actors.machine.messages import Invalidate
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.schemes import SchemeOptions
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.operations import MappingChanged

_MASK64 = (1 << 64) - 1


class NativePatch(BareHardware):
    """Bare hardware whose events first drop what other CPUs have posted."""

    def __init__(
        self,
        vcpu_id: int,
        cpu: Seat,
        observer: Observer,
        matrix: Matrix,
        options: SchemeOptions,
    ) -> None:
        super().__init__(vcpu_id, cpu, observer)
        self._matrix = matrix
        self._producer = matrix.producer(vcpu_id)
        self._consumer = matrix.consumer(vcpu_id)
        self._loses = options.overflow == "lost"

    def mapping_changed(self, work: MappingChanged) -> int:
        """Post one patch per page to each CPU named; return those that will apply them all.

        Where a channel is full its CPU drops everything at its next event, or is not among those
        returned, so that the guest interrupts it (844).
        """
        cpus = work.cpus & ((1 << self._matrix.n) - 1)
        root = work.root & -PAGE_BYTES & _MASK64
        first = work.gva & -PAGE_BYTES & _MASK64
        full = cpus if work.n_pages > self._matrix.capacity else 0
        pages = range(first, first + (work.n_pages << PAGE_SHIFT), PAGE_BYTES)
        for gva in pages if not full else ():
            self._producer.begin([(root, gva & _MASK64)])
            self._producer.stored()
            full |= self._producer.post_all(cpus & ~full, root, gva & _MASK64)
            self._producer.end()
        if not self._loses:
            return cpus & ~full
        for cpu in range(self._matrix.n):
            if full >> cpu & 1:
                self._producer.lose(cpu)
        return cpus

    def invlpg(self, gva: int) -> None:
        self._follow()
        super().invlpg(gva)

    def load_root(self, cr3: int) -> None:
        self._follow()
        super().load_root(cr3)

    def load_mode(self, register: int, value: int) -> None:
        self._follow()
        super().load_mode(register, value)

    def _follow(self) -> None:
        """Drop from this CPU's TLB what the channels say; part of the event it comes before."""
        observer, vcpu = self._observer, self._vcpu
        observer.count(vcpu, "coherency_event")
        drained = self._consumer.event()
        self._consumer.settle()
        if drained.drop_all:
            observer.count(vcpu, "tlb_flush")
            self._cpu.ask_nowait(Invalidate((), everything=True))
        if not drained.patches:
            return
        n = len(drained.patches)
        observer.count(vcpu, "patch_applied", n)
        observer.note(vcpu, EventKind.PATCH_APPLIED, 0, n)
        root = self.registers.cr3 & -PAGE_BYTES
        gvas = tuple(patch.offset for patch in drained.patches if patch.base == root)
        if gvas:
            observer.count(vcpu, "invlpg", len(gvas))
            self._cpu.ask_nowait(Invalidate(gvas))
            if observer.taps is not None:
                for gva in gvas:
                    observer.taps.event(vcpu, "INVLPG", gva)
