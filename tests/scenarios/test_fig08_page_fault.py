"""Figure 8 as it reads: what becomes of a page fault of the hardware, steps 802 to 816.

`fault` finds the mapping (802), forwards what the guest has to see (804), finds the frame (810),
asks for traces before it reads what it derives (812), and installs (814); the hardware's own walk
fills the TLB when the instruction runs again (816).
"""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.fill import Emulate, Hidden, PlaceTraces
from penumbra.hw.formats import (
    CR0_WP,
    IA32,
    NX,
    PAE,
    PF_I,
    PF_P,
    PF_RSVD,
    PF_U,
    PF_W,
    X86_64,
    A,
    D,
    FormatSpec,
    P,
    U,
    W,
)
from penumbra.hw.streams import FETCH, READ, WRITE
from tests.actors.vmm.bench import LINK, PROTECTED, USED, Bench, Faulted, Seen, patch

# Where no rights, no A and no trace of the root are at stake.
every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)

GVA = 0x1000
FRAME = 40


def started(spec: FormatSpec, flags: int = USED, *, link: int = LINK, gfn: int = FRAME) -> Bench:
    """Return a VM whose VCPUs share one root (frame 1) that maps GVA."""
    bench = Bench(spec)
    root = bench.frame()
    bench.map(root, GVA, gfn, flags, link=link)
    bench.start(root)
    bench.take_log()
    return bench


@both_formats
@pytest.mark.shows("V5", "Fig 8 800", "Fig 8 802", "Fig 8 804", "Fig 8 806")
def test_802_no_mapping_at_any_level_goes_to_the_guest(spec: FormatSpec) -> None:
    for level in range(spec.top + 1):
        bench = started(spec)
        bench.memory.store(bench.where(1, GVA, level), spec.entry_bytes, 0)
        assert bench.access(0, GVA + 0x123, WRITE) == Faulted(PF_W | PF_U)
        assert bench.take_log() == [Seen("delivered", 0, PF_W | PF_U)]
        assert bench.submms[0].registers.cr2 == GVA + 0x123
        bench.assert_coherent()


@pytest.mark.shows("V5", "Fig 8 808")
@pytest.mark.parametrize(
    ("flags", "link", "kind", "user", "error"),
    [
        (P | A | D | W, LINK, READ, True, PF_P | PF_U),
        (USED, LINK & ~U, READ, True, PF_P | PF_U),
        (P | U | A | D, LINK, WRITE, True, PF_P | PF_W | PF_U),
        (P | U | A | D, LINK, WRITE, False, PF_P | PF_W),
        (USED, LINK & ~W, WRITE, True, PF_P | PF_W | PF_U),
        (USED | NX, LINK, FETCH, True, PF_P | PF_U | PF_I),
        (USED, LINK | NX, FETCH, False, PF_P | PF_I),
        (USED | 1 << 45, LINK, READ, True, PF_P | PF_RSVD | PF_U),
        (USED | 1 << 45, LINK, FETCH, False, PF_P | PF_RSVD | PF_I),
    ],
)
def test_808_what_the_guest_forbids_goes_to_the_guest_and_leaves_no_mark(
    flags: int, link: int, kind: int, user: bool, error: int
) -> None:
    bench = started(X86_64, flags & ~A & ~D, link=link & ~A)
    before = bytes(bench.ram.bytes)
    assert bench.access(0, GVA, kind, user=user) == Faulted(error)
    assert bytes(bench.ram.bytes) == before, "a refused access sets no A and no D"
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V5", "V6", "Fig 8 810", "Fig 8 812", "Fig 8 814", "Fig 8 816")
def test_812_every_table_on_the_path_is_traced_before_anything_is_derived(spec: FormatSpec) -> None:
    bench = started(spec)
    submm = bench.submms[0]
    path = [bench.where(1, GVA, level) for level in range(spec.top, -1, -1)]
    asked = submm.fault(GVA, READ, True)
    assert isinstance(asked, PlaceTraces)
    assert asked.gfns == tuple(gpa >> 12 for gpa in path[1:])  # the root's is there
    assert submm.space.n_pages == 1
    bench.place(asked.gfns)
    assert submm.fault(GVA, READ, True) == Hidden()
    width = spec.entry_bytes
    interest = [bench.traces.consumers(gpa >> 12, (gpa & 0xFFF) // width) for gpa in path]
    assert interest == [0b01] * len(path)
    page = submm.space.root
    for level in range(spec.top, 0, -1):
        assert page is not None
        page = page.children[spec.levels[level].index(GVA)]
    assert page is not None
    pfn = bench.memory.frame_view[FRAME]
    assert submm.space.entry(page, 1) == pfn << 12 | USED
    assert bench.cpus[0].tlb.entries() == {}
    assert bench.access(0, GVA) == FRAME
    assert [value >> 12 for value in bench.cpus[0].tlb.entries().values()] == [pfn]
    bench.assert_coherent()


@pytest.mark.shows("V5", "V6")
def test_812_a_second_vcpu_registers_with_the_traces_that_are_there() -> None:
    bench = started(IA32)
    bench.access(0, GVA)
    bench.take_log()
    bench.access(1, GVA)
    assert bench.take_log() == [Seen("hidden", 1, GVA)]
    leaf = bench.where(1, GVA)
    assert bench.traces.consumers(leaf >> 12, 1) == 0b11


@both_formats
@pytest.mark.shows("V5", "I4")
def test_a_first_access_sets_a_and_a_first_write_sets_d(spec: FormatSpec) -> None:
    bench = started(spec, P | W | U, link=P | W | U)
    leaf = bench.where(1, GVA)
    assert (bench.access(0, GVA), bench.entry(leaf) & (A | D)) == (FRAME, A)
    assert all(bench.entry(bench.where(1, GVA, level)) & A for level in range(1, spec.top + 1))
    assert (bench.access(0, GVA, WRITE), bench.entry(leaf) & (A | D)) == (FRAME, A | D)
    assert [seen.what for seen in bench.take_log()][-2:] == ["hidden", "hidden"]
    assert sum(sum(row) for row in posts(bench)) == 0, "the monitor's own A and D post no patch"
    assert bench.submms[0].registers.cr2 == 0
    bench.assert_coherent()


@pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
@pytest.mark.shows("I4", "P5")
def test_a_guest_that_clears_a_and_d_and_flushes_sees_them_set_again(spec: FormatSpec) -> None:
    bench = started(spec)
    leaf, upper = bench.where(1, GVA), bench.where(1, GVA, 1)
    for kind, mark in ((READ, A), (WRITE, A | D), (READ, A)):
        bench.access(0, GVA, WRITE)
        bench.poke(0, leaf, bench.entry(leaf) & ~(A | D))
        bench.poke(0, upper, bench.entry(upper) & ~A)
        bench.invlpg(0, GVA)
        assert bench.access(0, GVA, kind) == FRAME
        assert (bench.entry(leaf) & (A | D), bench.entry(upper) & A) == (mark, A)
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V5", "Fig 8 816")
def test_a_shadow_with_fewer_rights_than_the_guest_gave_is_repaired_unseen(
    spec: FormatSpec,
) -> None:
    bench = started(spec, P | A | D)
    assert bench.access(0, GVA, user=False) == FRAME
    bench.poke(0, bench.where(1, GVA), FRAME << 12 | USED)  # more rights need no flush
    bench.take_log()
    assert bench.access(0, GVA, WRITE) == FRAME
    assert bench.take_log() == [Seen("hidden", 0, GVA)]
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V5")
def test_an_entry_made_present_needs_no_flush(spec: FormatSpec) -> None:
    bench = started(spec, 0)
    leaf = bench.where(1, GVA)
    assert bench.access(0, GVA) == Faulted(PF_U)
    bench.poke(1, leaf, FRAME << 12 | USED)
    assert bench.access(0, GVA) == FRAME
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V5", "V6")
def test_a_store_to_a_traced_page_is_the_monitors_to_make(spec: FormatSpec) -> None:
    bench = Bench(spec)
    root = bench.frame()
    leaf = bench.map(root, GVA, FRAME)
    bench.map(root, GVA + 0x1000, leaf >> 12)
    bench.start(root)
    bench.access(0, GVA)
    assert bench.submms[0].fault(GVA + 0x1000, WRITE, True) == Emulate()
    at = GVA + 0x1000 + (leaf & 0xFFF)
    assert bench.store(0, at, 41 << 12 | USED, user=True) == leaf >> 12
    assert bench.entry(leaf) == 41 << 12 | USED
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == 41
    bench.assert_coherent()


@pytest.mark.shows("V5")
def test_a_frame_the_machine_has_not_reads_as_ones_and_swallows_stores() -> None:
    bench = started(IA32, gfn=5000)
    assert bench.access(0, GVA, WRITE) == -1
    assert [value >> 12 for value in bench.cpus[0].tlb.entries().values()] == [NOWHERE]
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V5", "P5")
def test_without_cr0_wp_a_supervisor_writes_where_it_may_only_read(spec: FormatSpec) -> None:
    bench = started(spec, P | U | A)
    leaf = bench.where(1, GVA)
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.load_cr0(0, PROTECTED & ~CR0_WP)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.entry(leaf) & D
    assert bench.access(0, GVA, WRITE) == Faulted(PF_P | PF_W | PF_U)
    assert bench.access(1, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.load_cr0(0, PROTECTED)
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    bench.assert_coherent()


@pytest.mark.shows("V4", "Fig 7")
def test_the_hardware_never_sees_a_guest_frame_number() -> None:
    bench = Bench(X86_64, patch())
    root = bench.frame()
    pages = [GVA + number * 0x1000 for number in range(8)]
    for number, gva in enumerate(pages):
        bench.map(root, gva, FRAME + number)
    bench.start(root)
    assert [bench.access(0, gva) for gva in pages] == list(range(FRAME, FRAME + 8))
    used = [value >> 12 for value in bench.cpus[0].tlb.entries().values()]
    assert sorted(used) == sorted(bench.memory.frame_view[FRAME + n] for n in range(8))


def posts(bench: Bench) -> list[list[int]]:
    """Return the patches posted so far, by producer and consumer."""
    return [
        [bench.matrix.statistics(*pair).n_posted for pair in row] for row in bench.matrix.channels()
    ]
