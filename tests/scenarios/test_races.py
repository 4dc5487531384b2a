"""Races of the protocol as a guest meets them: with one step left out an access goes wrong.

Requirements, races 1 and 5; the others need two sides that run at once and are shown on the
channels alone (`tests/actors/core`). The guest flushes as it should in each.
"""

from __future__ import annotations

import pytest

from penumbra.actors.core import Order
from penumbra.hw.formats import IA32, PAE, PF_P, PF_U, PF_W, X86_64, A, D, FormatSpec, P, U, W
from tests.actors.vmm.bench import LINK, USED, Bench, Faulted, patch

every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)

GVA = 0x1000
OLD, MIDDLE, LAST = 40, 41, 42
READ_ONLY = P | U | A | D
CLEAN = P | W | U | A


def two_producers(spec: FormatSpec, order: Order, last: int) -> Bench:
    """VCPU 1 stores, then VCPU 0 stores `last`; VCPU 2 reads 0's channel first, and flushes."""
    bench = Bench(spec, patch(), n_vcpus=3, order=order)
    leaf = bench.map(bench.frame(), GVA, OLD)
    bench.start(1)
    for vcpu in range(3):
        assert bench.access(vcpu, GVA) == OLD
    bench.poke(1, leaf, MIDDLE << 12 | USED)
    bench.poke(0, leaf, last)
    bench.invlpg(2, GVA)
    return bench


@every_format
@pytest.mark.shows("P9", "race 1")
@pytest.mark.parametrize(
    ("last", "write", "read"),
    [
        (LAST << 12 | USED, LAST, LAST),
        (MIDDLE << 12 | READ_ONLY, Faulted(PF_P | PF_W | PF_U), MIDDLE),
        (MIDDLE << 12 | CLEAN, MIDDLE, MIDDLE),
        (0, Faulted(PF_W | PF_U), Faulted(PF_U)),
    ],
    ids=["another frame", "fewer rights", "not dirty", "gone"],
)
def test_race_1_the_later_store_of_another_producer_counts(
    spec: FormatSpec, last: int, write: int | Faulted, read: int | Faulted
) -> None:
    bench = two_producers(spec, Order.CORRECT, last)
    assert (bench.access(2, GVA, 1), bench.access(2, GVA)) == (write, read)
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P9", "race 1", "C2")
@pytest.mark.parametrize(
    "last", [LAST << 12 | USED, MIDDLE << 12 | READ_ONLY, MIDDLE << 12 | CLEAN]
)
def test_race_1_without_the_source_comparison_the_older_value_comes_back(
    spec: FormatSpec, last: int
) -> None:
    bench = two_producers(spec, Order.NO_SOURCE_COMPARE, last)
    assert bench.access(2, GVA, 1) == MIDDLE
    verdict = bench.oracle.verdict()
    assert (verdict.coherent, verdict.n_violations) == (False, 1)


def traced_between_post_and_event(spec: FormatSpec, order: Order) -> tuple[Bench, int, int]:
    """A patch says `writable`; before its event the frame becomes a page table.

    Returns:
        The VM, the address whose entry lies in the new table, and that entry's place in the page
        that VCPU 1 may write.
    """
    bench = Bench(spec, patch(), order=order)
    root = bench.frame()
    leaf = bench.map(root, GVA, OLD)
    through = (spec.levels[0].n_entries - 1) << 12
    bench.map(root, through, OLD)
    table = bench.frame()
    bench.memory.store(table << 12, spec.entry_bytes, OLD << 12 | USED)
    bench.start(root)
    for vcpu in (0, 1):
        bench.access(vcpu, GVA)
    bench.poke(0, leaf, table << 12 | USED)
    region = 1 << spec.levels[1].shift
    bench.poke(0, bench.where(root, region, 1), table << 12 | LINK)
    assert bench.access(0, region) == OLD
    assert table in bench.traces
    bench.invlpg(1, GVA)
    return bench, region, GVA


@every_format
@pytest.mark.shows("P9", "V6", "race 5")
def test_race_5_a_derived_value_older_than_a_trace_is_not_used(spec: FormatSpec) -> None:
    bench, region, gva = traced_between_post_and_event(spec, Order.CORRECT)
    bench.store(1, gva, LAST << 12 | USED, user=True)
    assert [seen.what for seen in bench.take_log()][-1] == "emulated"
    bench.invlpg(0, region)
    assert bench.access(0, region) == LAST
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P9", "V6", "race 5", "C2")
def test_race_5_without_the_count_check_a_store_to_a_table_is_never_seen(spec: FormatSpec) -> None:
    bench, region, gva = traced_between_post_and_event(spec, Order.NO_COUNT_CHECK)
    bench.store(1, gva, LAST << 12 | USED, user=True)
    bench.invlpg(0, region)
    assert bench.access(0, region) == OLD
    assert not bench.oracle.verdict().coherent


@every_format
@pytest.mark.shows("P4", "C2")
def test_a_patch_left_in_its_channel_and_forgotten_is_lost(spec: FormatSpec) -> None:
    for order, used in ((Order.CORRECT, LAST), (Order.LEFT_UNMARKED, OLD)):
        bench = Bench(spec, patch(), order=order)
        leaf = bench.map(bench.frame(), GVA, OLD)
        bench.start(1)
        bench.access(0, GVA)
        bench.poke(1, leaf, LAST << 12 | USED)
        bench.invlpg(0, 0x7000)  # does not cover it
        bench.invlpg(0, GVA)
        assert bench.access(0, GVA) == used
        assert bench.oracle.verdict().coherent == (used == LAST)
