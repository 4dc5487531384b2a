"""The example of ¶86-91 and ¶105-122, names and numbers as in the text.

VCPUs A and C share guest OS page table 292A; B is the bystander that may write it all the same (its
own address space is 292B); D has 292C.
"""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import IA32, PAE, PAGE_SHIFT, X86_64, FormatSpec, P
from tests.actors.vmm.bench import USED, Bench, patch, shootdown

every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
KINDS = ["pair-locked", "shared", "per-producer", "per-consumer"]
patch_schemes = pytest.mark.parametrize(
    "scheme",
    [patch(), patch("invalidate"), patch(capacity=1), *(patch(channels=kind) for kind in KINDS)],
    ids=["update", "invalidate", "one", *KINDS],
)

A, B, C, D = range(4)
FIRST_GVPN, SECOND_GVPN = 0x1000, 0x2000
FIRST_GPPN, SECOND_GPPN, THIRD_GPPN, FOURTH_GPPN = 41, 42, 43, 44


class Example:
    """The VM of Figure 6 with 292A mapping both GVPNs."""

    def __init__(self, spec: FormatSpec, scheme: Scheme) -> None:
        self.bench = bench = Bench(spec, scheme, n_vcpus=4)
        tables = [bench.frame() for _ in range(3)]
        self.table_292a = tables[0]
        self.first = bench.map(tables[0], FIRST_GVPN, FIRST_GPPN)
        self.second = bench.map(tables[0], SECOND_GVPN, THIRD_GPPN)
        for other in tables[1:]:
            bench.map(other, FIRST_GVPN, 50)
        bench.start(tables[0], tables[1], tables[0], tables[2])

    def used(self, gvpn: int) -> list[int | object]:
        """Return the frames that A and C use."""
        return [self.bench.access(vcpu, gvpn) for vcpu in (A, C)]


def shadowed(bench: Bench, vcpu: int, gvpn: int) -> int:
    """Return the machine frame to which a CPU's shadow table in RAM leads, read by hand."""
    spec, address = bench.spec, int(bench.cpus[vcpu].reg[0])
    for level in range(spec.top, -1, -1):
        at = address + spec.levels[level].index(gvpn) * spec.entry_bytes
        entry = bench.ram.load(at, spec.entry_bytes)
        assert entry & P
        address = entry & spec.frame_mask
    return address >> PAGE_SHIFT


@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
@pytest.mark.shows("G1", "V4", "A40 Fig 6")
def test_figure_6_four_cpus_have_a_shadow_each_of_three_sets_of_guest_tables(
    spec: FormatSpec,
) -> None:
    bench = Example(spec, patch()).bench
    assert [bench.access(vcpu, FIRST_GVPN) for vcpu in (A, B, C, D)] == [
        FIRST_GPPN, 50, FIRST_GPPN, 50,
    ]  # fmt: skip
    tables = [submm.registers.cr3 for submm in bench.submms]
    assert tables[A] == tables[C], "292A"
    assert len(set(tables)) == 3, "and 292B, 292C"
    shadows = [int(cpu.reg[0]) for cpu in bench.cpus]
    assert len(set(shadows)) == 4, "392A to 392D"
    assert not {bench.memory.hpa(table) for table in tables} & set(shadows)
    machine = bench.memory.frame_view
    assert [shadowed(bench, vcpu, FIRST_GVPN) for vcpu in (A, B, C, D)] == [
        machine[FIRST_GPPN], machine[50], machine[FIRST_GPPN], machine[50],
    ]  # fmt: skip
    bench.assert_coherent()


@every_format
@patch_schemes
@pytest.mark.shows("P12", "P5", "A40 ¶86-90")
def test_a_remap_is_seen_by_each_vcpu_after_its_own_invlpg(
    spec: FormatSpec, scheme: Scheme
) -> None:
    example = Example(spec, scheme)
    bench = example.bench
    assert example.used(FIRST_GVPN) == [FIRST_GPPN, FIRST_GPPN]
    bench.poke(A, example.first, SECOND_GPPN << 12 | USED)
    assert example.used(FIRST_GVPN) == [FIRST_GPPN, FIRST_GPPN], "as the VTLBs still hold it"
    bench.invlpg(A, FIRST_GVPN)
    assert example.used(FIRST_GVPN) == [SECOND_GPPN, FIRST_GPPN]
    bench.invlpg(C, FIRST_GVPN)  # the guest's own shootdown has reached C
    assert example.used(FIRST_GVPN) == [SECOND_GPPN, SECOND_GPPN]
    assert [bench.access(vcpu, FIRST_GVPN) for vcpu in (B, D)] == [50, 50]
    bench.assert_coherent()


@every_format
@pytest.mark.shows("P12", "S1", "A40 ¶91")
def test_a_shadow_page_table_shootdown_leaves_nothing_to_the_events(spec: FormatSpec) -> None:
    example = Example(spec, shootdown())
    bench = example.bench
    assert example.used(FIRST_GVPN) == [FIRST_GPPN, FIRST_GPPN]
    bench.take_log()
    bench.poke(A, example.first, SECOND_GPPN << 12 | USED)
    assert [(seen.what, seen.vcpu) for seen in bench.take_log()] == [
        ("shot down", A),
        ("shot down", C),
    ]
    assert example.used(FIRST_GVPN) == [SECOND_GPPN, SECOND_GPPN]
    bench.assert_coherent()


@every_format
@patch_schemes
@pytest.mark.shows("P12", "P3", "P4", "A40 ¶105-122")
def test_a_writes_c_flushes_and_a_is_left_as_it_was(spec: FormatSpec, scheme: Scheme) -> None:
    example = Example(spec, scheme)
    bench, matrix = example.bench, example.bench.matrix
    assert example.used(SECOND_GVPN) == [THIRD_GPPN, THIRD_GPPN]
    bench.poke(A, example.second, FOURTH_GPPN << 12 | USED)
    posted = [(pair, matrix.occupancy(*pair)) for row in matrix.channels() for pair in row]
    assert [pair for pair, n in posted if n] == [(A, A), (A, C)]  # A2A PC and A2C PC
    assert example.used(SECOND_GVPN) == [THIRD_GPPN, THIRD_GPPN]
    bench.invlpg(C, SECOND_GVPN)
    assert (matrix.occupancy(A, A), matrix.occupancy(A, C)) == (1, 0)
    assert example.used(SECOND_GVPN) == [THIRD_GPPN, FOURTH_GPPN]
    bench.invlpg(A, SECOND_GVPN)
    assert example.used(SECOND_GVPN) == [FOURTH_GPPN, FOURTH_GPPN]
    bench.assert_coherent()


@every_format
@patch_schemes
@pytest.mark.shows("P12", "G1", "A40 ¶24")
def test_a_bystander_changes_a_table_it_does_not_use(spec: FormatSpec, scheme: Scheme) -> None:
    example = Example(spec, scheme)
    bench, matrix = example.bench, example.bench.matrix
    assert example.used(SECOND_GVPN) == [THIRD_GPPN, THIRD_GPPN]
    bench.poke(B, example.second, FOURTH_GPPN << 12 | USED)
    assert [matrix.occupancy(B, consumer) for consumer in range(4)] == [1, 0, 1, 0]
    for vcpu in (A, C):
        bench.invlpg(vcpu, SECOND_GVPN)
    assert example.used(SECOND_GVPN) == [FOURTH_GPPN, FOURTH_GPPN]
    bench.assert_coherent()


@every_format
@patch_schemes
@pytest.mark.shows("P12", "A40c 48", "A40c 53", "A40c 60", "A40c 63", "A40c 69")
def test_claim_48_two_entries_two_channels_two_events(spec: FormatSpec, scheme: Scheme) -> None:
    example = Example(spec, scheme)
    bench, matrix = example.bench, example.bench.matrix
    assert bench.access(A, FIRST_GVPN) == FIRST_GPPN
    assert bench.access(C, SECOND_GVPN) == THIRD_GPPN
    bench.poke(A, example.first, SECOND_GPPN << 12 | USED)  # first modification, first channel
    assert bench.access(A, FIRST_GVPN) == FIRST_GPPN, "A executes while the incoherency exists"
    bench.poke(A, example.second, FOURTH_GPPN << 12 | USED)  # second modification, second channel
    assert bench.access(C, SECOND_GVPN) == THIRD_GPPN, "C executes while the incoherency exists"
    assert [matrix.occupancy(A, consumer) for consumer in range(4)] == [1, 0, 1, 0]
    bench.invlpg(A, FIRST_GVPN)
    assert (bench.access(A, FIRST_GVPN), bench.access(C, SECOND_GVPN)) == (SECOND_GPPN, THIRD_GPPN)
    bench.invlpg(C, SECOND_GVPN)
    assert bench.access(C, SECOND_GVPN) == FOURTH_GPPN
    assert [matrix.occupancy(A, consumer) for consumer in range(4)] == [0, 0, 0, 0]
    bench.assert_coherent()


@every_format
@patch_schemes
@pytest.mark.shows("P12", "A40c 54", "A40c 61", "A40c 67", "A40c 73")
def test_claim_61_one_entry_is_both_the_first_and_the_second(
    spec: FormatSpec, scheme: Scheme
) -> None:
    example = Example(spec, scheme)
    bench = example.bench
    assert example.used(FIRST_GVPN) == [FIRST_GPPN, FIRST_GPPN]
    bench.poke(A, example.first, SECOND_GPPN << 12 | USED)
    assert example.used(FIRST_GVPN) == [FIRST_GPPN, FIRST_GPPN]
    bench.load_cr3(C, example.table_292a)
    assert example.used(FIRST_GVPN) == [FIRST_GPPN, SECOND_GPPN]
    bench.load_cr3(A, example.table_292a)
    assert example.used(FIRST_GVPN) == [SECOND_GPPN, SECOND_GPPN]
    bench.assert_coherent()
