"""The monitor's reader of one CPU's guest write buffer: records in, guest entries to tell of out.

A record says where something was stored, by machine address. What is told is the entry as it is
when the reader looks: a later store of any CPU may have overtaken the record, so records of several
buffers can be read in any order (EG2). Records of frames that are no guest tables come from marks
that nobody needs (W5) and are left out.

Source: GWB; W2, W4, W5.
"""

from __future__ import annotations

from typing import NamedTuple

from penumbra.actors.vmm.buffer_faults import BufferFault
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.write_buffer import StoreLog


class Logged(NamedTuple):
    """What one reading gave.

    Attributes:
        stores: (guest-physical address, bytes) of stores to guest tables, oldest first.
        n_filtered: Records of other frames.
        lost: Stores were made that nobody knows of.
    """

    stores: list[tuple[int, int]]
    n_filtered: int = 0
    lost: bool = False


class BufferReader:
    """Reads one CPU's buffer in the terms of its guest.

    Args:
        entry_bytes: Width of a guest entry.
        tell_all: Every entry touched is told, whoever derives from it (832 left out).
    """

    def __init__(
        self,
        buffer: StoreLog,
        memory: MemoryManagement,
        traces: WriteTraces,
        entry_bytes: int,
        *,
        tell_all: bool = False,
        fault: BufferFault = BufferFault.NONE,
    ) -> None:
        self._buffer = buffer
        self._memory = memory
        self._traces = traces
        self._entry_bytes = entry_bytes
        self._tell_all = tell_all
        self._fault = fault

    @property
    def is_empty(self) -> bool:
        """True when `take` would give nothing."""
        return self._buffer.is_empty

    def take(self) -> Logged:
        """Empty the buffer; a loss makes the records that are left worthless, too."""
        records, lost = self._buffer.take()
        if self._fault & BufferFault.LOSS_IGNORED:
            lost = False
        stores = []
        for hpa, size in records:
            gfn = self._memory.guest_of.get(hpa >> PAGE_SHIFT, -1)
            if gfn in self._traces:
                stores.append((gfn << PAGE_SHIFT | hpa & (PAGE_BYTES - 1), size))
        return Logged(stores, len(records) - len(stores), lost)

    def entries(self, stores: list[tuple[int, int]]) -> list[Key]:
        """Return the entries that stores touch and somebody derives from, once each."""
        width, keys = self._entry_bytes, dict[Key, None]()
        for gpa, size in stores:
            inside = gpa & (PAGE_BYTES - 1)
            base, first, stop = gpa - inside, inside // width, -(-(inside + size) // width)
            for index in self._told(base >> PAGE_SHIFT, first, stop):
                keys[base, index * width] = None
        return list(keys)

    def _told(self, gfn: int, first: int, stop: int) -> list[int]:
        if self._tell_all:
            return list(range(first, stop))
        return self._traces.derived_from(gfn, first, stop)
