"""The guest write buffer: a finite log of one CPU's stores through marked entries.

A leaf entry with the bit `MARK` is *marked*: software-available to any other processor, this one
copies it into the TLB entry and, at each store through it, puts a record (physical address, bytes)
into the buffer before the store is made. So a record is there no later than the store is visible.
A store to an entry without the mark costs nothing. Where a record would not fit the CPU stops
before the store (`BufferFull`), or, if it was told to, makes the store and notes that it lost one.

A record holds no value: it may have been overtaken by a later store, of this CPU or another, so its
reader looks at memory. What a walk stores (A, D) is no store of the guest and is not logged; what
others store into the CPU's memory (DMA, a monitor) does not pass it.

Source: GWB.
"""

from __future__ import annotations

from typing import NamedTuple

from penumbra.hw import mmu_layout as m

MARK = 1 << 9  # of a leaf entry: ignored by the MMU of every format here, kept for software


class BufferSpec(NamedTuple):
    """What a CPU's buffer is.

    Attributes:
        records: How many it holds; 0: the CPU has none and no entry is marked.
        combines: A store next to, or inside, the last record's becomes part of it.
        loses: When it is full it notes a loss and goes on, instead of stopping.
        late: A fault: each record comes with the CPU's next operation, after its store is visible.
    """

    records: int = 0
    combines: bool = True
    loses: bool = False
    late: bool = False


NO_BUFFER = BufferSpec()


class WriteBuffer:
    """What software sees of one CPU's buffer.

    Invariant: `0 <= len(buffer) <= records`, and no record crosses a page.
    """

    def __init__(self, reg: memoryview, spec: BufferSpec) -> None:
        self._reg = reg
        self.spec = spec
        reg[m.R_MARK] = MARK if spec.records else 0
        reg[m.R_LOG_SIZE] = spec.records
        reg[m.R_LOG_COMBINES], reg[m.R_LOG_LOSES] = spec.combines, spec.loses
        reg[m.R_LOG_LATE] = spec.late

    def __len__(self) -> int:
        return int(self._reg[m.R_LOGGED])

    @property
    def has_lost(self) -> bool:
        """Whether a store was made without a record since the last `take`."""
        return bool(self._reg[m.R_LOG_LOST])

    def has_room(self, n: int) -> bool:
        """Tell whether `n` more stores would not stop the CPU."""
        reg = self._reg
        free = reg[m.R_LOG_SIZE] - reg[m.R_LOGGED] - bool(reg[m.R_LATCHED_BYTES])
        return bool(reg[m.R_LOG_LOSES] or n <= free)

    def take(self) -> list[tuple[int, int]]:
        """Return the records, oldest first, as (physical address, bytes), and forget them."""
        reg, n = self._reg, len(self)
        words = reg[m.R_LOG : m.R_LOG + 2 * n].tolist()
        reg[m.R_LOGGED] = reg[m.R_LOG_LOST] = 0
        return list(zip(words[::2], words[1::2], strict=True))

    def check(self) -> None:
        assert 0 <= len(self) <= self.spec.records
        reg = self._reg
        for at in range(m.R_LOG, m.R_LOG + 2 * len(self), 2):
            assert 0 < reg[at + 1] <= 4096 - (reg[at] & 4095), f"record at {reg[at]:#x}"
