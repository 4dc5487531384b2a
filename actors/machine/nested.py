"""What a VCPU with nested paging does about its translations: what bare hardware does, but for
frames the second level lacks.

Source: SDM vol. 3, 29.3.
"""

from __future__ import annotations

from penumbra.actors.machine.coherence import BareHardware
from penumbra.actors.machine.control import Control
from penumbra.actors.machine.messages import Complete, Ran, TruePageFault
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.vmm.nested import SecondLevel
from penumbra.hw.exits import Done, PageFault
from penumbra.hw.operations import Operation, Physical

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
    ) -> None:
        super().__init__(vcpu_id, seat, observer)
        self._second_level = second_level
        self._control = control

    def page_fault(
        self, fault: PageFault, work: Operation, user: bool
    ) -> TruePageFault | Ran | None:
        if fault.gpa < 0:
            return super().page_fault(fault, work, user)
        self.note_exit("second level")
        self._second_level.back(fault.gpa)
        return None

    def physical(self, work: Physical) -> int:
        hpa = self._second_level.machine_address(work.gpa)
        ran = self._cpu.ask_nowait(Complete(work, False, 0, (hpa,)))
        assert isinstance(ran.exit, Done)
        return ran.exit.value

    def note_exit(self, reason: str) -> None:
        self._observer.exit(self._vcpu, reason)

    def privileged(self, reason: str) -> None:
        if reason in self._control.exits - _NO_EXIT:
            self._observer.exit(self._vcpu, reason)
