"""Reading the guest write buffers of a VM: who is told, and when.

At a coherency-inducing operation of any VCPU, and before any shadow table is linked, *every* CPU's
buffer is read (EG2): a correct guest shootdown has its event on another CPU than its stores. What
is found goes to the consumers from the producer of the CPU that stored, as a traced store does, so
the shadows of other VCPUs follow at events of their own (W4). Between two readings shadows
correspond to guest tables in part only (W3).

Source: GWB; W2-W4, EG1, EG2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from penumbra.actors.machine.messages import ForgetAll, LogTold, TellLogged
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.write_buffer import BufferReader, Logged
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.write_buffer import Taken

if TYPE_CHECKING:
    from penumbra.actors.machine.coherence import ProducerRef
    from penumbra.actors.machine.submm import ConsumerRef, ProducerActor


class WriteBuffers:
    """The guest write buffers of one VM as the VCPUs' drivers use them; none is nothing to do.

    Args:
        readers: One per CPU, or none at all.
        own_only: A fault: an event reads the buffer of its own CPU alone.
    """

    def __init__(
        self,
        readers: Sequence[BufferReader],
        producers: Sequence[ProducerRef],
        *,
        own_only: bool = False,
    ) -> None:
        self._readers = readers
        self._producers = producers
        self._own_only = own_only

    def tell_all(self, vcpu_id: int) -> list[int]:
        """Bring every CPU's log in, on behalf of a VCPU; return the guest tables to untrace."""
        if not self._readers:
            return []
        gone: list[int] = []
        for cpu_id in range(len(self._readers)):
            if cpu_id == vcpu_id or not self._own_only:
                gone += self.tell_one(cpu_id)
        return list(dict.fromkeys(gone))

    def tell_one(self, cpu_id: int) -> list[int]:
        """Bring one CPU's log in; return the guest tables to untrace."""
        if self.is_empty(cpu_id):
            return []
        told = self._producers[cpu_id].ask_nowait(TellLogged())
        assert isinstance(told, LogTold)
        return list(told.untrace)

    def is_empty(self, cpu_id: int) -> bool:
        """Tell whether a CPU's buffer holds nothing and has lost nothing."""
        return not self._readers or self._readers[cpu_id].is_empty


class SeatedBuffer:
    """The guest write buffer of the CPU a VCPU sits on; while it sits on none there is nothing.

    A VCPU's log is told before it gets up, so no CPU keeps records of a world that has left.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat

    @property
    def is_empty(self) -> bool:
        return not self._seat.seated or self._seat.cpu.write_buffer.is_empty

    def take(self) -> Taken:
        """Return what was logged and forget it."""
        return self._seat.cpu.write_buffer.take()


class LogTeller:
    """What one producer does with its CPU's log."""

    def __init__(
        self,
        reader: BufferReader,
        submm: SecondaryData,
        consumers: list[ConsumerRef],
        observer: Observer,
    ) -> None:
        self._reader = reader
        self._submm = submm
        self._consumers = consumers
        self._observer = observer

    def tell(self, producer: ProducerActor) -> LogTold:
        """Tell the consumers of everything logged (832-844), and empty the buffer."""
        vcpu, logged = self._submm.vcpu_id, self._reader.take()
        self._observer.count(vcpu, "log_record", len(logged.stores) + logged.n_filtered)
        self._observer.count(vcpu, "log_filtered", logged.n_filtered)
        if logged.lost:
            self._lost()
            return LogTold(())
        cause = 0
        for gpa, size in logged.stores:
            cause = self._observer.note(vcpu, EventKind.TRACED_STORE, 0, gpa, size)
        for base, offset in self._reader.entries(logged.stores):
            producer.tell_entry(base | offset, cause)
        return LogTold(self._flooded(logged))

    def _lost(self) -> None:
        """Somebody's shadow is behind in an entry nobody can name: drop them all, in time (EG1)."""
        vcpu = self._submm.vcpu_id
        self._observer.count(vcpu, "log_lost")
        owed = self._submm.stores_lost()
        for consumer, ref in enumerate(self._consumers):
            if owed >> consumer & 1:
                ref.ask_nowait(ForgetAll())

    def _flooded(self, logged: Logged) -> tuple[int, ...]:
        """Return the tables that were overwritten whole, or too often without a fill."""
        tables = [
            gpa >> PAGE_SHIFT
            for gpa, size in logged.stores
            if self._submm.flooded(gpa >> PAGE_SHIFT, size == PAGE_BYTES)
        ]
        return tuple(dict.fromkeys(tables))
