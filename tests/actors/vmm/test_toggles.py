"""Options beyond the texts, each on its own: what it saves, and that nothing else changes."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import IA32, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.operations import Store
from penumbra.hw.streams import WRITE

from .bench import USED, Bench, Seen, out_of_sync, patch, shootdown

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
GVA, X, Y = 0x1000, 40, 41
KERNEL = P | W | A | D


def hidden(bench: Bench) -> int:
    return sum(seen.what == "hidden" for seen in bench.take_log())


# ---- prefetch ------------------------------------------------------------------------------------


@both_formats
@pytest.mark.shows("S1", "V5")
@pytest.mark.parametrize(("prefetch", "faults"), [(0, 8), (1, 8), (2, 4), (8, 1), (512, 1)])
def test_a_fill_derives_the_aligned_group_around_it(
    spec: FormatSpec, prefetch: int, faults: int
) -> None:
    bench = Bench(spec, patch(prefetch=prefetch))
    root = bench.frame()
    for page in range(8):
        bench.map(root, page << 12, 30 + page)
    bench.start(root)
    assert [bench.access(0, page << 12) for page in range(8)] == list(range(30, 38))
    assert hidden(bench) == faults
    assert bench.submms[0].take_counts().get("prefetch", 0) == 8 - faults
    for page in range(8):  # and what was taken in advance is told of as well
        bench.poke(1, bench.where(root, page << 12), 40 + page << 12 | USED)
    bench.load_cr3(0, root)
    assert [bench.access(0, page << 12) for page in range(8)] == list(range(40, 48))
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("H4", "V5")
def test_what_the_guest_has_not_used_is_not_fetched_ahead(spec: FormatSpec) -> None:
    bench = Bench(spec, shootdown(prefetch=8))
    root = bench.frame()
    bench.map(root, 0, X)
    unused = bench.map(root, GVA, Y, P | W | U)
    clean = bench.map(root, 0x2000, Y, P | W | U | A)
    bench.map(root, 0x3000, 0, 0)
    bench.start(root)
    bench.access(0, 0)
    assert not bench.entry(unused) & A, "speculation sets no A"
    assert bench.traces.consumers(unused >> 12, spec.levels[0].index(GVA)) == 0
    assert bench.traces.consumers(clean >> 12, spec.levels[0].index(0x2000)) == 1
    bench.take_log()
    assert bench.access(0, 0x2000) == Y
    assert hidden(bench) == 0
    assert bench.access(0, 0x2000, WRITE) == Y
    assert bench.entry(clean) & D, "the first write is still seen"
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("S1", "P5")
@pytest.mark.parametrize("ahead", [False, True])
def test_what_invlpg_has_invalidated_may_be_derived_at_once(spec: FormatSpec, ahead: bool) -> None:
    bench = Bench(spec, shootdown(prefetch_invlpg=ahead))
    root = bench.frame()
    leaf = bench.map(root, GVA, X)
    bench.start(root)
    bench.access(0, GVA)
    bench.poke(1, leaf, Y << 12 | USED)
    bench.invlpg(0, GVA)
    bench.take_log()
    assert bench.access(0, GVA) == Y
    assert hidden(bench) == (not ahead)
    bench.poke(1, leaf, 0)
    bench.invlpg(0, GVA)
    bench.invlpg(0, 0x7000_0000)  # an address no table is linked for
    bench.assert_coherent()


# ---- previous roots, and sharing by role ---------------------------------------------------------


@both_formats
@pytest.mark.shows("S1")
@pytest.mark.parametrize(("kept", "faults"), [(None, 0), (2, 0), (1, 3), (0, 3)])
def test_shadows_of_as_many_previous_roots_are_kept_as_the_scheme_says(
    spec: FormatSpec, kept: int | None, faults: int
) -> None:
    bench = Bench(spec, patch(root_cache=kept), n_vcpus=1)
    roots = [bench.frame() for _ in range(3)]
    for number, root in enumerate(roots):
        bench.map(root, GVA, X + number)
    bench.start(roots[0])
    for _ in range(2):
        bench.take_log()
        for number, root in enumerate(roots):
            bench.load_cr3(0, root)
            assert bench.access(0, GVA) == X + number
    assert hidden(bench) == faults
    n_kept = len(roots) if kept is None else kept + 1
    assert sum(gfn in bench.traces for gfn in range(64)) == n_kept * len(spec.levels)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("S1", "V4")
@pytest.mark.parametrize("shared", [True, False])
def test_a_table_that_two_roots_link_has_one_shadow_or_one_for_each_place(
    spec: FormatSpec, shared: bool
) -> None:
    bench = Bench(spec, patch(share_roles=shared), n_vcpus=1)
    one, two = bench.frame(), bench.frame()
    leaf = bench.map(one, GVA, X)
    top = spec.top
    bench.memory.store(
        bench.at(two, top, GVA), spec.entry_bytes, bench.entry(bench.at(one, top, GVA))
    )
    bench.start(one)
    bench.access(0, GVA)
    bench.load_cr3(0, two)
    bench.take_log()
    bench.access(0, GVA)
    assert hidden(bench) == 1
    assert len(bench.submms[0].space.of_table(leaf >> 12)) == (1 if shared else 2)
    bench.access(0, 0x2000)
    bench.poke(0, leaf, Y << 12 | USED)
    for root in (one, two):  # the change reaches both
        bench.load_cr3(0, root)
        assert bench.access(0, GVA) == Y
    bench.assert_coherent()


# ---- traces that go ------------------------------------------------------------------------------


@both_formats
@pytest.mark.shows("V6", "S1")
@pytest.mark.parametrize("scheme", [patch(), shootdown(), out_of_sync()], ids=lambda s: s.name)
def test_the_trace_goes_with_the_last_shadow_when_shadow_memory_is_short(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench = Bench(spec, scheme, n_frames=400)
    roots = [bench.frame() for _ in range(90)]
    leaves = [bench.map(root, GVA, 350) for root in roots]
    bench.map(roots[0], 0x40_0000, leaves[1] >> 12, KERNEL)
    bench.start(roots[0])
    bench.load_cr3(1, roots[1])
    bench.access(1, GVA)
    for root in roots:
        bench.load_cr3(0, root)
        assert bench.access(0, GVA) == 350
    traced = {gfn for gfn in range(400) if gfn in bench.traces}
    shadowed = {page.role[0] for submm in bench.submms for page in submm.space.all_pages()}
    assert traced == shadowed, "no trace without a shadow, no shadow without a trace"
    assert {roots[1], leaves[1] >> 12} <= traced, "VCPU 1 still derives from them"
    assert roots[2] not in traced
    assert bench.submms[0].take_counts()["trace_removed"] > 50
    bench.load_cr3(0, roots[0])
    bench.take_log()
    bench.store(0, 0x40_0000 + (GVA >> 12) * spec.entry_bytes, 351 << 12 | USED)
    assert Seen("traced", -1, roots[2]) not in bench.take_log()
    bench.invlpg(1, GVA)
    assert bench.access(1, GVA) == 351
    bench.assert_coherent()


@pytest.mark.shows("V6")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("more", range(5))
def test_a_trace_wanted_for_a_fill_stays_whatever_is_evicted_on_the_way(
    more: int, shared: bool
) -> None:
    """A new path to a table whose only shadow is, for some `more`, the page to go next."""
    bench = Bench(X86_64, patch(share_roles=shared), n_frames=200, n_vcpus=1)
    one, two = bench.frame(), bench.frame()
    table = bench.map(one, GVA, X) >> 12
    bench.map(two, GVA, table, P | W | U | A, level=1)
    others = [bench.frame() for _ in range(15)]
    for root in others:
        bench.map(root, GVA, Y)
    for part in range(1, 1 + more):
        bench.map(others[-1], part << 21, Y)
    bench.start(one)
    assert bench.access(0, GVA) == X
    for root in others:
        bench.load_cr3(0, root)
        assert bench.access(0, GVA) == Y
    for part in range(1, 1 + more):
        assert bench.access(0, part << 21) == Y
    bench.load_cr3(0, two)
    assert bench.access(0, GVA) == X
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V6")
def test_both_tables_of_a_crossing_store_may_be_flooded(spec: FormatSpec) -> None:
    bench = Bench(spec, patch(flood=3))
    root, window = bench.frame(), 9 << spec.levels[1].shift
    span = 1 << spec.levels[1].shift
    tables = [bench.map(root, part * span + GVA, X + part) >> 12 for part in range(2)]
    for part, table in enumerate(tables):
        bench.map(root, window + (part << 12), table, KERNEL)
    bench.start(root)
    for part in range(2):
        bench.access(0, part * span + GVA)
    bench.store(0, window + 0x800, 0)  # one more for the first table
    for done in (0, 1):
        bench.do(0, Store(window + 0xFFC, 8, 0))
        assert [table in bench.traces for table in tables] == [not done, True]
    bench.store(0, window + 0x1800, 0)
    assert tables[1] not in bench.traces
    for part in range(2):
        assert bench.access(0, part * span + GVA) == X + part
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V6")
def test_a_store_that_begins_in_a_page_of_data_counts_for_the_table_it_ends_in(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec, patch(flood=2))
    root, window = bench.frame(), 9 << spec.levels[1].shift
    table = bench.map(root, GVA, X) >> 12
    bench.map(root, window, 60, KERNEL)
    bench.map(root, window + 0x1000, table, KERNEL)
    bench.start(root)
    bench.access(0, GVA)
    for traced in (True, False):
        bench.do(0, Store(window + 0xFFC, 8, 0))
        assert (table in bench.traces) is traced
    bench.assert_coherent()
