"""Privileged operations of a VCPU: control registers, INVLPG, interrupts, HLT, thread switches."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from penumbra.actors.machine.coherence import Coherence
from penumbra.actors.machine.observer import Observer
from penumbra.actors.observe.events import EventKind
from penumbra.hw import operations as o
from penumbra.hw.control import refused, settled
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.interrupts import InterruptController

if TYPE_CHECKING:
    from penumbra.actors.machine.vcpu import Board, VcpuActor


# By class: `isinstance` of a struct costs a call of its metaclass wherever it says no.
_PHYSICAL = frozenset(get_args(o.Physical))


class PrivilegedWork:
    """Carries out what the CPU would not: each call is one operation, done when it returns."""

    def __init__(
        self,
        vcpu: VcpuActor,
        coherence: Coherence,
        interrupts: InterruptController,
        board: Board,
        observer: Observer,
    ) -> None:
        self._vcpu = vcpu
        self._coherence = coherence
        self._interrupts = interrupts
        self._board = board
        self._observer = observer

    def do(self, work: o.Operation) -> int | GeneralProtection | None:
        """Do one privileged operation and return its value, or why the CPU refuses it."""
        vcpu, coherence = self._vcpu, self._coherence
        if type(work) is o.Invlpg:
            self._event("invlpg", EventKind.INVLPG, work.gva)
            coherence.invlpg(work.gva)
            self._tell("INVLPG", work.gva)
        elif type(work) is o.LoadControl:
            return self._load_control(work)
        elif work.__class__ in _PHYSICAL:
            assert isinstance(work, o.Physical)
            return coherence.physical(work)
        elif type(work) is o.MappingChanged:
            return coherence.mapping_changed(work)
        elif type(work) is o.ReadControl:
            coherence.privileged("read control")
            return self._read_control(work.register)
        elif type(work) is o.SetInterrupts:
            coherence.privileged("interrupt flag")
            return vcpu.set_interrupts(work.enabled)
        elif type(work) is o.TrapReturn:
            coherence.privileged("return")
            vcpu.interrupts_enabled = work.interrupts
        elif type(work) is o.SendIpi:
            coherence.privileged("ipi")
            self._board.send_ipi(vcpu.vcpu_id, work.targets, work.vector, vcpu.progress)
        elif type(work) is o.StartDma:
            coherence.privileged("disk")
            return self._called(self._board.start_dma(vcpu.vcpu_id, work, vcpu.progress))
        elif type(work) is o.FinishedDma:
            coherence.privileged("disk")
            return self._called(self._board.finished_dma(vcpu.vcpu_id))
        elif type(work) is o.ReleaseFrame:
            coherence.privileged("balloon")
            return self._called(self._board.release_frame(vcpu.vcpu_id, work.gpa))
        elif type(work) is o.ArmTimer:
            coherence.privileged("timer")
            self._interrupts.arm_timer(vcpu.progress + work.after if work.after else None)
        elif type(work) is o.SwitchThread:
            self._observer.count(vcpu.vcpu_id, "thread_switch")
            self._observer.note(vcpu.vcpu_id, EventKind.THREAD_SWITCH, 0, work.thread)
            vcpu.switch_thread(work.thread)
        elif type(work) is o.Halt:
            coherence.privileged("hlt")
            self._observer.note(vcpu.vcpu_id, EventKind.HALT)
            vcpu.halt()
        return None

    def _called(self, value: int) -> int:
        """A call of the kernel has returned: its actions are looked at."""
        self._vcpu.look_at_actions("kernel_call")
        return value

    def _event(self, name: str, kind: EventKind, gva: int = 0, arg: int = 0) -> None:
        self._coherence.privileged(name)
        self._observer.count(self._vcpu.vcpu_id, name)
        self._observer.note(self._vcpu.vcpu_id, kind, gva, arg)

    def _tell(self, what: str, value: int) -> None:
        if self._observer.taps is not None:
            self._observer.taps.event(self._vcpu.vcpu_id, what, value)

    def _load_control(self, work: o.LoadControl) -> GeneralProtection | None:
        spec = self._board.spec
        why = refused(spec, work.register, work.value)
        if why is not None:
            return why
        work = o.LoadControl(work.register, settled(spec, work.register, work.value))
        if work.register == 3:
            self._event("cr3_load", EventKind.CR3_LOAD, 0, work.value)
            why = self._coherence.load_root(work.value)
        else:
            self._event("mode_change", EventKind.MODE_CHANGE, work.register, work.value)
            why = self._coherence.load_mode(work.register, work.value)
        if why is None:
            self._tell(f"CR{work.register}", work.value)
        return why

    def _read_control(self, register: int) -> int | GeneralProtection:
        registers = self._coherence.registers
        held = {0: registers.cr0, 2: registers.cr2, 3: registers.cr3, 4: registers.cr4}
        return held.get(register, GeneralProtection(f"there is no CR{register}"))
