"""Who maps guest frames to machine frames, and what everyone does when one is about to move.

Under shadow tables it is every consumer of the VM, under nested paging its one second-level table.
Stores that only a guest write buffer knows of are told before a frame moves: records name machine
frames.

Source: A40 Fig. 5 (350), ¶43, ¶100; GWB; SDM vol. 3, 29.4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penumbra.actors.machine.logged import WriteBuffers
from penumbra.actors.machine.messages import DropTable, ForgetFrame, Invalidate
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.machine.submm import ConsumerRef
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.nested import SecondLevel
from penumbra.actors.vmm.traces import WriteTraces


def give_trace_up(
    gfn: int,
    consumers: Sequence[ConsumerRef],
    traces: WriteTraces,
    observer: Observer,
    vcpu_id: int,
) -> None:
    """Trace a guest table no more, at a VCPU's expense: first all that is derived from it goes."""
    for consumer in consumers:
        consumer.ask_nowait(DropTable(gfn))
    traces.remove(gfn)
    observer.count(vcpu_id, "trace_removed")
    observer.note(vcpu_id, EventKind.TRACE_REMOVED, 0, gfn)


class Mappings(Protocol):
    """All that maps the guest frames of one VM. Each change is in force on return, on every CPU."""

    def forget(self, gfn: int) -> None:
        """Map a guest frame nowhere: its machine frame is about to be another, none, or shared."""

    def untrace(self, gfn: int) -> None:
        """Forget what is derived from a guest table, if anything is: it is about to be absent."""


class NoMappings:
    """Nothing is mapped yet: the guest is being loaded."""

    def forget(self, gfn: int) -> None:
        pass

    def untrace(self, gfn: int) -> None:
        pass


class ShadowMappings:
    """Shadow tables of whatever kind, by the consumers that keep them.

    Args:
        running: Says which VCPU has to pay.
    """

    def __init__(
        self,
        consumers: Sequence[ConsumerRef],
        traces: WriteTraces,
        buffers: WriteBuffers,
        observer: Observer,
        running: Callable[[], int],
    ) -> None:
        self._consumers = consumers
        self._traces = traces
        self._buffers = buffers
        self._observer = observer
        self._running = running

    def forget(self, gfn: int) -> None:
        self._tell_logged()
        for consumer in self._consumers:
            consumer.ask_nowait(ForgetFrame(gfn))
        self._traces.frame_moved()

    def untrace(self, gfn: int) -> None:
        self._tell_logged()
        if self._traces.is_table(gfn):
            give_trace_up(gfn, self._consumers, self._traces, self._observer, self._running())

    def _tell_logged(self) -> None:
        for gfn in self._buffers.tell_all(self._running()):
            self.untrace(gfn)


class SecondLevelMappings:
    """The second-level table, and the combined translations that the CPUs cache of it.

    Args:
        running: Says which VCPU has to pay.
    """

    def __init__(
        self,
        second_level: SecondLevel,
        seats: Sequence[Seat],
        observer: Observer,
        running: Callable[[], int],
    ) -> None:
        self._second_level = second_level
        self._seats = seats
        self._observer = observer
        self._running = running

    def forget(self, gfn: int) -> None:
        if self._second_level.entry(gfn):
            self._second_level.forget(gfn)
            self._flush()

    def untrace(self, gfn: int) -> None:
        pass

    def _flush(self) -> None:
        """Let every CPU drop what it has combined: nobody knows which addresses lead there."""
        running = self._running()
        for vcpu_id, seat in enumerate(self._seats):
            self._observer.count(vcpu_id, "tlb_flush")
            if vcpu_id != running:
                self._observer.count(running, "ipi")
            seat.ask_nowait(Invalidate((), everything=True))
