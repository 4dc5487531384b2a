"""Leaf tables out of sync: what is written without an exit, and when who catches up."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import IA32, PF_U, PF_W, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.operations import Fill
from penumbra.hw.streams import WRITE

from .bench import LINK, USED, Bench, Faulted, Seen, out_of_sync

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
each_way = pytest.mark.parametrize(
    "scheme",
    [out_of_sync(), out_of_sync(apply="invalidate"), out_of_sync("patch")],
    ids=["update", "invalidate", "patches above"],
)
GVA, X, Y, Z = 0x1000, 40, 41, 42
KERNEL = P | W | A | D


class Guest:
    """One address space on two VCPUs; the kernel sees its leaf table at TABLE, in a table apart."""

    def __init__(self, spec: FormatSpec, scheme: Scheme) -> None:
        self.bench = bench = Bench(spec, scheme)
        self.root = root = bench.frame()
        self.leaf = bench.map(root, GVA, X)
        self.table = self.leaf >> 12
        self.window = 2 << spec.levels[1].shift
        for number, gfn in enumerate((self.table, bench.where(root, GVA, 1) >> 12, root)):
            bench.map(root, self.window + (number << 12), gfn, KERNEL)
        bench.start(root)
        for vcpu in (0, 1):
            assert bench.access(vcpu, GVA) == X
            bench.access(vcpu, self.window + 0x2000, user=False)
        bench.take_log()

    def write(self, vcpu: int, entry: int, gva: int = GVA) -> None:
        """Store to the leaf table as the guest's kernel does."""
        index = self.bench.spec.levels[0].index(gva)
        self.bench.store(vcpu, self.window + index * self.bench.spec.entry_bytes, entry)

    def told(self) -> list[str]:
        return [seen.what for seen in self.bench.take_log()]


@both_formats
@each_way
@pytest.mark.shows("S2", "V6", "C1")
def test_the_first_store_to_a_leaf_table_exits_and_the_others_do_not(
    spec: FormatSpec, scheme: Scheme
) -> None:
    guest = Guest(spec, scheme)
    guest.write(0, Y << 12 | USED)
    assert guest.told() == ["hidden"]
    for gfn in (X, Z, Y):
        guest.write(0, gfn << 12 | USED)
    assert guest.told() == [], "the hardware makes the stores"
    assert guest.table not in guest.bench.traces
    assert [guest.bench.access(vcpu, GVA) for vcpu in (0, 1)] == [X, X], "as real hardware might"
    guest.bench.invlpg(0, GVA)
    assert [guest.bench.access(vcpu, GVA) for vcpu in (0, 1)] == [Y, X], "each at its own event"
    guest.bench.invlpg(1, GVA)
    assert guest.bench.access(1, GVA) == Y
    guest.write(1, Z << 12 | USED)
    guest.write(1, X << 12 | USED)
    guest.bench.assert_coherent()


@both_formats
@each_way
@pytest.mark.shows("S2", "V6")
def test_a_cr3_load_puts_the_trace_back_and_compares_the_whole_table(
    spec: FormatSpec, scheme: Scheme
) -> None:
    guest = Guest(spec, scheme)
    bench = guest.bench
    for number in range(2, 9):
        bench.map(guest.root, number << 12, 20 + number)
        bench.access(0, number << 12)
        bench.access(1, number << 12)
    guest.write(1, Y << 12 | USED)
    guest.write(1, 0, 0x3000)
    guest.write(1, 25 << 12 | P | U | A, 0x5000)
    bench.take_log()
    bench.load_cr3(0, guest.root)
    assert bench.take_log() == [Seen("traced", -1, guest.table)]
    assert guest.table in bench.traces
    assert bench.access(0, GVA) == Y
    assert bench.access(0, 0x3000) == Faulted(PF_U)
    assert bench.access(0, 0x5000, WRITE) == Faulted(1 | PF_W | PF_U)
    assert bench.access(1, 0x3000) == 23, "VCPU 1 has had no event"
    assert bench.submms[1].shared.unsync.is_behind(1, guest.table)
    bench.load_cr3(1, guest.root)
    assert bench.access(1, 0x3000) == Faulted(PF_U)
    assert not bench.submms[1].shared.unsync.is_behind(1, guest.table)
    bench.assert_coherent()


@both_formats
@each_way
@pytest.mark.shows("P5")
def test_a_delivered_fault_brings_its_own_page_up_to_date(spec: FormatSpec, scheme: Scheme) -> None:
    guest = Guest(spec, scheme)
    bench = guest.bench
    guest.write(1, Y << 12 | P | U | A)
    assert bench.access(0, GVA) == X
    assert bench.access(1, GVA, WRITE) == X, "the right it had is its until its event"
    bench.cpus[1].flush_all()
    assert bench.access(1, GVA, WRITE) == X, "and in its shadow too"
    guest.write(0, 0)
    bench.submms[1].event_fault(GVA)
    bench._flush(1)
    bench.oracle.fault(1, GVA, PF_U, True)
    assert bench.access(1, GVA) == Faulted(PF_U)
    assert bench.access(0, GVA) == X
    bench.assert_coherent()


@both_formats
@each_way
@pytest.mark.shows("V6", "P10")
def test_a_table_edited_while_it_hangs_nowhere_is_compared_before_it_is_linked(
    spec: FormatSpec, scheme: Scheme
) -> None:
    """The shadow MMU of Linux KVM linked a stale one there until 2021 (65855ed8b034)."""
    guest = Guest(spec, scheme)
    bench = guest.bench
    upper = bench.where(guest.root, GVA, 1)
    linked = bench.entry(upper)
    guest.write(0, X << 12 | USED)
    bench.poke(0, upper, 0)
    for vcpu in (0, 1):
        bench.invlpg(vcpu, GVA)
        assert bench.access(vcpu, GVA) == Faulted(PF_U)
    guest.write(0, Y << 12 | USED)
    bench.poke(0, upper, linked)
    other = GVA + 0x1000
    bench.map(guest.root, other, Z)
    for vcpu in (0, 1):
        # Linked by a fill for another page of the table; no event is due, P was 0 above.
        assert bench.access(vcpu, other) == Z
        assert bench.access(vcpu, GVA) == Y
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V6")
def test_upper_tables_and_roots_keep_their_traces(spec: FormatSpec) -> None:
    guest = Guest(spec, out_of_sync())
    bench, width = guest.bench, guest.bench.spec.entry_bytes
    middle, root = bench.where(guest.root, GVA, 1) >> 12, guest.root
    at = spec.levels[1].index(GVA) * width
    bench.store(0, guest.window + 0x1000 + at, 0)
    top = 7 * width
    bench.store(0, guest.window + 0x2000 + top, 0)
    assert {"emulated"} <= set(guest.told())
    assert {middle, root} <= {gfn for gfn in range(64) if gfn in bench.traces}
    assert bench.traces.lifted == []
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == Faulted(PF_U)
    bench.assert_coherent()


@pytest.mark.shows("V6", "G1")
def test_a_leaf_table_that_becomes_an_upper_one_is_traced_for_good() -> None:
    guest = Guest(IA32, out_of_sync())
    bench = guest.bench
    guest.write(0, Y << 12 | USED)
    assert bench.traces.is_lifted(guest.table)
    # The table becomes a root: its entry 0 is then a directory entry.
    inner = bench.frame()
    guest.write(0, inner << 12 | LINK, 0)
    bench.memory.store(inner << 12 | 4, 4, Z << 12 | USED)
    bench.load_cr3(1, guest.table)
    assert guest.table in bench.traces
    assert bench.access(1, GVA) == Z
    guest.told()
    guest.write(0, X << 12 | USED)
    assert guest.told() == ["emulated", "shot down", "shot down"]
    assert guest.table in bench.traces, "an upper table is never out of sync"
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("H4")
def test_d_is_set_again_after_a_guest_has_cleared_it_unseen(spec: FormatSpec) -> None:
    guest = Guest(spec, out_of_sync())
    bench = guest.bench
    guest.write(0, X << 12 | P | W | U | A)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == X
    assert not bench.entry(guest.leaf) & D
    assert bench.access(0, GVA, WRITE) == X
    assert bench.entry(guest.leaf) & D
    guest.write(0, X << 12 | P | W | U)
    bench.load_cr3(0, guest.root)
    assert bench.access(0, GVA) == X
    assert bench.entry(guest.leaf) & (A | D) == A
    bench.access(0, GVA, WRITE)
    guest.write(0, X << 12 | P | W | U | D)  # A alone
    bench.load_cr3(0, guest.root)
    assert bench.access(0, GVA) == X
    assert bench.entry(guest.leaf) & (A | D) == A | D
    bench.assert_coherent()


@both_formats
@each_way
@pytest.mark.shows("V6", "C1")
def test_who_derives_from_a_table_while_it_is_out_of_sync_is_behind_as_well(
    spec: FormatSpec, scheme: Scheme
) -> None:
    bench = Bench(spec, scheme)
    root, window = bench.frame(), 2 << spec.levels[1].shift
    leaf = bench.map(root, GVA, X)
    bench.map(root, window, leaf >> 12, KERNEL)
    at = window + (leaf & 0xFFF)
    bench.start(root)
    bench.access(0, GVA)
    bench.store(0, at, Y << 12 | USED)
    assert bench.traces.is_lifted(leaf >> 12)
    assert bench.access(1, GVA) == Y, "derived for the first time"
    bench.store(0, at, Z << 12 | USED)
    assert bench.access(1, GVA) == Y
    bench.load_cr3(1, root)
    assert bench.access(1, GVA) == Z
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("P7", "V6")
def test_as_many_tables_as_may_be_are_out_of_sync_and_the_first_is_traced_again(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec, out_of_sync(unsync=2))
    root, window = bench.frame(), 9 << spec.levels[1].shift
    span = 1 << spec.levels[1].shift
    leaves = [bench.map(root, part * span, 50 + part) for part in range(4)]
    for part, leaf in enumerate(leaves):
        bench.map(root, window + (part << 12), leaf >> 12, KERNEL)
    bench.start(root)
    for part in range(4):
        assert bench.access(0, part * span) == 50 + part
        bench.store(0, window + (part << 12), 40 + part << 12 | USED)
        assert bench.traces.lifted == [leaf >> 12 for leaf in leaves[max(0, part - 1) : part + 1]]
    for part in range(4):
        bench.invlpg(0, part * span)
        assert bench.access(0, part * span) == 40 + part
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V6")
def test_a_whole_table_is_overwritten_in_one_exit(spec: FormatSpec) -> None:
    guest = Guest(spec, out_of_sync())
    guest.bench.do(0, Fill(guest.window, 4096, 0))
    assert guest.told() == ["hidden"]
    guest.bench.load_cr3(0, guest.root)
    assert guest.bench.access(0, GVA) == Faulted(PF_U)
    assert guest.bench.access(1, GVA) == X
    guest.bench.assert_coherent()
