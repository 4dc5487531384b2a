"""Hierarchies kept across root loads: what comes back is what a load of now would give."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.hw.formats import PAGE_SHIFT, PS, A, D, FormatSpec, P, U, W
from penumbra.hw.streams import WRITE
from tests.actors.vmm.bench import PROTECTED, Faulted
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
)
from tests.actors.vmm.vtlb.test_method_700 import LARGE_AT, N_PIECES

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)


class Kept:
    """A VM that has used two pages of its first root and has gone to the second."""

    def __init__(self, spec: FormatSpec, **options: Any) -> None:
        self.bench = bench = VtlbBench(spec, **{"working_set": 4, **options})
        self.second = bench.frame()
        bench.map(bench.root, GVA, FRAME)
        bench.map(bench.root, NEIGHBOUR, OTHER)
        bench.map(self.second, GVA, THIRD)
        bench.begin()
        bench.access(0, GVA)
        bench.access(0, NEIGHBOUR)
        bench.load_cr3(0, self.second)
        assert bench.access(0, GVA) == THIRD

    def back(self) -> VtlbBench:
        """Load the first root again."""
        self.bench.load_cr3(0, self.bench.root)
        self.bench.take_log()
        return self.bench


@both_formats
@pytest.mark.shows("I11", "Fig 4 408")
def test_a_root_that_comes_back_finds_its_translations_and_no_fault(spec: FormatSpec) -> None:
    bench = Kept(spec).back()
    assert (bench.access(0, GVA), bench.access(0, NEIGHBOUR)) == (FRAME, OTHER)
    assert bench.hidden() == 0
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11", "Fig 4 408")
def test_what_has_changed_meanwhile_goes_and_the_rest_stays(spec: FormatSpec) -> None:
    kept = Kept(spec)
    kept.bench.poke(0, kept.bench.where(kept.bench.root, GVA), THIRD << PAGE_SHIFT | USED)
    bench = kept.back()
    assert (bench.mapped(GVA), bench.mapped(NEIGHBOUR)) == (None, OTHER)
    assert bench.access(0, GVA) == THIRD
    conformer = bench.vtlbs[0].conformer
    assert conformer.n_dropped == 2
    assert conformer.n_compared >= 2 * (spec.top + 2)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I4")
@pytest.mark.parametrize("bit", [A, D])
def test_marks_the_guest_cleared_meanwhile_are_set_again_at_the_next_use(
    spec: FormatSpec, bit: int
) -> None:
    kept = Kept(spec)
    kept.bench.set(GVA, off=bit)
    bench = kept.back()
    assert bench.access(0, GVA, WRITE) == FRAME
    assert bench.bits(GVA) == A | D
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I4")
def test_an_upper_entrys_mark_that_was_cleared_is_set_again(spec: FormatSpec) -> None:
    kept = Kept(spec)
    kept.bench.set(GVA, level=1, off=A)
    bench = kept.back()
    assert bench.access(0, GVA) == FRAME
    assert bench.bits(GVA, 1) & A
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
@pytest.mark.parametrize(("bit", "error"), [(P, 6), (W, 7), (U, 7)])
def test_rights_taken_from_an_upper_entry_meanwhile_are_gone(
    spec: FormatSpec, bit: int, error: int
) -> None:
    kept = Kept(spec)
    kept.bench.set(GVA, level=1, off=bit)
    bench = kept.back()
    assert bench.access(0, GVA, WRITE) == Faulted(error)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
def test_an_upper_entry_that_points_elsewhere_takes_its_table_along(spec: FormatSpec) -> None:
    kept = Kept(spec)
    bench = kept.bench
    table = bench.frame()
    bench.memory.store(bench.at(table, 0, GVA), spec.entry_bytes, THIRD << PAGE_SHIFT | USED)
    bench.poke(0, bench.where(bench.root, GVA, 1), table << PAGE_SHIFT | LINK)
    kept.back()
    assert (bench.mapped(NEIGHBOUR), bench.access(0, GVA)) == (None, THIRD)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
def test_the_pieces_of_a_large_page_go_with_its_entry(spec: FormatSpec) -> None:
    n, at = N_PIECES[spec.name], LARGE_AT[spec.name]
    bench = VtlbBench(spec, n_frames=2 * n, working_set=2)
    second = bench.frame()
    bench.map(bench.root, at, n, USED | PS, level=1)
    bench.map(second, GVA, THIRD)
    bench.begin()
    assert bench.access(0, at + 0x3000) == n + 3
    bench.load_cr3(0, second)
    bench.load_cr3(0, bench.root)
    assert bench.mapped(at + 0x3000) == n + 3
    bench.load_cr3(0, second)
    bench.poke(0, bench.where(bench.root, at, 1), USED | PS)
    bench.load_cr3(0, bench.root)
    assert bench.access(0, at + 0x3000) == 3
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
def test_the_least_recently_used_root_is_forgotten(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, working_set=2)
    roots = [bench.root, *(bench.frame() for _ in range(3))]
    for i, root in enumerate(roots):
        bench.map(root, GVA, FRAME + i % 3)
    bench.begin()
    for i, root in enumerate(roots):
        bench.load_cr3(0, root)
        assert bench.access(0, GVA) == FRAME + i % 3
    faults = []
    for i in (1, 2, 3, 0):
        bench.take_log()
        bench.load_cr3(0, roots[i])
        assert bench.access(0, GVA) == FRAME + i % 3
        faults.append(bench.hidden())
    assert faults == [0, 0, 0, 1]
    bench.assert_coherent()


@both_formats
def test_kept_pairs_go_first_when_storage_is_short(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, n_frames=256, working_set=64)
    roots = [bench.root, *(bench.frame() for _ in range(39))]
    for i, root in enumerate(roots):
        bench.map(root, GVA, FRAME + i % 3)
    bench.begin()
    for i, root in enumerate(roots):
        bench.load_cr3(0, root)
        assert bench.access(0, GVA) == FRAME + i % 3
        assert bench.vtlbs[0].state.pairs.storage.n_used <= 64
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I8")
def test_hierarchies_of_another_mode_are_not_used(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, working_set=4)
    bench.map(bench.root, GVA, FRAME, USED & ~W)
    bench.begin()
    bench.load_cr0(0, PROTECTED ^ (1 << 16))
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    bench.load_cr0(0, PROTECTED)
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(3)
    bench.load_cr0(0, 1)
    assert bench.access(0, GVA, user=False) == GVA >> PAGE_SHIFT
    bench.load_cr0(0, PROTECTED)
    assert bench.access(0, GVA, user=False) == FRAME
    bench.assert_coherent()
