"""The task actor of the virtual disk and its DMA controller.

A transfer is carried out when it is due in guest progress, so it falls at the same place of the
guest's history under every scheme. `dma.py` says how it reaches memory.

Source: A40 ¶10, Fig. 1 (21), Fig. 5 (240).
"""

from __future__ import annotations

from collections.abc import Callable

from penumbra.actors.machine.dma import DmaPort
from penumbra.actors.machine.messages import (
    CarryOut,
    DiskOrder,
    DiskReply,
    StartTransfer,
    TakeFinished,
)
from penumbra.actors.machine.observer import Observer
from penumbra.actors.runtime import Actor
from penumbra.hw.disk import DISK_VECTOR, Disk, Transfer


class DiskActor(Actor[DiskOrder, DiskReply]):
    """Moves pages between the disk's blocks and the guest's memory.

    Args:
        memory: The guest's memory as devices reach it.
        interrupt: Queues an interrupt: CPU, due progress, vector.
    """

    def __init__(
        self,
        disk: Disk,
        memory: DmaPort,
        interrupt: Callable[[int, int, int], None],
        observer: Observer,
    ) -> None:
        self._disk = disk
        self._memory = memory
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
            self._disk.write(transfer.block, self._memory.load(transfer.gpa))
        else:
            self._memory.store(transfer.owner, transfer.gpa, self._disk.read(transfer.block))
