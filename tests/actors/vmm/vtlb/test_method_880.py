"""Method 880, Fig. 8: INVLPG, block by block; and what frees an active table."""

from __future__ import annotations

import pytest

from penumbra.hw.formats import PAGE_SHIFT, PS, X86_64, FormatSpec, P
from penumbra.hw.streams import WRITE
from tests.actors.vmm.bench import Seen
from tests.actors.vmm.vtlb.bench import (
    FORMATS,
    FRAME,
    GVA,
    NEIGHBOUR,
    OTHER,
    THIRD,
    USED,
    VtlbBench,
    two_pages,
)
from tests.actors.vmm.vtlb.test_method_700 import LARGE_AT, N_PIECES, large_page

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)


@both_formats
@pytest.mark.shows("I6", "Fig 8 884", "Fig 8 886")
def test_884_nothing_loaded_for_the_address_means_nothing_to_drop(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.access(0, NEIGHBOUR)
    bench.invlpg(0, 1 << spec.levels[spec.top].shift)
    assert bench.mapped(NEIGHBOUR) == OTHER
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I6", "Fig 8 886", "Fig 8 888")
@pytest.mark.parametrize("contiguous", [False, True])
def test_886_888_a_large_page_is_dropped_whole_wherever_in_it_the_operand_points(
    spec: FormatSpec, contiguous: bool
) -> None:
    bench = large_page(spec, contiguous=contiguous)
    at, n = LARGE_AT[spec.name], N_PIECES[spec.name]
    for i in (0, 5, n - 1):
        bench.access(0, at + i * 0x1000)
    bench.invlpg(0, at + 0x7000)
    assert [bench.both(at + i * 0x1000, level) for i in (0, 5, n - 1) for level in (0, 1)] == [
        (0, 0)
    ] * 6
    # The page is another now: no piece of the old one may serve.
    bench.poke(0, bench.where(bench.root, at, 1), USED | PS)
    bench.invlpg(0, at + 0x3000)
    assert bench.access(0, at + 0x5000) == 5
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I6", "Fig 8 890", "Fig 8 892")
def test_890_892_the_leafs_entry_is_dropped_from_both_hierarchies_and_no_others(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    bench.access(0, NEIGHBOUR)
    bench.invlpg(0, GVA)
    assert (bench.both(GVA), bench.both(NEIGHBOUR)) == ((0, 0), (7, 7))
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I6", "Fig 8 894", "Fig 8 896")
def test_894_a_table_with_an_entry_left_stays(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    bench.access(0, NEIGHBOUR)
    bench.invlpg(0, GVA)
    assert [h.n_tables for h in bench.pair()] == [spec.top + 1] * 2


@both_formats
@pytest.mark.shows("I6", "Fig 8 894", "Fig 8 896", "Fig 8 898")
def test_894_to_898_an_emptied_table_is_freed_its_link_cleared_and_the_host_flushed(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    storage = bench.vtlbs[0].state.pairs.storage
    bench.take_log()
    bench.invlpg(0, GVA)
    assert [h.n_tables for h in bench.pair()] == [1, 1]
    assert storage.n_freed == 2 * spec.top
    assert bench.both(GVA, spec.top) == (0, 0)
    assert bench.take_log() == [Seen("flushed", 0, -1)]  # before any table is used anew
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I6", "Fig 8 894", "ET8")
def test_894_users_and_supervisors_tables_are_freed_each_for_itself(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    bench.access(0, NEIGHBOUR)
    user, supervisor = bench.pair()
    bench.vtlbs[0].state.drop(supervisor, supervisor.path(NEIGHBOUR)[-1])
    bench.invlpg(0, GVA)
    assert (user.n_tables, supervisor.n_tables) == (spec.top + 1, 1)
    assert bench.access(0, NEIGHBOUR, user=False) == OTHER
    assert bench.access(0, GVA, user=False) == FRAME
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I6", "Fig 8 900")
def test_900_the_host_flushes_the_operand_even_if_nothing_was_dropped(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.access(0, NEIGHBOUR)
    bench.take_log()
    bench.invlpg(0, GVA + 0x10)
    assert bench.take_log() == [Seen("flushed", 0, GVA + 0x10)]


@both_formats
@pytest.mark.shows("I6", "ET8", "C2")
@pytest.mark.parametrize("printed", [False, True])
def test_a_freed_table_is_used_anew_only_after_every_cpu_that_may_walk_it_has_flushed(
    spec: FormatSpec, printed: bool
) -> None:
    """VCPU 1's paging-structure cache points at the table that VCPU 0 empties and frees."""
    bench = VtlbBench(spec, n_vcpus=2, sharing="vm", errata=("ET8",) if printed else ())
    far = 1 << spec.levels[1].shift
    bench.map(bench.root, GVA, FRAME)
    bench.map(bench.root, far + 0x3000, THIRD)
    bench.map(bench.root, 0x3000, OTHER)
    bench.begin()
    assert bench.access(1, GVA) == FRAME
    assert bench.access(0, GVA) == FRAME
    bench.take_log()
    bench.invlpg(0, GVA)
    assert (Seen("remote", 1) in bench.take_log()) is not printed
    assert bench.access(0, far + 0x3000) == THIRD  # printed: in the freed frame
    assert bench.access(1, 0x3000) == (THIRD if printed else OTHER)
    assert bench.refused() == printed
    if not printed:
        bench.assert_coherent()


@both_formats
@pytest.mark.shows("I6")
def test_a_guest_that_unmaps_frees_and_maps_anew_sees_each_of_its_changes(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    for i in range(30):
        frame = FRAME + i % 3
        bench.poke(0, bench.where(bench.root, GVA), frame << PAGE_SHIFT | USED)
        bench.invlpg(0, GVA)
        assert bench.access(0, GVA, WRITE) == frame
        bench.poke(0, bench.where(bench.root, GVA), USED & ~P)
        bench.invlpg(0, GVA)
        assert bench.access(0, GVA) != frame
        assert bench.vtlbs[0].state.pairs.storage.n_used <= 2 * (spec.top + 1)
    bench.assert_coherent()


@pytest.mark.shows("I6", "ET8")
def test_the_storage_never_hands_out_a_frame_that_waits_for_a_flush() -> None:
    bench = VtlbBench(X86_64, n_vcpus=2, sharing="vm")
    bench.map(bench.root, GVA, FRAME)
    bench.begin()
    bench.access(0, GVA)
    bench.access(1, GVA)
    vtlb, storage = bench.vtlbs[0], bench.vtlbs[0].state.pairs.storage
    vtlb.event_invlpg(GVA)
    owed = storage.frames_owed()
    assert len(owed) == 6
    assert (storage.owing, vtlb.take_remote()) == (2, 2)
    assert vtlb.take_flushes() == [-1]
    assert storage.frames_owed() == owed
    assert bench.vtlbs[1].take_flushes() == [-1]
    assert (storage.owing, storage.frames_owed()) == (0, [])
