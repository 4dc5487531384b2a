"""The errors of A40 by name (`docs/errata.md`): each as printed goes wrong, as built it does not.

EP1, EP2, EP4, EP5, EP14 to EP17 and EP19 need two processors inside one exit and are played in all
schedules of a small world; the others are seen on tables and TLBs. EP3, EP18 and EP20 are
`test_fig12_consumer`'s, EP10 is `test_fig11_producer`'s, EP19 `test_crossings`'.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from penumbra.actors.core import Channels, InUse, Order
from penumbra.actors.core.fills import Filling
from penumbra.actors.core.races import World
from penumbra.actors.core.scenes import SCENES
from penumbra.actors.core.schedules import ScheduleError, explore
from penumbra.actors.core.stepper import Model
from penumbra.hw.formats import IA32, X86_64, FormatSpec
from tests.actors.vmm.bench import USED, Bench, Seen, patch

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
PAGE, NEIGHBOUR, ELSEWHERE = 0x1000, 0x2000, 0x3F_0000
X, Y, Z = 40, 41, 42


def assert_fails_as_printed_and_holds_as_built(name: str) -> None:
    """Play a listed schedule, then all there are, with a switch and without."""
    scene = SCENES[name]
    assert scene.play(scene.fault) == scene.wrong
    printed = explore(scene.world.with_order(scene.fault).program(), scene.model)
    assert printed.n_failing > 0
    if scene.forbids:
        with pytest.raises(ScheduleError, match=scene.forbids):
            scene.play(scene.right)
    else:
        assert scene.play(scene.right) is None
    for model in Model:
        assert explore(scene.world.with_order(scene.right).program(), model).n_failing == 0


@pytest.mark.shows("EP1", "race 2", "P4", "Fig 12 878", "A40 ¶128")
def test_EP1_a_patch_freed_last_loses_the_store_that_coalesced_with_it() -> None:
    assert_fails_as_printed_and_holds_as_built("free_last")


@pytest.mark.shows("EP2", "race 3", "P3", "Fig 11 837", "A40c 55", "A40c 65", "A40c 71")
def test_EP2_a_patch_rewritten_while_it_is_read_passes_for_another() -> None:
    assert_fails_as_printed_and_holds_as_built("no_version")


@pytest.mark.shows("EP2", "P3", "Fig 11 837", "A40 ¶108")
def test_EP2_need_not_be_versioned_where_837_only_voids() -> None:
    voids = Order.NO_VERSION | Order.VOID_ON_COALESCE
    world = replace(SCENES["no_version"].world, order=voids)
    for model in Model:
        assert explore(world.program(), model).n_failing == 0


@pytest.mark.shows("EP3", "P9")
@pytest.mark.parametrize("switch", ["no_source_compare", "no_count_check"])
def test_EP3_the_trace_count_alone_or_the_source_alone_does_not_say_useful(switch: str) -> None:
    assert_fails_as_printed_and_holds_as_built(switch)


@pytest.mark.shows("EP4", "V5", "Fig 8 802", "Fig 8 812", "Fig 8 814")
def test_EP4_an_entry_read_before_its_consumer_is_registered_may_be_old() -> None:
    for model in Model:
        printed = explore(Filling(reads_first=True).program(), model)
        assert (printed.n_failing > 0, printed.reason) == (True, "R keeps x0 for x1")
        assert explore(Filling().program(), model).n_failing == 0
    assert explore(Filling(fences=False).program(), Model.SC).n_failing == 0
    assert explore(Filling(fences=False).program(), Model.TSO).n_failing > 0


@pytest.mark.shows("EP5", "Fig 11 832", "A40 ¶95-96")
def test_EP5_who_stops_being_a_consumer_and_keeps_its_copy_misses_a_store() -> None:
    for model in Model:
        assert explore(Filling(leaves=True, keeps=True).program(), model).n_failing > 0
        assert explore(Filling(leaves=True).program(), model).n_failing == 0


@both_formats
@pytest.mark.shows("EP5", "V6")
def test_EP5_a_consumer_leaves_when_nothing_of_its_shadow_derives_from_the_entry(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec)
    leaf = bench.map(bench.frame(), PAGE, X)
    bench.start(1)
    bench.access(0, PAGE)
    table, index = leaf >> 12, (leaf & 4095) // spec.entry_bytes
    upper = bench.where(1, PAGE, 1)
    linked = bench.entry(upper)
    bench.poke(1, upper, 0)
    bench.invlpg(0, PAGE)
    assert bench.traces.consumers(table, index) == 1, "detached, but kept: it is still told"
    bench.poke(1, leaf, Y << 12 | USED)
    bench.poke(1, upper, linked)
    assert bench.access(0, PAGE) == Y
    bench.poke(1, leaf, 0)
    bench.invlpg(0, PAGE)
    assert bench.traces.consumers(table, index) == 0, "gone and drained"
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("EP6", "P4", "Fig 12 872", "Fig 12 874", "Fig 12 876")
def test_EP6_a_patch_of_an_upper_entry_takes_all_below_it_from_shadow_and_tlb(
    spec: FormatSpec,
) -> None:
    for level in range(1, spec.top + 1):
        bench = Bench(spec)
        root = bench.frame()
        for gva, gfn in ((PAGE, X), (NEIGHBOUR, Y)):
            bench.map(root, gva, gfn)
        bench.start(root)
        assert [bench.access(0, gva) for gva in (PAGE, NEIGHBOUR)] == [X, Y]
        # Another subtree, with the two pages the other way round.
        other = bench.frame()
        for gva, gfn in ((PAGE, Y), (NEIGHBOUR, X)):
            bench.map(other, gva, gfn)
        upper = bench.where(root, PAGE, level)
        bench.poke(1, upper, bench.entry(bench.where(other, PAGE, level)))
        assert [bench.access(0, gva) for gva in (PAGE, NEIGHBOUR)] == [X, Y]
        bench.invlpg(0, PAGE)
        assert [bench.access(0, gva) for gva in (PAGE, NEIGHBOUR)] == [Y, X]
        bench.assert_coherent()


@pytest.mark.shows("EP7", "P4", "V4")
def test_EP7_a_table_linked_again_with_patches_waiting_is_old() -> None:
    assert_fails_as_printed_and_holds_as_built("relink_as_is")


@both_formats
@pytest.mark.shows("EP7", "P4", "V4", "C2")
@pytest.mark.parametrize("channels", [kind.value for kind in Channels])
def test_EP7_the_checker_refuses_the_translation_of_a_table_linked_as_it_was(
    spec: FormatSpec, channels: str
) -> None:
    for order, used in ((Order.RELINK_AS_IS, X), (Order.CORRECT, Y)):
        bench = Bench(spec, patch(channels=channels), order=order)
        root = bench.frame()
        leaf = bench.map(root, PAGE, X)
        bench.map(root, NEIGHBOUR, Z)
        bench.start(root)
        assert bench.access(0, PAGE) == X
        upper = bench.where(root, PAGE, 1)
        linked = bench.entry(upper)
        bench.poke(0, upper, 0)
        bench.invlpg(0, ELSEWHERE)
        bench.poke(0, leaf, Y << 12 | USED)
        bench.invlpg(0, PAGE)
        bench.poke(0, upper, linked)
        bench.access(0, NEIGHBOUR)  # links the table again
        assert bench.access(0, PAGE) == used
        assert bench.oracle.verdict().coherent == (used == Y)


@both_formats
@pytest.mark.shows("EP8", "P4", "Fig 12 868", "Fig 12 870")
@pytest.mark.parametrize("postpone", ["leave", "store"])
def test_EP8_what_may_be_postponed_ends_at_invlpg_of_any_page_for_uppers_and_at_a_cr3_load(
    spec: FormatSpec, postpone: str
) -> None:
    bench = Bench(spec, patch(postpone=postpone))
    root = bench.frame()
    leaf = bench.map(root, PAGE, X)
    bench.start(root)
    bench.access(0, PAGE)
    other = bench.frame()
    bench.map(other, ELSEWHERE, Z)
    bench.poke(1, leaf, Y << 12 | USED)
    bench.invlpg(0, ELSEWHERE)
    assert bench.access(0, PAGE) == X, "a leaf waits for its own event"
    bench.load_cr3(0, other)
    bench.load_cr3(0, root)
    assert bench.access(0, PAGE) == Y
    bench.poke(1, bench.where(root, PAGE, 1), 0)
    bench.invlpg(0, ELSEWHERE)
    assert bench.access(0, PAGE) != Y, "an upper entry does not"
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("EP9", "P10", "Fig 11 844")
def test_EP9_who_is_shot_down_is_the_one_whose_channel_is_full_and_older_patches_stay_harmless(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec, patch(capacity=1), n_vcpus=3)
    root = bench.frame()
    first, second = bench.map(root, PAGE, X), bench.map(root, NEIGHBOUR, X)
    bench.start(root)
    for vcpu in (0, 1):
        bench.access(vcpu, PAGE)
    bench.access(1, NEIGHBOUR)
    bench.take_log()
    bench.poke(2, first, Y << 12 | USED)  # a patch for both
    bench.poke(2, second, Y << 12 | USED)  # only VCPU 1 derives from it, and its channel is full
    assert bench.take_log() == [Seen("shot down", 1, (second & -4096, second & 4095))]
    bench.poke(2, second, Z << 12 | USED)
    bench.take_log()
    assert bench.access(1, NEIGHBOUR) == Z
    bench.load_cr3(1, root)  # applies the older patch of the first entry
    assert [bench.access(1, gva) for gva in (PAGE, NEIGHBOUR)] == [Y, Z]
    assert bench.access(0, PAGE) == X
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("EP11", "V6")
def test_EP11_a_frame_that_was_a_table_and_is_one_again_is_followed_again(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec)
    root = bench.frame()
    leaf = bench.map(root, PAGE, X)
    bench.start(root)
    bench.access(0, PAGE)
    table = leaf >> 12
    upper = bench.where(root, PAGE, 1)
    linked = bench.entry(upper)
    bench.poke(1, upper, 0)
    bench.invlpg(0, PAGE)
    bench.untrace(table)
    assert table not in bench.traces
    bench.memory.store(leaf, spec.entry_bytes, Y << 12 | USED)  # nobody hears of this
    bench.oracle.store(bench.memory.hpa(leaf) or 0, spec.entry_bytes, 0, Y << 12 | USED)
    bench.poke(1, upper, linked)
    assert bench.access(0, PAGE) == Y
    assert table in bench.traces
    bench.poke(1, leaf, Z << 12 | USED)
    bench.invlpg(0, PAGE)
    assert bench.access(0, PAGE) == Z
    bench.assert_coherent()


@pytest.mark.shows("EP13", "EP16", "race 6", "A40c 62", "A40c 68", "A40c 74")
def test_EP13_EP16_one_copy_for_two_consumers_needs_its_lock_and_both_take_their_patches() -> None:
    scene = SCENES["no_entry_lock"]
    assert scene.play(scene.fault) == scene.wrong
    with pytest.raises(ScheduleError) as refused:
        scene.play(scene.right)
    assert str(refused.value) == scene.forbids


@pytest.mark.shows("EP14", "race 4", "P9")
@pytest.mark.parametrize(
    "switch",
    [
        "no_pending",
        "pending_read_late",
        "bell_read_before_pending",
        "pending_after_store",
        "pending_cleared_early",
    ],
)
def test_EP14_a_store_is_seen_before_its_patch_unless_pending_says_so(switch: str) -> None:
    assert_fails_as_printed_and_holds_as_built(switch)


@pytest.mark.shows("EP15", "race 5", "P9", "V6")
@pytest.mark.parametrize("switch", ["no_recheck", "no_count_check"])
def test_EP15_a_trace_placed_between_check_and_install_leaves_a_writable_copy(switch: str) -> None:
    assert_fails_as_printed_and_holds_as_built(switch)


@pytest.mark.shows("EP17", "P1", "A40c 56", "A40c 66", "A40c 72", "A40 ¶110", "A40 ¶120")
@pytest.mark.parametrize("in_use", InUse)
def test_EP17_a_patch_in_use_before_all_of_it_is_written_is_read_by_halves(in_use: InUse) -> None:
    for model in Model:
        printed = World(monotone=False, order=Order.IN_USE_FIRST, in_use=in_use)
        assert explore(printed.program(), model).n_failing > 0
        assert explore(World(monotone=False, in_use=in_use).program(), model).n_failing == 0


@both_formats
@pytest.mark.shows("EP18", "P9", "A40 ¶100", "A40 ¶108")
def test_EP18_a_trace_on_any_page_voids_the_derived_value_not_one_on_the_mapping_alone(
    spec: FormatSpec,
) -> None:
    bench = Bench(spec)
    leaf = bench.map(bench.frame(), PAGE, X)
    bench.start(1)
    for vcpu in (0, 1):
        bench.access(vcpu, PAGE)
    for traced in (False, True):
        bench.poke(1, leaf, (Y if traced else Z) << 12 | USED)
        if traced:
            bench.place((Y,))  # the page it maps becomes a table; no trace came to the mapping's
        consumer = bench.matrix.consumer(0)
        (posted,) = consumer.event().patches
        assert (posted.usefulness == bench.matrix.count) is not traced
        assert consumer.usable(posted, posted.source) is not traced
