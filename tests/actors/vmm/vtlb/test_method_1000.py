"""Method 1000, Figs 10A and 10B: eager filling, block by block."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.hw.formats import CR0_WP, IA32, PAGE_SHIFT, PS, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.streams import WRITE
from tests.actors.vmm.bench import PROTECTED, Seen
from tests.actors.vmm.vtlb.bench import (
    FORMATS,
    FRAME,
    GVA,
    LINK,
    NEIGHBOUR,
    OTHER,
    THIRD,
    USED,
    VtlbBench,
    two_pages,
)
from tests.actors.vmm.vtlb.test_method_700 import LARGE_AT, N_PIECES, large_page

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
EAGER: dict[str, Any] = {"fill": "eager"}


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1003", "Fig 10B 1028", "Fig 10B 1054", "Fig 10B 1058", "VTLBc 6")
@pytest.mark.shows("VTLBc 19", "VTLBc 30")
def test_1003_1058_an_event_loads_every_used_page_of_every_table(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, **EAGER)
    far = 1 << spec.levels[spec.top].shift
    places = (GVA, NEIGHBOUR, 0x3F_F000, far, far + 0x5000)
    for i, gva in enumerate(places):
        bench.map(bench.root, gva, FRAME + i % 3)
    bench.begin()
    assert [bench.mapped(gva) for gva in places] == [FRAME + i % 3 for i in range(5)]
    assert [bench.access(0, gva) for gva in places] == [FRAME + i % 3 for i in range(5)]
    assert bench.hidden() == 0
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1004", "Fig 10A 1006")
@pytest.mark.parametrize("link", [LINK & ~P, LINK & ~A])
def test_1004_1006_an_upper_entry_absent_or_unused_is_not_present(
    spec: FormatSpec, link: int
) -> None:
    bench = VtlbBench(spec, **EAGER)
    bench.map(bench.root, GVA, FRAME)
    bench.begin()
    bench.poke(
        0,
        bench.where(bench.root, GVA, 1),
        bench.entry(bench.where(bench.root, GVA, 1)) & -8 & ~A | link & 0x27,
    )
    bench.load_cr3(0, bench.root)
    assert bench.both(GVA, 1) == (0, 0)
    bench.access(0, GVA)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1008", "Fig 10A 1006")
def test_1008_an_upper_entry_that_points_outside_the_vm_is_not_present(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, **EAGER)
    bench.map(bench.root, GVA, FRAME)
    bench.memory.store(bench.where(bench.root, GVA, 1), spec.entry_bytes, 5000 << 12 | LINK)
    bench.begin()
    assert bench.both(GVA, 1) == (0, 0)


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1012", "Fig 10A 1016")
@pytest.mark.parametrize("contiguous", [False, True])
def test_1012_1016_a_large_page_is_loaded_and_no_table_is_looked_for_in_it(
    spec: FormatSpec, contiguous: bool
) -> None:
    bench = large_page(spec, contiguous=contiguous, **EAGER)
    at, n = LARGE_AT[spec.name], N_PIECES[spec.name]
    for i in (0, 9, n - 1):
        assert bench.access(0, at + i * 0x1000, WRITE) == n + i
    assert bench.hidden() == 0
    assert bool(bench.active(at, user=True, level=1) & PS) == contiguous
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1018")
@pytest.mark.parametrize("contiguous", [False, True])
def test_1018_a_clean_large_page_is_loaded_read_only(spec: FormatSpec, contiguous: bool) -> None:
    bench = large_page(spec, USED & ~D, contiguous=contiguous, **EAGER)
    at, level = LARGE_AT[spec.name], 1 if contiguous else 0
    assert bench.both(at, level) == (P | U, P | U)
    bench.access(0, at, WRITE)
    assert bench.bits(at, 1) == A | D
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1014", "Fig 10A 1020", "Fig 10A 1022", "Fig 10A 1024")
@pytest.mark.shows("Fig 10B 1040", "Fig 10B 1046", "Fig 10B 1048", "Fig 10B 1052")
@pytest.mark.parametrize("rights", [0, W, U, W | U])
@pytest.mark.parametrize("level", [0, 1])
def test_1014_to_1024_and_1040_to_1052_rights_are_those_of_a_fill_by_fault(
    spec: FormatSpec, rights: int, level: int
) -> None:
    leaf = level == 0
    flags, link = (P | A | D | rights, LINK) if leaf else (USED, P | A | rights)
    bench = two_pages(spec, flags, link=link, **EAGER)
    assert bench.both(GVA, level) == (P | rights, P | U | rights & W)
    lazy = two_pages(spec, flags, link=link)
    lazy.access(0, GVA, user=False)
    assert [bench.both(GVA, at) for at in range(spec.top + 1)] == [
        lazy.both(GVA, at) for at in range(spec.top + 1)
    ]


@both_formats
@pytest.mark.shows("I9", "Fig 10A 1026", "Fig 10B 1050")
@pytest.mark.parametrize("level", [0, 1])
def test_1026_1050_with_wp_clear_the_supervisors_entries_are_writable(
    spec: FormatSpec, level: int
) -> None:
    bench = two_pages(spec, USED & ~W, link=LINK & ~W, **EAGER)
    bench.load_cr0(0, PROTECTED & ~CR0_WP)
    assert bench.both(GVA, level) == (P | U, P | W | U)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.hidden() == 0
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "I4", "Fig 10B 1030", "Fig 10B 1032")
@pytest.mark.parametrize("flags", [USED & ~P, USED & ~A])
def test_1030_1032_a_leaf_absent_or_unused_is_not_present_so_a_stays_exact(
    spec: FormatSpec, flags: int
) -> None:
    bench = two_pages(spec, flags, **EAGER)
    assert (bench.both(GVA), bench.mapped(NEIGHBOUR)) == ((0, 0), OTHER)
    assert not bench.bits(GVA) & A & ~flags
    bench.access(0, GVA)
    assert bench.bits(GVA) & A or not flags & P
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10B 1034", "Fig 10B 1032")
def test_1034_a_leaf_that_points_outside_the_vm_is_not_present(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, **EAGER)
    bench.map(bench.root, GVA, 5000)
    bench.map(bench.root, NEIGHBOUR, OTHER)
    bench.begin()
    assert (bench.both(GVA), bench.mapped(NEIGHBOUR)) == ((0, 0), OTHER)
    assert bench.access(0, GVA) == -1
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10B 1038", "Fig 10B 1042", "Fig 10B 1044")
def test_1038_to_1044_a_clean_page_is_loaded_read_only_and_as_a_small_one(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~D | 0x80, **EAGER)  # bit 7 is PAT in a leaf
    assert bench.both(GVA) == (P | U, P | U)
    assert not bench.active(GVA, user=True) & PS
    bench.access(0, GVA, WRITE)
    assert bench.bits(GVA) == A | D
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I9", "Fig 10B 1058")
def test_1058_the_host_is_flushed_at_the_end(spec: FormatSpec) -> None:
    bench = two_pages(spec, **EAGER)
    bench.take_log()
    bench.invlpg(0, GVA)
    assert Seen("flushed", 0, -1) in bench.take_log()


@both_formats
@pytest.mark.shows("I9", "VTLBc 6", "VTLBc 30")
def test_every_entry_that_does_not_match_is_changed_not_only_the_one_of_the_event(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec, **EAGER)
    bench.poke(0, bench.where(bench.root, NEIGHBOUR), THIRD << PAGE_SHIFT | USED)
    bench.poke(0, bench.where(bench.root, 0x3000), FRAME << PAGE_SHIFT | USED)
    bench.invlpg(0, GVA)
    assert [bench.mapped(gva) for gva in (GVA, NEIGHBOUR, 0x3000)] == [FRAME, THIRD, FRAME]
    bench.set(NEIGHBOUR, off=P)
    bench.invlpg(0, GVA)
    assert bench.mapped(NEIGHBOUR) is None
    bench.assert_coherent()


@pytest.mark.shows("I9", "ET7", "Fig 10A 1016", "C2")
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
@pytest.mark.parametrize("printed", [False, True])
def test_the_data_of_a_dirty_large_page_is_no_page_table(spec: FormatSpec, printed: bool) -> None:
    bench = large_page(spec, errata=("ET7",) if printed else (), **EAGER)
    at, n = LARGE_AT[spec.name], N_PIECES[spec.name]
    bench.memory.store((n << PAGE_SHIFT) + 3 * spec.entry_bytes, spec.entry_bytes, 40 << 12 | USED)
    bench.load_cr3(0, bench.root)
    assert bench.access(0, at + 0x3000) == (40 if printed else n + 3)
    assert bench.refused() == printed


@both_formats
@pytest.mark.shows("I9")
def test_eager_filling_stops_where_storage_ends_and_faults_fill_the_rest(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, n_frames=256, **EAGER)
    step = 1 << spec.levels[1].shift
    for i in range(80):
        bench.map(bench.root, i * step, FRAME + i % 3)
    bench.begin()
    assert bench.mapped(0) == FRAME
    assert bench.vtlbs[0].state.pairs.storage.n_used == 64
    assert [bench.access(0, i * step) for i in (0, 79, 40)] == [FRAME, FRAME + 1, FRAME + 1]
    bench.assert_coherent()


@pytest.mark.shows("I9")
def test_a_table_that_maps_itself_is_filled_at_every_level_it_serves() -> None:
    bench = VtlbBench(IA32, **EAGER)
    bench.map(bench.root, GVA, FRAME)
    at = bench.at(bench.root, 1, 0xFFC0_0000)
    bench.memory.store(at, 4, bench.root << PAGE_SHIFT | USED)
    bench.begin()
    table = bench.entry(bench.where(bench.root, GVA, 1)) >> PAGE_SHIFT
    assert bench.access(0, 0xFFC0_0000) == table
    assert bench.access(0, 0xFFFF_F000) == bench.root
    assert bench.hidden() < 2  # the table's own entry has D clear
    bench.assert_coherent()
