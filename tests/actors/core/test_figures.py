"""Figures 9 to 13 as they read: what is written, read and returned, in the text's own order.

The second GVPN's entry lies in page table 292A; VCPUs A, B, C and D are 0, 1, 2 and 3; A and C have
derived data of it (¶105).
"""

from __future__ import annotations

import pytest

from penumbra.actors.core import (
    Consumer,
    Drained,
    InUse,
    Layout,
    Matrix,
    Outcome,
    Patch,
    Producer,
    ProtocolError,
    Words,
)

A, B, C, D = range(4)
TABLE_292A = 0x292A000
SECOND_GVPN = 0x10
ENTRY = (TABLE_292A, SECOND_GVPN)
THIRD_GPPN, FOURTH_GPPN = 0x3001, 0x4001
FOURTH_PPN = 0x44001


class Journal:
    """Words that write down, by name, every store and, when asked, every load."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._words: Words = layout.new_words()
        self.loads: list[str] = []
        self.stores: list[str] = []

    def __getitem__(self, at: int, /) -> int:
        self.loads.append(self._layout.name(at))
        return self._words[at]

    def __setitem__(self, at: int, value: int, /) -> None:
        self.stores.append(self._layout.name(at))
        self._words[at] = value

    def clear(self) -> None:
        self.loads.clear()
        self.stores.clear()


def store_and_post(producer: Producer, consumers: int, derived: int | None = None) -> int:
    producer.begin([ENTRY])
    producer.stored()
    full = producer.post_all(consumers, *ENTRY, derived, FOURTH_GPPN)
    producer.end()
    return full


def in_channel(in_use: InUse) -> list[str]:
    names = ["base[0>2:0]", "offset[0>2:0]", "derived[0>2:0]", "source[0>2:0]", "usefulness[0>2:0]"]
    return [*(names[1:] if in_use is InUse.BASE else names), "in_use[0>2:0]"]


@pytest.mark.shows(
    "P3", "P12", "Fig 11 831", "Fig 11 834", "Fig 11 838", "Fig 11 840", "Fig 11 842", "Fig 11 848"
)
def test_figure_11_pending_first_then_whole_patches_in_use_last_then_the_bells() -> None:
    journal = Journal(Layout(4, 2))
    matrix = Matrix(4, 2, journal)
    journal.clear()
    store_and_post(matrix.producer(A), 1 << C, FOURTH_PPN)
    assert journal.stores == [
        "pending[0].1",
        "pending[0].2",
        "pending[0]",
        *in_channel(InUse.FIELD),
        "tail[0>2]",
        "bell[0>2]",
        "pending[0]",
    ]


@pytest.mark.shows("P1", "A40c 56", "A40c 66", "A40c 72")
@pytest.mark.parametrize("in_use", InUse)
def test_a_patch_is_marked_in_use_after_the_rest_of_it_is_written(in_use: InUse) -> None:
    journal = Journal(Layout(4, 2, in_use))
    matrix = Matrix(4, 2, journal, in_use=in_use)
    journal.clear()
    store_and_post(matrix.producer(A), 1 << C, FOURTH_PPN)
    assert journal.stores[3:-3] == in_channel(in_use)
    assert matrix.consumer(C).event() == Drained(
        [Patch(*ENTRY, FOURTH_PPN, FOURTH_GPPN, matrix.count, A, 0)]
    )


@pytest.mark.shows("P3", "Fig 11 832", "A40c 48")
def test_only_the_consumers_of_the_trace_get_a_patch() -> None:
    matrix = Matrix(4)
    assert store_and_post(matrix.producer(A), 1 << A | 1 << C) == 0
    occupied = [pair for row in matrix.channels() for pair in row if matrix.occupancy(*pair)]
    assert occupied == [(A, A), (A, C)]


@pytest.mark.shows("P3", "Fig 11 832")
def test_without_832_every_consumer_is_told() -> None:
    matrix = Matrix(4)
    store_and_post(matrix.producer(B), 0b1111)
    assert [matrix.occupancy(B, consumer) for consumer in range(4)] == [1, 1, 1, 1]


@pytest.mark.shows("P3", "Fig 11 836", "Fig 11 837")
def test_a_second_change_of_an_entry_coalesces_and_only_the_newest_is_processed() -> None:
    matrix = Matrix(4)
    producer = matrix.producer(A)
    for derived in (0x33001, FOURTH_PPN):
        store_and_post(producer, 1 << C, derived)
    assert producer.tally(C) == (1, 1, 0)
    (patch,) = matrix.consumer(C).event().patches
    assert patch == Patch(*ENTRY, FOURTH_PPN, FOURTH_GPPN, matrix.count, A, 0)


@pytest.mark.shows("Fig 11 837")
def test_a_second_change_without_derived_value_voids_the_first_one() -> None:
    matrix = Matrix(4)
    store_and_post(matrix.producer(A), 1 << C, FOURTH_PPN)
    store_and_post(matrix.producer(A), 1 << C)
    consumer = matrix.consumer(C)
    (patch,) = consumer.event().patches
    assert patch.usefulness == 0
    assert not consumer.usable(patch, FOURTH_GPPN)


@pytest.mark.shows("P3", "P10", "Fig 11 844")
def test_a_full_channel_writes_nothing_and_the_caller_owes_a_shootdown() -> None:
    journal = Journal(Layout(2, 1))
    matrix = Matrix(2, 1, journal)
    producer = matrix.producer(0)
    producer.begin([(0x1000, 0)])
    producer.stored()
    assert producer.post_nowait(1, 0x1000, 0) is Outcome.POSTED
    journal.clear()
    assert producer.post_nowait(1, 0x1000, 8) is Outcome.FULL
    assert journal.stores == []
    assert producer.post_nowait(1, 0x1000, 0) is Outcome.COALESCED
    producer.end()


@pytest.mark.shows(
    "P4", "P12", "Fig 12 860", "Fig 12 862", "Fig 12 864", "Fig 12 866", "Fig 12 878", "Fig 12 880"
)
def test_figure_12_pending_rows_bells_then_copy_and_free() -> None:
    journal = Journal(Layout(4, 2))
    matrix = Matrix(4, 2, journal)
    store_and_post(matrix.producer(A), 1 << A | 1 << C, FOURTH_PPN)
    consumer = matrix.consumer(C)
    journal.clear()
    drained = consumer.event(lambda base, offset: (base, offset) == ENTRY)
    assert journal.loads == [
        *(f"pending[{producer}]" for producer in range(4)),
        *(f"bell[{producer}>2]" for producer in range(4)),
        "lost[0>2]",
        "tail[0>2]",
        "in_use[0>2:0]",
        "version[0>2:0]",
        *in_channel(InUse.FIELD)[:-1],
        "version[0>2:0]",
        "count",
    ]
    assert journal.stores == ["in_use[0>2:0]"]
    assert drained == Drained([Patch(*ENTRY, FOURTH_PPN, FOURTH_GPPN, matrix.count, A, 0)])
    assert matrix.occupancy(A, A) == 1, "VCPU A has had no event: it stays incoherent (¶122)"


@pytest.mark.shows("P4", "Fig 12 868")
def test_an_event_that_does_not_cover_a_patch_leaves_it_in_its_channel_until_one_does() -> None:
    matrix = Matrix(4)
    store_and_post(matrix.producer(A), 1 << C, FOURTH_PPN)
    consumer = matrix.consumer(C)
    assert consumer.event(lambda _, offset: offset != SECOND_GVPN) == Drained([])
    assert matrix.occupancy(A, C) == 1
    assert not consumer.is_empty
    assert [patch.derived for patch in consumer.event().patches] == [FOURTH_PPN]
    assert consumer.is_empty


@pytest.mark.shows("P9", "Fig 9 394E", "A40c 49", "A40c 50", "A40c 51", "A40c 64", "A40c 70")
def test_a_derived_value_is_usable_while_count_and_source_stand() -> None:
    matrix = Matrix(4)
    consumer: Consumer = matrix.consumer(C)
    accessed = 0x20
    store_and_post(matrix.producer(A), 1 << C, FOURTH_PPN)
    (patch,) = consumer.event().patches
    assert consumer.usable(patch, FOURTH_GPPN)
    assert consumer.usable(patch, FOURTH_GPPN | accessed, ~accessed)
    assert not consumer.usable(patch, FOURTH_GPPN | accessed)
    assert not consumer.usable(patch, THIRD_GPPN)

    store_and_post(matrix.producer(A), 1 << C, FOURTH_PPN)
    matrix.place_trace()
    (patch,) = consumer.event().patches
    assert not consumer.usable(patch, FOURTH_GPPN)


@pytest.mark.shows("P2", "Fig 10 397")
def test_figure_10_has_a_channel_for_each_pair_and_each_a_place_of_its_own() -> None:
    matrix = Matrix(4)
    pairs = [pair for row in matrix.channels() for pair in row]
    assert pairs == [(p, c) for p in range(4) for c in range(4)]
    assert len({matrix.layout.header(*pair) for pair in pairs}) == 16


@pytest.mark.shows("P2", "P12", "A40c 57")
def test_figures_13_show_the_matrix_by_producer_and_by_consumer() -> None:
    letters = iter("ABCDEFGHIJKLMNOP")
    matrix = Matrix(4)
    name = {pair: f"398{next(letters)}" for row in matrix.channels() for pair in row}
    assert len(name) == 16
    assert [name[pair] for pair in matrix.channels_from(C)] == ["398I", "398J", "398K", "398L"]
    assert [name[pair] for pair in matrix.channels_to(B)] == ["398B", "398F", "398J", "398N"]


@pytest.mark.shows("P2")
def test_one_vcpu_has_one_channel_to_itself() -> None:
    matrix = Matrix(1)
    store_and_post(matrix.producer(0), 1)
    assert matrix.consumer(0).event() == Drained([Patch(*ENTRY, 0, FOURTH_GPPN, 0, 0, 0)])
    matrix.check()


@pytest.mark.shows("P12", "A40c 61", "A40c 67", "A40c 73")
def test_two_consumers_of_the_same_entry_follow_at_their_own_events() -> None:
    matrix = Matrix(4)
    store_and_post(matrix.producer(A), 1 << A | 1 << C)
    assert [p[:2] for p in _keys(matrix.consumer(C).event())] == [ENTRY]
    assert matrix.consumer(C).event() == Drained([])
    assert [p[:2] for p in _keys(matrix.consumer(A).event())] == [ENTRY]


@pytest.mark.shows("P12", "A40c 48", "A40c 63", "A40c 69")
def test_two_different_entries_reach_two_different_consumers() -> None:
    matrix = Matrix(2)
    producer = matrix.producer(0)
    for consumer, entry in ((0, (0x1000, 0)), (1, (0x2000, 8))):
        producer.begin([entry])
        producer.stored()
        assert producer.post_nowait(consumer, *entry) is Outcome.POSTED
        producer.end()
    assert _keys(matrix.consumer(0).event()) == [(0x1000, 0)]
    assert _keys(matrix.consumer(1).event()) == [(0x2000, 8)]


@pytest.mark.shows("P12")
def test_a_bystander_posts_and_gets_nothing_itself() -> None:
    matrix = Matrix(3)
    store_and_post(matrix.producer(1), 1 << 0 | 1 << 2)
    assert matrix.consumer(1).event() == Drained([])
    assert _keys(matrix.consumer(2).event()) == [ENTRY]


def test_steps_out_of_order_are_refused_and_change_nothing() -> None:
    journal = Journal(Layout(2, 1))
    producer = Matrix(2, 1, journal).producer(0)
    journal.clear()
    for step in (
        producer.stored,
        producer.end,
        lambda: producer.post_nowait(0, 1, 2),
        lambda: producer.begin([]),
        lambda: producer.begin([(0, 0)] * 4),
    ):
        with pytest.raises(ProtocolError):
            step()
    assert journal.stores == []


def _keys(drained: Drained) -> list[tuple[int, int]]:
    return [(patch.base, patch.offset) for patch in drained.patches]
