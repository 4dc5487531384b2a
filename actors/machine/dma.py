"""How a device reaches a VM's memory: by GPPN -> PPN, past every MMU.

What is written to a frame that is traced goes through the producer of the VCPU that had the device
started, entry by entry, as any store to a guest table does; what is written to a frame an observer
watches is reported there.

Source: A40 ¶10, Fig. 1 (21), Fig. 5 (350).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penumbra.actors.machine.coherence import ProducerRef
from penumbra.actors.machine.frames import FramesOf
from penumbra.actors.machine.messages import DeviceStore
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT

_ONES = b"\xff" * PAGE_BYTES
_WORD = 8


class DmaPort:
    """Whole pages of guest memory, to be read and written by devices.

    Args:
        store: Stores to machine memory and tells whoever flagged the frame: hpa, bytes, value.
        producers: By VCPU, who makes its stores to traced tables; empty without a monitor.
        traces: The tables that are traced; None: nobody is to hear of stores of devices.
    """

    def __init__(
        self,
        memory: MemoryManagement,
        store: Callable[[int, int, int], None],
        producers: Sequence[ProducerRef],
        traces: WriteTraces | None,
        frames: FramesOf,
    ) -> None:
        self._memory = memory
        self._store_word = store
        self._producers = producers
        self._traces = traces
        self._frames = frames

    def load(self, gpa: int) -> bytes:
        """Return a page; ones where there is no RAM."""
        hpa = self._memory.hpa(gpa)
        if hpa is None:
            return self._memory.page(gpa >> PAGE_SHIFT) or _ONES
        return bytes(self._memory.ram.bytes[hpa : hpa + PAGE_BYTES])

    def store(self, owner: int, gpa: int, data: bytes) -> None:
        """Write a page on behalf of a VCPU; nothing happens where there is no RAM."""
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
