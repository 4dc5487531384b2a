"""The TLB against plain lists, one per set: least recently used out, and what each event drops."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw.formats import IA32, X86_64, FormatSpec
from penumbra.hw.tlb import Tlb, TlbGeometry

from .rig import ALL, ENGINES, G, Rig

LARGE_AT = 0x4000_0000
# Small pages of one region and large ones of another; every third page is global.
SMALL_PAGES = [page << 12 for page in range(12)]
KEY_VPN, KEY_LEVEL = (1 << 36) - 1, 60


def large_pages(spec: FormatSpec) -> list[int]:
    return [LARGE_AT + (i << spec.levels[1].shift) for i in range(6)]


class Lists:
    """One TLB of 2 or 4 sets, and a list of (page number, level) per set, most recent first."""

    def __init__(
        self, spec: FormatSpec, engine: str, geometry: tuple[int, int], psc_slots: int, pge: bool
    ) -> None:
        entries, self.ways = geometry
        self.rig = Rig(spec, engine, geometry=TlbGeometry(entries, self.ways, psc_slots))
        self.rig.cpu.set_modes(wp=True, pse=True, pge=pge, nxe=True)
        self.pge = pge
        self.sets: list[list[tuple[int, int]]] = [[] for _ in range(entries // self.ways)]
        self.large = large_pages(spec)
        for number, gva in enumerate(SMALL_PAGES):
            self.rig.map(gva, 40 + number, ALL | (0 if number % 3 else G))
        for number, gva in enumerate(self.large):
            self.rig.map(gva, number << 10, ALL | (0 if number % 3 else G), level=1)

    def key(self, page: int) -> tuple[int, int]:
        """Return the model's key of a page, small ones first."""
        if page < len(SMALL_PAGES):
            return (SMALL_PAGES[page] >> 12, 0)
        gva = self.large[page - len(SMALL_PAGES)]
        return (gva >> self.rig.spec.levels[1].shift, 1)

    def is_global(self, page: int) -> bool:
        return self.pge and (page if page < 12 else page - 12) % 3 == 0

    def gva(self, page: int, inside: int) -> int:
        """Return an address in a page: anywhere in a large one."""
        if page < len(SMALL_PAGES):
            return SMALL_PAGES[page] | (inside & 0xFFF)
        shift = self.rig.spec.levels[1].shift
        return self.large[page - 12] | (inside & ((1 << shift) - 1))

    def read(self, page: int, inside: int) -> None:
        key = self.key(page)
        place = self.sets[key[0] % len(self.sets)]
        assert self.rig.missed(self.gva(page, inside)) == (key not in place)
        if key in place:
            place.remove(key)
        place.insert(0, key)
        del place[self.ways :]

    def invlpg(self, page: int, inside: int) -> None:
        self.rig.cpu.invlpg(self.gva(page, inside))
        key = self.key(page)
        place = self.sets[key[0] % len(self.sets)]
        if key in place:
            place.remove(key)

    def load_root(self) -> None:
        self.rig.cpu.load_root(self.rig.root << 12)
        stay = {self.key(page) for page in range(18) if self.is_global(page)}
        self.sets = [[key for key in place if key in stay] for place in self.sets]

    def flush_all(self) -> None:
        self.rig.cpu.flush_all()
        self.sets = [[] for _ in self.sets]

    def check(self) -> None:
        """The sets hold the same keys in the same order."""
        tlb = self.rig.tlb
        tlb.check()
        tags = tlb.array[m.TLB_TAGS : m.TLB_TAGS + tlb.geometry.entries].tolist()
        found = [
            [(tag & KEY_VPN, tag >> KEY_LEVEL) for tag in tags[i : i + self.ways] if tag != -1]
            for i in range(0, len(tags), self.ways)
        ]
        assert found == self.sets
        assert len(tlb.entries()) == sum(map(len, self.sets))


pages, inside = st.integers(0, 17), st.integers(0, (1 << 22) - 1)
steps = st.one_of(
    *[st.tuples(st.just("read"), pages, inside)] * 5,
    st.tuples(st.just("invlpg"), pages, inside),
    st.tuples(st.just("invlpg"), pages, inside),
    st.sampled_from([("load_root",), ("flush_all",), ("read", 12, 0), ("invlpg", 12, 1)]),
)


@pytest.mark.shows("H4", "H5", "VTLB Fig 2")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_sets_keep_the_most_recently_used_and_lose_what_each_event_drops(
    spec: FormatSpec, engine: str
) -> None:
    @settings(deadline=None, max_examples=80)
    @given(
        geometry=st.sampled_from([(4, 2), (8, 2), (12, 3), (4, 1), (2, 2)]),
        psc_slots=st.sampled_from([0, 1, 4]),
        pge=st.booleans(),
        program=st.lists(steps, min_size=20, max_size=80),
    )
    def run(
        geometry: tuple[int, int], psc_slots: int, pge: bool, program: list[tuple[Any, ...]]
    ) -> None:
        lists = Lists(spec, engine, geometry, psc_slots, pge)
        for name, *args in program:
            getattr(lists, name)(*args)
            lists.check()

    run()


@pytest.mark.shows("H5")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flags", [ALL, ALL | G])
def test_invlpg_drops_a_large_page_global_or_not(engine: str, flags: int) -> None:
    rig = Rig(IA32, engine)
    rig.map(LARGE_AT, 0x400, flags, level=1)
    assert [rig.missed(LARGE_AT), rig.missed(LARGE_AT + 0x1000)] == [True, False]
    rig.cpu.invlpg(LARGE_AT + 0x3000)
    assert rig.missed(LARGE_AT)


@pytest.mark.shows("H4")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_eviction_causes_a_later_walk(engine: str) -> None:
    rig = Rig(IA32, engine, geometry=TlbGeometry(entries=2, ways=2, psc_slots=0))
    for page in range(3):
        rig.map(page << 12, 40 + page)
    assert [rig.missed(page << 12) for page in (0, 1, 0, 2, 0, 1)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip


@pytest.mark.shows("H5")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("pge", "missed_after_load"), [(True, [False, True]), (False, [True, True])]
)
def test_only_with_pge_set_does_a_global_entry_survive_a_load_of_cr3(
    engine: str, pge: bool, missed_after_load: list[bool]
) -> None:
    rig = Rig(IA32, engine)
    rig.cpu.set_modes(wp=True, pse=True, pge=pge, nxe=False)
    for gva, flags in ((0x1000, ALL | G), (0x2000, ALL)):
        rig.map(gva, 40, flags)
        rig.reads(gva)
    rig.cpu.load_root(rig.root << 12)
    assert [rig.missed(0x1000), rig.missed(0x2000)] == missed_after_load
    rig.cpu.invlpg(0x1FFF)
    assert rig.missed(0x1000)
    rig.cpu.flush_all()
    assert rig.missed(0x1000)
    rig.cpu.set_modes(wp=True, pse=True, pge=False, nxe=False)
    rig.cpu.load_root(rig.root << 12)
    rig.cpu.set_modes(wp=True, pse=True, pge=True, nxe=False)
    assert rig.missed(0x1000)


@pytest.mark.shows("H5")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_global_entry_serves_every_address_space_and_others_only_their_own(engine: str) -> None:
    rig = Rig(IA32, engine)
    second = rig.new_table()
    for root, private in ((rig.root, 41), (second, 42)):
        rig.map(0x1000, 40 if root == rig.root else 50, ALL | G, root=root)
        rig.map(0x2000, private, ALL, root=root)
    assert (rig.reads(0x1000), rig.reads(0x2000)) == (40, 41)
    rig.cpu.load_root(second << 12)
    # The second space maps the global page elsewhere: the guest's mistake, kept until INVLPG.
    assert (rig.reads(0x1000), rig.reads(0x2000)) == (40, 42)
    rig.cpu.invlpg(0x1000)
    assert rig.reads(0x1000) == 50


@pytest.mark.shows("H4")
@pytest.mark.parametrize(
    ("entries", "ways", "psc_slots", "problem"),
    [
        (12, 4, 4, "TLB of 12 entries in 4 ways"),
        (16, 5, 4, "TLB of 16 entries in 5 ways"),
        (0, 4, 4, "TLB of 0 entries in 4 ways"),
        (-8, 4, 4, "TLB of -8 entries in 4 ways"),
        (16, 0, 4, "TLB of 16 entries in 0 ways"),
        (16, -4, 4, "TLB of 16 entries in -4 ways"),
        (16, 4, 3, "paging-structure cache of 3 slots"),
        (16, 4, -1, "paging-structure cache of -1 slots"),
    ],
)
def test_a_geometry_that_cannot_be_indexed_is_refused(
    entries: int, ways: int, psc_slots: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        TlbGeometry(entries, ways, psc_slots)


@pytest.mark.shows("H4")
@pytest.mark.parametrize(
    "geometry", [TlbGeometry(), TlbGeometry(1, 1, 0), TlbGeometry(24, 3, 1), TlbGeometry(64, 64, 2)]
)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_a_new_tlb_is_empty_and_well_formed(spec: FormatSpec, geometry: TlbGeometry) -> None:
    tlb = Tlb(spec, geometry)
    tlb.check()
    assert tlb.entries() == {}
