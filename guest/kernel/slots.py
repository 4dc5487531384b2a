"""Temporary slots: how the kernel reaches a user frame. Two pages of the window per VCPU.

A slot is mapped, INVLPG'd and used with interrupts disabled, so that nobody else uses it meanwhile.
What it mapped last stays until the next use: it is supervisor-only and no other CPU looks at it.
"""

from __future__ import annotations

from penumbra.guest.kernel.layout import SLOTS_PER_VCPU, Layout
from penumbra.guest.kernel.process import Cpu
from penumbra.hw.formats import NX, PAGE_BYTES, PAGE_SHIFT, A, D, FormatSpec, P, W
from penumbra.hw.operations import Copy, Fill, Invlpg, Store


class Slots:
    """Fills and copies user frames. Every method wants interrupts disabled."""

    def __init__(self, spec: FormatSpec, layout: Layout, table_gva: int) -> None:
        self._entry_bytes = spec.entry_bytes
        self._flags = P | W | A | D | (NX if spec.has_nx else 0)
        self._base = layout.slots_gva
        self._table_gva = table_gva

    async def fill(self, cpu: Cpu, gfn: int, word: int) -> None:
        """Fill a user frame with a 64-bit word."""
        gva = await self._map(cpu, 0, gfn)
        await Fill(gva, PAGE_BYTES, word)

    async def copy(self, cpu: Cpu, dst_gfn: int, src_gfn: int, n_bytes: int = PAGE_BYTES) -> None:
        """Copy the first bytes of one frame to another."""
        dst = await self._map(cpu, 0, dst_gfn)
        src = await self._map(cpu, 1, src_gfn)
        await Copy(dst, src, n_bytes)

    async def _map(self, cpu: Cpu, which: int, gfn: int) -> int:
        number = cpu.cpu_id * SLOTS_PER_VCPU + which
        gva = self._base + number * PAGE_BYTES
        entry = gfn << PAGE_SHIFT | self._flags
        await Store(self._table_gva + number * self._entry_bytes, self._entry_bytes, entry)
        await Invlpg(gva)
        return gva
