"""What is in guest memory before the first instruction: the kernel's window and its root.

Everything here runs before there is a CPU, so it writes guest-physical memory directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from penumbra.guest.kernel.frames import TablePool
from penumbra.guest.kernel.layout import Layout
from penumbra.hw.formats import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    EFER_NXE,
    NX,
    PAGE_BYTES,
    PAGE_SHIFT,
    A,
    D,
    FormatSpec,
    G,
    P,
    W,
)

EFER_LME, EFER_LMA = 1 << 8, 1 << 10


class BootMemory(Protocol):
    """Guest-physical memory as the boot loader sees it; all zero at first."""

    def write(self, gpa: int, size: int, value: int) -> None: ...


@dataclass(frozen=True)
class StartRegisters:
    """Control registers of one VCPU at its start."""

    cr0: int
    cr3: int
    cr4: int
    efer: int = 0


@dataclass(frozen=True)
class BootState:
    """What the machine starts with.

    Attributes:
        registers: One per VCPU.
        idle_threads: Thread id per VCPU; each VCPU starts in it with interrupts disabled.
    """

    registers: tuple[StartRegisters, ...]
    idle_threads: tuple[int, ...]


def control_registers(spec: FormatSpec) -> tuple[int, int, int]:
    """Return CR0, CR4 and EFER: paging with WP, global and large pages, NX where there is one."""
    cr0 = CR0_PE | CR0_PG | CR0_WP
    if spec.has_nx:
        long_mode = EFER_LME | EFER_LMA if spec.sign_extended else 0
        return cr0, CR4_PAE | CR4_PGE, EFER_NXE | long_mode
    return cr0, CR4_PGE | (CR4_PSE if spec.large_needs_pse else 0), 0


class KernelWindow:
    """The kernel's root and the tables of its window, composed here and written at boot.

    Attributes:
        root_gpa: The kernel's own root: the window and nothing else.
        root_entries: By index, what every other root copies; never changed after.
        slots_table_gva: Kernel address of the leaf table that maps the temporary slots.
    """

    def __init__(
        self, spec: FormatSpec, layout: Layout, pool: TablePool, *, global_pages: bool
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._words: dict[int, int] = {}
        self._tables: dict[tuple[int, int], int] = {}
        self._root_gfn = pool.take()
        self.root_gpa = self._root_gfn << PAGE_SHIFT
        flags = P | W | A | D | (G if global_pages else 0) | (NX if spec.has_nx else 0)
        for gfn in range(layout.pool_gfn, layout.pool_gfn + layout.pool_frames):
            gva = layout.direct(gfn)
            self._words[self._entry_gpa(self._leaf_table(gva), 0, gva)] = gfn << PAGE_SHIFT | flags
        slots_table = self._leaf_table(layout.slots_gva)
        self.slots_table_gva = layout.direct(slots_table)
        self.root_entries: Mapping[int, int] = {
            (gpa & (PAGE_BYTES - 1)) // spec.entry_bytes: entry
            for gpa, entry in self._words.items()
            if gpa >> PAGE_SHIFT == self._root_gfn
        }

    def write(self, memory: BootMemory) -> None:
        for gpa, entry in self._words.items():
            memory.write(gpa, self._spec.entry_bytes, entry)

    def write_root(self, memory: BootMemory, root_gpa: int) -> None:
        """Fill the root of a process that exists from the start."""
        width = self._spec.entry_bytes
        for index, entry in self.root_entries.items():
            memory.write(root_gpa + index * width, width, entry)

    def _leaf_table(self, gva: int) -> int:
        parent = self._root_gfn
        for level in range(self._spec.top, 0, -1):
            key = level, gva >> self._spec.levels[level].shift
            gfn = self._tables.get(key)
            if gfn is None:
                gfn = self._tables[key] = self._pool.take()
                rights = 0 if level == self._spec.top and self._spec.root_registers else W | A
                self._words[self._entry_gpa(parent, level, gva)] = gfn << PAGE_SHIFT | P | rights
            parent = gfn
        return parent

    def _entry_gpa(self, table_gfn: int, level: int, gva: int) -> int:
        index = self._spec.levels[level].index(gva)
        return (table_gfn << PAGE_SHIFT) + index * self._spec.entry_bytes
