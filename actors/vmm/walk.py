"""The monitor's walk of a guest's tables: the machine's walker over guest-physical addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.hw import mmu_layout as m
from penumbra.hw.compiled import kernels_for
from penumbra.hw.formats import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    EFER_NXE,
    PAGE_BYTES,
    PAGE_SHIFT,
    A,
    D,
    FormatSpec,
)
from penumbra.hw.streams import WRITE

# A walk on every fault: names of this module are found faster than a module's.
_LEVEL, _PATH, _ENTRY = m.R_LEVEL, m.R_PATH, m.R_ENTRY
_IN_PAGE, _MASK64 = PAGE_BYTES - 1, (1 << 64) - 1
_ALL_RIGHTS = m.E_W | m.E_U | m.E_X
# Stands for the table whose entries the guest's CPU holds in registers.
REGISTERS = -3


@dataclass
class GuestRegisters:
    """Control registers as the guest believes they are.

    Attributes:
        top: Top-level entries, in formats whose CPUs hold them in registers.
    """

    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    top: tuple[int, ...] = ()

    @property
    def paging(self) -> bool:
        return bool(self.cr0 & CR0_PG)


def registers_flush(registers: GuestRegisters, register: int, value: int) -> bool:
    """Load CR0 or CR4; tell whether that drops every translation: PG, PSE, PAE, PGE, SMEP changed.

    Source: SDM vol. 3, 4.10.4.1; A40 ¶87.
    """
    if register == 0:
        changed = (registers.cr0 ^ value) & CR0_PG
        registers.cr0 = value
    else:
        changed = (registers.cr4 ^ value) & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP)
        registers.cr4 = value
    return bool(changed)


class Step(NamedTuple):
    """One entry a walk read: its level, guest-physical address and value.

    One read in a register lies in the table `REGISTERS`, at an address below 0.

    Attributes:
        gfn: The guest table it stands in.
        place: Its index there.
    """

    level: int
    gpa: int
    entry: int
    gfn: int
    place: int

    @classmethod
    def at(cls, level: int, gpa: int, entry: int, entry_bytes: int) -> Step:
        return cls(level, gpa, entry, gpa >> PAGE_SHIFT, (gpa & (PAGE_BYTES - 1)) // entry_bytes)


class GuestWalker:
    """Walks guest tables through the frame map; caches nothing."""

    def __init__(self, spec: FormatSpec, memory: MemoryManagement) -> None:
        self._spec = spec
        self._memory = memory
        self._reg_array = np.zeros(m.REG_WORDS, np.int64)
        self.reg = self._reg_array.data
        self.reg[m.R_MAPPED] = 1
        self.reg[m.R_FRAMES] = memory.n_guest_frames
        kernels = kernels_for(spec)
        self._resolve = kernels.functions.resolve
        self._leaf_frame = kernels.functions.leaf_frame
        ram = memory.ram
        self._args = (
            (ram.array64, ram.array32, self._reg_array, memory.frame_map)
            if kernels.compiled
            else (ram.i64, ram.u32, self.reg, memory.frame_view)
        )

    def resolve(self, at: GuestRegisters, gva: int, kind: int, user: bool) -> bool:
        """Walk from the guest's CR3, check the rights; False leaves the error code in `error`."""
        reg = self.reg
        reg[m.R_WP] = at.cr0 & CR0_WP
        reg[m.R_PSE] = at.cr4 & CR4_PSE
        reg[m.R_PGE] = at.cr4 & CR4_PGE
        reg[m.R_NXE] = at.efer & EFER_NXE
        reg[m.R_SMEP] = at.cr4 & CR4_SMEP
        root = at.cr3 & self._spec.frame_mask
        if self._spec.root_registers:
            root = REGISTERS << PAGE_SHIFT
            for i, entry in enumerate(at.top):
                reg[m.R_TOP + i] = entry - (1 << 64) if entry >> 63 else entry
        signed = gva - (1 << 64) if gva >> 63 else gva
        top = self._spec.top
        return bool(self._resolve(*self._args, signed, kind, int(user), top, root, _ALL_RIGHTS))

    def unready(self) -> int | None:
        """Return the first table of the last walk whose entries cannot be read and stored to.

        What the walk has found, or not found, then means nothing: an absent table reads as ones.
        """
        if not self._memory.n_unready:
            return None
        tables = (step.gfn for step in self.steps() if step.gpa >= 0)
        return next((gfn for gfn in tables if not self._memory.ready(gfn, True)), None)

    @property
    def error(self) -> int:
        return self.reg[m.R_FAULT_ERROR]

    @property
    def rights(self) -> int:
        """AND of the rights of all levels the last walk used: `E_W`, `E_U`, `E_X`."""
        return self.reg[m.R_RIGHTS]

    def steps(self) -> list[Step]:
        """Return the entries the last walk read, from the root down."""
        reg, n_bytes = self.reg, self._spec.entry_bytes
        steps = []
        for level in range(self._spec.top, reg[_LEVEL] - 1, -1):
            gpa = reg[_PATH + level]
            place = (gpa & _IN_PAGE) // n_bytes
            steps.append(Step(level, gpa, reg[_ENTRY + level] & _MASK64, gpa >> PAGE_SHIFT, place))
        return steps

    def frame(self, gva: int) -> int:
        """Return the guest frame the last successful walk maps `gva` to, large pages included."""
        level = self.reg[m.R_LEVEL]
        first: int = self._leaf_frame(self.reg[m.R_ENTRY + level], level)
        return first + ((gva >> PAGE_SHIFT) & ((1 << (self._spec.levels[level].shift - 12)) - 1))

    def set_accessed(self, steps: list[Step], kind: int) -> list[Step]:
        """Set A in every entry of a permitted walk and D in the leaf of a write, in guest memory.

        The steps, which are returned, say so too.

        The monitor's own stores: no trace fires and no patch is posted for them (EP10).
        """
        last = len(steps) - 1
        for at, step in enumerate(steps):
            want = step.entry | A if step.gpa >= 0 else step.entry
            if at == last and kind == WRITE:
                want |= D
            if want != step.entry:
                self._memory.store(step.gpa, self._spec.entry_bytes, want)
                steps[at] = step._replace(entry=want)
        return steps
