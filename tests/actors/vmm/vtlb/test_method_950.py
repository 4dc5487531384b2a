"""Method 950, Fig. 9: the guest sets or clears CR0.WP."""

from __future__ import annotations

import pytest

from penumbra.hw.formats import CR0_WP, PF_P, PF_W, FormatSpec, P, U, W
from penumbra.hw.streams import WRITE
from tests.actors.vmm.bench import PROTECTED, Faulted, Seen
from tests.actors.vmm.vtlb.bench import (
    FORMATS,
    FRAME,
    GVA,
    LINK,
    NEIGHBOUR,
    OTHER,
    USED,
    VtlbBench,
    two_pages,
)
from tests.actors.vmm.vtlb.test_method_700 import LARGE_AT, large_page

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
OPEN = PROTECTED & ~CR0_WP


@both_formats
@pytest.mark.shows("I8", "Fig 9 952")
def test_952_clearing_wp_changes_no_active_entry(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~W)
    bench.access(0, GVA, user=False)
    bench.take_log()
    bench.load_cr0(0, OPEN)
    assert bench.both(GVA) == (P | U, P | U)
    assert bench.take_log() == []


@both_formats
@pytest.mark.shows("I8", "Fig 9 954", "Fig 9 958", "Fig 9 960", "Fig 9 962")
def test_954_setting_wp_closes_what_the_guest_has_read_only_and_flushes(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~W)
    bench.load_cr0(0, OPEN)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.access(0, NEIGHBOUR, WRITE, user=False) == OTHER
    assert bench.both(GVA) == (P | U, P | W | U)
    bench.take_log()
    bench.load_cr0(0, PROTECTED)
    assert Seen("flushed", 0, -1) in bench.take_log()
    assert (bench.both(GVA), bench.both(NEIGHBOUR)) == ((P | U, P | U), (7, 7))
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    assert bench.access(0, NEIGHBOUR, WRITE, user=False) == OTHER
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I8", "Fig 9 956")
@pytest.mark.parametrize("contiguous", [False, True])
def test_956_a_large_page_is_closed_too(spec: FormatSpec, contiguous: bool) -> None:
    bench = large_page(spec, USED & ~W, contiguous=contiguous)
    at, level = LARGE_AT[spec.name], 1 if contiguous else 0
    bench.load_cr0(0, OPEN)
    assert bench.access(0, at, WRITE, user=False) != Faulted(PF_P | PF_W)
    assert bench.both(at, level)[1] & W
    bench.load_cr0(0, PROTECTED)
    assert not bench.both(at, level)[1] & W
    assert bench.access(0, at, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I8", "Fig 9 958")
def test_958_a_read_only_upper_entry_closes_all_below_it(spec: FormatSpec) -> None:
    bench = two_pages(spec, link=LINK & ~W)
    bench.load_cr0(0, OPEN)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    bench.load_cr0(0, PROTECTED)
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I8", "Fig 9 960")
def test_960_a_page_that_has_become_clean_is_not_opened_unseen(spec: FormatSpec) -> None:
    bench = two_pages(spec, P | W | U)
    bench.load_cr0(0, OPEN)
    bench.access(0, GVA, user=False)
    bench.load_cr0(0, PROTECTED)
    assert bench.both(GVA) == (P | U, P | U)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.bits(GVA) == 0x60
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I8", "Fig 9 952")
def test_setting_wp_that_is_set_already_is_no_work(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    bench.take_log()
    bench.load_cr0(0, PROTECTED)
    assert bench.take_log() == []
    assert bench.mapped(GVA) == FRAME


@both_formats
@pytest.mark.shows("I8", "ET3", "Fig 9 952", "C2")
@pytest.mark.parametrize("printed", [False, True])
def test_after_wp_is_cleared_a_supervisor_may_write_a_read_only_dirty_page(
    spec: FormatSpec, printed: bool
) -> None:
    """720 and 842 ask for D=0, so as printed the repair the text promises does not happen."""
    bench = two_pages(spec, USED & ~W, errata=("ET3",) if printed else ())
    bench.access(0, GVA, user=False)
    bench.load_cr0(0, OPEN)
    wrote = bench.access(0, GVA, WRITE, user=False)
    assert wrote == (Faulted(PF_P | PF_W) if printed else FRAME)
    assert bench.refused() == printed


@both_formats
@pytest.mark.shows("I8", "ET3")
def test_as_printed_a_clean_page_is_repaired_after_wp_is_cleared(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~W & ~0x40, errata=("ET3",))
    bench.access(0, GVA, user=False)
    bench.load_cr0(0, OPEN)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I8", "I11")
def test_vcpus_that_share_by_mode_part_when_one_changes_wp(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, n_vcpus=2, sharing="vm")
    bench.map(bench.root, GVA, FRAME, USED & ~W)
    bench.begin()
    bench.access(0, GVA, user=False)
    assert bench.pair(0) == bench.pair(1)
    bench.load_cr0(0, OPEN)
    assert bench.pair(0) != bench.pair(1)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.access(1, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.load_cr0(0, PROTECTED)
    assert bench.pair(0) == bench.pair(1)
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.assert_coherent()
