"""One shadow page table for several VCPUs (A40c 62, 68, 74): same tables, own events."""

from __future__ import annotations

import msgspec
import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.shadow import ShadowPage
from penumbra.hw.formats import CR4_PGE, IA32, X86_64, FormatSpec
from penumbra.hw.streams import WRITE

from .bench import CR4, USED, Bench, Faulted, patch, shootdown

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
A, B, C = range(3)
PAGE, NEIGHBOUR, ELSEWHERE = 0x1000, 0x2000, 0x3F_0000
X, Y, Z = 40, 41, 42


def shared(scheme: Scheme) -> Scheme:
    return msgspec.structs.replace(scheme, shadow="shared")


every_scheme = pytest.mark.parametrize(
    "scheme",
    [
        shared(patch()),
        shared(patch("invalidate")),
        shared(patch(capacity=1)),
        shared(patch(channels="shared", overflow="wait", capacity=2)),
        shared(shootdown()),
    ],
    ids=["update", "invalidate", "one slot", "shared channel", "shootdown"],
)


def started(spec: FormatSpec, scheme: Scheme) -> tuple[Bench, int, int]:
    """Return three VCPUs on one root, and the entries of two pages."""
    bench = Bench(spec, scheme, n_vcpus=3)
    root = bench.frame()
    first, second = bench.map(root, PAGE, X), bench.map(root, NEIGHBOUR, Y)
    bench.start(root)
    return bench, first, second


def pages_of(bench: Bench, vcpu: int) -> list[ShadowPage]:
    return bench.submms[vcpu].space.all_pages()


@both_formats
@every_scheme
@pytest.mark.shows("V4", "A40c 62", "A40c 68", "A40c 74", "EP13")
def test_a_single_shadow_table_is_that_of_both_vcpus(spec: FormatSpec, scheme: Scheme) -> None:
    bench, _, _ = started(spec, scheme)
    assert bench.access(A, PAGE) == X
    n_pages = len(pages_of(bench, A))
    bench.take_log()
    assert bench.access(B, PAGE) == X
    assert bench.take_log() == [], "B walks what A has derived"
    assert len(pages_of(bench, B)) == n_pages
    assert bench.submms[A].space.root is bench.submms[B].space.root
    assert [page.pfn for page in pages_of(bench, A)] == [page.pfn for page in pages_of(bench, B)]
    bench.check()


@both_formats
@every_scheme
@pytest.mark.shows("V4", "P12", "A40c 62", "A40c 68", "A40c 74", "EP13")
def test_two_modifications_two_events_one_shadow(spec: FormatSpec, scheme: Scheme) -> None:
    bench, first, second = started(spec, scheme)
    for vcpu in (A, B):
        assert [bench.access(vcpu, gva) for gva in (PAGE, NEIGHBOUR)] == [X, Y]
    bench.poke(C, first, Z << 12 | USED)
    bench.poke(C, second, Z << 12 | USED)
    bench.invlpg(A, PAGE)
    assert bench.access(A, PAGE) == Z
    bench.invlpg(B, NEIGHBOUR)
    assert bench.access(B, NEIGHBOUR) == Z
    for vcpu in (A, B, C):
        bench.load_cr3(vcpu, 1)
        assert [bench.access(vcpu, gva) for gva in (PAGE, NEIGHBOUR)] == [Z, Z]
    bench.check()
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V4", "A40c 62", "EP16")
def test_who_only_walked_what_another_derived_is_told_and_follows(spec: FormatSpec) -> None:
    bench, first, _ = started(spec, shared(patch()))
    assert [bench.access(vcpu, PAGE) for vcpu in (A, B)] == [X, X]  # B had no fill of its own
    bench.poke(A, first, Y << 12 | USED)
    assert [bench.matrix.occupancy(A, consumer) for consumer in (A, B, C)] == [1, 1, 1]
    bench.invlpg(B, PAGE)
    assert bench.access(B, PAGE) == Y
    bench.poke(A, first, 0)
    bench.invlpg(B, PAGE)
    assert bench.access(B, PAGE) != X
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V4", "EP13", "EP16")
@pytest.mark.parametrize("scheme", [patch(prefetch=8), shootdown(prefetch=8)])
def test_what_one_takes_in_advance_all_sharers_are_told_of(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, _, second = started(spec, shared(scheme))
    assert bench.access(A, PAGE) == X
    bench.take_log()
    assert bench.access(B, NEIGHBOUR) == Y
    assert bench.take_log() == [], "B walks what A took in advance"
    bench.poke(C, second, Z << 12 | USED)
    bench.invlpg(B, NEIGHBOUR)
    assert bench.access(B, NEIGHBOUR) == Z
    bench.check()
    bench.assert_coherent()


@both_formats
@every_scheme
@pytest.mark.shows("V4", "V6")
def test_a_trace_takes_the_right_to_write_from_the_tlb_of_every_sharer(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, first, _ = started(spec, scheme)
    for vcpu in (A, B):
        assert bench.access(vcpu, PAGE, WRITE) == X
    bench.poke(A, first, 0)  # the shared entry goes, with it what the reverse map knows
    bench.invlpg(A, PAGE)
    bench.place((X,))
    bench.take_log()
    answer = bench.access(B, PAGE, WRITE)
    assert isinstance(answer, Faulted) or "emulated" in {seen.what for seen in bench.take_log()}
    bench.check()
    bench.assert_coherent()


@both_formats
@every_scheme
@pytest.mark.shows("V4", "P5")
def test_vcpus_of_different_modes_share_nothing_and_come_together_again(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, first, _ = started(spec, scheme)
    for vcpu in (A, B):
        bench.access(vcpu, PAGE)
    bench.load_cr4(A, CR4[spec.name] & ~CR4_PGE)
    assert bench.submms[A].space.root is not bench.submms[B].space.root
    assert [bench.access(vcpu, PAGE) for vcpu in (A, B)] == [X, X]
    bench.poke(C, first, Z << 12 | USED)
    bench.invlpg(A, PAGE)
    assert bench.access(A, PAGE) == Z
    bench.load_cr4(A, CR4[spec.name])
    assert bench.submms[A].space.root is bench.submms[B].space.root
    assert bench.access(A, PAGE) == Z
    bench.invlpg(B, PAGE)
    assert bench.access(B, PAGE) == Z
    bench.check()
    bench.assert_coherent()
