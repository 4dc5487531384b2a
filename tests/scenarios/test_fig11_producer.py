"""Figure 11 as it reads: a guest's store to a traced table, steps 831 to 848.

VCPUs A, B, C and D are 0 to 3. A and C have derived from the entry; B and D are bystanders.
"""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import IA32, PAE, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.operations import CompareExchange, Exchange
from tests.actors.vmm.bench import LINK, USED, Bench, Seen, patch, shootdown

# Where no rights, no A and no trace of the root are at stake.
every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)

VCPU_A, VCPU_B, VCPU_C, VCPU_D = range(4)
SECOND_GVPN, OTHER = 0x2000, 0x5000
THIRD_GPPN, FOURTH_GPPN, OTHER_GPPN = 43, 44, 45
NONE = [0, 0, 0, 0]


def page_table_292a(spec: FormatSpec, scheme: Scheme) -> tuple[Bench, int, int]:
    """Return a VM after ¶105, the entry of the second GVPN and that of another page."""
    bench = Bench(spec, scheme, n_vcpus=4)
    root = bench.frame()
    second = bench.map(root, SECOND_GVPN, THIRD_GPPN)
    other = bench.map(root, OTHER, OTHER_GPPN)
    bench.start(root)
    assert [bench.access(vcpu, SECOND_GVPN) for vcpu in (VCPU_A, VCPU_C)] == [THIRD_GPPN] * 2
    bench.take_log()
    return bench, second, other


def in_channels(bench: Bench) -> list[list[int]]:
    """Return the patches in each channel, a row for each producer."""
    return [[bench.matrix.occupancy(*pair) for pair in row] for row in bench.matrix.channels()]


@every_format
@pytest.mark.shows(
    "P3",
    "Fig 11 830",
    "Fig 11 831",
    "Fig 11 832",
    "Fig 11 834",
    "Fig 11 838",
    "Fig 11 840",
    "Fig 11 842",
    "Fig 11 848",
)
def test_832_only_those_who_derived_from_the_entry_are_told(spec: FormatSpec) -> None:
    bench, second, _ = page_table_292a(spec, patch())
    bench.poke(VCPU_A, second, FOURTH_GPPN << 12 | USED)
    assert bench.entry(second) == FOURTH_GPPN << 12 | USED  # 831
    assert in_channels(bench) == [[1, 0, 1, 0], NONE, NONE, NONE]
    assert bench.take_log() == []
    assert [bench.access(vcpu, SECOND_GVPN) for vcpu in (VCPU_A, VCPU_C)] == [THIRD_GPPN] * 2
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P3", "Fig 11 832")
def test_without_832_every_vcpu_is_told(spec: FormatSpec) -> None:
    bench, second, _ = page_table_292a(spec, patch(tell_all=True))
    bench.poke(VCPU_A, second, FOURTH_GPPN << 12 | USED)
    assert in_channels(bench) == [[1, 1, 1, 1], NONE, NONE, NONE]
    for vcpu in range(4):
        bench.invlpg(vcpu, SECOND_GVPN)
        assert bench.access(vcpu, SECOND_GVPN) == FOURTH_GPPN
    assert in_channels(bench) == [NONE] * 4
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P3", "P12")
def test_a_bystander_writes_by_its_own_channels(spec: FormatSpec) -> None:
    bench, second, _ = page_table_292a(spec, patch())
    bench.poke(VCPU_B, second, FOURTH_GPPN << 12 | USED)
    assert in_channels(bench) == [NONE, [1, 0, 1, 0], NONE, NONE]
    bench.invlpg(VCPU_C, SECOND_GVPN)
    assert (bench.access(VCPU_C, SECOND_GVPN), bench.access(VCPU_A, SECOND_GVPN)) == (44, 43)
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V6", "P3", "A40 ¶95-96")
def test_nobody_is_told_of_an_entry_nothing_derives_from(spec: FormatSpec) -> None:
    bench, second, other = page_table_292a(spec, patch())
    bench.poke(VCPU_A, other, FOURTH_GPPN << 12 | USED)
    bench.poke(VCPU_A, second & -4096 | 0x40, 0)
    assert in_channels(bench) == [NONE] * 4
    assert bench.access(VCPU_A, OTHER) == FOURTH_GPPN
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P3", "Fig 11 836", "Fig 11 837")
def test_836_stores_to_one_entry_coalesce_into_its_patch(spec: FormatSpec) -> None:
    bench, second, _ = page_table_292a(spec, patch())
    for gppn in (OTHER_GPPN, 46, FOURTH_GPPN):
        bench.poke(VCPU_A, second, gppn << 12 | USED)
    seen = [bench.matrix.statistics(VCPU_A, consumer) for consumer in (VCPU_A, VCPU_C)]
    assert [(one.n_posted, one.n_coalesced, one.n_in_channel) for one in seen] == [(1, 2, 1)] * 2
    bench.invlpg(VCPU_C, SECOND_GVPN)
    assert bench.access(VCPU_C, SECOND_GVPN) == FOURTH_GPPN
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P3", "P10", "Fig 11 838", "Fig 11 844", "A40 ¶109")
def test_844_a_full_channel_shoots_down_its_own_consumer_and_no_other(spec: FormatSpec) -> None:
    bench, second, other = page_table_292a(spec, patch(capacity=1))
    bench.access(VCPU_C, OTHER)
    bench.take_log()
    bench.poke(VCPU_A, other, 46 << 12 | USED)  # fills A's channel to C
    bench.poke(VCPU_A, second, FOURTH_GPPN << 12 | USED)
    assert in_channels(bench) == [[1, 0, 1, 0], NONE, NONE, NONE]
    key = (second & -4096, second & 4095)
    assert bench.take_log() == [Seen("shot down", VCPU_C, key)]
    assert bench.access(VCPU_C, SECOND_GVPN) == FOURTH_GPPN, "invalid: read from the table again"
    assert bench.access(VCPU_C, OTHER) == OTHER_GPPN, "its patch still waits"
    assert bench.access(VCPU_A, SECOND_GVPN) == THIRD_GPPN, "its patch still waits"
    for vcpu in (VCPU_A, VCPU_C):
        bench.load_cr3(vcpu, 1)
        assert [bench.access(vcpu, gva) for gva in (SECOND_GVPN, OTHER)] == [44, 46]
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P10", "K3")
def test_844_a_producer_shoots_itself_down_too(spec: FormatSpec) -> None:
    bench, second, other = page_table_292a(spec, patch(capacity=1))
    bench.access(VCPU_A, OTHER)
    bench.take_log()
    bench.poke(VCPU_A, second, FOURTH_GPPN << 12 | USED)
    bench.poke(VCPU_A, other, 46 << 12 | USED)
    assert bench.take_log() == [Seen("shot down", VCPU_A, (other & -4096, other & 4095))]
    assert bench.access(VCPU_A, OTHER) == 46
    bench.assert_coherent()


@every_format
@pytest.mark.shows("S1", "P10")
def test_immediate_propagation_shoots_every_consumer_down_at_the_store(spec: FormatSpec) -> None:
    bench, second, _ = page_table_292a(spec, shootdown())
    bench.poke(VCPU_B, second, FOURTH_GPPN << 12 | USED)
    key = (second & -4096, second & 4095)
    assert bench.take_log() == [Seen("shot down", vcpu, key) for vcpu in (VCPU_A, VCPU_C)]
    assert in_channels(bench) == [NONE] * 4
    assert [bench.access(vcpu, SECOND_GVPN) for vcpu in (VCPU_A, VCPU_C)] == [FOURTH_GPPN] * 2
    bench.assert_coherent()


@pytest.mark.shows("P3", "Fig 11 831", "EP10")
@pytest.mark.parametrize(
    ("offset", "size", "touched"),
    [(0, 4, 1), (0, 8, 2), (1, 1, 1), (2, 4, 2), (2, 8, 3), (3, 2, 2)],
)
def test_831_one_patch_for_each_entry_a_store_touches(offset: int, size: int, touched: int) -> None:
    bench = Bench(IA32, patch())
    root = bench.frame()
    table = bench.map(root, 0, 40) >> 12
    for number in range(1, 3):
        bench.map(root, number << 12, 40 + number)
    bench.map(root, 0x9000, table, P | W | A | D)
    bench.start(root)
    for number in range(3):
        bench.access(1, number << 12)
    before = bench.ram.load(bench.memory.hpa(table << 12 | offset) or 0, size)
    bench.store(0, 0x9000 + offset, before ^ 1, size=size)
    assert in_channels(bench) == [[0, touched], [0, 0]]
    assert bench.ram.load(bench.memory.hpa(table << 12 | offset) or 0, size) == before ^ 1
    for number in range(3):
        bench.invlpg(1, number << 12)
        bench.access(1, number << 12)
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P3", "G3")
def test_831_locked_operations_are_made_as_the_guest_meant_them(spec: FormatSpec) -> None:
    bench, second, _ = page_table_292a(spec, patch())
    width, old, new = spec.entry_bytes, THIRD_GPPN << 12 | USED, FOURTH_GPPN << 12 | USED
    window = 0x8000
    bench.map(1, window, second >> 12, P | W | A | D)
    at = window + (second & 4095)
    bench.do(VCPU_B, CompareExchange(at, width, 0, 1))
    assert bench.entry(second) == old
    bench.do(VCPU_B, CompareExchange(at, width, old, new))
    assert bench.entry(second) == new
    bench.do(VCPU_B, Exchange(at, width, old & ~P))
    assert bench.entry(second) == old & ~P
    assert in_channels(bench)[VCPU_B] == [1, 0, 1, 0]
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V6")
def test_a_trace_takes_the_right_to_write_from_shadows_and_tlbs_of_every_cpu(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec, patch())
    root = bench.frame()
    target = bench.frame()  # a data page, later a page table
    bench.map(root, 0x1000, target, P | W | U | A | D)
    bench.map(root, 0x3000, target, P | W | U | A | D)
    bench.start(root)
    for vcpu in (0, 1):
        for gva in (0x1000, 0x3000):
            bench.access(vcpu, gva, 1)
    gva = 0x4000_0000 if spec is IA32 else 1 << 40
    # Below four levels one page serves as every lower table.
    entry = 50 << 12 | USED if spec is IA32 else target << 12 | LINK
    bench.poke(0, target << 12, entry)
    bench.poke(0, bench.where(root, gva, spec.top), target << 12 | LINK)
    bench.access(0, gva)
    assert target in bench.traces
    bench.check()
    bench.take_log()
    for vcpu in (0, 1):
        for gva in (0x1000, 0x3000):
            bench.store(vcpu, gva + 0x40, USED | 50 << 12, user=True)
    assert [seen.what for seen in bench.take_log()] == ["emulated"] * 4
    bench.assert_coherent()
