"""The task actor of the virtual disk and its DMA controller.

A transfer is carried out when it is due in guest progress, so it falls at the same place of the
guest's history under every scheme. It reaches memory by GPPN -> PPN, past every MMU. What it writes
to a frame that is traced goes through the producer of the VCPU that started it, entry by entry, as
any store to a guest table does; what it writes to a frame an observer watches is reported there.

Source: A40 ¶10, Fig. 1 (21), Fig. 5 (240, 350).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penumbra.actors.machine.coherence import ProducerRef
from penumbra.actors.machine.frames import FramesOf
from penumbra.actors.machine.messages import (
    CarryOut,
    DeviceStore,
    DiskOrder,
    DiskReply,
    StartTransfer,
    TakeFinished,
)
from penumbra.actors.machine.observer import Observer
from penumbra.actors.runtime import Actor
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.hw.disk import DISK_VECTOR, Disk, Transfer
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT

_ONES = b"\xff" * PAGE_BYTES
_WORD = 8


class DiskActor(Actor[DiskOrder, DiskReply]):
    """Moves pages between the disk's blocks and the guest's memory.

    Args:
        store: Stores to machine memory and tells whoever flagged the frame: hpa, bytes, value.
        producers: By VCPU, who makes its stores to traced tables; empty without a monitor.
        interrupt: Queues an interrupt: CPU, due progress, vector.
    """

    def __init__(
        self,
        disk: Disk,
        memory: MemoryManagement,
        store: Callable[[int, int, int], None],
        producers: Sequence[ProducerRef],
        traces: WriteTraces | None,
        interrupt: Callable[[int, int, int], None],
        observer: Observer,
        frames: FramesOf,
    ) -> None:
        self._disk = disk
        self._frames = frames
        self._memory = memory
        self._store_word = store
        self._producers = producers
        self._traces = traces
        self._interrupt = interrupt
        self._observer = observer

    def receive(self, message: DiskOrder) -> DiskReply:
        """Start a transfer, hand back a ticket, or carry out all that is due."""
        disk = self._disk
        if isinstance(message, StartTransfer):
            transfer = disk.start(
                message.vcpu_id, message.block, message.gpa, message.to_disk, message.progress
            )
            if transfer is None:
                return DiskReply(0)
            self._interrupt(message.vcpu_id, transfer.due, DISK_VECTOR)
            return DiskReply(transfer.ticket)
        if isinstance(message, TakeFinished):
            return DiskReply(disk.take_finished(message.vcpu_id))
        assert isinstance(message, CarryOut)
        while (transfer := disk.take_due(message.progress)) is not None:
            self._move(transfer)
        return DiskReply(disk.next_due)

    def _move(self, transfer: Transfer) -> None:
        self._observer.count(transfer.owner, "dma")
        if transfer.to_disk:
            self._disk.write(transfer.block, self._load(transfer.gpa))
        else:
            self._store(transfer.owner, transfer.gpa, self._disk.read(transfer.block))

    def _load(self, gpa: int) -> bytes:
        hpa = self._memory.hpa(gpa)
        if hpa is None:
            return self._memory.page(gpa >> PAGE_SHIFT) or _ONES
        return bytes(self._memory.ram.bytes[hpa : hpa + PAGE_BYTES])

    def _store(self, owner: int, gpa: int, data: bytes) -> None:
        self._frames.want(gpa >> PAGE_SHIFT, True)
        hpa = self._memory.hpa(gpa)
        if hpa is None:
            return
        ram = self._memory.ram
        if self._traces is not None and gpa >> PAGE_SHIFT in self._traces:
            self._producers[owner].ask_nowait(DeviceStore(gpa, data))
        elif ram.flags[hpa >> PAGE_SHIFT]:
            for at in range(0, PAGE_BYTES, _WORD):
                word = int.from_bytes(data[at : at + _WORD], "little")
                self._store_word(hpa + at, _WORD, word)
        else:
            ram.bytes[hpa : hpa + PAGE_BYTES] = data
