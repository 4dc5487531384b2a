"""Why an engine stopped: one closed union of values, common to all guests and formats.

A privileged operation always exits: whoever runs the CPU decides whether the hardware does it
(native) or a monitor emulates it first. Architectural outcomes are values here, never exceptions.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Done(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """The operation completed; `value` is what the guest reads (0 if nothing)."""

    value: int = 0


class PageFault(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """The MMU refused an access of `kind` (0 read, 1 write, 2 fetch) at byte address `gva`.

    `at` is where a restartable operation stopped: run index of a block, byte of a fill or copy.
    With nested paging it may be no fault of the guest's: `gpa` is then the guest-physical page that
    the second level does not map, or not for writing; -1 otherwise.
    """

    gva: int
    error: int
    at: int = 0
    kind: int = 0
    gpa: int = -1


class GeneralProtection(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """#GP: a privileged operation in user mode, a non-canonical address, a bad register value."""

    reason: str


class Privileged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """INVLPG, CR load, IPI, HLT, timer, interrupt flag, thread switch: left to who runs the CPU."""


class SystemCall(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """A user program asked its kernel for something."""


class BudgetSpent(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """The limit of progress was reached inside a block; resume at run `at`."""

    at: int


class Spinning(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """A `SpinUntil` found its condition unmet; the word is at host-physical `hpa`."""

    hpa: int


class TlbMiss(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """A TLB that software manages cannot answer an access of `kind` at byte address `gva`.

    Software writes an entry or delivers a fault, and the access is made again, from `at` on.

    Attributes:
        missing: Whether there is no entry (`MISS_NONE` of `mmu_layout`), one not marked dirty for a
            write (`MISS_CLEAN`), or one with too few rights (`MISS_RIGHTS`).

    Source: A40 [0013], [0018].
    """

    gva: int
    missing: int
    at: int = 0
    kind: int = 0


class MachineCheck(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """An access to a machine address where there is no memory, where that is no read of ones.

    An abort: a block has executed some of its runs after the one at fault.
    """

    gva: int
    hpa: int


class BufferFull(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """The guest write buffer has no room for the next store, which was not made.

    `at` is where a restartable operation stopped: run index of a block, byte of a fill or copy.
    Source: GWB.
    """

    at: int = 0


Exit: TypeAlias = (
    Done
    | PageFault
    | GeneralProtection
    | Privileged
    | SystemCall
    | BudgetSpent
    | Spinning
    | TlbMiss
    | MachineCheck
    | BufferFull
)
