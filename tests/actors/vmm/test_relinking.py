"""Shadow pages that are put away and found again: nothing in them may be older than it was allowed.

A shadow page leaves the tables in use when the guest unlinks its table, when another root is
loaded, or when memory is short; its entries stay. Each of these tests is a guest that does all the
flushing it has to.
"""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import IA32, PAE, PS, X86_64, FormatSpec, G
from penumbra.hw.operations import Fill
from penumbra.hw.streams import READ, WRITE

from .bench import LINK, USED, Bench, patch, shootdown

SCHEMES = [patch(), patch("invalidate"), patch(capacity=1), shootdown()]
IDS = ["patch", "patch-invalidate", "patch-one-slot", "shootdown"]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)

PAGE, NEIGHBOUR, ELSEWHERE = 0x1000, 0x2000, 0x3F_0000
X, Y = 40, 41  # data frames


@every_scheme
@every_format
@pytest.mark.shows("P4", "V2")
def test_a_table_linked_again_is_drained_first(spec: FormatSpec, scheme: Scheme) -> None:
    bench = Bench(spec, scheme)
    root = bench.frame()
    leaf = bench.map(root, PAGE, X)
    bench.map(root, NEIGHBOUR, Y)
    bench.start(root)
    assert bench.access(0, PAGE) == X
    for level in range(1, spec.top + 1):
        upper = bench.where(root, PAGE, level)
        linked = bench.entry(upper)
        bench.poke(0, upper, 0)
        bench.invlpg(0, ELSEWHERE)  # any address will do for an upper-level entry
        new = Y if bench.entry(leaf) >> 12 == X else X
        bench.poke(0, leaf, new << 12 | USED)
        bench.invlpg(0, PAGE)
        bench.poke(0, upper, linked)
        bench.access(0, NEIGHBOUR)
        assert bench.access(0, PAGE) == new, f"level {level}"
        bench.assert_coherent()


@every_scheme
@pytest.mark.shows("P4", "V2")
def test_the_entry_a_fill_installs_is_heard_of_though_its_patch_was_drained_on_the_way(
    scheme: Scheme,
) -> None:
    bench = Bench(IA32, scheme)
    root = bench.frame()
    leaf = bench.map(root, PAGE, X)
    bench.start(root)
    upper = bench.where(root, PAGE, 1)
    linked = bench.entry(upper)
    bench.access(0, PAGE)
    bench.poke(0, upper, 0)
    bench.invlpg(0, PAGE)
    bench.poke(0, leaf, X << 12 | LINK & ~0x20)  # the patch says: derives nothing, A is clear
    bench.poke(0, upper, linked)
    assert bench.access(0, PAGE) == X
    bench.check()
    bench.poke(1, leaf, Y << 12 | USED)
    bench.invlpg(0, PAGE)
    assert bench.access(0, PAGE) == Y
    bench.assert_coherent()


@every_scheme
@every_format
@pytest.mark.shows("G7", "V2")
def test_pieces_of_a_large_page_do_not_come_back(spec: FormatSpec, scheme: Scheme) -> None:
    large = spec.levels[1].shift
    frames = 1 << large - 12
    bench = Bench(spec, scheme, n_frames=2 * frames + 8)
    bench._next_frame = 2 * frames  # the tables lie above both large pages
    root = bench.frame()
    at = bench.map(root, 0, 0, USED | PS, level=1)
    small = bench.frame()
    for index in range(4):
        entry = (small << 12) + index * spec.entry_bytes
        bench.memory.store(entry, spec.entry_bytes, (frames + 20 + index) << 12 | USED)
    bench.start(root)
    assert [bench.access(0, gva) for gva in (0x1000, 0x2000)] == [1, 2]
    bench.poke(0, at, small << 12 | LINK)  # split: the untouched piece is the first seen
    bench.access(0, 0x3000)
    bench.invlpg(0, 0x1000)
    assert [bench.access(0, gva) for gva in (0x1000, 0x3000)] == [frames + 21, frames + 23]
    bench.poke(0, at, frames << 12 | USED | PS)  # joined again, in another frame
    for gva in range(0, 0x4000, 0x1000):
        bench.invlpg(0, gva)
    assert [bench.access(0, gva) for gva in (0x3000, 0x1000)] == [frames + 3, frames + 1]
    bench.assert_coherent()


@every_scheme
@every_format
@pytest.mark.shows("G7", "V2")
def test_a_table_whose_frame_becomes_the_large_page_is_unlinked(
    spec: FormatSpec, scheme: Scheme
) -> None:
    frames = 1 << spec.levels[1].shift - 12
    bench = Bench(spec, scheme, n_frames=2 * frames)
    root = bench.frame()
    at = bench.map(root, 0, 0, LINK, level=1)
    bench.memory.store(at, spec.entry_bytes, frames << 12 | LINK)
    bench.memory.store(bench.where(root, PAGE), spec.entry_bytes, X << 12 | USED)
    bench.start(root)
    assert bench.access(0, PAGE) == X
    bench.poke(0, at, frames << 12 | USED | PS)
    bench.invlpg(0, PAGE)
    assert bench.access(0, PAGE) == frames + 1
    bench.assert_coherent()


@every_scheme
@pytest.mark.shows("V6")
def test_a_trace_reaches_every_alias_of_an_upper_table(scheme: Scheme) -> None:
    alias = 1 << X86_64.levels[3].shift
    bench = Bench(X86_64, scheme)
    root = bench.frame()
    bench.map(root, PAGE, X)
    bench.map(root, NEIGHBOUR, Y)
    shared = bench.entry(bench.where(root, PAGE, 3))
    bench.memory.store(bench.at(root, 3, alias), 8, shared)
    bench.start(root)
    bench.access(0, PAGE, WRITE)
    bench.access(0, alias + NEIGHBOUR)  # links the shared table at its second place
    assert bench.access(0, alias + PAGE, WRITE) == X
    bench.place((X,))
    bench.check()
    bench.take_log()
    bench.access(0, alias + PAGE, WRITE)
    assert [seen.what for seen in bench.take_log()] == ["emulated"]
    bench.assert_coherent()


@every_scheme
@pytest.mark.shows("V2")
def test_short_of_memory_the_path_under_way_keeps_its_place(scheme: Scheme) -> None:
    bench = Bench(X86_64, scheme, n_frames=128)
    root = bench.frame()
    slots = [index << 39 for index in range(21)]
    leaves = [bench.map(root, gva + PAGE, 100 + number) for number, gva in enumerate(slots)]
    bench.map(root, slots[1] + (1 << 30), 125)
    bench.start(root)
    assert [bench.access(0, gva + PAGE) for gva in slots] == list(range(100, 121))
    # All 64 shadow pages are in use. Two more push out the first path's two middle tables.
    bench.access(0, slots[1] + (1 << 30))
    bench.check()
    for gva, leaf in zip(slots, leaves, strict=True):
        bench.access(0, gva + PAGE)
        bench.check()
        bench.poke(1, leaf, 126 << 12 | USED)
        bench.invlpg(0, gva + PAGE)
        assert bench.access(0, gva + PAGE) == 126
    bench.assert_coherent()


@every_scheme
@pytest.mark.shows("V2")
def test_pieces_of_a_large_page_go_with_the_table_that_linked_them(scheme: Scheme) -> None:
    bench = Bench(IA32, scheme, n_frames=1200)
    bench._next_frame = 1100
    old, new = bench.frame(), bench.frame()
    large = bench.map(old, 0, 0, USED | PS, level=1)
    for number in range(62):
        bench.map(new, number + 1 << 22, 70)
    bench.start(old)
    assert [bench.access(0, gva) for gva in (0x1000, 0x2000)] == [1, 2]
    bench.load_cr3(0, new)
    for number in range(62):
        bench.access(0, number + 1 << 22)
        bench.check()
    bench.poke(1, large, 1024 << 12 | USED | PS)
    bench.load_cr3(0, old)
    assert [bench.access(0, gva) for gva in (0x1000, 0x2000)] == [1025, 1026]
    bench.assert_coherent()


@every_scheme
@pytest.mark.shows("V6")
def test_a_store_may_cross_from_a_page_into_a_traced_one(scheme: Scheme) -> None:
    bench = Bench(IA32, scheme)
    root = bench.frame()
    leaf = bench.map(root, 0, X)
    table = leaf >> 12
    bench.map(root, 0x5000, Y)
    bench.map(root, 0x6000, table)
    bench.start(root)
    bench.access(0, 0)
    bench.do(0, Fill(0x5000, 4096, 0), user=True)
    assert bench.store(0, 0x5FFE, (Y << 12 | USED) << 16 & 0xFFFF_FFFF, size=4) == table
    bench.invlpg(0, 0)
    low = Y << 12 | USED
    assert bench.entry(leaf) & 0xFFFF == low & 0xFFFF
    bench.access(0, 0, READ)
    bench.assert_coherent()


@every_scheme
@every_format
@pytest.mark.shows("G7", "H5")
def test_no_piece_of_a_global_large_page_outlives_an_event_in_it(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench = Bench(spec, scheme)
    bench._next_frame = 32
    with_large, with_small = bench.frame(), bench.frame()
    bench.map(with_large, 0, 0, USED | PS | G, level=1)
    bench.map(with_small, PAGE, X)
    bench.start(with_large)
    assert bench.access(0, PAGE) == PAGE >> 12
    bench.load_cr3(0, with_small)
    bench.invlpg(0, NEIGHBOUR)
    assert bench.access(0, PAGE) == X
    bench.assert_coherent()
