"""What a VCPU with nested paging does about its translations: what bare hardware does, but for
frames the second level lacks: holes, frames that are elsewhere or shared, and devices, whose
accesses the monitor makes itself.

Source: SDM vol. 3, 29.3; A40 ¶38.
"""

from __future__ import annotations

from dataclasses import replace

from penumbra.actors.machine.coherence import BareHardware, value_of
from penumbra.actors.machine.control import Control
from penumbra.actors.machine.frames import FramesOf
from penumbra.actors.machine.messages import Complete, Ran, TruePageFault
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.fill import BringFrame, Forward
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.nested import SecondLevel
from penumbra.actors.vmm.nested_emulation import NestedWalker
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.exits import GeneralProtection, PageFault
from penumbra.hw.formats import PAGE_SHIFT, FormatSpec
from penumbra.hw.operations import LoadPhysical, Operation, Physical
from penumbra.hw.streams import WRITE

_NO_EXIT = frozenset({"invlpg", "cr3_load"})


class Nested(BareHardware):
    """Nested paging: events act on the CPU and faults go to the guest, without an exit."""

    def __init__(
        self,
        vcpu_id: int,
        seat: Seat,
        second_level: SecondLevel,
        control: Control,
        observer: Observer,
        spec: FormatSpec,
        memory: MemoryManagement,
        frames: FramesOf,
    ) -> None:
        super().__init__(vcpu_id, seat, observer)
        self._frames = frames
        self._second_level = second_level
        self._control = control
        self._spec = spec
        self._memory = memory
        self._walker = NestedWalker(spec, memory)

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | Ran | None:
        if fault.gpa < 0:
            return super().page_fault(fault, work, user)
        if self._memory.is_device(fault.gpa >> PAGE_SHIFT):
            self.note_exit("device")
            return self._emulate(work, user, fault.at)
        self.note_exit("second level")
        # An entry that is there refuses writes alone: others lie in its machine frame, too.
        gfn = fault.gpa >> PAGE_SHIFT
        self._frames.want(gfn, bool(self._second_level.entry(gfn)))
        self._second_level.back(fault.gpa)
        return None

    def _emulate(self, work: Operation, user: bool, at: int) -> TruePageFault | Ran:
        """Make one step of an operation by the guest's tables of now (330).

        What the hardware has cached may be older than these: the step is made all the same, or a
        stale translation could hold the guest up for ever.
        """
        accesses = self._cpu.cpu.next_accesses(work, at)
        registers, hpas = self._guest_registers(), list[int]()
        while len(hpas) < len(accesses):
            gva, _, kind = accesses[len(hpas)]
            gpa = self._walker.guest_address(registers, gva, kind, user)
            if isinstance(gpa, Forward):
                return TruePageFault(gva, gpa.error, kind)
            if isinstance(gpa, int) and self._ready(gpa, kind == WRITE):
                hpas.append(self._reach(gpa))
                continue
            write = kind == WRITE
            wanted = BringFrame(gpa >> PAGE_SHIFT, write) if isinstance(gpa, int) else gpa
            self._frames.want(wanted.gfn, wanted.write)
            hpas.clear()  # what was found may have moved
        ran = self._cpu.ask_nowait(Complete(work, user, at, tuple(hpas)))
        self._observer.note(self._vcpu, EventKind.DEVICE_ACCESS, accesses[-1][0], hpas[-1])
        if self._observer.taps is not None:
            for (gva, _, kind), hpa in zip(accesses, hpas, strict=True):
                self._observer.taps.used(self._vcpu, gva, kind, user, hpa >> PAGE_SHIFT)
        return ran

    def _guest_registers(self) -> GuestRegisters:
        """Return the guest's registers with the top-level entries its CPU holds."""
        return replace(self.registers, top=self._cpu.cpu.top_entries)

    def _ready(self, gpa: int, write: bool) -> bool:
        return self._memory.is_device(gpa >> PAGE_SHIFT) or self._memory.ready(
            gpa >> PAGE_SHIFT, write
        )

    def _reach(self, gpa: int) -> int:
        """Return where the CPU makes an emulated access."""
        if self._memory.is_device(gpa >> PAGE_SHIFT):
            return gpa
        return self._second_level.machine_address(gpa)

    def physical(self, work: Physical) -> int | GeneralProtection:
        if self._memory.is_device(work.gpa >> PAGE_SHIFT):
            self.note_exit("device")
        else:
            self._frames.want(work.gpa >> PAGE_SHIFT, not isinstance(work, LoadPhysical))
        return value_of(self._cpu.ask_nowait(Complete(work, False, 0, (self._reach(work.gpa),))))

    def load_root(self, cr3: int) -> GeneralProtection | None:
        if self._spec.root_registers:
            self._bring_top(cr3)
        return super().load_root(cr3)

    def load_mode(self, register: int, value: int) -> GeneralProtection | None:
        if self._spec.root_registers:
            self._bring_top(self.registers.cr3)
        return super().load_mode(register, value)

    def _bring_top(self, cr3: int) -> None:
        """Have the table there that the CPU loads registers from: its loads cannot be restarted."""
        gpa = cr3 & self._spec.root_mask
        self._frames.want(gpa >> PAGE_SHIFT, False)
        self._second_level.machine_address(gpa)

    def note_exit(self, reason: str) -> None:
        self._observer.exit(self._vcpu, reason)

    def privileged(self, reason: str) -> None:
        if reason in self._control.exits - _NO_EXIT:
            self._observer.exit(self._vcpu, reason)
