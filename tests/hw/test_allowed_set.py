"""Whatever is stored and flushed, a translation is one that the SDM's windows allow.

Two regions of two pages, three page tables to point them at. The model keeps, per event window,
each upper entry and each whole translation that could have been loaded (SDM vol. 3, 4.10.2-4.10.4).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw.formats import IA32
from penumbra.hw.tlb import TlbGeometry

from .reference import Modes, walk_ia32
from .rig import ENGINES, PAGE, G, P, Rig, U, W

REGIONS, PAGES, TABLES = 2, 2, 3
AD = 0x60
flags = st.sampled_from([0, P, P | W, P | U, P | W | U, P | W | U, P | W | U | G])
regions, pages = st.integers(0, REGIONS - 1), st.integers(0, PAGES - 1)


class Windows:
    """The upper entries and leaves loadable since the last event that covers them."""

    def __init__(self, engine: str, slots: int) -> None:
        self.rig = Rig(IA32, engine, geometry=TlbGeometry(4, 2, slots))
        self.tables = [self.rig.new_table() for _ in range(TABLES)]
        self.modes = Modes()
        self.upper: dict[int, set[int]] = {r: set() for r in range(REGIONS)}
        self.leaf: dict[tuple[int, int], set[tuple[int, int]]] = {
            (r, p): set() for r in range(REGIONS) for p in range(PAGES)
        }
        for region in range(REGIONS):
            self.set_upper(region, region, P | W | U)
            for page in range(PAGES):
                self.set_leaf(region, page, 40 + 2 * region + page, P | W | U)

    def note_loadable(self) -> None:
        """Add to every window what the present memory lets a walker load."""
        for region, uppers in self.upper.items():
            pde = self.rig.word(self.rig.root * PAGE + 4 * region) & ~AD
            if pde & P:
                uppers.add(pde)
        for (region, page), leaves in self.leaf.items():
            for pde in self.upper[region]:
                pte = self.rig.word((pde & ~0xFFF) + 4 * page) & ~AD
                if pte & P:
                    leaves.add((pde, pte))

    def set_upper(self, region: int, table: int, flags: int) -> None:
        value = self.tables[table] * PAGE | flags & ~G
        self.rig.set_word(self.rig.root * PAGE + 4 * region, value)
        self.note_loadable()

    def set_leaf(self, table: int, page: int, pfn: int, flags: int) -> None:
        self.rig.set_word(self.tables[table] * PAGE + 4 * page, pfn * PAGE | flags)
        self.note_loadable()

    def invlpg(self, region: int, page: int) -> None:
        self.rig.cpu.invlpg(region << 22 | page << 12)
        for uppers in self.upper.values():
            uppers.clear()
        self.leaf[region, page].clear()
        self.note_loadable()

    def load_root(self) -> None:
        self.rig.cpu.load_root(self.rig.root * PAGE)
        for uppers in self.upper.values():
            uppers.clear()
        for leaves in self.leaf.values():
            leaves.intersection_update({pair for pair in leaves if pair[1] & G})
        self.note_loadable()

    def set_wp(self, wp: bool) -> None:
        # WP counts at each use; changing it flushes nothing.
        self.modes = Modes(wp=wp)
        self.rig.cpu.set_modes(wp=wp, pse=True, pge=True, nxe=False)

    def access(self, region: int, page: int, kind: int, user: bool) -> None:
        gva = region << 22 | page << 12 | 0x123
        fresh = walk_ia32(self.rig.word, self.rig.root * PAGE, self.modes, gva, kind, user)
        found = self.rig.access(gva, kind, user)
        if isinstance(found, tuple):
            assert fresh.physical is None
            assert found == (fresh.cr2, fresh.error)
            self.upper[region].clear()
            self.leaf[region, page].clear()
        else:
            assert found in {
                pte >> 12
                for pde, pte in self.leaf[region, page]
                if self.permit(pde & pte, kind, user)
            }
        self.note_loadable()

    def permit(self, rights: int, kind: int, user: bool) -> bool:
        if user and not rights & U:
            return False
        return kind != 1 or bool(rights & W) or not (user or self.modes.wp)


# Events are rare, so that windows grow; reads and writes of entries and pages alternate.
steps = st.one_of(
    st.tuples(st.just("set_upper"), regions, st.integers(0, TABLES - 1), flags),
    st.tuples(st.just("set_leaf"), st.integers(0, TABLES - 1), pages, st.integers(40, 47), flags),
    *[st.tuples(st.just("access"), regions, pages, st.integers(0, 2), st.booleans())] * 4,
    st.tuples(st.just("invlpg"), regions, pages),
    st.sampled_from([("load_root",), ("set_wp", False), ("set_wp", True)]),
)


@pytest.mark.shows("H4", "H5", "H6")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("slots", [0, 1, 4])
def test_every_access_ends_as_some_allowed_translation_or_the_present_fault(
    engine: str, slots: int
) -> None:
    @settings(deadline=None, max_examples=100)
    @given(program=st.lists(steps, min_size=20, max_size=80))
    def run(program: list[tuple[Any, ...]]) -> None:
        windows = Windows(engine, slots)
        for name, *args in program:
            getattr(windows, name)(*args)

    run()
