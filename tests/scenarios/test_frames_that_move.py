"""V3 as it reads: after the PPN of a GPPN has changed, nothing derived and no TLB uses the old one.

One VM of two VCPUs; its first page maps guest frame OLD. The oracle knows where each guest frame
lies, so it refuses any access by the machine frame that was.
"""

from __future__ import annotations

import pytest

from penumbra.actors.core import Order
from penumbra.actors.vmm.fill import BringFrame, Emulate, Hidden, PlaceTraces
from penumbra.actors.vmm.memory import ABSENT
from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import IA32, PAE, PS, X86_64, FormatSpec, G, W
from penumbra.hw.streams import FETCH, READ, WRITE
from tests.actors.vmm.bench import USED, Bench, patch, shootdown

pytestmark = pytest.mark.shows("V3")

every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
every_scheme = pytest.mark.parametrize(
    "scheme", [patch(), patch("invalidate"), shootdown()], ids=["update", "invalidate", "shootdown"]
)
PAGE, OTHER, ALIAS = 0x1000, 0x2000, 0x7000
OLD, NEW = 40, 41


def started(
    spec: FormatSpec = IA32,
    scheme: Scheme | None = None,
    flags: int = USED,
    order: Order = Order.CORRECT,
) -> tuple[Bench, int]:
    """Return a VM whose VCPUs have both used PAGE, and where PAGE's entry stands."""
    bench = Bench(spec, scheme, order=order)
    root = bench.frame()
    entry = bench.map(root, PAGE, OLD, flags)
    bench.map(root, ALIAS, OLD, flags)
    bench.start(root)
    for vcpu in (0, 1):
        assert [bench.access(vcpu, gva) for gva in (PAGE, ALIAS)] == [OLD, OLD]
    return bench, entry


# ---- moved ---------------------------------------------------------------------------------------


@every_format
@every_scheme
@pytest.mark.parametrize("kind", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
@pytest.mark.parametrize("flags", [USED, USED | G], ids=["", "global"])
def test_after_a_move_every_vcpu_and_every_alias_uses_the_new_frame(
    spec: FormatSpec, scheme: Scheme, kind: int, flags: int
) -> None:
    bench, _ = started(spec, scheme, flags)
    bench.memory.store(OLD << 12, 8, 0x1234)
    before = bench.memory.frame_view[OLD]
    bench.move_frame(OLD)
    assert bench.memory.frame_view[OLD] != before
    for vcpu in (0, 1):
        assert [bench.access(vcpu, gva, kind) for gva in (PAGE, ALIAS)] == [OLD, OLD]
    assert bench.memory.load(OLD << 12, 8) == (1 if kind == WRITE else 0x1234)
    bench.assert_coherent()


@every_format
def test_a_move_that_nobody_is_told_of_is_caught_at_the_first_access(spec: FormatSpec) -> None:
    bench, _ = started(spec)
    bench.move_frame(OLD, keep=True)
    assert bench.access(0, PAGE) == -1
    assert not bench.oracle.verdict().coherent
    with pytest.raises(AssertionError, match="is not in the frame"):
        bench.submms[0].check()


@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_a_piece_of_a_large_page_moves_alone(spec: FormatSpec) -> None:
    n = 1 << (spec.levels[1].shift - 12)
    bench = Bench(spec, n_frames=2 * n)
    root = bench.frame()
    gva = 1 << spec.levels[1].shift
    bench.map(root, gva, n, USED | PS, level=1)
    bench.start(root)
    pieces = [0, 5, 6]
    assert [bench.access(0, gva + (i << 12), WRITE) for i in pieces] == [n + i for i in pieces]
    bench.take_log()
    bench.move_frame(n + 5)
    assert [bench.access(0, gva + (i << 12), WRITE) for i in pieces] == [n + i for i in pieces]
    assert [seen.what for seen in bench.take_log()] == ["hidden"]
    bench.assert_coherent()


@every_format
@every_scheme
def test_what_was_derived_from_a_table_stays_when_the_table_itself_moves(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, entry = started(spec, scheme)
    bench.take_log()
    bench.move_frame(entry >> 12)
    assert (bench.access(0, PAGE), bench.take_log()) == (OLD, [])
    bench.poke(1, entry, NEW << 12 | USED)
    for vcpu in (0, 1):
        bench.invlpg(vcpu, PAGE)
        assert bench.access(vcpu, PAGE) == NEW
    bench.assert_coherent()


# ---- derived values in flight (EP3) --------------------------------------------------------------


def move_with_a_patch_in_flight(spec: FormatSpec, order: Order) -> Bench:
    """VCPU 1 derives from NEW's first frame and posts it; NEW moves; VCPU 0 has its event."""
    bench, entry = started(spec, order=order)
    bench.poke(1, entry, NEW << 12 | USED)
    assert bench.matrix.occupancy(1, 0) == 1
    bench.move_frame(NEW)
    bench.invlpg(0, PAGE)
    return bench


@every_format
@pytest.mark.shows("EP3")
def test_a_value_derived_before_the_move_is_not_installed_after_it(spec: FormatSpec) -> None:
    bench = move_with_a_patch_in_flight(spec, Order.CORRECT)
    bench.take_log()
    assert bench.access(0, PAGE) == NEW
    assert bench.take_log() == [], "derived anew at the event, not by a fault"
    bench.assert_coherent()


@every_format
@pytest.mark.shows("EP3")
def test_without_the_count_the_old_frame_comes_back_by_way_of_the_patch(spec: FormatSpec) -> None:
    bench = move_with_a_patch_in_flight(spec, Order.NO_COUNT_CHECK)
    assert bench.access(0, PAGE) == -1
    assert not bench.oracle.verdict().coherent


# ---- absent and shared ---------------------------------------------------------------------------


def send_away(bench: Bench, gfn: int) -> int:
    """Make a guest frame absent as a monitor has to; return the machine frame it was in."""
    if gfn in bench.traces:
        bench.untrace(gfn)
    pfn = bench.memory.frame_view[gfn]
    for vcpu in (0, 1):
        bench.forget_frame(vcpu, gfn)
    bench.traces.frame_moved()
    bench.memory.send_away(pfn)
    bench.oracle.grant(gfn, ABSENT)
    return pfn


def come_back(bench: Bench, gfn: int, pfn: int) -> None:
    bench.memory.bring(gfn, pfn)
    bench.oracle.grant(gfn, pfn)


@every_format
@every_scheme
def test_a_fault_on_an_absent_page_asks_for_its_frame_and_then_repairs(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, _ = started(spec, scheme)
    bench.memory.store(OLD << 12, 8, 77)
    pfn = send_away(bench, OLD)
    bench.check()
    for vcpu in (0, 1):
        assert bench.submms[vcpu].fault(PAGE, READ, True) == BringFrame(OLD, False)
        assert bench.submms[vcpu].fault(PAGE, WRITE, True) == BringFrame(OLD, True)
    come_back(bench, OLD, pfn)
    assert isinstance(bench.submms[0].fault(PAGE, WRITE, True), Hidden)
    assert (bench.access(0, PAGE), bench.memory.load(OLD << 12, 8)) == (OLD, 77)
    bench.assert_coherent()


@every_format
def test_a_walk_stops_at_an_absent_table_whatever_it_would_have_found_there(
    spec: FormatSpec,
) -> None:
    bench, entry = started(spec)
    table = entry >> 12
    pfn = send_away(bench, table)
    for gva in (PAGE, OTHER):  # one is mapped, one is not
        assert bench.submms[0].fault(gva, READ, True) == BringFrame(table, True)
        assert bench.submms[0].guest_address(gva, READ, True) == BringFrame(table, True)
    come_back(bench, table, pfn)
    assert isinstance(bench.submms[0].fault(PAGE, READ, True), PlaceTraces)
    assert bench.access(0, PAGE) == OLD
    bench.assert_coherent()


@every_format
def test_a_patch_that_leads_to_an_absent_frame_derives_nothing(spec: FormatSpec) -> None:
    bench, entry = started(spec)
    pfn = send_away(bench, NEW)
    bench.poke(1, entry, NEW << 12 | USED)
    bench.invlpg(0, PAGE)
    assert bench.submms[0].fault(PAGE, READ, True) == BringFrame(NEW, False)
    come_back(bench, NEW, pfn)
    assert bench.access(0, PAGE) == NEW
    bench.assert_coherent()


@every_format
@every_scheme
def test_a_shared_frame_is_read_by_all_and_written_by_nobody(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench, _ = started(spec, scheme)
    bench.map(1, OTHER, NEW)
    assert bench.access(1, OTHER) == NEW
    for gfn in (OLD, NEW):
        bench.memory.store(gfn << 12, 8, 5)
        for vcpu in (0, 1):
            bench.forget_frame(vcpu, gfn)
    bench.traces.frame_moved()
    bench.memory.share(NEW, bench.memory.frame_view[OLD])
    bench.oracle.grant(NEW, bench.memory.frame_view[OLD])
    # `access` tells guest frames by machine frames: of two that share one, the first.
    assert [bench.access(1, gva) for gva in (PAGE, OTHER)] == [OLD, OLD]
    leaves = [bench.submms[1].space.entry(page, i) for page, i, _ in bench.submms[1].space.leaves()]
    assert leaves
    assert not any(entry & W for entry in leaves)
    assert bench.submms[1].fault(OTHER, WRITE, True) == BringFrame(NEW, True)
    assert bench.submms[1].fault(PAGE, WRITE, True) == BringFrame(OLD, True)
    bench.move_frame(NEW)
    assert [bench.access(1, gva, WRITE) for gva in (PAGE, OTHER)] == [OLD, NEW]
    bench.assert_coherent()


def test_a_store_to_a_traced_page_is_emulated_whether_other_frames_are_shared_or_not() -> None:
    bench, entry = started()
    bench.map(1, OTHER, entry >> 12)
    send_away(bench, 50)
    assert isinstance(bench.submms[0].fault(OTHER, WRITE, True), Emulate)
