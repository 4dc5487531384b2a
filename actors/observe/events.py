"""What happened in a run, as columns: one row per event, in the order of virtual time.

A row is kept as seven 64-bit words in one array, because that is the cheapest append there is and a
run of a fork storm has millions of rows; `columns()` spreads them once, at the end.
"""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Columns = dict[str, npt.NDArray[Any]]


class EventKind(IntEnum):
    """Numbers of the `kind` column; they stand in files, so new ones go to the end.

    Where nothing else is said, `gva` is the address concerned, `arg0` and `arg1` are the kind's
    own, and `cause` is the `seq` of the event that led to this one, 0 for none.

    The roles of a change (A40 ¶76): its TRACED_STORE is on the VCPU of its producer; the
    PATCH_POSTED it causes, one for each entry, has the entry's address in `arg0` and in `arg1` the
    bit set of the consumers told, coalesced or not; a SHOOTDOWN is on the VCPU of a consumer.
    """

    GUEST_FAULT = 1
    HIDDEN_FAULT = 2
    TRACED_STORE = 3
    EMULATED_STORE = 4
    PATCH_POSTED = 5
    PATCH_COALESCED = 6
    PATCH_OVERFLOW = 7
    PATCH_APPLIED = 8
    SHOOTDOWN = 9
    TRACE_PLACED = 10
    TRACE_REMOVED = 11
    WRITE_REVOKED = 12
    TABLE_DROPPED = 13
    CR3_LOAD = 14
    INVLPG = 15
    MODE_CHANGE = 16
    IPI_SENT = 17
    INTERRUPT = 18
    SYSCALL = 19
    THREAD_SWITCH = 20
    PROCESS_START = 21
    PROCESS_EXIT = 22
    HALT = 23
    MARK = 24
    VM_END = 25
    WORLD_SWITCH = 26
    FRAME_IN = 27
    FRAME_OUT = 28
    FRAME_MOVED = 29
    FRAME_SHARED = 30
    DEVICE_ACCESS = 31


COLUMNS: Final[dict[str, str]] = {
    "seq": "<u8",
    "progress": "<u8",
    "cost": "<u8",
    "vm": "|u1",
    "vcpu": "<u2",
    "cpu": "<u2",
    "kind": "|u1",
    "gva": "<u8",
    "arg0": "<u8",
    "arg1": "<u8",
    "cause": "<u8",
}
"""Names of the columns in file order, with their little-endian dtypes."""

_WORDS = 7
_VM_SHIFT, _VCPU_SHIFT, _CPU_SHIFT = 8, 16, 32


class EventLog:
    """The events of one machine, appended as they happen.

    Invariant: rows are whole, and the row of event `seq` is number `seq - 1`.
    """

    def __init__(self) -> None:
        self._words = array("Q")
        self._extend = self._words.extend
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(
        self,
        progress: int,
        cost: int,
        vm: int,
        vcpu: int,
        cpu: int,
        kind: int,
        gva: int = 0,
        arg0: int = 0,
        arg1: int = 0,
        cause: int = 0,
    ) -> int:
        """Append one event and return its `seq`: 1, 2, 3, ...

        Args:
            vm: Below 256; `vcpu` and `cpu` below 65536, `kind` of `EventKind`. Not checked: this
                is the hot path. The other values are unsigned 64-bit.

        Raises:
            OverflowError: A value is negative or too large; the log is not to be used afterwards.
        """
        where = kind | vm << _VM_SHIFT | vcpu << _VCPU_SHIFT | cpu << _CPU_SHIFT
        self._extend((progress, cost, where, gva, arg0, arg1, cause))
        self._n = seq = self._n + 1
        return seq

    def columns(self) -> Columns:
        """Return every column by name, in the order and with the dtypes of `COLUMNS`."""
        rows = np.frombuffer(self._words.tobytes(), dtype=np.uint64).reshape(-1, _WORDS)
        where = rows[:, 2]
        raw: dict[str, npt.NDArray[np.uint64]] = {
            "seq": np.arange(1, len(rows) + 1, dtype=np.uint64),
            "progress": rows[:, 0],
            "cost": rows[:, 1],
            "vm": where >> np.uint64(_VM_SHIFT) & np.uint64(0xFF),
            "vcpu": where >> np.uint64(_VCPU_SHIFT) & np.uint64(0xFFFF),
            "cpu": where >> np.uint64(_CPU_SHIFT) & np.uint64(0xFFFF),
            "kind": where & np.uint64(0xFF),
            "gva": rows[:, 3],
            "arg0": rows[:, 4],
            "arg1": rows[:, 5],
            "cause": rows[:, 6],
        }
        return {name: raw[name].astype(dtype) for name, dtype in COLUMNS.items()}

    def check(self) -> None:
        assert len(self._words) == _WORDS * self._n
