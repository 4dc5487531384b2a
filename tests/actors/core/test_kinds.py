"""Other ways to share patch channels (A40 ¶58, ¶127): every schedule of small worlds, and models.

What a consumer must see is the same in all of them; what they cost is not. Each schedule of SC is
one of TSO, too: the one in which every store drains at once.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penumbra.actors.core import SWITCHES, Channels, InUse, Matrix, Order, Patch, Postpone
from penumbra.actors.core.races import World
from penumbra.actors.core.schedules import explore, wander
from penumbra.actors.core.stepper import Model
from penumbra.actors.core.topology import BroadcastLayout, LockedLayout, layout_of

OTHERS = [kind for kind in Channels if kind is not Channels.PAIR]
LOCKED = [kind for kind in Channels if kind.is_locked]

SMALL = {
    "one store": World(),
    "two stores of one entry": World(stores=("x1 x2",)),
    "two entries": World(stores=("x1 y1",), capacity=2),
    "two entries, one slot, lost mark": World(stores=("x1 y1",)),
    "one store that touches two entries": World(stores=("xy1",), capacity=2),
    "uncovered, left in the channel": World(stores=("x1 x2",), free_covers=""),
    "uncovered, kept in the store": World(
        stores=("x1 x2",), free_covers="", postpone=Postpone.IN_STORE
    ),
    "one of two entries covered": World(stores=("x1 y1",), capacity=2, free_covers="y"),
    "a trace placer that asks": World(placer="asks"),
    "a trace placer that writes": World(placer="writes"),
    "linked again": World(stores=("x1 x2",), relinks=True),
    "837 voids": World(stores=("x1 x2",), order=Order.VOID_ON_COALESCE),
    "no coalescing": World(stores=("x1 x2",), capacity=2, order=SWITCHES["no_coalescing"].order),
}


@pytest.mark.shows("P8", "P7", "A40 ¶58", "A40 ¶127")
@pytest.mark.parametrize("kind", OTHERS)
def test_no_schedule_of_a_small_world_goes_wrong_in_any_kind(kind: Channels) -> None:
    for label, world in SMALL.items():
        verdict = explore(replace(world, channels=kind).program(), Model.TSO)
        assert (verdict.n_failing, verdict.failure) == (0, ""), label
        assert verdict.n_schedules > 1000, label


@pytest.mark.shows("P8", "P7")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    "world",
    [
        World(stores=("x1", "x2"), monotone=False, n_free=0),
        World(stores=("x1", "y1"), monotone=False, n_free=0),
        World(n_consumers=2, n_free=0),
    ],
    ids=["two producers, one entry", "two producers, two entries, one slot", "two consumers"],
)
def test_two_on_one_side_share_a_channel_without_loss(kind: Channels, world: World) -> None:
    verdict = explore(replace(world, channels=kind).program(), Model.TSO)
    assert (verdict.n_failing, verdict.failure) == (0, "")


LARGE = World(stores=("x1 y1 x2", "y3 x3"), n_consumers=2, n_free=2, monotone=False)


@pytest.mark.shows("P8", "P7", "P10")
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(OTHERS),
    st.sampled_from(Model),
    st.sampled_from(Postpone),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["", "x", "xyz"]),
    st.randoms(use_true_random=False),
)
def test_random_schedules_of_a_larger_world_stay_right_in_any_kind(
    kind: Channels, model: Model, postpone: Postpone, capacity: int, covers: str, draw: Random
) -> None:
    world = replace(LARGE, channels=kind, postpone=postpone, capacity=capacity, free_covers=covers)
    program = world.program()
    end, schedule = wander(program, draw.randrange, model)
    assert program.judge(end) is None, schedule


@pytest.mark.shows("P8", "EP1", "A40 ¶58")
@pytest.mark.parametrize("kind", LOCKED)
def test_with_a_lock_held_until_the_install_the_printed_order_of_figure_12_is_right(
    kind: Channels,
) -> None:
    world = World(
        stores=("x1 x2",), monotone=False, order=SWITCHES["free_last"].order, channels=kind
    )
    for model in Model:
        assert explore(world.program(), model).n_failing == 0
        without = replace(world, order=world.order | Order.NO_CHANNEL_LOCK)
        assert explore(without.program(), model).n_failing > 0


@pytest.mark.shows("P8")
@pytest.mark.parametrize("kind", LOCKED)
def test_a_lock_orders_what_fences_and_versions_order_without_one(kind: Channels) -> None:
    needless = Order.NO_PRODUCER_FENCE | Order.NO_CONSUMER_FENCE | Order.NO_VERSION
    world = World(stores=("x1 x2",), monotone=False, order=needless)
    assert explore(replace(world, channels=kind).program(), Model.TSO).n_failing == 0
    assert explore(world.program(), Model.TSO).n_failing > 0


@pytest.mark.shows("P8")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    ("switch", "world"),
    [
        ("no_pending", World()),
        ("no_count_check", World(placer="asks", n_free=0, monotone=False)),
    ],
)
def test_what_a_channel_cannot_know_is_needed_in_every_kind(
    kind: Channels, switch: str, world: World
) -> None:
    world = replace(world, channels=kind, order=SWITCHES[switch].order)
    assert explore(world.program()).n_failing > 0
    assert explore(world.with_order(Order.CORRECT).program()).n_failing == 0


def tell(
    matrix: Matrix, producer_id: int, consumers: int, offset: int, value: int = 1
) -> tuple[int, list[int]]:
    """Store and post to the consumers of a bit set; return the full ones, and the occupancies."""
    producer = matrix.producer(producer_id)
    producer.begin([(0x1000, offset)])
    producer.stored()
    full = producer.post_all(consumers, 0x1000, offset, 2 * value, value)
    producer.end()
    return full, [matrix.occupancy(producer_id, consumer) for consumer in range(matrix.n)]


@pytest.mark.shows("P8", "A40 ¶58")
@pytest.mark.parametrize("kind", [Channels.SHARED, Channels.PER_PRODUCER])
def test_a_patch_is_freed_when_every_interested_consumer_has_taken_it(kind: Channels) -> None:
    matrix = Matrix(3, 1, channels=kind)
    assert tell(matrix, 0, 0b011, 0) == (0, [1, 1, 0])
    assert tell(matrix, 0, 0b100, 8) == (0b100, [1, 1, 0])
    assert len(matrix.consumer(0).event().patches) == 1
    assert tell(matrix, 0, 0b001, 8) == (0b001, [0, 1, 0])
    assert matrix.producer(0).blockers(0b001) == 0b011
    assert len(matrix.consumer(1).event().patches) == 1
    assert tell(matrix, 0, 0b100, 8) == (0, [0, 0, 1])
    assert matrix.consumer(2).event().patches == [Patch(0x1000, 8, 2, 1, 1, 0, _slot(matrix))]
    matrix.check()


def _slot(matrix: Matrix) -> int:
    layout = matrix.layout
    return layout.header(0, 0) + 8 if isinstance(layout, LockedLayout) else 0


@pytest.mark.shows("P8", "P3", "Fig 11 837")
@pytest.mark.parametrize("kind", OTHERS)
def test_a_second_store_reaches_those_who_have_taken_the_first_and_those_who_have_not(
    kind: Channels,
) -> None:
    matrix = Matrix(2, 4, channels=kind)
    tell(matrix, 0, 0b11, 0, 1)
    matrix.consumer(0).event()
    tell(matrix, 0, 0b11, 0, 2)
    for consumer in (0, 1):
        (patch,) = matrix.consumer(consumer).event().patches
        assert (patch.offset, patch.derived, patch.source) == (0, 4, 2)
        assert matrix.consumer(consumer).usable(patch, 2)
    matrix.check()
    seen = [matrix.statistics(0, consumer) for consumer in (0, 1)]
    assert [(one.n_posted, one.n_coalesced, one.n_applied) for one in seen] == [
        (2, 0, 2),
        (1, 1, 1),
    ]


@pytest.mark.shows("P8")
@pytest.mark.parametrize("kind", [Channels.SHARED, Channels.PER_CONSUMER])
def test_stores_of_two_producers_coalesce_where_they_share_a_channel(kind: Channels) -> None:
    matrix = Matrix(2, 1, channels=kind)
    tell(matrix, 0, 0b01, 0, 1)
    assert tell(matrix, 1, 0b01, 0, 2)[0] == 0
    (patch,) = matrix.consumer(0).event().patches
    assert (patch.derived, patch.producer) == (4, 1)
    matrix.check()


@pytest.mark.shows("P8")
def test_memory_and_locks_are_what_the_kinds_trade() -> None:
    n, capacity = 8, 64
    words = {kind: layout_of(kind, n, capacity).n_words for kind in Channels}
    slots = 8 * capacity
    assert words[Channels.SHARED] < words[Channels.PER_CONSUMER] < n * n * slots // 4
    assert words[Channels.PER_PRODUCER] < words[Channels.PAIR] // 2
    locks = {}
    for kind in Channels:
        matrix = Matrix(n, capacity, channels=kind)
        for offset in range(0, 32, 8):
            tell(matrix, 0, 0b1111, offset)
        for consumer in range(4):
            matrix.consumer(consumer).event()
        locks[kind] = matrix.n_locks(0) + sum(matrix.consumer(i).n_locks for i in range(1, 4))
    assert locks == {
        Channels.PAIR: 0,
        Channels.PER_PRODUCER: 0,
        Channels.SHARED: 4 + 4,
        Channels.PAIR_LOCKED: 16 + 4,
        Channels.PER_CONSUMER: 16 + 4,
    }


def test_a_form_of_in_use_and_a_number_of_sharers_that_cannot_be_are_refused() -> None:
    for kind in OTHERS:
        with pytest.raises(ValueError, match=f"{kind.value} channels have one form of in-use"):
            layout_of(kind, 2, 2, InUse.BASE)
    with pytest.raises(ValueError, match="at most 64 consumers"):
        layout_of(Channels.SHARED, 65, 2)
    assert layout_of(Channels.PER_PRODUCER, 65, 2).n == 65


@pytest.mark.parametrize("kind", OTHERS)
def test_every_word_of_a_layout_has_a_name_of_its_own(kind: Channels) -> None:
    layout = layout_of(kind, 2, 3)
    assert isinstance(layout, BroadcastLayout | LockedLayout)
    names = [layout.name(at) for at in range(layout.n_words)]
    used = [name for name in names if not name.startswith("unused")]
    assert len(used) == len(set(used))


class Sharers(RuleBasedStateMachine):
    """VCPUs that each keep a copy of every entry, whatever the kind of channels."""

    ENTRIES = tuple((base, offset) for base in (0x1000, 0x2000) for offset in (0, 8))

    @initialize(
        kind=st.sampled_from(Channels),
        n=st.integers(1, 3),
        capacity=st.sampled_from([1, 2, 4, 64]),
        postpone=st.sampled_from(Postpone),
    )
    def start(self, kind: Channels, n: int, capacity: int, postpone: Postpone) -> None:
        self.matrix = Matrix(n, capacity, channels=kind, postpone=postpone)
        self.primary = dict.fromkeys(self.ENTRIES, 0)
        self.copies = [dict(self.primary) for _ in range(n)]
        self.stale: list[set[tuple[int, int]]] = [set() for _ in range(n)]
        self.losing = [False] * n

    @rule(
        producer=st.integers(0, 2),
        entry=st.sampled_from(ENTRIES),
        consumers=st.integers(0, 7),
        on_full=st.sampled_from(["shootdown", "lose", "wait"]),
    )
    def store(self, producer: int, entry: tuple[int, int], consumers: int, on_full: str) -> None:
        n = self.matrix.n
        unit, consumers = self.matrix.producer(producer % n), consumers & ((1 << n) - 1)
        unit.begin([entry])
        self.primary[entry] = value = self.primary[entry] + 1
        unit.stored()
        for consumer in range(n):
            if consumers >> consumer & 1:
                self.stale[consumer].add(entry)
            else:
                self.copies[consumer][entry] = value
        full = unit.post_all(consumers, *entry, 2 * value, value)
        assert full & ~consumers == 0
        if on_full == "wait" and full:
            blocking = unit.blockers(full)
            for consumer in range(n):
                if blocking >> consumer & 1:
                    self.event(consumer, None)
            assert unit.post_all(full, *entry, 2 * value, value) == 0
        for consumer in range(n):
            if full >> consumer & 1 and on_full == "shootdown":
                self.copies[consumer][entry] = value
                self.stale[consumer].discard(entry)
            elif full >> consumer & 1 and on_full == "lose":
                unit.lose(consumer)
                self.losing[consumer] = True
        unit.end()

    @rule(consumer=st.integers(0, 2), covers=st.none() | st.sets(st.sampled_from(ENTRIES)))
    def event(self, consumer: int, covers: set[tuple[int, int]] | None) -> None:
        consumer %= self.matrix.n
        wanted = set(self.ENTRIES) if covers is None else covers
        unit = self.matrix.consumer(consumer)
        drained = unit.event(None if covers is None else lambda b, o: (b, o) in wanted)
        assert drained.drop_all is self.losing[consumer]
        if drained.drop_all:
            self.losing[consumer] = False
            self.copies[consumer] = dict(self.primary)
            wanted = set(self.ENTRIES)
        for patch in drained.patches:
            entry = (patch.base, patch.offset)
            assert entry in wanted
            if unit.usable(patch, self.primary[entry]):
                assert patch.derived == 2 * self.primary[entry]
            self.copies[consumer][entry] = self.primary[entry]
        self.stale[consumer] -= wanted
        assert not unit.settle()

    @precondition(lambda self: hasattr(self, "matrix"))
    @invariant()
    def a_copy_is_wrong_only_where_no_event_has_covered_a_change(self) -> None:
        self.matrix.check()
        for copies, stale in zip(self.copies, self.stale, strict=True):
            assert {e for e in self.ENTRIES if copies[e] != self.primary[e]} <= stale


TestSharers = pytest.mark.shows("P8", "P10", "P11")(Sharers.TestCase)
TestSharers.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.shows("P6", "P8")
@pytest.mark.parametrize("kind", OTHERS)
def test_restarts_leave_nothing_behind_in_any_kind(kind: Channels) -> None:
    matrix = Matrix(2, 4, channels=kind)
    tell(matrix, 0, 0b11, 0)
    assert matrix.restart_consumer(1).is_empty
    assert [patch.offset for patch in matrix.consumer(0).event().patches] == [0]
    tell(matrix, 0, 0b10, 8)
    matrix.restart_producer(0)
    assert all(matrix.consumer(index).event().drop_all for index in (0, 1))
    assert tell(matrix, 0, 0b11, 16) == (0, [1, 1])
    assert [matrix.consumer(index).event().patches[0].offset for index in (0, 1)] == [16, 16]
    matrix.check()
