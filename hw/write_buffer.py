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

from typing import NamedTuple, Protocol

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


class Words(Protocol):
    """The CPU's state array, or what stands in its place in the stepper."""

    def __getitem__(self, at: int, /) -> int: ...
    def __setitem__(self, at: int, value: int, /) -> None: ...


class Taken(NamedTuple):
    """What one reading gave.

    Attributes:
        records: (physical address, bytes), oldest first.
        lost: Stores were made that left no record.
    """

    records: list[tuple[int, int]]
    lost: bool


class StoreLog(Protocol):
    """What a reader asks of a log of stores."""

    @property
    def is_empty(self) -> bool:
        """True when `take` would find neither record nor loss."""
        ...

    def take(self) -> Taken:
        """Return the records and forget those whose stores are made."""
        ...


class WriteBuffer:
    """What software sees of one CPU's buffer: a ring in the CPU's state array.

    Each word is written by one side only, so a reader need not stop the CPU, unless records
    combine: then it reads between two instructions of it.

    Invariant: `0 <= len(buffer) <= records`, and no record crosses a page.
    """

    def __init__(self, reg: Words, spec: BufferSpec) -> None:
        self._reg = reg
        self._seen_lost = 0
        self.spec = spec

    def set_up(self) -> None:
        """Tell the CPU of its buffer."""
        reg, spec = self._reg, self.spec
        reg[m.R_MARK] = MARK if spec.records else 0
        reg[m.R_LOG_SIZE] = spec.records
        reg[m.R_LOG_COMBINES], reg[m.R_LOG_LOSES] = spec.combines, spec.loses
        reg[m.R_LOG_LATE] = spec.late

    def __len__(self) -> int:
        return self._reg[m.R_LOG_HEAD] - self._reg[m.R_LOG_TAIL]

    @property
    def is_empty(self) -> bool:
        """True when `take` would find neither record nor loss."""
        return not len(self) and self._reg[m.R_LOG_LOST] == self._seen_lost

    def has_room(self, n: int) -> bool:
        """Tell whether `n` more stores would not stop the CPU."""
        free = self.spec.records - len(self) - bool(self._reg[m.R_LATCHED_BYTES])
        return self.spec.loses or n <= free

    def take(self) -> Taken:
        """Return the records and forget those whose stores are made.

        A store may be on its way, logged and not yet visible: its record is returned and stays, for
        whoever looks at memory now may see the old value (EG5).
        """
        reg = self._reg
        done, lost_done = reg[m.R_LOG_DONE], reg[m.R_LOST_DONE]  # first: both only grow
        places = [
            m.R_LOG + 2 * (i % self.spec.records)
            for i in range(reg[m.R_LOG_TAIL], reg[m.R_LOG_HEAD])
        ]
        records = [(reg[at], reg[at + 1]) for at in places]
        lost = reg[m.R_LOG_LOST] != self._seen_lost
        self._seen_lost = lost_done
        reg[m.R_LOG_TAIL] = done
        return Taken(records, lost)

    def check(self) -> None:
        reg = self._reg
        assert 0 <= len(self) <= self.spec.records
        assert reg[m.R_LOG_DONE] == reg[m.R_LOG_HEAD], "read within an instruction"
        for i in range(reg[m.R_LOG_TAIL], reg[m.R_LOG_HEAD]):
            at = m.R_LOG + 2 * (i % self.spec.records)
            assert 0 < reg[at + 1] <= 4096 - (reg[at] & 4095), f"record at {reg[at]:#x}"
