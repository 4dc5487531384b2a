"""Figures 9, 10 and 13 as they read: one patch, the matrix of channels, and its rows and columns.

VCPUs A, B, C and D are 0 to 3 and share guest OS page table 292A; every one has used the page whose
entry is changed, so it is a consumer of it.
"""

from __future__ import annotations

import pytest

from penumbra.actors.core import InUse, Matrix
from penumbra.hw.formats import IA32, X86_64, FormatSpec
from tests.actors.vmm.bench import USED, Bench, patch

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
A, B, C, D = range(4)
LETTERS = "ABCDEFGHIJKLMNOP"
CHANNELS = {(i // 4, i % 4): f"398{letter}" for i, letter in enumerate(LETTERS)}
GVPN = 0x2000
FIRST_GPPN = 40


class Machine700:
    """Four VCPUs that have all derived from the entry of one page."""

    def __init__(self, spec: FormatSpec, **options: object) -> None:
        self.bench = Bench(spec, patch(**options), n_vcpus=4)  # type: ignore[arg-type]
        root = self.bench.frame()
        self.entry = self.bench.map(root, GVPN, FIRST_GPPN)
        self.bench.start(root)
        self.gppn = FIRST_GPPN
        for vcpu in (A, B, C, D):
            assert self.bench.access(vcpu, GVPN) == FIRST_GPPN

    def remap(self, vcpu: int) -> None:
        """Let a VCPU change the mapping."""
        self.gppn += 1
        self.bench.poke(vcpu, self.entry, self.gppn << 12 | USED)

    def in_use(self) -> list[str]:
        """Name the channels that hold a patch."""
        matrix = self.bench.matrix
        return [name for pair, name in CHANNELS.items() if matrix.occupancy(*pair)]


@pytest.mark.shows("P1", "Fig 9 398", "A40 ¶99", "A40c 57", "A40c 58", "A40c 59")
@pytest.mark.shows("Fig 9 394A", "Fig 9 394B", "Fig 9 394C")
@pytest.mark.shows("Fig 9 394D", "Fig 9 394E", "Fig 9 394F")
@pytest.mark.parametrize("in_use", ["field", "base", "outside"])
def test_figure_9_a_channel_is_an_array_of_patches_with_six_fields(in_use: str) -> None:
    machine = Machine700(X86_64, capacity=3, in_use=in_use)
    matrix, layout = machine.bench.matrix, machine.bench.matrix.layout
    _, _, slots, marks, stride, capacity = layout.channel(A, C)
    assert (capacity, layout.in_use) == (3, InUse[in_use.upper()])
    for number in range(capacity):
        matrix.producer(A).begin([(0x5000, 8 * number)])
        matrix.producer(A).stored()
        matrix.producer(A).post_nowait(C, 0x5000, 8 * number, 0x77000 + number, 0x33000)
        matrix.producer(A).end()
        slot = slots + 8 * number  # 394A: the patch number is the index of the slot
        base, offset, derived, source, usefulness = (matrix.words[slot + at] for at in range(1, 6))
        assert base == (0x5001 if in_use == "base" else 0x5000)  # 394B
        assert offset == 8 * number  # 394C
        assert derived == 0x77000 + number  # 394D
        assert source == 0x33000
        assert usefulness == matrix.count  # 394E: the number of traces placed
        assert matrix.words[marks + number * stride]  # 394F
    patches = matrix.consumer(C).event().patches
    assert [patch.number for patch in patches] == [0, 1, 2]
    assert not any(matrix.words[marks + number * stride] for number in range(capacity))


@both_formats
@pytest.mark.shows("P2", "Fig 10 397", "A40c 48", "A40c 57", "A40 ¶102-103")
@pytest.mark.shows("Fig 10 396A", "Fig 10 396B", "Fig 10 396C", "Fig 10 396D")
@pytest.mark.shows("Fig 10 399A", "Fig 10 399B", "Fig 10 399C", "Fig 10 399D")
@pytest.mark.shows("Fig 10 398A", "Fig 10 398B", "Fig 10 398C", "Fig 10 398D")
@pytest.mark.shows("Fig 10 398E", "Fig 10 398F", "Fig 10 398G", "Fig 10 398H")
@pytest.mark.shows("Fig 10 398I", "Fig 10 398J", "Fig 10 398K", "Fig 10 398L")
@pytest.mark.shows("Fig 10 398M", "Fig 10 398N", "Fig 10 398O", "Fig 10 398P")
def test_figure_10_each_channel_is_filled_by_its_producer_and_emptied_by_its_consumer(
    spec: FormatSpec,
) -> None:
    machine = Machine700(spec)
    bench = machine.bench
    for producer in (A, B, C, D):
        machine.remap(producer)
        left = [name for pair, name in CHANNELS.items() if pair[0] == producer]
        assert machine.in_use() == left
        for consumer in (A, B, C, D):
            assert bench.access(consumer, GVPN) == machine.gppn - 1
            bench.invlpg(consumer, GVPN)
            assert bench.access(consumer, GVPN) == machine.gppn
            left.remove(CHANNELS[producer, consumer])
            assert machine.in_use() == left
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("P2", "P12", "Fig 13A", "A40 ¶123")
def test_figure_13a_sixteen_channels_lie_between_four_producers_and_four_consumers(
    spec: FormatSpec,
) -> None:
    machine = Machine700(spec)
    for vcpu in (A, B, C, D):
        machine.remap(vcpu)
    assert machine.in_use() == [f"398{letter}" for letter in LETTERS]
    assert [pair for row in machine.bench.matrix.channels() for pair in row] == list(CHANNELS)


@both_formats
@pytest.mark.shows("P2", "P12", "Fig 13B", "A40 ¶124")
def test_figure_13b_the_third_vcpu_writes_by_four_channels_of_its_own(spec: FormatSpec) -> None:
    machine = Machine700(spec)
    machine.remap(C)
    assert machine.in_use() == ["398I", "398J", "398K", "398L"]
    assert machine.in_use() == [CHANNELS[pair] for pair in machine.bench.matrix.channels_from(C)]
    machine.bench.assert_coherent()


@both_formats
@pytest.mark.shows("P2", "P12", "Fig 13C", "A40 ¶125")
def test_figure_13c_an_event_at_the_second_vcpu_empties_four_channels(spec: FormatSpec) -> None:
    machine = Machine700(spec)
    for vcpu in (A, B, C, D):
        machine.remap(vcpu)
    machine.bench.invlpg(B, GVPN)
    taken = [name for name in CHANNELS.values() if name not in machine.in_use()]
    assert taken == ["398B", "398F", "398J", "398N"]
    assert taken == [CHANNELS[pair] for pair in machine.bench.matrix.channels_to(B)]
    assert machine.bench.access(B, GVPN) == machine.gppn
    assert machine.bench.access(A, GVPN) == FIRST_GPPN
    machine.bench.assert_coherent()


@pytest.mark.shows("P2", "Fig 10 397", "A40 ¶126")
@both_formats
def test_one_vcpu_has_one_channel_from_itself_to_itself(spec: FormatSpec) -> None:
    bench = Bench(spec, n_vcpus=1)
    entry = bench.map(bench.frame(), GVPN, FIRST_GPPN)
    bench.start(1)
    assert bench.access(0, GVPN) == FIRST_GPPN
    bench.poke(0, entry, 41 << 12 | USED)
    assert (bench.matrix.channels(), bench.matrix.occupancy(0, 0)) == ([[(0, 0)]], 1)
    assert bench.access(0, GVPN) == FIRST_GPPN
    bench.invlpg(0, GVPN)
    assert (bench.access(0, GVPN), bench.matrix.occupancy(0, 0)) == (41, 0)
    assert Matrix(1).channels_from(0) == Matrix(1).channels_to(0)
    bench.assert_coherent()
