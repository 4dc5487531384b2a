"""A guest's memory and an oracle that watches it, for the tests of this folder."""

from __future__ import annotations

import numpy as np

from penumbra.actors.check import Oracle

P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
LINK = P | W | U | A
USED = P | W | U | A | D
PAGING, WP = 1 << 31 | 1, 1 << 16
PSE, PGE, PAE = 1 << 4, 1 << 7, 1 << 5
NXE = 1 << 11

READ, WRITE, FETCH = 0, 1, 2


class Rig:
    """RAM whose guest frame g lies in machine frame g ^ 1; stores to flagged frames are reported.

    `hardware` changes RAM as a walker does: unreported.
    """

    def __init__(self, format_name: str, n_vcpus: int = 1, n_frames: int = 64) -> None:
        self.width = 4 if format_name == "ia32" else 8
        self.ram = bytearray(n_frames << 12)
        self.flags = np.zeros(n_frames, np.uint8)
        self.oracle = Oracle(format_name, n_vcpus, memoryview(self.ram), self.flags)
        self.n_frames = n_frames
        for gfn in range(n_frames):
            self.oracle.grant(gfn, self.pfn(gfn))

    def pfn(self, gfn: int) -> int:
        """Return the machine frame of a guest frame."""
        return gfn ^ 1

    def hpa(self, gpa: int) -> int:
        """Return the host-physical address of a guest-physical one."""
        return self.pfn(gpa >> 12) << 12 | gpa & 0xFFF

    def peek(self, gpa: int, size: int | None = None) -> int:
        """Read RAM; where there is none, ones."""
        at, size = self.hpa(gpa), size or self.width
        return int.from_bytes(self.ram[at : at + size].ljust(size, b"\xff"), "little")

    def hardware(self, gpa: int, value: int, size: int | None = None) -> None:
        """Change RAM unreported."""
        at, size = self.hpa(gpa), size or self.width
        self.ram[at : at + size] = value.to_bytes(size, "little")

    def store(self, gpa: int, value: int, size: int | None = None) -> None:
        """Let the guest store to a guest-physical address."""
        size = size or self.width
        old = self.peek(gpa, size)
        self.hardware(gpa, value, size)
        if self.flags[self.pfn(gpa >> 12)]:
            self.oracle.store(self.hpa(gpa), size, old, value)

    def start(self, cr3: int, cr4: int = PSE, cr0: int = PAGING | WP, efer: int = 0) -> None:
        """Tell the registers of all VCPUs."""
        for vcpu in range(len(self.oracle._windows)):
            self.oracle.registers(vcpu, cr0, cr3, cr4, efer)

    def uses(
        self, gva: int, gfn: int, kind: int = READ, *, user: bool = True, vcpu: int = 0
    ) -> str:
        """Report an access by a guest frame's machine frame; return how the oracle took it."""
        before = self.oracle.verdict()
        self.oracle.used(vcpu, gva, kind, user, self.pfn(gfn))
        return self._taken(before)

    def faults(self, gva: int, error: int, *, user: bool = True, vcpu: int = 0) -> str:
        """Report a delivered fault; return how the oracle took it."""
        before = self.oracle.verdict()
        self.oracle.fault(vcpu, gva, error, user)
        self.oracle.check()
        after = self.oracle.verdict()
        if after.n_violations > before.n_violations:
            return "wrong"
        return "spurious" if after.n_spurious > before.n_spurious else "true"

    def _taken(self, before: object) -> str:
        after = self.oracle.verdict()
        changes = [
            name
            for name, field in (
                ("fresh", "n_fresh"),
                ("stale", "n_stale"),
                ("wrong", "n_violations"),
            )
            if getattr(after, field) > getattr(before, field)
        ]
        assert len(changes) == 1
        return changes[0]
