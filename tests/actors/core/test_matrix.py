"""The matrix against plain dictionaries, under every sequence Hypothesis can think of."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penumbra.actors.core import ATOMIC, InUse, Matrix, Order, Outcome, Patch, Postpone

Entry = tuple[int, int]
ENTRIES: list[Entry] = [(base, offset) for base in (0x1000, 0x2000) for offset in (0, 8, 0x1000)]

vcpus = st.integers(0, 2)
entries = st.sampled_from(ENTRIES)
covered = st.none() | st.sets(entries)


class Followers(RuleBasedStateMachine):
    """VCPUs that each keep a copy of every entry, and the channels as sets of keys."""

    @initialize(
        n=st.integers(1, 3),
        capacity=st.sampled_from([1, 2, 4, 64]),
        in_use=st.sampled_from(InUse),
        postpone=st.sampled_from(Postpone),
        order=st.sampled_from([Order.CORRECT, ATOMIC, Order.VOID_ON_COALESCE, Order.BELL_FLAG]),
    )
    def start(self, n: int, capacity: int, in_use: InUse, postpone: Postpone, order: Order) -> None:
        self.matrix = Matrix(n, capacity, in_use=in_use, postpone=postpone, order=order)
        self.postpone = postpone
        self.primary = dict.fromkeys(ENTRIES, 0)
        self.copies = [dict(self.primary) for _ in range(n)]
        self.stale: list[set[Entry]] = [set() for _ in range(n)]
        self.channels: dict[tuple[int, int], set[Entry]] = {
            pair: set() for row in self.matrix.channels() for pair in row
        }
        self.stored: list[set[Entry]] = [set() for _ in range(n)]
        self.losing = [False] * n

    @rule(producer=vcpus, entry=entries, on_full=st.sampled_from(["shootdown", "lose", "wait"]))
    def store(self, producer: int, entry: Entry, on_full: str) -> None:
        producer %= self.matrix.n
        unit = self.matrix.producer(producer)
        unit.begin([entry])
        self.primary[entry] = value = self.primary[entry] + 1
        unit.stored()
        for consumer in range(self.matrix.n):
            self.stale[consumer].add(entry)
            if self.post(producer, consumer, entry, value):
                continue
            if on_full == "shootdown":
                self.copies[consumer][entry] = value
                self.stale[consumer].discard(entry)
            elif on_full == "lose":
                unit.lose(consumer)
                self.losing[consumer] = True
            else:
                self.event(consumer, None)
                assert self.post(producer, consumer, entry, value)
        unit.end()

    def post(self, producer: int, consumer: int, entry: Entry, value: int) -> bool:
        """Post, and compare what became of it with the model; False = full."""
        channel = self.channels[producer, consumer]
        if entry in channel:
            expected = Outcome.COALESCED
        elif len(channel) == self.matrix.capacity:
            expected = Outcome.FULL
        else:
            expected = Outcome.POSTED
        outcome = self.matrix.producer(producer).post_nowait(consumer, *entry, 2 * value, value)
        assert outcome is expected
        if outcome is not Outcome.FULL:
            channel.add(entry)
            self.stale[consumer].add(entry)
        return outcome is not Outcome.FULL

    @rule(consumer=vcpus)
    def mark(self, consumer: int) -> None:
        self.matrix.consumer(consumer % self.matrix.n).mark_drop_all()
        self.losing[consumer % self.matrix.n] = True

    @rule()
    def place_trace(self) -> None:
        before = self.matrix.count
        assert self.matrix.place_trace() == self.matrix.count == before + 1

    @rule(consumer=vcpus, covers=covered)
    def event(self, consumer: int, covers: set[Entry] | None) -> None:
        consumer %= self.matrix.n
        wanted = set(ENTRIES) if covers is None else covers
        unit = self.matrix.consumer(consumer)
        drained = unit.event(
            None if covers is None else lambda base, offset: (base, offset) in wanted
        )
        assert drained.drop_all is self.losing[consumer]
        if drained.drop_all:
            assert drained.patches == []
            self.drop(consumer)
            return
        self.take(consumer, wanted, drained.patches)

    @rule(consumer=vcpus, base=st.sampled_from([0x1000, 0x2000]))
    def link_again(self, consumer: int, base: int) -> None:
        consumer %= self.matrix.n
        drained = self.matrix.consumer(consumer).drain_base(base)
        if drained.drop_all:
            self.drop(consumer)
        else:
            self.take(consumer, {entry for entry in ENTRIES if entry[0] == base}, drained.patches)

    def drop(self, consumer: int) -> None:
        self.losing[consumer] = False
        self.copies[consumer] = dict(self.primary)
        self.stale[consumer].clear()
        self.stored[consumer].clear()
        for producer in range(self.matrix.n):
            self.channels[producer, consumer].clear()

    def take(self, consumer: int, wanted: set[Entry], patches: list[Patch]) -> None:
        """Follow the patches, and compare what is left with the model."""
        unit = self.matrix.consumer(consumer)
        for patch in patches:
            entry = (patch.base, patch.offset)
            assert entry in wanted
            current = self.primary[entry]
            if unit.usable(patch, current):
                assert patch.derived == 2 * current
            self.copies[consumer][entry] = current
        self.stale[consumer] -= wanted
        self.stored[consumer] -= wanted
        for producer in range(self.matrix.n):
            channel = self.channels[producer, consumer]
            channel -= wanted
            if self.postpone is Postpone.IN_STORE:
                self.stored[consumer] |= channel
                channel.clear()
        assert not unit.settle()

    @precondition(lambda self: hasattr(self, "matrix"))
    @invariant()
    def channels_hold_what_the_model_holds(self) -> None:
        self.matrix.check()
        for pair, keys in self.channels.items():
            assert self.matrix.occupancy(*pair) == len(keys)
        for consumer, keys in enumerate(self.stored):
            assert set(self.matrix.consumer(consumer).postponed) == keys

    @precondition(lambda self: hasattr(self, "matrix"))
    @invariant()
    def a_copy_is_wrong_only_where_no_event_has_covered_a_change(self) -> None:
        for copies, stale in zip(self.copies, self.stale, strict=True):
            wrong = {entry for entry in ENTRIES if copies[entry] != self.primary[entry]}
            assert wrong <= stale


TestFollowers = pytest.mark.shows("P2", "P4", "P10", "P11", "A40c 55")(Followers.TestCase)
TestFollowers.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def post(matrix: Matrix, producer_id: int, consumer: int, *offsets: int) -> list[Outcome]:
    producer = matrix.producer(producer_id)
    outcomes = []
    for offset in offsets:
        producer.begin([(0x1000, offset)])
        producer.stored()
        outcomes.append(producer.post_nowait(consumer, 0x1000, offset))
        producer.end()
    return outcomes


@pytest.mark.shows("P10")
def test_with_one_slot_every_second_entry_overflows_and_the_statistics_say_so() -> None:
    matrix = Matrix(2, 1)
    assert post(matrix, 0, 1, 0, 0, 8, 16) == [
        Outcome.POSTED,
        Outcome.COALESCED,
        Outcome.FULL,
        Outcome.FULL,
    ]
    matrix.consumer(1).event()
    seen = matrix.statistics(0, 1)
    assert (seen.n_posted, seen.n_coalesced, seen.n_overflows) == (1, 1, 2)
    assert (seen.n_applied, seen.n_in_channel, seen.peak) == (1, 0, 1)


def test_the_peak_is_the_most_that_ever_waited() -> None:
    matrix = Matrix(1, 8)
    for n in (2, 5, 3):
        post(matrix, 0, 0, *range(0, 8 * n, 8))
        matrix.consumer(0).event()
    post(matrix, 0, 0, 0)
    assert matrix.statistics(0, 0).peak == 5


@pytest.mark.shows("P4", "Fig 12 870")
def test_a_postponed_key_frees_its_slot_and_comes_back_without_derived_value() -> None:
    matrix = Matrix(1, 1, postpone=Postpone.IN_STORE)
    consumer = matrix.consumer(0)
    for offset in (0, 8, 16):
        assert post(matrix, 0, 0, offset) == [Outcome.POSTED]
        assert consumer.event(lambda _base, _offset: False).patches == []
    assert consumer.postponed == ((0x1000, 0), (0x1000, 8), (0x1000, 16))
    assert consumer.event(lambda _, offset: offset == 8).patches == [Patch(0x1000, 8)]
    assert consumer.event().patches == [Patch(0x1000, 0), Patch(0x1000, 16)]
    matrix.check()


@pytest.mark.shows("P6")
def test_a_restarted_consumer_is_empty_and_finds_what_is_posted_from_then_on() -> None:
    matrix = Matrix(2, 4)
    post(matrix, 0, 1, 0, 8)
    consumer = matrix.restart_consumer(1)
    assert consumer.is_empty
    post(matrix, 0, 1, 16)
    assert [patch.offset for patch in consumer.event().patches] == [16]
    seen = matrix.statistics(0, 1)
    assert (seen.n_posted, seen.n_dropped, seen.n_applied) == (3, 2, 1)
    matrix.check()


@pytest.mark.shows("P6")
def test_a_producer_that_died_in_a_store_makes_its_consumers_drop_everything() -> None:
    matrix = Matrix(2, 4)
    producer = matrix.producer(0)
    producer.begin([(0x1000, 0)])
    producer.stored()
    assert [patch.number for patch in matrix.consumer(1).event().patches] == [-1]
    matrix.restart_producer(0)
    for index in (0, 1):
        assert matrix.consumer(index).event().drop_all
        assert matrix.consumer(index).is_empty
    assert post(matrix, 0, 1, 0) == [Outcome.POSTED]
    matrix.check()


def test_a_new_matrix_over_old_words_goes_on_where_the_old_one_was() -> None:
    old = Matrix(1, 2)
    post(old, 0, 0, 0)
    old.place_trace()
    new = Matrix(1, 2, old.words)
    assert new.count == 2
    assert post(new, 0, 0, 8, 16) == [Outcome.POSTED, Outcome.FULL]
    assert sorted(patch.offset for patch in new.consumer(0).event().patches) == [0, 8]


def test_an_index_beyond_the_matrix_is_refused() -> None:
    for make in (Matrix(2).producer, Matrix(2).consumer):
        with pytest.raises(IndexError, match="no VCPU 2 in a matrix of 2"):
            make(2)
