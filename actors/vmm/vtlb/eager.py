"""Method 1000: the whole guest structure is evaluated and every active entry made to match.

    1003, 1058   each entry of the guest's directory     1028, 1054   each entry of its table
    1004, 1030   P=0 or A=0: not present (1006, 1032). A=0 must fault, or A would not be set
    1008, 1034   no memory of the VM there: not present, the fault will say what it is
    1012-1026, 1038-1052   build: user's and supervisor's rights, R/W=0 while D=0
    1016         a large page has no table: its pieces are built and the loop goes on

Level by level for any format; whole tables of leaves at once. It stops where storage ends: what is
left out is filled by faults. The host's TLB is flushed at the end.

Source: VTLB Figs 10A and 10B.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from penumbra.actors.vmm.memory import MonitorMemoryShortError
from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.vtlb.build import Builder
from penumbra.actors.vmm.vtlb.entries import Words
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import ActiveTable
from penumbra.hw.formats import NX, PAGE_SHIFT, PS, A, D, P

_FLAGS = (1 << PAGE_SHIFT) - 1 & ~PS
Twins = tuple[ActiveTable, ActiveTable]  # the user's and the supervisor's


class EagerFill:
    """Fills one VCPU's virtual TLB with all the guest's tables say."""

    def __init__(self, state: State, builder: Builder) -> None:
        self._state = state
        self._builder = builder

    def fill(self) -> None:
        """Make every active entry match its guest entry (1003-1058)."""
        state = self._state
        if not state.mode.paging:
            return
        user, supervisor = state.pair.both
        with suppress(MonitorMemoryShortError):
            self._table(state.root_gfn(), (user.root, supervisor.root))
        state.flushes.append(FLUSH_ALL)

    def _table(self, gfn: int, twins: Twins) -> None:
        level = twins[0].level
        words = self._state.guest_table(gfn, level)
        if words is None:
            return
        if level == 0:
            self._leaves(twins, words)
            return
        present = np.flatnonzero(words & words.dtype.type(P)).tolist()
        for index in sorted({*present, *twins[0].origin, *twins[1].origin}):
            self._upper(twins, index, int(words[index]))

    def _upper(self, twins: Twins, index: int, entry: int) -> None:
        state, level = self._state, twins[0].level
        large = state.entries.is_large(entry, level, state.mode)
        gfn = self._target(entry, level, large)
        if not self._loadable(entry, level, large) or not state.entries.backed(gfn):  # 1004, 1008
            for hierarchy, table in zip(state.pair.both, twins, strict=True):
                state.drop(hierarchy, (table, index))  # 1006
            return
        if large and not (state.printed("ET7") and entry & D and level == 1):  # 1016
            self._large(twins, index, entry, gfn)
            return
        below = [
            self._builder.upper(hierarchy, (table, index), entry, piece=large)
            for hierarchy, table in zip(state.pair.both, twins, strict=True)
        ]
        self._table(gfn, (below[0], below[1]))

    def _loadable(self, entry: int, level: int, large: bool) -> bool:
        shape, mode = self._state.spec.levels[level], self._state.mode
        if self._state.entries.in_registers(level):
            return bool(entry & P)
        bad = shape.reserved_large if large else shape.reserved
        if self._state.spec.has_nx and not mode.nxe:
            bad |= NX
        return entry & (P | A) == P | A and not entry & bad

    def _target(self, entry: int, level: int, large: bool) -> int:
        if not large:
            return (entry & self._state.spec.frame_mask) >> PAGE_SHIFT
        return self._state.entries.first_frame(entry, level)

    def _large(self, twins: Twins, index: int, entry: int, gfn: int) -> None:
        """Load a large page: in one piece, or all its pieces; what is larger waits for faults."""
        state = self._state
        whole = state.entries.contiguous(gfn, twins[0].level)
        if whole is None and twins[0].level > 1:
            return
        for hierarchy, table in zip(state.pair.both, twins, strict=True):
            place = (table, index)
            if whole is not None:
                self._builder.large(hierarchy, place, entry, gfn, 0)
                continue
            below = self._builder.upper(hierarchy, place, entry, piece=True)
            words = state.entries.table(below.pfn)
            kind = words.dtype.type
            first = (gfn << PAGE_SHIFT) | (entry & (_FLAGS | NX))
            pieces = kind(first) + np.arange(len(words), dtype=words.dtype) * kind(1 << PAGE_SHIFT)
            values, backed = state.entries.leaves(pieces, hierarchy.user, state.mode)
            words[:] = values
            below.origin = dict.fromkeys(np.flatnonzero(backed).tolist(), entry)

    def _leaves(self, twins: Twins, words: Words) -> None:
        """Make two tables of leaves match a guest's (1028-1054)."""
        state = self._state
        wanted = state.entries.loadable(words, 0, state.mode)  # 1030
        for hierarchy, table in zip(state.pair.both, twins, strict=True):
            values, backed = state.entries.leaves(words, hierarchy.user, state.mode)
            chosen = wanted & backed  # 1034
            state.entries.table(table.pfn)[:] = np.where(chosen, values, words.dtype.type(0))
            at = np.flatnonzero(chosen)
            table.origin = dict(zip(at.tolist(), words[at].tolist(), strict=True))
