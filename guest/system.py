"""What a machine asks of a guest, be it an operating system or a few instructions.

`penumbra.guest.kernel.Kernel` is the general one, `penumbra.guest.litmus.LitmusGuest` the smallest.
A guest's threads are driven by whoever runs the machine; every trap enters by one of the doors
below, whose coroutine runs in supervisor mode with interrupts disabled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from penumbra.guest.kernel.boot import BootMemory, BootState
from penumbra.guest.threads import GuestCoroutine, GuestThread


class LoaderMemory(BootMemory, Protocol):
    """Guest-physical memory before the first instruction, all zero at first."""

    def write_bytes(self, gpa: int, data: bytes) -> None:
        """Write within one page."""


class GuestSystem(Protocol):
    """One guest, from its first memory image to its end."""

    @property
    def n_frames(self) -> int:
        """Frames of guest-physical memory, from 0."""
        ...

    @property
    def backed(self) -> Sequence[int] | None:
        """Those of them that are RAM, ascending; None: all."""
        ...

    @property
    def threads(self) -> Mapping[int, GuestThread]:
        """Every live thread by id."""
        ...

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, if no VCPU can run."""
        ...

    def boot(self, memory: LoaderMemory) -> BootState:
        """Write what must be in memory and say where VCPUs start."""
        ...

    def page_fault(self, vcpu_id: int, thread_id: int, gva: int, error: int) -> GuestCoroutine:
        """Handle a page fault at byte address `gva` with the hardware's error code."""
        ...

    def protection_fault(self, vcpu_id: int, thread_id: int, what: str) -> GuestCoroutine:
        """Handle a general-protection fault."""
        ...

    def syscall(
        self, vcpu_id: int, thread_id: int, name: str, args: tuple[int, ...]
    ) -> GuestCoroutine:
        """Serve a system call; the coroutine's value is the program's."""
        ...

    def interrupt(self, vcpu_id: int, thread_id: int, vector: int) -> GuestCoroutine:
        """Serve an interrupt."""
        ...

    def on_disk(self, entry: int) -> tuple[bool, int] | None:
        """Return where the page of a not-present entry is: (in memory, frame or block), or None."""
        ...

    def close(self) -> None:
        """End every coroutine; the guest cannot run any more."""

    def check(self) -> None:
        """Assert the invariants of the guest's parts, between two operations."""
