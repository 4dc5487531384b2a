"""The task actor of a VCPU: it pulls operations from its guest thread and acts on every exit.

    conductor --Grant--> VCPU --Resume--> guest thread --Issued--> VCPU --Execute--> physical CPU
                          |                                                            |
                          |<---------------------------- Ran: done, or why not --------+
                          +-- a fault or a coherency event --> `Coherence` (hardware or monitor)

The way is the same for every kind of guest and every scheme. Progress is what the guest retires; a
quantum ends between operations, and whatever a monitor does takes none.
"""

from __future__ import annotations

import enum
from typing import Protocol

from penumbra.actors.machine.actions import ActionQueue
from penumbra.actors.machine.coherence import Coherence
from penumbra.actors.machine.messages import (
    Baton,
    EnterCall,
    EnterFault,
    EnterInterrupt,
    EnterProtection,
    Execute,
    Grant,
    Issued,
    MachineChecked,
    Panicked,
    Ran,
    Resume,
    ThreadOrder,
    ThreadReply,
    TruePageFault,
)
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.privileged import PrivilegedWork
from penumbra.actors.machine.seat import Seat
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import Actor, ActorRef
from penumbra.hw import operations as o
from penumbra.hw.exits import (
    BudgetSpent,
    BufferFull,
    Done,
    GeneralProtection,
    MachineCheck,
    PageFault,
    Privileged,
    Spinning,
    SystemCall,
    TlbMiss,
)
from penumbra.hw.formats import FormatSpec
from penumbra.hw.interrupts import NEVER, InterruptController

ThreadRef = ActorRef[ThreadOrder, ThreadReply]


class Wait(enum.Enum):
    """Why a VCPU is no candidate for the baton."""

    NOTHING = "runs"
    HALTED = "halted"
    SPINNING = "spinning"
    ENDED = "ended"


class Board(Protocol):
    """What a VCPU sees of its machine."""

    @property
    def spec(self) -> FormatSpec:
        """The paging format of its CPUs."""
        ...

    def thread(self, thread_id: int) -> ThreadRef:
        """Return the actor of a guest thread."""
        ...

    def mark(self, vcpu_id: int, mark: o.Mark) -> None:
        """Tell observers what the guest says of itself."""

    def send_ipi(self, sender: int, targets: int, vector: int, progress: int) -> None:
        """Queue an interrupt at every VCPU of the bit set."""

    def start_dma(self, vcpu_id: int, dma: o.StartDma, progress: int) -> int:
        """Queue a transfer of the disk; return its ticket, 0 if refused."""
        ...

    def finished_dma(self, vcpu_id: int) -> int:
        """Return a finished ticket of this VCPU, or 0."""
        ...

    def release_frame(self, vcpu_id: int, gpa: int) -> int:
        """Take back the machine memory behind a page of the guest's; 0: there is none."""
        ...

    def devices_until(self, progress: int) -> None:
        """Let devices do what is due by this progress."""

    def spin(self, vcpu_id: int, hpa: int, gva: int) -> bool:
        """Wake this VCPU when the word at `hpa` is written; False: it has moved, spin anew."""
        ...

    def no_spin(self, vcpu_id: int) -> None:
        """The VCPU does not spin any more."""


class VcpuActor(Actor[Grant, Baton]):
    """Drives one VCPU while it holds the baton.

    Invariant: between two grants `_work` is the operation to go on with, or None if the thread has
    to be asked for the next one with `_value`.
    """

    def __init__(
        self,
        vcpu_id: int,
        thread_id: int,
        cpu: Seat,
        coherence: Coherence,
        interrupts: InterruptController,
        actions: ActionQueue,
        board: Board,
        observer: Observer,
    ) -> None:
        self.vcpu_id = vcpu_id
        self.progress = 0
        self.wait = Wait.NOTHING
        self.interrupts_enabled = False
        self._sti_shadow = False
        self._thread_id = thread_id
        self._thread: ThreadRef | None = None
        self._cpu = cpu
        self._coherence = coherence
        self._interrupts = interrupts
        self._actions = actions
        self._board = board
        self._observer = observer
        self._privileged = PrivilegedWork(self, coherence, interrupts, board, observer)
        self._work: o.Operation | None = None
        self._at = 0
        self._user = False
        self._value: int | None = None
        self._ended = ""

    # ---- what the conductor asks ----------------------------------------------------------------

    def key(self) -> int | None:
        """Return the progress at which this VCPU can go on, or None if nothing can make it."""
        if self.wait is Wait.NOTHING:
            return self.progress
        if self.wait is Wait.ENDED:
            return None
        due = self._next_due() if self.interrupts_enabled else NEVER
        return None if due >= NEVER else max(self.progress, due)

    def _next_due(self) -> int:
        return min(self._interrupts.next_due, self._actions.next_due)

    def look_at_actions(self, where: str) -> None:
        """Do what the kernel has asked for by now. Source: A40 ¶49-50."""
        taken = self._actions.take(self.progress)
        for action in taken:
            self._interrupts.post(action.due, action.vector)
        if taken:
            self._observer.count(self.vcpu_id, f"actions_{where}", len(taken))

    def word_written(self, progress: int) -> None:
        """The word this VCPU spins on was written by somebody at this progress."""
        if self.wait is Wait.SPINNING:
            self._resume(max(self.progress, progress))

    def _resume(self, progress: int) -> None:
        if self.wait is Wait.SPINNING:
            self._board.no_spin(self.vcpu_id)
        self.wait = Wait.NOTHING
        self._advance(progress)

    def receive(self, message: Grant) -> Baton:
        """Run until progress `limit`, or until there is nothing to do or the machine has to end."""
        if self.wait is not Wait.NOTHING:
            halted = self.wait is Wait.HALTED
            self._resume(max(self.progress, message.since))
            self.look_at_actions("resume")
            if halted:
                self._interrupt(None)
        while self.wait is Wait.NOTHING and self.progress < message.limit:
            if self._actions.next_due <= self.progress:
                self.look_at_actions("resume")
            self._take_interrupt()
            if self._work is None and not self._fetch(Resume(self._value)):
                break
            self._step(message.limit)
        return Baton(self.progress, self._ended)

    def _advance(self, progress: int) -> None:
        self.progress = progress
        self._observer.progress[self.vcpu_id] = progress

    # ---- the thread -----------------------------------------------------------------------------

    def switch_thread(self, thread_id: int) -> None:
        """Go on with another guest thread; it is asked for its next operation."""
        self._thread_id = thread_id
        self._thread = None

    def _fetch(self, order: ThreadOrder) -> bool:
        """Ask the thread for its next operation; False ends the machine."""
        if self._thread is None:
            self._thread = self._board.thread(self._thread_id)
        reply = self._thread.ask_nowait(order)
        if type(reply) is not Issued:
            assert isinstance(reply, Panicked)
            self._end(f"guest kernel panic: {reply.reason}")
            return False
        if reply.user != self._user:
            self._coherence.privilege(reply.user)
        self._work, self._user = reply.work, reply.user
        self._at, self._value = 0, None
        return True

    def _end(self, reason: str) -> None:
        self.wait = Wait.ENDED
        self._ended = reason

    def _rest(self) -> o.Operation:
        """Return what is left of the current operation, to be issued again after a trap."""
        work, at = self._work, self._at
        assert work is not None
        if isinstance(work, o.Block) and at > work.start:
            return o.Block(work.stream, at, work.stop)
        if isinstance(work, o.Fill) and at:
            return o.Fill(work.gva + at, work.n_bytes - at, work.value)
        if isinstance(work, o.Copy) and at:
            return o.Copy(work.dst + at, work.src + at, work.n_bytes - at)
        return work

    def _enter(self, order: ThreadOrder) -> None:
        """Trap into the kernel: interrupts are off until it says otherwise."""
        self.interrupts_enabled = False
        self._fetch(order)

    def _take_interrupt(self) -> None:
        if self._sti_shadow:
            self._sti_shadow = False
            return
        if not self.interrupts_enabled or self._interrupts.next_due > self.progress:
            return
        # The thread's next operation first: its awaits must each get the value of their own.
        if self._work is None and not self._fetch(Resume(self._value)):
            return
        self._interrupt(self._rest())

    def _interrupt(self, retry: o.Operation | None) -> None:
        """Deliver the first interrupt that is due; `retry` is what it came before."""
        vector = self._interrupts.take(self.progress)
        assert vector is not None
        # A transfer younger than the quantum is due before its interrupt is taken.
        self._board.devices_until(self.progress)
        self._coherence.note_exit("interrupt")
        self._observer.count(self.vcpu_id, "interrupt")
        self._observer.note(self.vcpu_id, EventKind.INTERRUPT, 0, vector)
        self._enter(EnterInterrupt(self.vcpu_id, vector, retry, True))

    # ---- one operation --------------------------------------------------------------------------

    def _step(self, limit: int) -> None:
        work = self._work
        if work is None or self.wait is not Wait.NOTHING:
            return
        due = self._actions.next_due  # a check-action IPI stops the guest, masked or not
        if self.interrupts_enabled:
            due = min(due, self._interrupts.next_due)
        stop = min(limit, max(due, self.progress + 1))
        ran = self._cpu.ask_nowait(Execute(work, self._user, self._at, stop - self.progress))
        self._take(ran)

    def _take(self, ran: Ran) -> None:
        """Act on what became of the current operation."""
        if ran.spent:
            self._advance(self.progress + ran.spent)
            if not self._user:
                self._coherence.ran_supervisor(ran.spent)
        stop, work = ran.exit, self._work
        assert work is not None
        # The frequent ones first and by class: `isinstance` of a struct is dear where it says no.
        if type(stop) is Done:
            if type(work) is o.Mark:
                self._board.mark(self.vcpu_id, work)
            self._value, self._work = stop.value, None
        elif type(stop) is PageFault:
            self._at = ran.at
            self._answer(self._coherence.page_fault(stop, work, self._user))
        elif type(stop) is Privileged:
            value = self._privileged.do(work)
            if type(value) is GeneralProtection:
                self._protection(value, work)
            else:
                assert value is None or isinstance(value, int)
                self._value, self._work = value, None
        elif isinstance(stop, TlbMiss):
            self._at = ran.at
            self._answer(self._coherence.tlb_miss(stop, work, self._user))
        elif isinstance(stop, BufferFull):
            self._at = ran.at
            self._answer(self._coherence.buffer_full(work, self._user, ran.at))
        elif isinstance(stop, BudgetSpent):
            self._at = ran.at
        elif isinstance(stop, SystemCall):
            self._system_call(work)
        elif isinstance(stop, Spinning):
            assert isinstance(work, o.SpinUntil)
            if self._board.spin(self.vcpu_id, stop.hpa, work.gva):
                self.wait = Wait.SPINNING
        elif isinstance(stop, MachineCheck):
            # No guest here sets CR4.MCE: its CPU shuts down (SDM vol. 3, 16.7).
            self._end(f"machine check at {stop.gva:#x}: no memory at {stop.hpa:#x}")
        else:
            assert isinstance(stop, GeneralProtection)
            self._protection(stop, work)

    def _protection(self, stop: GeneralProtection, work: o.Operation) -> None:
        self._enter(EnterProtection(self.vcpu_id, stop.reason, work, self.interrupts_enabled))

    def _answer(self, answer: TruePageFault | MachineChecked | Ran | None) -> None:
        """Do as a fault or a miss is answered: deliver it, take progress, or (None) run again."""
        if isinstance(answer, Ran):
            self._take(answer)
        elif isinstance(answer, MachineChecked):
            self._end(f"machine check at {answer.gva:#x}: no memory at {answer.gpa:#x}")
        elif answer is not None:
            self._deliver(answer)

    def _deliver(self, fault: TruePageFault) -> None:
        vcpu = self.vcpu_id
        self._coherence.deliver(fault.gva)
        self._observer.count(vcpu, "guest_fault")
        self._observer.note(vcpu, EventKind.GUEST_FAULT, fault.gva, fault.error)
        if self._observer.taps is not None:
            self._observer.taps.fault(vcpu, fault.gva, fault.error, self._user)
        self._enter(EnterFault(vcpu, fault.gva, fault.error, self._rest(), self.interrupts_enabled))

    def _system_call(self, work: o.Operation) -> None:
        assert isinstance(work, o.Syscall)
        self._coherence.privileged("syscall")
        self._observer.count(self.vcpu_id, "syscall")
        self._observer.note(self.vcpu_id, EventKind.SYSCALL)
        self._enter(EnterCall(self.vcpu_id, work.name, work.args, self.interrupts_enabled))

    def halt(self) -> None:
        """HLT: wait for an interrupt; with interrupts disabled nothing wakes this VCPU again."""
        self.wait = Wait.HALTED

    def set_interrupts(self, enabled: bool) -> int:
        """STI or CLI; STI takes effect after the next operation."""
        before = int(self.interrupts_enabled)
        self._sti_shadow = enabled and not before
        self.interrupts_enabled = enabled
        return before
