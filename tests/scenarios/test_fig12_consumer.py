"""Figure 12 as it reads: what a coherency event makes coherent, steps 860 to 880, and what not.

One VCPU stores (1), another one's event is looked at (0). Where nothing else is said, the guest has
two leaves in one table, FIRST and SECOND, and VCPU 0 has used both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penumbra.actors.core import Order
from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import (
    CR4_PGE,
    IA32,
    PAE,
    PF_P,
    PF_U,
    PF_W,
    PS,
    X86_64,
    A,
    D,
    FormatSpec,
    G,
    P,
    U,
    W,
)
from penumbra.hw.streams import WRITE
from tests.actors.vmm.bench import CR4, LINK, USED, Bench, Faulted, Seen, patch

# Where no rights, no A and no trace of the root are at stake.
every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
update_and_invalidate = pytest.mark.parametrize(
    "scheme", [patch(), patch("invalidate")], ids=["update", "invalidate"]
)

FIRST, SECOND, ELSEWHERE = 0x1000, 0x2000, 0x3_0000
OLD_1, OLD_2, NEW_1, NEW_2 = 40, 41, 42, 43


def two_pages(spec: FormatSpec, scheme: Scheme, flags: int = USED) -> tuple[Bench, int, int]:
    """Return a VM and the entries of the two pages, which VCPU 0 has used."""
    bench = Bench(spec, scheme)
    root = bench.frame()
    first = bench.map(root, FIRST, OLD_1, flags)
    second = bench.map(root, SECOND, OLD_2, flags)
    bench.start(root)
    assert [bench.access(0, gva) for gva in (FIRST, SECOND)] == [OLD_1, OLD_2]
    return bench, first, second


def move_both(bench: Bench, first: int, second: int, flags: int = USED) -> None:
    bench.poke(1, first, NEW_1 << 12 | flags)
    bench.poke(1, second, NEW_2 << 12 | flags)
    bench.take_log()


def uses(bench: Bench, vcpu: int = 0) -> list[int | Faulted]:
    return [bench.access(vcpu, gva) for gva in (FIRST, SECOND)]


@every_format
@update_and_invalidate
@pytest.mark.shows(
    "P4",
    "P5",
    "Fig 12 860",
    "Fig 12 862",
    "Fig 12 864",
    "Fig 12 866",
    "Fig 12 868",
    "Fig 12 872",
    "Fig 12 874",
    "Fig 12 876",
    "Fig 12 878",
)
def test_868_invlpg_covers_its_own_leaf_and_leaves_the_other_patch(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, first, second = two_pages(spec, scheme)
    move_both(bench, first, second)
    bench.invlpg(0, FIRST)
    seen = bench.matrix.statistics(1, 0)
    assert (seen.n_applied, seen.n_in_channel) == (1, 1)
    assert uses(bench) == [NEW_1, OLD_2]
    bench.invlpg(0, SECOND)
    assert uses(bench) == [NEW_1, NEW_2]
    assert bench.matrix.occupancy(1, 0) == 0
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("P4", "P5", "Fig 12 868", "Fig 12 870")
def test_870_a_patch_may_wait_for_many_events(spec: FormatSpec, scheme: Scheme) -> None:
    bench, first, second = two_pages(spec, scheme)
    move_both(bench, first, second)
    for _ in range(5):
        bench.invlpg(0, ELSEWHERE)
        assert uses(bench) == [OLD_1, OLD_2]
    assert bench.matrix.occupancy(1, 0) == 2
    bench.load_cr3(0, 1)
    assert uses(bench) == [NEW_1, NEW_2]
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("P5")
def test_an_event_is_one_only_where_it_happens(spec: FormatSpec, scheme: Scheme) -> None:
    bench, first, second = two_pages(spec, scheme)
    move_both(bench, first, second)
    bench.load_cr3(1, 1)
    assert (uses(bench, 0), uses(bench, 1)) == ([OLD_1, OLD_2], [NEW_1, NEW_2])
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("P5", "A40c 54", "EP8", "EP12")
def test_a_cr3_load_drains_what_was_postponed_under_another_root(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, first, second = two_pages(spec, scheme)
    other = bench.frame()
    bench.map(other, ELSEWHERE, 50)
    bench.load_cr3(0, other)
    move_both(bench, first, second)
    bench.invlpg(0, FIRST)  # under this root it covers nothing of the first root's tables
    assert bench.matrix.occupancy(1, 0) == 2
    assert bench.access(0, ELSEWHERE) == 50
    bench.load_cr3(0, 1)
    assert bench.matrix.occupancy(1, 0) == 0
    assert uses(bench) == [NEW_1, NEW_2]
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P5", "S1")
def test_shadows_survive_context_switches(spec: FormatSpec) -> None:
    bench, _, _ = two_pages(spec, patch())
    other = bench.frame()
    bench.map(other, ELSEWHERE, 50)
    bench.load_cr3(0, other)
    bench.access(0, ELSEWHERE)
    bench.take_log()
    for root in (1, other, 1, other):
        bench.load_cr3(0, root)
        assert bench.access(0, ELSEWHERE if root == other else FIRST) == (
            50 if root == other else OLD_1
        )
    assert bench.take_log() == []
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("P5")
def test_a_delivered_fault_covers_the_entries_its_own_address_uses(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, first, second = two_pages(spec, scheme, P | U | A)
    move_both(bench, first, second, P | U | A | D)
    assert bench.access(0, FIRST, WRITE) == Faulted(PF_P | PF_W | PF_U)
    assert uses(bench) == [NEW_1, OLD_2]
    bench.assert_coherent()


@both_formats
@update_and_invalidate
@pytest.mark.shows("P4", "P5", "Fig 12 868")
def test_invlpg_of_any_address_covers_upper_entries(spec: FormatSpec, scheme: Scheme) -> None:
    for level in range(1, spec.top + 1):
        bench, first, _ = two_pages(spec, scheme)
        bench.poke(1, bench.where(1, FIRST, level), 0)
        assert uses(bench) == [OLD_1, OLD_2]
        bench.invlpg(0, ELSEWHERE << 12)
        assert uses(bench) == [Faulted(PF_U), Faulted(PF_U)]
        assert bench.access(1, FIRST) == Faulted(PF_U), "VCPU 1 has derived nothing"
        assert bench.entry(first) == OLD_1 << 12 | USED
        bench.assert_coherent()


@both_formats
@update_and_invalidate
@pytest.mark.shows("P4", "P5")
def test_rights_taken_at_any_level_are_gone_after_the_event(
    spec: FormatSpec, scheme: Scheme
) -> None:
    for level in range(spec.top + 1):
        bench, _, _ = two_pages(spec, scheme)
        assert bench.access(0, FIRST, WRITE) == OLD_1
        at = bench.where(1, FIRST, level)
        bench.poke(1, at, bench.entry(at) & ~W)
        assert bench.access(0, FIRST, WRITE) == OLD_1
        bench.invlpg(0, FIRST)
        assert bench.access(0, FIRST, WRITE) == Faulted(PF_P | PF_W | PF_U)
        bench.poke(1, at, bench.entry(at) & ~U | W)
        bench.invlpg(0, FIRST)
        assert bench.access(0, FIRST) == Faulted(PF_P | PF_U)
        bench.assert_coherent()


@every_format
@pytest.mark.shows("P4", "Fig 12 874", "A40c 51")
def test_874_updating_spares_the_next_access_its_exit(spec: FormatSpec) -> None:
    bench, first, second = two_pages(spec, patch())
    move_both(bench, first, second)
    bench.load_cr3(0, 1)
    assert uses(bench) == [NEW_1, NEW_2]
    assert bench.take_log() == []


@every_format
@pytest.mark.shows("P4", "Fig 12 874", "A40c 50")
def test_874_invalidating_leaves_it_to_the_next_access(spec: FormatSpec) -> None:
    bench, first, second = two_pages(spec, patch("invalidate"))
    move_both(bench, first, second)
    bench.load_cr3(0, 1)
    assert uses(bench) == [NEW_1, NEW_2]
    assert bench.take_log() == [Seen("hidden", 0, FIRST), Seen("hidden", 0, SECOND)]


def still_valid(bench: Bench) -> None:
    pass


def trace_placed(bench: Bench) -> None:
    bench.place((60,))


def entry_changed(bench: Bench) -> None:
    first = bench.where(1, FIRST)
    bench.memory.store(first, bench.spec.entry_bytes, NEW_2 << 12 | USED)


def accessed_only(bench: Bench) -> None:
    first = bench.where(1, FIRST)
    bench.memory.store(first, bench.spec.entry_bytes, bench.entry(first) & ~A)


def made_clean(bench: Bench) -> None:
    first = bench.where(1, FIRST)
    bench.memory.store(first, bench.spec.entry_bytes, bench.entry(first) & ~D)


@every_format
@pytest.mark.shows("P9", "A40c 49", "A40c 50", "A40c 51", "A40c 52", "A40c 64", "A40c 70")
@pytest.mark.shows("Fig 9 394D", "Fig 9 394E", "Fig 12 866", "Fig 12 874", "EP3", "EP18", "EP20")
@pytest.mark.parametrize("stale", ["derive", "invalidate"])
@pytest.mark.parametrize(
    ("meanwhile", "order", "used"),
    [
        (still_valid, Order.CORRECT, 55),
        (accessed_only, Order.CORRECT, 55),
        (made_clean, Order.CORRECT, NEW_1),
        (trace_placed, Order.CORRECT, NEW_1),
        (trace_placed, Order.NO_COUNT_CHECK, 55),
        (entry_changed, Order.CORRECT, NEW_2),
        (entry_changed, Order.NO_SOURCE_COMPARE, 55),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_874_the_derived_value_is_used_only_while_it_is_valid(
    spec: FormatSpec, meanwhile: Callable[[Bench], None], order: Order, used: int, stale: str
) -> None:
    bench = Bench(spec, patch(stale=stale), order=order)
    first = bench.map(bench.frame(), FIRST, OLD_1)
    bench.start(1)
    bench.access(0, FIRST)
    # A made-up derived value, so that one sees it: guest frame 55, which no guest entry names.
    entry, derived = NEW_1 << 12 | USED, bench.memory.frame_view[55] << 12 | USED
    producer = bench.matrix.producer(1)
    producer.begin([(first & -4096, first & 4095)])
    bench.memory.store(first, spec.entry_bytes, entry)
    producer.stored()
    producer.post_all(1, first & -4096, first & 4095, derived, entry & ~A)
    producer.end()
    meanwhile(bench)
    bench.submms[0].event_invlpg(FIRST)
    bench.cpus[0].flush_all()
    bench.take_log()
    assert bench.access(0, FIRST) == used
    repaired = [] if used == 55 or stale == "derive" else [Seen("hidden", 0, FIRST)]
    assert bench.take_log() == repaired


@every_format
@update_and_invalidate
@pytest.mark.shows("P5")
def test_global_translations_outlive_cr3_loads_and_end_at_invlpg(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, first, second = two_pages(spec, scheme, USED | G)
    assert bench.cpus[0].tlb.entries()
    bench.load_cr3(0, 1)
    assert len(bench.cpus[0].tlb.entries()) == 2
    move_both(bench, first, second, USED | G)
    bench.invlpg(0, FIRST)
    assert uses(bench) == [NEW_1, OLD_2]
    bench.load_cr4(0, CR4[spec.name] & ~CR4_PGE)
    assert uses(bench) == [NEW_1, NEW_2]
    bench.load_cr3(0, 1)
    assert bench.cpus[0].tlb.entries() == {}
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("G7", "P5")
def test_an_event_anywhere_in_a_large_page_covers_all_of_it(
    spec: FormatSpec, scheme: Scheme
) -> None:
    frames = 1 << spec.levels[1].shift - 12
    bench = Bench(spec, scheme, n_frames=2 * frames)
    bench._next_frame = 60
    at = bench.map(bench.frame(), 0, 0, USED | PS, level=1)
    bench.start(60)
    assert uses(bench) == [1, 2]
    assert bench.submms[0].space.n_pages == spec.top + 1, "one page of pieces below the path"
    bench.poke(1, at, frames << 12 | USED | PS)
    assert uses(bench) == [1, 2]
    bench.invlpg(0, ELSEWHERE)
    assert uses(bench) == [frames + 1, frames + 2]
    small = bench.frame()
    bench.memory.store(small << 12 | spec.entry_bytes, spec.entry_bytes, OLD_1 << 12 | USED)
    bench.poke(1, at, small << 12 | LINK)
    bench.invlpg(0, SECOND)
    assert uses(bench) == [OLD_1, Faulted(PF_U)]
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("P5", "I4")
def test_a_write_through_a_clean_large_page_dirties_it(spec: FormatSpec, scheme: Scheme) -> None:
    bench = Bench(spec, scheme)
    bench._next_frame = 32
    at = bench.map(bench.frame(), 0, 0, P | W | U | PS, level=1)
    bench.start(32)
    assert bench.access(0, FIRST) == 1
    assert bench.entry(at) & (A | D) == A
    assert (bench.access(0, SECOND, WRITE), bench.entry(at) & (A | D)) == (2, A | D)
    assert bench.access(0, FIRST, WRITE) == 1
    bench.assert_coherent()


@pytest.mark.shows("P4")
def test_one_table_under_two_uppers_keeps_the_rights_of_each() -> None:
    bench = Bench(IA32, patch())
    root = bench.frame()
    bench.map(root, FIRST, OLD_1)
    shared = bench.entry(bench.where(root, FIRST, 1))
    alias = 1 << 22
    bench.memory.store(bench.at(root, 1, alias), 4, shared & ~W)
    bench.start(root)
    assert bench.access(0, FIRST, WRITE) == OLD_1
    assert bench.access(0, alias + FIRST) == OLD_1
    assert bench.access(0, alias + FIRST, WRITE) == Faulted(PF_P | PF_W | PF_U)
    assert bench.submms[0].space.n_pages == 2, "root and table"
    bench.poke(1, bench.where(root, FIRST), NEW_1 << 12 | USED)
    bench.invlpg(0, alias + FIRST)
    assert bench.access(0, alias + FIRST) == NEW_1
    bench.invlpg(0, FIRST)
    assert bench.access(0, FIRST, WRITE) == NEW_1
    bench.assert_coherent()


@every_format
@update_and_invalidate
@pytest.mark.shows("P5", "H5")
def test_an_event_ends_a_global_translation_of_another_address_space(
    spec: FormatSpec, scheme: Scheme
) -> None:
    for by_fault in (False, True):
        bench, _, _ = two_pages(spec, scheme, P | U | A | G)
        other = bench.frame()
        bench.map(other, FIRST, NEW_1, P | U | A)
        bench.load_cr3(0, other)
        assert bench.access(0, FIRST) == OLD_1, "as on hardware that keeps globals"
        if by_fault:
            assert bench.access(0, FIRST, WRITE) == Faulted(PF_P | PF_W | PF_U)
        else:
            bench.invlpg(0, FIRST)
        assert bench.access(0, FIRST) == NEW_1
        bench.assert_coherent()
